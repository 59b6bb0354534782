"""TaskPrompter as published: whole models of toy size in float64, and the keys of the full-size ones."""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from models.backbones.swin import DERIVED_BUFFERS
from models.model import MultiTaskModel
from models.released.taskprompter import DETECTION, rename
from scripts.parity import compare
from scripts.parity.base import Bound, Measure, NotCovered, stored_error
from scripts.parity.case import MODEL, NO_EFFECT, Bounds, System
from scripts.parity.program import build, flops, parameters

BUFFERS = ("running_mean", "running_var", "num_batches_tracked", *DERIVED_BUFFERS)
OPTIONS = ("final_embed_dim", "prompt_len", "chan_nheads", "head", "embed_dim", "use_ctr", "level_embed_dim",
           "chan_embed_dim", "img_ds_ratio")
FIXED = {"mlp_ratio": 4.0, "qkv_bias": True, "patch_norm": True, "ape": False}
BACKBONE_OPTIONS = ("embed_dim", "depth", "depths", "num_heads", "window_size", "patch_size", "drop_path_rate")


def _build(config: dict) -> MultiTaskModel:
    c, backbone = config, config["backbone"]
    if any(backbone.get(name, value) != value for name, value in FIXED.items()):
        raise NotCovered(f"here a backbone has {', '.join(f'{name} {value}' for name, value in FIXED.items())}")
    sizes = {name: backbone[name] for name in BACKBONE_OPTIONS if name in backbone}
    if "tap_after_blocks" in backbone:
        sizes["taps"] = backbone["tap_after_blocks"]
    return build("TaskPrompter", backbone["type"], dict(zip(c["tasks"], c["num_output"], strict=True)),
                 c["image_size"], sizes, {name: c[name] for name in OPTIONS if name in c},
                 label_size=c.get("dd_label_map_size") or c["image_size"])


def _uncovered(config: dict, name: str) -> str:
    """Prompts after the last block."""
    backbone = config["backbone"]
    last = f"block{backbone['depth'] - 1}" if "depth" in backbone else f"layer{len(backbone['depths']) - 1}"
    return NO_EFFECT if name == f"{last}.prompts" else ""


def record_inside(model: MultiTaskModel) -> dict[str, Tensor]:
    """Wraps the steps of a TaskPrompter, which are no modules; the dict has the reference's names."""
    seen: dict[str, Tensor] = {}
    see_block = _vit_block if hasattr(model.encoder, "blocks") else _swin_block
    model.encoder.run_block = _watch(model.encoder.run_block, see_block(model.encoder, seen))
    if hasattr(model.encoder, "layers"):
        _see_stages(model.encoder, seen)
    model.decoder.run_level = _watch(model.decoder.run_level, lambda args, feats: seen.update(
        {f"task_feature.level{args[0]}.{task}": feat for task, feat in feats.items()}))
    model.decoder.register_forward_hook(
        lambda _, args, out: seen.update({f"backbone_out.{task}": feat for task, feat in out.feats.items()}))
    return seen


def _watch(function: Callable, see: Callable[[tuple, object], None]) -> Callable:
    def watched(*args):
        out = function(*args)
        see(args, out)
        return out
    return watched


def _vit_block(encoder: nn.Module, seen: dict[str, Tensor]) -> Callable:
    def see(args: tuple, out: tuple) -> None:
        name = f"block{list(encoder.blocks).index(args[0])}"
        tokens, scores, channel = out
        seen[f"{name}.prompts"], seen[f"{name}.x"] = encoder.split(tokens)
        seen[f"{name}.raw_spatial_attn_prompt_rows"], seen[f"{name}.raw_channel_attn"] = scores, channel
    return see


def _swin_block(encoder: nn.Module, seen: dict[str, Tensor]) -> Callable:
    names = {block: f"layer{stage}.block{index}" for stage, layer in enumerate(encoder.layers)
             for index, block in enumerate(layer.blocks)}

    def see(args: tuple, out: tuple) -> None:
        is_last = args[0] is encoder.layers[-1].blocks[-1]  # what it gives is what its stage gives
        for name in (names[args[0]], *([names[args[0]].partition(".")[0]] if is_last else [])):
            feat, *rest = out
            seen[f"{name}.x"] = feat.flatten(1, 2)
            seen.update(zip(_prompt_names(name), rest, strict=True))
    return see


def _see_stages(encoder: nn.Module, seen: dict[str, Tensor]) -> None:
    """A stage of the reference ends with the merging, which opens the next one here."""
    for stage, merging in enumerate(encoder.merging):
        encoder.layers[stage + 1].downsample.register_forward_hook(
            lambda _, args, feat, stage=stage: seen.update({f"layer{stage}.x": feat.flatten(1, 2)}))
        names = _prompt_names(f"layer{stage}")
        merging.register_forward_hook(
            lambda _, args, out, names=names: seen.update(zip(names, out, strict=True)))


def _prompt_names(place: str) -> tuple[str, ...]:
    return tuple(f"{place}.{what}" for what in ("prompts", "spatial_attn", "channel_attn"))


def full_size(entry: dict) -> MultiTaskModel:
    """The model of a manifest's entry without memory, with the sizes that its shapes tell."""
    shapes = entry["state_dict"]
    tasks = [task for task in entry["tasks"] if task != DETECTION]
    fused, joint, *_ = shapes[f"backbone.fea_fuse.0.{tasks[0]}.0.weight"]
    options = {"final_embed_dim": fused, "extra_prompts": len(entry["tasks"]) - len(tasks),
               "use_ctr": any(key.startswith("backbone.ctr_attn_conv.") for key in shapes),
               "head": "deconv" if f"heads.{tasks[0]}.mt_proj.3.weight" in shapes else "conv"}
    if "backbone.pos_embed" in shapes:
        backbone, sizes = "vit", compare.vit_sizes(shapes)
        options |= {"embed_dim": joint // 2}
    else:
        backbone, sizes = "swin", _swin_sizes(shapes)
        width = shapes["backbone.layers.0.blocks.0.chan_q.weight"][0]
        positions = shapes["backbone.layers.0.blocks.0.chan_kv.weight"][1] * sizes["patch_size"]**2
        options |= {"level_embed_dim": joint // 2, "chan_embed_dim": width,
                    "img_ds_ratio": math.sqrt(positions / math.prod(entry["image_size"]))}
    with torch.device("meta"):
        return build("TaskPrompter", backbone, {task: entry["num_output"][task] for task in tasks},
                     entry["image_size"], sizes, options)


def _swin_sizes(shapes: dict) -> dict:
    width, _, patch, _ = shapes["backbone.patch_embed.proj.weight"]
    tables = {key: shape for key, shape in shapes.items() if key.endswith("relative_position_bias_table")}
    stages = [[shape for key, shape in tables.items() if key.startswith(f"backbone.layers.{stage}.")]
              for stage in range(4)]
    return {"embed_dim": width, "patch_size": patch, "depths": tuple(map(len, stages)),
            "num_heads": tuple(stage[0][1] for stage in stages),
            "window_size": (math.isqrt(stages[0][0][0]) + 1) // 2}  # tables have (2 w - 1)^2 rows


def _full_size(entry: dict) -> Iterator[Measure]:
    model, shapes = full_size(entry), entry["state_dict"]
    yield from compare.keys(model, shapes, entry["tasks"])
    lost = compare.count(shapes, (key for key in compare.dead_keys(shapes) if not key.endswith(BUFFERS)))
    yield compare.difference("parameters", parameters(model) + lost, entry["total_parameters"])
    if DETECTION in entry["tasks"]:
        yield Measure("multiply-adds", uncovered="no 3D detection here, and features are projected before they grow")
        return
    convolutions = flops(model, entry["image_size"]).get_flop_counts()["Global"][torch.ops.aten.convolution] / 2e9
    want = entry["gmacs_batch1_conv_and_matmul_only"]["by_operator"]["aten.convolution"]
    yield compare.difference("multiply-adds of convolutions", convolutions / want, 1.0, 1e-6)


SYSTEM = System(
    released=("TaskPrompter",),
    fits=lambda config: config.get("model") == "TaskPrompter" and "backbone" in config,
    build=_build,
    convert=lambda tensors, tasks: {rename(key): value for key, value in tensors.items()},
    groups={"outputs": (compare.outputs, *MODEL), "features inside": (compare.inside, *MODEL),
            "training": (compare.training, *MODEL),
            "gradient norms": (compare.gradient_norms, *MODEL, "norms")},
    bounds=Bounds(value=Bound(stored_error, 1e-9, 2e-4)),
    uncovered=_uncovered,
    record=record_inside,
    full_size=_full_size)
checks = SYSTEM.checks
