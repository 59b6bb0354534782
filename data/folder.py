"""A data set of one's own: a folder that a group of YAML describes.

`{folder: DIR, images: photos, splits: {val: 0.2}, image_size: [480, 640], tasks: {semseg: {classes: names.txt}}}`. The
tutorial docs/own_data.md explains every key. The group becomes a `data.spec.DatasetSpec` like those of the known data
sets; resolved, it holds everything but the files, so that a checkpoint's copy of it needs none.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data.label_files import ImageFile
from data.label_kinds import LABEL_KINDS, read_names
from data.spec import DatasetSpec, LabelSpec, Source
from data.splits import WILDCARDS, SplitGlob, SplitList, SplitRule
from utils.options import ConfigError, Options, Where, given, nearest, parse


@dataclass(frozen=True)
class FolderOptions(Options):
    """The keys of a folder's description."""

    folder: str
    image_size: tuple[int, int] = given()        # (height, width) of the network's input
    splits: dict[str, Any] = given()             # a list, a pattern, or a share of the images, for train and val
    tasks: dict[str, Any] = given()              # task -> what its labels are (`data.label_kinds`)
    name: str = ""                               # default: the folder's
    images: str = "images"
    resize: Literal["none", "fit", "stretch"] = "fit"
    exif: Literal["refuse", "stored", "upright"] = "refuse"

    def __post_init__(self):
        self.require(min(self.image_size) > 0, "image_size", "a height and a width of at least 1")
        self.require(set(self.splits) <= {"train", "val"} and self.splits, "splits",
                     "a group of train and val: lists (train.txt), patterns (images/train/*.jpg) or shares (0.2)")
        self.require(all(isinstance(v, str) or _is_share(v) for v in self.splits.values()), "splits",
                     "names of lists, patterns of images, or shares in (0, 1)")
        shares = [v for v in self.splits.values() if _is_share(v)]
        self.require(not shares or (len(shares) == len(self.splits) and sum(shares) <= 1 + 1e-9), "splits",
                     "either shares that add up to at most 1, or lists and patterns")
        self.require(self.tasks, "tasks", "a group with a group for every task that has labels")
        self.require(_pattern(self.images).count("{id}") == 1, "images", "a folder, or a pattern with one {id}")


def with_names(values: Mapping) -> dict:
    """A description with the lines of text files in the place of their names (`classes: names.txt`)."""
    listed = {name for kind in LABEL_KINDS.values() for name in kind.listed}
    folder, tasks = Path(str(values.get("folder"))).expanduser(), values.get("tasks")
    if not isinstance(tasks, Mapping):
        return dict(values)
    resolved = {task: {name: read_names(folder / value) if name in listed and isinstance(value, str) else value
                       for name, value in group.items()} if isinstance(group, Mapping) else group
                for task, group in tasks.items()}
    return {**values, "tasks": resolved}


def folder_spec(values: Mapping, kinds: Mapping[str, str], key: str, where: Where) -> DatasetSpec:
    """The specification of a described folder. kinds: task -> the kind of its labels, in the task table's order."""
    options = parse(FolderOptions, values, f"{key}.", where, " of a data set's description")
    labels = {}
    for task, group in options.tasks.items():
        labels[task] = _label(task, group, kinds, f"{key}.tasks.{task}", where)
    folder = Path(options.folder).expanduser()
    images = _pattern(options.images)
    return DatasetSpec(
        name=options.name or folder.resolve().name, folder=str(folder.absolute()),
        image=Source((images,), ImageFile(options.exif)),
        labels={task: labels[task] for task in sorted(labels, key=[*kinds, *labels].index)},
        splits=_splits(options.splits, images), image_size=options.image_size, resize=options.resize)


def _label(task: str, group: Any, kinds: Mapping[str, str], key: str, where: Where) -> LabelSpec:
    if not isinstance(group, Mapping):
        raise ConfigError(f"{where(key)}: '{key}' must be a group that says what its labels are (empty: {{}}), got "
                          f"{group!r}")
    group = dict(group)
    base = task.partition("@")[0]
    kind = group.pop("kind", kinds.get(base))
    if base not in kinds:
        raise ConfigError(f"{where(key)}: unknown task '{task}'; {nearest(base, kinds)}")
    if kind not in LABEL_KINDS:
        raise ConfigError(f"{where(key)}: '{key}.kind' must be one of {', '.join(LABEL_KINDS)}, got {kind!r}")
    options = parse(LABEL_KINDS[kind], group, f"{key}.", where, f" of labels of kind {kind}")
    files = _pattern(options.files or base)
    if "{id}" not in files:
        raise ConfigError(f"{where(key)}: '{key}.files' must be a folder or a pattern with {{id}}, got {files!r}")
    return options.spec((files,))


def _splits(splits: Mapping[str, Any], images: str) -> dict[str, SplitRule]:
    if all(isinstance(value, str) for value in splits.values()):
        return {split: SplitGlob(value) if WILDCARDS & set(value) else SplitList(value)
                for split, value in splits.items()}
    head, _, tail = images.partition("{id}")
    every, val = f"{head}**/*{tail.removesuffix('.*')}", float(splits.get("val", 0))
    train = float(splits.get("train", 1 - val))
    return {"train": SplitGlob(every, (val, val + train)), "val": SplitGlob(every, (0.0, val))}


def _pattern(text: str) -> str:
    return text if "{id}" in text or not text else f"{text.rstrip('/')}/{{id}}.*"


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 1
