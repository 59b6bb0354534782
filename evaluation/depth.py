"""Depth errors pooled over all valid pixels of the set (Eigen et al., NeurIPS 2014)."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from evaluation.evaluator import Score, TaskContext
from evaluation.figures import Figure, Histogram
from evaluation.meter import Meter, ratio, tally

MIN_DEPTH_M = 1e-9
DELTA = 1.25
BINS_PER_DECADE = 20                 # of the histogram of |error| / target, which begins at 1e-3
NUM_BINS = 4 * BINS_PER_DECADE


class DepthMeter(Meter):
    """rmse and sq_rel (m), log_rmse (natural log), abs_rel, delta1..3 = share with max(p/t, t/p) < 1.25^k.

    The rmse is the root of the mean over all pixels, not a mean of per-image values. Predictions that are not
    positive count as 1e-9 m, which dominates log_rmse where there are many (InvPT's and its successors' convention).
    pred and target (B, 1, H, W) in metres. Valid: target != ignore and, with valid_range (lo, hi), lo <
    target < hi (Cityscapes disparity 0..80). A valid target must be positive for the relative and logarithmic
    figures.
    """

    scores: ClassVar = (Score("rmse", "RMSE", False, decimals=4, unit="m"),)
    of_image: ClassVar = scores[0]
    SUMS: ClassVar = dict.fromkeys(("squared", "squared_log", "absolute_rel", "squared_rel"), ())
    COUNTS: ClassVar = dict.fromkeys(("num_valid", "delta1", "delta2", "delta3"), ()) | {"histogram": (NUM_BINS,)}

    def __init__(self, ignore: float | None = 255.0, valid_range: tuple[float, float] | None = None):
        self.valid_range = valid_range
        super().__init__(ignore)

    @classmethod
    def for_task(cls, context: TaskContext) -> "DepthMeter":
        return cls(context.ignore_index, context.valid_range)

    def update(self, pred: Tensor, target: Tensor, meta: Sequence[Mapping] = ()) -> None:
        valid = torch.ones_like(target, dtype=torch.bool)
        if self.ignore is not None:
            valid &= target != self.ignore
        if self.valid_range is not None:
            lo, hi = self.valid_range
            valid &= (target > lo) & (target < hi)
        p, t = (torch.where(valid, maps, 1).double() for maps in (pred, target))       # no error where not valid
        p = torch.where(p <= 0, MIN_DEPTH_M, p)
        squared, relative = (p - t).square(), (p - t).abs() / t
        worse = torch.maximum(p / t, t / p)
        bins = (relative.clamp(1e-3, 10).log10().add(3) * BINS_PER_DECADE).long().clamp(0, NUM_BINS - 1)
        self.add(num_valid=valid.sum(), squared=squared.sum(), squared_log=(p.log() - t.log()).square().sum(),
                 absolute_rel=relative.sum(), squared_rel=(squared / t).sum(), histogram=tally(bins, valid, NUM_BINS),
                 **{f"delta{k}": ((worse < DELTA**k) & valid).sum() for k in (1, 2, 3)})

    def compute(self) -> dict[str, float]:
        total = {name: value.item() for name, value in self.state.items() if value.ndim == 0}
        mean = {name: ratio(value, total["num_valid"]) for name, value in total.items()}
        return {"rmse": mean["squared"] ** 0.5, "log_rmse": mean["squared_log"] ** 0.5,
                "abs_rel": mean["absolute_rel"], "sq_rel": mean["squared_rel"],
                **{name: mean[name] for name in ("delta1", "delta2", "delta3")}}

    def figures(self) -> list[Figure]:
        edges = 100 * 10.0 ** (np.arange(NUM_BINS + 1) / BINS_PER_DECADE - 3)
        return [Histogram("error, relative to the label", "%", edges, self.state["histogram"].cpu().numpy())]
