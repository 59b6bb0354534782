"""MLoRE as published: outputs, features inside, gates, losses, gradients and folded kernels of whole models.

A case is a table with the options of the model, and beside it, under the same name up to the first dot, the original
state dict and arrays: "eval.*", "train.*" (router noise zero), "train_noise.*" with the noise used, and results of
both gate modes with and without folding. Most references ran in float32 and are compared as such in any
arithmetic; "eval64" and "train64" ran in float64. A manifest lists the keys of the full-size models with their shapes.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from data.labels import VOID
from evaluation.evaluator import TaskContext
from losses.multi_task import MultiTaskLoss
from models.build import build_model
from models.model import MultiTaskModel, Predictions
from models.released.mlore import is_dead, locate, recognises, reshaped
from scripts.parity.base import Check, Folder, Measure, Options, below, scaled_error, stem
from scripts.parity.mlore_inside import record_inside
from scripts.parity.models import compare_keys, manifests
from utils.engine.checkpoint import convert_released, load_model
from utils.engine.tasks import TASKS, tasks_named

OPTIONS = ("final_embed_dim", "rank_list", "topk", "spe_rank", "pre_softmax")
GATE_MODES = {"mask_then_softmax": True, "softmax_then_mask": False}
BALANCE = "load_balancing"
SINGLE, SINGLE_LOOSE = 2e-5, 1e-4  # relative to the largest entry: references that ran in float32


@dataclass(frozen=True)
class Case:
    """One published model of toy size."""

    config: dict
    files: tuple[Path, ...]
    dtype: torch.dtype

    @cached_property
    def arrays(self) -> list[dict[str, Tensor]]:
        return [load_file(path) for path in self.files]

    def model(self, **options) -> MultiTaskModel:
        """With the reference's weights, loaded as a released checkpoint is; the balancing loss has the weight 1."""
        [state] = [tensors for tensors in self.arrays if recognises(tensors)]
        model = build(self.config, self.config["tasks"], load_balancing_weight=1.0, **options)
        load_model(model, state, self.files[0])
        return model.to(self.dtype)

    def reference(self, prefix: str) -> dict[str, Tensor]:
        """Arrays below a prefix, without it."""
        return {key: value for tensors in self.arrays for key, value in below(tensors, prefix).items()}

    def image(self) -> Tensor:
        return self.reference("input")[""].to(self.dtype)


def build(config: Mapping, tasks: Mapping[str, int], **options) -> MultiTaskModel:
    """The model of a table of options, without stochastic depth. `tasks` in any order."""
    sizes = {key: config[key] for key in ("embed_dim", "depth", "num_heads", "patch_size")}
    taps = (*config["select_list"], config["depth"])
    return build_model("MLoRE", "vit", {task: tasks[task] for task in tasks_named(tasks)}, tuple(config["img_size"]),
                       backbone_kwargs={**sizes, "taps": taps, "drop_path_rate": 0.0},
                       model_kwargs={**{key: config[key] for key in OPTIONS}, **options})


def checks(folder: Folder) -> Iterator[Check]:
    for path, config in folder.tables.items():
        if isinstance(config, dict) and "tasks" in config and config.keys() >= set(OPTIONS):
            yield from _case(folder, path, config)
    yield from manifests(folder, lambda entry: recognises(entry.get("state_dict", ())), _manifest)


def _case(folder: Folder, path: Path, config: dict) -> Iterator[Check]:
    arrays = folder.beside(path)
    if not any(recognises(keys) for keys in arrays.values()):
        return
    stored = frozenset(key for keys in arrays.values() for key in keys)
    for group, (prefix, run) in GROUPS.items():
        if any(key.startswith(prefix) for key in stored):
            yield Check(f"{stem(path)}/{group}", frozenset({path, *arrays}),
                        lambda options, run=run, prefix=prefix:
                        run(Case(config, tuple(arrays), options.dtype), options, prefix))


def _value(name: str, got: Tensor, want: Tensor, options: Options, loose: bool = False) -> Measure:
    """Relative to the largest entry; `loose` for gradients and sums that cancel."""
    single = SINGLE_LOOSE if loose else SINGLE
    tolerance = options.pick(1e-9, single) if want.dtype == torch.float64 else single
    return Measure(name, scaled_error(got, want), tolerance)


def _outputs(case: Case, options: Options, prefix: str) -> Iterator[Measure]:
    with torch.no_grad():
        out = case.model().eval()(case.image())
    for task, want in case.reference(f"{prefix}out.").items():
        yield _value(f"{prefix}out.{task}", out.final[task], want, options)
    for want in case.reference(f"{prefix}cv").values():
        yield _value(f"{prefix}cv", out.extra[BALANCE], want, options)


def _inside(case: Case, options: Options, prefix: str) -> Iterator[Measure]:
    model = case.model().eval()
    seen = record_inside(model)
    with torch.no_grad():
        model(case.image())
    for name, want in case.reference(prefix).items():
        name_here = name.removeprefix("detail.")
        yield _value(name, seen[name_here].reshape(want.shape), want, options)


def _train(case: Case, noise: Mapping[str, Tensor]) -> tuple[MultiTaskModel, Tensor, Predictions, dict[str, Tensor]]:
    """Model, image, predictions and gates after a forward pass with batch statistics; no noise where none is given."""
    model, image = case.model().train(), case.image().requires_grad_()
    seen = record_inside(model)
    for stage, modules in (("MLoRE_1", model.decoder.first), ("MLoRE_2", model.decoder.second)):
        for tap, module in enumerate(modules):
            for task, router in module.router.items():
                drawn = noise.get(f"{stage}.{tap}.{task}")
                router.draw_noise = lambda scores, drawn=drawn: (
                    torch.zeros_like(scores) if drawn is None else drawn.to(scores))
    return model, image, model(image), seen


def _training(case: Case, options: Options, prefix: str) -> Iterator[Measure]:
    """Outputs, gates, buffers, gradients of L (sum of mean(output * fixed) over tasks) and of the balancing term."""
    model, image, out, seen = _train(case, case.reference("noise.") if prefix == "train_noise." else {})
    for task, want in case.reference(f"{prefix}out.").items():
        yield _value(f"{prefix}out.{task}", out.final[task], want, options)
    for name, want in case.reference(f"{prefix}gate.").items():
        yield _value(f"{prefix}gate.{name}", seen[f"{name}.gate"], want, options)
    buffers = dict(model.named_buffers())
    for key, want in case.reference(f"{prefix}buffer_after.").items():
        yield _value(f"after {key}", buffers[locate(key)[0]], want, options)
    fixed = case.reference("loss_weight_tensor.")
    total = torch.stack([(logits * fixed[task]).mean() for task, logits in out.final.items()]).sum()
    for name, value, part in (("L", total, "grad."), ("cv", out.extra[BALANCE], "grad_cv.")):
        for want in case.reference(f"{prefix}{name}").values():
            yield _value(f"{prefix}{name}", value, want, options, loose=True)
        gradients = _gradients(model, image, value)
        for key, want in case.reference(f"{prefix}{part}").items():
            yield _value(f"{prefix}{part}{key}", *_same_part(key, gradients, want, case), options, loose=True)


def _gradients(model: MultiTaskModel, image: Tensor, value: Tensor) -> dict[str, Tensor]:
    tensors = {"input": image, **dict(model.named_parameters())}
    found = torch.autograd.grad(value, list(tensors.values()), retain_graph=True, allow_unused=True)
    return {name: torch.zeros_like(tensor) if grad is None else grad
            for (name, tensor), grad in zip(tensors.items(), found, strict=True)}


def _same_part(key: str, tensors: Mapping[str, Tensor], want: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    """The reference tensor in our shape, and the part of ours that belongs to it."""
    name, place = locate(key)
    ours = tensors[name]
    if ".experts." in name:
        sizes = [1] * len(case.config["rank_list"]) if name.endswith("up_bias") else case.config["rank_list"]
        ours = ours.split(list(sizes), dim=1 if name.endswith(".up") else 0)[place]
    return ours, reshaped(name, want)


def _losses(case: Case, options: Options, prefix: str) -> Iterator[Measure]:
    """The published losses with their weights on fixed labels."""
    *_, out, _ = _train(case, {})
    config, labels = case.config, case.reference("gt.")
    weights = dict(config["loss_weights"])
    if "depth" in labels:
        labels["depth"] = torch.where(labels["depth"] == 0, VOID, labels["depth"])  # the original's void is 0
    contexts = {task: TaskContext(channels, edge_w=config["edge_pos_weight"]) for task, channels
                in config["tasks"].items()}
    criterion = MultiTaskLoss({task: TASKS[task].loss(context) for task, context in contexts.items()}, weights)
    got = criterion(out.final, labels, extra={BALANCE: weights[BALANCE] * out.extra[BALANCE]})
    got["cv"] = out.extra[BALANCE]
    for name, want in case.reference(prefix).items():
        yield _value(f"loss.{name}", got[name], want, options)


def _folding(case: Case, options: Options, prefix: str) -> Iterator[Measure]:
    """Both gate modes: unfolded and folded against the reference."""
    for mode in GATE_MODES:
        for form, model in _forms(case, mode).items():
            seen = record_inside(model)
            with torch.no_grad():
                out = model(case.image()).final
            for task, want in case.reference(f"{mode}.{form}.out.").items():
                yield _value(f"{mode}.{form}.out.{task}", out[task], want, options)
            for name, want in case.reference(f"{mode}.{form}.mid.").items():
                yield _value(f"{mode}.{form}.mid.{name}", seen[name], want, options)
    yield from _single_kernels(case, options, prefix)
    yield from _mixed_kernels(case, options)


def _folded_or_not(case: Case, options: Options, prefix: str) -> Iterator[Measure]:
    """Folded against unfolded, both of this program."""
    for mode in GATE_MODES:
        with torch.no_grad():
            plain, folded = (model(case.image()).final for model in _forms(case, mode).values())
        for task, want in plain.items():
            yield Measure(f"{mode} {task}", scaled_error(folded[task], want), options.pick(1e-10, SINGLE))


def _forms(case: Case, mode: str) -> dict[str, MultiTaskModel]:
    plain, folded = (case.model(pre_softmax=GATE_MODES[mode]) for _ in range(2))
    return {"unfolded": plain.eval(), "folded": folded.prepare_for_inference()}


def _single_kernels(case: Case, options: Options, prefix: str) -> Iterator[Measure]:
    modules = dict(case.model().named_modules())
    for key, want in case.reference(prefix).items():
        path, kind = key.rsplit(".", 1)
        name, place = locate(f"{path}.M.weight")
        with torch.no_grad():
            kernels, biases = modules[name.removesuffix(".up")].kernels()
        yield _value(key, kernels[place] if kind == "weight" else biases[place], want, options)


def _mixed_kernels(case: Case, options: Options) -> Iterator[Measure]:
    """Kernels per image and task; the reference's lack the last norm."""
    model = case.model().eval().prepare_for_inference()
    wanted, seen = case.reference("dynamic_kernel."), {}
    for stage, modules in (("MLoRE_1", model.decoder.first), ("MLoRE_2", model.decoder.second)):
        for tap, module in enumerate(modules):
            module.folded.register_forward_hook(
                lambda paths, inputs, _, key=f"{stage}.{tap}": seen.update({key: (paths, *inputs)}))
    with torch.no_grad():
        model(case.image())
        for key, want in wanted.items():
            place, task, sample, kind = key.rsplit(".", 3)
            paths, inner, routes = seen[place]
            index, number = list(inner).index(task), int(sample.removeprefix("sample"))
            stage, tap = place.split(".")
            norm = getattr(model.decoder, "first" if stage == "MLoRE_1" else "second")[int(tap)].norm[task]
            kernels, biases = paths.mixed(list(routes.values()))
            kernel, bias = (x[index * len(kernels) // len(inner) + number] for x in (kernels, biases))
            before = (kernel / paths.scale[index][:, None, None, None],
                      (bias - norm.bias) / paths.scale[index] + norm.running_mean)
            yield _value(key, before[kind == "bias"], want, options)


# Name -> what its arrays begin with, and the comparison, which receives that prefix.
GROUPS: dict[str, tuple[str, Callable[[Case, Options, str], Iterator[Measure]]]] = {
    "outputs": ("eval.", _outputs), "outputs of float64": ("eval64.", _outputs),
    "features inside": ("eval.mid.", _inside), "training": ("train.", _training),
    "training of float64": ("train64.", _training),
    "training with noise": ("train_noise.", _training), "losses": ("train.loss.", _losses),
    "folding": ("folded_kernel.", _folding), "folded = unfolded": ("folded_kernel.", _folded_or_not),
}


def full_size(entry: dict) -> MultiTaskModel:
    """The model of a manifest's entry, without memory."""
    tasks = {key.split(".")[1]: shape[0] for key, shape in entry["state_dict"].items()
             if key.startswith("heads.") and key.endswith(".linear_pred.weight")}
    with torch.device("meta"):
        return build(entry["config"], tasks)


def _manifest(entry: dict) -> Iterator[Measure]:
    model = full_size(entry)
    shapes = entry["state_dict"]
    converted, dead = convert_released({key: torch.empty(shape, device="meta") for key, shape in shapes.items()})
    yield from compare_keys(model, {key: value.shape for key, value in converted.items()})
    unused = {key for key in shapes if is_dead(key)}
    yield Measure("keys without effect that are not named as such", len(unused ^ set(dead)), 0.0)
    left_out = sum(math.prod(shapes[key]) for key in unused if "running" not in key and "num_batches" not in key)
    yield Measure("parameters without effect", abs(left_out - entry["params_never_used_in_forward"]), 0.0)
    row = shapes["backbone.pos_embed"][-1]  # of the class token
    count = sum(parameter.numel() for parameter in model.parameters())
    yield Measure("parameters", abs(count + left_out + row - entry["total_params"]), 0.0)
    for form, want in entry["gmacs_batch1"].items():
        yield Measure(f"multiply-adds, {form}", abs(_gmacs(model, entry, form == "folded") / want - 1), 0.01)


def _gmacs(model: MultiTaskModel, entry: dict, folded: bool) -> float:
    """With the heads' convolutions on the enlarged maps, as the reference computes them."""
    for head in model.heads.values():
        head.conv.forward = head.conv.plain
    model.prepare_for_inference() if folded else model.train().eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, *entry["config"]["img_size"], device="meta"))
    return counter.get_total_flops() / 2e9
