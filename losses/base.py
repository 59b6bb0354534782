"""What all dense losses share: label checks, the void value and arithmetic that never drops below float32."""

import torch
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


def class_target(label: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """Label (B, 1, H, W) float -> class ids (B, H, W) int64; refuses ids outside 0..num_classes-1.

    The check looks at the values, so on a GPU it would stall the queue at every step; there the device-side
    assertion inside PyTorch's cross entropy catches the same mistake.
    """
    if label.shape[1] != 1:
        raise ValueError(f"a class label has one channel (B, 1, H, W), got shape {tuple(label.shape)}")
    target = label.squeeze(1).long()                                   # (B, H, W)
    if not target.is_cuda:
        wrong = (target != ignore_index) & ((target < 0) | (target >= num_classes))
        if wrong.any():
            raise ValueError(f"label {target[wrong][0].item()} does not exist: this output has {num_classes} "
                             f"classes (0..{num_classes - 1}, {ignore_index} = void)")
    return target
