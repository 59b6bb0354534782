"""What an experiment says about 3-D detection. No PyTorch here: experiment files are checked without it."""

import math
from dataclasses import dataclass

from utils.options import Options

NUM_LEVELS = 5


@dataclass(frozen=True)
class Detection3DOptions(Options):
    """The key `det3d_kwargs`; the defaults but the last are those of TaskPrompter on Cityscapes-3D.

    channels: width of the head's pyramid, towers and branches; class_channels: of the convolutions before the classes;
    norm_groups: of their group norms. ranges: which of the five levels learns a box, by the largest distance of its
    point to a side of the visible rectangle: up to the first number the finest, above the last the coarsest; in pixels
    of an image 1024 high, and scaled with the image's height.
    direction_offset: an angle is predicted modulo pi, beside the half turn that it is in; the half turns begin at this
    angle. At 0, as in the published models, boxes that stand level and drive along the street lie on the border, where
    noise turns them round.
    """

    channels: int = 256
    class_channels: tuple[int, ...] = (256, 128)
    norm_groups: int = 32
    ranges: tuple[float, ...] = (96, 192, 384, 768)
    direction_offset: float = math.pi / 4

    def __post_init__(self):
        self.require_counts("channels", "norm_groups")
        self.require(self.class_channels, "class_channels", "one or more widths")
        widths = (self.channels, *self.class_channels)
        self.require(all(width >= 1 and width % self.norm_groups == 0 for width in widths), "norm_groups",
                     "a divisor of channels and of all class_channels")
        edges = (0, *self.ranges, math.inf)
        self.require(len(self.ranges) == NUM_LEVELS - 1 and all(a < b for a, b in zip(edges, edges[1:], strict=False)),
                     "ranges", f"{NUM_LEVELS - 1} growing positive numbers")
        self.require(0 <= self.direction_offset < math.pi, "direction_offset", "an angle in [0, pi)")
