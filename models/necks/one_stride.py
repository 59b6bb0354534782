"""Maps of one stride and width from any backbone: decoders made for a plain ViT run on pyramids.

Our choice: finer maps are averaged to the common grid, coarser ones enlarged bilinearly, with a linear layer per pixel
and a LayerNorm on the smaller of both grids.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from models.blocks.layers import ChannelLayerNorm
from models.blocks.resize import resize
from models.necks.pyramid import require_powers_of_two
from utils.options import Options


@dataclass(frozen=True)
class OneStrideConfig(Options):
    """Options of the neck. embed_dim: width of all maps. stride: pixels of the image per pixel of theirs."""

    embed_dim: int
    stride: int = 16

    def __post_init__(self):
        self.require_counts("embed_dim", "stride")


class OneStride(nn.Module):
    """Neck: as many maps as it gets, finest first -> the same number of maps (B, embed_dim, H / stride, W / stride)."""

    Config = OneStrideConfig

    def __init__(self, channels: Sequence[int], strides: Sequence[int], config: OneStrideConfig):
        super().__init__()
        require_powers_of_two("one_stride", (*strides, config.stride))
        self.strides = (config.stride,) * len(strides)
        self.channels = (config.embed_dim,) * len(strides)
        self.given_strides, self.stride = tuple(strides), config.stride
        self.levels = nn.ModuleList(nn.Sequential(nn.Conv2d(width, config.embed_dim, 1),
                                                  ChannelLayerNorm(config.embed_dim)) for width in channels)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Maps (B, C_i, H / s_i, W / s_i) -> (B, embed_dim, H / stride, W / stride) each."""
        out = []
        for level, given, feat in zip(self.levels, self.given_strides, maps, strict=True):
            if given < self.stride:
                feat = F.avg_pool2d(feat, self.stride // given, ceil_mode=True, count_include_pad=False)
            height, width = feat.shape[-2:]
            factor = max(1, given // self.stride)
            out.append(resize(level(feat), (height * factor, width * factor)))
        return out
