"""Feature pyramid network: every map receives what the coarser ones know, and there is one more level at the end.

Reference: Lin et al., "Feature Pyramid Networks for Object Detection", CVPR 2017.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class FeaturePyramid(nn.Module):
    """Maps (B, C_i, h_i, w_i), finest first -> one level more of (B, C, h_i, w_i), the last of half the size.

    Neither norms nor activations; coarser maps are enlarged by repeating pixels. Maps may be of one size.
    """

    def __init__(self, in_channels: Sequence[int], channels: int):
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(width, channels, kernel_size=1) for width in in_channels)
        self.output = nn.ModuleList(
            nn.Conv2d(channels, channels, kernel_size=3, padding=1, stride=1 if index < len(in_channels) else 2)
            for index in range(len(in_channels) + 1))
        for conv in (*self.lateral, *self.output):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(conv.bias)

    def forward(self, feats: Sequence[Tensor]) -> list[Tensor]:
        levels = [lateral(feat) for lateral, feat in zip(self.lateral, feats, strict=True)]
        for index in range(len(levels) - 1, 0, -1):
            size = levels[index - 1].shape[-2:]
            levels[index - 1] = levels[index - 1] + F.interpolate(levels[index], size, mode="nearest")
        outputs = [conv(level) for conv, level in zip(self.output, levels, strict=False)]
        return [*outputs, self.output[-1](outputs[-1])]
