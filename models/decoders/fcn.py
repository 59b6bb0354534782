"""The plain baseline: per task one convolution on all maps of the backbone, and nothing between the tasks.

With one task it is a single-task network, with several the multi-task baseline of the same backbone. The gain
of a decoder that lets tasks interact is measured against these (`scripts/delta_m.py`).
Reference: the STL and MTL baselines of Brueggemann et al., "Exploring Relational Context for Multi-Task Dense
Prediction", ICCV 2021, which Xu et al., "DeMT", AAAI 2023, use, too.

Axes: B batch, K channels of all maps together, h w size of the finest map.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from models.blocks.layers import conv_bn_relu
from models.blocks.resize import concat_at_finest
from models.blocks.task_maps import TaskMaps, for_task, of_maps
from models.decoder import BuildContext, Decoder, DecoderOutput
from models.decoders.options import DecoderOptions


@dataclass(frozen=True)
class FCNConfig(DecoderOptions):
    """Options of the decoder."""

    reduction: int = 4  # the task features have floor(K / reduction) channels

    def __post_init__(self):
        self.require_counts("reduction")


class FCNDecoder(Decoder):
    """Maps of any number, width and stride, finest first, to one map (B, K / reduction, h, w) per task."""

    Config = FCNConfig
    input_multiple = 1  # every size the backbone takes
    takes_task_maps = True
    logit_std = 0.01

    def __init__(self, context: BuildContext, config: FCNConfig):
        super().__init__()
        width = sum(context.channels)
        config.require(config.reduction <= width, "reduction",
                       f"1 to {width}, the channels of the backbone's maps together")
        self.channels = width // config.reduction
        self.project = nn.ModuleDict({task: conv_bn_relu(width, self.channels) for task in context.tasks})

    def forward(self, feats: Sequence[Tensor] | TaskMaps) -> DecoderOutput:
        joined = of_maps(concat_at_finest, feats)  # (B, K, h, w)
        return DecoderOutput({task: project(for_task(joined, task)) for task, project in self.project.items()})
