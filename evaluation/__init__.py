"""Metrics: one file per task, all with the contract of `evaluation.meter.Meter`."""

from evaluation.delta_m import delta_m
from evaluation.depth import DepthMeter
from evaluation.edge_loss import EdgeLossMeter
from evaluation.edge_maps import save_edge_maps
from evaluation.meter import Meter
from evaluation.normals import NormalsMeter
from evaluation.saliency import SaliencyMeter
from evaluation.segmentation import SegmentationMeter

__all__ = ["DepthMeter", "EdgeLossMeter", "Meter", "NormalsMeter", "SaliencyMeter", "SegmentationMeter",
           "delta_m", "save_edge_maps"]
