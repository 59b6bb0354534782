"""Random brightness, contrast, saturation and hue, in 8 bits as published: arithmetic runs through tables of 256.

`data.batch_colours` does the same to a whole batch, where the network runs.
"""

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


CHANGES = (brightness, contrast, saturation, hue, contrast)       # in this order


def draw_changes(rng: random.Random) -> list[float | None]:
    """What becomes of an image: a value for each of CHANGES, None for those left out, each with probability 0.5.

    Contrast comes second or last.
    """
    def maybe(draw: Callable[[], float]) -> float | None:
        return draw() if rng.random() < 0.5 else None

    def factor() -> float:
        return rng.uniform(0.5, 1.5)

    light = maybe(lambda: rng.uniform(-32, 32))
    contrast_first = rng.random() < 0.5
    first = maybe(factor) if contrast_first else None
    colourful = maybe(factor)
    turn = maybe(lambda: rng.randint(-18, 17))
    return [light, first, colourful, turn, None if contrast_first else maybe(factor)]


def _in_8_bits(sample: dict) -> np.ndarray:
    """The image, truncated as the originals do."""
    return np.ascontiguousarray(sample["image"], np.uint8)


class PhotometricDistortion:
    """Brightness, contrast, saturation, hue; image to uint8."""

    def __call__(self, sample: dict, rng: random.Random) -> dict:
        image = _in_8_bits(sample)
        for change, value in zip(CHANGES, draw_changes(rng), strict=True):
            if value is not None:
                image = change(image, value)
        return sample | {"image": image}


class ColoursToCome:
    """Draws what `PhotometricDistortion` would do and leaves it to `data.batch_colours`, with normalising.

    Image to uint8; "colours" (7,) float32: a value for each of CHANGES, NaN for those left out, and the image's height
    and width, which tell it from its frame.
    """

    def __call__(self, sample: dict, rng: random.Random) -> dict:
        image = _in_8_bits(sample)
        return sample | {"image": image, "colours": np.array([*draw_changes(rng), *image.shape[:2]], np.float32)}
