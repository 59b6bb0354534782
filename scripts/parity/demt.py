"""DeMT and its baselines as published: outputs, features inside, loss and gradients of whole models.

A case is a table with "case", "backbone" and a "head" of a known name; beside it, under the same name up to the
first dot, the original state dict and arrays "eval.*" / "train.*". The reference ran in float32, so float64 cannot
come closer than its rounding. "eval" and "train" are DeMT's attention over the batch, "eval_single" and "trainps"
that within each image. A manifest lists the keys of the full-size models with their shapes.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor

from models.build import build_model
from models.model import MultiTaskModel
from models.released import RELEASED, recognise
from models.released.demt import ORDER, convert, is_dead, recognises, recognises_baseline
from scripts.parity.base import Check, Folder, Measure, NotCovered, Options, absolute_error, below, scaled_error, stem
from scripts.parity.models import Recorder, compare_keys, manifests
from utils.engine.checkpoint import load_model

HEADS = {"DemtHead": "demt", "FCNHead": "fcn"}
SIZES = {"Swin-T": "swin_tiny", "Swin-S": "swin_small", "Swin-B": "swin_base", "Swin-L": "swin_large",
         "HRNet18-S": "hrnet_w18_small_v2", "HRNet48": "hrnet_w48"}


@dataclass(frozen=True)
class Case:
    """One published model of toy size."""

    config: dict
    state: Path
    arrays: Path
    dtype: torch.dtype

    @property
    def is_demt(self) -> bool:
        return HEADS[self.config["head"]["name"]] == "demt"

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.config["task_order"])

    def model(self, attention: str = "batch") -> MultiTaskModel:
        """With the reference's weights, converted as a released checkpoint is. Nothing in it is random."""
        head, options = self.config["head"], {}
        if self.is_demt:
            options = {key: head[key] for key in ("dim", "num_heads", "mixer_depth")} | {"attention": attention}
        name, sizes = _backbone(self.config["backbone"])
        outputs = {task: self.config["tasks"][task] for task in self.tasks}
        model = build_model(HEADS[head["name"]], name, outputs, tuple(self.config["image_size"]),
                            backbone_kwargs=sizes, model_kwargs=options)
        state = load_file(self.state)
        load_model(model, RELEASED[recognise(state)].convert(state, self.tasks), self.state)    # strict
        return model.to(self.dtype)

    def reference(self, prefix: str) -> dict[str, Tensor]:
        """Arrays below a prefix, without it."""
        return below(load_file(self.arrays), prefix)

    def image(self) -> Tensor:
        return load_file(self.arrays)["image"].to(self.dtype)


def _backbone(entry: dict) -> tuple[str, dict]:
    """Name and sizes of a case's backbone here."""
    if entry["type"] == "swin":
        if (entry.get("patch_size", 4), entry.get("mlp_ratio", 4)) != (4, 4):
            raise NotCovered("a Swin here has patches of 4 pixels and an MLP ratio of 4")
        return "swin", {"embed_dim": entry["embed_dims"], "drop_path_rate": entry["drop_path_rate"],
                        **{key: entry[key] for key in ("depths", "num_heads", "window_size")}}
    if entry["type"] != "hrnet":
        raise NotCovered(f"no backbone of type '{entry['type']}' was published with DeMT")
    stages = [entry["extra"][f"stage{number}"] for number in (2, 3, 4)]
    blocks = {count for stage in stages for count in stage["num_blocks"]}
    width = entry["planes"][0]
    if len(blocks) > 1 or entry["planes"] != [width * 2**branch for branch in range(4)]:
        raise NotCovered("an HRNet here has as many blocks in every branch, and widths that double")
    return "hrnet", {"width": width, "num_blocks": blocks.pop(), "num_modules": [s["num_modules"] for s in stages],
                     "stem_blocks": entry["extra"]["stage1"]["num_blocks"][0]}


def checks(folder: Folder) -> Iterator[Check]:
    yield from _cases(folder)
    yield from manifests(folder, lambda entry: entry.get("head") in HEADS and "keys" in entry, _manifest)


def _cases(folder: Folder) -> Iterator[Check]:
    for path, config in folder.tables.items():
        head = config.get("head") if isinstance(config, dict) else None
        if not (isinstance(head, dict) and head.get("name") in HEADS and "backbone" in config):
            continue
        arrays = folder.beside(path)
        state = next((p for p, keys in arrays.items() if recognises(keys) or recognises_baseline(keys)), None)
        io = next((p for p, keys in arrays.items() if "image" in keys), None)
        if state is None or io is None:
            continue
        for group, (run, prefix) in GROUPS.items():
            if any(key.startswith(prefix) for key in arrays[io]):
                yield Check(f"{stem(path)}/{group}", frozenset({path, state, io}),
                            lambda options, c=(config, state, io), run=run: run(Case(*c, options.dtype), options))


# float64 against a reference in float32: the distance is the reference's own rounding.
def _value(name: str, got: Tensor, want: Tensor, options: Options) -> Measure:
    return Measure(name, absolute_error(got, want) / max(1.0, want.abs().max().item()), options.pick(2e-5, 1e-4))


def _outputs(case: Case, options: Options) -> Iterator[Measure]:
    with torch.no_grad():
        out = case.model().eval()(case.image()).final
    yield from (_value(task, out[task], case.reference("eval.")[task], options) for task in case.tasks)


def _single(case: Case, options: Options) -> Iterator[Measure]:
    """Each image alone, from a whole batch and, in the reference's own mode, image by image."""
    want, image = case.reference("eval_single."), case.image()
    with torch.no_grad():
        together = case.model("per_sample").eval()(image).final
        model = case.model("batch").eval()
        alone = [model(one).final for one in image.split(1)]
    for task in case.tasks:
        yield _value(task, together[task], want[task], options)
        yield _value(f"{task}, alone", torch.cat([out[task] for out in alone]), want[task], options)


def _inside(case: Case, options: Options) -> Iterator[Measure]:
    model = case.model().eval()
    seen = record_inside(model)
    with torch.no_grad():
        model(case.image())
    wanted = case.reference("eval.mid.") | {f"feat{index}": case.reference("eval.")[f"feat{index}"] for index in
                                            range(len(model.encoder.channels))}
    for name, want in wanted.items():
        yield _value(name, seen[name], want, options)


def record_inside(model: MultiTaskModel) -> dict[str, Tensor]:
    """Hooks a DeMT or a baseline; after a forward pass the dict holds the features under the reference's names."""
    seen = Recorder()
    keep = seen.keep
    keep(model.encoder, lambda _, maps: {f"feat{index}": feat for index, feat in enumerate(maps)})
    for task, head in model.heads.items():
        keep(head, lambda inputs, out, task=task: {f"bottleneck_out.{task}": inputs[0], f"lowres.{task}": out})
    decoder = model.decoder
    if not hasattr(decoder, "mixers"):
        return seen
    keep(decoder.fuse, lambda _, feat: {"linear1_nhwc": feat})
    keep(decoder.interaction, lambda _, tokens: {"smlp": rearrange(tokens, "t b p c -> b (t p) c")})
    keep(decoder.interaction.attention, lambda _, groups: {"task_fusion": rearrange(groups, "tp b c -> b tp c")})
    for index, (task, blocks) in enumerate(decoder.mixers.items()):
        for number, block in enumerate(blocks):
            name = f"mixer{index}.block{number}"
            keep(block.deform.reduce, lambda _, out, name=name: {f"{name}.p_conv": out})
            keep(block.deform.spread, lambda _, out, name=name: {f"{name}.offset": out})
        keep(blocks[-1], lambda _, out, name=f"mixer{index}": {name: out})
        keep(decoder.queries[task].attention,
             lambda _, groups, name=f"task_query{index}": {name: rearrange(groups, "p b c -> b p c")})
        keep(decoder.project[task], lambda inputs, _, task=task: {f"bottleneck_in.{task}": inputs[0]})
    return seen


def _training(case: Case, options: Options) -> Iterator[Measure]:
    yield from _train(case, "train.", "batch", options)


def _training_per_sample(case: Case, options: Options) -> Iterator[Measure]:
    """One image per process with synchronised norms: the same as our attention within each image."""
    yield from _train(case, "trainps.", "per_sample", options)


def _train(case: Case, prefix: str, attention: str, options: Options) -> Iterator[Measure]:
    """A forward and backward pass with batch statistics; the loss is the sum over tasks of mean(output * fixed)."""
    model, image = case.model(attention).train(), case.image().requires_grad_()
    out, fixed = model(image).final, case.reference("train.weight.")
    loss = torch.stack([(out[task] * fixed[task].to(case.dtype)).mean() for task in case.tasks]).sum()
    loss.backward()
    want = case.reference(prefix)
    yield Measure("loss", absolute_error(loss[None], want["loss"]), options.pick(1e-6, 1e-5))
    for task in case.tasks:
        yield Measure(task, absolute_error(out[task], want[task]), options.pick(1e-4, 5e-4))
    grads = case.reference(f"{prefix}grad.")
    yield _grad("grad.image", image.grad, grads.pop("image"), options)
    own = dict(model.named_parameters())
    grads = convert(grads, case.tasks)
    yield Measure("gradients of no parameter", len(grads.keys() - own.keys()), 0.0)
    for name, grad in grads.items():
        yield _grad(f"grad.{name}", own[name].grad, grad, options)
    yield Measure("parameters without a gradient", sum(parameter.grad is None for parameter in own.values()), 0.0)
    own = model.state_dict()
    for name, value in convert(case.reference(f"{prefix}after."), case.tasks).items():
        yield _value(f"after.{name}", own[name], value, options)


def _grad(name: str, got: Tensor, want: Tensor, options: Options) -> Measure:
    return Measure(name, scaled_error(got, want), options.pick(2e-4, 1e-3))


GROUPS: dict[str, tuple[Callable[[Case, Options], Iterator[Measure]], str]] = {
    "outputs": (_outputs, "eval."), "inside": (_inside, "eval.mid."), "each image alone": (_single, "eval_single."),
    "training": (_training, "train."), "training, each image alone": (_training_per_sample, "trainps.")}


def full_size(entry: dict) -> MultiTaskModel:
    """The model of a manifest's entry, without memory."""
    if entry["backbone"] not in SIZES:
        raise NotCovered(f"no backbone '{entry['backbone']}' here")
    backbone = SIZES[entry["backbone"]]
    options = {key: entry[key] for key in ("dim", "num_heads", "mixer_depth", "mixer_order") if key in entry}
    with torch.device("meta"):
        return build_model(HEADS[entry["head"]], backbone, entry["tasks"], tuple(entry["input_hw"]),
                           backbone_kwargs={"window_size": 7} if backbone.startswith("swin") else {},
                           model_kwargs=options)


def _manifest(entry: dict) -> Iterator[Measure]:
    model = full_size(entry)
    published = {key: torch.empty(shape, device="meta") for key, shape in entry["keys"].items()}
    ours = RELEASED[recognise(published)].convert(published, tuple(entry["tasks"]))
    renamed = {key: value.shape for key, value in ours.items()}
    yield from compare_keys(model, renamed)
    derived = sum(is_dead(key) or key.endswith("relative_position_index") for key in published)
    added = len(renamed.keys() & {ORDER})
    yield Measure("keys that fall together", len(published) - derived + added - len(renamed), 0.0)
    count = sum(math.prod(parameter.shape) for parameter in model.parameters())
    yield Measure("parameters", abs(count - entry["parameters"]), 0.0)
    part = sum(math.prod(parameter.shape) for parameter in model.encoder.parameters())
    yield Measure("parameters of the backbone", abs(part - entry["parameters_backbone"]), 0.0)
