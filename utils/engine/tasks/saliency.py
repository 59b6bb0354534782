"""Saliency: the probability that a pixel belongs to what one looks at first."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from data.labels import MapLabel
from evaluation.evaluator import TaskContext
from evaluation.saliency import SaliencyMeter
from losses.cross_entropy import BalancedCrossEntropyLoss
from utils.engine.tasks.task import Task, of_probabilities
from utils.engine.views import PROBABILITY


def _loss(context: TaskContext) -> BalancedCrossEntropyLoss:
    return BalancedCrossEntropyLoss(context.ignore_index)


def _decode(logits: Tensor, meta: Sequence[Mapping]) -> Tensor:
    return logits.softmax(dim=1)[:, 1:2]                       # (B, 2, H, W) -> (B, 1, H, W)


SALIENCY = Task(
    num_channels=2,
    label=MapLabel(),
    loss=_loss,
    decode=_decode,
    evaluators=(SaliencyMeter,),
    view=PROBABILITY,
    average=of_probabilities(),
)
