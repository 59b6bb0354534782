"""Groups of keys of an experiment file that belong to no entry of a table: tasks, losses, clipping, augmentation."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from losses.balancing import BALANCING
from utils.engine.tasks import TASKS
from utils.options import ConfigError, Options, Where, choice, given, nearest, options_of, parse, shown

SWITCH = "include_"                 # of a task in `task_dictionary`


@dataclass(frozen=True)
class TaskDictionary:
    """The key `task_dictionary`: a switch `include_<task>` for every task, and the weight of the edge class."""

    tasks: tuple[str, ...]          # those that are on, in the table's order, whatever the order in the file
    edge_w: float = 0.95

    @classmethod
    def from_yaml(cls, values: Any, key: str, where: Where) -> "TaskDictionary":
        """Of `{include_semseg: true, ..., edge_w: 0.95}`."""
        if not isinstance(values, Mapping):
            raise ConfigError(f"{where(key)}: '{key}' must be a group of switches such as include_{next(iter(TASKS))}: "
                              f"true, got {shown(values)}")
        known = [*(f"{SWITCH}{task}" for task in TASKS), "edge_w"]
        for name, value in values.items():
            place = f"{key}.{name}"
            if name not in known and not (name.startswith(SWITCH) and TASKS.is_name(name.removeprefix(SWITCH))):
                raise ConfigError(f"{where(place)}: unknown key '{place}'; {nearest(name, known)}")
            if name != "edge_w" and not isinstance(value, bool):
                raise ConfigError(f"{where(place)}: '{place}' must be true or false, got {shown(value)}")
        on = tuple(TASKS.in_order(name.removeprefix(SWITCH) for name, value in values.items()
                                  if name.startswith(SWITCH) and value))
        if not on:
            raise ConfigError(f"{where(key)}: no task is on; set one of {key}.{SWITCH}{{{','.join(TASKS)}}}")
        weights = parse(_EdgeWeight, {k: v for k, v in values.items() if k == "edge_w"}, f"{key}.", where)
        return cls(on, weights.edge_w)

    def to_yaml(self) -> dict[str, Any]:
        """The same group again."""
        switches = {f"{SWITCH}{task}": task in self.tasks for task in (*TASKS, *self.tasks)}
        return {**switches, "edge_w": self.edge_w}


@dataclass(frozen=True)
class _EdgeWeight(Options):
    edge_w: float = 0.95

    def __post_init__(self):
        self.require(0 <= self.edge_w <= 1, "edge_w", "a weight in [0, 1]")


@dataclass(frozen=True)
class LossKwargs(Options):
    """How the task losses are combined.

    `loss_scope: process` takes every loss over the mini-batch of one process, as published; then the result depends on
    the number of processes. `image` takes each image by itself and averages, which does not, and equals the published
    recipes of one image per process. `intermediate_weight`: factor of the preliminary predictions' losses; empty: the
    published one of the decoder, 1 or (BridgeNet) 0.5.
    """

    loss_scheme: str = choice(BALANCING, "weighted_sum")
    scheme_kwargs: Any = options_of("loss_scheme")
    loss_weights: dict[str, float] = field(default_factory=dict)
    loss_scope: Literal["process", "image"] = "process"
    intermediate_weight: float | None = None

    def __post_init__(self):
        self.require(all(0 <= weight < math.inf for weight in self.loss_weights.values()), "loss_weights",
                     "finite numbers of at least 0")
        self.require(self.intermediate_weight is None or 0 <= self.intermediate_weight < math.inf,
                     "intermediate_weight", "a finite number of at least 0, or empty")


@dataclass(frozen=True)
class SaveInterval:
    """A checkpoint is due `steps` updates or `minutes` after the one before, whichever comes first; 0: never by these.

    There is one before and after every evaluation in any case.
    """

    steps: int = given(0, at_least=0)
    minutes: float = given(10.0, at_least=0)


@dataclass(frozen=True)
class GradClip:
    """Largest gradient norm; `inf` only measures it."""

    max_norm: float = given(math.inf, above=0)
    norm_type: float = given(2.0, above=0)


@dataclass(frozen=True)
class DataCache:
    """Where decoded files are kept for the next epoch (`data.cache`): a folder on a fast disk, empty for none."""

    folder: str = ""
    max_gb: float = given(50.0, above=0)


@dataclass(frozen=True)
class AtTestTime(Options):
    """What evaluations and predictions do beyond one look at an image (`utils.engine.test_time`)."""

    flip: bool = False                           # also the mirrored image
    scales: tuple[float, ...] = (1.0,)           # the image enlarged so many times
    windows: bool = False                        # larger images are not shrunk or refused: windows slide over them
    overlap: float = 0.5                         # of neighbouring windows, a share of their sides
    ema: bool = True                             # with the moving average of the weights, where there is one

    def __post_init__(self):
        self.require(self.scales and all(0.1 <= scale <= 10 for scale in self.scales)
                     and len(set(self.scales)) == len(self.scales), "scales", "different numbers in [0.1, 10]")
        self.require(0 <= self.overlap <= 0.9, "overlap", "a share in [0, 0.9]")

    @property
    def averages(self) -> bool:
        """Whether predictions of several looks are averaged."""
        return self.flip or self.windows or self.scales != (1.0,)


@dataclass(frozen=True)
class Augmentation(Options):
    """Training augmentation (the published values by default)."""

    scale_range: tuple[float, float] = (0.5, 2.0)
    flip_prob: float = 0.5
    fixed_flip_prob: float = 0.0                 # the same for data sets that are not augmented otherwise (Cityscapes)
    photometric: bool = True                     # brightness, contrast, saturation and hue
    photometric_on_device: bool = False          # changed where the network runs, which spares the workers
    always_guide_crop: bool = False              # read the label that guides crops even where it is no task of the run

    def __post_init__(self):
        self.require(0.01 <= self.scale_range[0] <= self.scale_range[1] <= 100, "scale_range",
                     "two growing numbers in [0.01, 100]")
        for name in ("flip_prob", "fixed_flip_prob"):
            self.require(0 <= getattr(self, name) <= 1, name, "a probability")
        self.require(self.photometric or not self.photometric_on_device, "photometric_on_device",
                     "false where photometric is")
