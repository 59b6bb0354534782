"""What the tests of the scan share: which backends run here, random arguments, values and gradients of a call."""

import pytest
import torch

from models.ops import SCAN_BACKENDS
from models.ops.scan_cpp import find_cpp_kernel
from models.ops.scan_mamba import find_mamba_kernel

FAST = ("cpp", "torch", "mamba_ssm")
BACKENDS = (*FAST, "reference")


def device_of(backend: str) -> str:
    """The device to test a backend on; skips the calling test where the backend cannot run."""
    if backend == "mamba_ssm":
        kernel, reason = find_mamba_kernel()
        if kernel is None:
            pytest.skip(reason)
        return "cuda"
    if backend == "cpp" and find_cpp_kernel():
        pytest.skip(find_cpp_kernel())
    return "cpu"


def chunk_tokens(backend: str) -> int:
    """Tokens between two states that the backend keeps on a CPU."""
    return SCAN_BACKENDS.load(backend).kernels.chunk_tokens(torch.device("cpu"))


def tolerance(backend: str, exact: float) -> float:
    """mamba_ssm computes in float32."""
    return 1e-4 if backend == "mamba_ssm" else exact


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference over the largest expected value."""
    value, expected = value.double().cpu(), expected.double().cpu()
    return ((value - expected).abs().max() / expected.abs().max().clamp(min=1e-300)).item() if value.numel() else 0.0


def draw(seed: int = 0, dtype: torch.dtype = torch.float64):
    """A function that draws normal tensors, the same on every machine and in every dtype."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def random_inputs(batch=2, channels=6, length=7, state=4, groups=2, dtype=torch.float64, seed=0):
    """Arguments of `selective_scan`."""
    normal = draw(seed, dtype)
    maps = (batch, groups, state, length)
    return {"u": normal(batch, channels, length), "delta": normal(batch, channels, length) - 1,
            "A": -torch.exp(normal(channels, state)), "B": normal(*maps), "C": normal(*maps), "D": normal(channels),
            "z": normal(batch, channels, length), "delta_bias": normal(channels)}
