"""Four-level pyramid from any maps: decoders made for a pyramid like Swin's run on every backbone.

Our choice: the layers follow the simple feature pyramid of ViTDet (Li et al., ECCV 2022), but each level starts from
its own map where there are four of them (shallow tap of a plain ViT -> fine level), because the multi-task ViTs of this
code base deliver four depths. Widths double from level to level as in Swin, so a decoder cannot tell the two apart.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from models.blocks.layers import ChannelLayerNorm
from utils.options import Options

STRIDES = (4, 8, 16, 32)


@dataclass(frozen=True)
class PyramidConfig(Options):
    """Options of the neck. embed_dim: e, the width of its finest map."""

    embed_dim: int

    def __post_init__(self):
        self.require_counts("embed_dim")


class SimplePyramid(nn.Module):
    """Neck: maps of any widths, with strides that are powers of two -> strides 4, 8, 16, 32, widths e, 2e, 4e, 8e.

    Of four maps each makes a level; otherwise a level is made of the map with the nearest stride (the finer of two).
    """

    Config = PyramidConfig

    def __init__(self, channels: Sequence[int], strides: Sequence[int], config: PyramidConfig):
        super().__init__()
        require_powers_of_two("pyramid", strides)
        self.strides = STRIDES
        self.channels = tuple(config.embed_dim * 2**level for level in range(4))
        self.sources = range(4) if len(strides) == 4 else [nearest_map(strides, stride) for stride in STRIDES]
        self.levels = nn.ModuleList(
            level_of(channels[source], self.channels[level], strides[source], STRIDES[level], config.embed_dim)
            for level, source in enumerate(self.sources))

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps (B, C_i, H/s_i, W/s_i) -> (B, e, H/4, W/4), (B, 2e, H/8, W/8), (B, 4e, H/16, W/16), (B, 8e, H/32, W/32)
        of an image (B, 3, H, W)."""
        return [level(maps[source]) for level, source in zip(self.levels, self.sources, strict=True)]


def require_powers_of_two(neck: str, strides: Sequence[int]) -> None:
    """ValueError unless every stride is a power of two."""
    if any(stride & (stride - 1) for stride in strides):
        raise ValueError(f"neck '{neck}' needs maps whose strides are powers of two; got strides {tuple(strides)}")


def nearest_map(strides: Sequence[int], stride: int) -> int:
    """The index of the map whose stride is nearest, counted in doublings; of two the finer."""
    return min(range(len(strides)), key=lambda index: (abs(math.log2(strides[index] / stride)), strides[index]))


def level_of(in_channels: int, channels: int, stride: int, wanted: int, embed_dim: int) -> nn.Sequential:
    """(B, in_channels, h, w) at `stride` -> (B, channels, h', w') at `wanted`, layer-normed.

    Doubling the grid: transposed 2 x 2 convolutions, at twice the width e of the finest map while there is another one
    to come; halving it: 3 x 3 convolutions of stride 2; else 1 x 1.
    """
    doublings = round(math.log2(stride / wanted))
    layers: list[nn.Module] = []
    for left in range(doublings, 0, -1):
        width = channels if left == 1 else 2 * embed_dim
        layers += [nn.ConvTranspose2d(in_channels, width, 2, stride=2), ChannelLayerNorm(width)]
        layers += [nn.GELU()] if left > 1 else []
        in_channels = width
    for left in range(-doublings, 0, -1):
        layers += [nn.Conv2d(in_channels, channels, 3, stride=2, padding=1), ChannelLayerNorm(channels)]
        layers += [nn.GELU()] if left > 1 else []
        in_channels = channels
    return nn.Sequential(*(layers or [nn.Conv2d(in_channels, channels, 1), ChannelLayerNorm(channels)]))
