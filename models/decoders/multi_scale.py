"""A light multi-scale baseline: per task its own small feature pyramid, and nothing between the tasks.

It stands beside the `fcn` baseline where the backbone's maps are wide: there a convolution on their
concatenation is most of the model (75 million weights for four tasks on a Swin-L), a pyramid is not.
Reference: the semantic branch of Kirillov et al., "Panoptic Feature Pyramid Networks", CVPR 2019, on the
pyramid of Lin et al., CVPR 2017; with batch norm, and resizing in one step.

Axes: B batch, C width, h_i w_i size of map i, finest first.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from models.blocks.layers import conv_bn_relu
from models.blocks.resize import resize
from models.blocks.task_maps import TaskMaps, for_task
from models.decoder import BuildContext, Decoder, DecoderOutput
from models.decoders.options import DecoderOptions


@dataclass(frozen=True)
class MultiScaleConfig(DecoderOptions):
    """Options of the decoder."""

    channels: int = 128  # C, the width of every task's pyramid

    def __post_init__(self):
        self.require_counts("channels")


class TaskPyramid(nn.Module):
    """Maps (B, C_i, h_i, w_i) -> (B, C, h_0, w_0): from coarse to fine each map receives all coarser ones."""

    def __init__(self, in_channels: Sequence[int], channels: int):
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(width, channels, kernel_size=1) for width in in_channels)
        self.smooth = nn.ModuleList(conv_bn_relu(channels, channels) for _ in in_channels)

    def forward(self, feats: Sequence[Tensor]) -> Tensor:
        size, carried, total = feats[0].shape[-2:], None, None
        for feat, lateral, smooth in reversed(list(zip(feats, self.lateral, self.smooth, strict=True))):
            level = lateral(feat)  # (B, C, h_i, w_i)
            carried = level if carried is None else level + resize(carried, level.shape[-2:])
            term = resize(smooth(carried), size)  # (B, C, h_0, w_0)
            total = term if total is None else total + term
        return total


class MultiScaleDecoder(Decoder):
    """Maps of any number, width and stride, finest first, to one map (B, C, h_0, w_0) per task."""

    Config = MultiScaleConfig
    input_multiple = 1  # every size the backbone takes
    takes_task_maps = True
    logit_std = 0.01

    def __init__(self, context: BuildContext, config: MultiScaleConfig):
        super().__init__()
        self.channels = config.channels
        self.pyramid = nn.ModuleDict({task: TaskPyramid(context.channels, config.channels) for task in context.tasks})

    def forward(self, feats: Sequence[Tensor] | TaskMaps) -> DecoderOutput:
        return DecoderOutput({task: pyramid(for_task(feats, task)) for task, pyramid in self.pyramid.items()})
