"""Cross entropy for class labels: plain (semantic segmentation, human parts) and balanced (saliency).

Both divide the summed loss by the number of valid pixels, never by the sum of class weights: this is what the
published loss weights of the InvPT family (Ye and Xu, ECCV 2022, and successors) were tuned for.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from losses.base import IGNORE_INDEX, DenseLoss, class_target, summed_cross_entropy


class CrossEntropyLoss(DenseLoss):
    """Sum over valid pixels of -log softmax / max(number of valid pixels, 1); label ids 0..n-1, void ignored.

    class_weight: optional fixed weight per class (the weighted edge loss of ATRC uses (1 - w, w)).
    """

    def __init__(self, ignore_index: int = IGNORE_INDEX, class_weight: Sequence[float] | None = None):
        super().__init__(ignore_index)
        weight = None if class_weight is None else torch.tensor(class_weight, dtype=torch.float64)
        self.register_buffer("class_weight", weight, persistent=False)

    def compute(self, logits: Tensor, label: Tensor) -> Tensor:
        target = class_target(label)
        weight = None if self.class_weight is None else self.class_weight.to(logits.dtype)
        total = summed_cross_entropy(logits, target, weight, self.ignore_index)
        return total / (target != self.ignore_index).sum().clamp_min(1)


class BalancedCrossEntropyLoss(DenseLoss):
    """Two-class cross entropy for saliency; a class is weighted by the other one's share of the valid pixels.

    With q the fraction of valid pixels of class 0 the class weights are (1 - q, q). A batch that shows a
    single class therefore has loss 0.
    """

    def compute(self, logits: Tensor, label: Tensor) -> Tensor:
        if logits.shape[1] != 2:
            raise ValueError("balanced cross entropy needs 2 channels (background, salient), "
                             f"got {logits.shape[1]}")
        target = class_target(label)
        num_valid = (target != self.ignore_index).sum().clamp_min(1)
        q = (target == 0).sum().to(logits.dtype) / num_valid           # share of the background
        total = summed_cross_entropy(logits, target, torch.stack((1 - q, q)), self.ignore_index)
        return total / num_valid
