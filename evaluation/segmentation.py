"""Mean intersection over union of semantic segmentation and human parts."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from evaluation.evaluator import Score, TaskContext
from evaluation.meter import Meter, ratio


class SegmentationMeter(Meter):
    """Counts per class over all valid pixels of the set; figures are fractions.

    `mIoU` averages over *all* classes and a class that is neither labelled nor predicted counts 0: the
    convention of InvPT and its successors. `mIoU_present` leaves such classes out. `IoU/<k>` per class,
    `pixel_accuracy`. pred (B, 1, H, W) class ids, target (B, 1, H, W) with void = ignore_index.
    """

    scores: ClassVar = (Score("mIoU", "mIoU", True, scale=100, unit="%"),)

    def __init__(self, num_classes: int, ignore_index: int = 255):
        self.num_classes = num_classes
        super().__init__(ignore_index)

    @classmethod
    def for_task(cls, context: TaskContext) -> "SegmentationMeter":
        return cls(context.num_channels, context.ignore_index)

    def initial_state(self) -> dict[str, Tensor]:
        return {name: torch.zeros(self.num_classes, dtype=torch.int64) for name in ("tp", "fp", "fn")}

    def update(self, pred: Tensor, target: Tensor, meta: Sequence[Mapping] = ()) -> None:
        valid = target != self.ignore
        pred, target = pred[valid].long(), target[valid].long()        # (num_valid,)
        tp = self._count(target[pred == target], "label")
        self.add(tp=tp, fp=self._count(pred, "prediction") - tp, fn=self._count(target, "label") - tp)

    def _count(self, ids: Tensor, what: str) -> Tensor:
        """Histogram of class ids, (num_classes,)."""
        counts = torch.bincount(ids, minlength=self.num_classes)
        if len(counts) > self.num_classes:
            raise ValueError(f"{what} {len(counts) - 1} does not exist: there are {self.num_classes} classes "
                             f"(0..{self.num_classes - 1}, {self.ignore} = void)")
        return counts

    @property
    def valid_pixels(self) -> int:
        """Every valid pixel is a hit or a miss of its label's class."""
        return int((self.state["tp"] + self.state["fn"]).sum().item())

    def compute(self) -> dict[str, float]:
        tp, fp, fn = (self.state[name].double() for name in ("tp", "fp", "fn"))
        union = tp + fp + fn
        iou = tp / union.clamp_min(1)
        present = union > 0
        return {"mIoU": iou.mean().item(),
                "mIoU_present": iou[present].mean().item(),            # mean of nothing is NaN
                "pixel_accuracy": ratio(tp.sum().item(), (tp + fn).sum().item()),
                **{f"IoU/{k}": value for k, value in enumerate(iou.tolist())}}
