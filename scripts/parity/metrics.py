"""Scores and internal counts of every metric, in the convention of each published code base."""

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.labels import VOID
from evaluation.delta_m import delta_m
from evaluation.meter import Meter
from evaluation.normals import NormalsMeter
from evaluation.saliency import THRESHOLDS
from scripts.parity.base import Check, Folder, Measure, NotCovered, Options, absolute_error, scaled_error
from scripts.parity.program import decode, meter
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
    families = content.values() if isinstance(content, dict) else ()
    return any(isinstance(figures, dict) and "_state" in figures
               for metrics in families if isinstance(metrics, dict) for figures in metrics.values())


def _input_of(metric: str, inputs: list[Path]) -> Path | None:
    """The file named after the longest beginning of the metric's name: depth_nyud -> ..._depth.npz."""
    words = metric.split("_")
    beginnings = ("_".join(words[:number]) for number in range(len(words), 0, -1))
    return next((path for name in beginnings for path in inputs if f"_{path.stem}".endswith(f"_{name}")), None)


def _run(family: str, metric: str, want: dict, path: Path | None, options: Options) -> Iterator[Measure]:
    if {"multi", "single", "value"} <= want.keys():
        yield _gain("value", want["multi"], _flatten(want["single"])[0], want["value"], 1e-12)
        return
    if all(isinstance(entry, dict) and {"input", "value"} <= entry.keys() for entry in want.values()):
        for dataset, entry in want.items():
            yield _gain(dataset, entry["input"], BASES[dataset], entry["value"], 1e-6)
        return
    if path is None:
        raise NotCovered("no input file belongs to this name")
    task = next((name for name in TASKS if metric.replace("disparity", "depth").startswith(name)), None)
    if task is None:
        raise NotCovered("not a task of this program")
    got = _observed(task, _fill(task, family, metric, np.load(path)), family)
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


def _fill(task: str, family: str, metric: str, data: Mapping[str, np.ndarray]) -> Meter:
    """The meter of this family's convention after all batches of the file."""
    edge_weight = re.search(r"w(\d*\.?\d+)", metric)
    void, options = (_depth(family, metric) if task == "depth" else
                     (None, {"edge_w": float(edge_weight[1]) if edge_weight else 0.95}))
    channels, number = data["logits_0"].shape[1], sum(key.startswith("logits_") for key in data)
    old_normals = (family, task) == (OLD, "normals")
    scored = NormalsMeter(convention="arccos") if old_normals else meter(task, channels, **options)
    for batch in range(number):
        name = next(name for name in (f"target_raw_{batch}", f"target_{batch}") if name in data)
        logits, target = torch.from_numpy(data[f"logits_{batch}"]), torch.from_numpy(data[name])
        if void is not None:                                           # 0: not measured
            target = torch.where(target == 0, void, target)
        if (family, task) in WITHOUT_VOID:
            target = torch.where(target == 255, 0.0, target)
        pred = decode(task, logits)
        if (family, task) in BY_SIGMOID:
            if len(logits) == 1:                                       # its meter cannot read a batch of one
                continue
            pred = torch.sigmoid(logits[:, 1:] - logits[:, :1])
        scored.update(pred, target)
    return scored


def _depth(family: str, metric: str) -> tuple[float, dict]:
    """This family's void value in labels, and what the meter ignores."""
    if metric.startswith("disparity"):
        return 0.0, {"valid_range": VALID_RANGE}
    if metric.endswith("ignore0"):
        return 0.0, {"ignore_index": 0}
    if family in PERCENT:
        return -1.0 if family == "taskprompter" else 0.0, {"valid_range": VALID_RANGE}
    # "as_run": void is 255 in the label but the score ignores 0, so every void pixel counts as 255 m
    return 255.0, {"ignore_index": 0 if metric.endswith("as_run") else VOID}


# Figure or count of a reference -> ours.
SEGMENTATION = {"value": "mIoU", "intersection": "tp"}
NAMES = {"semseg": SEGMENTATION, "human_parts": SEGMENTATION, "edge": {"n": "num_valid"},
         "normals": {"value": "mean", "sum_deg_diff": "sum_deg", "total": "num_valid"},
         "depth": {"value": "rmse", "n_valid": "num_valid", "total": "num_valid", "total_rmses": "squared",
                   "total_log_rmses": "squared_log", "sum_squared_error": "squared"}}
WITHOUT_VOID = {(OLD, "sal"), (OLD, "edge")}
BY_SIGMOID = {(OLD, "sal")}         # of the difference of the two logits


def _observed(task: str, meter: Meter, family: str) -> dict:
    """Figures and counts under the reference's names."""
    figures, state = meter.compute(), meter.state
    if task == "sal":
        return _saliency(figures, state, family)
    own = {**state, **figures, **(meter.per_class() if NAMES[task] is SEGMENTATION else {})}
    got = own | {theirs: own[ours] for theirs, ours in NAMES[task].items()}
    if NAMES[task] is SEGMENTATION:
        got |= {"union": sum(meter.per_class().values()),
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


def _gain(name: str, figures: dict, base: Mapping[str, float], want: float, tolerance: float) -> Measure:
    """delta_m of figures given as task -> {figure: value}; the reference is a fraction, ours percent."""
    multi, higher = _flatten(figures)
    got = delta_m(multi, {task: base[task] for task in multi}, higher) / 100
    return Measure(name, scaled_error(got, want), tolerance)


def _flatten(figures: dict) -> tuple[dict[str, float], dict[str, bool]]:
    """task -> {name: value} as task -> value, and task -> whether a higher value is better."""
    items = [(task, *next(iter(scores.items()))) for task, scores in figures.items()]
    return ({task: value for task, _, value in items},
            {task: name not in LOWER_IS_BETTER for task, name, _ in items})
