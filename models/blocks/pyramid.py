"""Four-level pyramid from a plain ViT: decoders made for Swin (strides 4, 8, 16, 32) run on ViT as well.

Our choice: the layers follow the simple feature pyramid of ViTDet (Li et al., ECCV 2022), but each level
starts from its own tap (shallow tap -> fine level), because the multi-task ViTs of this code base deliver
four depths. Widths double from level to level as in Swin, so a decoder cannot tell the two apart.
"""

from collections.abc import Sequence

from einops import rearrange
from torch import Tensor, nn


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of an NCHW map, eps 1e-5."""

    def forward(self, feature: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        normalised = super().forward(rearrange(feature, "b c h w -> b h w c"))  # channels last
        return rearrange(normalised, "b h w c -> b c h w")


class SimplePyramid(nn.Module):
    """Neck: four stride-16 maps of `in_channels` -> strides 4, 8, 16, 32 with widths e, 2e, 4e, 8e.

    Args:
        in_channels: channels of every input map.
        embed_dim: e, the width of the finest output map.
    """

    strides = (4, 8, 16, 32)

    def __init__(self, in_channels: int, embed_dim: int):
        super().__init__()
        self.channels = tuple(embed_dim * 2**level for level in range(4))
        e1, e2, e4, e8 = self.channels
        self.levels = nn.ModuleList([
            nn.Sequential(
                nn.ConvTranspose2d(in_channels, e2, 2, stride=2), ChannelLayerNorm(e2), nn.GELU(),
                nn.ConvTranspose2d(e2, e1, 2, stride=2), ChannelLayerNorm(e1)),
            nn.Sequential(nn.ConvTranspose2d(in_channels, e2, 2, stride=2), ChannelLayerNorm(e2)),
            nn.Sequential(nn.Conv2d(in_channels, e4, 1), ChannelLayerNorm(e4)),
            nn.Sequential(nn.Conv2d(in_channels, e8, 3, stride=2, padding=1), ChannelLayerNorm(e8)),
        ])

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Four (B, C, H, W) -> (B, e, 4H, 4W), (B, 2e, 2H, 2W), (B, 4e, H, W), (B, 8e, H/2, W/2)."""
        assert len(maps) == 4, f"SimplePyramid needs 4 maps, got {len(maps)}"
        return [level(feature) for level, feature in zip(self.levels, maps, strict=True)]
