"""Four-level pyramid from a plain ViT: decoders made for a pyramid like Swin's run on a ViT as well.

Our choice: the layers follow the simple feature pyramid of ViTDet (Li et al., ECCV 2022), but each level
starts from its own tap (shallow tap -> fine level), because the multi-task ViTs of this code base deliver
four depths. Widths double from level to level as in Swin, so a decoder cannot tell the two apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from models.blocks.layers import ChannelLayerNorm
from utils.options import Options


@dataclass(frozen=True)
class PyramidConfig(Options):
    """Options of the neck. embed_dim: e, the width of its finest map."""

    embed_dim: int

    def __post_init__(self):
        self.require_counts("embed_dim")


class SimplePyramid(nn.Module):
    """Neck: four maps of one stride s (16) -> strides s/4, s/2, s, 2s with widths e, 2e, 4e, 8e.

    Raises ValueError unless there are four input maps of one stride.
    """

    Config = PyramidConfig

    def __init__(self, channels: Sequence[int], strides: Sequence[int], config: PyramidConfig):
        super().__init__()
        if len(strides) != 4 or len(set(strides)) != 1 or strides[0] % 4:
            raise ValueError("neck 'pyramid' needs four maps of one stride, a multiple of 4, as a plain ViT gives; "
                             f"got strides {tuple(strides)}")
        self.strides = tuple(strides[0] * 2**level // 4 for level in range(4))
        c1, c2, c3, c4 = channels
        self.channels = tuple(config.embed_dim * 2**level for level in range(4))
        e1, e2, e4, e8 = self.channels
        self.levels = nn.ModuleList([
            nn.Sequential(
                nn.ConvTranspose2d(c1, e2, 2, stride=2), ChannelLayerNorm(e2), nn.GELU(),
                nn.ConvTranspose2d(e2, e1, 2, stride=2), ChannelLayerNorm(e1)),
            nn.Sequential(nn.ConvTranspose2d(c2, e2, 2, stride=2), ChannelLayerNorm(e2)),
            nn.Sequential(nn.Conv2d(c3, e4, 1), ChannelLayerNorm(e4)),
            nn.Sequential(nn.Conv2d(c4, e8, 3, stride=2, padding=1), ChannelLayerNorm(e8)),
        ])

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Four (B, C, H, W) -> (B, e, 4H, 4W), (B, 2e, 2H, 2W), (B, 4e, H, W), (B, 8e, H/2, W/2)."""
        return [level(feature) for level, feature in zip(self.levels, maps, strict=True)]
