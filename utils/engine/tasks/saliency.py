"""Saliency: the probability that a pixel belongs to what one looks at first."""

from data.labels import MapLabel
from evaluation.saliency import SaliencyMeter
from losses.cross_entropy import BalancedCrossEntropyLoss
from utils.engine.tasks.task import Task
from utils.engine.views import PROBABILITY

SALIENCY = Task(
    num_channels=2,
    label=MapLabel(),
    loss=lambda context: BalancedCrossEntropyLoss(context.ignore_index),
    decode=lambda logits: logits.softmax(dim=1)[:, 1:2],                       # (B, 2, H, W) -> (B, 1, H, W)
    evaluators=(SaliencyMeter,),
    view=PROBABILITY,
)
