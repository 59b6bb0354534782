"""Semantic segmentation and human part segmentation: a class for every pixel."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from data.labels import MapLabel, PartsLabel
from evaluation.evaluator import TaskContext
from evaluation.segmentation import SegmentationMeter
from losses.cross_entropy import CrossEntropyLoss
from utils.engine.tasks.task import Task, of_probabilities
from utils.engine.views import CLASSES


def _loss(context: TaskContext) -> CrossEntropyLoss:
    return CrossEntropyLoss(context.ignore_index)


def _decode(logits: Tensor, meta: Sequence[Mapping]) -> Tensor:
    return logits.argmax(dim=1, keepdim=True)                  # (B, n, H, W) -> (B, 1, H, W)


def _segmentation(label: MapLabel) -> Task:
    return Task(
        num_channels=None,
        label=label,
        loss=_loss,
        decode=_decode,
        evaluators=(SegmentationMeter,),
        view=CLASSES,
        average=of_probabilities(),
    )


SEMSEG = _segmentation(MapLabel(guides_crop=True))
HUMAN_PARTS = _segmentation(PartsLabel())
