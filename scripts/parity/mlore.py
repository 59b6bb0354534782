"""MLoRE as published: outputs, features inside, gates, losses, gradients and folded kernels of whole models.

"train" has no router noise, "train_noise" the noise stored beside it; further arrays are results of both gate modes
with and without folding. Most references ran in float32; "eval64" and "train64" in float64.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from data.labels import VOID
from models.blocks.resize import resize
from models.blocks.stacked import split_by_task
from models.model import MultiTaskModel
from models.released.mlore import MLORE
from scripts.parity import compare
from scripts.parity.base import Bound, Measure, scaled_error
from scripts.parity.case import MODEL, Bounds, Case, System
from scripts.parity.program import build, criterion, flops, shipped
from utils.engine.tasks import tasks_named

OPTIONS = ("final_embed_dim", "rank_list", "topk", "spe_rank", "pre_softmax")
GATE_MODES = {"mask_then_softmax": True, "softmax_then_mask": False}
STAGES = {"MLoRE_1": "first", "MLoRE_2": "second"}
BALANCE = "load_balancing"
VOID_IS_ZERO = {"depth"}
VALUE = Bound(scaled_error, 1e-9, 2e-5, as_stored=True)
SUM = Bound(scaled_error, 1e-9, 1e-4, as_stored=True)  # of gradients and sums that cancel


def _build(config: Mapping, tasks: Mapping[str, int], **options) -> MultiTaskModel:
    """The model of a table of options, without stochastic depth. `tasks` in any order."""
    sizes = {key: config[key] for key in ("embed_dim", "depth", "num_heads", "patch_size")}
    taps = (*config["select_list"], config["depth"])
    return build("MLoRE", "vit", {task: tasks[task] for task in tasks_named(tasks)}, config["img_size"],
                 {**sizes, "taps": taps, "drop_path_rate": 0.0}, {**{key: config[key] for key in OPTIONS}, **options})


def _outputs(case: Case, run: str) -> Iterator[Measure]:
    out = case.predict()
    yield from compare.predictions(case, out, run, "value")
    if f"{run}cv" in case.values:
        yield case.measure("value", f"{run}cv", out.extra[BALANCE], case.values[f"{run}cv"])


def _draw(model: MultiTaskModel, noise: Mapping[str, Tensor]) -> None:
    """Makes the routers draw this noise, and none where none is given."""
    for name, stage in STAGES.items():
        for tap, module in enumerate(getattr(model.decoder, stage)):
            drawn = [noise.get(f"{name}.{tap}.{task}") for task in model.decoder.tasks]
            module.router.draw_noise = lambda scores, drawn=drawn: torch.stack(
                [torch.zeros_like(own) if x is None else x.to(own) for x, own in zip(drawn, scores, strict=True)])


def _training(case: Case, run: str) -> Iterator[Measure]:
    """Outputs, gates, buffers, gradients of L (sum of mean(output * fixed) over tasks) and of the balancing term."""
    noise = case.below("noise.") if run == "train_noise." else {}
    step = compare.forward(case, partial(_draw, noise=noise))
    yield from compare.predictions(case, step.out, run, "train")
    for name, want in case.below(f"{run}gate.").items():
        yield case.measure("train", f"{run}gate.{name}", case.find(f"{name}.gate", step.seen), want)
    yield from compare.buffers(case, step.model, run)
    tensors = {"input": step.image, **dict(step.model.named_parameters())}
    for name, value, part in (("L", step.loss, "grad."), ("cv", step.out.extra[BALANCE], "grad_cv.")):
        if f"{run}{name}" in case.values:
            yield case.measure("loss", f"{run}{name}", value, case.values[f"{run}{name}"])
        found = torch.autograd.grad(value, list(tensors.values()), retain_graph=True, allow_unused=True)
        gradients = {key: torch.zeros_like(tensor) if grad is None else grad
                     for (key, tensor), grad in zip(tensors.items(), found, strict=True)}
        gradients = split_by_task(step.model, gradients)
        for key, want in case.below(f"{run}{part}").items():
            yield case.measure("gradient", f"{run}{part}{key}", *_same_part(key, gradients, want, case))


def _same_part(key: str, tensors: Mapping[str, Tensor], want: Tensor, case: Case) -> tuple[Tensor, Tensor]:
    """The reference tensor in our shape, and the part of ours that belongs to it."""
    name, place = MLORE.locate(key)
    ours = tensors[name]
    if ".experts." in name:
        sizes = [1] * len(case.config["rank_list"]) if name.endswith("up_bias") else case.config["rank_list"]
        ours = ours.split(list(sizes), dim=1 if name.endswith(".up") else 0)[place]
    return ours, MLORE.reshaped(name, want)


def _losses(case: Case) -> Iterator[Measure]:
    """The published losses with their weights on fixed labels."""
    out = compare.forward(case, partial(_draw, noise={})).out
    labels, weights = case.below("gt."), case.config["loss_weights"]
    labels |= {task: torch.where(label == 0, VOID, label) for task, label in labels.items() if task in VOID_IS_ZERO}
    losses = criterion(out.final, weights, edge_w=case.config["edge_pos_weight"])
    got = losses(out.final, labels, extra={BALANCE: weights[BALANCE] * out.extra[BALANCE]})
    got["cv"] = out.extra[BALANCE]
    for name, want in case.below("train.loss.").items():
        yield case.measure("value", f"loss.{name}", got[name], want)


# ------------------------------------------------------------ folding


def _folding(case: Case) -> Iterator[Measure]:
    """Both gate modes: unfolded and folded against the reference."""
    for mode in GATE_MODES:
        for form, model in _forms(case, mode).items():
            seen = case.record(model)
            with torch.no_grad():
                out = model(case.image())
            yield from compare.predictions(case, out, f"{mode}.{form}.", "value")
            for name, want in case.below(f"{mode}.{form}.mid.").items():
                yield case.measure("value", f"{mode}.{form}.mid.{name}", case.find(name, seen), want)
    yield from _single_kernels(case)
    yield from _mixed_kernels(case)


def _folded_or_not(case: Case) -> Iterator[Measure]:
    """Folded against unfolded, both of this program."""
    for mode in GATE_MODES:
        with torch.no_grad():
            plain, folded = (model(case.image()).final for model in _forms(case, mode).values())
        for task, want in plain.items():
            yield Measure(f"{mode} {task}", scaled_error(folded[task], want), case.options.pick(1e-10, VALUE.float32))


def _forms(case: Case, mode: str) -> dict[str, MultiTaskModel]:
    plain, folded = (case.model(pre_softmax=GATE_MODES[mode]) for _ in range(2))
    return {"unfolded": plain.eval(), "folded": folded.prepare_for_inference()}


def _single_kernels(case: Case) -> Iterator[Measure]:
    modules = dict(case.model().named_modules())
    for key, want in case.below("folded_kernel.").items():
        path, kind = key.rsplit(".", 1)
        name, place = MLORE.locate(f"{path}.M.weight")
        name, _, task = name.removesuffix(".up").partition(".own_expert.")
        path, place = (f"{name}.own_expert", case.tasks.index(task)) if task else (name, place)
        with torch.no_grad():
            kernels, biases = modules[path].kernels()
        yield case.measure("value", key, kernels[place] if kind == "weight" else biases[place], want)


def _mixed_kernels(case: Case) -> Iterator[Measure]:
    """Kernels per image and task; the reference's lack the last norm."""
    model, seen = case.model().eval().prepare_for_inference(), {}
    for name, stage in STAGES.items():
        for tap, module in enumerate(getattr(model.decoder, stage)):
            module.folded.register_forward_hook(
                lambda paths, inputs, _, key=f"{name}.{tap}": seen.update({key: (paths, *inputs)}))
    with torch.no_grad():
        model(case.image())
        for key, want in case.below("dynamic_kernel.").items():
            place, task, sample, kind = key.rsplit(".", 3)
            paths, _, *routes = seen[place]
            index, number = case.tasks.index(task), int(sample.removeprefix("sample"))
            name, tap = place.split(".")
            norm = getattr(model.decoder, STAGES[name])[int(tap)].norm
            shift, mean = (x.chunk(len(case.tasks))[index] for x in (norm.bias, norm.running_mean))
            kernels, biases = paths.mixed(*routes)
            kernel, bias = (x[index * len(kernels) // len(case.tasks) + number] for x in (kernels, biases))
            before = kernel / paths.scale[index][:, None, None, None], (bias - shift) / paths.scale[index] + mean
            yield case.measure("value", key, before[kind == "bias"], want)


# ------------------------------------------------------------ names, full size


def _of_task(path: str, first: bool = False) -> Callable[..., Tensor]:
    """The part of one task, of a tensor (B, T C, ...), or of one (T, ...)."""
    def part(case: Case, seen: Mapping[str, Tensor], tap: str, task: str) -> Tensor:
        value, index = seen[path.format(tap)], case.tasks.index(task)
        return value[index] if first else value.chunk(len(case.tasks), dim=1)[index]
    return part


def _places(stage: str, name: str) -> tuple:
    """Of the modules of one stage, whose names begin with the place of the tap and the task."""
    name, here = rf"{name}\.(\d)\.(\w+)\.", f"decoder.{stage}.{{}}"

    def own(case: Case, seen: Mapping[str, Tensor], tap: str, task: str) -> Tensor:
        factor = seen[f"{here.format(tap)}.own_expert<1"][:, case.tasks.index(task), None, None, None]
        return _of_task(here + ".own_expert")(case, seen, tap, task) / factor  # without its gate

    return ((name + "out", _of_task(here + "[0]")),
            (name + "gate", _of_task(here + "[1]", first=True)),
            (name + "conv1", _of_task(here + ".proj_in")),
            (name + "convsp", _of_task(here + ".router.pool", first=True)),
            (name + "route_feat", _of_task(here + ".router.logits<0", first=True)),
            (name + "router_logits", _of_task(here + ".router.logits", first=True)),
            (name + "gated_sum", _of_task(here + ".mixture_norm<0")),
            (name + "bn_all", _of_task(here + ".mixture_norm")),
            (name + "task_lora", own),
            (name + "bn", _of_task(here + ".norm")))


def _tap_logits(case: Case, seen: Mapping[str, Tensor], task: str) -> Tensor:
    return seen["decoder.mix"].chunk(len(case.tasks), dim=1)[case.tasks.index(task)]


def _full_size(entry: dict) -> Iterator[Measure]:
    shapes, image_size = entry["state_dict"], entry["config"]["img_size"]
    tasks = [key.split(".")[1] for key in shapes if re.fullmatch(r"heads\.\w+\.linear_pred\.weight", key)]
    model = shipped("mlore", tasks, image_size, entry["total_params"])
    kept = shapes.keys() - compare.dead_keys(shapes)
    joined = sum(MLORE.locate(key)[1] > 0 for key in kept)  # all experts but the first
    row = shapes["backbone.pos_embed"][-1]  # of the class token
    yield from compare.keys(model, shapes, tuple(model.heads), entry["total_params"] - row,
                            entry["params_never_used_in_forward"], joined)
    for head in model.heads.values():  # the reference's convolutions run on the enlarged maps
        head.conv.forward = head.conv.plain
    for form, want in entry["gmacs_batch1"].items():
        model.prepare_for_inference() if form == "folded" else model.train().eval()
        gmacs = flops(model, image_size).get_total_flops() / 2e9
        yield compare.difference(f"multiply-adds, {form}", gmacs / want, 1.0, 0.01)


SYSTEM = System(
    released=("MLoRE",),
    fits=lambda config: "tasks" in config and config.keys() >= set(OPTIONS),
    build=lambda config, **options: _build(config, config["tasks"], load_balancing_weight=1.0, **options),
    convert=MLORE.convert,
    groups={"outputs": (partial(_outputs, run="eval."), *MODEL, "eval."),
            "outputs of float64": (partial(_outputs, run="eval64."), *MODEL, "eval64."),
            "features inside": (compare.inside, *MODEL, "eval.mid."),
            **{name: (partial(_training, run=run), *MODEL, run) for name, run in (
                ("training", "train."), ("training of float64", "train64."), ("training with noise", "train_noise."))},
            "losses": (_losses, *MODEL, "train.loss."), "folding": (_folding, *MODEL, "folded_kernel."),
            "folded = unfolded": (_folded_or_not, *MODEL, "folded_kernel.")},
    names=((r"input", "image"),
           (r"loss_weight_tensor\.(\w+)", r"train.fixed.\1"),
           (r"eval\.mid\.detail\.(.*)", r"eval.mid.\1"),
           (r"(\w+)\.buffer_after\.(.*)", r"\1.after.\2")),
    places=((r"tokens\.patch", "encoder.patch_embed"),
            (r"tokens\.pos", "encoder.blocks.0<0"),
            (r"tokens\.norm", "encoder.norm"),
            (r"tokens\.block(\d+)", lambda case, seen, number: seen[f"encoder.blocks.{int(number) - 1}"]),
            (r"fea_fuse\.(\d)", r"decoder.tap_proj.\1"),
            (r"task_mask\.(\w+)\.logits", _tap_logits),
            (r"head_quarter\.(\w+)", r"heads.\1"),
            (r"head_in\.(\w+)", lambda case, seen, task: resize(seen[f"heads.{task}<0"],
                                                                seen[f"heads.{task}"].shape[-2:])),
            *(row for name, stage in STAGES.items() for row in _places(stage, name))),
    bounds=Bounds(value=VALUE, loss=SUM, gradient=SUM),
    as_stored=lambda got, want: got if got.ndim == want.ndim else got.reshape(want.shape),
    full_size=_full_size)
checks = SYSTEM.checks
