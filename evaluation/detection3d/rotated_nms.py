"""Non-maximum suppression of turned rectangles: exact overlaps, the same result on every device and in every run.

The area that a rectangle shares with another is a line integral along its sides, once it is seen in the other's axes:
with cx(x) = clamp(x, -w/2, w/2) and cy likewise, the shared area is the integral of cx d(cy). On a side cx is linear
but for two kinks, so the trapezoidal rule between them is exact. Nothing is sorted or selected, so that all pairs are
computed at once, and touching or equal rectangles are no special case. NumPy, float64.
"""

import numpy as np
import torch
from torch import Tensor

CHUNK = 256  # rectangles that are compared with those kept and with each other at once
CORNER_X, CORNER_Y = np.array([0.5, -0.5, -0.5, 0.5]), np.array([0.5, 0.5, -0.5, -0.5])  # counter-clockwise


def rotated_nms(rectangles: Tensor, scores: Tensor, groups: Tensor, iou: float, most: int) -> Tensor:
    """Indices of the rectangles kept, best first, at most so many; those of equal score in their order.

    rectangles (n, 5): x, y of the centre, extents along x and y, angle by which these axes are turned from x towards
    -y; scores, groups (n,). The best one left is kept and suppresses all of its group that overlap it by more than
    `iou`.
    """
    order = scores.argsort(descending=True, stable=True)
    boxes, groups = (value[order].detach().cpu().numpy() for value in (rectangles.double(), groups))
    kept = np.empty(0, np.int64)
    for start in range(0, len(boxes), CHUNK):
        chunk = np.arange(start, min(start + CHUNK, len(boxes)))
        if len(kept):
            chunk = chunk[~_overlapping(boxes, groups, chunk, kept, iou).any(axis=1)]
        among = _overlapping(boxes, groups, chunk, chunk, iou)
        alive = np.ones(len(chunk), bool)
        for index in range(len(chunk)):
            if alive[index]:
                alive[index + 1:] &= ~among[index, index + 1:]
        kept = np.concatenate([kept, chunk[alive]])
        if len(kept) >= most:
            break
    return order[torch.from_numpy(kept[:most]).to(order.device)]


def rotated_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Overlaps (n,) of n pairs of rectangles (n, 5): shared area over joint area; 0 where both areas are 0."""
    shared = shared_area(first, second)
    joint = first[:, 2] * first[:, 3] + second[:, 2] * second[:, 3] - shared
    return np.divide(shared, joint, out=np.zeros_like(shared), where=joint > 0)


def shared_area(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Areas (n,) that n pairs of rectangles (n, 5) have in common."""
    turn = second[:, 4] - first[:, 4]
    dx, dy = _turned(second[:, 0] - first[:, 0], second[:, 1] - first[:, 1], -first[:, 4])
    x, y = _turned(CORNER_X * second[:, 2:3], CORNER_Y * second[:, 3:4], turn[:, None])  # (n, 4), in first's axes
    x, y = x + dx[:, None], y + dy[:, None]
    step_x, step_y = np.roll(x, -1, axis=1) - x, np.roll(y, -1, axis=1) - y
    half_x, half_y = first[:, 2:3] / 2, first[:, 3:4] / 2
    # The stretch of each side, as shares of it, on which y lies within the first rectangle.
    enters, leaves = _crossings(y, step_y, half_y, np.zeros_like(y), np.ones_like(y))
    kinks = _crossings(x, step_x, half_x, enters, leaves)
    places = np.stack([enters, *kinks, leaves])  # (4, n, 4), growing
    height = np.clip(x + places * step_x, -half_x, half_x)
    pieces = (height[1:] + height[:-1]) / 2 * (places[1:] - places[:-1])
    return np.maximum((pieces.sum(axis=0) * step_y).sum(axis=1), 0.0)


def _crossings(start: np.ndarray, step: np.ndarray, half: np.ndarray, low: np.ndarray,
               high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where start + t step passes -half and half, the earlier first, within [low, high].

    Of a side along which the coordinate stays the same the place does not matter: there is no kink, or nothing to add.
    """
    safe = np.where(step == 0, 1.0, step)
    first, second = (np.clip((bound - start) / safe, low, high) for bound in (-half, half))
    return np.minimum(first, second), np.maximum(first, second)


def _turned(x: np.ndarray, y: np.ndarray, angle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Turned from x towards -y."""
    cos, sin = np.cos(angle), np.sin(angle)
    return x * cos + y * sin, y * cos - x * sin


def _overlapping(boxes: np.ndarray, groups: np.ndarray, rows: np.ndarray, columns: np.ndarray,
                 iou: float) -> np.ndarray:
    """(rows, columns): whether these rectangles are of one group and overlap by more than `iou`."""
    first, second = boxes[rows], boxes[columns]
    areas = first[:, 2:3] * first[:, 3:4], second[:, 2] * second[:, 3]
    # What they must share at least, and can share at most: that of the upright rectangles around them.
    needed = iou / (1 + iou) * (areas[0] + areas[1])
    halves = zip(_half_extents(first), _half_extents(second), strict=True)
    widths = [np.minimum(a[:, None] + b - np.abs(first[:, None, axis] - second[:, axis]), 2 * np.minimum(a[:, None], b))
              for axis, (a, b) in enumerate(halves)]
    possible = np.minimum(np.maximum(widths[0], 0) * np.maximum(widths[1], 0), np.minimum(*areas))
    row, column = np.nonzero((possible > needed * (1 - 1e-9)) & (groups[rows, None] == groups[columns]))
    result = np.zeros((len(rows), len(columns)), bool)
    result[row, column] = rotated_iou(first[row], second[column]) > iou
    return result


def _half_extents(boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of the upright rectangles around them, along x and y."""
    cos, sin = np.abs(np.cos(boxes[:, 4])), np.abs(np.sin(boxes[:, 4]))
    return (boxes[:, 2] * cos + boxes[:, 3] * sin) / 2, (boxes[:, 2] * sin + boxes[:, 3] * cos) / 2
