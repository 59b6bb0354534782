"""What a data set is: where its files lie, what they hold and mean, and which images a split takes.

A `DatasetSpec` is the one place that states everything that loader, split list and label convention assume; loaders,
checks and evaluations read it and nothing here or there branches on a task. It consists of plain values and of readers
that can be pickled, and needs no PyTorch, so that an experiment file can be checked against a data set at once.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import numpy as np

from data.labels import LabelRules
from data.splits import SplitRule
from evaluation.boundary.settings import BoundaryTruth
from utils.files import read_rgb

ResizeRule = Literal["none", "fit", "stretch"]


@dataclass(frozen=True)
class Source:
    """The files of one map, and their reader: `read(*paths)`, a label as H x W x C float32, the image as uint8.

    A pattern may hold alternatives, "a/{id}.png|b/{id}.png": the first that exists is taken. An ending ".*" is that of
    the one file there.
    """

    files: tuple[str, ...]
    read: Callable[..., Any]


@dataclass(frozen=True)
class LabelSpec(Source):
    """The labels of one task.

    channels: of the network's output. classes: their names. colours: theirs (else VOC's). unit: of the values, "m" or
    "px". valid_range: the score counts values strictly between these; None: wherever not void. boundary: ground truth
    of the boundary score. informs(*paths): whether a label says anything; where this is the only task, the images
    whose labels say nothing are left out. required: so they are in training beside other tasks, too. rules: of the
    label, where they are not those of the task.
    """

    channels: int = 1
    classes: tuple[str, ...] = ()
    colours: tuple[tuple[int, int, int], ...] = ()
    unit: str = ""
    valid_range: tuple[float, float] | None = None
    boundary: BoundaryTruth | None = None
    informs: Callable[..., bool] | None = None
    required: bool = False
    rules: LabelRules | None = None

    def difference(self, other: "LabelSpec") -> str:
        """In what the two mean different things, in words; empty where the same output serves both."""
        if self.channels != other.channels:
            return f"{self.channels} outputs against {other.channels}"
        if self.classes != other.classes:
            pairs = enumerate(zip_longest(self.classes, other.classes, fillvalue=""))
            at, (mine, others) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
            return f"class {at} is {mine!r} against {others!r}"
        return f"unit {self.unit!r} against {other.unit!r}" if self.unit != other.unit else ""


@dataclass(frozen=True)
class DatasetSpec:
    """Facts about a data set.

    folder: below db_root, or absolute. labels: by task, in the task table's order. image_size: (H, W) of the network's
    input. label_size: (H, W) of the labels where it is not the input's; such a data set is never augmented.
    resize: what is done first to an image and its labels: nothing (in an evaluation it must fit into the input),
    shrinking it until it fits, or bringing it to exactly the input's size.
    output_name: how the files that are written for an image are called: by its {id}, or by the {stem} of its file.
    """

    name: str
    folder: str
    image: Source
    labels: Mapping[str, LabelSpec]
    splits: Mapping[str, SplitRule]
    image_size: tuple[int, int]
    label_size: tuple[int, int] | None = None
    resize: ResizeRule = "none"
    output_name: str = "{id}"

    @property
    def tasks(self) -> dict[str, int]:
        """Output channels by task."""
        return {task: label.channels for task, label in self.labels.items()}

    @property
    def units(self) -> dict[str, str]:
        """What the labels are measured in, by task."""
        return {task: label.unit for task, label in self.labels.items() if label.unit}


def read_image(path: Path) -> np.ndarray:
    """The stored pixels, H x W x 3 uint8 RGB; no EXIF turn, because labels belong to the stored pixels."""
    return read_rgb(path, apply_exif=False)


def find_folder(root: str | Path, spec: DatasetSpec) -> Path:
    """The data set's folder: `root`/`spec.folder`, or `root` itself where that already is the folder."""
    root = Path(root).expanduser()
    if (root / spec.folder).is_dir():
        return root / spec.folder
    if root.name == spec.folder and root.is_dir():
        return root
    if Path(spec.folder).is_absolute():
        raise FileNotFoundError(f"the folder of data set {spec.name} is not there: {spec.folder} (say where it is "
                                "now by train_db_name.folder=DIR val_db_name.folder=DIR)")
    raise FileNotFoundError(f"data folder not found: {root / spec.folder} (set db_root in the config "
                            f"or on the command line, or $DB_ROOT, to the folder holding {spec.folder}/)")
