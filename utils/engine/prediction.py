"""What a network says of a picture: decoded task by task, by strips, typed, coloured, written."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from evaluation.evaluator import TaskContext
from models.blocks.resize import resized_rows
from utils.engine.panel import prediction_panel, sheet, tile
from utils.engine.tasks import TASKS
from utils.engine.views import Legend, save_rgb
from utils.machine import release_freed_memory

STRIP = 2**20               # logits that are upsampled at a time
LARGE = 12e6                # values of a picture beside which it counts what else is held


@dataclass(frozen=True)
class TaskResult:
    """The prediction of one task for one picture.

    prediction: as evaluators and views take it, maps (H, W, C), of a large picture that is being written perhaps its
    `Rows`; context: what is known of the task in this experiment.
    """

    task: str
    prediction: Any
    context: TaskContext = field(repr=False)
    image: np.ndarray = field(repr=False)

    @property
    def array(self) -> Any:
        """Classes (H, W) uint8; depth (H, W), probabilities (H, W) or unit vectors (H, W, 3) float32.

        What is no map (boxes) is what the task's decoding gives.
        """
        is_plane = isinstance(self.prediction, np.ndarray) and self.prediction.shape[2:] == (1,)
        return self.prediction[..., 0] if is_plane else self.prediction

    @property
    def unit(self) -> str:
        """What the values of `array` are: "m", "px", "class", "probability", "unit vector"; empty where not known."""
        return TASKS.load(self.task).view.unit_of(self.context)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The name of each class, empty for other tasks."""
        return self.context.class_names

    def colour(self) -> np.ndarray:
        """The prediction as people see it, (H, W, 3) uint8 RGB."""
        return TASKS.load(self.task).view.picture(self.prediction, self.context, self.image)

    def legend(self) -> Legend:
        """What the colours mean: ((r, g, b), words) entries."""
        return TASKS.load(self.task).view.legend(self.prediction, self.context)

    def save(self, path: str | Path) -> Path:
        """Writes the raw values and returns the file: with the ending .npy `array` itself, else the task's own format.

        The task's format (`format`) has an ending of its own, which is appended unless the path has it.
        """
        path = Path(path)
        if path.suffix == ".npy" and isinstance(self.prediction, np.ndarray):
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path, self.array)
            return path
        stem = path.with_suffix("") if path.suffix in (".png", ".json") else path
        return TASKS.load(self.task).view.write(stem, self.prediction, self.context)

    @property
    def format(self) -> str:
        """What a file of `save` holds, with units."""
        return TASKS.load(self.task).view.raw_format(self.context)

    def _repr_png_(self) -> bytes:
        return cv2.imencode(".png", cv2.cvtColor(self.colour(), cv2.COLOR_RGB2BGR))[1].tobytes()


class Prediction(Mapping[str, TaskResult]):
    """The results of one picture by task; `image` is the picture, (H, W, 3) uint8 RGB."""

    def __init__(self, image: np.ndarray, results: Iterable[TaskResult]) -> None:
        self.image = image
        self._results = {result.task: result for result in results}

    def __getitem__(self, task: str) -> TaskResult:
        if task not in self._results:
            raise KeyError(f"{task}: this network predicts {', '.join(self._results)}")
        return self._results[task]

    def __iter__(self) -> Iterator[str]:
        return iter(self._results)

    def __len__(self) -> int:
        return len(self._results)

    def __repr__(self) -> str:
        return f"Prediction of {self.image.shape[1]} x {self.image.shape[0]} pixels: {', '.join(self)}"

    def panel(self) -> np.ndarray:
        """The picture and every task's colours with a legend, on one sheet: RGB uint8."""
        return prediction_panel(self.image, {task: result.prediction for task, result in self.items()},
                                {task: result.context for task, result in self.items()})

    def save(self, folder: str | Path, name: str) -> Path:
        """Writes panels/<name>.png, colour/<task>/<name>.png and raw/<task>/<name>.*; returns the panel."""
        return write_prediction(self.values(), self.image, Path(folder), name)


def write_prediction(results: Iterable[TaskResult], image: np.ndarray, folder: Path, name: str) -> Path:
    """As `Prediction.save`. One result at a time is held, where they are made as they are asked for."""
    if image.size > LARGE:
        release_freed_memory()
    tiles = [tile("input", image, [])]
    for result in results:
        result.save(folder / "raw" / result.task / f"{name}.png")
        task, picture, legend = result.task, result.colour(), result.legend()
        del result                                          # it may be larger than all else together
        save_rgb(folder / "colour" / task / f"{name}.png", picture)
        tiles.append(tile(task, picture, legend))
        del picture
    return save_rgb(folder / "panels" / f"{name}.png", sheet(tiles))


@dataclass(frozen=True)
class Answer:
    """What the network says of one picture: raw maps (1, n, h, w) of the picture's part of the frame; of tasks that are
    no maps the predictions."""

    outputs: dict[str, Any]
    contexts: Mapping[str, TaskContext]

    def results(self, image: np.ndarray, to_write: bool = False) -> Iterator[TaskResult]:
        """Task by task, at the size of `image` (H, W, 3), which shows what the network saw; only once.

        What has been decoded is let go of. to_write: for `write_prediction` alone, which needs no whole map of what is
        large and can be written by rows.
        """
        return (self._result(task, image, to_write) for task in tuple(self.outputs))

    def at_network_size(self, task: str) -> Any:
        """The prediction of one task as small as it comes, for what needs no more: maps (h, w, C)."""
        output = self.outputs[task]
        is_map = isinstance(output, Tensor) and output.ndim == 4
        return Rows(output, output.shape[-2:], TASKS.load(task).decode)[:] if is_map else output

    def _result(self, task: str, image: np.ndarray, to_write: bool) -> TaskResult:
        output, row = self.outputs.pop(task), TASKS.load(task)
        if isinstance(output, Tensor) and output.ndim == 4:
            rows = Rows(output, image.shape[:2], row.decode)
            output = rows if to_write and row.view.by_rows and image.size > LARGE else rows[:]
        return TaskResult(task, output, self.contexts[task], image)


class Rows:
    """`decode(resize(logits, size))` of maps (1, n, h, w): (H, W, C), uint8 for classes, float32 else.

    A slice of rows is decoded when it is asked for, by strips of so many rows that `STRIP` logits are held at a time,
    whatever n and the size. The strips lie where they lie whatever is asked for: rounding depends on that. One is kept.
    """

    def __init__(self, logits: Tensor, size: tuple[int, int], decode: Callable[[Tensor, list], Tensor]) -> None:
        self._logits, self._size, self._decode = logits, tuple(size), decode
        self._rows = max(1, STRIP // (logits.shape[1] * size[1]))
        self._kept: tuple[int, Tensor] | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        return (*self._size, self[:1].shape[2])

    def __getitem__(self, part: slice) -> np.ndarray:
        (first, last, _), found = part.indices(self._size[0]), None
        for top in range(first // self._rows * self._rows, last, self._rows):
            strip = self._strip(top)
            begin, end = max(first, top), min(last, top + self._rows)
            if found is None:
                found = torch.empty((last - first, *strip.shape[1:]), dtype=self._stored(strip.dtype))
            found[begin - first:end - first] = strip[begin - top:end - top]
        return found.numpy()

    @torch.inference_mode()
    def _strip(self, top: int) -> Tensor:
        if self._kept is None or self._kept[0] != top:
            self._kept = None
            rows = resized_rows(self._logits, self._size, top, min(top + self._rows, self._size[0]))
            self._kept = top, self._decode(rows, [{}])[0].permute(1, 2, 0)      # (C, rows, W) -> (rows, W, C)
        return self._kept[1]

    def _stored(self, dtype: torch.dtype) -> torch.dtype:
        if dtype.is_floating_point:
            return torch.float32
        return torch.uint8 if self._logits.shape[1] <= 256 else dtype
