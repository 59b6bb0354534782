"""Mixed precision: the one place that knows what the config key `precision` means."""

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Autocast for "bf16" or "fp16", a context that does nothing for "fp32". Scans and losses stay in float32."""
    return torch.autocast(device.type, dtype=DTYPES.get(precision), enabled=precision in DTYPES)
