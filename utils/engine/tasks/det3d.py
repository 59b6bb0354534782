"""Vehicles in space from one image: boxes with a class, a distance and three angles, no map."""

from collections.abc import Mapping, Sequence
from functools import partial

from data.boxes_label import Boxes3DLabel
from evaluation.detection3d.decoding import decode
from evaluation.detection3d.meter import DetectionMeter
from evaluation.evaluator import TaskContext
from losses.detection3d.loss import Detection3DLoss
from losses.detection3d.points import Output
from models.heads import HeadMaker
from models.heads.detection3d import Detection3DHead
from utils.boxes3d import Boxes3D, Detections3D, amodal_boxes
from utils.engine.box_views import BOXES, save_boxes
from utils.engine.tasks.task import Task


def _loss(context: TaskContext) -> Detection3DLoss:
    return Detection3DLoss(context.detection, context.num_channels)


def _head(context: TaskContext) -> HeadMaker:
    return partial(Detection3DHead, options=context.detection)


def _decode(output: Output, meta: Sequence[Mapping]) -> list[Boxes3D]:
    cameras = [image["frame"]["camera"] for image in meta]
    return [seen_by(camera, found) for camera, found in zip(cameras, decode(output, cameras), strict=True)]


def seen_by(camera: Boxes3D, found: Detections3D) -> Boxes3D:
    """Predictions of one image as boxes, on the host: there are few of them, and the score wants float64."""
    found = Detections3D(*(value.cpu() for value in found))
    boxes, scores, projected, modal = (value.double() for value in (found.boxes, found.scores, found.projected,
                                                                    found.boxes2d))
    seen = camera._replace(labels=found.labels, centers=boxes[:, :3], projected=projected, sizes=boxes[:, 3:6],
                           angles=boxes[:, 6:], modal=modal, scores=scores)
    return seen._replace(amodal=amodal_boxes(seen.corners(), seen.intrinsics, seen.image_size))


DET3D = Task(
    num_channels=None,
    label=Boxes3DLabel(),
    loss=_loss,
    decode=_decode,
    evaluators=(DetectionMeter,),
    view=BOXES,
    export=save_boxes,
    head=_head,
)
