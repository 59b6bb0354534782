"""Experiment files: YAML in, one typed `Config` out, parsed once.

The keys are those of this field's experiment files (InvPT, TaskPrompter, MLoRE, BridgeNet, MTMamba), so existing
files load; keys that are ours have defaults. Four layers, later ones win: `_base_` files, the file, `key=value`
arguments, and for the data folder alone `configs/mypath.py` < the file < $DB_ROOT < `db_root=`.
A mistake stops here, with the file, the key, the value and what would be right.
"""

import dataclasses
import difflib
import os
import runpy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml

from data.datasets import DATASETS
from evaluation.boundary import BoundarySettings
from utils.engine.official_files import translate
from utils.engine.tasks import TASKS, TaskContext, reference_keys
from utils.engine.yaml_files import ConfigError, assign, nearest_origin, parse_dataclass, parse_scalar, read_yaml

# Which tasks are on, `include_<task>` for every row of the table, and the weight of the edge class in its loss.
TaskDictionary = make_dataclass(
    "TaskDictionary",
    [*((f"include_{name}", bool, field(default=False)) for name in TASKS), ("edge_w", float, field(default=0.95))],
    frozen=True)


@dataclass(frozen=True)
class OptimizerKwargs:
    """`betas`, `eps` are read by adam and adamw, `momentum`, `nesterov` by sgd."""

    lr: float = 1e-4
    weight_decay: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.9
    nesterov: bool = False


@dataclass(frozen=True)
class SchedulerKwargs:
    """lr(k) = min_lr + (lr - min_lr) (1 - k / max_iter)^power, times min(1, (k + 1) / warmup_iters)."""

    power: float = 0.9
    min_lr: float = 0.0
    warmup_iters: int = 0


@dataclass(frozen=True)
class LossKwargs:
    """How the task losses are combined.

    `loss_scope: process` takes every loss over the mini-batch of one process, as the lineage does; then the result
    depends on the number of processes. `image` takes each image by itself and averages, which does not, and equals
    the lineage's recipes of one image per process. `intermediate_weight`: factor of the preliminary predictions'
    losses; empty: the published one of the decoder, 1 or (BridgeNet) 0.5.
    """

    loss_scheme: Literal["weighted_sum", "log"] = "weighted_sum"
    loss_weights: dict[str, float] = field(default_factory=dict)
    loss_scope: Literal["process", "image"] = "process"
    intermediate_weight: float | None = None


@dataclass(frozen=True)
class GradClip:
    """Largest gradient norm; `inf` only measures it."""

    max_norm: float = float("inf")
    norm_type: float = 2.0


@dataclass(frozen=True)
class Augmentation:
    """Training augmentation (the lineage's values by default)."""

    scale_range: tuple[float, float] = (0.5, 2.0)
    flip_prob: float = 0.5
    photometric: bool = True
    always_guide_crop: bool = False              # read the label that guides crops even where it is no task of the run


@dataclass(frozen=True)
class Config:
    """One experiment. Field names are the YAML keys."""

    # what is trained
    model: str                                   # decoder, or the lineage's name of it
    backbone: str
    train_db_name: str
    val_db_name: str
    task_dictionary: TaskDictionary
    version_name: str = ""                       # default: the file's name
    out_dir: str = "runs"                        # everything of a run is in out_dir/version_name
    db_root: str = ""
    head: str = "default"
    backbone_kwargs: dict[str, Any] = field(default_factory=dict)
    neck: Literal["none", "pyramid"] = "none"
    neck_kwargs: dict[str, Any] = field(default_factory=dict)
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    pretrained: bool | str = False               # true: the backbone's usual weights; a timm tag; or a file
    pretrained_allow_missing: tuple[str, ...] = ()
    image_size: tuple[int, int] | None = None    # (height, width) of the network's input; default: the data set's
    intermediate_supervision: bool = False
    ignore_index: int = 255
    # data
    trBatch: int = 1                             # images per process
    valBatch: int = 1
    nworkers: int = 2
    augmentation: Augmentation = field(default_factory=Augmentation)
    # schedule
    max_iter: int = 40000
    epochs: int = 999999
    val_interval: int = 1000
    checkpoint_interval: int = 0                 # keep step_N.pt every N steps besides last.pt and best.pt; 0: none
    log_interval: int = 20
    global_batch: int = 0                        # images per update; 0: trBatch * processes (no accumulation)
    optimizer: Literal["adam", "adamw", "sgd"] = "adamw"
    optimizer_kwargs: OptimizerKwargs = field(default_factory=OptimizerKwargs)
    scheduler: Literal["poly"] = "poly"
    scheduler_kwargs: SchedulerKwargs = field(default_factory=SchedulerKwargs)
    loss_kwargs: LossKwargs = field(default_factory=LossKwargs)
    grad_clip_param: GradClip = field(default_factory=GradClip)
    ema_decay: float = 0.0                       # 0: no moving average
    seed: int = 0
    # machine
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    compile: bool = False                        # torch.compile of backbone and decoder
    activation_checkpointing: Literal["none", "backbone", "decoder", "all"] = "none"   # less memory, more arithmetic
    channels_last: bool = False                  # memory format of convolutions
    scan_backend: Literal["auto", "triton", "cpp", "mamba_ssm", "torch", "reference"] = "auto"
    find_unused_parameters: bool = False
    tensorboard: bool = True
    progress: bool = True                        # progress bars
    eval_at_start: bool = False                  # also score the untrained model
    # boundary score: `fast` takes every eighth image; docs/boundary.md
    boundary_infer: Literal["off", "fast", "exact"] = "exact"            # in --run_mode infer
    boundary_eval: Literal["off", "fast", "exact"] = "off"               # in the evaluations of a training
    boundary_kwargs: BoundarySettings = field(default_factory=BoundarySettings)
    # reporting
    single_task_scores: dict[str, float] = field(default_factory=dict)   # for delta_m: {semseg: 0.5, edge/odsF: 0.7}

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the active tasks, in the table's order, whatever the order in the file."""
        return tuple(name for name in TASKS if getattr(self.task_dictionary, f"include_{name}"))

    @property
    def dataset(self):
        """The `DatasetSpec` of the training data set."""
        return DATASETS[self.train_db_name].spec

    @property
    def input_size(self) -> tuple[int, int]:
        """(height, width) of the network's input."""
        return self.image_size or self.dataset.image_size

    @property
    def label_size(self) -> tuple[int, int] | None:
        """(height, width) of labels and predictions where it is not that of the input."""
        size = self.model_kwargs.get("dd_label_map_size")
        return tuple(size) if size else self.dataset.label_size

    @property
    def run_dir(self) -> Path:
        """Everything of this run lies here."""
        return Path(self.out_dir) / self.version_name

    def task_context(self, task: str) -> TaskContext:
        """What the task's loss, meter and colours need."""
        return TaskContext(self.dataset.tasks[task], self.ignore_index, self.task_dictionary.edge_w,
                           self.dataset.class_names.get(task, ()), self.dataset.depth_range,
                           self.dataset.colours.get(task, ()))

    def to_dict(self) -> dict:
        """Plain containers, ready for YAML or a checkpoint; `config_from_dict` reads it back."""
        return _plain(dataclasses.asdict(self))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads an experiment file with its `_base_` files and `key=value` overrides. Raises ConfigError or OSError."""
    path = Path(path)
    values, origin = read_yaml(path, ())
    values.setdefault("version_name", path.stem)
    return _build(values, origin, overrides, str(path))


def config_from_dict(values: Mapping, source: str, overrides: Sequence[str] = ()) -> Config:
    """The `Config` of `Config.to_dict()` (as stored in checkpoints), with `key=value` overrides."""
    return _build(dict(values), {}, overrides, source)


def save_config(config: Config, path: Path) -> None:
    """Writes the resolved configuration; it loads again with `load_config`."""
    path.write_text(yaml.safe_dump(config.to_dict(), sort_keys=False), encoding="ascii")


def _build(values: dict, origin: dict[str, str], overrides: Sequence[str], source: str) -> Config:
    db_root_from_file = bool(values.get("db_root"))
    for override in overrides:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ConfigError(f"argument '{override}' is not of the form key=value, e.g. optimizer_kwargs.lr=1e-4")
        assign(values, key.split("."), parse_scalar(text, override), override)
        origin[key] = "the command line"
    if "db_root" not in origin or origin["db_root"] != "the command line":
        if os.environ.get("DB_ROOT"):
            values["db_root"], origin["db_root"] = os.environ["DB_ROOT"], "$DB_ROOT"
        elif not db_root_from_file:
            values["db_root"], origin["db_root"] = _mypath_db_root()
    values = translate(values, source)
    config = parse_dataclass(Config, values, "", lambda key: origin.get(key) or nearest_origin(key, origin, source))
    _check_relations(config, source)
    return config


def _mypath_db_root() -> tuple[str, str]:
    path = Path(__file__).resolve().parents[2] / "configs" / "mypath.py"
    if not path.is_file():
        return "", ""
    names = runpy.run_path(str(path))
    if not isinstance(names.get("db_root"), str):
        raise ConfigError(f"{path} must define db_root = '/path/to/the/data/folder'")
    root = Path(names["db_root"])
    return str(root if root.is_absolute() else path.parent.parent / root), str(path)


def _check_relations(c: Config, source: str) -> None:
    """Refuses what no single key can tell: combinations that cannot be trained."""
    def refuse(message: str) -> NoReturn:
        raise ConfigError(f"{source}: {message}")

    for key in ("train_db_name", "val_db_name"):
        name = getattr(c, key)
        if name not in DATASETS:
            near = difflib.get_close_matches(name, DATASETS, n=1)
            refuse(f"{key} '{name}' is not known; " + (f"did you mean '{near[0]}'? " if near else "")
                   + f"known data sets: {', '.join(DATASETS)}")
    if not c.tasks:
        refuse(f"no task is on; set one of task_dictionary.include_{{{','.join(TASKS)}}}")
    for name in (c.train_db_name, c.val_db_name):
        if absent := [t for t in c.tasks if t not in DATASETS[name].spec.tasks]:
            refuse(f"{name} has no labels for {', '.join(absent)}; its tasks: {', '.join(DATASETS[name].spec.tasks)}")
    weights, single = c.loss_kwargs.loss_weights, c.single_task_scores
    for key, group, known in (("loss_kwargs.loss_weights", weights, TASKS),
                              ("single_task_scores", single, reference_keys())):
        if unknown := group.keys() - known.keys():
            refuse(f"{key} names unknown task(s) {', '.join(sorted(unknown))}; known: {', '.join(known)}")
    if weights and (lacking := [t for t in c.tasks if t not in weights]):
        refuse(f"loss_kwargs.loss_weights lacks {', '.join(lacking)}")
    for key in ("trBatch", "valBatch", "max_iter", "epochs", "val_interval", "log_interval"):
        if getattr(c, key) < 1:
            refuse(f"'{key}' must be at least 1, got {getattr(c, key)}")
    for key in ("nworkers", "global_batch", "checkpoint_interval", "seed"):
        if getattr(c, key) < 0:
            refuse(f"'{key}' must not be negative, got {getattr(c, key)}")
    if c.boundary_kwargs.workers is not None and c.boundary_kwargs.workers < 0:
        refuse(f"boundary_kwargs.workers must not be negative, got {c.boundary_kwargs.workers}")
    if c.boundary_kwargs.max_dist is not None and not 0 < c.boundary_kwargs.max_dist < 1:
        refuse(f"boundary_kwargs.max_dist is a share of the diagonal, in (0, 1); got {c.boundary_kwargs.max_dist}")
    if c.scheduler_kwargs.warmup_iters >= c.max_iter:
        refuse(f"scheduler_kwargs.warmup_iters {c.scheduler_kwargs.warmup_iters} must be below max_iter {c.max_iter}")
    if c.optimizer_kwargs.lr <= 0:
        refuse(f"optimizer_kwargs.lr must be positive, got {c.optimizer_kwargs.lr}")
    if not 0 <= c.ema_decay < 1:
        refuse(f"ema_decay must be in [0, 1), got {c.ema_decay}")
    if not 0 < c.augmentation.scale_range[0] <= c.augmentation.scale_range[1]:
        refuse(f"augmentation.scale_range must be two growing positive numbers, got {list(c.augmentation.scale_range)}")
    _check_label_size(c, refuse)


def _check_label_size(c: Config, refuse: Callable[[str], NoReturn]) -> None:
    size = c.model_kwargs.get("dd_label_map_size")
    if size is None:
        return
    if not isinstance(size, (list, tuple)) or len(size) != 2:
        refuse(f"model_kwargs.dd_label_map_size must be [height, width], got {size!r}")
    if c.dataset.label_size is None and tuple(size) != c.input_size:
        refuse(f"model_kwargs.dd_label_map_size {list(size)} must be the image size {list(c.input_size)}: labels "
               f"of {c.train_db_name} have no size of their own")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
