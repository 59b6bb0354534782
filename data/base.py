"""What all data sets share: a description (`DatasetSpec`), where files lie (`Source`), one `Dataset` class.

A data set is a table: its tasks with their class counts, and per label the files and the function that reads
them. Nothing here or in the data sets branches on a task. Everything that can be wrong with a data folder
is found before the first batch, or names the file it is about. PyTorch is not needed to read this file, so that an
experiment file can be checked against a data set at once.
"""

import os
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from data.labels import LabelRules
from evaluation.boundary.settings import BoundaryTruth
from utils.files import read_rgb


@dataclass(frozen=True)
class DatasetSpec:
    """Facts about a data set. `tasks` maps each task to its output channels, in the task table's order."""

    name: str
    folder: str                                     # below db_root
    tasks: Mapping[str, int]
    image_size: tuple[int, int]                     # (H, W) of the network's input
    class_names: Mapping[str, tuple[str, ...]]      # of the tasks that have classes
    boundary: BoundaryTruth | None = None           # ground truth of the boundary score
    label_size: tuple[int, int] | None = None       # (H, W) of the labels; None: as the network's input
    depth_range: tuple[float, float] | None = None  # depth is scored strictly between these; None: wherever not void
    colours: Mapping[str, tuple[tuple[int, int, int], ...]] = field(default_factory=dict)   # of classes; else VOC's
    splits: tuple[str, ...] = ("train", "val")
    split_file: str | None = None                   # list of ids, e.g. "gt_sets/{split}.txt"


@dataclass(frozen=True)
class Source:
    """The files of one label, and their reader: `read(*paths)`, a map as H x W x C float32, the image as uint8.

    A pattern may hold alternatives, "a/{id}.png|b/{id}.png": the first that exists is taken.
    """

    files: tuple[str, ...]
    read: Callable[..., Any]


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
    raise FileNotFoundError(f"data folder not found: {root / spec.folder} (set db_root in the config "
                            f"or on the command line, or $DB_ROOT, to the folder holding {spec.folder}/)")


class MultiTaskDataset:
    """Images with one label per task; a map-style data set of PyTorch.

    `dataset[(index, seed)]` applies `transform(sample, random.Random(seed))`; `dataset[index]` (evaluation)
    uses the index as seed. Sample before the transform: "image" H x W x 3 uint8 RGB, each task's label (maps: H x W x C
    float32 of the image's size), "meta" {"name": str, "size": (H, W)}. Without a transform that sample is returned.
    `labels` maps each wanted task to the rules of its label.
    """

    spec: ClassVar[DatasetSpec]
    sources: ClassVar[Mapping[str, Source]]      # "image" and every task of `spec`

    def __init__(self, root: str | Path, split: str, labels: Mapping[str, LabelRules],
                 transform: Callable[[dict, random.Random], dict] | None = None):
        spec = self.spec
        if split not in spec.splits:
            raise ValueError(f"{spec.name} has no split {split!r}; valid: {', '.join(spec.splits)}")
        if absent := [name for name in labels if name not in spec.tasks]:
            raise ValueError(f"{spec.name} has no labels for {', '.join(absent)}; "
                             f"its tasks: {', '.join(spec.tasks)}")
        self.folder = find_folder(root, spec)
        self.split, self.transform = split, transform
        self.labels = {name: labels[name] for name in spec.tasks if name in labels}
        self.ids = self.list_ids(split)
        self.check_files()
        self.ids = self.select_ids()
        if not self.ids:
            raise ValueError(f"split {split!r} of {spec.name} in {self.folder} lists no images")

    def list_ids(self, split: str) -> list[str]:
        """Image ids of a split, in file order."""
        path = self.folder / self.spec.split_file.format(split=split)
        if not path.is_file():
            raise FileNotFoundError(f"split file not found: {path} (one image id per line)")
        return path.read_text(encoding="utf-8").split()

    def select_ids(self) -> list[str]:
        """The ids this run uses; a data set may leave out images that cannot supervise any of its tasks."""
        return self.ids

    def paths(self, key: str, name: str) -> tuple[Path, ...]:
        """Files of one map ("image" or a task) of the image with this id."""
        found = []
        for pattern in self.sources[key].files:
            options = [self.folder / option.format(id=name) for option in pattern.split("|")]
            found.append(next((p for p in options[:-1] if p.is_file()), options[-1]))
        return tuple(found)

    def missing_files(self) -> list[Path]:
        """Files the split needs that are not there; lists each folder once: fast on network disks."""
        listings: dict[str, set[str]] = {}

        def exists(relative: str) -> bool:
            folder, _, file = relative.rpartition("/")
            if folder not in listings:
                path = self.folder / folder
                listings[folder] = set(os.listdir(path)) if path.is_dir() else set()
            return file in listings[folder]

        patterns = dict.fromkeys(p for key in ("image", *self.labels) for p in self.sources[key].files)
        missing = []
        for pattern in patterns:
            options = pattern.split("|")
            missing += [self.folder / options[-1].format(id=name) for name in self.ids
                        if not any(exists(option.format(id=name)) for option in options)]
        return missing

    def check_files(self) -> None:
        """Raises FileNotFoundError with the number of missing files and the first of them."""
        if missing := self.missing_files():
            shown = ", ".join(str(p.relative_to(self.folder)) for p in missing[:5])
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise FileNotFoundError(f"{len(missing)} file(s) of split {self.split!r} "
                                    f"({len(self.ids)} images) missing in {self.folder}: {shown}{more}")

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, key: int | tuple[int, int]) -> dict:
        index, seed = key if isinstance(key, tuple) else (key, key)
        sample = self.load(self.ids[index])
        return sample if self.transform is None else self.transform(sample, random.Random(seed))

    def read(self, key: str, name: str) -> Any:
        """One label, or the image, exactly as stored in its files (maps: own size, H x W x C)."""
        return self.sources[key].read(*self.paths(key, name))

    def load(self, name: str) -> dict:
        """Image and labels of one id, untransformed; labels of another size are resized to the image's."""
        image = self.read("image", name)
        size = image.shape[:2]
        labels = {key: rules.fit(self.read(key, name), size) for key, rules in self.labels.items()}
        return {"image": image, **labels, "meta": {"name": self.paths("image", name)[0].stem, "size": size}}
