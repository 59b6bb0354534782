"""Resizing of maps: one rule for the whole program."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def resize(feat: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, align_corners False; (B, C, h, w) -> (B, C, *size). Nothing happens at equal size."""
    if tuple(feat.shape[-2:]) == tuple(size):
        return feat
    return F.interpolate(feat, size, mode="bilinear", align_corners=False)


def concat_at_finest(feats: Sequence[Tensor]) -> Tensor:
    """Maps (B, C_i, h_i, w_i), finest first -> (B, sum C_i, h_0, w_0); the coarser ones bilinearly."""
    size = feats[0].shape[-2:]
    return torch.cat([resize(feat, size) for feat in feats], dim=1)
