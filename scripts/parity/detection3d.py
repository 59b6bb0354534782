"""TaskPrompter's 3-D detection on Cityscapes-3D: head, targets, losses with gradients, decoding, the keys of full size.

The references ran in float64 on inputs that float32 holds exactly. Targets are compared in float64 in any arithmetic,
because several lie exactly on a limit. Data and metric: `detection3d_data`.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from evaluation.detection3d.decoding import Limits, candidates, decode, ground_rectangles
from losses.detection3d.loss import Detection3DLoss
from losses.detection3d.options import Detection3DOptions
from losses.detection3d.points import Grid, Output
from losses.detection3d.targets import REFERENCE_HEIGHT, Targets, half_turn, targets_of
from models.heads import FeatureLevels
from models.heads.detection3d import Detection3DHead
from models.released.taskprompter import TASKPROMPTER
from scripts.parity.base import Bound, Check, Folder, Measure, Options, absolute_error, below, scaled_error
from scripts.parity.program import parameters
from utils.boxes3d import Boxes3D

NUM_CLASSES = 6
OUTPUTS = {"classes": "cls_score", "regression": "bbox_pred", "direction": "dir_cls_pred", "centerness": "centerness"}
LOSSES = {"classes": "cls", "rotation": "rotsin", "box": "bbox2d", "direction": "dir"}  # others have our names
VALUE, GRADIENT = Bound(absolute_error, 1e-9, 5e-4), Bound(scaled_error, 1e-8, 2e-3)
LOSS, LOSS_GRADIENT = Bound(scaled_error, 1e-10, 1e-5), Bound(scaled_error, 1e-10, 1e-4)
TARGET, EXACT = Bound(absolute_error, 1e-10, 1e-10), Bound(absolute_error, 0, 0)
DECODED = Bound(scaled_error, 1e-9, 1e-5)
CONSTANT = Bound(absolute_error, 1e-6, 1e-6)
STANDARD_ERRORS = 6.0  # that mean and spread of random weights may differ by
Tensors = Mapping[str, Tensor]


def checks(folder: Folder) -> Iterator[Check]:
    for table, content in folder.tables.items():
        for part, (needed, run) in PARTS.items():
            if isinstance(content, dict) and needed <= content.keys():
                beside = folder.beside(table)
                norms = next((folder.tables[path] for path in beside if path.suffix == ".json"), {})
                yield Check(f"{table.name.partition('.')[0]}/{part}", frozenset({table, *beside}),
                            partial(_run, run, content, [path for path in beside if path.suffix != ".json"], norms))


def _run(run: Callable, config: dict, paths: list[Path], norms: dict, options: Options) -> Iterator[Measure]:
    data = {name: value for path in paths for name, value in load_file(path).items()}
    yield from run(config, data, norms, options)


# ------------------------------------------------------------ head


def ours(key: str) -> str:
    """Our name of a key of the original's head."""
    return TASKPROMPTER.rename(f"heads.3ddet.{key}").split(".", 2)[2]


def head_options(config: dict, **changes) -> Detection3DOptions:
    """Of a configuration of the original's head."""
    return Detection3DOptions(config["feat_channels"], tuple(config["cls_branch"]), config["group_norm_groups"],
                              direction_offset=0.0, **changes)


def outputs(output: Output) -> dict[str, Tensor]:
    """What a head gave, under the original's names."""
    return {f"{theirs}.{name}": level[own]
            for name, level in output["levels"].items() for own, theirs in OUTPUTS.items()}


def _head(config: dict, data: Tensors, norms: dict, options: Options) -> Iterator[Measure]:
    levels = FeatureLevels(tuple(config["in_channels"]), (8, 16, 32, 32), 256)
    head = Detection3DHead(levels, config["num_classes"], head_options(config))
    head.load_state_dict({ours(key): data[key] for key in norms})  # of all keys: no buffers there
    head, seen = head.to(options.dtype), {}
    for name, part in {"cls_tower": head.class_tower, "reg_tower": head.box_tower}.items():
        part.register_forward_hook(lambda _, inputs, out, name=name: seen.update(
            {f"{name}.level{sum(key.startswith(name) for key in seen)}": out}))
    head.pyramid.register_forward_hook(lambda _, inputs, out: seen.update(
        {f"neck.level{index}": feat for index, feat in enumerate(out)}))
    feats = [data[f"feat.level{index}"].to(options.dtype).requires_grad_() for index in range(len(levels.strides))]
    got = outputs(head(feats))
    for name, want in below(data, "out.").items():
        yield VALUE.measure(f"out.{name}", got[name], want, options)
    for name, want in below(data, "mid.").items():
        yield VALUE.measure(f"mid.{name}", seen[name], want, options)
    loss = sum((got[name] * fixed.to(options.dtype)).mean() for name, fixed in below(data, "fixed.").items())
    yield LOSS.measure("loss", loss, data["loss"], options)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in head.named_parameters()}
    found = {f"feat.level{index}": feat.grad for index, feat in enumerate(feats)}
    found |= {key: gradients.pop(ours(key)) for key in norms}
    yield Measure("parameters that only ours has", len(gradients))
    for key, want in below(data, "grad.").items():
        yield GRADIENT.measure(f"grad.{key}", found[key], want, options)
    for key, want in norms.items():
        yield GRADIENT.measure(f"|grad.{key}|", found[key].norm(), want, options)


def _full_size(config: dict, data: Tensors, norms: dict, options: Options) -> Iterator[Measure]:
    """Keys, shapes and the number of parameters, and what the weights are at first."""
    shapes = config["keys"]
    channels = tuple(shapes[f"neck.lateral_convs.{index}.conv.weight"][1] for index in range(4))
    torch.manual_seed(0)
    head = Detection3DHead(FeatureLevels(channels, (8, 16, 32, 32), 2048), NUM_CLASSES, Detection3DOptions())
    own = head.state_dict()
    yield Measure("keys only here or only there", len({ours(key) for key in shapes} ^ own.keys()))
    yield Measure("keys that fall together", len(shapes) - len({ours(key) for key in shapes}))
    yield Measure("other shapes", sum(list(own[ours(key)].shape) != shape for key, shape in shapes.items()))
    yield Measure("parameters", abs(parameters(head) - config["parameters"]))
    for key, want in config["initial_statistics"].items():
        weight = own[ours(key)]
        for name, got in (("mean", weight.mean()), ("std", weight.std(correction=0))):
            if want["std"] == 0.0:
                yield CONSTANT.measure(f"first {name} of {key}", got, want[name], options)
            else:
                errors = (got.item() - want[name]) / want["std"] * weight.numel() ** 0.5
                yield Measure(f"first {name} of {key}", abs(errors), STANDARD_ERRORS)


# ------------------------------------------------------------ targets and losses


def boxes_of(config: dict, data: Tensors, image: int) -> Boxes3D:
    """One image's boxes in a reference, with its camera if there is one."""
    empty = {"label": torch.zeros(0, dtype=torch.long), **{name: torch.zeros(0, 3).double() for name in (
        "center_S", "center_I", "size_S", "rotation_S")}, "bbox_modal": torch.zeros(0, 4).double()}
    given = below(data, f"gt.{image}.") or empty
    camera = data["K"][image] if "K" in data else torch.eye(3)
    return Boxes3D(given["label"], given["center_S"], given["center_I"], given["size_S"], given["rotation_S"],
                   given["bbox_modal"], given["bbox_modal"], camera, torch.zeros(3, 4),
                   torch.tensor(config["image_size"]))


def options_of(config: dict, height: int) -> dict:
    """Ranges as the key `det3d_kwargs` has them, from those of images so high."""
    scale = REFERENCE_HEIGHT / height
    return {"ranges": tuple(high * scale for _, high in config["regress_ranges"][:-1])}


def output_of(config: dict, data: Tensors, options: Options) -> Output:
    """Stored predictions as a head gives them."""
    number = config["images"]

    def told(value: float) -> Tensor:
        return torch.full((number,), value, dtype=torch.float64)

    levels = {f"level{index}": {**{own: data[f"pred.{theirs}.level{index}"].to(options.dtype).requires_grad_()
                                   for own, theirs in OUTPUTS.items()}, "stride": told(stride)}
              for index, stride in enumerate(config["strides"])}
    return {"levels": levels, "width": told(config["image_size"][1]), "direction_offset": told(0.0)}


def _targets(config: dict, data: Tensors, norms: dict, options: Options) -> Iterator[Measure]:
    shapes = tuple(map(tuple, config["level_sizes"]))
    grid = Grid(shapes, torch.tensor(config["strides"], dtype=torch.float64))
    images = range(config["images"]) if "images_with_boxes" not in config else config["images_with_boxes"]
    ranges = options_of(config, config["image_size"][0])["ranges"]
    found = [targets_of(grid, boxes_of(config, data, image), ranges, 0.0, NUM_CLASSES) for image in images]
    start, bins = 0, []
    for level, (height, width) in enumerate(shapes):
        size = height * width
        parts = [_of_level(targets, start, size) for targets in found]
        start += size
        for name in ("labels", "positive", "code", "centerness"):
            if (stored := data.get(f"target.{name.removesuffix('s')}.level{level}")) is not None:
                got = torch.cat([getattr(part, name) + (index * size if name == "positive" else 0)
                                 for index, part in enumerate(parts)])
                yield (TARGET if stored.is_floating_point() else EXACT).measure(f"{name} {level}", got, stored, options)
        if f"points.level{level}" in data:
            points = grid.points()[start - size:start]
            yield TARGET.measure(f"points {level}", points, data[f"points.level{level}"], options)
        bins += [part.direction for part in parts]
    if "target.direction_bins" in data:
        yield EXACT.measure("half turns", torch.cat(bins), data["target.direction_bins"], options)
    if "direction.angle" in data:
        angle = data["direction.angle"]
        yield EXACT.measure("half turns of many angles", half_turn(angle, 0.0), data["direction.bin"], options)
        for number in (0, 1):
            yield TARGET.measure("decoded angles", angle % math.pi + math.pi * number,
                                 data[f"direction.decoded_bin{number}"], options)


def _of_level(targets: Targets, start: int, size: int) -> Targets:
    """One level's part; `positive` counts in the level."""
    here = (targets.positive >= start) & (targets.positive < start + size)
    return Targets(targets.labels[start:start + size], targets.positive[here] - start,
                   *(value[here] for value in targets[2:]))


def _losses(config: dict, data: Tensors, norms: dict, options: Options) -> Iterator[Measure]:
    output = output_of(config, data, options)
    settings = Detection3DOptions(direction_offset=0.0, **options_of(config, config["image_size"][0]))
    loss = Detection3DLoss(settings, NUM_CLASSES)
    labels = [boxes_of(config, data, image) for image in range(config["images"])]
    got = {f"loss_{LOSSES.get(name, name)}": value for name, value in loss.parts(output, labels).items()}
    for name, want in config["losses"].items():
        yield LOSS.measure(name, got[name].detach(), want, options)
    total = loss(output, labels)
    yield LOSS.measure("sum", total.detach(), config["loss_sum"], options)
    total.backward()
    for name, value in outputs(output).items():
        yield LOSS_GRADIENT.measure(f"grad.{name}", value.grad, data[f"grad.{name}"], options)


# ------------------------------------------------------------ decoding


def _decoding(config: dict, data: Tensors, norms: dict, options: Options) -> Iterator[Measure]:
    output = output_of(config, data, options)
    cameras = [boxes_of(config, data, image) for image in range(config["images"])]
    limits = Limits(config["nms_pre"], config["score_thr"], config["nms_thr"], config["max_per_img"])
    with torch.no_grad():
        before = candidates(output, cameras, limits)
    for image, (found, kept) in enumerate(zip(before, decode(output, cameras, limits), strict=True)):
        want = below(data, f"pre_nms.{image}.")
        x, z, along_x, along_z, angle = ground_rectangles(found.boxes).unbind(1)
        rectangles = torch.stack([x - along_x / 2, z - along_z / 2, x + along_x / 2, z + along_z / 2, angle], dim=1)
        pairs = {"boxes": found.boxes, "scores": found.scores, "centers2d": found.projected, "boxes2d": found.boxes2d,
                 "boxes_for_nms": rectangles}
        for name, got in pairs.items():
            yield DECODED.measure(f"candidates of image {image}: {name}", got, want[name], options)
        want = below(data, f"result.{image}.")
        pairs = {"boxes": kept.boxes, "scores": kept.scores, "centers2d": kept.projected,
                 "boxes2d_score": torch.cat([kept.boxes2d, kept.scores[:, None]], dim=1)}
        for name, got in pairs.items():
            yield DECODED.measure(f"result of image {image}: {name}", got, want[name], options)
        yield EXACT.measure(f"result of image {image}: labels", kept.labels, want["labels"], options)


PARTS: dict[str, tuple[set[str], Callable]] = {
    "head": ({"group_norm_groups", "in_channels"}, _head),
    "keys": ({"prefix_in_checkpoint", "initial_statistics"}, _full_size),
    "targets": ({"regress_ranges", "level_sizes"}, _targets),
    "losses": ({"regress_ranges", "loss_sum"}, _losses),
    "decoding": ({"nms_pre", "nms_thr"}, _decoding),
}
