"""Resizing of maps: one rule for the whole program."""

import torch.nn.functional as F
from torch import Tensor


def resize(feat: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, align_corners False; (B, C, h, w) -> (B, C, *size). Nothing happens at equal size."""
    if tuple(feat.shape[-2:]) == tuple(size):
        return feat
    return F.interpolate(feat, size, mode="bilinear", align_corners=False)
