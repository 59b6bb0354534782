"""The keys `train_db_name` and `val_db_name`: a known data set by its name, or a described folder.

What they stand for is resolved when the experiment is read, so that a copy of it in a checkpoint needs no other file.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from data.datasets import DATASETS
from data.folder import folder_spec, with_names
from data.spec import DatasetSpec
from utils.engine.strict_yaml import read_strictly
from utils.engine.tasks import label_kinds
from utils.engine.yaml_files import merge
from utils.options import ConfigError, Where, shown

FILE = "dataset.yml"                 # of a folder that describes itself


@dataclass(frozen=True)
class DataChoice:
    """A data set as an experiment names it. given: the resolved value of the key; spec: what it stands for."""

    given: Any
    spec: DatasetSpec = field(compare=False)

    @classmethod
    def from_yaml(cls, value: Any, key: str, where: Where) -> "DataChoice":
        """Of `NYUD`, or `{folder: DIR, ...}`."""
        if isinstance(value, Mapping):
            values, where = _described(value, key, where)
            return cls(values, folder_spec(values, label_kinds(), key, where))
        try:
            name = DATASETS.find(value)
        except ValueError as error:
            raise ConfigError(f"{where(key)}: '{key}': {error}; a folder of your own is {{folder: DIR, ...}} "
                              "(docs/own_data.md)") from error
        return cls(name, DATASETS.load(name))

    def to_yaml(self) -> Any:
        """The key's value again."""
        return self.given

    def __str__(self) -> str:
        return self.spec.name


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
