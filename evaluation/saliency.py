"""Saliency: maximal F-measure (Achanta et al., CVPR 2009) in its two published variants, and a mean IoU.

The InvPT family applies a second sigmoid to a value that already is a probability. The result lies in [0.5,
0.731], so of the 19 thresholds only 0.55 .. 0.70 do anything: published maxF figures sample the curve at four
points and "everything". `maxF` reproduces that figure, `maxF_exact` is the sweep that was meant (ATRC, DeMT).
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from evaluation.evaluator import Score
from evaluation.meter import Meter, ratio, tally

BETA_SQUARED = 0.3
# float32 and torch.arange on purpose: 0.6 becomes 0.59999996, and counts at the threshold depend on it
THRESHOLDS = torch.arange(0.05, 1, 0.05)
IMAGE_THRESHOLDS = torch.linspace(0.2, 0.9, 15)


class SaliencyMeter(Meter):
    """`maxF` (double sigmoid), `maxF_exact`, `mIoU`, `F1`; all fractions.

    maxF: F = 1.3 P R / (0.3 P + R) from counts pooled over the set, best of 19 thresholds (p >= threshold).
    mIoU, F1 (Multi-Task-Learning-PyTorch): at 15 thresholds (p > threshold) the IoU, precision and recall of
    the foreground per image, averaged over images; the best mean IoU, and the best 2 P R / (P + R) of the
    means. An image with neither labelled nor predicted foreground has IoU 1; wholly void images are left out.
    pred (B, 1, H, W) probability of the salient class, target (B, 1, H, W) 0 / 1 with void = ignore_index.
    """

    scores: ClassVar = (Score("maxF", "maxF", True, scale=100, unit="%"),)
    of_image: ClassVar = scores[0]
    SUMS: ClassVar = dict.fromkeys(("sum_iou", "sum_precision", "sum_recall"), (len(IMAGE_THRESHOLDS),))
    COUNTS: ClassVar = {"positives": (), "num_images": (), **dict.fromkeys(
        ("tp", "predicted", "tp_exact", "predicted_exact"), (len(THRESHOLDS),))}

    def update(self, pred: Tensor, target: Tensor, meta: Sequence[Mapping] = ()) -> None:
        pred, target = pred.float().flatten(1).contiguous(), target.flatten(1)                  # (B, H*W)
        valid = target != self.ignore
        positive = target == 1
        tp, predicted = _counts_above(torch.sigmoid(pred), positive, valid, THRESHOLDS, right=True)
        tp_exact, predicted_exact = _counts_above(pred, positive, valid, THRESHOLDS, right=True)
        self.add(tp=tp.sum(0), predicted=predicted.sum(0), tp_exact=tp_exact.sum(0),
                 predicted_exact=predicted_exact.sum(0), positives=positive.sum(),
                 **self._per_image(pred, positive, valid))

    def _per_image(self, pred: Tensor, positive: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """Sums over the batch's images of IoU, precision and recall per threshold."""
        tp, predicted = _counts_above(pred, positive, valid, IMAGE_THRESHOLDS, right=False)    # (B, 15)
        labelled = positive.sum(1, keepdim=True).expand_as(tp)
        union = predicted + labelled - tp
        counted = valid.any(1)                                         # (B,)
        iou = torch.where(union > 0, tp.double() / union.clamp_min(1), 1.0)
        return {"sum_iou": torch.where(counted[:, None], iou, 0.0).sum(0), "num_images": counted.sum(),
                "sum_precision": (tp.double() / predicted.clamp_min(1)).sum(0),
                "sum_recall": (tp.double() / labelled.clamp_min(1)).sum(0)}

    @property
    def valid_pixels(self) -> int:
        """The sigmoid of a probability is at least 0.5, so the first threshold accepts every valid pixel."""
        return int(self.state["predicted"][0].item())

    def compute(self) -> dict[str, float]:
        num_images = self.state["num_images"].item()
        precision, recall = self.state["sum_precision"], self.state["sum_recall"]
        f1 = 2 * precision * recall / (precision + recall).clamp_min(1e-12)
        return {"maxF": self._max_f("tp", "predicted"),
                "maxF_exact": self._max_f("tp_exact", "predicted_exact"),
                "mIoU": ratio(self.state["sum_iou"].max().item(), num_images),
                "F1": ratio(f1.max().item(), num_images)}

    def _max_f(self, tp_name: str, predicted_name: str) -> float:
        """Best F over the thresholds; 0 where precision or recall do not exist."""
        tp = self.state[tp_name].double()
        precision = tp / self.state[predicted_name].clamp_min(1)
        recall = tp / self.state["positives"].clamp_min(1)
        f = (1 + BETA_SQUARED) * precision * recall / (BETA_SQUARED * precision + recall)
        return f.nan_to_num(0.0).max().item()


def _counts_above(prob: Tensor, positive: Tensor, valid: Tensor, thresholds: Tensor,
                  right: bool) -> tuple[Tensor, Tensor]:
    """Per image and threshold: true positives and predicted positives, both (B, num_thresholds) int64.

    prob, positive, valid (B, H*W). right: a value equal to a threshold passes it (>=), otherwise not (>).
    Each pixel falls into one bin, its number of passed thresholds; the counts are the tails of that
    histogram.
    """
    num_bins = len(thresholds) + 1
    passed = torch.bucketize(prob, thresholds.to(prob.device), right=right)        # (B, H*W)
    passed += num_bins * torch.arange(len(prob), device=prob.device)[:, None]

    def tails(mask: Tensor) -> Tensor:
        histogram = tally(passed, mask, num_bins * len(prob)).view(len(prob), num_bins)
        return histogram.flip(1).cumsum(1).flip(1)[:, 1:]              # (B, num_thresholds)

    return tails(positive & valid), tails(valid)
