"""The loss of 3-D detection: eight parts over the points of a batch, summed with published weights.

Reference: as `losses.detection3d.targets`; the focal loss is that of Lin et al., ICCV 2017 (gamma 2, alpha 0.25).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses.detection3d.options import Detection3DOptions
from losses.detection3d.points import REGRESSION, Output, Points, grid_of, joined
from losses.detection3d.targets import Targets, targets_of
from utils.boxes3d import Boxes3D

ALPHA = 0.25  # weight of the right class in the focal loss, and its exponent
GAMMA = 2.0
BETA = 1 / 9  # where the smooth L1 losses become linear
WEIGHTS = {"classes": 5.0, "depth": 0.2, "rotation": 5.0}  # of the parts that do not count once


class Detection3DLoss(nn.Module):
    """Takes a head's output (`losses.detection3d.points`) and the boxes of every image.

    The focal loss is a sum over points and classes, divided by the number of points that learn a box and of images with
    boxes; the others are sums over components, divided by the number of these points. Images without boxes do not
    count, and without any the loss is 0 with zero gradients.
    """

    def __init__(self, options: Detection3DOptions, num_classes: int):
        super().__init__()
        self.options, self.num_classes = options, num_classes

    def forward(self, output: Output, label: list[Boxes3D]) -> Tensor:
        """0-dim."""
        return torch.stack(tuple(self.parts(output, label).values())).sum()

    def parts(self, output: Output, label: list[Boxes3D]) -> dict[str, Tensor]:
        """classes, offset, depth, size, rotation, box, direction, centerness -> 0-dim, weighted."""
        points = joined(output)
        if len(label) != len(points.classes):
            raise ValueError(f"3-D detection: predictions of {len(points.classes)} images, boxes of {len(label)}")
        kept = [image for image, boxes in enumerate(label) if len(boxes.labels)]
        targets = [targets_of(grid_of(output, image, label[image].image_size[1]), label[image], self.options.ranges,
                              output["direction_offset"][image], self.num_classes) for image in kept]
        points = Points(*(value[kept] for value in points))
        return _losses(points, targets)


def _losses(points: Points, targets: list[Targets]) -> dict[str, Tensor]:
    """The parts of images with boxes; points of B images, targets of each."""
    num_images, num_points, num_classes = points.classes.shape
    positive = torch.cat([points.classes.new_empty(0, dtype=torch.long),
                          *(target.positive + index * num_points for index, target in enumerate(targets))])
    count = max(len(positive), 1)
    labels = [target.labels for target in targets]
    one_hot = F.one_hot(torch.stack(labels), num_classes + 1)[..., :-1] if labels else torch.zeros_like(points.classes)
    parts = {"classes": focal_sum(points.classes, one_hot.to(points.classes)) / max(len(positive) + num_images, 1)}
    regression = dict(zip(REGRESSION, points.regression.flatten(0, 1)[positive].split(list(REGRESSION.values()), dim=1),
                          strict=True))
    code = _stacked([target.code for target in targets], regression["box"], sum(REGRESSION.values()))
    for name, wanted in zip(REGRESSION, code.split(list(REGRESSION.values()), dim=1), strict=True):
        error = regression[name] - wanted
        error = error.sin() if name == "rotation" else error
        parts[name] = F.smooth_l1_loss(error, torch.zeros_like(error), reduction="sum", beta=BETA) / count
    direction = torch.cat([target.direction for target in targets]) if targets else positive.new_empty(0, 3)
    logits = points.direction.flatten(0, 1)[positive]  # (N, 3, 2)
    parts["direction"] = F.cross_entropy(logits.flatten(0, 1), direction.flatten(), reduction="sum") / count
    centerness = _stacked([target.centerness for target in targets], logits)
    parts["centerness"] = F.binary_cross_entropy_with_logits(
        points.centerness.flatten()[positive], centerness, reduction="sum") / count
    return {name: WEIGHTS.get(name, 1.0) * value for name, value in parts.items()}


def focal_sum(logits: Tensor, one_hot: Tensor) -> Tensor:
    """Sigmoid focal loss, summed; both of one shape, no class set for background."""
    probability = logits.sigmoid()
    wrong = torch.where(one_hot > 0, 1 - probability, probability)
    weight = torch.where(one_hot > 0, ALPHA, 1 - ALPHA) * wrong**GAMMA
    return (weight * F.binary_cross_entropy_with_logits(logits, one_hot, reduction="none")).sum()


def _stacked(parts: list[Tensor], like: Tensor, *width: int) -> Tensor:
    """Targets of all images one behind the other, also of none, in the type of the predictions."""
    return torch.cat([like.new_empty(0, *width), *(part.to(like) for part in parts)])
