"""Up-sampling by a linear layer that predicts the finer pixels as channels.

Reference: Lin et al., "MTMamba", ECCV 2024; the idea is Swin-Unet's patch expanding layer (Cao et al., 2022).
"""

from einops import rearrange
from torch import Tensor, nn


class PatchExpand(nn.Module):
    """(B, H, W, in_channels) -> (B, scale H, scale W, out_channels), layer-normed."""

    def __init__(self, in_channels: int, out_channels: int, scale: int):
        super().__init__()
        self.scale = scale
        self.proj = nn.Linear(in_channels, scale * scale * out_channels, bias=False)
        self.norm = nn.LayerNorm(out_channels)

    def forward(self, feat: Tensor) -> Tensor:
        fine = self.proj(feat)
        fine = rearrange(fine, "b h w (p1 p2 c) -> b (h p1) (w p2) c", p1=self.scale, p2=self.scale)
        return self.norm(fine)
