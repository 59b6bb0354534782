"""What the plain baselines and DeMT share: backbone maps at one size, and the last layer.

Both come from the fully convolutional head of the baselines in Brueggemann et al., "Exploring Relational
Context for Multi-Task Dense Prediction", ICCV 2021, in the manner of HRNetV2.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.blocks.resize import resize


def concat_at_finest(feats: Sequence[Tensor]) -> Tensor:
    """Maps (B, C_i, h_i, w_i), finest first -> (B, sum C_i, h_0, w_0); the coarser ones bilinearly."""
    size = feats[0].shape[-2:]
    return torch.cat([resize(feat, size) for feat in feats], dim=1)


def logit_layer(in_channels: int, num_outputs: int) -> nn.Conv2d:
    """The last layer, one linear map per pixel, which starts near zero."""
    layer = nn.Conv2d(in_channels, num_outputs, kernel_size=1)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    return layer
