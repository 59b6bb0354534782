"""The formats that a trained model can be exported to (`--run_mode export`). A new one is a file, and a row here.

An entry is a function: `job.Job` to the files that it has written and checked.
"""

from utils.table import Table

DYNAMIC = ("none", "batch", "size", "both")         # what of the input an exported graph leaves open
EXPORTS = Table("export format", {
    "onnx": "utils.engine.exports.onnx_file:export_onnx",
    "torch_export": "utils.engine.exports.torch_file:export_torch",
    "safetensors": "utils.engine.exports.safetensors_file:export_safetensors",
})
