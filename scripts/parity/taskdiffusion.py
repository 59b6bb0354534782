"""TaskDiffusion as published: the sampler step by step, a training step, and the keys of the full-size models.

The final maps hardly depend on the latents, whose scale is 0.01: these are compared themselves. Random draws are those
of the reference.
"""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from data.labels import VOID
from models.blocks.stacked import split_by_task
from models.model import MultiTaskModel
from models.released.taskdiffusion import TASKDIFFUSION
from scripts.parity import compare
from scripts.parity.base import Bound, Measure, scaled_error, stored_error, stored_share
from scripts.parity.case import MODEL, Bounds, Case, System
from scripts.parity.program import build, flops, shipped
from scripts.parity.program import criterion as build_criterion

EXPERT_OPTIONS = ("topk", "rank_list", "spe_rank")
BALANCE = "load_balancing"
VOID_IS_ZERO = {"depth"}
VALUE = Bound(stored_share, 1e-9, 3e-5)


def _options(config: Mapping) -> dict:
    experts = config["variant"] == "mlore"
    return {"final_embed_dim": config["final_embed_dim"], "timesteps": config["timesteps"], "experts": experts,
            "bit_scale": config["bit_scale"], "module_layer": config["module_layer"], "load_balancing_weight": 1.0,
            "mask_void": False,
            **{key: config[key] for key in EXPERT_OPTIONS if experts}}


def _build(config: Mapping, **changes) -> MultiTaskModel:
    sizes = {key: config[key] for key in ("embed_dim", "depth", "num_heads", "patch_size")}
    taps = (*config["select_list"], config["depth"])
    return build("taskdiffusion", "vit", config["tasks"], config["img_size"],
                 {**sizes, "taps": taps, "drop_path_rate": 0.0}, {**_options(config), **changes})


def _noise(case: Case, name: str) -> Tensor:
    return case.values[name].to(case.options.dtype)


def _sampled(case: Case) -> Iterator[Measure]:
    """Latents and codes between the steps, and the result at both sizes; then two draws of one image."""
    model = case.model().eval()
    model.decoder.first_latents = lambda like: [_noise(case, "eval.noise")]
    latents = _record_updates(model)
    seen = case.record(model)
    with torch.no_grad():
        out = model(case.image())
    for step, (latent, code) in enumerate(latents):
        yield case.measure("value", f"latent {step}", latent, case.values[f"eval.step{step}.latent"])
        want = model.decoder.codes.squashed(_noise(case, f"eval.step{step}.raw_code"))
        yield case.measure("value", f"code {step}", code, want)
    for task, want in case.below("eval.logits.").items():
        yield case.measure("value", f"quarter {task}", seen[f"decoder[0][{task}]"], want)
    yield from compare.predictions(case, out, "eval.", "value")
    if "r2.noise" in case.values:
        model.decoder.first_latents = lambda like: _noise(case, "r2.noise").split(1)
        with torch.no_grad():
            model(case.image()[:1])
        for task, want in case.below("r2.logits.").items():
            yield case.measure("value", f"two draws {task}", seen[f"decoder[0][{task}]"], want)


def _record_updates(model: MultiTaskModel) -> list[tuple[Tensor, Tensor]]:
    """(latent, predicted code) of every update, filled by a forward pass."""
    calls, update = [], model.decoder.update

    def watched(latent: Tensor, predicted: Tensor, step: int) -> Tensor:
        calls.append((latent, predicted))
        return update(latent, predicted, step)
    model.decoder.update = watched
    return calls


def _inside(case: Case) -> Iterator[Measure]:
    """Features of the image, then everything inside each step from the stored latent."""
    model, steps = case.model().eval(), case.config["timesteps"]
    decoder, seen = model.decoder, case.record(model)
    with torch.no_grad():
        injected, task_maps, gates = decoder.of_image(model.neck(model.encoder(case.image())))
        for name, want in case.below("eval.fea_fuse.").items():
            yield case.measure("value", f"map {name}", seen[f"decoder.tap_proj.{name}"], want)
        for name, want in case.below("eval.feat.").items():
            level, task = name.split(".")
            yield case.measure("value", f"feature {name}", task_maps[int(level)][:, case.tasks.index(task)], want)
        yield from _gates(case, gates, "eval.gates.")
        for step in range(steps):
            wanted = case.below(f"eval.step{step}.")
            latent, log_ratio = (wanted.pop(key).to(case.options.dtype) for key in ("latent", "log_snr"))
            seen["result"] = decoder.predict(injected, task_maps, latent, log_ratio, enlarge=step == steps - 1)
            wanted.pop("raw_code", None)
            for name, want in wanted.items():
                yield case.measure("value", f"step {step} {name}", case.find(name, seen), want)


def _gates(case: Case, gates: list[Tensor], prefix: str) -> Iterator[Measure]:
    """Named by stage (1 or 2), level and task; ours come level by level, both stages of each."""
    for name, want in case.below(prefix).items():
        stage, level, task = name.split(".")
        got = gates[2 * int(level) + int(stage) - 1][case.tasks.index(task)]
        yield case.measure("value", f"gates {name}", got, want)


def _draw(case: Case, model: MultiTaskModel) -> None:
    """Makes a model in training draw the stored times, noise and router noise."""
    decoder = model.decoder
    decoder.draw_times = lambda latent: case.values["train.times"].double()
    decoder.draw_noise = lambda latent: _noise(case, "train.noise")
    for level, features in enumerate(decoder.features if case.config["variant"] == "mlore" else ()):
        for stage, module in enumerate((features.first, features.second), start=1):
            drawn = torch.stack([case.values[f"train.router_noise.{stage}.{level}.{task}"] for task in case.tasks])
            module.router.draw_noise = lambda scores, drawn=drawn: drawn.to(scores)


def _labels(case: Case) -> dict[str, Tensor]:
    """The stored labels with this program's void, 255 for every task."""
    return {task: torch.where(label == 0, VOID, label) if task in VOID_IS_ZERO else label
            for task, label in case.below("gt.").items()}


def _training(case: Case) -> Iterator[Measure]:
    """A whole step: code of the labels, predictions, losses, buffers and norms of all gradients."""
    step = _step(case)
    codes, want = step.model.decoder.codes, _noise(case, "train.raw_code")
    with torch.no_grad():
        code = codes.of_labels(_labels(case), want.shape[-2:])
    yield case.measure("value", "code of the labels", code, codes.squashed(want))
    for task, want in case.below("train.logits.").items():
        yield case.measure("train", f"quarter {task}", step.seen[f"decoder[0][{task}]"], want)
        yield case.measure("train", f"preliminary {task}", step.seen[f"decoder[1][{task}]"],
                           case.values[f"train.aux_logits.{task}"])
    for name in ("log_snr", "time_emb"):
        yield case.measure("train", name, case.find(name, step.seen), case.values[f"train.{name}"])
    for name, want in _wanted_losses(case).items():
        yield case.measure("loss", f"loss {name}", step.losses[name], torch.tensor(want, dtype=torch.float64))
    yield case.measure("gradient", "grad image", step.image.grad, case.values["train.grad_image"])
    gradients, floor = _gradients(step.model), _floor(case)
    for key, want in case.table("norms").items():
        error = abs(_part(case, key, gradients).norm().item() - want) / max(want, floor)
        yield Measure(f"|grad {key}|", error, case.options.pick(1e-9, 1e-2))
    yield from compare.buffers(case, step.model, "train.")


def _full_gradients(case: Case) -> Iterator[Measure]:
    gradients, floor = _gradients(_step(case).model), _floor(case)
    for key, want in load_file(case.holding("gradients")).items():
        error = stored_error(_part(case, key, gradients), TASKDIFFUSION.reshaped(TASKDIFFUSION.locate(key)[0], want))
        yield Measure(f"grad {key}", error / max(want.abs().max().item(), floor), case.options.pick(1e-9, 1e-2))


def _floor(case: Case) -> float:
    """Below it a gradient is zero but for rounding, as those of biases in front of a batch norm."""
    return case.options.pick(1e-6, 1e-3) * math.hypot(*case.table("norms").values())


class Step(NamedTuple):
    model: MultiTaskModel
    image: Tensor
    seen: dict[str, Tensor]
    losses: dict[str, Tensor]


def _step(case: Case) -> Step:
    """A training step with the stored draws, gradients included."""
    model, image, labels = case.model().train(), case.image().requires_grad_(), _labels(case)
    _draw(case, model)
    seen = case.record(model)
    out, weights = model(image, labels), case.config["loss_weights"]
    criterion = build_criterion(out.final, weights, intermediate_weight=case.config["aux_weight"],
                                edge_w=case.config["edge_w"])
    extra = {name: weights[name] * value for name, value in out.extra.items()}
    losses = criterion(out.final, labels, out.intermediate, extra)
    losses["total"].backward()
    return Step(model, image, seen, losses | {"cv": out.extra.get(BALANCE)})


def _wanted_losses(case: Case) -> dict[str, float]:
    table, wanted = case.table("aux_weight"), {"total": case.table("aux_weight")["loss"]}
    for prefix, part in (("", "final"), ("inter/", "aux")):
        wanted |= {prefix + name: value for name, value in table[part].items() if name != "total"}
    return wanted


def _gradients(model: MultiTaskModel) -> dict[str, Tensor]:
    """Of every parameter, each task's for itself."""
    return split_by_task(model, {name: parameter.grad for name, parameter in model.named_parameters()})


def _part(case: Case, key: str, gradients: Mapping[str, Tensor]) -> Tensor:
    """Our gradient of what has this key in the original."""
    name, place = TASKDIFFUSION.locate(key)
    grad = gradients[name]
    if ".experts." not in name:
        return grad
    ranks = case.config["rank_list"]
    sizes = [1] * len(ranks) if name.endswith("up_bias") else list(ranks)
    return grad.split(sizes, dim=1 if name.endswith(".up") else 0)[place]


def _full_size(entry: dict) -> Iterator[Measure]:
    shapes, config = entry["state_dict"], entry["config"]
    model = shipped("taskdiffusion", list(config["tasks"]), config["img_size"], entry["total_params"])
    joined = sum(TASKDIFFUSION.locate(key)[1] > 0 for key in shapes)  # all experts but the first
    row = shapes["backbone.pos_embed"][-1]  # of the class token
    yield from compare.keys(model, shapes, tuple(config["tasks"]), entry["total_params"] - row, joined=joined)
    decoder, config = model.decoder, entry["config"]
    for stage in decoder.stages.values():  # the reference's convolutions run on the enlarged maps
        stage.blocks[-1].conv.forward = stage.blocks[-1].conv.plain
    gmacs, want = flops(model.eval(), config["img_size"]).get_total_flops() / 2e9, entry["gmacs_batch1"]
    cells = math.prod(side // config["patch_size"] for side in config["img_size"])
    again = (config["timesteps"] - 1) * sum(level.inject.out_channels ** 2 for level in decoder.levels)  # of the map
    codes = [decoder.codes.mix, *(code for code in decoder.codes.codes.values() if isinstance(code, nn.Conv2d))]
    unused = 16 * sum(code.weight.numel() for code in codes)  # of the result, which nothing needs
    gmacs += cells * (again + unused) / 1e9
    yield compare.difference("multiply-adds", gmacs / want["inference_3_steps"], 1.0, 1e-3)


SYSTEM = System(
    released=("TaskDiffusion",),
    fits=lambda config: {"timesteps", "randsteps", "bit_scale"} <= config.keys(),
    build=_build,
    convert=TASKDIFFUSION.convert,
    groups={"sampler": (_sampled, *MODEL, "eval.logits."), "features inside": (_inside, *MODEL, "eval.feat."),
            "training": (_training, *MODEL, "train.logits.", "norms", "aux_weight"),
            "gradients": (_full_gradients, *MODEL, "train.logits.", "norms", "gradients")},
    names=((r"train\.buffer_after\.(.*)", r"train.after.\1"),),
    places=((r"log_snr", "decoder.noise_level<0"),
            (r"time_emb", "decoder.noise_level"),
            (r"inject", lambda case, seen: torch.cat([seen[f"decoder.levels.{i}.shared.0<0"] for i in range(4)], 1)),
            (r"shared\.(\d)", r"decoder.levels.\1.shared.1"),
            (r"gate_logits\.(\d)", r"decoder.levels.\1.gates"),
            (r"mixed\.(\d)\.(\w+)", r"decoder.levels.\1.mix.\2"),
            (r"level_logits\.(\w+)", r"decoder.stages.\1.levels"),
            (r"fused\.(\w+)", r"decoder.stages.\1.blocks.0<0"),
            (r"enc\.(\d)\.(\w+)", r"decoder.stages.\2.blocks.\1"),
            (r"logits\.(\w+)", lambda case, seen, task: seen["result"][task])),
    bounds=Bounds(value=VALUE, loss=Bound(scaled_error, 1e-9, 1e-4), gradient=Bound(stored_share, 1e-9, 1e-4)),
    full_size=_full_size)
checks = SYSTEM.checks
