"""BridgeNet as published: outputs, features inside, losses, scores and gradients of whole models; full-size keys.

A case is a configuration with "pred_out_num_constant" and, under the same name up to the first dot, the original
state dict, arrays of an evaluation ("image", "out.<task>", ...) and of a training step ("train.*", "R.<task>"),
labels, and tables of losses and gradient norms. The evaluation was computed in float32, the training step in float64
and stored in float32: there, in float64, an error counts from half a unit of the stored value's last place on.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from evaluation.evaluator import TaskContext
from losses.multi_task import MultiTaskLoss
from models.blocks.resize import resize
from models.build import build_model
from models.model import MultiTaskModel
from models.released.bridgenet import is_dead, recognises, rename
from scripts.parity.base import (
    Check,
    Folder,
    Measure,
    NotCovered,
    Options,
    absolute_error,
    below,
    scaled_error,
    stem,
    stored_error,
)
from scripts.parity.models import Recorder, compare_keys, compare_norms, manifests
from utils.engine.checkpoint import load_model
from utils.engine.tasks import TASKS

EVALUATED = 5e-5  # the stored float32 evaluation, whatever the arithmetic here
EXACT, OUTPUT, GRADIENT = 1e-9, 5e-5, 1e-2  # training; in float32 a ReLU near zero may switch
UNUSED = "no output depends on it, and it is not computed here"

# Sizes of a backbone: the reference's name -> ours.
VIT_SIZES = {"embed_dim": "embed_dim", "depth": "depth", "num_heads": "num_heads", "patch_size": "patch_size"}
INTERN_SIZES = {"channels": "embed_dim", "depths": "depths", "groups": "groups", "offset_scale": "offset_scale",
                "mlp_ratio": "mlp_ratio", "layer_scale": "layer_scale", "post_norm": "post_norm",
                "core_kernel": "kernel_size", "center_feature_scale": "center_feature_scale"}


@dataclass(frozen=True)
class Case:
    """One published model of toy size: files by what they hold, tables by theirs."""

    config: dict
    files: dict[str, Path]
    tables: dict[str, dict]
    dtype: torch.dtype = torch.float64

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.config["tasks"])

    def model(self) -> MultiTaskModel:
        """With the reference's weights, loaded as a released checkpoint is. Nothing in it is random."""
        c = self.config
        model = build(c, {
            "embed_dim": c["embed_dim"], "PRED_OUT_NUM_CONSTANT": c["pred_out_num_constant"],
            "mtt_resolution_downsample_rate": c["mtt_resolution_downsample_rate"],
            "refine_depth": tuple(c["refine_depth"]), "dilations": _repeated(c["dilated_ratio"], 3),
            "squeeze_ratio": _repeated(c["squeeze_ratio"], 1)[0], "drop_path_rate": 0.0})
        load_model(model, load_file(self.files["state"]), self.files["state"])
        return model.to(self.dtype)

    def arrays(self, kind: str, prefix: str = "") -> dict[str, Tensor]:
        """Arrays below a prefix, without it."""
        return below(load_file(self.files[kind]), prefix)

    def image(self) -> Tensor:
        return self.arrays("io")["image"].to(self.dtype)


def build(config: dict, options: dict) -> MultiTaskModel:
    """BridgeNet on the backbone that a case or an entry of the manifest describes."""
    sizes = config["backbone"]
    if sizes["type"] == "vit":
        name, kwargs = "vit", {ours: sizes[key] for key, ours in VIT_SIZES.items()}
        kwargs["taps"] = [*sizes["select_list"], sizes["depth"]]
    elif sizes["type"] == "intern":
        name, kwargs = "internimage", {ours: sizes[key] for key, ours in INTERN_SIZES.items() if key in sizes}
    else:
        raise NotCovered(f"no backbone of type '{sizes['type']}'")
    return build_model("BridgeNet", name, config["tasks"], tuple(config["image_size"]),
                       backbone_kwargs={**kwargs, "drop_path_rate": 0.0}, model_kwargs=options)


def _repeated(per_stage: list[list[int]], length: int) -> tuple[int, ...]:
    """The pattern of this length that all stages repeat."""
    pattern = per_stage[0][:length]
    if any(value != pattern[index % length] for stage in per_stage for index, value in enumerate(stage)):
        raise NotCovered(f"stages that do not repeat one pattern of {length}")
    return tuple(pattern)


# ------------------------------------------------------------ cases


def checks(folder: Folder) -> Iterator[Check]:
    for path, config in folder.tables.items():
        if isinstance(config, dict) and {"pred_out_num_constant", "dilated_ratio", "backbone"} <= config.keys():
            yield from _case(folder, path, config)
    yield from manifests(
        folder, lambda entry: isinstance(entry.get("keys"), dict) and recognises(entry["keys"]), _manifest)


def _case(folder: Folder, path: Path, config: dict) -> Iterator[Check]:
    name = stem(path)
    tests = {"state": recognises, "io": lambda keys: "image" in keys, "train": lambda keys: "train.loss" in keys,
             "target": lambda keys: any(key.startswith("target.") for key in keys),
             "norms": recognises, "scores": lambda keys: {"losses", "metrics"} <= set(keys)}
    beside = {p: keys for p, keys in (folder.arrays | folder.tables).items()
              if stem(p) == name and not isinstance(keys, list)}
    files = {kind: p for kind, test in tests.items() for p, keys in beside.items()
             if (p.suffix == ".json") == (kind in ("norms", "scores")) and test(keys)}
    case = Case(config, files, {kind: folder.tables[p] for kind, p in files.items() if p in folder.tables})
    for group, (run, needed) in GROUPS.items():
        if needed <= files.keys():
            yield Check(f"{name}/{group}", frozenset({path, *(files[kind] for kind in needed)}),
                        partial(_run, run, case))


def _run(run: Callable, case: Case, options: Options) -> Iterator[Measure]:
    return run(replace(case, dtype=options.dtype), options)


def _outputs(case: Case, options: Options) -> Iterator[Measure]:
    with torch.no_grad():
        out = case.model().eval()(case.image())
    for task, want in case.arrays("io", "out.").items():
        yield Measure(f"out.{task}", absolute_error(out.final[task], want), EVALUATED)
    for task, low in case.arrays("io", "inter_low.").items():
        want = resize(low, tuple(case.config["image_size"]))
        yield Measure(f"inter.{task}", absolute_error(out.intermediate[task], want), EVALUATED)


def _inside(case: Case, options: Options) -> Iterator[Measure]:
    model = case.model().eval()
    seen = record_inside(model)
    with torch.no_grad():
        model(case.image())
    for name, want in case.arrays("io").items():
        if name == "scale_embed.0":
            yield Measure(name, uncovered=UNUSED)
        elif name != "image" and not name.startswith("out."):
            got = seen[name] if want.ndim == seen[name].ndim else rearrange(seen[name], "b c h w -> b (h w) c")
            yield Measure(name, absolute_error(got, want), EVALUATED)


def record_inside(model: MultiTaskModel) -> dict[str, Tensor]:
    """Hooks a BridgeNet; after a forward pass the dict holds the features under the reference's names."""
    seen, decoder = Recorder(), model.decoder
    keep, output_of = seen.keep, seen.keep_output
    keep(model.encoder, lambda _, maps: {f"backbone.{i}": feat for i, feat in enumerate(maps)})
    output_of(decoder.lateral_fine, "scale_embed.1")
    output_of(decoder.lateral_middle, "scale_embed.2")
    keep(decoder.preliminary[next(iter(model.heads))], lambda inputs, _: {"decoder_in": inputs[0]})
    per_task = {"prelim": decoder.preliminary, "tpp.fused": decoder.fuse, "mix": decoder.mix, "feat": decoder.project,
                "inter_low": decoder.intermediate, "logits": model.heads}
    for name, modules in per_task.items():
        for task, module in modules.items():
            output_of(module, f"{name}.{task}")
    for task, module in decoder.produce.items():
        keep(module, lambda _, out, task=task: {f"tpp.score.{task}": out[0], f"tpp.value.{task}": out[1]})
    for index, stage in enumerate(decoder.stages):
        name = f"stage{index}"
        for task, module in (stage.up or {}).items():
            output_of(module, f"{name}.up.{task}")
        output_of(stage.query, f"{name}.query")
        output_of(stage.extract.restore, f"{name}.attn")
        output_of(stage.extract, f"{name}.bfe_block")
        keep(stage, lambda _, out, name=name: {
            f"{name}.bridge": out[1], **{f"{name}.task.{task}": feat for task, feat in out[0].items()}})
    return seen


def _scores(case: Case, options: Options) -> Iterator[Measure]:
    """Losses and meters on the stored outputs."""
    table, size = case.tables["scores"], tuple(case.config["image_size"])
    contexts = {task: TaskContext(num_channels=channels) for task, channels in case.config["tasks"].items()}
    final = {task: logits.to(options.dtype) for task, logits in case.arrays("io", "out.").items()}
    inter = {task: resize(low.to(options.dtype), size) for task, low in case.arrays("io", "inter_low.").items()}
    labels = {task: label.float() for task, label in case.arrays("target", "target.").items()}
    losses = {task: TASKS[task].loss(context) for task, context in contexts.items()}
    criterion = MultiTaskLoss(losses, table["loss_weights"], intermediate_weight=table["intermediate_weight"])
    got = criterion(final, labels, inter)
    for name, want in table["losses"].items():
        yield Measure(f"loss {name}", scaled_error(got[name.replace("inter_", "inter/", 1)], want), 2e-6)
    for task, scores in table["metrics"].items():
        meter = TASKS[task].meter(contexts[task])
        meter.update(TASKS[task].decode(final[task]), labels[task])
        for name, want in scores.items():
            yield Measure(f"{task} {name}", scaled_error(meter.compute()[name], want), 1e-6)


def _backward(case: Case) -> tuple[MultiTaskModel, Tensor, dict[str, Tensor], Tensor]:
    """Model, image, features inside and loss after a backward pass with batch statistics.

    The loss is sum_t mean(out_t * R_t) + sum_t mean(inter_t * R_t).
    """
    model, image = case.model().train(), case.image().requires_grad_()
    seen = record_inside(model)
    out, fixed = model(image), case.arrays("train", "R.")
    loss = torch.stack([(logits * fixed[task].to(case.dtype)).mean()
                        for maps in (out.final, out.intermediate) for task, logits in maps.items()]).sum()
    loss.backward()
    return model, image, seen, loss


def _training(case: Case, options: Options) -> Iterator[Measure]:
    model, image, seen, loss = _backward(case)
    data = case.arrays("train", "train.")
    for name, want in data.items():
        if name.startswith(("logits.", "inter_low.")):
            yield Measure(f"train.{name}", stored_error(seen[name], want), options.pick(EXACT, OUTPUT))
    want = data["loss"]
    yield Measure("train.loss", abs(loss.item() - want.item()) / abs(want.item()), options.pick(1e-12, 5e-5))
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    gradients["image"] = image.grad
    for key, want in case.arrays("train", "train.grad.").items():
        error = stored_error(gradients[rename(key, case.tasks)], want)
        yield Measure(f"grad {key}", error / max(want.abs().max().item(), 1e-12), options.pick(EXACT, GRADIENT))
    buffers = dict(model.named_buffers())
    for key, want in case.arrays("train", "train.bn_after.").items():
        yield Measure(f"after {key}", stored_error(buffers[rename(key, case.tasks)], want),
                      options.pick(EXACT, OUTPUT))


def _gradient_norms(case: Case, options: Options) -> Iterator[Measure]:
    yield from compare_norms(_backward(case)[0], case.tables["norms"], lambda key: rename(key, case.tasks), is_dead,
                             options.pick(EXACT, GRADIENT), options)


GROUPS: dict[str, tuple[Callable[[Case, Options], Iterator[Measure]], frozenset[str]]] = {
    "outputs": (_outputs, frozenset({"state", "io"})), "features inside": (_inside, frozenset({"state", "io"})),
    "losses and scores": (_scores, frozenset({"io", "target", "scores"})),
    "training": (_training, frozenset({"state", "io", "train"})),
    "gradient norms": (_gradient_norms, frozenset({"state", "io", "train", "norms"})),
}


# ------------------------------------------------------------ full size


def full_size(entry: dict) -> MultiTaskModel:
    """The model of a manifest's entry without memory; widths are told by the shapes, the rest is default."""
    shapes, tasks = entry["keys"], entry["tasks"]
    coarse, mixed, *_ = shapes[f"multi_task_decoder.trfl.mix_proj.{next(iter(tasks))}.0.weight"]
    embed = mixed - next(iter(tasks.values()))
    with torch.device("meta"):
        return build(entry, {"embed_dim": embed, "PRED_OUT_NUM_CONSTANT": coarse - embed})


def _manifest(entry: dict) -> Iterator[Measure]:
    model, tasks = full_size(entry), tuple(entry["tasks"])
    published = {key: shape for key, shape in entry["keys"].items() if not is_dead(key)}
    renamed = {rename(key, tasks): shape for key, shape in published.items()}
    yield Measure("keys that fall together", len(published) - len(renamed), 0.0)
    yield from compare_keys(model, renamed)
    dead = sum(math.prod(shape) for key, shape in entry["keys"].items() if is_dead(key))
    yield Measure("parameters without effect", abs(dead - entry["params_unused"]), 0.0)
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    for name, part in (("encoder", "params_backbone"), ("heads", "params_heads")):
        yield Measure(part, abs(count[name] - entry[part]), 0.0)
    yield Measure("params_total", abs(sum(count.values()) + dead - entry["params_total"]), 0.0)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(torch.empty(1, 3, *entry["image_size"], device="meta"))
    gmacs = (counter.get_total_flops() / 2 + _dead_macs(entry)) / 1e9
    yield Measure("gmacs", abs(gmacs - entry["gmacs"]["total"]), 0.006)  # two decimals are given


def _dead_macs(entry: dict) -> int:
    """Multiply-adds of the one layer that the original computes without using it: 3 x 3 on the finest map."""
    is_vit = entry["backbone"]["type"] == "vit"  # a transposed convolution there, else one without padding
    height, width = (side // 16 if is_vit else side // 4 - 2 for side in entry["image_size"])
    return height * width * math.prod(entry["keys"]["multi_task_decoder.scale_embed.0.weight"])
