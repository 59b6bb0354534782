"""What is made of raw outputs: decoded predictions, edge PNGs, metrics of inputs with nothing to measure."""

import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from evaluation.boundary.edge_maps import save_edge_maps
from evaluation.evaluator import TaskContext
from scripts.parity.base import Check, Folder, Measure, NotCovered, Npz, Options, absolute_error, scaled_error
from utils.engine.tasks import TASKS

CONDITIONS = ("all_void", "no_positive", "batch_of_one")
CHANNELS = {"semseg": 40, "human_parts": 7}          # of the degenerate inputs made here; any number would do


def checks(folder: Folder) -> Iterator[Check]:
    for path, keys in folder.arrays.items():
        if {"logits", "sizes"} <= keys and path.suffix == ".npz":
            yield Check(path.stem, frozenset({path}), lambda options, p=path: _saved_edges(Npz(p)))
        for key in sorted(keys):
            group, _, task = key.partition("/")
            if group == "output" and f"logits/{task}" in keys and path.suffix == ".npz":
                yield Check(f"{path.stem}/{task}", frozenset({path}),
                            lambda options, p=path, task=task: _decoded(Npz(p), task, options))
    for path, content in folder.tables.items():
        if isinstance(content, dict) and content and all(k.partition("/")[0] in CONDITIONS for k in content):
            for key, want in content.items():
                yield Check(f"{path.stem}/{key}", frozenset({path}),
                            lambda options, k=key, w=want: _degenerate(k, w))


def _decoded(data: Npz, task: str, options: Options) -> Iterator[Measure]:
    if task not in TASKS:
        raise NotCovered("not a task of this program")
    logits = data.tensor(f"logits/{task}").to(options.dtype)
    yield compare_decoded("output", task, logits, data[f"output/{task}"])


def compare_decoded(name: str, task: str, logits: Tensor, want: np.ndarray) -> Measure:
    """The references hand their meters H x W (x C) maps of values in 0..255; class ids and depth unscaled."""
    got = TASKS[task].decode(logits)
    if task == "normals":
        got = (got + 1) * 127.5
    elif task in ("sal", "edge"):
        got = got * 255
    got = got.permute(0, 2, 3, 1)                                      # (B, C, H, W) -> (B, H, W, C)
    got = got[..., 0] if got.ndim > want.ndim else got
    exact = want.dtype.kind == "i"
    return Measure(name, (absolute_error if exact else scaled_error)(got, want), 0.0 if exact else 1e-6)


def _saved_edges(data: Npz) -> Iterator[Measure]:
    prob = TASKS["edge"].decode(data.tensor("logits"))
    expected = sorted(key for key in data if key not in ("logits", "sizes"))       # one per image
    sizes = data["sizes"].tolist()
    meta = [{"name": key, "size": tuple(size)} for key, size in zip(expected, sizes, strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        for key, path in zip(expected, save_edge_maps(prob, meta, Path(folder)), strict=True):
            with Image.open(path) as image:
                yield Measure(key, absolute_error(np.asarray(image), data[key]), 0.0)


def _degenerate(key: str, want: dict | str) -> Iterator[Measure]:
    """A reference figure is met; where it raised, ours is NaN (nothing valid) or finite (batch of one)."""
    condition, _, task = key.partition("/")
    if task not in TASKS:
        raise NotCovered("not a task of this program")
    context = TaskContext(num_channels=CHANNELS.get(task, TASKS[task].num_channels))
    label = torch.zeros(1, 3 if task == "normals" else 1, 18, 22)
    logits = torch.randn(1, context.num_channels, 18, 22, generator=torch.Generator().manual_seed(0))
    meter = TASKS[task].meter(context)
    if condition == "all_void":
        label.fill_(context.ignore_index)
    meter.update(TASKS[task].decode(logits), label)
    figures = meter.compute()
    if isinstance(want, dict):
        for name, value in want.items():
            yield Measure(name, absolute_error(figures[name], value), 0.0)
        return
    value = figures[TASKS[task].score.key]
    good = math.isnan(value) if condition == "all_void" else math.isfinite(value)
    note = f"{value:.3g} where the reference raised {want.partition(':')[0]}"
    yield Measure(note, 0.0 if good else math.inf)
