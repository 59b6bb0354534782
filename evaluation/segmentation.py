"""Mean intersection over union of semantic segmentation and human parts."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from evaluation.evaluator import Score, TaskContext
from evaluation.figures import Bars, Confusion, Figure
from evaluation.meter import Meter, ratio, tally


class SegmentationMeter(Meter):
    """Counts of label and prediction together over all valid pixels of the set; scores are fractions.

    `mIoU` averages over *all* classes and a class that is neither labelled nor predicted counts 0: the
    convention of InvPT and its successors. `mIoU_present` leaves such classes out. `IoU/<k>` per class,
    `pixel_accuracy`. pred (B, 1, H, W) class ids, target (B, 1, H, W) with void = ignore_index. A class that does
    not exist is a ValueError in `reduce` and `compute`, for which alone the host waits for the device.
    """

    scores: ClassVar = (Score("mIoU", "mIoU", True, scale=100, unit="%"),)
    of_image: ClassVar = Score("mIoU_present", "mIoU of the classes in the image", True, scale=100, unit="%")

    def __init__(self, num_classes: int, ignore_index: int = 255, class_names: Sequence[str] = ()):
        self.num_classes = num_classes
        self.names = tuple(class_names) or tuple(map(str, range(num_classes)))
        super().__init__(ignore_index)

    @classmethod
    def for_task(cls, context: TaskContext) -> "SegmentationMeter":
        return cls(context.num_channels, context.ignore_index, context.class_names)

    def initial_state(self) -> dict[str, Tensor]:
        return {"confusion": torch.zeros(self.num_classes, self.num_classes, dtype=torch.int64)}

    def reset(self) -> None:
        super().reset()
        self.strange: dict[str, Tensor] = {}                           # a class id of a valid pixel beyond the classes

    def update(self, pred: Tensor, target: Tensor, meta: Sequence[Mapping] = ()) -> None:
        valid = target != self.ignore
        ids = {"label": target.long(), "prediction": pred.long()}
        exists = valid.clone()
        for what, of_pixels in ids.items():
            known = (of_pixels >= 0) & (of_pixels < self.num_classes)
            new = torch.where(valid & ~known, of_pixels, 0).flatten()
            new = new.gather(0, new.abs().argmax(keepdim=True))[0]
            self.strange[what] = torch.where(new == 0, self.strange.get(what, new), new)
            exists &= known
        joint = ids["label"] * self.num_classes + ids["prediction"]
        self.add(confusion=tally(joint, exists, self.num_classes ** 2).view(self.num_classes, self.num_classes))

    def reduce(self) -> None:
        self._check_classes()
        super().reduce()

    def _check_classes(self) -> None:
        for what, strange in self.strange.items():
            if strange.item():                                         # 0 always exists
                raise ValueError(f"{what} {strange.item()} does not exist: there are {self.num_classes} classes "
                                 f"(0..{self.num_classes - 1}, {self.ignore} = void)")

    @property
    def valid_pixels(self) -> int:
        return int(self.state["confusion"].sum().item())

    def per_class(self) -> dict[str, Tensor]:
        """Pixels of each class, (num_classes,): right (tp), predicted wrongly (fp), missed (fn)."""
        confusion = self.state["confusion"]                            # (label, prediction)
        tp = confusion.diagonal()
        return {"tp": tp, "fp": confusion.sum(0) - tp, "fn": confusion.sum(1) - tp}

    def _iou(self) -> tuple[Tensor, Tensor]:
        """Of each class, and whether it is labelled or predicted anywhere; (num_classes,) each."""
        counts = self.per_class()
        union = sum(counts.values())
        return counts["tp"].double() / union.clamp_min(1), union > 0

    def compute(self) -> dict[str, float]:
        self._check_classes()
        iou, present = self._iou()
        confusion = self.state["confusion"]
        return {"mIoU": iou.mean().item(),
                "mIoU_present": iou[present].mean().item(),            # mean of nothing is NaN
                "pixel_accuracy": ratio(confusion.diagonal().sum().item(), confusion.sum().item()),
                **{f"IoU/{k}": value for k, value in enumerate(iou.tolist())}}

    def figures(self) -> list[Figure]:
        return [Bars("IoU of each class", self.names, 100 * self._iou()[0].cpu().numpy()),
                Confusion("labels and what they were taken for", self.names, self.state["confusion"].cpu().numpy())]
