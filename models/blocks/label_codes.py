"""Codes of labels and of predictions, learned vectors per cell of a coarse grid: what TaskDiffusion adds noise to.

How the label of a task is coded stands in CODES; a task that is not there cannot be coded. `semseg@street` is coded
like semseg.
Reference: Yang et al., "Multi-Task Dense Predictions via Unleashing the Power of Diffusion", ICLR 2025.

Axes: B batch, n outputs of a task, q channels of a code, H W pixels of the label, h w grid.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

VOID = 255
FARTHEST_M = 80.0  # depths are cut off there
SALIENT = 0.85  # probability from which on the sampler codes a pixel as salient


@dataclass(frozen=True)
class CodeRule:
    """of_logits: raw outputs (B, n, h, w) -> class of each pixel (B, h, w), or the values (B, n, h, w) to be coded.

    classes: whether the label is a class. joint: whether the code is mixed with those of the other tasks.
    bounded: raw outputs in the range of the task, as they are given out. void_as: the value that the published
    training puts where the label is void; None: a void pixel is known to be void.
    """

    of_logits: Callable[[Tensor], Tensor]
    classes: bool = False
    joint: bool = True
    bounded: Callable[[Tensor], Tensor] = lambda logits: logits
    void_as: float | None = None


def _likeliest(logits: Tensor) -> Tensor:
    return logits.argmax(dim=1)


def _salient(logits: Tensor) -> Tensor:
    return (logits.softmax(dim=1)[:, 1] > SALIENT).long()


def _metres(logits: Tensor) -> Tensor:
    return logits.clamp(0.0, FARTHEST_M)  # both as floats: exporters do not mix an int with a float


def _unit_vectors(logits: Tensor) -> Tensor:
    return F.normalize(logits, dim=1, eps=1e-12)


CODES: Mapping[str, CodeRule] = {
    "semseg": CodeRule(_likeliest, classes=True),
    "depth": CodeRule(_metres, bounded=_metres, void_as=0.0),
    "human_parts": CodeRule(_likeliest, classes=True),
    "sal": CodeRule(_salient, classes=True, joint=False),
    "normals": CodeRule(_unit_vectors),
    "edge": CodeRule(torch.sigmoid),
}


class ClassCode(nn.Embedding):
    """One vector per class, and one more for void pixels: (B, h, w) -> (B, q, h, w)."""

    def __init__(self, num_classes: int, channels: int):
        super().__init__(num_classes + 1, channels)

    def forward(self, classes: Tensor) -> Tensor:
        return rearrange(super().forward(classes), "b h w q -> b q h w")

    def of_label(self, label: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, 1, H, W), void 255 -> (B, q, h, w), from the pixel in the corner of every cell."""
        classes = F.interpolate(label.float(), size=size, mode="nearest")[:, 0]
        void = self.num_embeddings - 1
        return self(torch.where(classes == VOID, void, classes).long())


class ValueCode(nn.Conv2d):
    """A linear map of the values and one vector for void pixels: (B, n, h, w) -> (B, q, h, w).

    `masked`: how the label of a cell is made that has void pixels. False is the published way: their 255 counts like a
    value, or that of `void_as` does; True takes the mean of the other pixels.
    """

    def __init__(self, num_values: int, channels: int, masked: bool, void_as: float | None):
        super().__init__(num_values, channels, kernel_size=1)
        self.void = nn.Parameter(torch.randn(channels))
        self.masked, self.void_as = masked, void_as

    def of_label(self, label: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, n, H, W), void 255 -> (B, q, h, w), from the mean of the four pixels in the middle of every cell."""
        label = label.to(self.weight.dtype)
        void = (label == VOID).to(label.dtype)
        if self.masked:
            known = _middle(1 - void, size)
            values, share = _middle(label * (1 - void), size) / known.clamp(min=1e-6), 1 - known
        else:
            if self.void_as is not None:
                label, void = torch.where(void > 0, self.void_as, label), torch.zeros_like(void)
            values, share = _middle(label, size), _middle(void, size)
        share = share.mean(dim=1, keepdim=True)
        return share * self.void[:, None, None] + (1 - share) * self(values)


def _middle(label: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(label, size=size, mode="bilinear", align_corners=False)


class LabelCodes(nn.Module):
    """Codes of all tasks in one latent (B, M, h, w): those of the joint tasks mixed to `channels`, behind the others.

    Every code has q = channels / 4 channels. The latent lies in (-scale, scale).
    """

    def __init__(self, tasks: Mapping[str, int], channels: int, scale: float, masked: bool):
        super().__init__()
        kinds = {task: task.partition("@")[0] for task in tasks}
        if unknown := [task for task, kind in kinds.items() if kind not in CODES]:
            raise ValueError(f"it has no code for the labels of task '{unknown[0]}'; it codes: {', '.join(CODES)}")
        self.rules, self.scale, quarter = {task: CODES[kind] for task, kind in kinds.items()}, scale, channels // 4
        self.codes = nn.ModuleDict({
            task: (ClassCode(num_outputs, quarter) if rule.classes
                   else ValueCode(num_outputs, quarter, masked, rule.void_as))
            for (task, rule), num_outputs in zip(self.rules.items(), tasks.values(), strict=True)})
        joint = sum(rule.joint for rule in self.rules.values())
        if not joint:
            raise ValueError(f"it needs a task whose code is mixed with others; got only {', '.join(tasks)}")
        self.mix = nn.Conv2d(joint * quarter, channels, kernel_size=1)
        self.channels = channels + (len(tasks) - joint) * quarter  # M

    def of_labels(self, labels: Mapping[str, Tensor], size: tuple[int, int]) -> Tensor:
        """Labels (B, C, H, W) of all tasks -> the latent."""
        return self._latent({task: code.of_label(labels[task], size) for task, code in self.codes.items()})

    def of_predictions(self, logits: Mapping[str, Tensor]) -> Tensor:
        """Raw outputs (B, n, h, w) of all tasks -> the latent."""
        return self._latent({task: code(self.rules[task].of_logits(logits[task])) for task, code in self.codes.items()})

    def bounded(self, logits: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Raw outputs as they are given out."""
        return {task: rule.bounded(logits[task]) for task, rule in self.rules.items()}

    def _latent(self, codes: Mapping[str, Tensor]) -> Tensor:
        joint = self.mix(torch.cat([code for task, code in codes.items() if self.rules[task].joint], dim=1))
        alone = [code for task, code in codes.items() if not self.rules[task].joint]
        return self.squashed(torch.cat((*alone, joint), dim=1))

    def squashed(self, raw: Tensor) -> Tensor:
        return self.scale * (2 * raw.sigmoid() - 1)
