"""MTMamba and MTMamba++ (Lin et al., ECCV 2024 and TPAMI 2025): whole models with the original's weights,
their losses, and the sizes of the published configurations.

Tensors were recorded in a float32 and a float64 run ("eval" and "eval64", "train" and "train64"). Where both
recorded a quantity, the one in the arithmetic asked for is compared.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from losses.balancing import build_balancing
from models.model import MultiTaskModel
from models.ops.selective_scan import count_scan_flops, selective_scan
from models.released.mtmamba import MTMAMBA
from scripts.parity import compare
from scripts.parity.base import Bound, Check, Folder, Measure, Options, absolute_error, below, scaled_error
from scripts.parity.case import MODEL, Bounds, Case, System
from scripts.parity.program import build, experiment, flops, losses_and_gradients, parameters
from utils.engine.tasks import TASKS

SIZES = {"model", "tasks", "num_output", "image_size", "output_size", "backbone", "decoder"}
WEIGHTS = {"semseg": 1.0, "depth": 1.0, "normals": 10.0, "edge": 50.0}  # of the one weighted recipe
FEATURE = Bound(absolute_error, 1e-9, 5e-5)
VALUE, GRADIENT = Bound(scaled_error, 2e-7, 1e-5), Bound(scaled_error, 2e-7, 1e-4)  # of the losses alone


def _build(config: dict) -> MultiTaskModel:
    decoder, swin = config["decoder"], config["backbone"]
    options = {"d_state": decoder["d_state"], "expand": decoder["ssm_ratio"], "drop_path_rate": decoder["drop_path"]}
    if "head_channels" in decoder:
        options["head_channels"] = decoder["head_channels"]
    names = ("embed_dim", "depths", "num_heads", "window_size", "drop_path_rate")
    return build(config["model"], "swin", {task: config["num_output"][task] for task in config["tasks"]},
                 config["image_size"], {name: swin[name] for name in names}, options, label_size=config["output_size"])


def _run(kind: str, case: Case) -> str:
    """The recorded run that was made in our arithmetic."""
    return f"{kind}64." if case.options.dtype == torch.float64 else f"{kind}."


def _features(case: Case) -> Iterator[Measure]:
    """The backbone's maps."""
    with torch.no_grad():
        maps = case.model().eval().encoder(case.image())
    for index, got in enumerate(maps):
        want = case.values[f"{_run('eval', case)}feat.{index}"]
        yield FEATURE.measure(f"feat.{index}", got, want, case.options)


def _inside(case: Case) -> Iterator[Measure]:
    """Every recorded point inside the model, and the recorded scan by itself; all from a float32 run."""
    yield from compare.inside(case)
    scan = {key: value.to(case.options.dtype) for key, value in case.below("eval.scan0.").items()}
    if scan:
        y = scan.pop("y")
        yield Measure("scan0.y", absolute_error(selective_scan(**scan, delta_softplus=True), y), FEATURE.float32)


def _training(case: Case) -> Iterator[Measure]:
    """Outputs in training mode and the batch norms' statistics after them, from a float32 run."""
    step = compare.forward(case)
    recorded = case.below("eval.out.") | case.below("train.out.")  # a model without batch norm is recorded once
    for task, out in step.out.final.items():
        yield case.measure("train", f"train.out.{task}", out, recorded[task])
    yield from compare.buffers(case, step.model, "train.")


def _gradients(case: Case) -> Iterator[Measure]:
    step = compare.forward(case)
    yield from compare.loss_and_gradients(case, step, _run("train", case))
    norm = torch.stack([parameter.grad.norm() for parameter in step.model.parameters()]).norm()
    yield case.measure("gradient", "norm of all gradients", norm[None], case.values["train.grad_norm64"])


def _as_stored(got: Tensor, want: Tensor) -> Tensor:
    """Tokens are (B, H W, C); of maps in float64 every third row and column was stored."""
    if got.ndim == 4 and got.shape != want.shape:
        return got.flatten(1, 2) if want.ndim == 3 else got[..., ::3, ::3]
    return got


def _of_task(module: str) -> Callable[..., Tensor]:
    """The part of one task, of a decoder's module whose maps are (T, B, H, W, C)."""
    return lambda case, seen, stage, task: seen["decoder." + module.format(stage)][case.tasks.index(task)]


def _head_input(case: Case, seen: Mapping[str, Tensor], task: str) -> Tensor:
    """What a head's last layer sees; MTMamba's is never made as a map, but by the expansion on its own."""
    if f"heads.{task}.proj<0" in seen:
        return seen[f"heads.{task}.proj<0"]
    with torch.no_grad():
        return case.model().heads[task].expand(seen[f"heads.{task}<0"].movedim(1, -1)).movedim(-1, 1)


def _common(case: Case, seen: Mapping[str, Tensor], stage: str) -> Tensor:
    """MTMamba's common branch is one of T = 1, MTMamba++'s a map."""
    got = seen[f"decoder.ctm.{stage}.shared"]
    return got[0] if got.ndim == 5 else got


PLACES = (
    (r"bb\.patch_embed", "encoder.patch_embed"),
    (r"bb\.stages\.(\d)\.blocks\.(\d+)", r"encoder.layers.\1.blocks.\2"),
    (r"bb\.stages\.(\d)\.downsample", lambda case, seen, stage: seen[f"encoder.layers.{int(stage) + 1}.downsample"]),
    (r"dec\.(\d)\.ctm\.shared", _common),
    (r"dec\.(\d)\.ctm\.op\.(\w+)", _of_task("ctm.{}.ss2d")),
    (r"dec\.(\d)\.(\w+)\.expand", _of_task("stm.{}.expand")),
    (r"dec\.(\d)\.(\w+)\.reduce", _of_task("stm.{}.fuse")),
    (r"dec\.(\d)\.(\w+)\.stm1", _of_task("stm.{}.stm.0")),
    (r"dec\.(\d)\.(\w+)\.stm2", _of_task("stm.{}.stm.1")),
    (r"dec\.(\d)\.(\w+)\.ctm", _of_task("ctm.{}")),
    (r"head\.(\w+)\.expand", _head_input),
    (r"head\.(\w+)\.logits", r"heads.\1"),
)


def checks(folder: Folder) -> Iterator[Check]:
    yield from SYSTEM.checks(folder)
    for path, keys in folder.arrays.items():
        if "loss.total" in keys and any(key.startswith("grad_total.pred.") for key in keys):
            yield Check(path.stem, frozenset({path}), partial(_losses, path))


def _losses(path: Path, options: Options) -> Iterator[Measure]:
    """The file does not say how it combines the task losses; its own numbers do."""
    data = load_file(path)
    tasks = [task for task in TASKS if f"pred.{task}" in data]
    parts = {task: data[f"loss.{task}"][0] for task in tasks}
    weights = {"log": dict.fromkeys(tasks, 1.0),
               "weighted_sum": {task: WEIGHTS.get(task, 1.0) for task in tasks}}
    totals = {name: build_balancing(name, tasks, weights[name]).combine(parts, dict.fromkeys(tasks, 1.0))
              for name in weights}
    scheme = next(name for name, total in totals.items() if torch.isclose(total, data["loss.total"][0], rtol=1e-6))
    labels = {task: (x.unsqueeze(1) if x.ndim == 3 else x).to(options.dtype)
              for task, x in below(data, "label.").items()}
    preds = {task: data[f"pred.{task}"] for task in tasks}
    out, gradients = losses_and_gradients(preds, labels, weights[scheme], options, scheme=scheme)
    for name in (*tasks, "total"):
        yield VALUE.measure(f"loss.{name}", out[name], data[f"loss.{name}"][0], options)
    for task, grad in gradients.items():
        yield GRADIENT.measure(f"grad.{task}", grad, data[f"grad_total.pred.{task}"], options)


def _full_size(entry: dict) -> Iterator[Measure]:
    shapes, image_size = entry["state_dict"], tuple(entry["input"][-2:])
    model = experiment(Path(entry["config_file"])).eval()
    derived = sum(key.endswith("relative_position_index") for key in shapes)
    yield from compare.keys(model, shapes, tuple(model.heads), entry["params_total"], joined=derived)
    yield compare.difference("params_backbone", parameters(model.encoder), entry["params_backbone"])
    with count_scan_flops() as scans:
        products = flops(model, image_size)
    macs = products.get_total_flops() / 2e9 - scans.flops / 1e9
    yield compare.difference("gmacs", macs, entry["gmacs_linear_conv_matmul"], 0.006)   # two decimals are given
    updates = (scans.flops - scans.elements) / 9e9
    yield compare.difference("scan updates, G", updates, entry["scan_state_updates_G"], 0.0006)


SYSTEM = System(
    released=("MTMamba",),
    fits=lambda config: config.keys() >= SIZES,
    build=_build,
    convert=MTMAMBA.convert,
    groups={"features": (_features, *MODEL, "eval.feat."), "inside": (_inside, *MODEL, "eval.mid."),
            "outputs": (lambda case: compare.outputs(case, _run("eval", case)), *MODEL, "eval.out."),
            "training": (_training, *MODEL, "eval.out."),
            "gradients": (_gradients, *MODEL, "train.fixed.")},
    names=((r"eval\.((?:bb|dec|head)\..*)", r"eval.mid.\1"),
           (r"train\.cot\.(\w+)", r"train.fixed.\1"),
           (r"train\.loss64", "train64.loss"),
           (r"train\.buffer\.(.*)", r"train.after.\1"),
           (r"(train|train64)\.grad\.param\.(.*)", r"\1.grad.\2")),
    places=PLACES,
    bounds=Bounds(value=Bound(absolute_error, 1e-9, 5e-4), loss=Bound(absolute_error, 1e-9, 5e-4),
                  gradient=Bound(scaled_error, 1e-9, 5e-4), inside=Bound(absolute_error, 5e-4, 5e-4),
                  train=Bound(absolute_error, 5e-4, 5e-4), after=Bound(absolute_error, 5e-5, 5e-5)),
    uncovered=lambda config, name: "" if any(re.fullmatch(pattern, name) for pattern, _ in PLACES)
    else "no such point in this program's model",
    as_stored=_as_stored,
    uses_scan=True,
    full_size=_full_size)
