"""Heads of tasks that are no maps. A map's head is the decoder's (`models.decoder.Decoder.make_head`).

The row of such a task names a function that makes its head out of `FeatureLevels` and the number of outputs. What the
head is called with is that of the decoder for its task: a list of maps, finest first, where the decoder has a pyramid
for it, else one map. What it returns is its own affair; loss, decoding and evaluator of the task know it.
"""

from collections.abc import Callable
from typing import NamedTuple

from torch import nn


class FeatureLevels(NamedTuple):
    """What a decoder gives for one task: widths of its maps, finest first, and their strides in pixels of the image.

    A stride need not be a whole number. image_width: of the network's image in pixels.
    """

    channels: tuple[int, ...]
    strides: tuple[float, ...]
    image_width: int


HeadMaker = Callable[[FeatureLevels, int], nn.Module]
