"""Patch expansion, and task heads: from a decoder's feature map to raw task outputs."""

from collections.abc import Callable

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from models.blocks.layers import INIT_STD


class PatchExpand(nn.Module):
    """(B, H, W, in_channels) -> (B, scale H, scale W, out_channels), layer-normed: a linear layer predicts finer pixels
    as channels. Reference: Lin et al., "MTMamba", ECCV 2024; the idea is Swin-Unet's (Cao et al., 2022).
    """

    def __init__(self, in_channels: int, out_channels: int, scale: int):
        super().__init__()
        self.scale = scale
        self.proj = nn.Linear(in_channels, scale * scale * out_channels, bias=False)
        self.norm = nn.LayerNorm(out_channels)

    def forward(self, feat: Tensor) -> Tensor:
        fine = self.proj(feat)
        fine = rearrange(fine, "b h w (p1 p2 c) -> b (h p1) (w p2) c", p1=self.scale, p2=self.scale)
        return self.norm(fine)


class PatchExpandHead(nn.Module):
    """Psi and P of BIM: four-fold patch expansion to full resolution, then a linear layer per pixel.

    (B, C, H, W) -> (B, num_outputs, 4 H, 4 W), without activation.
    """

    def __init__(self, in_channels: int, num_outputs: int):
        super().__init__()
        self.expand = PatchExpand(in_channels, in_channels, scale=4)
        self.proj = nn.Conv2d(in_channels, num_outputs, kernel_size=1)

    def forward(self, feat: Tensor) -> Tensor:
        fine = self.expand(rearrange(feat, "b c h w -> b h w c"))  # (B, 4 H, 4 W, C)
        return self.proj(rearrange(fine, "b h w c -> b c h w"))


class LiteHead(nn.Module):
    """Head of MTMamba++ (and, with GELU, of TaskPrompter): 3 x 3 convolution, batch norm, ReLU, linear per pixel.

    (B, C, H, W) -> (B, num_outputs, H, W), without activation; the model resizes. Under several CUDA
    processes the batch statistics are synchronised.
    """

    def __init__(self, in_channels: int, hidden_channels: int, num_outputs: int,
                 activation: Callable[[Tensor], Tensor] = F.relu):
        super().__init__()
        self.activation = activation
        self.conv = nn.Conv2d(in_channels, hidden_channels, kernel_size=3, padding=1)
        nn.init.trunc_normal_(self.conv.weight, std=INIT_STD)
        self.norm = nn.BatchNorm2d(hidden_channels)
        self.proj = nn.Conv2d(hidden_channels, num_outputs, kernel_size=1)

    def forward(self, feat: Tensor) -> Tensor:
        return self.proj(self.activation(self.norm(self.conv(feat))))
