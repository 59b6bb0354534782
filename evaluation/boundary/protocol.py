"""The protocol for one image: which thresholds, what is done to the prediction, how pixels are counted."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import get_args

import numpy as np

from evaluation.boundary.matching import count_annotators, count_levels
from evaluation.boundary.settings import ProtocolName
from evaluation.boundary.suppression import suppress


@dataclass(frozen=True)
class Protocol:
    """Settings of the benchmark.

    max_dist: largest distance of a match, as a share of the image's diagonal (NYUD-v2 0.011, PASCAL 0.0075).
    name: `nms` (SEISM, and the papers since InvPT) suppresses non-maxima and takes 101 thresholds, value > t in single
    precision; `plain` (MTI-Net) thins what 99 thresholds leave, value >= t in double precision.
    """

    max_dist: float
    name: ProtocolName = "nms"

    def __post_init__(self):
        if self.name not in get_args(ProtocolName):
            raise ValueError(f"unknown protocol {self.name!r}; known: {', '.join(get_args(ProtocolName))}")
        if not 0 < self.max_dist < 1:
            raise ValueError(f"max_dist must be a share of the image's diagonal, in (0, 1); got {self.max_dist}")

    @cached_property
    def thresholds(self) -> np.ndarray:
        """Increasing, (K,) float64."""
        inner = np.arange(1, 100) / 100
        return np.array([0.001, *inner, 0.999]) if self.name == "nms" else inner

    def levels(self, prediction: np.ndarray) -> np.ndarray:
        """How many thresholds each pixel passes, (H, W); prediction as in `image_counts`."""
        edges = as_probability(prediction)
        if self.name == "nms":
            return np.searchsorted(self.thresholds.astype(np.float32), suppress(edges.astype(np.float32)), side="left")
        return np.searchsorted(self.thresholds, edges, side="right")

    def distance(self, size: tuple[int, int]) -> float:
        """Largest distance of a match in an image of this (H, W), in pixels."""
        return self.max_dist * float(np.hypot(*size))


def as_probability(prediction: np.ndarray) -> np.ndarray:
    """H x W uint8 (255 = certain) or floating point in [0, 1] -> float64 in [0, 1]; anything else is a ValueError."""
    if prediction.ndim != 2 or prediction.size == 0:
        raise ValueError(f"a boundary prediction is H x W, this one has shape {prediction.shape}")
    if prediction.dtype == np.uint8:
        return prediction / 255.0
    if prediction.dtype.kind != "f":
        raise ValueError(f"a boundary prediction holds 8-bit or floating-point numbers, not {prediction.dtype}")
    low, high = float(prediction.min()), float(prediction.max())       # NaN fails the comparison below
    if not (low >= 0 and high <= 1):
        raise ValueError(f"a floating-point boundary prediction must lie in [0, 1], this one spans {low:g}..{high:g}")
    return prediction.astype(np.float64)


def image_counts(prediction: np.ndarray, truths: Sequence[np.ndarray], protocol: Protocol,
                 backend: str = "auto") -> np.ndarray:
    """cntR, sumR, cntP, sumP of one image at each threshold, (K, 4) int64.

    prediction H x W: uint8, or floating point in [0, 1]. truths: one or more thin H x W bool maps (`truth_boundary`).
    One ground truth is matched for the most pairs. With several, each is matched by itself for the most pairs and
    then the least distance; cntR and sumR add up, and a predicted pixel counts once if any of them matches it.
    """
    levels, num = protocol.levels(prediction), len(protocol.thresholds)
    for truth in truths:
        if truth.shape != prediction.shape:
            raise ValueError(f"the prediction has (H, W) = {prediction.shape}, its ground truth {truth.shape}")
    if not truths:
        raise ValueError("an image needs at least one ground truth")
    counts = np.zeros((num, 4), np.int64)
    distance = protocol.distance(prediction.shape)
    if len(truths) == 1:
        pairs, pixels = count_levels(levels, truths[0], num, distance, backend).T
        counts[:, 0], counts[:, 1], counts[:, 2], counts[:, 3] = pairs, truths[0].sum(), pairs, pixels
        return counts
    pairs, matched, pixels, _ = count_annotators(levels, np.stack(truths), num, distance, backend).T
    counts[:, 0], counts[:, 1], counts[:, 2], counts[:, 3] = pairs, sum(t.sum() for t in truths), matched, pixels
    return counts
