"""Layers over the channels of NCHW maps, pixel by pixel."""

from einops import rearrange
from timm.layers import Mlp
from torch import Tensor, nn


class ChannelLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels, eps 1e-5: (B, C, H, W) -> (B, C, H, W)."""

    def forward(self, feat: Tensor) -> Tensor:
        return rearrange(super().forward(rearrange(feat, "b c h w -> b h w c")), "b h w c -> b c h w")


class ChannelMlp(Mlp):
    """Two linear layers with GELU between: (B, C, H, W) -> (B, C, H, W)."""

    def forward(self, feat: Tensor) -> Tensor:
        return rearrange(super().forward(rearrange(feat, "b c h w -> b h w c")), "b h w c -> b c h w")
