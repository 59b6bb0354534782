"""Semantic segmentation and human part segmentation: a class for every pixel."""

from data.labels import MapLabel, PartsLabel
from evaluation.segmentation import SegmentationMeter
from losses.cross_entropy import CrossEntropyLoss
from utils.engine.tasks.task import Task
from utils.engine.views import CLASSES


def _segmentation(label: MapLabel) -> Task:
    return Task(
        num_channels=None,
        label=label,
        loss=lambda context: CrossEntropyLoss(context.ignore_index),
        decode=lambda logits: logits.argmax(dim=1, keepdim=True),              # (B, n, H, W) -> (B, 1, H, W)
        evaluators=(SegmentationMeter,),
        view=CLASSES,
    )


SEMSEG = _segmentation(MapLabel(guides_crop=True))
HUMAN_PARTS = _segmentation(PartsLabel())
