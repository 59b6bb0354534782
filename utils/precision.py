"""Arithmetic: the one place that knows what the config key `precision` means."""

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Autocast for "bf16" or "fp16", a context that does nothing otherwise. Scans, heads and losses
    stay in float32."""
    return torch.autocast(device.type, dtype=DTYPES.get(precision), enabled=precision in DTYPES)


def set_float32_arithmetic(precision: str) -> None:
    """Lets CUDA round the inputs of float32 products to TF32 (10 bits) unless `precision` is "fp32".

    PyTorch alone would do so in convolutions also for "fp32".
    """
    torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
