"""`MultiTaskDataset`: the images of a split with their labels, as a `data.spec.DatasetSpec` describes them.

Everything that can be wrong with a data folder is found before the first batch, or names the file it is about.
PyTorch is not needed to read this file.
"""

import itertools
import logging
import os
import random
from collections.abc import Callable, Collection, Mapping
from dataclasses import is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data.cache import DecodedCache
from data.labels import LabelRules
from data.partial import PartialLabels, choose_labels
from data.spec import DatasetSpec, find_folder
from data.splits import PICTURES, explain_unknown, id_of
from evaluation.evaluator import Split

logger = logging.getLogger(__name__)

COMPLETE = PartialLabels()
ANY_ENDING = ".*"
ENDINGS = (*PICTURES, ".npy", ".npz", ".mat", ".exr", ".pfm", ".hdr")      # of the files that ANY_ENDING stands for


class MultiTaskDataset:
    """Images with one label per task; a map-style data set of PyTorch.

    `dataset[(index, seed)]` applies `transform(sample, random.Random(seed))`; `dataset[index]` (evaluation)
    uses the index as seed. Sample before the transform: "image" H x W x 3 uint8 RGB, each task's label (maps: H x W x C
    float32 of the image's size), "meta" {"name": str, "size": (H, W)} and what the labels tell of the image
    (`LabelRules.known`). Without a transform that sample is returned.
    `labels` maps each wanted task to the rules of its label. `cache` keeps what the files hold, decoded.

    `partial_labels` says whether images may lack labels, and which of them are used: such a label is None in a sample
    without transform, and supervises nothing after one. `present` (images, tasks) bool has those that are used, in the
    order of `labels`; an image without any is left out. `elsewhere`: tasks among `labels` that this data set has not,
    because others of the same run have them (`data.mixture`).
    """

    draws: list[tuple[int, int]] | None = None      # see `data.mixture.MixedDataset`

    def __init__(self, spec: DatasetSpec, root: str | Path, split: str, labels: Mapping[str, LabelRules],
                 transform: Callable[[dict, random.Random], dict] | None = None, cache: DecodedCache | None = None,
                 partial_labels: PartialLabels = COMPLETE, elsewhere: Collection[str] = ()):
        if split not in spec.splits:
            raise ValueError(f"{spec.name} has no split {split!r}; valid: {', '.join(spec.splits)}")
        if absent := [name for name in labels if name not in spec.labels and name not in elsewhere]:
            raise ValueError(f"{spec.name} has no labels for {', '.join(absent)}; "
                             f"its tasks: {', '.join(spec.labels)}")
        self.spec, self.split, self.transform, self.cache = spec, split, transform, cache
        self.folder = find_folder(root, spec)
        self.labels = dict(labels)
        self.files = Files(self.folder)
        self.ids = spec.splits[split].ids(self.folder, spec.image.files[0])
        self.partial = partial_labels
        self.check_files()
        self.ids = self.select_ids()
        self.present = choose_labels(self._labels_there(), self.ids, partial_labels)
        if self.labels and not self.present.all():
            self._leave_out_unlabelled()
        if not self.ids:
            raise ValueError(f"split {split!r} of {spec.name} in {self.folder} lists no images")
        self._used = {name: row for name, row in zip(self.ids, self.present, strict=True) if not row.all()}

    def select_ids(self) -> list[str]:
        """The ids this run uses: where there is one task, or it is required, those whose label says something of it."""
        ids, own = self.ids, [task for task in self.labels if task in self.spec.labels]
        for task, label in ((task, self.spec.labels[task]) for task in own):
            dropped = label.required and self.partial.empty == "drop"
            if label.informs is not None and (dropped or len(self.labels) == 1):
                ids = [name for name in ids if not self._says_nothing(task, name, alone=not dropped)]
        if len(ids) < len(self.ids):
            logger.info("%s, split %s: %d of %d images are left out, whose labels say nothing", self.spec.name,
                        self.split, len(self.ids) - len(ids), len(self.ids))
        return ids

    def _says_nothing(self, task: str, name: str, alone: bool) -> bool:
        """Whether a label tells that there is nothing; a missing one tells so where no other task is trained."""
        if not self._is_there(task, name):
            return alone
        return not self.spec.labels[task].informs(*self.paths(task, name))

    def _labels_there(self) -> np.ndarray:
        """(images, tasks) bool: whether all files of a label exist."""
        there = np.zeros((len(self.ids), len(self.labels)), bool)
        for column, task in enumerate(self.labels):
            if task in self.spec.labels:
                there[:, column] = (self.partial.missing == "refuse"
                                    or [self._is_there(task, name) for name in self.ids])
        return there

    def _is_there(self, task: str, name: str) -> bool:
        return all(self.files.find(pattern, name) for pattern in self.patterns(task))

    def _leave_out_unlabelled(self) -> None:
        some = self.present.any(axis=1)
        self.ids = [name for name, has in zip(self.ids, some, strict=True) if has]
        self.present = self.present[some]
        counts = ", ".join(f"{task} {n}" for task, n in zip(self.labels, self.present.sum(axis=0), strict=True))
        logger.info("%s, split %s: %d images with labels (%s)%s", self.spec.name, self.split, len(self.ids), counts,
                    f"; {(~some).sum()} without any are left out" if not some.all() else "")

    @property
    def parts(self) -> tuple["MultiTaskDataset", ...]:
        """Itself; of a `data.mixture.MixedDataset` there are several."""
        return (self,)

    def maps_of(self, name: str) -> tuple[str, ...]:
        """What is read of an image: "image", and the tasks whose labels are used."""
        used = self._used.get(name)
        return ("image", *(self.labels if used is None else itertools.compress(self.labels, used)))

    def labelled(self, task: str) -> list[str]:
        """Ids of the images that have a label of this task."""
        column = list(self.labels).index(task)
        return [name for name, row in zip(self.ids, self.present, strict=True) if row[column]]

    def patterns(self, key: str) -> tuple[str, ...]:
        """Patterns of the files of one map, "image" or a task."""
        return (self.spec.image if key == "image" else self.spec.labels[key]).files

    def paths(self, key: str, name: str) -> tuple[Path, ...]:
        """Files of one map ("image" or a task) of the image with this id; those that are missing as they would be."""
        return self._located(self.patterns(key), name)

    def _located(self, patterns: tuple[str, ...], name: str) -> tuple[Path, ...]:
        return tuple(self.folder / (self.files.find(pattern, name) or pattern.split("|")[-1].format(id=name))
                     for pattern in patterns)

    def truth_files(self, task: str, name: str) -> tuple[Path, ...]:
        """Files of the boundary score's ground truth of the image with this id."""
        return self._located(self.spec.labels[task].boundary.files, name)

    def scored(self, task: str) -> Split:
        """What an evaluation of a task must know of these images."""
        return Split(self.spec.name, self.split, self.folder, tuple(self.labelled(task)),
                     self.spec.labels[task].boundary, partial(self.truth_files, task), bool(self.present.all()))

    def missing_files(self) -> list[Path]:
        """Files the split needs that are not there; lists each folder once: fast on network disks."""
        own = [task for task in self.labels if task in self.spec.labels]
        needed = ("image",) if self.partial.missing == "allow" else ("image", *own)
        patterns = dict.fromkeys(p for key in needed for p in self.patterns(key))
        return [self.folder / pattern.split("|")[-1].format(id=name) for pattern in patterns for name in self.ids
                if self.files.find(pattern, name) is None]

    def check_files(self) -> None:
        """Raises FileNotFoundError with the number of missing files and the first of them."""
        if missing := self.missing_files():
            shown = ", ".join(str(p.relative_to(self.folder)) for p in missing[:5])
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            raise FileNotFoundError(f"{len(missing)} file(s) of split {self.split!r} ({len(self.ids)} images) missing "
                                    f"in {self.folder}: {shown}{more}{self._explain()}")

    def _explain(self) -> str:
        """Why the first image that is not there may be missed."""
        [pattern] = self.spec.image.files
        unknown = next((name for name in self.ids if self.files.find(pattern, name) is None), None)
        if unknown is None:
            return "; partial_labels.missing=allow trains and scores with the labels that are there"
        folder = pattern.partition("{id}")[0].rpartition("/")[0]
        prefix = f"{folder}/" if folder else ""
        known = {id_of(f"{prefix}{file}", pattern) for file in self.files.names(folder)}
        return explain_unknown(unknown, known - {None})

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, key: int | tuple[int, int]) -> dict:
        index, seed = key if isinstance(key, tuple) else (key, key)
        sample = self.load(self.ids[index])
        return sample if self.transform is None else self.transform(sample, random.Random(seed))

    def read(self, key: str, name: str) -> Any:
        """One label, or the image, exactly as stored in its files (maps: own size, H x W x C)."""
        source = self.spec.image if key == "image" else self.spec.labels[key]
        return source.read(*self.paths(key, name))

    def load(self, name: str) -> dict:
        """Image and labels of one id, untransformed; labels of another size are resized to the image's."""
        maps = self._maps(name)
        size = maps["image"].shape[:2]
        labels, known = {}, {}
        for key, rules in self.labels.items():
            labels[key] = None
            if key in maps:
                self.check_geometry(key, name, size, rules.size_of(maps[key]))
                labels[key] = rules.fit(maps[key], size)
                known |= rules.known(labels[key])
        output = self.spec.output_name.format(id=name, stem=self.paths("image", name)[0].stem)
        return {"image": maps["image"], **labels, "meta": {"name": output, "size": size, **known}}

    def _maps(self, name: str) -> dict[str, Any]:
        """Image and labels as stored; maps come from the cache where there is one."""
        keys = self.maps_of(name)
        if self.cache is None:
            return {key: self.read(key, name) for key in keys}
        kept = [key for key in keys if key == "image" or self.labels[key].is_map]
        files = [path for key in kept for path in self.paths(key, name)]
        maps = self.cache.fetch(" ".join((str(self.folder), name, *map(self._contents, kept))), files,
                                lambda: {key: self.read(key, name) for key in kept})
        return maps | {key: self.read(key, name) for key in keys if key not in kept}

    def _contents(self, key: str) -> str:
        """What a map of the cache is: its name, and how a folder's description has it read."""
        read = (self.spec.image if key == "image" else self.spec.labels[key]).read
        return f"{key} {read}" if is_dataclass(read) else key

    def check_geometry(self, task: str, name: str, image: tuple[int, int], label: tuple[int, int] | None) -> None:
        """A label shows what its image shows: equal sides, or the same aspect ratio to within a pixel of either.

        1 x 1 pixels are the label of an image without any of the objects that the label is about; None: of no size.
        """
        nothing = self.spec.labels[task].informs is not None
        if label is None or label == image or (nothing if label == (1, 1) else
                                               self.labels[task].same_view(label, image)):
            return
        turned = self.labels[task].same_view(label[::-1], image)
        advice = (" (one of them is turned by 90 degrees: does the photograph carry an EXIF orientation?)" if turned
                  else ", another aspect ratio")
        raise ValueError(f"{self.paths(task, name)[0]} is {label[0]} x {label[1]} (height x width), its image "
                         f"{self.paths('image', name)[0]} {image[0]} x {image[1]}{advice}: they do not show the same")


class Files:
    """Which files there are below a folder; each sub-folder is listed once."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._names: dict[str, frozenset[str]] = {}
        self._stems: dict[str, dict[str, str]] = {}

    def names(self, folder: str) -> frozenset[str]:
        """File names in a sub-folder; none where it does not exist."""
        if folder not in self._names:
            path = self.folder / folder
            self._names[folder] = frozenset(os.listdir(path)) if path.is_dir() else frozenset()
        return self._names[folder]

    def find(self, pattern: str, name: str) -> str | None:
        """Path below the folder of the first alternative of a pattern that exists for this id."""
        for option in pattern.split("|"):
            relative = option.format(id=name)
            folder, _, file = relative.rpartition("/")
            if not file.endswith(ANY_ENDING):
                if file in self.names(folder):
                    return relative
            elif (found := self._stem(folder).get(file.removesuffix(ANY_ENDING))) is not None:
                return f"{folder}/{found}" if folder else found
        return None

    def _stem(self, folder: str) -> dict[str, str]:
        """Files of a sub-folder by their names without ending; two that differ in the ending alone are a ValueError."""
        if folder not in self._stems:
            stems: dict[str, str] = {}
            for file in sorted(self.names(folder)):
                stem, dot, ending = file.rpartition(".")
                if f"{dot}{ending}".lower() not in ENDINGS:
                    continue
                if stem in stems:
                    raise ValueError(f"{self.folder / folder} holds {stems[stem]} and {file}: which of them belongs to "
                                     f"{stem!r}? Remove one, or write the ending in the data set's file pattern")
                stems[stem] = file
            self._stems[folder] = stems
        return self._stems[folder]
