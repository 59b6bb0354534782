"""Arithmetic: the one place that knows what the config key `precision` means."""

import os

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Autocast for "bf16" or "fp16", a context that does nothing otherwise. Scans, heads and losses
    stay in float32."""
    return torch.autocast(device.type, dtype=DTYPES.get(precision), enabled=precision in DTYPES)


def product_dtype(tensor: torch.Tensor, otherwise: torch.dtype) -> torch.dtype:
    """The type that autocast asks products with this tensor to have; `otherwise` where it asks for none."""
    device = tensor.device.type
    if tensor.is_meta or not torch.is_autocast_enabled(device) or tensor.dtype == torch.float64:
        return otherwise
    return torch.get_autocast_dtype(device)


def set_determinism(wanted: bool) -> None:
    """Lets PyTorch take operations that give the same bits every time, also where they are slower.

    What has no such form on CUDA is named by a warning of PyTorch and goes on. cuBLAS reads its setting when CUDA
    starts, so this comes before.
    """
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted, warn_only=True)
    torch.backends.cudnn.benchmark = False


def set_float32_arithmetic(precision: str) -> None:
    """Lets CUDA round the inputs of float32 products to TF32 (10 bits) unless `precision` is "fp32".

    PyTorch alone would do so in convolutions also for "fp32".
    """
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
