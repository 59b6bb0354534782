"""Balanced binary cross entropy for boundaries, which cover only a few percent of an image.

The fixed positive weight (0.95 in most configs) is the convention of ASTMT, MTI-Net and their successors; None
selects the batch-wise weight of holistically-nested edge detection (Xie and Tu, ICCV 2015).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.base import IGNORE_INDEX, DenseLoss


class BalancedBCELoss(DenseLoss):
    """Mean over valid pixels of  w y softplus(-x) + (1 - w) (1 - y) softplus(x);  one channel, y in [0, 1].

    pos_weight: w in [0, 1]; None = the share of negatives among the batch's valid pixels.
    """

    def __init__(self, pos_weight: float | None = 0.95, ignore_index: int = IGNORE_INDEX):
        super().__init__(ignore_index)
        if pos_weight is not None and not 0 <= pos_weight <= 1:
            raise ValueError(f"pos_weight {pos_weight} of the edge loss must lie in [0, 1] "
                             "or be None (from the batch)")
        self.pos_weight = pos_weight

    def compute(self, logits: Tensor, label: Tensor) -> Tensor:
        if logits.shape != label.shape or logits.shape[1] != 1:
            raise ValueError("the edge loss needs logits and label of one channel each, got "
                             f"{tuple(logits.shape)} and {tuple(label.shape)}")
        valid = label != self.ignore_index
        num_valid = valid.sum().clamp_min(1)
        y = torch.where(valid, label, 0).to(logits.dtype)
        w = 1 - y.sum() / num_valid if self.pos_weight is None else self.pos_weight
        # softplus(-x) = -logsigmoid(x); logsigmoid is exact for large |x|, where F.softplus becomes linear
        loss = -w * y * F.logsigmoid(logits) - (1 - w) * (1 - y) * F.logsigmoid(-logits)
        return torch.where(valid, loss, 0).sum() / num_valid
