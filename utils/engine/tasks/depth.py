"""Depth in metres (on Cityscapes: disparity in pixels)."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from data.labels import DepthLabel
from evaluation.depth import DepthMeter
from evaluation.evaluator import TaskContext
from losses.regression import L1Loss
from utils.engine.tasks.task import Average, Task
from utils.engine.views import DEPTH_MAP


def _loss(context: TaskContext) -> L1Loss:
    return L1Loss(context.ignore_index)


def _in_front(depth: Tensor) -> Tensor:
    return depth.clamp_min(0)


def _decode(logits: Tensor, meta: Sequence[Mapping]) -> Tensor:
    return _in_front(logits)


DEPTH = Task(
    num_channels=1,
    label=DepthLabel(),
    loss=_loss,
    decode=_decode,
    evaluators=(DepthMeter,),
    view=DEPTH_MAP,
    average=Average(values=_in_front, raw=_in_front),          # of metres
)
