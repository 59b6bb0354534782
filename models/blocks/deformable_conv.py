"""Modulated deformable convolution (DCNv2): a 3 x 3 convolution that reads displaced points and weighs each of them.

Reference: Zhu et al., "Deformable ConvNets v2: More Deformable, Better Results", CVPR 2019. The sampling is
torchvision's, whose backward pass on CUDA adds up in no fixed order and whose kernels run on CUDA's default stream
whatever the current one is: a graph recorded on another stream would lack them, and say nothing.
"""

import torch
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

POINTS = 9
NOT_RECORDED = "torchvision's deformable convolution runs on a stream of its own, which a graph does not see"


class ModulatedDeformableConv(nn.Conv2d):
    """(B, in, H, W) -> (B, out, H, W). Starts as an ordinary convolution of half the weight.

    An ordinary convolution gives the displacements, rows before columns for each point, and the logits of the factors.
    """

    not_recorded = NOT_RECORDED  # see `utils.recording.reason_against`

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, kernel_size=3, padding=1)
        bound = (POINTS * in_channels) ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.zeros_(self.bias)
        self.offset = nn.Conv2d(in_channels, 3 * POINTS, kernel_size=3, padding=1)
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)

    def forward(self, feat: Tensor) -> Tensor:
        offset, factor = self.offset(feat).split((2 * POINTS, POINTS), dim=1)
        return deform_conv2d(feat, offset, self.weight, self.bias, padding=self.padding, mask=torch.sigmoid(factor))
