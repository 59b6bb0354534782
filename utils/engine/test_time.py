"""Predictions averaged over several looks at an image: at several sizes, mirrored, through windows that slide over it.

The network sees nothing but its own frame (`Config.input_size`), so every decoder on every backbone can do this. An
image of that size is looked at as it is. Over any other, windows of the frame slide: evenly spread, neighbours share at
least `overlap` of their sides, the first and the last touch the borders; a side shorter than the frame is padded
centrally with the mean colour. Where windows overlap their predictions are weighted by a pyramid, 1 at a window's
centre and falling linearly towards its borders. What is averaged says the task's row (`Average`); how a prediction
changes with a mirrored or enlarged image, the rules of its label.
"""

import itertools
import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from data.labels import LabelRules
from models.blocks.resize import resize
from utils.engine.config import Config
from utils.engine.config_groups import AtTestTime
from utils.engine.tasks import TASKS

Forward = Callable[[Tensor], dict]
Size = tuple[int, int]


def averaged(forward: Forward, config: Config) -> Forward:
    """The forward pass as `test_time` wants it: raw outputs of images (B, 3, H, W) of any size, at that size."""
    check_test_time(config)
    if not config.test_time.averages:
        return forward
    labels = config.dataset.labels
    rules = {task: labels[task].rules or TASKS.load(task).label for task in config.tasks}
    return AveragedPass(forward, config.test_time, rules, config.input_size, config.output_size or config.input_size)


def check_test_time(config: Config) -> None:
    """ValueError where predictions of a task cannot be averaged and `test_time` asks for it."""
    unable = [task for task in config.tasks if TASKS.load(task).average is None]
    if config.test_time.averages and unable:
        raise ValueError(f"test_time cannot average predictions of {', '.join(unable)}, whose row has no `average` "
                         "(utils/engine/tasks/); leave test_time.flip, scales and windows at their defaults")


class AveragedPass:
    """Calls the forward pass for every look.

    rules: of each task's label. frame, outputs: (height, width) of what the network sees, and answers.
    """

    def __init__(self, forward: Forward, settings: AtTestTime, rules: Mapping[str, LabelRules], frame: Size,
                 outputs: Size) -> None:
        self.forward, self.settings, self.rules = forward, settings, rules
        self.frame, self.outputs = tuple(frame), tuple(outputs)
        self.average = {task: TASKS.load(task).average for task in rules}

    def __call__(self, image: Tensor) -> dict[str, Tensor]:
        """Raw outputs of images (B, 3, H, W), as large as the images; of the network's frame, as its outputs are."""
        size = tuple(image.shape[-2:])
        size = self.outputs if size == self.frame else size
        sums: dict[str, Tensor] = {}
        looks = list(itertools.product(self.settings.scales, (False, True) if self.settings.flip else (False,)))
        for factor, mirrored in looks:
            seen = _enlarged(image, factor)
            for task, value in self._values(seen.flip(-1) if mirrored else seen).items():
                value = resize(self.rules[task].nearer(value, 1 / factor), size)
                value = self._mirrored_back(task, value) if mirrored else value
                sums[task] = sums[task] + value if task in sums else value
        return {task: self.average[task].raw(total / len(looks)) for task, total in sums.items()}

    def _mirrored_back(self, task: str, value: Tensor) -> Tensor:
        signs = self.rules[task].mirror_signs or (1,)
        return value.flip(-1) * value.new_tensor(signs)[:, None, None]

    def _values(self, image: Tensor) -> dict[str, Tensor]:
        """What is averaged of each task, of the image's size, or of the network's output where it sees all at once."""
        if tuple(image.shape[-2:]) == self.frame:
            return self._of_outputs(self.forward(image))
        down, right = (max(own - side, 0) for own, side in zip(self.frame, image.shape[-2:], strict=True))
        top, left = down // 2, right // 2
        padded = F.pad(image, (left, right - left, top, down - top))
        starts = (_starts(side, own, self.settings.overlap)
                  for side, own in zip(padded.shape[-2:], self.frame, strict=True))
        pyramid = _tent(self.frame[0], image)[:, None] * _tent(self.frame[1], image)          # (h, w)
        weights, sums = torch.zeros_like(padded[:1, :1]), {}
        for y, x in itertools.product(*starts):
            window = (..., slice(y, y + self.frame[0]), slice(x, x + self.frame[1]))
            weights[window] += pyramid
            for task, value in self._of_outputs(self.forward(padded[window].contiguous())).items():
                if task not in sums:
                    sums[task] = value.new_zeros(*value.shape[:2], *padded.shape[-2:])
                sums[task][window] += pyramid * resize(value, self.frame)
        inside = (..., slice(top, top + image.shape[-2]), slice(left, left + image.shape[-1]))
        return {task: (total / weights)[inside] for task, total in sums.items()}

    def _of_outputs(self, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {task: self.average[task].values(output.float()) for task, output in outputs.items()}


def _enlarged(image: Tensor, factor: float) -> Tensor:
    """Bilinear; where it is shrunk every pixel counts."""
    if factor == 1:
        return image
    size = [max(1, round(side * factor)) for side in image.shape[-2:]]
    return F.interpolate(image, size, mode="bilinear", align_corners=False, antialias=factor < 1)


def _starts(side: int, window: int, overlap: float) -> list[int]:
    """Where windows begin along a side: the fewest that overlap enough, evenly spread."""
    steps = math.ceil((side - window) / max(1, math.floor(window * (1 - overlap))))
    return [round(step * (side - window) / max(steps, 1)) for step in range(steps + 1)]


def _tent(length: int, like: Tensor) -> Tensor:
    """Weights along a window's side: from 1 / (length / 2) at its borders to 1 at its centre, (length,)."""
    position = torch.arange(length, device=like.device, dtype=like.dtype) + 0.5
    return torch.minimum(position, length - position) * 2 / length
