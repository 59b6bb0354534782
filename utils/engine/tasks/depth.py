"""Depth in metres (on Cityscapes: disparity in pixels)."""

from data.labels import DepthLabel
from evaluation.depth import DepthMeter
from losses.regression import L1Loss
from utils.engine.tasks.task import Task
from utils.engine.views import DEPTH_MAP

DEPTH = Task(
    num_channels=1,
    label=DepthLabel(),
    loss=lambda context: L1Loss(context.ignore_index),
    decode=lambda logits: logits.clamp_min(0),
    evaluators=(DepthMeter,),
    view=DEPTH_MAP,
)
