"""The three blocks around the four-route scan of which MTMamba and MTMamba++ are made.

References: Liu et al., "VMamba", 2024 (SS2D); Lin et al., "MTMamba", ECCV 2024, and "MTMamba++", TPAMI 2025
(the variants without gate and with a second input).

Axes: B batch, H W grid, C block width, D = expand * C inner width, R = ceil(C / 16) rank of the step size.
All maps are channels-last at the borders of a block.
"""

import math

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from models.blocks.s6 import S6
from models.ops.ss2d import ss2d_core


class SS2DCore(nn.Module):
    """Depth-wise convolution, SiLU, four-route scan, LayerNorm: (B, H, W, D) -> (B, H, W, D).

    With `source` (B, H, W, D) the scan's step sizes and input and output maps come from there; the sequences
    that are scanned still come from the first argument. The source is not convolved.
    """

    def __init__(self, channels: int, width: int, state: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, kernel_size=3, padding=1, groups=width)
        self.scan = S6(width, math.ceil(channels / 16), state, routes=4)
        self.norm = nn.LayerNorm(width)

    def forward(self, inner: Tensor, source: Tensor | None = None) -> Tensor:
        inner = self.conv(rearrange(inner, "b h w d -> b d h w"))  # a view: PyTorch's channels_last format
        inner = F.silu(rearrange(inner, "b d h w -> b h w d"))
        return self.norm(ss2d_core(inner, self.scan.weights, source))


class GatedSS2D(nn.Module):
    """SS2D between two projections, with a gate: (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, channels: int, expand: int = 2, state: int = 16):
        super().__init__()
        width = expand * channels
        self.in_proj = nn.Linear(channels, 2 * width, bias=False)
        self.core = SS2DCore(channels, width, state)
        self.out_proj = nn.Linear(width, channels, bias=False)

    def forward(self, feat: Tensor) -> Tensor:
        inner, gate = self.in_proj(feat).chunk(2, dim=-1)  # (B, H, W, D) each
        return self.out_proj(self.core(inner) * F.silu(gate))


class PlainSS2D(nn.Module):
    """SS2D after a projection, without gate: (B, H, W, in_channels) -> (B, H, W, D); C sets D and R."""

    def __init__(self, in_channels: int, channels: int, expand: int = 2, state: int = 16):
        super().__init__()
        width = expand * channels
        self.in_proj = nn.Linear(in_channels, width, bias=False)
        self.core = SS2DCore(channels, width, state)

    def forward(self, feat: Tensor) -> Tensor:
        return self.core(self.in_proj(feat))


class CrossSS2D(nn.Module):
    """Gated SS2D whose scan is steered by a second map: two (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, channels: int, expand: int = 2, state: int = 16):
        super().__init__()
        width = expand * channels
        self.in_proj = nn.Linear(channels, 2 * width, bias=False)
        self.source_proj = nn.Linear(channels, width, bias=False)
        self.core = SS2DCore(channels, width, state)
        self.out_proj = nn.Linear(width, channels, bias=False)

    def forward(self, feat: Tensor, source: Tensor) -> Tensor:
        inner, gate = self.in_proj(feat).chunk(2, dim=-1)  # (B, H, W, D) each
        return self.out_proj(self.core(inner, self.source_proj(source)) * F.silu(gate))
