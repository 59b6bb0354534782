"""A suite: which decoders, backbones and seeds are trained alike, on which data, and how their learning rate is found.

A suite file holds the keys of `Suite`. What is trained, a *cell*, is an ordinary experiment: the suite's `common` keys,
those of its backbone over them, those of its decoder over both. All cells are read and checked before one is run.
"""

import fnmatch
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import yaml

from utils.engine.config import Config, load_config
from utils.engine.data_choice import DataChoice
from utils.engine.yaml_files import merge, nearest_origin, read_yaml
from utils.options import ConfigError, Options, given, parse

SINGLE = "single"       # begins the names of the networks of one task each


@dataclass(frozen=True)
class Search(Options):
    """How every decoder's learning rate is found: short trainings, scored on images held out of the training split."""

    lr: tuple[float, ...] = ()
    max_iter: int = given(100, at_least=1)
    seed: int = given(100, at_least=0)         # none of the suite's seeds

    def __post_init__(self):
        self.require(all(rate > 0 for rate in self.lr), "lr", "a list of learning rates above 0")


@dataclass(frozen=True)
class Own(Options):
    """A folder of one's own: where it lies, and what describes it as a `dataset.yml` would, by the suite's file."""

    folder: str
    description: str
    weight: float | None = None                 # of several: as in `train_db_name`
    rename: dict[str, str] = field(default_factory=dict)

    def given(self, beside: Path) -> dict[str, Any]:
        """The entry of `train_db_name`."""
        described = read_yaml(beside / self.description)[0]
        own = {"weight": self.weight, "rename": self.rename}
        return {"folder": self.folder, **described, **{key: value for key, value in own.items() if value}}


@dataclass(frozen=True)
class Suite(Options):
    """The keys of a suite file.

    decoders, backbones: name -> experiment keys; `model` and `backbone` are the name where they are not given.
    data: `Own` folders, one or several, in the place of `train_db_name`.
    single_task: one of the decoders, whose networks of one task each are what delta_m compares with.
    ranked: whether the cells compete; then they must share everything that is not the decoder's own.
    band: of a score that is trained again, in parts of its record (`--check`).
    """

    title: str
    decoders: dict[str, Any]
    backbones: dict[str, Any]
    common: dict[str, Any]
    about: str = ""
    data: tuple[Any, ...] = ()
    single_task: str = ""
    seeds: tuple[int, ...] = (0, 1, 2)
    search: Search = field(default_factory=Search)
    ranked: bool = True
    band: float = given(0.1, above=0)

    def __post_init__(self):
        for name in ("decoders", "backbones"):
            self.require(getattr(self, name), name, "a group with one or more names")
        self.require(not self.single_task or self.single_task in self.decoders, "single_task", "one of the decoders")
        self.require(len(set(self.seeds)) == len(self.seeds) > 0, "seeds", "a list of different whole numbers")
        self.require(not self.search.lr or self.search.seed not in self.seeds, "seeds",
                     f"without search.seed ({self.search.seed}): the search must not see the runs it is for")


@dataclass(frozen=True)
class Cell:
    """One training of a suite. task: the only one of a single-task network, else empty."""

    suite: "LoadedSuite"
    decoder: str
    backbone: str
    seed: int
    task: str = ""

    @property
    def row(self) -> str:
        """What is the same for all seeds."""
        return "-".join(filter(None, (self.decoder, self.values["backbone"], self.task and f"{SINGLE}-{self.task}")))

    @property
    def name(self) -> str:
        return f"{self.row}-seed{self.seed}".replace(":", "_").replace("@", "_at_").replace("/", "_")

    @cached_property
    def values(self) -> dict[str, Any]:
        """The experiment's keys, as in its YAML file."""
        suite, source = self.suite.suite, str(self.suite.path)
        values = merge(suite.common, {"backbone": self.backbone, **suite.backbones[self.backbone]}, source)
        values = merge(values, {"model": self.decoder, **suite.decoders[self.decoder]}, source)
        values["seed"] = self.seed
        if self.suite.data:
            values["train_db_name"] = self.suite.data[0] if len(self.suite.data) == 1 else list(self.suite.data)
        if self.task:
            values["task_dictionary"] = {f"include_{self.task}": True}
            if isinstance(values["train_db_name"], list):
                values["train_db_name"] = [part for part in values["train_db_name"] if _has(part, self.task, source)]
            scheme = values.get("loss_kwargs")
            if isinstance(scheme, dict) and self.task in (scheme.get("loss_weights") or {}):
                values["loss_kwargs"] = {**scheme, "loss_weights": {self.task: 1.0}}
        return values

    def config(self, folder: Path, **keys: Any) -> Config:
        """The experiment with some keys set, as its file in `folder` says from now on; its run will lie there, too."""
        folder.mkdir(parents=True, exist_ok=True)
        values = merge({**self.values, "version_name": self.name, "out_dir": str(folder)}, keys, str(self.suite.path))
        self.file(folder).write_text(yaml.safe_dump(values, sort_keys=False), encoding="ascii")
        return load_config(self.file(folder))

    def file(self, folder: Path) -> Path:
        return folder / f"{self.name}.yml"


def _has(part: Mapping, task: str, source: str) -> bool:
    """Whether a data set of a mixture has labels of a task."""
    return task in DataChoice.from_yaml([part], "train_db_name", lambda key: source).spec.labels


@dataclass(frozen=True)
class LoadedSuite:
    """A suite, its file, and the resolved entries of its data."""

    suite: Suite
    path: Path
    data: tuple[Mapping[str, Any], ...]

    @property
    def name(self) -> str:
        return self.path.stem

    def cells(self, tasks: Sequence[str]) -> list[Cell]:
        """All of them: seed by seed, so that a suite that is cut short has whole columns of fewer seeds."""
        cells = []
        for seed, backbone in itertools.product(self.suite.seeds, self.suite.backbones):
            cells += [Cell(self, decoder, backbone, seed) for decoder in self.suite.decoders]
            if self.suite.single_task:
                cells += [Cell(self, self.suite.single_task, backbone, seed, task) for task in tasks]
        return cells


def load_suite(path: Path) -> LoadedSuite:
    """Reads a suite file. Raises ConfigError, or OSError where a file is missing."""
    values, origin = read_yaml(path)
    where = partial(nearest_origin, origin=origin, source=str(path))
    for name in ("decoders", "backbones"):                 # null drops what a _base_ file has
        if isinstance(values.get(name), dict):
            values[name] = {key: value for key, value in values[name].items() if value is not None}
    suite = parse(Suite, values, where=where)
    data = [parse(Own, own, f"data.{number}.", where) for number, own in enumerate(suite.data)]
    return LoadedSuite(suite, path, tuple(own.given(path.parent) for own in data))


def checked_cells(loaded: LoadedSuite, folder: Path, only: Sequence[str] = (), share: tuple[int, int] = (0, 1),
                  ) -> list[tuple[Cell, Config]]:
    """The cells and their experiments; ConfigError that names the cell whose experiment is wrong.

    only: patterns of names (`bim-*`). share: (which, of how many): every n-th row with its seeds, for arrays of jobs.
    """
    first = Cell(loaded, next(iter(loaded.suite.decoders)), next(iter(loaded.suite.backbones)), loaded.suite.seeds[0])
    cells = loaded.cells(_read(first, folder).tasks)
    if len({cell.name for cell in cells}) < len(cells):
        raise ConfigError(f"{loaded.path}: two cells would have one name; name decoders and backbones differently")
    chosen = [cell for cell in cells if not only or any(fnmatch.fnmatch(cell.name, pattern) for pattern in only)]
    if not chosen:
        raise ConfigError(f"--only {' '.join(only)}: no cell of {loaded.path} is called so; the first of "
                          f"{len(cells)} is {cells[0].name}")
    mine = list(dict.fromkeys(cell.row for cell in chosen))[share[0]::share[1]]
    return [(cell, _read(cell, folder)) for cell in chosen if cell.row in mine]


def _read(cell: Cell, folder: Path) -> Config:
    try:
        config = cell.config(folder)
    except ConfigError as error:
        raise ConfigError(f"{cell.suite.path}: the cell {cell.name}: {error}") from error
    if cell.suite.suite.search.lr and not config.val_from_train:
        raise ConfigError(f"{cell.suite.path}: the search for learning rates needs val_from_train above 0 in `common`: "
                          "the test split must not choose")
    return config
