"""Records: a JSON file per cell that says what was trained, on what, by which code, and what came out.

A record holds everything that its line in the table needs, and the experiment that repeats it. It is sealed with the
SHA-256 of its content, so that a number which somebody has corrected is noticed.
"""

import hashlib
import json
import math
import os
import platform
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from scripts.fair.cell import Place
from scripts.fair.suite import Cell
from utils.durable import write_text
from utils.engine.build import build_split, model_from_config
from utils.engine.config import Config
from utils.engine.cost import Counts, counted
from utils.engine.pretrained import published_weights
from utils.machine import cpu_info

ROOT = Path(__file__).resolve().parents[2]
FORMAT = 1
INFINITE = ".inf"           # as YAML writes it
PACKAGES = ("torch", "torchvision", "timm", "numpy", "opencv-python-headless")
# What decoders that are compared may differ in: the decoder and its options, the tasks of single-task networks, and
# where and how fast the program ran.
NOT_COMPARED = (
    "model", "model_kwargs", "backbone", "backbone_kwargs", "neck", "neck_kwargs", "intermediate_supervision", "seed",
    "task_dictionary", "version_name", "out_dir", "db_root", "nworkers", "progress", "tensorboard", "resume",
    "scan_backend", "find_unused_parameters", "skip_data_check", "data_cache", "save_interval", "watchdog",
    "loader_timeout")
Record = dict[str, Any]
# Of this process: one cell at a time is counted, or has its weights read.
COUNTS: dict[str, Counts] = {}
WEIGHTS: dict[str, str] = {}
COUNTING = threading.Lock()


class RecordError(ValueError):
    """A record that cannot be used, and why."""


def record_of(cell: Cell, config: Config, outcome: Mapping[str, Any], place: Place) -> Record:
    """What is written about a finished cell."""
    counts = _counts(config)
    return _plain({
        "format": FORMAT, "suite": cell.suite.name, "row": cell.row, "decoder": cell.decoder,
        "backbone": config.backbone, "seed": cell.seed, "task": cell.task, "commit": commit(),
        "date": datetime.now(timezone.utc).date().isoformat(), "machine": machine(place.device, place.threads),
        "threads": place.threads, "sharing": place.sharing,
        "versions": {name: version(name) for name in PACKAGES},
        "data": data_hash(config), "backbone_weights": weights_hash(config),
        **outcome,
        "cost": {**outcome["cost"], "parameters": counts.parameters["total"], "gmacs": counts.total},
    })


def _counts(config: Config) -> Counts:
    """`counted`, once for the cells that differ in what it does not depend on."""
    kept = json.dumps({**config.to_dict(), "seed": 0, "version_name": "", "optimizer_kwargs": {}}, sort_keys=True)
    with COUNTING:
        if kept not in COUNTS:
            COUNTS[kept] = counted(config)
        return COUNTS[kept]


def conditions(record: Record) -> dict[str, Any]:
    """What all ranked records of a suite must share, by name."""
    experiment = {key: value for key, value in record["experiment"].items() if key not in NOT_COMPARED}
    optimizer, losses = experiment["optimizer_kwargs"], experiment["loss_kwargs"]
    experiment["optimizer_kwargs"] = {key: value for key, value in optimizer.items() if key != "lr"}
    experiment["loss_kwargs"] = {key: value for key, value in losses.items()
                                 if key not in ("loss_weights", "intermediate_weight")}
    for key in ("train_db_name", "val_db_name"):
        if isinstance(experiment[key], Mapping):                 # where a folder lies makes no difference
            experiment[key] = {name: value for name, value in experiment[key].items() if name != "folder"}
    return {**experiment, "edge_w": record["experiment"]["task_dictionary"]["edge_w"],
            "selection rule": record["selection"], "learning rates searched": [t["lr"] for t in record["search"]]}


def of_backbone(record: Record) -> dict[str, Any]:
    """What records on one backbone must share."""
    return {"backbone_kwargs": record["experiment"]["backbone_kwargs"],
            "weights of the backbone": record["backbone_weights"]}


def of_tasks(record: Record) -> dict[str, Any]:
    """What records with the same tasks must share: a single-task network reads the files of its task alone."""
    return {"data": record["data"], "loss_weights": record["experiment"]["loss_kwargs"]["loss_weights"]}


def require_comparable(records: Mapping[str, Record]) -> None:
    """RecordError that names two records and the first thing in which they differ and must not."""
    _require_equal(records, conditions, lambda record: "")
    _require_equal(records, of_backbone, lambda record: f" (backbone {record['backbone']})")
    _require_equal(records, of_tasks, lambda record: f" (tasks {', '.join(record['scores'])})")


def _require_equal(records: Mapping[str, Record], shared: Callable[[Record], dict[str, Any]],
                   group: Callable[[Record], str]) -> None:
    first: dict[str, str] = {}
    for name, record in records.items():
        other = first.setdefault(group(record), name)
        own, expected = shared(record), shared(records[other])
        for key in sorted(own.keys() | expected.keys()):
            if own.get(key) != expected.get(key):
                raise RecordError(f"{name} and {other} cannot stand in one table: {key} is {_short(own.get(key))} in "
                                  f"the first and {_short(expected.get(key))} in the second{group(record)}")


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) < 100 else f"{text[:97]}..."


# Files ---------------------------------------------------------------------------------------------------------------


def write_record(path: Path, record: Record) -> None:
    """Sealed, all of it or nothing."""
    write_text(path, json.dumps({**record, "seal": _seal(record)}, indent=1) + "\n")


def read_record(path: Path) -> Record:
    """RecordError where it is no record, of another format, or not what was written."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        seal = record.pop("seal")
        known = record["format"]
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RecordError(f"{path} is no record of a cell ({type(error).__name__})") from error
    if known != FORMAT:
        raise RecordError(f"{path} has format {known}, this program reads {FORMAT}: run the cell again")
    if seal != _seal(record):
        raise RecordError(f"{path} is not what was written: its seal does not fit its content. Take the file as it was "
                          "committed, or run the cell again")
    return record


def read_records(folder: Path) -> dict[str, Record]:
    """All records of a folder by their names, sorted."""
    return {path.stem: read_record(path) for path in sorted(folder.glob("*.json"))}


def experiment_file(record: Record, path: Path, **keys: Any) -> None:
    """The experiment of a record as a file that `main.py` reads."""
    def restored(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: restored(item) for key, item in value.items()}
        return math.inf if value == INFINITE else value

    write_text(path, yaml.safe_dump({**restored(record["experiment"]), **keys}, sort_keys=False))


def _seal(record: Record) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _plain(value: Any) -> Any:
    """JSON's own kinds: infinity becomes a word, what is not a number null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return INFINITE if value == math.inf else None
    return value


# What is noted -------------------------------------------------------------------------------------------------------


def data_hash(config: Config) -> dict[str, Any]:
    """SHA-256 over the names and the bytes of all files of the training and the test split, and the images in each."""
    return {name: _split_hash(config, split) for name, split in (("train", "train"), ("test", "val"))}


def _split_hash(config: Config, split: str) -> dict[str, Any]:
    dataset, total = build_split(config, split), hashlib.sha256()
    for part in dataset.parts:
        for name in part.ids:
            total.update(name.encode())
            for key in part.maps_of(name):
                for path in part.paths(key, name):
                    total.update(_file_hash(path, path.stat().st_mtime_ns))
    return {"sha256": total.hexdigest(), "images": len(dataset)}


@cache
def _file_hash(path: Path, modified: int) -> bytes:
    return hashlib.sha256(path.read_bytes()).digest()


def weights_hash(config: Config) -> str:
    """Of the published weights that the backbone starts from; "random" where it starts from none."""
    if config.pretrained is False:
        return "random"
    kept = json.dumps([config.backbone, config.to_dict()["backbone_kwargs"], config.pretrained])
    with COUNTING:
        if kept not in WEIGHTS:
            state, total = published_weights(model_from_config(config).encoder, config.pretrained)[0], hashlib.sha256()
            for key in sorted(state):
                total.update(key.encode())
                total.update(state[key].contiguous().numpy().tobytes())
            WEIGHTS[kept] = total.hexdigest()
        return WEIGHTS[kept]


def commit() -> str:
    """What $SOURCE_COMMIT says, for copies of the program; else the repository's, with "+" where files differ from it.

    "unknown" where there is neither.
    """
    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if given := os.environ.get("SOURCE_COMMIT"):
        return given
    head = git("rev-parse", "HEAD")
    if head is None:
        return "unknown"
    return head + ("+" if git("status", "--porcelain", "--untracked-files=no", "--", "*.py", "*.cpp", "*.cu") else "")


def machine(device: str, threads: int) -> str:
    """In words: the card, or the processor and how many threads of it were used."""
    if device.startswith("cuda"):
        return f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
    cpu = cpu_info().get("model name") or platform.processor() or platform.machine()
    return f"{cpu}, {threads} of {os.cpu_count()} thread(s)"


def same_scores(record: Record, scores: Mapping[str, Mapping[str, float]]) -> Sequence[str]:
    """The scores that differ, in words; none where all are equal to the last digit."""
    found, differences = _plain(scores), []
    for task in record["scores"].keys() | found.keys():
        own, other = record["scores"].get(task, {}), found.get(task, {})
        differences += [f"{task}/{key}: {own.get(key)} recorded, {other.get(key)} now"
                        for key in sorted(own.keys() | other.keys()) if own.get(key) != other.get(key)]
    return differences
