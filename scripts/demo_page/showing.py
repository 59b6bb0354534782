"""What the demo page shows of a prediction: pictures over the photograph, values in words. Knows of no web page."""

import math
import zipfile
from pathlib import Path

import cv2
import numpy as np

from utils.engine.prediction import Prediction, TaskResult

LONGEST = 1024          # pixels of a side, of what is sent to the browser


def size_shown(image: np.ndarray) -> tuple[int, int]:
    """(width, height) of the pictures that are shown of (H, W, 3)."""
    scale = min(1.0, LONGEST / max(image.shape[:2]))
    return max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale))


def over_photograph(result: TaskResult, image: np.ndarray, opacity: float, threshold: float) -> np.ndarray:
    """The task's colours over the picture (H, W, 3) uint8, made no larger than `LONGEST`.

    opacity: 0 the picture, 1 the colours. threshold: of probabilities; 0 shows them as they are, else what reaches it.
    """
    colours = result.colour()
    if threshold > 0 and result.unit == "probability":
        colours = np.where((result.array >= threshold)[..., None], np.uint8(255), np.uint8(0)).repeat(3, axis=2)
    size = size_shown(image)
    below = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    above = cv2.resize(colours, size, interpolation=cv2.INTER_AREA if result.unit != "class" else cv2.INTER_NEAREST)
    return cv2.addWeighted(above, opacity, below, 1 - opacity, 0)


def value_at(result: TaskResult, x: float, y: float) -> str:
    """In words, what is predicted at a place of the picture, whose sides run from 0 to 1."""
    if not isinstance(values := result.array, np.ndarray):
        return f"{result.task}: {values}"
    row, column = (min(int(at * side), side - 1) for at, side in zip((y, x), values.shape[:2], strict=True))
    value = values[row, column]
    if result.unit == "class":
        names = result.class_names
        words = f"{names[value]} (class {value})" if value < len(names) else f"class {value}"
    elif result.unit == "unit vector":
        across, up, towards = (float(part) for part in value)
        tilt = math.degrees(math.acos(min(1.0, max(-1.0, towards))))
        words = (f"{tilt:.0f} degrees away from the line of sight, facing "
                 f"{math.degrees(math.atan2(up, across)) % 360:.0f} degrees (0 right, 90 up)")
    else:
        words = f"{float(value):.2f} {result.unit}"
    return f"{result.task} at column {column}, row {row}: {words}"


def pack(prediction: Prediction, folder: Path, name: str) -> Path:
    """A zip file with everything that `predict` would write of this picture."""
    prediction.save(folder / name, name)
    packed = folder / f"{name}.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        for file in sorted((folder / name).rglob("*.*")):
            archive.write(file, file.relative_to(folder))
        formats = "\n".join(f"{task}: {result.format}" for task, result in prediction.items())
        archive.writestr(f"{name}/formats.txt", f"{formats}\n")
    return packed
