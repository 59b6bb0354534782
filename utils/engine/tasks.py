"""Every task, described once: channels, loss, metric, decoding, label rules, colours, file format.

Loader, heads, losses, meters, result table, TensorBoard panels and `predict` all read this table; none of them
asks for a task by name. A new task is one more row (and, if its kind is new, one class for its loss or meter).

Label conventions (after the transforms): float32, C x H x W, void = 255 in every channel.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.palette import VOC, colour_classes, colour_depth, colour_normals, colour_probability
from evaluation.boundary import BoundaryBenchmark
from evaluation.depth import DepthMeter
from evaluation.edge_loss import EdgeLossMeter
from evaluation.edge_maps import save_edge_maps
from evaluation.meter import Meter
from evaluation.normals import NormalsMeter
from evaluation.saliency import SaliencyMeter
from evaluation.segmentation import SegmentationMeter
from losses import BalancedBCELoss, BalancedCrossEntropyLoss, CrossEntropyLoss, L1Loss, NormalsLoss

VOID = 255.0


@dataclass(frozen=True)
class TaskContext:
    """What a row may depend on besides the task: the data set's classes and two config keys."""

    num_channels: int
    ignore_index: int = 255
    edge_w: float = 0.95
    class_names: tuple[str, ...] = ()
    depth_range: tuple[float, float] | None = None

    colours: tuple[tuple[int, int, int], ...] = ()

    @property
    def palette(self) -> np.ndarray:
        """(n, 3) uint8 RGB: the data set's own, or PASCAL VOC's, whose black is left to a background."""
        if self.colours:
            return np.array(self.colours, dtype=np.uint8)
        has_background = not self.class_names or self.class_names[0] == "background"
        return VOC if has_background else np.roll(VOC, -1, axis=0)


@dataclass(frozen=True)
class Score:
    """A score of a task: its key in the results, its direction, and how papers print it."""

    key: str
    label: str
    higher_is_better: bool
    scale: float = 1.0        # printed = scale * value
    decimals: int = 2
    unit: str = ""

    def format(self, value: float) -> str:
        """The value as papers print it."""
        return f"{value * self.scale:.{self.decimals}f}"


@dataclass(frozen=True)
class Task:
    """One row of the table.

    `decode`, `on_flip`, `on_scale` and `mark_void` work on (B, C, H, W) tensors (decode) and H x W x C arrays
    (the others). `colourise` and `write_raw` take H x W x C predictions of one image.
    """

    name: str
    num_channels: int | None                            # None: classes, listed by the data set
    loss: Callable[[TaskContext], nn.Module]
    meter: Callable[[TaskContext], Meter]
    score: Score
    decode: Callable[[Tensor], Tensor]
    colourise: Callable[[np.ndarray, TaskContext], np.ndarray]
    write_raw: Callable[[Path, np.ndarray], Path]
    raw_format: str                                     # what `write_raw` writes, with units
    legend: str = "none"                                # "classes" | "depth" | "normals" | "probability"
    label_channels: int = 1
    export: Callable[[Tensor, Sequence[Mapping], Path], object] | None = None   # (prediction, meta, folder): `infer`
    # What papers report where the score above cannot be it: a benchmark that runs beside the meter, and its score.
    benchmark: Callable[..., BoundaryBenchmark] | None = None
    benchmark_score: Score | None = None
    interp: str = "nearest"                             # how a label of another size is brought to the image's
    pad_value: float = VOID
    on_flip: Callable[[np.ndarray], np.ndarray] = lambda label: label
    on_scale: Callable[[np.ndarray, float], np.ndarray] = lambda label, factor: label
    mark_void: Callable[[np.ndarray], np.ndarray] = lambda label: label


def _flip_normals(label: np.ndarray) -> np.ndarray:
    """Mirroring the image negates the x component."""
    return label * np.array([-1, 1, 1], label.dtype)


def _void_normals(label: np.ndarray) -> np.ndarray:
    """Zero vectors carry no direction: void."""
    return np.where((label == 0).all(axis=-1, keepdims=True), np.float32(VOID), label)


def _void_depth(label: np.ndarray) -> np.ndarray:
    """Depth 0 means "not measured": void."""
    return np.where(label == 0, np.float32(VOID), label)


def _void_parts(label: np.ndarray) -> np.ndarray:
    """A map (also a crop) without any person supervises nothing, not even its background."""
    return label if np.any((label != 0) & (label != VOID)) else np.full_like(label, VOID)


def _argmax(logits: Tensor) -> Tensor:
    return logits.argmax(dim=1, keepdim=True)                                  # (B, n, H, W) -> (B, 1, H, W)


def _foreground_probability(logits: Tensor) -> Tensor:
    return logits.softmax(dim=1)[:, 1:2]                                       # (B, 2, H, W) -> (B, 1, H, W)


def _write_png(path: Path, image: np.ndarray) -> Path:
    path = path.with_suffix(".png")
    if not cv2.imwrite(str(path), image):
        raise OSError(f"could not write {path}: is the disk full or the folder read-only?")
    return path


def _write_classes(path: Path, label: np.ndarray) -> Path:
    return _write_png(path, label[..., 0].astype(np.uint8))


def _write_depth(path: Path, depth_m: np.ndarray) -> Path:
    return _write_png(path, np.clip(depth_m[..., 0] * 1000 + 0.5, 0, 65535).astype(np.uint16))


def _write_probability(path: Path, probability: np.ndarray) -> Path:
    return _write_png(path, np.clip(probability[..., 0] * 65535 + 0.5, 0, 65535).astype(np.uint16))


def _write_vectors(path: Path, vectors: np.ndarray) -> Path:
    path = path.with_suffix(".npy")
    np.save(path, vectors.astype(np.float32))
    return path


def _segmentation(name: str, **rules) -> Task:
    return Task(
        name, None,
        loss=lambda c: CrossEntropyLoss(c.ignore_index),
        meter=lambda c: SegmentationMeter(c.num_channels, c.ignore_index),
        score=Score("mIoU", "mIoU", True, scale=100, unit="%"),
        decode=_argmax, write_raw=_write_classes, raw_format="8-bit PNG, class index",
        colourise=lambda x, c: colour_classes(x[..., 0], c.palette), legend="classes", **rules,
    )


# The order is part of the models: cross-task sequences and concatenations follow it.
TASKS: dict[str, Task] = {task.name: task for task in (
    _segmentation("semseg"),
    Task(
        "depth", 1,
        loss=lambda c: L1Loss(c.ignore_index),
        meter=lambda c: DepthMeter(c.ignore_index, c.depth_range),
        score=Score("rmse", "RMSE", False, decimals=4, unit="m"),
        decode=lambda logits: logits.clamp_min(0), pad_value=0.0,
        on_scale=lambda label, factor: label / np.float32(factor), mark_void=_void_depth,
        colourise=lambda x, c: colour_depth(x[..., 0]), legend="depth",
        write_raw=_write_depth, raw_format="16-bit PNG, millimetres",
    ),
    _segmentation("human_parts", mark_void=_void_parts),
    Task(
        "sal", 2,
        loss=lambda c: BalancedCrossEntropyLoss(c.ignore_index),
        meter=lambda c: SaliencyMeter(c.ignore_index),
        score=Score("maxF", "maxF", True, scale=100, unit="%"),
        decode=_foreground_probability,
        colourise=lambda x, c: colour_probability(x[..., 0]), legend="probability",
        write_raw=_write_probability, raw_format="16-bit PNG, probability * 65535",
    ),
    Task(
        "normals", 3,
        loss=lambda c: NormalsLoss(c.ignore_index),
        meter=lambda c: NormalsMeter(c.ignore_index),
        score=Score("mean", "mErr", False, unit="deg"),
        decode=lambda logits: F.normalize(logits, dim=1, eps=1e-12), label_channels=3, interp="cubic", pad_value=0.0,
        on_flip=_flip_normals, mark_void=_void_normals,
        colourise=lambda x, c: colour_normals(x), legend="normals",
        write_raw=_write_vectors, raw_format="npy float32 (H, W, 3), unit vectors",
    ),
    Task(
        "edge", 1,
        loss=lambda c: BalancedBCELoss(c.edge_w, c.ignore_index),
        meter=lambda c: EdgeLossMeter(c.edge_w, c.ignore_index),
        score=Score("loss", "boundary loss", False, decimals=4),
        decode=torch.sigmoid, export=save_edge_maps,
        benchmark=BoundaryBenchmark, benchmark_score=Score("odsF", "odsF", True, scale=100, unit="%"),
        colourise=lambda x, c: colour_probability(x[..., 0]), legend="probability",
        write_raw=_write_probability, raw_format="16-bit PNG, probability * 65535",
    ),
)}


def tasks_named(names: Iterable[str]) -> dict[str, Task]:
    """The rows of these tasks, in the table's order; an unknown name is a ValueError listing the known ones."""
    names = set(names)
    if unknown := names - TASKS.keys():
        raise ValueError(f"unknown task(s) {sorted(unknown)}; known: {', '.join(TASKS)}")
    return {name: task for name, task in TASKS.items() if name in names}


def primary_score(task: str, scores: Mapping[str, float]) -> Score:
    """The score that stands for a task in these results: the benchmark's where it has been run, else the meter's."""
    benchmark = TASKS[task].benchmark_score
    return benchmark if benchmark is not None and benchmark.key in scores else TASKS[task].score


def reference_keys() -> dict[str, tuple[str, Score]]:
    """Names of single-task scores -> (task, score): `edge` is the meter's score, `edge/odsF` the benchmark's."""
    keys = {name: (name, task.score) for name, task in TASKS.items()}
    return keys | {f"{name}/{task.benchmark_score.key}": (name, task.benchmark_score)
                   for name, task in TASKS.items() if task.benchmark_score is not None}
