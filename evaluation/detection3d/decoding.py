"""From the output of a detection head to vehicles before a camera: what `losses.detection3d.targets` turns around.

Reference: as there. Boxes of one class that overlap seen from above are one vehicle; classes do not look at each other.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from evaluation.detection3d.rotated_nms import rotated_nms
from losses.detection3d.points import REGRESSION, Output, Points, grid_of, joined
from utils.boxes3d import Boxes3D, Detections3D, image_to_view


@dataclass(frozen=True)
class Limits:
    """What is kept; the published values.

    per_level: points of a level with the best scores. score: of a candidate, exclusive. iou: above which the lesser of
    two candidates goes. per_image: of all classes together.
    """

    per_level: int = 1000
    score: float = 0.05
    iou: float = 0.3
    per_image: int = 200


class Candidates(NamedTuple):
    """Boxes of one image before suppression, level after level, the best score of a level first."""

    boxes: Tensor  # (n, 9)
    scores: Tensor  # (n, K)
    projected: Tensor  # (n, 3)
    boxes2d: Tensor  # (n, 4)


@torch.no_grad()
def decode(output: Output, cameras: Sequence[Boxes3D], limits: Limits = Limits()) -> list[Detections3D]:
    """The vehicles in every image of a batch, class after class, the surest first; if there are too many for
    `per_image`, the surest of all classes. Of `cameras` only the camera is looked at, one per image."""
    return [suppressed(found, limits) for found in candidates(output, cameras, limits)]


def candidates(output: Output, cameras: Sequence[Boxes3D], limits: Limits) -> list[Candidates]:
    """The best points of every image as boxes."""
    points = joined(output)
    if len(cameras) != len(points.classes):
        raise ValueError(f"3-D detection: predictions of {len(points.classes)} images, cameras of {len(cameras)}")
    found = []
    for image, camera in enumerate(cameras):
        grid = grid_of(output, image, camera.image_size[1])
        of_image = Points(*(value[image] for value in points))
        scores = of_image.classes.sigmoid() * of_image.centerness.sigmoid()[:, None]  # (P, K)
        chosen = _best_of_levels(scores.amax(dim=1), [h * w for h, w in grid.shapes], limits.per_level)
        of_image = Points(*(value[chosen] for value in of_image))
        known = (grid.points()[chosen], grid.stride_of_points()[chosen, None], output["direction_offset"][image])
        found.append(_boxes(of_image, scores[chosen], *(value.to(scores) for value in known), camera))
    return found


def _best_of_levels(score: Tensor, sizes: Sequence[int], most: int) -> Tensor:
    """Indices (n,) of points: all of a level, or the best of a larger one, best first and equal ones in their order."""
    chosen, start = [], 0
    for size in sizes:
        of_level = torch.arange(start, start + size, device=score.device)
        if size > most:
            of_level = of_level[score[start:start + size].argsort(descending=True, stable=True)[:most]]
        chosen.append(of_level)
        start += size
    return torch.cat(chosen)


def _boxes(points: Points, scores: Tensor, place: Tensor, stride: Tensor, offset: Tensor,
           camera: Boxes3D) -> Candidates:
    """Of n points, place (n, 2) and stride (n, 1) in pixels of the camera's image."""
    part = dict(zip(REGRESSION, points.regression.split(list(REGRESSION.values()), dim=1), strict=True))
    projected = torch.cat([place - part["offset"] * stride, part["depth"]], dim=1)
    turns = points.direction.argmax(dim=-1)  # (n, 3), the first where both are equal
    angles = (part["rotation"] - offset) % math.pi + offset + math.pi * turns.to(projected)
    low, high = place - part["box"][:, :2] * stride, place + part["box"][:, 2:] * stride
    boxes2d = torch.cat([low, high], dim=1).clamp(min=0).minimum(camera.image_size.to(low).flip(0).repeat(2))
    centre = image_to_view(projected, camera.intrinsics.to(projected))
    return Candidates(torch.cat([centre, part["size"], angles], dim=1), scores, projected, boxes2d)


def ground_rectangles(boxes: Tensor) -> Tensor:
    """(n, 9) -> (n, 5), seen from above: x, z, width along x, length along z, turned by the third angle."""
    return boxes[:, [0, 2, 4, 3, 8]]


def suppressed(found: Candidates, limits: Limits) -> Detections3D:
    """One image's detections."""
    labels, index = (limits.score < found.scores.T).nonzero(as_tuple=True)  # class after class
    scores = found.scores[index, labels]
    # One more than may be kept tells whether there are too many. The best of all classes come first.
    kept = rotated_nms(ground_rectangles(found.boxes[index]), scores, labels, limits.iou, limits.per_image + 1)
    if len(kept) <= limits.per_image:
        kept = kept[labels[kept].argsort(stable=True)]
    kept = kept[:limits.per_image]
    index = index[kept]
    return Detections3D(found.boxes[index], scores[kept], labels[kept], found.projected[index], found.boxes2d[index])
