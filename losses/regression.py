"""L1 losses for regression: depth, and surface normals after scaling the prediction to unit length."""

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.base import DenseLoss


class L1Loss(DenseLoss):
    """Sum of |prediction - label| over channels and valid pixels / max(number of valid *pixels*, 1).

    A pixel is valid if none of its label channels equals `ignore_index` (255 here; MLoRE's depth 0, TaskPrompter's
    depth -1; None = every pixel counts). Prediction and label (B, C, H, W) in the label's unit.
    """

    def compute(self, logits: Tensor, label: Tensor) -> Tensor:
        if logits.shape != label.shape:
            raise ValueError(f"{type(self).__name__} needs prediction and label of one shape, got "
                             f"{tuple(logits.shape)} and {tuple(label.shape)}")
        valid = torch.ones_like(label[:, :1], dtype=torch.bool)        # (B, 1, H, W)
        if self.ignore_index is not None:
            valid = (label != self.ignore_index).all(dim=1, keepdim=True)
        diff = (logits - label.to(logits.dtype)).abs()                 # (B, C, H, W)
        return torch.where(valid, diff, 0).sum() / valid.sum().clamp_min(1)


class NormalsLoss(L1Loss):
    """L1 loss of the prediction divided by max(its length, 1e-12) against unit normals (B, 3, H, W).

    Summed over the three channels per valid pixel, so three times a mean over elements; the published weight
    10 counts on it. The label is used as stored, i.e. with the rounding of its 8-bit file.
    """

    def compute(self, logits: Tensor, label: Tensor) -> Tensor:
        return super().compute(F.normalize(logits, dim=1, eps=1e-12), label)
