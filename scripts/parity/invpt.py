"""InvPT as published: outputs, preliminary predictions, features inside, loss and gradients of whole models.

A case is a configuration with "model": "InvPT", and beside it, under the same name up to the first dot, the
original state dict, arrays "eval.*" / "train.*", and a table of gradient norms. The reference ran in float64
and was stored in float32: in float64 an error counts from half a unit of the stored value's last place on.
A manifest lists the keys of the full-size models with their shapes. TaskPrompter's references have the same form;
what differs is said by a class of cases of its own.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from models.build import build_model
from models.model import MultiTaskModel, Predictions
from models.released.invpt import is_dead, recognises, rename
from scripts.parity.base import Check, Folder, Measure, NotCovered, Options, below, stem, stored_error
from scripts.parity.models import Recorder, compare_keys, compare_norms, manifests
from utils.engine.checkpoint import load_model

NO_EFFECT = "no output depends on it, and it is not computed here"


@dataclass(frozen=True)
class Case:
    """One published model of toy size."""

    family: ClassVar[str] = "InvPT"
    recognises: ClassVar[Callable] = staticmethod(recognises)
    tolerance: ClassVar[float] = 5e-5  # of single values, in float32

    config: dict
    state: Path
    arrays: Path
    gradients: dict
    dtype: torch.dtype

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.config["tasks"])

    def model(self) -> MultiTaskModel:
        """With the reference's weights, loaded as a released checkpoint is. Nothing in it is random."""
        c, vit = self.config, self.config["backbone"]
        if vit["type"] != "vit" or len(set(c.get("decoder_num_heads", (2,)))) != 1:
            raise NotCovered("only a ViT and one number of heads in all stages exist here")
        sizes = {key: vit[key] for key in ("embed_dim", "depth", "num_heads", "patch_size")}
        model = build_model(
            c["model"], "vit", dict(zip(self.tasks, c["num_output"], strict=True)), tuple(c["image_size"]),
            backbone_kwargs={**sizes, "taps": vit["tap_after_blocks"], "drop_path_rate": 0.0},
            model_kwargs={"embed_dim": c["embed_dim"], "PRED_OUT_NUM_CONSTANT": c["pred_out_num_constant"],
                          "mtt_resolution_downsample_rate": c["mtt_resolution_downsample_rate"],
                          "num_heads": c.get("decoder_num_heads", (2,))[0]})
        return self.loaded(model)

    def loaded(self, model: MultiTaskModel) -> MultiTaskModel:
        """The model with the reference's weights, in the arithmetic of this run."""
        load_model(model, load_file(self.state), self.state)
        return model.to(self.dtype)

    def rename(self, key: str) -> str:
        """Our name of a key of the original."""
        return rename(key, self.tasks)

    def is_dead(self, key: str) -> bool:
        """Whether the key belongs to a layer that ours does not have."""
        return is_dead(key)

    def record_inside(self, model: MultiTaskModel) -> dict[str, Tensor]:
        """A dict that holds the features inside, under the reference's names, after a forward pass."""
        return record_inside(model)

    def missing_inside(self, name: str) -> str:
        """Why ours does not compute a feature, or nothing."""
        return NO_EFFECT if name == "decoder.skip2" else ""

    def reference(self, prefix: str) -> dict[str, Tensor]:
        """Arrays below a prefix, without it."""
        return below(load_file(self.arrays), prefix)

    def image(self) -> Tensor:
        return load_file(self.arrays)["image"].to(self.dtype)


def checks(folder: Folder) -> Iterator[Check]:
    yield from cases(folder, Case, GROUPS)
    yield from manifests(folder, lambda entry: recognises(entry.get("state_dict", ())), _manifest)


def cases(folder: Folder, kind: type[Case], groups: dict[str, Callable]) -> Iterator[Check]:
    """All groups of checks of every case of this kind."""
    recognises = kind.recognises
    for path, config in folder.tables.items():
        if not (isinstance(config, dict) and config.get("model") == kind.family and "backbone" in config):
            continue
        name, arrays = stem(path), folder.beside(path)
        tables = {p: keys for p, keys in folder.tables.items() if stem(p) == name}
        state = next((p for p, keys in arrays.items() if recognises(keys)), None)
        io = next((p for p, keys in arrays.items() if "image" in keys), None)
        norms = next((p for p, keys in tables.items() if isinstance(keys, dict) and recognises(keys)), path)
        if state is None or io is None:
            continue
        for group, run in groups.items():
            if run is not gradient_norms or norms != path:
                yield Check(f"{name}/{group}", frozenset({path, state, io, norms}),
                            lambda options, c=(config, state, io, tables[norms]), run=run:
                            run(kind(*c, options.dtype), options))


def _value(case: Case, name: str, got: Tensor, want: Tensor, options: Options) -> Measure:
    return Measure(name, stored_error(got, want), options.pick(1e-9, case.tolerance))


def _predictions(case: Case, out: Predictions, mode: str, options: Options) -> Iterator[Measure]:
    for kind, maps in (("out", out.final), ("inter", out.intermediate)):
        for task, want in case.reference(f"{mode}.{kind}.").items():
            yield _value(case, f"{mode}.{kind}.{task}", maps[task], want, options)


def outputs(case: Case, options: Options) -> Iterator[Measure]:
    with torch.no_grad():
        out = case.model().eval()(case.image())
    yield from (m for m in _predictions(case, out, "eval", options) if ".out." in m.name)


def _intermediate(case: Case, options: Options) -> Iterator[Measure]:
    with torch.no_grad():
        out = case.model().eval()(case.image())
    yield from (m for m in _predictions(case, out, "eval", options) if ".inter." in m.name)


def inside(case: Case, options: Options) -> Iterator[Measure]:
    model = case.model().eval()
    seen = case.record_inside(model)
    with torch.no_grad():
        model(case.image())
    for name, want in case.reference("eval.mid.").items():
        if reason := case.missing_inside(name):
            yield Measure(name, uncovered=reason)
        else:
            yield _value(case, name, seen[name], want, options)


def record_inside(model: MultiTaskModel) -> dict[str, Tensor]:
    """Hooks an InvPT; after a forward pass the dict holds the features under the reference's names."""
    seen = Recorder()
    keep = seen.keep

    def tokens(feat: Tensor) -> Tensor:
        return rearrange(feat, "b c h w -> b (h w) c")

    def maps_of(name: str) -> Callable[[tuple, object], dict[str, Tensor]]:
        return lambda _, maps: {f"{name}.{task}": feat for task, feat in maps.items()}

    decoder = model.decoder
    keep(model.encoder, lambda _, maps: {f"backbone.tap{i}": tokens(feat) for i, feat in enumerate(maps)})
    keep(decoder.skip_fine, lambda _, feat: {"decoder.skip0": feat})
    keep(decoder.skip_middle, lambda _, feat: {"decoder.skip1": feat})
    per_task = {"prelim": decoder.preliminary, "mix": decoder.mix, "task_feature": decoder.project}
    for name, modules in per_task.items():
        for task, module in modules.items():
            keep(module, lambda _, feat, key=f"{name}.{task}": {key: feat})
    keep(decoder.preliminary[next(iter(model.heads))], lambda inputs, _: {"decoder.input": inputs[0]})
    for index, stage in enumerate(decoder.stages):
        keep(stage, lambda _, out, key=f"stage{index}": maps_of(key)(_, out[0]))
        keep(stage.attention, lambda _, out, key=f"stage{index}.attn_message": {key: out[1]})
        keep(decoder.aggregate.norms[index], lambda _, feat, key=f"stage{index}.norm": {key: tokens(feat)})
    keep(decoder.aggregate, maps_of("aggregated"))
    return seen


def _backward(case: Case) -> tuple[MultiTaskModel, Tensor, Predictions, Tensor]:
    """Model, image, predictions and loss after a backward pass with batch statistics.

    The loss is the sum over all predictions of the mean of prediction * fixed array.
    """
    model, image = case.model().train(), case.image().requires_grad_()
    out, fixed = model(image), case.reference("train.fixed.")
    kinds = {"out": out.final, "inter": out.intermediate}
    loss = torch.stack([(logits * fixed[f"{kind}.{task}"].to(case.dtype)).mean()
                        for kind, maps in kinds.items() for task, logits in maps.items()]).sum()
    loss.backward()
    return model, image, out, loss


# In float32 a ReLU whose input is nearly zero may switch: gradients move by up to 1e-3 of the largest entry.
def training(case: Case, options: Options) -> Iterator[Measure]:
    model, image, out, loss = _backward(case)
    yield from _predictions(case, out, "train", options)
    want = case.reference("train.")["loss"]
    yield Measure("train.loss", abs(loss.item() - want.item()) / abs(want.item()), options.pick(1e-12, 5e-5))
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    gradients["image"] = image.grad
    for key, want in case.reference("train.grad.").items():
        error = stored_error(gradients[case.rename(key)], want)
        yield Measure(f"grad {key}", error / max(want.abs().max().item(), 1e-12), options.pick(1e-9, 1e-3))
    buffers = dict(model.named_buffers())
    for key, want in case.reference("train.after.").items():
        yield _value(case, f"after {key}", buffers[case.rename(key)], want, options)


def gradient_norms(case: Case, options: Options) -> Iterator[Measure]:
    yield from compare_norms(_backward(case)[0], case.gradients, case.rename, case.is_dead, options.pick(1e-9, 1e-3),
                             options)


GROUPS: dict[str, Callable[[Case, Options], Iterator[Measure]]] = {
    "outputs": outputs, "preliminary predictions": _intermediate, "features inside": inside,
    "training": training, "gradient norms": gradient_norms,
}


def full_size(entry: dict) -> MultiTaskModel:
    """The model of a manifest's entry without memory, with the sizes that its shapes tell."""
    shapes, first = entry["state_dict"], entry["tasks"][0]
    outputs = {task: entry["num_output"][task] for task in entry["tasks"]}
    coarse, mixed, *_ = shapes[f"multi_task_decoder.invpt.mix_proj.{first}.0.weight"]
    width, _, patch, _ = shapes["backbone.patch_embed.proj.weight"]
    depth = len({key.split(".")[2] for key in shapes if key.startswith("backbone.blocks.")})
    embed = mixed - outputs[first]
    with torch.device("meta"):
        return build_model("InvPT", "vit", outputs, tuple(entry["image_size"]),
                           backbone_kwargs={"embed_dim": width, "depth": depth, "num_heads": width // 64,
                                            "patch_size": patch},
                           model_kwargs={"embed_dim": embed, "PRED_OUT_NUM_CONSTANT": coarse - embed})


def _manifest(entry: dict) -> Iterator[Measure]:
    model = full_size(entry)
    published = {key: shape for key, shape in entry["state_dict"].items() if not is_dead(key)}
    renamed = {rename(key, entry["tasks"]): shape for key, shape in published.items()}
    yield Measure("keys that fall together", len(published) - len(renamed), 0.0)
    yield from compare_keys(model, renamed)
    dead = sum(math.prod(shape) for key, shape in entry["state_dict"].items() if is_dead(key))
    count = sum(parameter.numel() for parameter in model.parameters())
    yield Measure("parameters", abs(count + dead - entry["total_parameters"]), 0.0)
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, *entry["image_size"], device="meta"))
    operators = entry["gmacs_batch1"]["by_operator"]
    want = sum(operators[name] for name in ("conv", "linear", "matmul", "einsum"))
    yield Measure("multiply-adds of products", abs(counter.get_total_flops() / 2e9 / want - 1), 1e-6)
