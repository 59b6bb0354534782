"""What InvPT and BridgeNet share: stages of doubling grids, and the sum of their task maps at one size.

Reference: Ye and Xu, "Inverted Pyramid Multi-task Transformer", ECCV 2022, section 3.5.
"""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor, nn

from models.blocks.layers import ChannelLayerNorm, conv_bn_relu
from models.blocks.resize import resize


def up_embedding(in_channels: int, out_channels: int) -> nn.Sequential:
    """To the next finer stage, (B, in, H, W) -> (B, out, 2 H, 2 W): bilinear, then two dilated blocks."""
    return nn.Sequential(
        nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False),
        conv_bn_relu(in_channels, out_channels, dilation=2),
        conv_bn_relu(out_channels, out_channels, dilation=2))


def query_reduction(channels: int) -> nn.Sequential:
    """Queries at half the side, (B, C, H, W) -> (B, C, H / 2, W / 2): depthwise convolution, batch norm."""
    conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2, padding=1, groups=channels, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels))


def split_heads(tokens: Tensor, num_heads: int) -> Tensor:
    """(B, L, C) -> (B, N, L, C / N)."""
    return rearrange(tokens, "b l (n d) -> b n l d", n=num_heads)


class MultiScaleSum(nn.Module):
    """Per stage {task: (B, C_s, h_s, w_s)} -> {task: (B, C_0, H, W)}; `widths` are the C_s, one per stage.

    The norm of a stage runs over the channels of all tasks together: a task's result depends on which other
    tasks there are, and on their order. Published weights need it.
    """

    def __init__(self, tasks: Sequence[str], widths: Sequence[int]):
        super().__init__()
        self.norms = nn.ModuleList(ChannelLayerNorm(len(tasks) * width) for width in widths)
        self.reduce = nn.ModuleList(
            nn.ModuleDict({task: nn.Conv2d(width, widths[0], kernel_size=1) for task in tasks})
            for width in widths[1:])                             # the first stage has the width of the sum

    def forward(self, stages: Sequence[dict[str, Tensor]], size: tuple[int, int]) -> dict[str, Tensor]:
        total = {}
        for index, (maps, norm) in enumerate(zip(stages, self.norms, strict=True)):
            joint = norm(torch.cat(tuple(maps.values()), dim=1))    # (B, T C_s, h_s, w_s)
            for task, feat in zip(maps, joint.chunk(len(maps), dim=1), strict=True):
                fine = resize(self.reduce[index - 1][task](feat) if index else feat, size)
                total[task] = total[task] + fine if index else fine
        return total
