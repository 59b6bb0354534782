"""Predictions and labels for people: colours, legends, files. Everything here takes and gives NumPy arrays."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from evaluation.evaluator import TaskContext
from utils.durable import whole_or_none

Colour = tuple[int, int, int]
Legend = list[tuple[Colour, str]]
SAMPLED = 4e6               # pixels of a map from which the range of its colours is taken
UNLABELLED = "no label"
PIECE = 2**18               # pixels of a map that are worked on at a time, where that takes more than the result


@dataclass(frozen=True)
class View:
    """How one kind of prediction is shown and stored. A prediction of one image is a map H x W x C, or what the
    task's decoding gives.

    picture(prediction, context, rgb) -> RGB uint8 (H, W, 3), where rgb (H, W, 3) uint8 is the image to draw on, if need
    be. legend(prediction, context): (colour, text) entries. write(path, prediction, context): writes the raw values and
    returns the file; `path` has no ending yet, the view appends one (`with_ending`). raw_format(context): what that
    file holds, with units. unit: of the values of a prediction; empty: that of the data set's labels.
    shown_range(prediction, context): the range that its colours tell apart, if they are stretched.
    key(context): what colours mean in every picture of the task, labels' too: all classes, what has no label.
    by_rows: all of these ask a map for its `shape` and for slices of its rows alone, so it need never be whole.
    """

    picture: Callable[[Any, TaskContext, np.ndarray], np.ndarray]
    legend: Callable[[Any, TaskContext], Legend]
    key: Callable[[TaskContext], Legend]
    write: Callable[[Path, Any, TaskContext], Path]
    raw_format: Callable[[TaskContext], str]
    unit: str = ""
    shown_range: Callable[[Any, TaskContext], tuple[float, float]] | None = None
    by_rows: bool = False

    def unit_of(self, context: TaskContext) -> str:
        """What the values of a prediction are measured in; empty where the data set does not say."""
        return self.unit or context.unit


# ------------------------------------------------------------ classes


def voc_palette(num_colours: int = 256) -> np.ndarray:
    """The PASCAL VOC palette, (num_colours, 3) uint8 RGB: bit i of every colour spells the class index."""
    index = np.arange(num_colours)[:, None] >> (3 * np.arange(8))             # (N, 8) three bits a step
    bits = (index[..., None] >> np.arange(3)) & 1                             # (N, 8, 3): r, g, b
    return (bits << (7 - np.arange(8))[None, :, None]).sum(axis=1).astype(np.uint8)


VOC = voc_palette()


def palette(context: TaskContext) -> np.ndarray:
    """(n, 3) uint8 RGB: the data set's own, or PASCAL VOC's, whose black is left to a background."""
    if context.colours:
        return np.array(context.colours, dtype=np.uint8)
    has_background = not context.class_names or context.class_names[0] == "background"
    return VOC if has_background else np.roll(VOC, -1, axis=0)


def colour_classes(class_id: np.ndarray, colours: np.ndarray = VOC) -> np.ndarray:
    """Class ids (H, W) -> RGB uint8 (H, W, 3); `colours` (n, 3) holds the colour of each class, void (255) is white."""
    table = colours[np.arange(256) % len(colours)]
    table[255] = 255
    return cv2.applyColorMap(np.ascontiguousarray(class_id, np.uint8), table[:, None])      # (256, 1, 3): as it is


def _classes_legend(prediction: np.ndarray, context: TaskContext) -> Legend:
    """The eight classes with the largest area."""
    area = cv2.calcHist([np.ascontiguousarray(prediction, np.uint8)], [0], None, [256], [0, 256])
    area = area.ravel()                                     # (256, 1) of OpenCV 4, (256,) of OpenCV 5
    return [_class_entry(i, context) for i in np.argsort(-area, kind="stable")[:8].tolist() if area[i]]


def _classes_key(context: TaskContext) -> Legend:
    number = len(context.class_names) or context.num_channels
    return [*(_class_entry(i, context) for i in range(number)), ((255, 255, 255), UNLABELLED)]


def _class_entry(class_id: int, context: TaskContext) -> tuple[Colour, str]:
    names, colours = context.class_names, palette(context)
    return (tuple(map(int, colours[class_id % len(colours)])),
            names[class_id] if class_id < len(names) else str(class_id))


# ------------------------------------------------------------ depth, normals, probabilities

TURBO = cv2.applyColorMap(np.arange(256, dtype=np.uint8), cv2.COLORMAP_TURBO)[:, 0, ::-1].copy()    # (256, 3) RGB
NEAR, FAR = tuple(TURBO[255].tolist()), tuple(TURBO[0].tolist())


def _pieces(values: np.ndarray) -> Iterator[slice]:
    """Rows of `values` (H, W, ..) that are `PIECE` pixels or a little more."""
    step = 1 + PIECE // values.shape[1]
    return (slice(top, top + step) for top in range(0, values.shape[0], step))


def _by_rows(colour: Callable[[np.ndarray], np.ndarray], values: np.ndarray) -> np.ndarray:
    """`colour` of some rows after the others, as RGB uint8: what it needs besides its result stays small."""
    rgb = np.empty((*values.shape[:2], 3), np.uint8)
    for rows in _pieces(values):
        rgb[rows] = colour(values[rows])
    return rgb


def colour_depth(depth_m: np.ndarray, shown: tuple[float, float] | None = None) -> np.ndarray:
    """Metres (H, W) -> RGB uint8 (H, W, 3), near = red, far = blue, stretched over `shown`, else over `depth_range`."""
    near, far = shown or depth_range(depth_m)

    def colour(rows: np.ndarray) -> np.ndarray:
        grey = 255 - np.clip((rows - near) / max(far - near, 1e-6), 0, 1) * 255
        rgb = cv2.applyColorMap(grey.astype(np.uint8), TURBO[:, None])                     # (256, 1, 3): as it is
        rgb[~((rows > 0) & (rows < 255))] = 0
        return rgb

    return _by_rows(colour, depth_m)


def depth_range(depth_m: np.ndarray) -> tuple[float, float]:
    """The nearest and farthest depth that `colour_depth` tells apart, in metres; of large maps by a part of them."""
    step = 1 + int(np.sqrt(depth_m.size / SAMPLED))
    sample = depth_m[::step, ::step]
    valid = sample[(sample > 0) & (sample < 255)]
    return (float(np.percentile(valid, 2)), float(np.percentile(valid, 98))) if valid.size else (0.0, 0.0)


def _depth_legend(prediction: np.ndarray, context: TaskContext) -> Legend:
    near, far = _shown_depth(prediction, context)
    words = ("near {:.2f} m", "far {:.2f} m") if context.unit == "m" else ("{:.2f} " + context.unit,) * 2
    return [(colour, text.format(value).strip()) for colour, text, value in zip(
        (NEAR, FAR), words, (near, far), strict=True)]


def _depth_key(context: TaskContext) -> Legend:
    low, high = ("near", "far") if context.unit == "m" else ("small", "large")
    return [(NEAR, low), (FAR, high), ((0, 0, 0), UNLABELLED)]


def colour_normals(normals: np.ndarray) -> np.ndarray:
    """Unit vectors (H, W, 3) -> RGB uint8, component c as (c + 1) / 2 * 255; zero and void vectors are black."""
    def colour(rows: np.ndarray) -> np.ndarray:
        x, y, z = np.moveaxis(rows, -1, 0)                  # NumPy is slow along an axis of three
        void = (x == 0) & (y == 0) & (z == 0) | (x > 1.5) | (y > 1.5) | (z > 1.5)
        rgb = np.clip((rows + 1) * 127.5, 0, 255).astype(np.uint8)
        rgb[void] = 0
        return rgb

    return _by_rows(colour, normals)


def colour_probability(probability: np.ndarray) -> np.ndarray:
    """Probabilities (H, W) in [0, 1] -> grey RGB uint8 (H, W, 3); void (255) is mid-grey."""
    return _by_rows(lambda rows: np.where(rows > 1.5, 127, np.clip(rows, 0, 1) * 255)[..., None], probability)


# ------------------------------------------------------------ files


def save_rgb(path: Path, rgb: np.ndarray) -> Path:
    """Writes RGB uint8 (H, W, 3); creates the folder."""
    return _write_png(path, cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))


def with_ending(path: Path, ending: str) -> Path:
    """The ending behind the whole name, dots and all: "a.b" -> "a.b.png"; the folder is made where it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f"{path.name}{ending}")


def _write_png(path: Path, image: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    whole, data = cv2.imencode(".png", image)               # and not imwrite, which knows no names beyond a code page
    if not whole:
        raise ValueError(f"{path}: a picture of {image.shape} {image.dtype} cannot be a PNG")
    with whole_or_none(path):
        path.write_bytes(data)
    return path


def _write_16_bits(path: Path, values: np.ndarray, steps: float) -> Path:
    """values (H, W) * steps, rounded."""
    stored = np.empty(values.shape, np.uint16)
    for rows in _pieces(values):
        stored[rows] = np.clip(values[rows] * steps + 0.5, 0, 65535)
    return _write_png(with_ending(path, ".png"), stored)


def _write_vectors(path: Path, vectors: np.ndarray, context: TaskContext) -> Path:
    path = with_ending(path, ".npy")
    with whole_or_none(path), path.open("wb") as file:
        about = {"descr": "<f4", "fortran_order": False, "shape": tuple(vectors.shape)}
        np.lib.format.write_array_header_1_0(file, about)
        for rows in _pieces(vectors):
            file.write(np.ascontiguousarray(vectors[rows], "<f4"))
    return path


# ------------------------------------------------------------ the four views: named functions, which can be pickled


def _picture_classes(classes: np.ndarray, context: TaskContext, rgb: np.ndarray) -> np.ndarray:
    return colour_classes(classes[..., 0], palette(context))


def _picture_depth(depth: np.ndarray, context: TaskContext, rgb: np.ndarray) -> np.ndarray:
    return colour_depth(depth[..., 0], context.shown)


def _shown_depth(depth: np.ndarray, context: TaskContext) -> tuple[float, float]:
    return context.shown or depth_range(depth[..., 0])


def _picture_normals(normals: np.ndarray, context: TaskContext, rgb: np.ndarray) -> np.ndarray:
    return colour_normals(normals)


def _picture_probability(probability: np.ndarray, context: TaskContext, rgb: np.ndarray) -> np.ndarray:
    return colour_probability(probability[..., 0])


def _normals_legend(normals: np.ndarray | None, context: TaskContext) -> Legend:
    return [((255, 127, 127), "+x"), ((0, 127, 127), "-x"), ((127, 255, 127), "+y"), ((127, 127, 255), "+z")]


def _normals_key(context: TaskContext) -> Legend:
    return [*_normals_legend(None, context), ((0, 0, 0), UNLABELLED)]


def _probability_legend(probability: np.ndarray | None, context: TaskContext) -> Legend:
    return [((0, 0, 0), "0"), ((255, 255, 255), "1")]


def _probability_key(context: TaskContext) -> Legend:
    return [*_probability_legend(None, context), ((127, 127, 127), UNLABELLED)]


def _vectors_format(context: TaskContext) -> str:
    return "npy float32 (H, W, 3), unit vectors"


def _write_classes(path: Path, classes: np.ndarray, context: TaskContext) -> Path:
    return _write_png(with_ending(path, ".png"), classes[..., 0].astype(np.uint8))


def _classes_format(context: TaskContext) -> str:
    return "8-bit PNG, class index"


def _depth_steps(context: TaskContext) -> int:
    """Steps of a 16-bit file per unit: millimetres, unless labels in metres reach farther than 16 bits can say so."""
    farthest = context.valid_range[1] if context.valid_range else 0
    return 1000 if context.unit == "m" and farthest * 1000 <= 65535 else 256


def _write_depth(path: Path, depth: np.ndarray, context: TaskContext) -> Path:
    return _write_16_bits(path, depth[..., 0], _depth_steps(context))


def _depth_format(context: TaskContext) -> str:
    steps = _depth_steps(context)
    words = "millimetres" if steps == 1000 else f"{context.unit or 'label value'} * {steps}"
    return f"16-bit PNG, {words}, at most {65535 / steps:.6g} {context.unit}".rstrip()


def _write_probability(path: Path, probability: np.ndarray, context: TaskContext) -> Path:
    return _write_16_bits(path, probability[..., 0], 65535)


def _probability_format(context: TaskContext) -> str:
    return "16-bit PNG, probability * 65535"


CLASSES = View(_picture_classes, _classes_legend, _classes_key, _write_classes, _classes_format, unit="class")
DEPTH_MAP = View(_picture_depth, _depth_legend, _depth_key, _write_depth, _depth_format, shown_range=_shown_depth)
VECTORS = View(_picture_normals, _normals_legend, _normals_key, _write_vectors, _vectors_format, unit="unit vector",
               by_rows=True)
PROBABILITY = View(_picture_probability, _probability_legend, _probability_key, _write_probability,
                   _probability_format, unit="probability")
