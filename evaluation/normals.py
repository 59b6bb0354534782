"""Angular error of surface normals, pooled over all valid pixels of the set."""

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from evaluation.evaluator import Score
from evaluation.figures import Figure, Histogram
from evaluation.meter import Meter, ratio, tally

CONVENTIONS = ("atan2", "arccos")
SHARES_DEG = (11.25, 22.5, 30.0)
BIN_DEG = 0.01                       # of the histogram behind the median, which is exact to half a bin
NUM_BINS = round(180 / BIN_DEG)


class NormalsMeter(Meter):
    """mean, median and rmse in degrees; "11.25", "22.5", "30" = percent of pixels below that angle.

    pred and target (B, 3, H, W); a pixel is valid if none of its three label channels is `ignore`. convention
    "atan2" (InvPT and its successors): both vectors scaled to unit length, 2 atan2(|p - g|, |p + g|), accurate near 0
    and 180 degrees; a zero prediction scores 90. "arccos" (Multi-Task-Learning-PyTorch): arccos of the
    clipped dot product, the label used as stored - its 8-bit rounding makes the angles slightly different.
    """

    scores: ClassVar = (Score("mean", "mErr", False, unit="deg"),)
    of_image: ClassVar = scores[0]
    SUMS: ClassVar = {"sum_deg": (), "sum_squared_deg": ()}
    COUNTS: ClassVar = {"num_valid": (), "num_below": (len(SHARES_DEG),), "histogram": (NUM_BINS,)}

    def __init__(self, ignore: float = 255.0, convention: str = "atan2"):
        if convention not in CONVENTIONS:
            raise ValueError(f"normals convention '{convention}' is unknown; valid: {', '.join(CONVENTIONS)}")
        self.convention = convention
        super().__init__(ignore)

    def update(self, pred: Tensor, target: Tensor, meta: Sequence[Mapping] = ()) -> None:
        valid = (target != self.ignore).all(dim=1)                     # (B, H, W)
        p, g = (torch.where(valid[:, None], maps.double(), 1) for maps in (pred, target))      # no angle elsewhere
        p = p / _length(p).clamp_min(1e-12)[:, None]
        if self.convention == "atan2":
            g = g / _length(g).clamp_min(1e-12)[:, None]
            angle = 2 * torch.atan2(_length(p - g), _length(p + g))
        else:
            angle = torch.arccos((p * g).sum(1).clamp(-1, 1))
        deg = torch.where(valid, angle * (180 / math.pi), 0)           # (B, H, W)
        bins = (deg / BIN_DEG).long().clamp(0, NUM_BINS - 1)          # 180 itself belongs to the last bin
        self.add(sum_deg=deg.sum(), sum_squared_deg=deg.square().sum(), num_valid=valid.sum(),
                 num_below=torch.stack([((deg < limit) & valid).sum() for limit in SHARES_DEG]),
                 histogram=tally(bins, valid, NUM_BINS))

    def compute(self) -> dict[str, float]:
        num = self.state["num_valid"].item()
        return {"mean": ratio(self.state["sum_deg"].item(), num), "median": self._median(num),
                "rmse": ratio(self.state["sum_squared_deg"].item(), num) ** 0.5,
                **{f"{limit:g}": ratio(100 * below, num)
                   for limit, below in zip(SHARES_DEG, self.state["num_below"].tolist(), strict=True)}}

    def _median(self, num: int) -> float:
        """Mean of the centres of the two middle angles' bins (the same bin twice for odd counts)."""
        if num == 0:
            return math.nan
        ranks = torch.tensor([(num + 1) // 2, num // 2 + 1])           # 1-based
        bins = torch.searchsorted(self.state["histogram"].cpu().cumsum(0), ranks)
        return (bins.double() + 0.5).mean().item() * BIN_DEG

    def figures(self) -> list[Figure]:
        per_degree = self.state["histogram"].cpu().numpy().reshape(-1, round(1 / BIN_DEG)).sum(axis=1)     # (180,)
        counts = np.append(per_degree[:90], per_degree[90:].sum())
        return [Histogram("angle between prediction and label", "deg", np.arange(92.0), counts)]


def _length(vectors: Tensor) -> Tensor:
    """(B, 3, H, W) -> (B, H, W). torch's norm over an axis between others is slow on a CPU."""
    return vectors.square().sum(dim=1).sqrt()
