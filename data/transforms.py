"""Augmentation and preparation of samples, exactly as published (ASTMT, MTI-Net, ATRC, InvPT and successors).

A sample is a dict of maps H x W x C and "meta". Each step is called with the sample and a
`random.Random`-like object (random, uniform, randint); the order of the draws is part of the definition, so
recorded draws can be replayed. What differs between tasks (fill value, flip, scale, void) is read from the
rows of the task table.

Cheap by construction: crop and flip are views, 8-bit arithmetic runs through tables of 256 values, and
`Pad` writes into channel-first memory, so that every map is copied once and `ToTensor` copies nothing.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence

import cv2
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from utils.engine.tasks import Task

Sample = dict
Step = Callable[[Sample, random.Random], Sample]
MEAN = np.array([0.485, 0.456, 0.406], np.float32)       # ImageNet, RGB
CROP_GUIDE = "semseg"                                    # the label that tells a varied crop from a dull one
STD = np.array([0.229, 0.224, 0.225], np.float32)
LEVELS = np.arange(256, dtype=np.float32)
NORMALISE_TABLE = ((LEVELS[:, None] / 255 - MEAN) / STD)[None]         # (1, 256, 3)


def _maps(sample: Sample) -> Iterator[str]:
    return (key for key in sample if key != "meta")


def _resize(array: np.ndarray, size: tuple[int, int], interpolation: int) -> np.ndarray:
    """H x W x C -> size[0] x size[1] x C; OpenCV drops a single channel."""
    return cv2.resize(array, size[::-1], interpolation=interpolation).reshape(*size, array.shape[2])


class Compose:
    """Applies steps in order."""

    def __init__(self, steps: Sequence[Step]):
        self.steps = tuple(steps)

    def __call__(self, sample: Sample, rng: random.Random) -> Sample:
        for step in self.steps:
            sample = step(sample, rng)
        return sample


class RandomScale:
    """Resizes all maps by one factor: image bilinear in float32, labels nearest (normals, too)."""

    def __init__(self, tasks: Mapping[str, Task], low: float = 0.5, high: float = 2.0):
        self.tasks, self.low, self.high = tasks, low, high

    def __call__(self, sample: Sample, rng: random.Random) -> Sample:
        return self.apply(sample, rng.uniform(self.low, self.high))

    def apply(self, sample: Sample, factor: float) -> Sample:
        """Scales by `factor`; exactly 1.0 leaves the sample untouched."""
        if factor == 1.0:
            return sample
        height, width = sample["image"].shape[:2]
        size = int(height * factor), int(width * factor)
        scaled = dict(sample, image=_resize(sample["image"].astype(np.float32), size, cv2.INTER_LINEAR))
        for key, task in self.tasks.items():
            scaled[key] = task.on_scale(_resize(sample[key], size, cv2.INTER_NEAREST), factor)
        return scaled


class RandomCrop:
    """Cuts a window of at most `size`; a side shorter than the window is kept whole.

    Up to ten positions are drawn until semantic segmentation shows at least two classes with the commonest
    below `category_limit` of the labelled pixels; the position after ten refusals is taken unseen. Without
    a semseg label the first position is taken.
    """

    max_tries = 10

    def __init__(self, size: tuple[int, int], category_limit: float = 0.75, category_key: str = CROP_GUIDE):
        self.size, self.category_limit, self.category_key = tuple(size), category_limit, category_key

    def __call__(self, sample: Sample, rng: random.Random) -> Sample:
        height, width = sample["image"].shape[:2]
        if (height, width) == self.size:
            return sample
        corner = self._draw(height, width, rng)
        if self.category_key in sample:
            label = sample[self.category_key]
            for _ in range(self.max_tries):
                if self._is_varied(self._window(label, *corner)):
                    break
                corner = self._draw(height, width, rng)
        return self.apply(sample, *corner)

    def apply(self, sample: Sample, top: int, left: int) -> Sample:
        """Crops all maps at this corner (views, no copies)."""
        return sample | {key: self._window(sample[key], top, left) for key in _maps(sample)}

    def _draw(self, height: int, width: int, rng: random.Random) -> tuple[int, int]:
        top = rng.randint(0, max(height - self.size[0], 0))
        return top, rng.randint(0, max(width - self.size[1], 0))

    def _window(self, array: np.ndarray, top: int, left: int) -> np.ndarray:
        return array[top:top + self.size[0], left:left + self.size[1]]

    def _is_varied(self, label: np.ndarray) -> bool:
        counts = cv2.calcHist([label.astype(np.uint8)], [0], None, [255], [0, 255])    # void = 255 is outside
        return np.count_nonzero(counts) > 1 and counts.max() / counts.sum() < self.category_limit


class RandomFlip:
    """Mirrors all maps left to right; a task's `on_flip` corrects what changes sign."""

    def __init__(self, tasks: Mapping[str, Task], probability: float = 0.5):
        self.tasks, self.probability = tasks, probability

    def __call__(self, sample: Sample, rng: random.Random) -> Sample:
        return self.apply(sample) if rng.random() < self.probability else sample

    def apply(self, sample: Sample) -> Sample:
        """Flips without drawing."""
        flipped = sample | {key: sample[key][:, ::-1] for key in _maps(sample)}
        return flipped | {key: task.on_flip(flipped[key]) for key, task in self.tasks.items()}


def _linear_table(alpha: float = 1.0, beta: float = 0.0) -> np.ndarray:
    """v -> alpha * v + beta in float32, clipped to 0..255, truncated: (256,) uint8."""
    return np.clip(LEVELS * np.float32(alpha) + np.float32(beta), 0, 255).astype(np.uint8)


def brightness(image: np.ndarray, beta: float) -> np.ndarray:
    """Adds `beta` grey levels; H x W x 3 uint8, like the three functions below."""
    return cv2.LUT(image, _linear_table(beta=beta))


def contrast(image: np.ndarray, alpha: float) -> np.ndarray:
    """Multiplies by `alpha`."""
    return cv2.LUT(image, _linear_table(alpha))


def saturation(image: np.ndarray, alpha: float) -> np.ndarray:
    """Multiplies the S channel of OpenCV's 8-bit HSV by `alpha`."""
    identity = LEVELS.astype(np.uint8)
    return _change_hsv(image, np.stack([identity, _linear_table(alpha), identity], axis=-1))


def hue(image: np.ndarray, delta: int) -> np.ndarray:
    """Adds `delta` to the H channel (0..179, two degrees each), modulo 180."""
    identity = LEVELS.astype(np.uint8)
    turned = ((np.arange(256) + delta) % 180).astype(np.uint8)
    return _change_hsv(image, np.stack([turned, identity, identity], axis=-1))


def _change_hsv(image: np.ndarray, table: np.ndarray) -> np.ndarray:
    hsv = cv2.LUT(cv2.cvtColor(image, cv2.COLOR_RGB2HSV), table[None])             # table: (1, 256, 3)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


class PhotometricDistortion:
    """Brightness, contrast (second or last), saturation, hue, each with probability 0.5; image to uint8."""

    def __call__(self, sample: Sample, rng: random.Random) -> Sample:
        image = np.ascontiguousarray(sample["image"], np.uint8)        # truncates, as the lineage does
        image = self._maybe(brightness, image, rng, lambda: rng.uniform(-32, 32))
        contrast_first = rng.random() < 0.5
        if contrast_first:
            image = self._maybe(contrast, image, rng, lambda: rng.uniform(0.5, 1.5))
        image = self._maybe(saturation, image, rng, lambda: rng.uniform(0.5, 1.5))
        image = self._maybe(hue, image, rng, lambda: rng.randint(-18, 17))
        if not contrast_first:
            image = self._maybe(contrast, image, rng, lambda: rng.uniform(0.5, 1.5))
        return sample | {"image": image}

    @staticmethod
    def _maybe(change: Callable, image: np.ndarray, rng: random.Random, draw: Callable) -> np.ndarray:
        return change(image, draw()) if rng.random() < 0.5 else image


class Normalise:
    """Image 0..255 -> (image / 255 - mean) / std, float32; same bits from uint8 (by table) and float32."""

    def __call__(self, sample: Sample, rng: random.Random) -> Sample:
        image = sample["image"]
        if image.dtype == np.uint8:
            return sample | {"image": cv2.LUT(image, NORMALISE_TABLE)}
        return sample | {"image": (image / 255 - MEAN) / STD}


class RequireFit:
    """Refuses an image that is larger than the frame, naming it."""

    def __init__(self, size: tuple[int, int]):
        self.size = tuple(size)

    def __call__(self, sample: Sample, rng: random.Random) -> Sample:
        height, width = sample["image"].shape[:2]
        if height > self.size[0] or width > self.size[1]:
            name = sample.get("meta", {}).get("name", "of this sample")
            raise ValueError(f"image {name} is {height} x {width} (height x width) and does not fit into the "
                             f"frame of {self.size[0]} x {self.size[1]}; set image_size to at least "
                             f"[{height}, {width}]")
        return sample


class Pad:
    """Centres all maps in a frame of at least `size` filled with 0 (image: mean colour) or the task's `pad_value`."""

    def __init__(self, tasks: Mapping[str, Task], size: tuple[int, int]):
        self.tasks, self.size = tasks, tuple(size)

    def __call__(self, sample: Sample, rng: random.Random) -> Sample:
        padded = dict(sample, image=self._pad(sample["image"], 0.0))
        return padded | {key: self._pad(sample[key], task.pad_value) for key, task in self.tasks.items()}

    def _pad(self, array: np.ndarray, value: float) -> np.ndarray:
        height, width, channels = array.shape
        frame = max(self.size[0], height), max(self.size[1], width)
        top, left = (frame[0] - height) // 2, (frame[1] - width) // 2
        memory = np.empty((channels, *frame), np.float32)
        canvas = memory.transpose(1, 2, 0)                             # (C, H, W) memory seen as (H, W, C)
        canvas[:top] = canvas[top + height:] = value
        canvas[top:top + height, :left] = canvas[top:top + height, left + width:] = value
        canvas[top:top + height, left:left + width] = array
        return canvas


class MarkVoid:
    """Lets each task turn what carries no supervision into void."""

    def __init__(self, tasks: Mapping[str, Task]):
        self.tasks = tasks

    def __call__(self, sample: Sample, rng: random.Random) -> Sample:
        return sample | {key: task.mark_void(sample[key]) for key, task in self.tasks.items()}


class ToTensor:
    """H x W x C arrays -> C x H x W float32 tensors; "meta" stays."""

    def __call__(self, sample: Sample, rng: random.Random) -> dict[str, Tensor | dict]:
        return sample | {key: self._convert(sample[key]) for key in _maps(sample)}

    @staticmethod
    def _convert(array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array.transpose(2, 0, 1), np.float32))


class ResizeImage:
    """Pillow's bilinear filter (area-weighted when shrinking) on the image only, H x W x 3 uint8."""

    def __init__(self, size: tuple[int, int]):
        self.size = tuple(size)

    def __call__(self, sample: Sample, rng: random.Random) -> Sample:
        image = Image.fromarray(sample["image"]).resize(self.size[::-1], Image.Resampling.BILINEAR)
        return sample | {"image": np.asarray(image)}


class ResizeLabels:
    """All labels to `size`, nearest."""

    def __init__(self, tasks: Mapping[str, Task], size: tuple[int, int]):
        self.tasks, self.size = tasks, tuple(size)

    def __call__(self, sample: Sample, rng: random.Random) -> Sample:
        return sample | {key: _resize(sample[key], self.size, cv2.INTER_NEAREST) for key in self.tasks}


def train_transform(size: tuple[int, int], tasks: Mapping[str, Task],
                    scale_range: tuple[float, float] = (0.5, 2.0), flip: float = 0.5,
                    photometric: bool = True, category_limit: float = 0.75) -> Compose:
    """Random scale, crop, flip, colours; then as `eval_transform`. `size` is the network's input (H, W)."""
    colours = (PhotometricDistortion(),) if photometric else ()
    return Compose((RandomScale(tasks, *scale_range), RandomCrop(size, category_limit),
                    RandomFlip(tasks, flip), *colours, *eval_transform(size, tasks).steps))


def eval_transform(size: tuple[int, int], tasks: Mapping[str, Task]) -> Compose:
    """Nothing is resized: normalise, pad to `size` (padding is void), mark void, to tensors."""
    return Compose((RequireFit(size), Normalise(), Pad(tasks, size), MarkVoid(tasks), ToTensor()))


def fixed_transform(size: tuple[int, int], tasks: Mapping[str, Task],
                    label_size: tuple[int, int] | None = None) -> Compose:
    """Cityscapes: image resized to `size`, labels to `label_size` (None: kept), no augmentation.

    There is no padding and zero is a legal disparity (sky), so the tasks' void rules do not apply.
    """
    labels = (ResizeLabels(tasks, label_size),) if label_size else ()
    return Compose((ResizeImage(size), *labels, Normalise(), ToTensor()))
