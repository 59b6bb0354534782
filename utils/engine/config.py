"""Experiment files: YAML in, one typed `Config` out, parsed once.

The keys are those of this field's experiment files, so existing files load (`official_files` translates what differs);
keys that are ours have defaults. Later layers win: `_base_` files, the file, `key=value` arguments. The data folder is
that of `db_root=`, else $DB_ROOT, else the file's, else `configs/mypath.py`'s.
A mistake stops here, with the file, the key, the value and what would be right, before PyTorch has been loaded. What an
option of a decoder, a backbone, an optimizer ... may be is said by its own options class, which the tables know.
"""

import dataclasses
import math
import os
import runpy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml

from data.labels import VOID
from data.partial import PartialLabels
from data.spec import DatasetSpec
from evaluation.boundary.settings import BoundarySettings, Mode
from losses.detection3d.options import Detection3DOptions
from models.backbones import BACKBONES
from models.decoders import DECODERS
from models.lora.settings import LoraSettings
from models.necks import NECKS
from models.ops import SCAN_BACKENDS
from utils.engine.config_groups import (
    AtTestTime,
    Augmentation,
    DataCache,
    GradClip,
    LossKwargs,
    SaveInterval,
    TaskDictionary,
)
from utils.engine.data_choice import DataChoice, check_choices
from utils.engine.official_files import translate
from utils.engine.optimizers import OPTIMIZERS
from utils.engine.schedules import SCHEDULES
from utils.engine.tasks import TASKS
from utils.engine.yaml_files import apply_overrides, nearest_origin, read_yaml
from utils.options import ConfigError, OptionError, Where, choice, given, nearest, options_of, parse, shown


@dataclass(frozen=True)
class Config:
    """One experiment. Field names are the YAML keys."""

    # what is trained
    model: str = choice(DECODERS)                # the decoder
    backbone: str = choice(BACKBONES)            # what makes feature maps of the image
    train_db_name: DataChoice                    # a known data set, {folder: DIR}, or a list of several
    val_db_name: DataChoice                      # default: the training data, whose split "val" is scored
    task_dictionary: TaskDictionary              # which tasks: {include_semseg: true, ...}
    version_name: str = ""                       # default: the file's name; may hold a folder, never leave out_dir
    out_dir: str = "runs"                        # everything of a run is in out_dir/version_name
    resume: Literal["never", "auto"] = "never"   # auto: as with --resume, where there is something to resume
    db_root: str = ""                            # the data folder; default: $DB_ROOT, else configs/mypath.py
    backbone_kwargs: Any = options_of("backbone", resolved=False)   # options of the backbone
    neck: str = choice(NECKS, "none")            # what stands between backbone and decoder
    neck_kwargs: Any = options_of("neck", resolved=False)   # options of the neck
    model_kwargs: Any = options_of("model", resolved=False)   # options of the decoder
    pretrained: bool | str = False               # true: the backbone's usual weights; a timm tag; or a file
    pretrained_allow_missing: tuple[str, ...] = ()   # layers that may be missing in that file
    init_from: str = ""                          # a checkpoint, ours or released: what fits of it, the rest is listed
    lora: LoraSettings = field(default_factory=LoraSettings)     # adapters of low rank on weights that stay
    image_size: tuple[int, int] | None = None    # (height, width) of the network's input; default: the data set's
    label_size: tuple[int, int] | None = None    # (height, width) of labels and predictions; default: the data set's
    det3d_kwargs: Detection3DOptions = field(default_factory=Detection3DOptions)   # head and targets of 3-D detection
    intermediate_supervision: bool = False       # also losses of the decoder's preliminary predictions
    ignore_index: int = 255                      # marks void in labels; 255 is the only value
    # data
    trBatch: int = given(1, at_least=1)          # images per process
    valBatch: int = given(1, at_least=1)         # images in one pass of an evaluation, and of predict on a GPU
    nworkers: int = given(2, at_least=0, at_most=256)   # processes (predict: threads) that read files
    augmentation: Augmentation = field(default_factory=Augmentation)   # of training images
    partial_labels: PartialLabels = field(default_factory=PartialLabels)   # images without some labels, and subsets
    val_from_train: float = given(0.0, at_least=0, at_most=0.5)     # part of the training split to select by; 0: test
    data_cache: DataCache = field(default_factory=DataCache)   # decoded files on a fast disk
    skip_data_check: bool = False                # start without reading every file first (`utils.engine.data_check`)
    # schedule
    max_iter: int = given(40000, at_least=1)     # updates of the training
    epochs: int = given(999999, at_least=1)      # passes over the data; whichever of both ends first
    val_interval: int = given(1000, at_least=1)   # updates between two evaluations
    checkpoint_interval: int = given(0, at_least=0)   # keep step_N.pt every N steps; 0: no
    save_interval: SaveInterval = field(default_factory=SaveInterval)   # when last.pt is written
    log_interval: int = given(20, at_least=1)    # updates between two lines of the log
    global_batch: int = given(0, at_least=0)     # images per update; 0: trBatch * processes (no accumulation)
    optimizer: str = choice(OPTIMIZERS, "adamw")   # AdamW, SGD ..., or any of timm's
    optimizer_kwargs: Any = options_of("optimizer")   # options of the optimizer, among them lr
    scheduler: str = choice(SCHEDULES, "poly")   # how the learning rate falls
    scheduler_kwargs: Any = options_of("scheduler")   # options of the schedule
    freeze: tuple[str, ...] = ()                 # parts that are not trained: encoder, heads.depth, decoder.stages.0
    lr_scale: dict[str, float] = field(default_factory=dict)        # factor of the learning rate of parts
    layer_decay: float = given(1.0, above=0, at_most=1)             # the same per block of the backbone, from the last
    weight_decay_on: Literal["all", "weights"] = "all"              # weights: not norms, biases, position tables
    loss_kwargs: LossKwargs = field(default_factory=LossKwargs)   # weights and balance of the tasks' losses
    grad_clip_param: GradClip = field(default_factory=GradClip)   # largest norm of a gradient
    ema_decay: float = given(0.0, at_least=0, below=1)   # 0: no moving average
    seed: int = given(0, at_least=0)             # of weights, order and augmentation
    # guards (docs/reliability.md)
    on_nonfinite: Literal["stop", "skip", "rollback"] = "stop"   # at a loss or gradient that is not finite
    nonfinite_limit: int = given(10, at_least=1)  # so many updates may be skipped or rolled back; one more stops
    loader_timeout: float = given(900.0, at_least=0)   # seconds that workers may take for a batch; 0: for ever
    watchdog: float = given(20.0, at_least=0)     # stacks are written where an update takes so many times the median
    # machine
    device: Literal["auto", "cpu", "cuda"] = "auto"   # auto: CUDA where there is a device
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"   # of the arithmetic (docs/training_speed.md)
    compile: bool = False                        # torch.compile of backbone and decoder
    cuda_graph: bool = False                     # updates and forward passes are recorded once and replayed
    activation_checkpointing: Literal["none", "backbone", "decoder", "all"] = "none"   # less memory, more arithmetic
    channels_last: bool = False                  # memory format of convolutions
    scan_backend: str = choice(SCAN_BACKENDS, "auto")   # of selective scans (docs/scan.md)
    parallel: Literal["ddp", "fsdp"] = "ddp"     # several processes: each holds the whole model, or a part of it
    find_unused_parameters: bool = False         # of DDP, for networks that skip layers
    worker_start: Literal["default", "fork", "forkserver", "spawn"] = "default"   # of data loader workers
    tensorboard: bool = True                     # write tb/
    progress: bool = True                        # progress bars
    report: bool = True                          # a page about the last evaluation, and about that of `infer`
    deterministic: bool = False                  # the same numbers again on the same machine, at some cost on a GPU
    eval_at_start: bool = False                  # also score the untrained model
    test_time: AtTestTime = field(default_factory=AtTestTime)    # averages over views of an image (docs/test_time.md)
    # boundary score
    boundary_infer: Mode = "exact"               # in --run_mode infer
    boundary_eval: Mode = "off"                  # in the evaluations of a training
    boundary_kwargs: BoundarySettings = field(default_factory=BoundarySettings)   # how it is made (docs/boundary.md)
    # reporting
    camera_file: str = ""                        # of the pictures that predict shows, where a task asks (docs/data.md)
    single_task_scores: dict[str, float] = field(default_factory=dict)   # for delta_m: {semseg: 0.5, edge/odsF: 0.7}

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the active tasks, in the table's order."""
        return self.task_dictionary.tasks

    @property
    def dataset(self) -> DatasetSpec:
        """The training data set."""
        return self.train_db_name.spec

    @property
    def input_size(self) -> tuple[int, int]:
        """(height, width) of the network's input."""
        return self.image_size or self.dataset.image_size

    @property
    def output_size(self) -> tuple[int, int] | None:
        """(height, width) of labels and predictions where it is not that of the input."""
        asked = DECODERS.options(self.model)(**self.model_kwargs).label_size
        return asked or self.label_size or self.dataset.label_size

    @property
    def loading(self) -> dict[str, Any]:
        """How the data loader's workers are started and waited for."""
        return {"timeout": self.loader_timeout, "start": None if self.worker_start == "default" else self.worker_start}

    @property
    def run_dir(self) -> Path:
        """Everything of this run lies here."""
        return Path(self.out_dir) / self.version_name

    def to_dict(self) -> dict:
        """Plain containers, ready for YAML or a checkpoint; `config_from_dict` reads it back."""
        return _plain(self)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads an experiment file with its `_base_` files and `key=value` overrides. Raises ConfigError or OSError."""
    path = Path(path)
    values, origin = read_yaml(path)
    values.setdefault("version_name", path.stem)
    return _build(values, origin, overrides, str(path))


def config_from_dict(values: Mapping, source: str, overrides: Sequence[str] = ()) -> Config:
    """The `Config` of `Config.to_dict()` (as stored in checkpoints), with `key=value` overrides."""
    return _build(dict(values), {}, overrides, source)


def save_config(config: Config, path: Path) -> None:
    """Writes the resolved configuration; it loads again with `load_config`."""
    path.write_text(yaml.safe_dump(config.to_dict(), sort_keys=False), encoding="ascii")


def _build(values: dict, origin: dict[str, str], overrides: Sequence[str], source: str) -> Config:
    root_in_file = bool(values.get("db_root"))
    apply_overrides(values, origin, overrides)
    if origin.get("db_root") != "the command line":
        if os.environ.get("DB_ROOT"):
            values["db_root"], origin["db_root"] = os.environ["DB_ROOT"], "$DB_ROOT"
        elif not root_in_file:
            values["db_root"], origin["db_root"] = _mypath_db_root()
    values = translate(values, source)
    for key in ("out_dir", "db_root", "pretrained", "init_from", "camera_file"):
        if isinstance(values.get(key), str):
            values[key] = os.path.expanduser(values[key])
    where = partial(nearest_origin, origin=origin, source=source)
    if values.get("val_db_name") is None and "train_db_name" in values:
        values["val_db_name"] = values["train_db_name"]
    config = parse(Config, values, where=where)
    _check_relations(config, where)
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


def _check_relations(c: Config, where: Where) -> None:
    """Refuses what no single key can tell: combinations that cannot be trained."""
    def refuse(key: str, message: str) -> NoReturn:
        raise ConfigError(f"{where(key)}: {message}")

    _check_run_dir(c, refuse)
    _check_parallel(c, refuse)
    check_choices(c.train_db_name, c.val_db_name, c.tasks, c.image_size, refuse)
    if c.ignore_index != VOID:
        refuse("ignore_index", f"'ignore_index' must be {VOID:g}, got {c.ignore_index}: labels hold {VOID:g} where "
                               "they are void, and any other value would train on void")
    if c.augmentation.always_guide_crop and c.partial_labels != PartialLabels():
        refuse("augmentation.always_guide_crop", "augmentation.always_guide_crop reads a label that partial_labels may "
                                                 "hide; set one of them to its default")
    if c.lora.rank and not (c.pretrained or c.init_from or c.lora.base):
        refuse("lora.rank", "lora adapts weights that exist: set pretrained, init_from or lora.base")
    stopped = [part for part in c.lora.parts if any(f"{part}.".startswith(f"{frozen}.") for frozen in c.freeze)]
    if c.lora.rank and stopped:
        refuse("freeze", f"freeze stops {', '.join(stopped)} whole, adapters too; lora keeps the weights of its parts "
                         "as they are by itself")
    if not all(0 < factor < math.inf for factor in c.lr_scale.values()):
        refuse("lr_scale", f"'lr_scale' must hold positive finite factors, got {c.lr_scale}; `freeze` stops a part")
    weights = c.loss_kwargs.loss_weights
    named = {"loss_kwargs.loss_weights": weights, "single_task_scores": [key.split("/")[0] for key in
                                                                         c.single_task_scores]}
    for key, names in named.items():
        if unknown := sorted(name for name in names if not TASKS.is_name(name)):
            refuse(key, f"{key} names unknown task(s) {', '.join(unknown)}; {nearest(unknown[0], TASKS)}")
    if weights and (lacking := [t for t in c.tasks if t not in weights]):
        refuse("loss_kwargs.loss_weights", f"loss_kwargs.loss_weights lacks {', '.join(lacking)}")
    try:
        c.scheduler_kwargs.check(c.max_iter)
    except OptionError as error:
        key = f"scheduler_kwargs.{error.name}"
        refuse(key, f"'{key}' must be {error.valid}, got {shown(error.value)}")
    if min(c.input_size) < 1:
        refuse("image_size", f"'image_size' must be a height and a width of at least 1, got {list(c.input_size)}")
    key = "label_size" if c.label_size else "model_kwargs"
    if c.dataset.label_size is None and c.output_size not in (None, c.input_size):
        refuse(key, f"{key} ask(s) for labels of {list(c.output_size)}, which must be the image size "
                    f"{list(c.input_size)}: labels of {c.train_db_name} have no size of their own")
    if c.label_size and (min(c.label_size) < 1 or c.label_size != c.output_size):
        refuse(key, f"'label_size' must be a height and a width of at least 1, those that model_kwargs ask for if they "
                    f"do, got {list(c.label_size)}")


def _check_parallel(c: Config, refuse: Callable[[str, str], NoReturn]) -> None:
    """What needs whole parameters on every process."""
    for key in ("compile", "cuda_graph", "channels_last", "find_unused_parameters"):
        if c.parallel == "fsdp" and getattr(c, key):
            refuse(key, f"'{key}' does not go with parallel fsdp, which spreads every parameter over the processes; "
                        f"set {key}=false, or parallel=ddp")


def _check_run_dir(c: Config, refuse: Callable[[str, str], NoReturn]) -> None:
    """Everything of a run lies below `out_dir`, in a folder of its own."""
    parts = Path(c.version_name).parts
    if not parts or Path(c.version_name).is_absolute() or ".." in parts or max(map(len, parts)) > 200:
        refuse("version_name", "'version_name' must name a folder below out_dir, without '..' and with at most 200 "
                               f"characters, got {shown(c.version_name)}")
    if c.out_dir.startswith(("~", "$")):
        refuse("out_dir", f"'out_dir' {c.out_dir!r} begins with a user or variable that is unknown here; write it out")


def _plain(value: Any) -> Any:
    if hasattr(value, "to_yaml"):
        return value.to_yaml()
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
