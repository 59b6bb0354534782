"""Around the models: losses with their gradients, decoded outputs, scores, boundary files and pictures.

Three kinds of files. Of all programs: arrays "output/<task>" beside "logits/<task>", edge pictures beside "logits" and
"sizes", and a table of scores of inputs with nothing to measure. Of InvPT and TaskPrompter: tables "<set>.loss",
"<set>.scores", ... with arrays "<set>.loss.pred.<task>", ..., and pictures of the single-image script; without
intermediate predictions a table is in the successors' convention: mIoU and maxF in percent, depth scored between 0 and
80 m, and -1 for depth without a value. Of DeMT: arrays "<set>.pred.<task>", "metric.<name>.pred0", ... beside a table
of the weights of edge pixels. The last two are in float32.
"""

import math
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from data.datasets.cityscapes import COLOURS as CITYSCAPES
from data.labels import VOID
from evaluation.boundary.edge_maps import save_edge_maps
from evaluation.depth import DepthMeter
from evaluation.saliency import THRESHOLDS
from models.blocks.resize import resize
from scripts.parity.base import (
    Arrays,
    Bound,
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
from scripts.parity.metrics import VALID_RANGE
from scripts.parity.program import context, decode, filled, losses_and_gradients, meter
from utils.engine.tasks import TASKS
from utils.engine.views import voc_palette

LOSS, SCORE = Bound(scaled_error, 2e-6, 2e-6), Bound(scaled_error, 1e-6, 1e-6)
CONDITIONS = ("all_void", "no_positive", "batch_of_one")
CHANNELS = {"semseg": 40, "human_parts": 7}          # of the degenerate inputs made here; any number would do
PERCENT = ("mIoU", "maxF")
MID_GREY, PALETTE = 127, "label_colormap_41"
DEMT_WEIGHTS = {"semseg": 1, "human_parts": 2, "sal": 5, "normals": 10, "depth": 1, "edge": 50}
DEMT_METERS = {"depth": partial(DepthMeter, 0.0)}       # 0 is void there; the data pipeline marks 255
PICTURE_SCALE = {"normals": (127.5, 1), "sal": (255, 0), "edge": (255, 0)}      # factor and offset of stored values
OTHER_COLOURS, NEVER_NEGATIVE, GREY_ZEROS = {"depth"}, {"depth"}, {"normals"}
DEMT_SCORES = {"semseg": "mIoU", "human_parts": "mIoU", "depth": "rmse", "normals": "mean", "sal": "maxF_exact"}


def compare_losses(got: Mapping[str, Tensor], wanted: Mapping[str, float | Tensor], options: Options,
                   prefix: str = "") -> Iterator[Measure]:
    """Losses by their published names: "inter_<task>" is that of a preliminary prediction."""
    for name, want in wanted.items():
        loss = got[name.replace("inter_", "inter/", 1)]
        yield LOSS.measure(f"{prefix}{name}", loss.reshape(np.shape(want)), want, options)


# ------------------------------------------------------------ all programs


def output_checks(folder: Folder) -> Iterator[Check]:
    for path, keys in folder.arrays.items():
        if path.suffix == ".npz" and {"logits", "sizes"} <= keys:
            yield Check(path.stem, frozenset({path}), partial(_saved_edges, np.load(path)))
        for task in sorted(key.removeprefix("output/") for key in keys if key.startswith("output/")):
            if path.suffix == ".npz" and f"logits/{task}" in keys:
                yield Check(f"{path.stem}/{task}", frozenset({path}), partial(_output, np.load(path), task))
    for path, content in folder.tables.items():
        if isinstance(content, dict) and content and all(k.partition("/")[0] in CONDITIONS for k in content):
            for key, want in content.items():
                yield Check(f"{path.stem}/{key}", frozenset({path}), partial(_degenerate, key, want))


def _output(data: Arrays, task: str, options: Options) -> Iterator[Measure]:
    if task not in TASKS:
        raise NotCovered("not a task of this program")
    logits = torch.from_numpy(data[f"logits/{task}"])
    yield _compare_decoded("output", task, logits.to(options.dtype), data[f"output/{task}"])


def _compare_decoded(name: str, task: str, logits: Tensor, want: np.ndarray) -> Measure:
    """The references hand their meters H x W (x C) maps of values in 0..255; class ids and depth unscaled."""
    got = decode(task, logits)
    factor, offset = PICTURE_SCALE.get(task, (1, 0))
    got = ((got + offset) * factor).permute(0, 2, 3, 1)                   # (B, C, H, W) -> (B, H, W, C)
    got = got[..., 0] if got.ndim > want.ndim else got
    exact = want.dtype.kind == "i"
    return Measure(name, (absolute_error if exact else scaled_error)(got, want), 0.0 if exact else 1e-6)


def _saved_edges(data: Arrays, options: Options) -> Iterator[Measure]:
    names = sorted(key for key in data if key not in ("logits", "sizes"))       # one per image
    sizes = dict(zip(names, data["sizes"].tolist(), strict=True))
    yield from _edge_files(torch.from_numpy(data["logits"]), sizes, data)


def _edge_files(logits: Tensor, sizes: Mapping[str, list[int]], wanted: Arrays) -> Iterator[Measure]:
    meta = [{"name": name, "size": tuple(size)} for name, size in sizes.items()]
    with tempfile.TemporaryDirectory() as folder:
        for name, path in zip(sizes, save_edge_maps(decode("edge", logits), meta, Path(folder)), strict=True):
            with Image.open(path) as image:
                yield Measure(name, absolute_error(np.asarray(image), wanted[name]), 0.0)


def _degenerate(key: str, want: dict | str, options: Options) -> Iterator[Measure]:
    """A reference figure is met; where it raised, ours is NaN (nothing valid) or finite (batch of one)."""
    condition, _, task = key.partition("/")
    if task not in TASKS:
        raise NotCovered("not a task of this program")
    channels = CHANNELS.get(task, TASKS.load(task).num_channels)
    label = torch.zeros(1, TASKS.load(task).label.channels, 18, 22)
    logits = torch.randn(1, channels, 18, 22, generator=torch.Generator().manual_seed(0))
    if condition == "all_void":
        label.fill_(context(channels).ignore_index)
    figures = filled(meter(task, channels), task, [(logits, label)], Options(torch.float32)).compute()
    if isinstance(want, dict):
        for name, value in want.items():
            yield Measure(name, absolute_error(figures[name], value), 0.0)
        return
    value = figures[TASKS.load(task).main_score(figures).key]
    good = math.isnan(value) if condition == "all_void" else math.isfinite(value)
    note = f"{value:.3g} where the reference raised {want.partition(':')[0]}"
    yield Measure(note, 0.0 if good else math.inf)


# ------------------------------------------------------------ InvPT, TaskPrompter


def invpt_checks(folder: Folder) -> Iterator[Check]:
    for path, keys in folder.arrays.items():
        for data_set in sorted({match[1] for key in keys if (match := re.match(r"(\w+)\.loss\.pred\.", key))}):
            table = next((p for p, content in folder.tables.items() if f"{data_set}.scores" in content), None)
            if table is None:
                continue
            figures = below(folder.tables[table], f"{data_set}.")
            figures["successor"] = not any(key.startswith(f"{data_set}.loss.inter.") for key in keys)
            for group, run in GROUPS.items():
                yield Check(f"{path.stem}/{data_set} {group}", frozenset({path, table}),
                            partial(_of_set, run, figures, path, data_set))
        if any(f"image.{task}" in keys and f"pred.{task}" in keys for task in TASKS):
            tables = {p for p in folder.tables if p.stem == path.stem}
            yield Check(path.stem, frozenset({path, *tables}), partial(_single_image, path))


def _of_set(run: Callable, figures: dict, path: Path, data_set: str, options: Options) -> Iterator[Measure]:
    """A comparison with the arrays of one set."""
    yield from run(figures, below(load_file(path), f"{data_set}."), options)


def _context(figures: dict) -> dict:
    return {"edge_w": figures["edge_w"], "valid_range": VALID_RANGE if figures["successor"] else None}


def _labels(data: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of a batch; real depth is never negative, the successors' void value is."""
    labels = below(data, "label.")
    return {task: torch.where(label < 0, VOID, label) if task in NEVER_NEGATIVE else label
            for task, label in labels.items()}


def _losses(figures: dict, data: dict[str, Tensor], options: Options) -> Iterator[Measure]:
    data = below(data, "loss.")
    got, gradients = losses_and_gradients(below(data, "pred."), _labels(data), figures["loss_weights"], options,
                                          below(data, "inter."), **_context(figures))
    yield from compare_losses(got, figures["loss"], options)
    for name, place in (("grad_of_total", ""), ("grad_of_total_inter", "inter/")):
        for task, want in below(data, f"{name}.").items():
            yield Measure(f"{name}.{task}", entry_error(gradients[place + task], want), 1e-5)


def _batches(data: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Arrays of the validation batches: pred.<task>, label.<task>, processed.<task>."""
    index = 0
    while batch := below(data, f"meter.batch{index}."):
        yield batch
        index += 1


def _decoded(figures: dict, data: dict[str, Tensor], options: Options) -> Iterator[Measure]:
    for index, batch in enumerate(_batches(data)):
        for task, want in below(batch, "processed.").items():
            logits = batch[f"pred.{task}"].to(options.dtype)
            yield _compare_decoded(f"{task} of batch {index}", task, logits, want.numpy())


def _scores(figures: dict, data: dict[str, Tensor], options: Options) -> Iterator[Measure]:
    for task, scores in figures["scores"].items():
        batches = [(batch[f"pred.{task}"], _labels(batch)[task]) for batch in _batches(data)]
        got = filled(meter(task, batches[0][0].shape[1], **_context(figures)), task, batches, options).compute()
        for name, want in scores.items():
            yield SCORE.measure(f"{task} {name}", got[name],
                                want / 100 if figures["successor"] and name in PERCENT else want, options)


def _boundary_files(figures: dict, data: dict[str, Tensor], options: Options) -> Iterator[Measure]:
    sizes = {name: image["original_size_hw"] for name, image in figures["saved_edge"].items()}
    yield from _edge_files(data["meter.batch0.pred.edge"], sizes, below(data, "saved_edge."))


GROUPS = {"losses": _losses, "decoded outputs": _decoded, "scores": _scores, "boundary files": _boundary_files}


def _single_image(path: Path, options: Options) -> Iterator[Measure]:
    data = load_file(path)
    if PALETTE in data:
        yield Measure("palette", absolute_error(voc_palette(len(data[PALETTE])), data[PALETTE]), 0.0)
    for task, logits in below(data, "pred.").items():
        if task in OTHER_COLOURS:
            yield Measure(f"picture of {task}", uncovered=f"{task} has colours of its own here")
            continue
        want = data[f"image.{task}"].numpy()
        decoded = decode(task, resize(logits, want.shape[:2]))[0].permute(1, 2, 0)       # (H, W, C)
        picture = TASKS.load(task).view.picture(decoded.numpy(), context(logits.shape[1]), want)
        want = want if want.ndim == 3 else np.repeat(want[..., None], 3, axis=-1)        # grey
        if task in GREY_ZEROS and (want == MID_GREY).all(axis=-1).any():
            without = (decoded == 0).all(dim=-1, keepdim=True).numpy() & (want == MID_GREY).all(axis=-1, keepdims=True)
            want = np.where(without, picture, want)
            yield Measure("zero vectors among the normals", uncovered="they are black here, 127 there")
        yield Measure(f"picture of {task}", absolute_error(picture, want), 1.0)          # truncated to 8 bits
    for key in data.keys() - {PALETTE}:
        if "colormap" in key:
            yield Measure(key, absolute_error(torch.tensor(CITYSCAPES), data[key]), 0)
    if "input_image_rgb_u8" in data:
        yield Measure("prepared image", uncovered="`predict` keeps the aspect ratio, the original does not")


# ------------------------------------------------------------ DeMT


def demt_checks(folder: Folder) -> Iterator[Check]:
    for path, keys in folder.arrays.items():
        tables = (p for p, content in folder.tables.items() if stem(p) == stem(path) and "edge_pos_weight" in content)
        table = next(tables, None)
        if table is None or not any(".loss_unweighted." in key for key in keys):
            continue
        files = frozenset({path, table})
        for data_set, edge_w in folder.tables[table]["edge_pos_weight"].items():
            yield Check(f"{stem(path)}/{data_set} losses", files, partial(_demt_losses, path, data_set, edge_w))
        for metric in folder.tables[table]["metrics"]:
            yield Check(f"{stem(path)}/{metric} score", files, partial(_demt_score, path, metric))


def _demt_losses(path: Path, data_set: str, edge_w: float, options: Options) -> Iterator[Measure]:
    data = below(load_file(path), f"{data_set}.")
    preds = below(data, "pred.")
    losses, gradients = losses_and_gradients(preds, below(data, "label."), DEMT_WEIGHTS, options, edge_w=edge_w)
    yield from compare_losses(losses, below(data, "loss_unweighted.") | {"total": data["loss_total"]}, options)
    weighted = {task: DEMT_WEIGHTS[task] * losses[task] for task in preds}
    yield from compare_losses(weighted, below(data, "loss_weighted."), options, "weighted ")
    for task, want in below(data, "grad_total.").items():
        yield Measure(f"grad {task}", entry_error(gradients[task], want), 1e-4)


def _demt_score(path: Path, metric: str, options: Options) -> Iterator[Measure]:
    task = next((name for name in DEMT_SCORES if metric.startswith(name)), None)
    if task is None:
        raise NotCovered("not a score of this program")
    data = below(load_file(path), f"metric.{metric}.")
    scored = DEMT_METERS[task]() if task in DEMT_METERS else meter(task, data["pred0"].shape[1])
    batches = [(data[f"pred{number}"], data[f"target{number}"]) for number in range(len(below(data, "pred")))]
    got = filled(scored, task, batches, options).compute()[DEMT_SCORES[task]]
    yield SCORE.measure(DEMT_SCORES[task], torch.tensor([got]), data["value"], options)
    if "thresholds" in data:
        yield Measure("thresholds", absolute_error(torch.as_tensor(THRESHOLDS), data["thresholds"]), 1e-6)
