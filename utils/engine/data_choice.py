"""The keys `train_db_name` and `val_db_name`: a known data set by its name, a described folder, or several of them.

What they stand for is resolved when the experiment is read, so that a copy of it in a checkpoint needs no other file.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from data.datasets import DATASETS
from data.folder import folder_spec, with_names
from data.mixture import Part, merged_spec
from data.spec import DatasetSpec
from utils.engine.strict_yaml import read_strictly
from utils.engine.tasks import APART, TASKS, label_kinds
from utils.engine.yaml_files import merge
from utils.options import ConfigError, Options, Where, parse, shown

FILE = "dataset.yml"                 # of a folder that describes itself


@dataclass(frozen=True)
class PartOptions(Options):
    """What a data set of a mixture may say besides what it is."""

    weight: float | None = None              # of the images drawn from it; all or none of a mixture
    rename: dict[str, str] = field(default_factory=dict)     # tasks named apart: {semseg: semseg@street}

    def __post_init__(self):
        self.require(self.weight is None or 0 < self.weight < math.inf, "weight", "a finite number above 0, or empty")


@dataclass(frozen=True)
class DataChoice:
    """A data set, or several, as an experiment names it.

    given: the resolved value of the key; parts: the data sets; spec: what they have in common.
    """

    given: Any
    parts: tuple[Part, ...] = field(compare=False)
    spec: DatasetSpec = field(compare=False)

    @classmethod
    def from_yaml(cls, value: Any, key: str, where: Where) -> "DataChoice":
        """Of `NYUD`, `{folder: DIR, ...}`, or a list of `{name: NYUD}` and such groups with weights and new names."""
        several = isinstance(value, list) and len(value) > 0
        read = [_read_part(one, key, where) for one in (value if several else [value])]
        parts = tuple(part for _, part in read)
        try:
            spec = merged_spec(parts)
        except ValueError as error:
            raise ConfigError(f"{where(key)}: '{key}': {error}") from error
        given = [one for one, _ in read]
        labels = {task: spec.labels[task] for task in TASKS.in_order(spec.labels)}
        return cls(given if several else given[0], parts, replace(spec, labels=labels))

    def to_yaml(self) -> Any:
        """The key's value again."""
        return self.given

    def __str__(self) -> str:
        return self.spec.name


def check_choices(train: DataChoice, val: DataChoice, tasks: Sequence[str], image_size: tuple[int, int] | None,
                  refuse: Callable[[str, str], NoReturn]) -> None:
    """Calls `refuse(key, message)` for data that these tasks cannot be trained or scored with."""
    for choice, key in ((train, "train_db_name"), (val, "val_db_name")):
        spec = choice.spec
        absent = [task for task in tasks if task not in spec.labels]
        # A model may be scored on a data set that has some of its tasks.
        if absent and (choice is train or len(absent) == len(tasks)):
            refuse("task_dictionary", f"{choice} has no labels for {', '.join(absent)}; its tasks: "
                                      f"{', '.join(spec.labels)}")
        if idle := [part.spec.name for part in choice.parts if not set(tasks) & set(part.spec.labels)]:
            refuse(key, f"{idle[0]} has labels for none of the tasks ({', '.join(tasks)})")
        if image_size is None and len({part.spec.image_size for part in choice.parts}) > 1:
            refuse("image_size", f"'image_size' must be given: the data sets of {choice} have different ones")
        for task in set(tasks) & set(spec.labels):
            if difference := spec.labels[task].difference(train.spec.labels[task]):
                refuse("val_db_name", f"{task} of {choice} is not that of {train}: {difference}; a model that was "
                                      f"trained on {train} cannot be scored on {choice}")


def _read_part(value: Any, key: str, where: Where) -> tuple[Any, Part]:
    """One data set: the resolved value, and what it stands for."""
    if not isinstance(value, Mapping):
        name = _known_name(value, key, where)
        return name, Part(DATASETS.load(name))
    own = {name: value[name] for name in value if name in ("weight", "rename")}
    rest = {name: entry for name, entry in value.items() if name not in own}
    options = parse(PartOptions, own, f"{key}.", where)
    if "folder" in rest or set(rest) != {"name"}:
        rest, origin = _described(rest, key, where)
        spec = folder_spec(rest, label_kinds(), key, origin)
        if wrong := [task for task in spec.labels if not TASKS.is_name(task)]:
            raise ConfigError(f"{origin(f'{key}.tasks')}: {wrong[0]!r} is no name of a task; a further task like "
                              f"semseg is called semseg{APART}NAME, of letters, digits and underscores")
    else:
        rest = {"name": _known_name(rest["name"], key, where)}
        spec = DATASETS.load(rest["name"])
    return {**rest, **own}, Part(_renamed(spec, options.rename, key, where), options.weight)


def _known_name(value: Any, key: str, where: Where) -> str:
    try:
        return DATASETS.find(value)
    except ValueError as error:
        raise ConfigError(f"{where(key)}: '{key}': {error}; a folder of your own is {{folder: DIR, ...}} "
                          "(docs/own_data.md)") from error


def _renamed(spec: DatasetSpec, names: Mapping[str, str], key: str, where: Where) -> DatasetSpec:
    """The data set with some of its tasks named apart."""
    for old, new in names.items():
        if old not in spec.labels:
            raise ConfigError(f"{where(key)}: '{key}.rename' names {old!r}, which {spec.name} has no labels for; its "
                              f"tasks: {', '.join(spec.labels)}")
        if not TASKS.is_name(new) or new.partition(APART)[0] != old.partition(APART)[0]:
            raise ConfigError(f"{where(key)}: '{key}.rename.{old}' must be {old.partition(APART)[0]}{APART} and a "
                              f"name, got {shown(new)}")
    return replace(spec, labels={names.get(task, task): label for task, label in spec.labels.items()})


def _described(value: Mapping, key: str, where: Where) -> tuple[dict, Where]:
    """A folder's description, names of text files resolved, and where each of its keys comes from.

    A group without `tasks` takes what it does not say itself from `FILE` in the folder.
    """
    folder = value.get("folder")
    if not isinstance(folder, str) or not folder:
        raise ConfigError(f"{where(key)}: '{key}.folder' must be the folder of the data set, got {shown(folder)}")
    values = dict(value)
    if "tasks" not in value:
        path = Path(folder).expanduser() / FILE
        if not path.is_file():
            raise ConfigError(f"{where(key)}: '{key}' says nothing of tasks, and there is no {path}; describe the data "
                              "set in one of the two places (docs/own_data.md)")
        values = {**_read_file(path), **value}
        where = partial(_origin, inline=frozenset(value), path=str(path), where=where)
    try:
        return with_names(values), where
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{where(key)}: '{key}': {error}") from error


def _read_file(path: Path) -> dict:
    try:
        own = read_strictly(path.read_text(encoding="utf-8-sig"), str(path))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not valid YAML: not UTF-8 text ({error.reason} at byte {error.start})") from error
    if not isinstance(own, dict) or "folder" in own:
        raise ConfigError(f"{path} must hold 'key: value' lines (images, image_size, splits, tasks ...), not folder")
    return merge({}, own, str(path))


def _origin(key: str, inline: frozenset[str], path: str, where: Where) -> str:
    """The file that holds a dotted key such as "train_db_name.tasks.depth.unit"."""
    names = key.split(".")
    return where(key) if len(names) > 1 and names[1] in inline else path
