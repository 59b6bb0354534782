"""Augmentation and preparation of samples, exactly as published (ASTMT, MTI-Net, ATRC, InvPT and successors).

A sample is a dict of "image" (H x W x 3), labels by task (None where the image has no such label), and "meta". Each
step is called with the sample and a `random.Random`-like object (random, uniform, randint); the order of the draws is
part of the definition, so recorded draws can be replayed. What a step does to a label is the label's own affair
(`data.labels`).

Cheap by construction: a crop is a view, 8-bit arithmetic runs through tables of 256 values, and padding writes into
channel-first memory, so that `ToTensor` copies nothing. `scripts/bench_data.py` measures it.
"""

import random
from collections.abc import Callable, Mapping, Sequence

import cv2
import numpy as np
from PIL import Image

from data.labels import LabelRules, crop_map, flip_map, map_to_tensor, pad_map, resize_map
from data.photometric import LEVELS, ColoursToCome, PhotometricDistortion

Sample = dict
Step = Callable[[Sample, random.Random], Sample]
Labels = Mapping[str, LabelRules]                        # task -> rules of its label
MEAN = np.array([0.485, 0.456, 0.406], np.float32)       # ImageNet, RGB
STD = np.array([0.229, 0.224, 0.225], np.float32)
NORMALISE_TABLE = ((LEVELS[:, None] / 255 - MEAN) / STD)[None]         # (1, 256, 3)


def _each_label(sample: Sample, labels: Labels, change: Callable[[LabelRules, object], object]) -> dict[str, object]:
    """The labels of a sample after `change(rules, label)`; those that it lacks stay away."""
    return {key: None if sample[key] is None else change(rules, sample[key]) for key, rules in labels.items()}


class Compose:
    """Applies steps in order."""

    def __init__(self, steps: Sequence[Step]):
        self.steps = tuple(steps)

    def __call__(self, sample: Sample, rng: random.Random) -> Sample:
        for step in self.steps:
            sample = step(sample, rng)
        return sample


class RandomScale:
    """Resizes everything by one factor: image bilinear in float32, label maps nearest (normals, too)."""

    def __init__(self, labels: Labels, low: float = 0.5, high: float = 2.0):
        self.labels, self.low, self.high = labels, low, high

    def __call__(self, sample: Sample, rng: random.Random) -> Sample:
        return self.apply(sample, rng.uniform(self.low, self.high))

    def apply(self, sample: Sample, factor: float) -> Sample:
        """Scales by `factor`; exactly 1.0 leaves the sample untouched."""
        if factor == 1.0:
            return sample
        height, width = sample["image"].shape[:2]
        size = int(height * factor), int(width * factor)
        image = resize_map(sample["image"].astype(np.float32), size, cv2.INTER_LINEAR)
        return sample | {"image": image} | _each_label(
            sample, self.labels, lambda rules, label: rules.scale(label, size, factor))


class RandomCrop:
    """Cuts a window of at most `size`; a side shorter than the window is kept whole.

    Up to ten positions are drawn until the label that guides crops (semantic segmentation) shows at least two classes
    with the commonest below `category_limit` of the labelled pixels; the position after ten refusals is taken unseen.
    Without such a label the first position is taken.
    """

    max_tries = 10

    def __init__(self, labels: Labels, size: tuple[int, int], category_limit: float = 0.75):
        self.labels, self.size, self.category_limit = labels, tuple(size), category_limit
        self.guides = [key for key, rules in labels.items() if rules.guides_crop]

    def __call__(self, sample: Sample, rng: random.Random) -> Sample:
        height, width = sample["image"].shape[:2]
        if (height, width) == self.size:
            return sample
        corner = self._draw(height, width, rng)
        guide = next((key for key in self.guides if sample[key] is not None), None)
        if guide is not None:
            for _ in range(self.max_tries):
                if self._is_varied(crop_map(sample[guide], *corner, self.size)):
                    break
                corner = self._draw(height, width, rng)
        return self.apply(sample, *corner)

    def apply(self, sample: Sample, top: int, left: int) -> Sample:
        """Crops everything at this corner (maps: views, no copies)."""
        return sample | {"image": crop_map(sample["image"], top, left, self.size)} | _each_label(
            sample, self.labels, lambda rules, label: rules.crop(label, top, left, self.size))

    def _draw(self, height: int, width: int, rng: random.Random) -> tuple[int, int]:
        top = rng.randint(0, max(height - self.size[0], 0))
        return top, rng.randint(0, max(width - self.size[1], 0))

    def _is_varied(self, label: np.ndarray) -> bool:
        counts = cv2.calcHist([label.astype(np.uint8)], [0], None, [255], [0, 255])    # void = 255 is outside
        return np.count_nonzero(counts) > 1 and counts.max() / counts.sum() < self.category_limit


class RandomFlip:
    """Mirrors everything left to right."""

    def __init__(self, labels: Labels, probability: float = 0.5):
        self.labels, self.probability = labels, probability

    def __call__(self, sample: Sample, rng: random.Random) -> Sample:
        return self.apply(sample) if rng.random() < self.probability else sample

    def apply(self, sample: Sample) -> Sample:
        """Flips without drawing."""
        return sample | {"image": flip_map(sample["image"])} | _each_label(
            sample, self.labels, lambda rules, label: rules.flip(label))


class Normalise:
    """Image 0..255 -> (image / 255 - mean) / std, float32; same bits from uint8 (by table) and float32."""

    def __call__(self, sample: Sample, rng: random.Random) -> Sample:
        image = sample["image"]
        by_table = image.dtype == np.uint8
        return sample | {"image": cv2.LUT(image, NORMALISE_TABLE) if by_table else (image / 255 - MEAN) / STD}


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
                             f"[{height}, {width}], or let windows slide over it (test_time.windows=true)")
        return sample


class Pad:
    """Centres everything in a frame of at least `size`; the image's border holds 0, the mean colour."""

    def __init__(self, labels: Labels, size: tuple[int, int]):
        self.labels, self.size = labels, tuple(size)

    def __call__(self, sample: Sample, rng: random.Random) -> Sample:
        height, width = sample["image"].shape[:2]
        frame = max(self.size[0], height), max(self.size[1], width)
        return sample | {"image": pad_map(sample["image"], frame, 0.0)} | _each_label(
            sample, self.labels, lambda rules, label: rules.pad(label, frame))


class MarkVoid:
    """Lets each label mark what carries no supervision."""

    def __init__(self, labels: Labels):
        self.labels = labels

    def __call__(self, sample: Sample, rng: random.Random) -> Sample:
        return sample | _each_label(sample, self.labels, lambda rules, label: rules.mark_void(label))


class ToTensor:
    """Image H x W x 3 -> 3 x H x W tensor of its type, labels as their rules say; "meta" and "colours" stay.

    A label that the image lacks becomes one without any supervision, of the size `label_size` (None: the image's).
    "frame" in "meta" has what the labels tell of the image as it is now (`LabelRules.known`).
    """

    def __init__(self, labels: Labels, label_size: tuple[int, int] | None = None):
        self.labels, self.label_size = labels, label_size

    def __call__(self, sample: Sample, rng: random.Random) -> Sample:
        size, labels, frame = sample["image"].shape[:2], {}, {}
        for key, rules in self.labels.items():
            wanted = self.label_size if rules.is_map and self.label_size else size
            labels[key] = rules.absent(wanted) if sample[key] is None else rules.to_tensor(sample[key])
            frame |= rules.known(labels[key])
        known = {"meta": sample["meta"] | {"frame": frame}} if frame else {}
        image = sample["image"]
        return sample | {"image": map_to_tensor(image, image.dtype), **labels, **known}


class ResizeImage:
    """Pillow's bilinear filter (area-weighted when shrinking) on the image, H x W x 3 uint8; maps stay as they are."""

    def __init__(self, labels: Labels, size: tuple[int, int]):
        self.labels, self.size = {k: rules for k, rules in labels.items() if not rules.is_map}, tuple(size)

    def __call__(self, sample: Sample, rng: random.Random) -> Sample:
        image = Image.fromarray(sample["image"]).resize(self.size[::-1], Image.Resampling.BILINEAR)
        return sample | {"image": np.asarray(image)} | _each_label(
            sample, self.labels, lambda rules, label: rules.resize(label, self.size))


class ResizeAll:
    """Image and labels to the frame `size`: shrunk until they fit ("fit"), or brought to exactly this size ("stretch").

    Labels keep their values. "meta" keeps the image's own size as "original" and has the new one as "size".
    """

    def __init__(self, labels: Labels, size: tuple[int, int], rule: str):
        self.labels, self.size, self.rule = labels, tuple(size), rule

    def __call__(self, sample: Sample, rng: random.Random) -> Sample:
        height, width = original = sample["image"].shape[:2]
        size = self.size
        if self.rule == "fit":
            factor = min(1.0, size[0] / height, size[1] / width)
            size = max(1, min(size[0], round(height * factor))), max(1, min(size[1], round(width * factor)))
        if size == original:
            return sample
        shrinks = size[0] * size[1] < height * width
        image = resize_map(sample["image"], size, cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
        meta = {**sample["meta"], "size": size, "original": original}
        return sample | {"image": image, "meta": meta} | _each_label(
            sample, self.labels, lambda rules, label: rules.resize(label, size))


class ResizeLabels:
    """All label maps to `size`, nearest."""

    def __init__(self, labels: Labels, size: tuple[int, int]):
        self.labels, self.size = {k: rules for k, rules in labels.items() if rules.is_map}, tuple(size)

    def __call__(self, sample: Sample, rng: random.Random) -> Sample:
        return sample | _each_label(sample, self.labels, lambda rules, label: rules.regrid(label, self.size))


def train_transform(size: tuple[int, int], labels: Labels, scale_range: tuple[float, float] = (0.5, 2.0),
                    flip: float = 0.5, photometric: bool = True, category_limit: float = 0.75,
                    photometric_on_device: bool = False) -> Compose:
    """Random scale, crop, flip, colours; then as `eval_transform`. `size` is the network's input (H, W).

    photometric_on_device: colours are only drawn, and images stay in 8 bits (`data.batch_colours` does the rest).
    """
    geometry = (RandomScale(labels, *scale_range), RandomCrop(labels, size, category_limit), RandomFlip(labels, flip))
    frame = eval_transform(size, labels).steps
    if photometric and photometric_on_device:
        return Compose((*geometry, ColoursToCome(), *(step for step in frame if not isinstance(step, Normalise))))
    return Compose((*geometry, *((PhotometricDistortion(),) if photometric else ()), *frame))


def eval_transform(size: tuple[int, int], labels: Labels, must_fit: bool = True) -> Compose:
    """Nothing is resized: normalise, pad to at least `size` (padding is void), mark void, to tensors."""
    first = (RequireFit(size),) if must_fit else ()
    return Compose((*first, Normalise(), Pad(labels, size), MarkVoid(labels), ToTensor(labels)))


def fixed_transform(size: tuple[int, int], labels: Labels, label_size: tuple[int, int] | None = None,
                    flip: float = 0.0) -> Compose:
    """Cityscapes: image resized to `size`, label maps to `label_size` (None: kept), mirrored with probability `flip`.

    There is no padding and zero is a legal disparity (sky), so the labels' void rules do not apply."""
    optional = [ResizeLabels(labels, label_size)] if label_size else []
    optional += [RandomFlip(labels, flip)] if flip else []
    return Compose((ResizeImage(labels, size), *optional, Normalise(), ToTensor(labels, label_size)))


def build_transform(image_size: tuple[int, int], fixed_label_size: tuple[int, int] | None, training: bool,
                    labels: Labels, resize: str = "none", largest: tuple[int, int] | None = None,
                    fixed_flip: float = 0.0, **augmentation) -> Compose:
    """The transform of a split; `augmentation` goes to `train_transform`, `resize` is the data set's rule.

    largest: what stands for `image_size` in that rule where windows slide over the images of an evaluation, which may
    be larger than `image_size` then; None: they must fit. A data set whose labels have a size of their own (Cityscapes)
    is resized, and in training at most mirrored.
    """
    if fixed_label_size is not None:
        return fixed_transform(largest or image_size, labels, fixed_label_size, fixed_flip if training else 0.0)
    after = (train_transform(image_size, labels, **augmentation) if training
             else eval_transform(image_size, labels, must_fit=largest is None))
    return after if resize == "none" else Compose((ResizeAll(labels, largest or image_size, resize), *after.steps))
