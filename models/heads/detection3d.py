"""Head of monocular 3-D detection: a feature pyramid and two towers that all its levels share.

Every cell of every level says which class is there, where the centre, how far, how large and how turned the vehicle is,
and which rectangle it covers (`losses.detection3d.points`).
Reference: Wang et al., "FCOS3D: Fully Convolutional One-Stage Monocular 3D Object Detection", ICCV 2021 workshops, with
the branches of TaskPrompter (Ye and Xu, ICLR 2023) for Cityscapes-3D: three angles, a rectangle, no velocity.

Axes: B batch, C width, h w grid of a level, K classes.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from losses.detection3d.options import NUM_LEVELS, Detection3DOptions
from losses.detection3d.points import REGRESSION, Output
from models.blocks.deformable_conv import ModulatedDeformableConv
from models.blocks.feature_pyramid import FeaturePyramid
from models.blocks.resize import average
from models.heads import FeatureLevels

NUM_MAPS = NUM_LEVELS - 1
FINEST_STRIDE = 8  # of the first level that is made of a single map; at 4 it would have most of the head's cost
NUM_ANGLES = 3
SCALED = ("offset", "depth", "size", "box")  # branches with a learned factor for every level
SMALLEST_M = 1e-6  # a predicted length
INIT_STD = 0.01
PRIOR = 0.01  # probability of a class before training


class ConvUnit(nn.Sequential):
    """3 x 3 convolution with bias, group norm, ReLU: (B, in, h, w) -> (B, out, h, w)."""

    def __init__(self, in_channels: int, out_channels: int, groups: int, deformable: bool = False):
        super().__init__()
        self.conv = (ModulatedDeformableConv(in_channels, out_channels) if deformable
                     else _normal(nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1)))
        self.norm = nn.GroupNorm(groups, out_channels)
        self.activation = nn.ReLU()


class Detection3DHead(nn.Module):
    """One map or four, finest first, to the output that `losses.detection3d.points` describes.

    One map becomes four by averaging over squares, each twice as wide as the one before: the first at stride 8 or, if
    it is coarser, that of the map. ValueError for another number of maps.
    """

    def __init__(self, levels: FeatureLevels, num_classes: int, options: Detection3DOptions):
        super().__init__()
        if len(levels.channels) not in (1, NUM_MAPS):
            raise ValueError(f"the head of 3-D detection needs one map or {NUM_MAPS}, got {len(levels.channels)} of "
                             f"strides {levels.strides}")
        self.image_width, self.direction_offset = levels.image_width, options.direction_offset
        first = 2 ** max(0, math.ceil(math.log2(FINEST_STRIDE / levels.strides[0])))
        self.squares = [first * 2**level for level in range(NUM_MAPS)]  # sides in cells of a single map
        strides = levels.strides if len(levels.strides) > 1 else [levels.strides[0] * side for side in self.squares]
        self.strides = (*strides, 2 * strides[-1])
        width, groups = options.channels, options.norm_groups
        self.pyramid = FeaturePyramid(levels.channels * (NUM_MAPS // len(levels.channels)), width)
        self.class_tower, self.box_tower = (nn.Sequential(
            ConvUnit(width, width, groups), ConvUnit(width, width, groups),
            ConvUnit(width, width, groups, deformable=True)) for _ in range(2))
        widths = (width, *options.class_channels)
        self.classes = nn.Sequential(*(ConvUnit(a, b, groups) for a, b in zip(widths, widths[1:], strict=False)),
                                     _normal(nn.Conv2d(widths[-1], num_classes, kernel_size=1), PRIOR))
        outputs = {**REGRESSION, "direction": 2 * NUM_ANGLES, "centerness": 1}
        self.branches = nn.ModuleDict({
            name: nn.Sequential(ConvUnit(width, width, groups),
                                _normal(nn.Conv2d(width, number, kernel_size=1), PRIOR if name == "direction" else 0.5))
            for name, number in outputs.items()})
        self.scales = nn.ModuleList(
            nn.ParameterDict({name: torch.ones(()) for name in SCALED}) for _ in range(NUM_LEVELS))

    def forward(self, feats: Tensor | Sequence[Tensor]) -> Output:
        maps = [average(feats, side) for side in self.squares] if isinstance(feats, Tensor) else feats

        def told(value: float) -> Tensor:
            return maps[0].new_full((len(maps[0]),), value, dtype=torch.float64)

        levels = {f"level{index}": {**self.run_level(feat, self.scales[index]), "stride": told(stride)}
                  for index, (feat, stride) in enumerate(zip(self.pyramid(maps), self.strides, strict=True))}
        return {"levels": levels, "width": told(self.image_width), "direction_offset": told(self.direction_offset)}

    def run_level(self, feat: Tensor, scale: nn.ParameterDict) -> dict[str, Tensor]:
        """One level of the pyramid (B, C, h, w) to its four maps of outputs."""
        box = self.box_tower(feat)
        out = {name: branch(box) for name, branch in self.branches.items()}
        out |= {name: out[name] * scale[name] for name in SCALED}
        out |= {"depth": out["depth"].exp(), "size": out["size"].exp() + SMALLEST_M, "box": out["box"].relu()}
        return {"classes": self.classes(self.class_tower(feat)),
                "regression": torch.cat([out[name] for name in REGRESSION], dim=1),
                "direction": out["direction"], "centerness": out["centerness"]}


def _normal(conv: nn.Conv2d, probability: float = 0.5) -> nn.Conv2d:
    """The convolution with its first weights, and a bias that stands for this probability."""
    nn.init.normal_(conv.weight, std=INIT_STD)
    nn.init.constant_(conv.bias, math.log(probability / (1 - probability)))
    return conv
