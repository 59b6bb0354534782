"""The numerical operators. This file holds the table of the scan's backends and imports none of them, nor PyTorch.

A new backend is a file that defines a `models.ops.scan_choice.ScanBackend`, and a row here.
"""

from utils.table import Table

SCAN_BACKENDS = Table("scan_backend", {
    "auto": None,  # the first of the following that is `fastest_on` the device and can run the call, else torch
    "cuda": "models.ops.scan_cuda:CUDA",
    "triton": "models.ops.scan_triton:TRITON",
    "cpp": "models.ops.scan_cpp:CPP",
    "mamba_ssm": "models.ops.scan_mamba:MAMBA_SSM",
    "torch": "models.ops.scan_torch:TORCH",
    "reference": "models.ops.scan_reference:REFERENCE",
})
