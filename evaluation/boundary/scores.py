"""Scores of a set of images from its counts: ODS-F, OIS-F and AP (Martin, Fowlkes, Malik, PAMI 2004; Arbelaez et al.,
PAMI 2011, in the variant of the multi-task papers, which does not interpolate between thresholds).

Counts are (..., 4) int64: cntR matched and sumR all ground-truth pixels, cntP matched and sumP all predicted ones.
"""

from dataclasses import dataclass

import numpy as np

COUNT_NAMES = ("cntR", "sumR", "cntP", "sumP")


def precision_recall_f(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """P, R and F = 2PR / (P + R), each of the leading shape.

    Without ground truth R = 1 and P = 0; else, without prediction, R = 0 and P = 1.
    """
    cnt_r, sum_r, cnt_p, sum_p = np.moveaxis(counts.astype(np.float64), -1, 0)
    precision = np.where(sum_r == 0, 0.0, np.where(sum_p == 0, 1.0, cnt_p / np.maximum(sum_p, 1)))
    recall = np.where(sum_r == 0, 1.0, cnt_r / np.maximum(sum_r, 1))
    total = precision + recall
    return precision, recall, np.where(total > 0, 2 * precision * recall / np.where(total > 0, total, 1), 0.0)


@dataclass
class BoundaryTotals:
    """Sums over images; adding is all that ranks and workers have to do.

    `counts` (K, 4): at each threshold. `best` (4,): each image's counts at its own best threshold.
    """

    counts: np.ndarray
    best: np.ndarray
    images: int = 0

    @classmethod
    def empty(cls, num_thresholds: int) -> "BoundaryTotals":
        return cls(np.zeros((num_thresholds, 4), np.int64), np.zeros(4, np.int64))

    def add(self, counts: np.ndarray) -> None:
        """Adds one image's counts, (K, 4)."""
        self.counts += counts
        self.best += counts[best_threshold(counts)]
        self.images += 1

    @property
    def optimum(self) -> int:
        """Index of the threshold with the largest F of the whole set, the first one if tied."""
        return int(precision_recall_f(self.counts)[2].argmax())

    def scores(self, thresholds: np.ndarray) -> dict[str, float]:
        """odsF, oisF, ap as fractions; threshold of odsF; images."""
        at = self.optimum
        return {"odsF": float(precision_recall_f(self.counts)[2][at]),
                "oisF": float(precision_recall_f(self.best)[2]),
                "ap": average_precision(self.counts), "threshold": float(thresholds[at]), "images": self.images}


def best_threshold(counts: np.ndarray) -> int:
    """Index of one image's largest F, the first one if tied.

    F is rounded to six decimals, as the published tools write it to a file before they choose. So an image without
    ground truth, whose F is 0 everywhere, contributes the false positives of the lowest threshold.
    """
    return int(np.round(precision_recall_f(counts)[2], 6).argmax())


def average_precision(counts: np.ndarray) -> float:
    """Mean of the precision at recalls 0, 0.01, ..., 1, interpolated linearly; 0 outside the measured range.

    Of thresholds with the same recall only the lowest counts, as published; a single recall gives 0. The sum of the 101
    values is divided by 100, also as published, so that a perfect curve has 1.01.
    """
    precision, recall, _ = precision_recall_f(counts)
    recall, first = np.unique(recall, return_index=True)
    if len(recall) < 2:
        return 0.0
    return float(np.interp(np.linspace(0, 1, 101), recall, precision[first], left=0.0, right=0.0).sum() / 100)
