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


def resized_rows(feat: Tensor, size: tuple[int, int], top: int, bottom: int) -> Tensor:
    """Rows top to bottom of `resize(feat, size)`, but for rounding, without the others: (B, C, bottom - top, W).

    Vertically by hand, then horizontally; channels lie innermost, because what comes next compares them.
    """
    (h, w), (height, width) = feat.shape[-2:], size
    if (h, w) == (height, width):
        return feat[..., top:bottom, :]
    place = (torch.arange(top, bottom, device=feat.device, dtype=torch.float32) + 0.5) * (h / height) - 0.5
    place = place.clamp_min(0)
    above = place.floor().long()
    below = (above + 1).clamp_max(h - 1)
    rows = torch.lerp(feat[..., above, :], feat[..., below, :], (place - above).to(feat.dtype)[:, None])
    rows = rows.contiguous(memory_format=torch.channels_last)
    return resize(rows, (bottom - top, width))


def average(feat: Tensor, side: int) -> Tensor:
    """Means over squares, (B, C, H, W) -> (B, C, H / side, W / side), rounded up: at borders over what is there."""
    if feat.is_cuda and feat.shape[2] % side == 0 == feat.shape[3] % side:
        return Average.apply(feat, side)
    return F.avg_pool2d(feat, side, ceil_mode=True, count_include_pad=False)


class Average(torch.autograd.Function):
    """Whole squares alone. PyTorch's gradient looks for the squares of every pixel, which takes a GPU longer."""

    @staticmethod
    def forward(ctx, feat, side):
        ctx.side = side
        return F.avg_pool2d(feat, side)

    @staticmethod
    def backward(ctx, grad):
        side = ctx.side
        cells = (grad / side**2).movedim(1, -1)[:, :, None, :, None]  # (B, H / side, 1, W / side, 1, C)
        fine = cells.expand(-1, -1, side, -1, side, -1).flatten(3, 4).flatten(1, 2)
        return fine.movedim(-1, 1), None


def concat_at_finest(feats: Sequence[Tensor]) -> Tensor:
    """Maps (B, C_i, h_i, w_i), finest first -> (B, sum C_i, h_0, w_0); the coarser ones bilinearly."""
    size = feats[0].shape[-2:]
    return torch.cat([resize(feat, size) for feat in feats], dim=1)
