"""InvPT and TaskPrompter as published, around the model: losses, decoded outputs, scores, boundary files, pictures.

Tables "<set>.loss", "<set>.scores", ... with arrays "<set>.loss.pred.<task>", "<set>.meter.batch0.pred.<task>",
...; and pictures of the single-image script, arrays "pred.<task>" and "image.<task>". All of it in float32.
Without intermediate predictions ("<set>.loss.inter.<task>") a table is in the successors' convention: mIoU and maxF
in percent, depth scored between 0 and 80 m, and -1 for depth without a value.
"""

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from data.palette import CITYSCAPES
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from data.labels import VOID
from evaluation.boundary.edge_maps import save_edge_maps
from evaluation.evaluator import TaskContext
from losses.multi_task import MultiTaskLoss
from models.blocks.resize import resize
from scripts.parity.base import Check, Folder, Measure, Options, absolute_error, entry_error, scaled_error
from scripts.parity.metrics import VALID_RANGE
from scripts.parity.outputs import compare_decoded
from utils.engine.tasks import TASKS
from utils.engine.views import voc_palette

PERCENT = ("mIoU", "maxF")
MID_GREY = 127
PALETTE = "label_colormap_41"
COLOURS = {"depth": "depth has colours of its own here"}


def checks(folder: Folder) -> Iterator[Check]:
    for path, keys in folder.arrays.items():
        sets = sorted({match[1] for key in keys if (match := re.match(r"(\w+)\.loss\.pred\.", key))})
        for data_set in sets:
            table = next((p for p, content in folder.tables.items() if f"{data_set}.scores" in content), None)
            if table is None:
                continue
            successor = not any(key.startswith(f"{data_set}.loss.inter.") for key in keys)
            arguments = data_set, {**folder.tables[table], "successor": successor}, path
            for group, run in GROUPS.items():
                yield Check(f"{path.stem}/{data_set} {group}", frozenset({path, table}),
                            lambda options, a=arguments, run=run: run(*a, options))
        if any(f"image.{task}" in keys and f"pred.{task}" in keys for task in TASKS):
            tables = {p for p in folder.tables if p.stem == path.stem}
            yield Check(path.stem, frozenset({path, *tables}), lambda options, path=path: _single_image(path))


def _below(data: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in data.items() if key.startswith(prefix)}


def _context(logits: Tensor, data_set: str, table: dict) -> TaskContext:
    return TaskContext(num_channels=logits.shape[1], edge_w=table[f"{data_set}.edge_w"],
                       depth_range=VALID_RANGE if table["successor"] else None)


def _labels(data: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of a batch; real depth is never negative, the successors' void value is."""
    labels = _below(data, "label.")
    if "depth" in labels:
        labels["depth"] = torch.where(labels["depth"] < 0, VOID, labels["depth"])
    return labels


def _losses(data_set: str, table: dict, path: Path, options: Options) -> Iterator[Measure]:
    data = _below(load_file(path), f"{data_set}.loss.")
    final, inter = ({task: logits.to(options.dtype).requires_grad_()
                     for task, logits in _below(data, kind).items()} for kind in ("pred.", "inter."))
    losses = {task: TASKS[task].loss(_context(logits, data_set, table)) for task, logits in final.items()}
    criterion = MultiTaskLoss(losses, table[f"{data_set}.loss_weights"])
    got = criterion(final, _labels(data), inter)
    for name, want in table[f"{data_set}.loss"].items():
        yield Measure(name, scaled_error(got[name.replace("inter_", "inter/", 1)], want), 2e-6)
    got["total"].backward()
    for name, leaves in (("grad_of_total", final), ("grad_of_total_inter", inter)):
        for task, want in _below(data, f"{name}.").items():
            yield Measure(f"{name}.{task}", entry_error(leaves[task].grad, want), 1e-5)


def _batches(path: Path, data_set: str) -> Iterator[dict[str, Tensor]]:
    """Arrays of the validation batches: pred.<task>, label.<task>, processed.<task>."""
    data, index = load_file(path), 0
    while batch := _below(data, f"{data_set}.meter.batch{index}."):
        yield batch
        index += 1


def _decoded(data_set: str, table: dict, path: Path, options: Options) -> Iterator[Measure]:
    for index, batch in enumerate(_batches(path, data_set)):
        for task, want in _below(batch, "processed.").items():
            logits = batch[f"pred.{task}"].to(options.dtype)
            yield compare_decoded(f"{task} of batch {index}", task, logits, want.numpy())


def _scores(data_set: str, table: dict, path: Path, options: Options) -> Iterator[Measure]:
    meters = {}
    for batch in _batches(path, data_set):
        labels = _labels(batch)
        for task, logits in _below(batch, "pred.").items():
            meter = meters.setdefault(task, TASKS[task].meter(_context(logits, data_set, table)))
            meter.update(TASKS[task].decode(logits.to(options.dtype)), labels[task])
    for task, scores in table[f"{data_set}.scores"].items():
        for name, want in scores.items():
            want = want / 100 if table["successor"] and name in PERCENT else want
            yield Measure(f"{task} {name}", scaled_error(meters[task].compute()[name], want), 1e-6)


def _edge_files(data_set: str, table: dict, path: Path, options: Options) -> Iterator[Measure]:
    data, images = load_file(path), table[f"{data_set}.saved_edge"]
    meta = [{"name": name, "size": tuple(image["original_size_hw"])} for name, image in images.items()]
    prob = TASKS["edge"].decode(data[f"{data_set}.meter.batch0.pred.edge"])
    with tempfile.TemporaryDirectory() as folder:
        for name, file in zip(images, save_edge_maps(prob, meta, Path(folder)), strict=True):
            with Image.open(file) as image:
                want = data[f"{data_set}.saved_edge.{name}"]
                yield Measure(name, absolute_error(np.asarray(image), want), 0.0)


GROUPS = {"losses": _losses, "decoded outputs": _decoded, "scores": _scores, "boundary files": _edge_files}


def _single_image(path: Path) -> Iterator[Measure]:
    data = load_file(path)
    if PALETTE in data:
        yield Measure("palette", absolute_error(voc_palette(len(data[PALETTE])), data[PALETTE]), 0.0)
    for task, logits in _below(data, "pred.").items():
        want = data[f"image.{task}"].numpy()
        if task in COLOURS:
            yield Measure(f"picture of {task}", uncovered=COLOURS[task])
            continue
        decoded = TASKS[task].decode(resize(logits, want.shape[:2]))[0].permute(1, 2, 0)       # (H, W, C)
        picture = TASKS[task].colourise(decoded.numpy(), TaskContext(logits.shape[1]))
        want = want if want.ndim == 3 else np.repeat(want[..., None], 3, axis=-1)        # grey
        if task == "normals" and (want == MID_GREY).all(axis=-1).any():
            without = (decoded == 0).all(dim=-1, keepdim=True).numpy() & (want == MID_GREY).all(axis=-1, keepdims=True)
            want = np.where(without, picture, want)
            yield Measure("zero vectors among the normals", uncovered="they are black here, 127 there")
        yield Measure(f"picture of {task}", absolute_error(picture, want), 1.0)          # truncated to 8 bits
    for key in data.keys() - {PALETTE}:
        if "colormap" in key:
            yield Measure(key, absolute_error(torch.tensor(CITYSCAPES), data[key]), 0)
    if "input_image_rgb_u8" in data:
        yield Measure("prepared image", uncovered="`predict` keeps the aspect ratio, the original does not")
