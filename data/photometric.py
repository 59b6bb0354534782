"""Random brightness, contrast, saturation and hue, in 8 bits as published: arithmetic runs through tables of 256."""

import random
from collections.abc import Callable

import cv2
import numpy as np

LEVELS = np.arange(256, dtype=np.float32)


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
    return _change_hsv(image, 1, _linear_table(alpha))


def hue(image: np.ndarray, delta: int) -> np.ndarray:
    """Adds `delta` to the H channel (0..179, two degrees each), modulo 180."""
    return _change_hsv(image, 0, ((np.arange(256) + delta) % 180).astype(np.uint8))


def _change_hsv(image: np.ndarray, channel: int, table: np.ndarray) -> np.ndarray:
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    cv2.insertChannel(cv2.LUT(cv2.extractChannel(hsv, channel), table), hsv, channel)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


class PhotometricDistortion:
    """Brightness, contrast (second or last), saturation, hue, each with probability 0.5; image to uint8."""

    def __call__(self, sample: dict, rng: random.Random) -> dict:
        image = np.ascontiguousarray(sample["image"], np.uint8)        # truncates, as the originals do
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
