"""DeMT as published, around the model: losses with their gradients, and scores.

Arrays "<set>.pred.<task>", "<set>.label.<task>", "<set>.loss_unweighted.<task>", ... and
"metric.<name>.pred0", ... (two updates of a meter); a table beside them gives the
weight of edge pixels. All in float32.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file

from evaluation.depth import DepthMeter
from evaluation.evaluator import TaskContext
from evaluation.saliency import THRESHOLDS
from losses.multi_task import MultiTaskLoss
from scripts.parity.base import (
    Check,
    Folder,
    Measure,
    NotCovered,
    Options,
    absolute_error,
    below,
    entry_error,
    scaled_error,
    stem,
)
from utils.engine.tasks import TASKS

WEIGHTS = {"semseg": 1, "human_parts": 2, "sal": 5, "normals": 10, "depth": 1, "edge": 50}
SCORES = {"semseg": "mIoU", "human_parts": "mIoU", "depth": "rmse", "normals": "mean", "sal": "maxF_exact"}


def checks(folder: Folder) -> Iterator[Check]:
    for path, keys in folder.arrays.items():
        name = stem(path)
        tables = (p for p in folder.tables if stem(p) == name)
        table = next((p for p in tables if "edge_pos_weight" in folder.tables[p]), None)
        if table is None or not any(".loss_unweighted." in key for key in keys):
            continue
        files = frozenset({path, table})
        for data_set, edge_w in folder.tables[table]["edge_pos_weight"].items():
            yield Check(f"{name}/{data_set} losses", files, lambda options, path=path, args=(data_set, edge_w):
                        _losses(path, *args, options))
        for metric in folder.tables[table]["metrics"]:
            yield Check(f"{name}/{metric} score", files, lambda options, path=path, metric=metric:
                        _score(path, metric, options))


def _losses(path: Path, data_set: str, edge_w: float, options: Options) -> Iterator[Measure]:
    data = below(load_file(path), f"{data_set}.")
    tasks = [task for task in TASKS if f"pred.{task}" in data]
    preds = {task: data[f"pred.{task}"].to(options.dtype).requires_grad_() for task in tasks}
    contexts = {task: TaskContext(preds[task].shape[1], edge_w=edge_w) for task in tasks}
    criterion = MultiTaskLoss({task: TASKS[task].loss(contexts[task]) for task in tasks}, WEIGHTS)
    losses = criterion(preds, {task: data[f"label.{task}"] for task in tasks})
    losses["total"].backward()
    wanted = {task: data[f"loss_unweighted.{task}"] for task in tasks} | {"total": data["loss_total"]}
    for name, want in wanted.items():
        yield Measure(name, scaled_error(losses[name][None], want), 2e-6)
    for task in tasks:
        weighted = WEIGHTS[task] * losses[task][None]
        yield Measure(f"weighted {task}", scaled_error(weighted, data[f"loss_weighted.{task}"]), 2e-6)
        yield Measure(f"grad {task}", entry_error(preds[task].grad, data[f"grad_total.{task}"]), 1e-4)


def _score(path: Path, metric: str, options: Options) -> Iterator[Measure]:
    task = next((name for name in SCORES if metric.startswith(name)), None)
    if task is None:
        raise NotCovered("not a score of this program")
    data = below(load_file(path), f"metric.{metric}.")
    # The published depth score ignores 0 where the data pipeline marks 255.
    meter = DepthMeter(0.0) if task == "depth" else TASKS[task].meter(TaskContext(data["pred0"].shape[1]))
    for number in range(sum(key.startswith("pred") for key in data)):
        meter.update(TASKS[task].decode(data[f"pred{number}"].to(options.dtype)), data[f"target{number}"])
    yield Measure(SCORES[task], scaled_error(torch.tensor([meter.compute()[SCORES[task]]]), data["value"]), 1e-6)
    if "thresholds" in data:
        yield Measure("thresholds", absolute_error(torch.as_tensor(THRESHOLDS), data["thresholds"]), 1e-6)
