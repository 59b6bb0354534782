"""Which points learn which box, and what: centre sampling within ranges of size, as in FCOS3D.

A box is looked for at the points around its projected centre, at most 1.5 strides away along either axis, of the level
whose range holds the largest distance from the point to a side of its visible rectangle. A point that could learn
several boxes takes the one with the nearest centre. Centres may lie outside rectangle and image.
Reference: Wang et al., "FCOS3D: Fully Convolutional One-Stage Monocular 3D Object Detection", ICCV 2021 workshops, with
the changes of TaskPrompter (Ye and Xu, ICLR 2023) for Cityscapes-3D.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from losses.detection3d.points import Grid, half_of
from utils.boxes3d import Boxes3D

RADIUS = 1.5  # strides
SHARPNESS = 2.5  # of the centerness
DIAGONAL = 1.414  # of the centre square, as published
SPAN = 5  # cells along an axis that can lie in an open interval of 3 strides, one more on either side for rounding
REFERENCE_HEIGHT = 1024  # of the image that the option `ranges` speaks of


class Targets(NamedTuple):
    """Of the P points of one image, N of which learn a box."""

    labels: Tensor  # (P,) class ids, the number of classes where a point learns background
    positive: Tensor  # (N,) indices of the points that learn a box
    code: Tensor  # (N, 13) as `points.REGRESSION`; distances to the sides may be negative
    centerness: Tensor  # (N,) in (0, 1], 1 at the centre
    direction: Tensor  # (N, 3) long, the half turn of every angle


def targets_of(grid: Grid, boxes: Boxes3D, ranges: Sequence[float], direction_offset: Tensor | float,
               num_classes: int) -> Targets:
    """The targets of one image; `ranges` as the option says."""
    upper = grid.strides.new_tensor([*ranges, 1e8]) * (boxes.image_size[0] / REFERENCE_HEIGHT)
    chosen = _nearest_box(grid, boxes, torch.cat([upper.new_full((1,), -1.0), upper[:-1]]), upper)  # (P,)
    positive = (chosen < len(boxes.labels)).nonzero().squeeze(1)
    box = chosen[positive]
    labels = torch.cat([boxes.labels, boxes.labels.new_full((1,), num_classes)])[chosen]
    point, stride = grid.points()[positive], grid.stride_of_points()[positive, None]
    offset = point - boxes.projected[box, :2]
    sides = torch.cat([point - boxes.modal[box, :2], boxes.modal[box, 2:] - point], dim=1)
    code = torch.cat([offset / stride, boxes.projected[box, 2:], boxes.sizes[box], boxes.angles[box], sides / stride],
                     dim=1)
    centerness = (-SHARPNESS * offset.norm(dim=1) / (DIAGONAL * RADIUS * stride[:, 0])).exp()
    return Targets(labels, positive, code, centerness, half_turn(boxes.angles[box], direction_offset))


def half_turn(angles: Tensor, offset: Tensor | float) -> Tensor:
    """0 for angles in [offset, offset + pi), 1 for the others; any shape."""
    return (((angles - offset) % (2 * math.pi)) / math.pi).floor().clamp(0, 1).long()


def _nearest_box(grid: Grid, boxes: Boxes3D, low: Tensor, high: Tensor) -> Tensor:
    """(P,): the box that each point learns, n where it learns background; low, high (levels,) in pixels, inclusive.

    Only the few cells around every box's centre are looked at: levels x boxes x SPAN x SPAN.
    """
    num_boxes, num_points = len(boxes.labels), sum(height * width for height, width in grid.shapes)
    stride = grid.strides[:, None, None]
    centre, modal = boxes.projected[:, :2].to(stride), boxes.modal.to(stride)
    begin = ((centre - RADIUS * stride - half_of(stride)) / stride).floor()  # (levels, n, 2)
    steps = torch.arange(SPAN, device=centre.device)
    cell = begin[..., None] + steps  # (levels, n, 2, SPAN): column, row
    place = cell * stride[..., None] + half_of(stride)[..., None]
    size = torch.tensor([shape[::-1] for shape in grid.shapes], device=centre.device)[:, None, :, None]
    from_centre = place - centre[..., None]
    inside = (cell >= 0) & (cell < size) & (from_centre.abs() < RADIUS * stride[..., None])
    farthest = torch.maximum(place - modal[:, :2, None], modal[:, 2:, None] - place)  # of the two sides along an axis
    x, y = (slice(None), slice(None), 0, None), (slice(None), slice(None), 1, slice(None), None)
    reach = torch.maximum(farthest[x], farthest[y])  # (levels, n, SPAN rows, SPAN columns)
    limits = (reach >= low[:, None, None, None]) & (reach <= high[:, None, None, None])
    valid = inside[x] & inside[y] & limits
    start = [0]
    for height, width in grid.shapes[:-1]:
        start.append(start[-1] + height * width)
    index = torch.tensor(start, device=centre.device)[:, None, None, None] + cell[y] * size[:, :, :1] + cell[x]
    index = torch.where(valid, index, num_points).long().flatten()  # the last place is for what is not valid
    distance = torch.where(valid, (from_centre[x].square() + from_centre[y].square()).sqrt(), torch.inf).flatten()
    number = torch.arange(num_boxes, device=centre.device)[:, None, None].expand(valid.shape).flatten()
    nearest = distance.new_full((num_points + 1,), torch.inf).scatter_reduce(0, index, distance, "amin")
    number = torch.where(distance == nearest[index], number, num_boxes)
    return number.new_full((num_points + 1,), num_boxes).scatter_reduce(0, index, number, "amin")[:num_points]
