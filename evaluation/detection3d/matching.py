"""Which prediction stands for which vehicle of an image: by the overlap of the rectangles around what is visible.

As the evaluation of Cityscapes 3D does it (Gaehlert et al., arXiv 2006.07864; package cityscapesscripts): rectangles
include their last pixel, the pair with the largest overlap is taken first, and a prediction that belongs to no vehicle
but lies in a region whose vehicles are not told apart is not counted.
"""

import numpy as np

MIN_OVERLAP = 0.7


def overlaps(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rectangles (n, 4), (m, 4) -> areas that pairs have in common (n, m), and intersection over union (n, m)."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    common = np.clip(high - low + 1, 0, None).prod(axis=-1)
    return common, common / (areas(first)[:, None] + areas(second)[None] - common + 1e-10)


def areas(rectangles: np.ndarray) -> np.ndarray:
    """(n, 4): xmin, ymin, xmax, ymax -> (n,), with the last pixel."""
    return (rectangles[:, 2:] - rectangles[:, :2] + 1).prod(axis=-1)


def match(overlap: np.ndarray) -> np.ndarray:
    """Intersection over union (n vehicles, m predictions) -> (n,) index of each vehicle's prediction, -1: none."""
    found, left = np.full(len(overlap), -1), np.where(overlap > MIN_OVERLAP, overlap, 0.0)
    while left.size and left.max() > 0:
        row, column = np.unravel_index(left.argmax(), left.shape)      # the first of equals
        found[row] = column
        left[row], left[:, column] = 0.0, 0.0
    return found


def is_ignored(predictions: np.ndarray, regions: np.ndarray) -> np.ndarray:
    """Predictions (m, 4) that lie in one of the regions (r, 4), (m,) bool."""
    common, _ = overlaps(predictions, regions)
    return (common / areas(predictions)[:, None] > MIN_OVERLAP).any(axis=1)
