"""MTMamba and MTMamba++ (Lin et al., ECCV 2024 and TPAMI 2025): whole models with the original's weights, their
losses, and the sizes of the published configurations.

A case is three files with the same name up to the first dot: a JSON file of sizes, the original's state dict, and
recorded tensors. The keys of the recorded tensors are translated one by one to places of our model, so a tensor that
nothing here corresponds to is listed as not covered.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from data.tasks import TASKS, TaskContext
from losses import MultiTaskLoss
from losses.schemes import SCHEMES
from models.build import build_model
from models.ops import count_scan_flops, selective_scan, set_scan_backend
from models.released.mtmamba import convert, recognises
from scripts.parity.base import Check, Folder, Measure, NotCovered, Options, absolute_error, scaled_error
from utils.checkpoint import compare_states
from utils.config import load_config
from utils.setup import model_from_config

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"model", "tasks", "num_output", "image_size", "output_size", "backbone", "decoder"}
WEIGHTS = {"semseg": 1.0, "depth": 1.0, "normals": 10.0, "edge": 50.0}      # of the one weighted recipe
FEATURE, OUTPUT, GRADIENT = 5e-5, 5e-4, 5e-4       # float32; gradients relative to the largest entry
EXACT = 1e-9                                       # float64


def checks(folder: Folder) -> Iterator[Check]:
    for table, content in folder.tables.items():
        if not isinstance(content, dict):
            continue
        if content.keys() >= SIZES:
            if case := _case(folder, table, content):
                for part, run in (("inside", _inside), ("outputs", _outputs), ("training", _training)):
                    yield Check(f"{table.name.split('.')[0]}/{part}", case.files, partial(_on_model, case, run))
        for name, entry in content.items():
            if isinstance(entry, dict) and {"config_file", "state_dict"} <= entry.keys() \
                    and recognises(entry["state_dict"]):
                yield Check(name, frozenset({table}), lambda options, entry=entry: _sizes(entry))
    for path, keys in folder.arrays.items():
        if "loss.total" in keys and any(key.startswith("grad_total.pred.") for key in keys):
            yield Check(path.stem, frozenset({path}), lambda options, path=path: _losses(path, options))


# ------------------------------------------------------------ models


@dataclass(frozen=True)
class Case:
    sizes: dict
    state: Path
    values: Path
    files: frozenset[Path]

    def model(self, options: Options) -> nn.Module:
        s, backbone, decoder = self.sizes, self.sizes["backbone"], self.sizes["decoder"]
        names = ("embed_dim", "depths", "num_heads", "window_size", "drop_path_rate")
        options_of_decoder = {"d_state": decoder["d_state"], "expand": decoder["ssm_ratio"],
                              "drop_path_rate": decoder["drop_path"]}
        if "head_channels" in decoder:
            options_of_decoder["head_channels"] = decoder["head_channels"]
        model = build_model(s["model"], "swin", {task: s["num_output"][task] for task in s["tasks"]},
                            tuple(s["image_size"]), output_size=tuple(s["output_size"]),
                            backbone_kwargs={name: backbone[name] for name in names}, model_kwargs=options_of_decoder)
        model.load_state_dict(convert(load_file(self.state), s["tasks"]))
        return model.to(options.device, options.dtype)


def _case(folder: Folder, table: Path, sizes: dict) -> Case | None:
    beside = {path: keys for path, keys in folder.arrays.items() if path.name.split(".")[0] == table.name.split(".")[0]}
    state = next((path for path, keys in beside.items() if recognises(keys)), None)
    wanted = {"image", *(f"eval.out.{task}" for task in sizes["tasks"])}
    values = next((path for path, keys in beside.items() if keys >= wanted), None)
    if state is None or values is None:
        return None
    return Case(sizes, state, values, frozenset({table, state, values}))


def _on_model(case: Case, run: Callable, options: Options) -> Iterator[Measure]:
    want = load_file(case.values, device=options.device)
    set_scan_backend(options.scan_backend)
    try:
        yield from run(case, case.model(options), want, options)
    finally:
        set_scan_backend("auto")


def _measure(name: str, got: Tensor, want: Tensor, float32: float, options: Options,
             error: Callable = absolute_error) -> Measure:
    """Of a key with "64" in its first part the reference is a float64 run, of any other a float32 run."""
    exact = options.dtype == torch.float64 and "64" in name.split(".")[0]
    return Measure(name, error(got, want), EXACT if exact else float32)


def _outputs(case: Case, model: nn.Module, want: dict, options: Options) -> Iterator[Measure]:
    with torch.no_grad():
        final = model.eval()(want["image"].to(options.dtype)).final
    for task, got in final.items():
        yield _measure(f"eval.out.{task}", got, want[f"eval.out.{task}"], OUTPUT, options)
        yield _measure(f"eval64.out.{task}", got[..., ::3, ::3], want[f"eval64.out.{task}"], OUTPUT, options)


# Recorded tensor -> module of ours whose output it is (a trailing < means its input).
PLACES = tuple((re.compile(pattern), place) for pattern, place in (
    (r"feat\.(\d)", r"encoder[\1]"),
    (r"bb\.patch_embed", "encoder.patch_embed"),
    (r"bb\.stages\.(\d)\.blocks\.(\d+)", r"encoder.layers.\1.blocks.\2"),
    (r"bb\.stages\.(\d)\.downsample", lambda match: f"encoder.layers.{int(match[1]) + 1}.downsample"),
    (r"dec\.(\d)\.ctm\.shared", r"decoder.ctm.\1.shared"),
    (r"dec\.(\d)\.ctm\.op\.(\w+)", r"decoder.ctm.\1.ss2d.\2"),
    (r"dec\.(\d)\.(\w+)\.expand", r"decoder.stm.\1.expand.\2"),
    (r"dec\.(\d)\.(\w+)\.reduce", r"decoder.stm.\1.fuse.\2"),
    (r"dec\.(\d)\.(\w+)\.stm1", r"decoder.stm.\1.stm.\2.0"),
    (r"dec\.(\d)\.(\w+)\.stm2", r"decoder.stm.\1.stm.\2.1"),
    (r"dec\.(\d)\.(\w+)\.ctm", r"decoder.ctm.\1[\2]"),
    (r"head\.(\w+)\.expand", r"heads.\1.proj<"),
    (r"head\.(\w+)\.logits", r"heads.\1.proj"),
))


def _inside(case: Case, model: nn.Module, want: dict, options: Options) -> Iterator[Measure]:
    """Backbone features, every recorded point inside the model, and the recorded scan by itself."""
    seen = _trace(model.eval(), want["image"].to(options.dtype))
    for key, value in want.items():
        run, _, point = key.partition(".")
        if run not in ("eval", "eval64") or point.startswith(("out.", "scan0.")):
            continue
        place = next((pattern.sub(target, point) for pattern, target in PLACES if pattern.fullmatch(point)), None)
        if place not in seen:
            yield Measure(key, uncovered="no such point in this program's model")
            continue
        got = seen[place].flatten(1, 2) if value.ndim == 3 else seen[place]        # tokens (B, H W, C)
        yield _measure(key, got, value, FEATURE if point.startswith("feat.") else OUTPUT, options)
    scan = {key.removeprefix("eval.scan0."): value.to(options.dtype) for key, value in want.items()
            if key.startswith("eval.scan0.")}
    if scan:
        y = scan.pop("y")
        yield _measure("eval.scan0.y", selective_scan(**scan, delta_softplus=True), y, FEATURE, options)


def _trace(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """Outputs of all modules by name: `name`, or `name[key]` of a list or dictionary; inputs as `name<`."""
    seen: dict[str, Tensor] = {}

    def record(name: str, args: tuple, output: Tensor | dict | list) -> None:
        if isinstance(output, Tensor):
            seen[name], seen[f"{name}<"] = output, args[0]
        elif isinstance(output, (dict, list)):
            items = output.items() if isinstance(output, dict) else enumerate(output)
            seen.update({f"{name}[{key}]": value for key, value in items})

    handles = [module.register_forward_hook(lambda _, args, output, name=name: record(name, args, output))
               for name, module in model.named_modules()]
    with torch.no_grad():
        model(image)
    for handle in handles:
        handle.remove()
    return seen


def _training(case: Case, model: nn.Module, want: dict, options: Options) -> Iterator[Measure]:
    """One step in training mode: outputs, loss, gradients, statistics of the batch norms."""
    model.train()
    image = want["image"].to(options.dtype).requires_grad_()
    final = model(image).final
    loss = sum((out * want[f"train.cot.{task}"].to(out.dtype)).mean() for task, out in final.items())
    loss.backward()
    for task, out in final.items():
        reference = f"train.out.{task}" if f"train.out.{task}" in want else f"eval.out.{task}"
        yield _measure(f"train.out.{task}", out, want[reference], OUTPUT, options)
    yield _measure("train.loss", loss, want["train.loss"][0], OUTPUT, options)
    if "train.loss64" in want:
        yield Measure("train.loss64", absolute_error(loss, want["train.loss64"][0]), options.pick(EXACT, OUTPUT))
    norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in model.parameters()]))
    yield Measure("train.grad_norm64", scaled_error(norm, want["train.grad_norm64"][0]), options.pick(EXACT, GRADIENT))
    gradients = {"image": image.grad} | {name: p.grad for name, p in model.named_parameters()}
    for run, every in (("train", 1), ("train64", 3)):
        yield _measure(f"{run}.grad.image", image.grad[..., ::every, ::every], want[f"{run}.grad.image"], GRADIENT,
                       options, scaled_error)
        for name, value in _ours(want, f"{run}.grad.param.", case).items():
            yield _measure(f"{run}.grad.{name}", gradients[name], value, GRADIENT, options, scaled_error)
    buffers = dict(model.named_buffers())
    for name, value in _ours(want, "train.buffer.", case).items():
        yield _measure(f"train.buffer.{name}", buffers[name], value, FEATURE, options)


def _ours(want: dict, prefix: str, case: Case) -> dict[str, Tensor]:
    """The recorded tensors with this prefix under our names and in our layout."""
    return convert({key.removeprefix(prefix): value for key, value in want.items() if key.startswith(prefix)},
                   case.sizes["tasks"])


# ------------------------------------------------------------ losses, sizes


def _losses(path: Path, options: Options) -> Iterator[Measure]:
    """The file does not say how it combines the task losses; its own numbers do."""
    data = load_file(path)
    tasks = [task for task in TASKS if f"pred.{task}" in data]
    parts = {task: data[f"loss.{task}"][0] for task in tasks}
    weights = {"log": dict.fromkeys(tasks, 1.0), "weighted_sum": {task: WEIGHTS.get(task, 1.0) for task in tasks}}
    scheme = next((name for name, combine in SCHEMES.items()
                   if torch.isclose(combine(parts, weights[name]), data["loss.total"][0], rtol=1e-6)), None)
    if scheme is None:
        raise NotCovered("the total is neither the sum of logarithms nor the weighted sum 1, 1, 10, 50")
    preds = {task: data[f"pred.{task}"].to(options.dtype).requires_grad_() for task in tasks}
    labels = {task: data[f"label.{task}"] for task in tasks}
    labels = {task: (x.unsqueeze(1) if x.ndim == 3 else x).to(options.dtype) for task, x in labels.items()}
    losses = {task: TASKS[task].loss(TaskContext(num_channels=preds[task].shape[1])) for task in tasks}
    out = MultiTaskLoss(losses, weights[scheme], scheme)(preds, labels)
    out["total"].backward()
    value, gradient = options.pick(2e-7, 1e-5), options.pick(2e-7, 1e-4)
    for name in (*tasks, "total"):
        yield Measure(f"loss.{name}", scaled_error(out[name], data[f"loss.{name}"][0]), value)
    for task in tasks:
        yield Measure(f"grad.{task}", scaled_error(preds[task].grad, data[f"grad_total.pred.{task}"]), gradient)


def _sizes(entry: dict) -> Iterator[Measure]:
    """Parameters one by one, their number, and the cost of one image; nothing is allocated."""
    path = ROOT / entry["config_file"]
    if not path.is_file():
        raise NotCovered(f"no {entry['config_file']} here")
    with torch.device("meta"):
        model = model_from_config(load_config(path)).eval()
        state = {key: torch.empty(shape) for key, shape in entry["state_dict"].items()}
        image = torch.empty(entry["input"])
    differences = compare_states(model.state_dict(), convert(state, list(model.heads)))
    yield Measure("parameters that are missing, extra or of another shape", sum(map(len, differences)), 0)
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    yield Measure("params_total", abs(sum(count.values()) - entry["params_total"]), 0)
    yield Measure("params_backbone", abs(count["encoder"] - entry["params_backbone"]), 0)
    with torch.no_grad(), FlopCounterMode(display=False) as products, count_scan_flops() as scans:
        model(image)
    operators = products.get_flop_counts()["Global"]
    macs = sum(flops for operator, flops in operators.items() if str(operator).startswith("aten.")) / 2e9
    yield Measure("gmacs", abs(macs - entry["gmacs_linear_conv_matmul"]), 0.006)   # two decimals are given
    updates = (scans.flops - scans.elements) / 9e9
    yield Measure("scan updates, G", abs(updates - entry["scan_state_updates_G"]), 0.0006)
