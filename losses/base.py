"""What all dense losses share: label checks, the void value and arithmetic that never drops below float32."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORE_INDEX = 255


class DenseLoss(nn.Module):
    """Base of the per-pixel losses; subclasses write `compute`, which sees float32 or float64 logits."""

    def __init__(self, ignore_index: float | None = IGNORE_INDEX):
        super().__init__()
        self.ignore_index = ignore_index

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        """Loss of one batch as a 0-dim tensor.

        logits (B, n, H, W) raw network output, label (B, C, H, W) float. Half precision logits are raised to
        float32, float64 stays. A batch without any valid pixel gives 0 with zero gradient.
        """
        if logits.ndim != 4 or label.ndim != 4 or logits[:, 0].shape != label[:, 0].shape:
            raise ValueError(f"{type(self).__name__}: logits {tuple(logits.shape)} and label "
                             f"{tuple(label.shape)} must be (B, n, H, W) and (B, C, H, W) of equal B, H, W")
        dtype = torch.promote_types(logits.dtype, torch.float32)
        return self.compute(logits.to(dtype), label)

    def compute(self, logits: Tensor, label: Tensor) -> Tensor:
        raise NotImplementedError


def class_target(label: Tensor) -> Tensor:
    """Label (B, 1, H, W) float -> class ids (B, H, W) int64."""
    if label.shape[1] != 1:
        raise ValueError(f"a class label has one channel (B, 1, H, W), got shape {tuple(label.shape)}")
    return label.squeeze(1).long()                                     # (B, H, W)


def summed_cross_entropy(logits: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor:
    """Cross entropy (B, n, H, W), (B, H, W) summed over valid pixels; ids outside 0..n-1 are a ValueError.

    PyTorch meets such an id inside its kernel, so that nothing has to look for it before: on a CPU it raises, on a GPU
    the kernel's assertion ends the program.
    """
    try:
        return F.cross_entropy(logits, target, weight, ignore_index=ignore_index, reduction="sum")
    except IndexError as error:
        num_classes = logits.shape[1]
        wrong = target[(target != ignore_index) & ((target < 0) | (target >= num_classes))]
        raise ValueError(f"label {wrong[0].item()} does not exist: this output has {num_classes} "
                         f"classes (0..{num_classes - 1}, {ignore_index} = void)") from error
