"""What every evaluator is: scores of one task, gathered image by image, summed over processes.

Two kinds exist. A streaming one keeps a few sums (`evaluation.meter.Meter`); a pooled one hands images to worker
processes and adds up what they count (`evaluation.boundary.evaluator`). The loop that runs them knows neither.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from evaluation.boundary.settings import BoundarySettings, BoundaryTruth, Mode
from evaluation.figures import Figure
from losses.detection3d.options import Detection3DOptions


@dataclass(frozen=True)
class Score:
    """A score that is printed: its key in the results, its direction, and how papers print it."""

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
class Split:
    """The images that are evaluated: where they lie, which ones, and their boundary ground truth, if any.

    truth_files(id): files of an image's ground truth; None: as its patterns say, below the folder. complete: whether
    the images are all that will be predicted; else there are others, without a label.
    """

    dataset: str
    name: str
    folder: Path
    ids: tuple[str, ...]
    boundary: BoundaryTruth | None = None
    truth_files: Callable[[str], tuple[Path, ...]] | None = None
    complete: bool = True


@dataclass(frozen=True)
class TaskContext:
    """What a loss, an evaluator or a view of a task may depend on besides its inputs.

    num_channels: of the network's output. edge_w: weight of the edge class in its loss. valid_range: values are scored
    strictly between these. unit: of the values, "m" or "px". detection: the key `det3d_kwargs`. The fields from `split`
    on matter in an evaluation only; without a split nothing can be evaluated that needs more than the labels of a
    batch. shown: the range of values that colours tell apart, where it is not the prediction's own.
    """

    num_channels: int
    ignore_index: int = 255
    edge_w: float = 0.95
    class_names: tuple[str, ...] = ()
    valid_range: tuple[float, float] | None = None
    colours: tuple[tuple[int, int, int], ...] = ()
    unit: str = ""
    detection: Detection3DOptions = Detection3DOptions()
    split: Split | None = None
    boundary: BoundarySettings = BoundarySettings()
    boundary_mode: Mode = "off"
    progress: bool = False
    shown: tuple[float, float] | None = None


class Evaluator(ABC):
    """`update` per batch, `reduce` once at the end, `compute`; `close` in any case."""

    scores: ClassVar[tuple[Score, ...]]         # those of `compute` that tables print, the most important first
    of_image: ClassVar[Score | None] = None     # the one of them that tells a good image from a bad one, if any does
    on_request: ClassVar[bool] = False          # whether `for_task` may return None
    valid_pixels: int | None = None             # what the scores rest on; None where the evaluator does not count it

    @classmethod
    @abstractmethod
    def for_task(cls, context: TaskContext) -> "Evaluator | None":
        """The evaluator for a task in this evaluation, or None where it has not been asked for."""

    @abstractmethod
    def update(self, prediction: Any, target: Any, meta: Sequence[Mapping] = ()) -> None:
        """Takes a batch: decoded predictions and labels as the task has them, and each image's name and size."""

    @abstractmethod
    def reduce(self) -> None:
        """Adds up what all processes have seen. Every process calls it, once, also one that saw no image."""

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """All scores by key, after `reduce`."""

    def report(self) -> str:
        """One line for the log that the scores do not tell, or nothing."""
        return ""

    def figures(self) -> list[Figure]:
        """What is behind the scores, for a report; after `reduce`."""
        return []

    def close(self) -> None:        # noqa: B027 (most have none)
        """Ends worker processes, if any."""
