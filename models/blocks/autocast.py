"""Parts that keep the precision of their tensors while the rest runs in a lower one."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def without_autocast(tensor: Tensor) -> AbstractContextManager:
    """Mixed precision off on the tensor's device. The meta device, which has only shapes, knows no autocast."""
    return nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)
