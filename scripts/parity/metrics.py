"""Scores and internal counts of every metric, in the convention of each published code base."""

import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evaluation.boundary.edge_loss import EdgeLossMeter
from evaluation.delta_m import delta_m
from evaluation.depth import DepthMeter
from evaluation.meter import Meter
from evaluation.normals import NormalsMeter
from evaluation.saliency import THRESHOLDS, SaliencyMeter
from evaluation.segmentation import SegmentationMeter
from scripts.parity.base import Check, Folder, Measure, NotCovered, Npz, Options, absolute_error, scaled_error
from utils.engine.tasks import TASKS

TOLERANCE = 1e-5                     # the references sum in float32
OLD = "mtl"                          # Multi-Task-Learning-PyTorch has conventions of its own
PERCENT = ("mlore", "taskprompter")  # report mIoU and maxF times 100; the counts are those of the others
VALID_RANGE = (0.0, 80.0)            # of depth labels in mlore and taskprompter, and of Cityscapes disparity
LOWER_IS_BETTER = ("rmse", "mean", "loss")
# Base figures of MTMamba's checkpoint criterion (its percentages against fractions are its bug)
BASES = {"NYUD": {"semseg": 0.55, "depth": 0.49, "normals": 18.40, "edge": 0.0465},
         "PASCALContext": {"semseg": 80.89, "human_parts": 71.71, "sal": 85.28, "normals": 13.47, "edge": 0.04},
         "Cityscapes": {"semseg": 80.0, "depth": 1.0}}


def checks(folder: Folder) -> Iterator[Check]:
    inputs = [path for path, keys in folder.arrays.items() if "logits_0" in keys]
    for table, content in folder.tables.items():
        if not (inputs and _is_scores(content)):
            continue
        for family, metrics in content.items():
            for metric, want in metrics.items():
                data = _input_of(metric, inputs)
                files = frozenset({table} if data is None else {table, data})
                yield Check(f"{family}/{metric}", files, partial(_run, family, metric, want, data))


def _is_scores(content: object) -> bool:
    """family -> metric -> figures, some of them with internal counts."""
    if not isinstance(content, dict) or not all(isinstance(metrics, dict) for metrics in content.values()):
        return False
    figures = [f for metrics in content.values() for f in metrics.values()]
    return any(isinstance(f, dict) and "_state" in f for f in figures)


def _input_of(metric: str, inputs: list[Path]) -> Path | None:
    """The file named after the longest beginning of the metric's name: depth_nyud -> ..._depth.npz."""
    best, length = None, 0
    for path in inputs:
        words = path.stem.split("_")
        for subject in ("_".join(words[i:]) for i in range(len(words))):
            if f"{metric}_".startswith(f"{subject}_") and len(subject) > length:
                best, length = path, len(subject)
    return best


def _run(family: str, metric: str, want: dict, path: Path | None, options: Options) -> Iterator[Measure]:
    if {"multi", "single", "value"} <= want.keys():
        yield _gain(want)
        return
    if all(isinstance(entry, dict) and {"input", "value"} <= entry.keys() for entry in want.values()):
        yield from _checkpoint_criterion(want)
        return
    if path is None:
        raise NotCovered("no input file belongs to this name")
    task = next((name for name in TASKS if metric.replace("disparity", "depth").startswith(name)), None)
    if task is None:
        raise NotCovered("not a task of this program")
    got = _observed(task, _fill(task, family, metric, Npz(path)), family)
    for key, value in {**want, **want.get("_state", {})}.items():
        if key != "_state":
            yield _compare(key, got.get(key), value, family in PERCENT and key in ("mIoU", "maxF"))


def _compare(key: str, got: object, want: object, percent: bool) -> Measure:
    if got is None:
        return Measure(key, uncovered="no such figure here")
    got = np.asarray(got.tolist() if isinstance(got, Tensor) else got)
    if got.dtype.kind == "i":                                          # counts agree exactly or not at all
        return Measure(key, absolute_error(np.broadcast_to(got, np.shape(want)), want), 0.0)
    return Measure(key, scaled_error(got * 100 if percent else got, want), TOLERANCE)


def _fill(task: str, family: str, metric: str, data: Npz) -> Meter:
    """The meter of this family's convention after all batches of the file."""
    keys, batch, meter = list(data), 0, None
    while f"logits_{batch}" in keys:
        logits = data.tensor(f"logits_{batch}")
        raw = f"target_raw_{batch}" in keys
        target = data.tensor(f"target_raw_{batch}" if raw else f"target_{batch}")
        pred = TASKS.load(task).decode(logits)
        target, make = LABELS.get(task, _as_stored)(family, metric, target, raw)
        make = make or METERS[task]
        meter = meter or make(family, metric, logits.shape[1])
        batch += 1
        if (family, task) in WITHOUT_VOID:
            target = torch.where(target == 255, 0.0, target)
        if (family, task) in BY_SIGMOID:
            if len(logits) == 1:                                       # its meter cannot read a batch of one
                continue
            pred = torch.sigmoid(logits[:, 1:] - logits[:, :1])
        meter.update(pred, target)
    return meter


def _as_stored(family: str, metric: str, target: Tensor, raw: bool) -> tuple[Tensor, None]:
    return target, None


def _depth(family: str, metric: str, target: Tensor, raw: bool) -> tuple[Tensor, Callable[..., Meter]]:
    """Label with this family's void value, and the meter that reads it. Raw labels: 0 = not measured."""
    if metric.startswith("disparity"):
        return target, lambda *_: DepthMeter(None, VALID_RANGE)
    if not raw:
        return target, lambda *_: DepthMeter()
    if metric.endswith("ignore0"):
        return target, lambda *_: DepthMeter(0.0)
    if family in PERCENT:
        void = -1.0 if family == "taskprompter" else 0.0
        return torch.where(target == 0, void, target), lambda *_: DepthMeter(None, VALID_RANGE)
    # "as_run": void is 255 in the label but the score ignores 0, so every void pixel counts as 255 m
    ignore = 0.0 if metric.endswith("as_run") else 255.0
    return torch.where(target == 0, 255.0, target), lambda *_: DepthMeter(ignore)


def _edge_weight(metric: str) -> float:
    found = re.search(r"w(\d*\.?\d+)", metric)
    return float(found[1]) if found else 0.95


METERS: dict[str, Callable[[str, str, int], Meter]] = {
    "semseg": lambda family, metric, channels: SegmentationMeter(channels),
    "human_parts": lambda family, metric, channels: SegmentationMeter(channels),
    "normals": lambda family, metric, channels: NormalsMeter(convention="arccos" if family == OLD else "atan2"),
    "sal": lambda family, metric, channels: SaliencyMeter(),
    "edge": lambda family, metric, channels: EdgeLossMeter(_edge_weight(metric)),
}
# Figure or count of a reference -> ours.
SEGMENTATION = {"value": "mIoU", "intersection": "tp"}
NAMES = {"semseg": SEGMENTATION, "human_parts": SEGMENTATION, "edge": {"n": "num_valid"},
         "normals": {"value": "mean", "sum_deg_diff": "sum_deg", "total": "num_valid"},
         "depth": {"value": "rmse", "n_valid": "num_valid", "total": "num_valid", "total_rmses": "squared",
                   "total_log_rmses": "squared_log", "sum_squared_error": "squared"}}


LABELS = {"depth": _depth}
WITHOUT_VOID = {(OLD, "sal"), (OLD, "edge")}
BY_SIGMOID = {(OLD, "sal")}         # of the difference of the two logits


def _observed(task: str, meter: Meter, family: str) -> dict:
    """Figures and counts under the reference's names."""
    figures, state = meter.compute(), meter.state
    if task == "sal":
        return _saliency(figures, state, family)
    own = {**state, **figures}
    got = own | {theirs: own[ours] for theirs, ours in NAMES[task].items()}
    if NAMES[task] is SEGMENTATION:
        got |= {"union": state["tp"] + state["fp"] + state["fn"],
                "jaccards_all_categs": [figures[f"IoU/{k}"] for k in range(meter.num_classes)]}
    if task == "normals" and family == OLD:            # the old code base returns its mean under the name rmse
        got["rmse"] = figures["mean"]
    return got


def _saliency(figures: dict, state: dict, family: str) -> dict:
    if family == OLD:
        iou, precision, recall = (state[f"sum_{name}"] / state["num_images"]
                                  for name in ("iou", "precision", "recall"))
        return {"mIoU": figures["mIoU"], "maxF": figures["F1"],
                "mIoUs": iou, "mPrec": precision, "mRec": recall,
                "F": 2 * precision * recall / (precision + recall).clamp_min(1e-12)}
    suffix = "_exact" if family in ("atrc", "demt") else ""
    return {"maxF": figures["maxF"], "value": figures["maxF_exact"], "true_positives": state[f"tp{suffix}"],
            "predicted_positives": state[f"predicted{suffix}"], "actual_positives": state["positives"],
            "thresholds": THRESHOLDS}


def _gain(want: dict) -> Measure:
    """delta_m of figures given as task -> {figure: value}; the reference is a fraction, ours percent."""
    (multi, higher), (single, _) = _flatten(want["multi"]), _flatten(want["single"])
    return Measure("value", scaled_error(delta_m(multi, single, higher) / 100, want["value"]), 1e-12)


def _checkpoint_criterion(want: dict) -> Iterator[Measure]:
    for dataset, entry in want.items():
        if dataset not in BASES:
            yield Measure(dataset, uncovered="no base figures are known")
            continue
        multi, higher = _flatten(entry["input"])
        base = {task: BASES[dataset][task] for task in multi}
        yield Measure(dataset, scaled_error(delta_m(multi, base, higher) / 100, entry["value"]), 1e-6)


def _flatten(figures: dict) -> tuple[dict[str, float], dict[str, bool]]:
    """task -> {name: value} as task -> value, and task -> whether a higher value is better."""
    items = [(task, *next(iter(scores.items()))) for task, scores in figures.items()]
    return ({task: value for task, _, value in items},
            {task: name not in LOWER_IS_BETTER for task, name, _ in items})
