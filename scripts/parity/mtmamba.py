"""MTMamba and MTMamba++ (Lin et al., ECCV 2024 and TPAMI 2025): whole models with the original's weights,
their losses, and the sizes of the published configurations.

A case is three files with the same name up to the first dot: a JSON file of sizes, the original's state dict,
and recorded tensors of a float32 and a float64 run. Where both runs recorded a quantity, the one in the
arithmetic asked for is compared. A recorded point inside the model that ours does not have is "not covered".
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from losses.schemes import SCHEMES
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from evaluation.evaluator import TaskContext
from losses.multi_task import MultiTaskLoss
from models.build import build_model
from models.ops.scan_choice import set_scan_backend
from models.ops.selective_scan import count_scan_flops, selective_scan
from models.released.mtmamba import convert, recognises
from scripts.parity.base import Check, Folder, Measure, NotCovered, Options, absolute_error, below, scaled_error, stem
from utils.engine.build import model_from_config
from utils.engine.checkpoint import compare_states, load_model
from utils.engine.config import load_config
from utils.engine.tasks import TASKS

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"model", "tasks", "num_output", "image_size", "output_size", "backbone", "decoder"}
WEIGHTS = {"semseg": 1.0, "depth": 1.0, "normals": 10.0, "edge": 50.0}  # of the one weighted recipe
EXACT = 1e-9  # float64
FEATURE, OUTPUT, GRADIENT = 5e-5, 5e-4, 5e-4  # float32; gradients relative to the largest entry


def checks(folder: Folder) -> Iterator[Check]:
    for table, content in folder.tables.items():
        if not isinstance(content, dict):
            continue
        if content.keys() >= SIZES and (case := _case(folder, table, content)):
            for name, part in PARTS.items():
                yield Check(f"{stem(table)}/{name}", case.files, partial(_on_model, case, part))
        for name, entry in content.items():
            is_manifest = isinstance(entry, dict) and {"config_file", "state_dict"} <= entry.keys()
            if is_manifest and recognises(entry["state_dict"]):
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
        sizes, decoder = self.sizes, self.sizes["decoder"]
        model_kwargs = {"d_state": decoder["d_state"], "expand": decoder["ssm_ratio"],
                        "drop_path_rate": decoder["drop_path"]}
        if "head_channels" in decoder:
            model_kwargs["head_channels"] = decoder["head_channels"]
        names = ("embed_dim", "depths", "num_heads", "window_size", "drop_path_rate")
        model = build_model(
            sizes["model"], "swin", {task: sizes["num_output"][task] for task in sizes["tasks"]},
            tuple(sizes["image_size"]), label_size=tuple(sizes["output_size"]), model_kwargs=model_kwargs,
            backbone_kwargs={name: sizes["backbone"][name] for name in names})
        load_model(model, load_file(self.state), self.state)
        return model.to(options.device, options.dtype)

    def ours(self, tensors: dict[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
        """The tensors with this prefix, under our names and in our layout."""
        return convert(below(tensors, prefix), self.sizes["tasks"])


def _case(folder: Folder, table: Path, sizes: dict) -> Case | None:
    beside = folder.beside(table)
    state = next((path for path, keys in beside.items() if recognises(keys)), None)
    wanted = {"image", *(f"eval.out.{task}" for task in sizes["tasks"])}
    values = next((path for path, keys in beside.items() if keys >= wanted), None)
    if state is None or values is None:
        return None
    return Case(sizes, state, values, frozenset({table, state, values}))


def _on_model(case: Case, part: Callable, options: Options) -> Iterator[Measure]:
    want = load_file(case.values, device=options.device)
    set_scan_backend(options.scan_backend)
    try:
        yield from part(case, case.model(options), want, options)
    finally:
        set_scan_backend("auto")


def _run(kind: str, options: Options) -> str:
    """The recorded run that was made in our arithmetic: eval or eval64, train or train64."""
    return f"{kind}64" if options.dtype == torch.float64 else kind


def _outputs(case: Case, model: nn.Module, want: dict, options: Options) -> Iterator[Measure]:
    """Predictions in evaluation mode."""
    with torch.no_grad():
        final = model.eval()(want["image"].to(options.dtype)).final
    every, run = options.pick(3, 1), _run("eval", options)
    for task, out in final.items():
        error = absolute_error(out[..., ::every, ::every], want[f"{run}.out.{task}"])
        yield Measure(f"out.{task}", error, options.pick(EXACT, OUTPUT))


def _features(case: Case, model: nn.Module, want: dict, options: Options) -> Iterator[Measure]:
    """The backbone's maps."""
    with torch.no_grad():
        maps = model.eval().encoder(want["image"].to(options.dtype))
    for index, got in enumerate(maps):
        error = absolute_error(got, want[f"{_run('eval', options)}.feat.{index}"])
        yield Measure(f"feat.{index}", error, options.pick(EXACT, FEATURE))


# Recorded tensor -> module of ours whose output it is (a trailing < means its input).
PLACES = tuple((re.compile(pattern), place) for pattern, place in (
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
    """Every recorded point inside the model, and the recorded scan by itself; all from a float32 run."""
    seen = _trace(model.eval(), want["image"].to(options.dtype))
    for key, value in want.items():
        point = key.removeprefix("eval.")
        if not key.startswith("eval.") or point.startswith(("out.", "feat.", "scan0.")):
            continue
        matches = ((pattern.fullmatch(point), place) for pattern, place in PLACES)
        place = next((match.re.sub(place, point) for match, place in matches if match), None)
        if place not in seen:
            yield Measure(point, uncovered="no such point in this program's model")
            continue
        got = seen[place].flatten(1, 2) if value.ndim == 3 else seen[place]  # tokens are (B, H W, C)
        yield Measure(point, absolute_error(got, value), OUTPUT)
    scan = {key: value.to(options.dtype) for key, value in below(want, "eval.scan0.").items()}
    if scan:
        y = scan.pop("y")
        yield Measure("scan0.y", absolute_error(selective_scan(**scan, delta_softplus=True), y), FEATURE)


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
    """Outputs in training mode and the batch norms' statistics after them, from a float32 run."""
    with torch.no_grad():
        final = model.train()(want["image"].to(options.dtype)).final
    for task, out in final.items():  # a model without batch norm is recorded once
        reference = want.get(f"train.out.{task}", want[f"eval.out.{task}"])
        yield Measure(f"train.out.{task}", absolute_error(out, reference), OUTPUT)
    buffers = dict(model.named_buffers())
    for name, value in case.ours(want, "train.buffer.").items():
        yield Measure(name, absolute_error(buffers[name], value), FEATURE)


def _gradients(case: Case, model: nn.Module, want: dict, options: Options) -> Iterator[Measure]:
    """Loss sum_t mean(out_t * cot_t) in training mode and its gradients."""
    image = want["image"].to(options.dtype).requires_grad_()
    final = model.train()(image).final
    loss = sum((out * want[f"train.cot.{task}"].to(out.dtype)).mean() for task, out in final.items())
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    run, every, limit = _run("train", options), options.pick(3, 1), options.pick(EXACT, GRADIENT)
    recorded = want[run.replace("train", "train.loss")][0]
    yield Measure("loss", absolute_error(loss, recorded), options.pick(EXACT, OUTPUT))
    yield Measure("norm of all gradients", scaled_error(norm, want["train.grad_norm64"][0]), limit)
    error = scaled_error(image.grad[..., ::every, ::every], want[f"{run}.grad.image"])
    yield Measure("grad.image", error, limit)
    for name, value in case.ours(want, f"{run}.grad.param.").items():
        yield Measure(f"grad.{name}", scaled_error(gradients[name], value), limit)


PARTS = {"features": _features, "inside": _inside, "outputs": _outputs, "training": _training,
         "gradients": _gradients}


# ------------------------------------------------------------ losses, sizes


def _losses(path: Path, options: Options) -> Iterator[Measure]:
    """The file does not say how it combines the task losses; its own numbers do."""
    data = load_file(path)
    tasks = [task for task in TASKS if f"pred.{task}" in data]
    parts = {task: data[f"loss.{task}"][0] for task in tasks}
    weights = {"log": dict.fromkeys(tasks, 1.0),
               "weighted_sum": {task: WEIGHTS.get(task, 1.0) for task in tasks}}
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
        error = scaled_error(preds[task].grad, data[f"grad_total.pred.{task}"])
        yield Measure(f"grad.{task}", error, gradient)


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
    macs = products.get_total_flops() / 2e9 - scans.flops / 1e9
    yield Measure("gmacs", abs(macs - entry["gmacs_linear_conv_matmul"]), 0.006)   # two decimals are given
    updates = (scans.flops - scans.elements) / 9e9
    yield Measure("scan updates, G", abs(updates - entry["scan_state_updates_G"]), 0.0006)
