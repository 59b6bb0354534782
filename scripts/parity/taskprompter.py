"""TaskPrompter as published: outputs, features inside, loss and gradients of whole models, and full-size keys.

Cases have the form of InvPT's (see there). Prompts after the last block are not compared: no output depends on
them, and ours does not compute them.
"""

import math
from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from models.backbones.swin import DERIVED_BUFFERS
from models.build import build_model
from models.model import MultiTaskModel
from models.released.taskprompter import DETECTION, dead_keys, recognises, rename
from scripts.parity.base import Check, Folder, Measure, NotCovered
from scripts.parity.invpt import NO_EFFECT, Case, cases, gradient_norms, inside, outputs, training
from scripts.parity.models import compare_keys, manifests

BUFFERS = ("running_mean", "running_var", "num_batches_tracked", *DERIVED_BUFFERS)
GROUPS = {"outputs": outputs, "features inside": inside, "training": training, "gradient norms": gradient_norms}
HEAD_DIM = 64  # of the published ViTs
OPTIONS = ("final_embed_dim", "prompt_len", "chan_nheads", "head", "embed_dim", "use_ctr", "level_embed_dim",
           "chan_embed_dim", "img_ds_ratio")
FIXED = {"mlp_ratio": 4.0, "qkv_bias": True, "patch_norm": True, "ape": False}
BACKBONE_OPTIONS = ("embed_dim", "depth", "depths", "num_heads", "window_size", "patch_size", "drop_path_rate")


class TaskPrompterCase(Case):
    """One published model of toy size."""

    family: ClassVar[str] = "TaskPrompter"
    recognises: ClassVar[Callable] = staticmethod(recognises)
    tolerance: ClassVar[float] = 2e-4

    def model(self) -> MultiTaskModel:
        c, backbone = self.config, self.config["backbone"]
        if any(backbone.get(name, value) != value for name, value in FIXED.items()):
            raise NotCovered(f"here a backbone has {', '.join(f'{name} {value}' for name, value in FIXED.items())}")
        backbone_kwargs = {name: backbone[name] for name in BACKBONE_OPTIONS if name in backbone}
        if "tap_after_blocks" in backbone:
            backbone_kwargs["taps"] = backbone["tap_after_blocks"]
        model = build_model(
            c["model"], backbone["type"], dict(zip(self.tasks, c["num_output"], strict=True)), tuple(c["image_size"]),
            backbone_kwargs=backbone_kwargs, label_size=tuple(c.get("dd_label_map_size") or c["image_size"]),
            model_kwargs={name: c[name] for name in OPTIONS if name in c})
        return self.loaded(model)

    def rename(self, key: str) -> str:
        return rename(key)

    def is_dead(self, key: str) -> bool:
        return key in dead_keys(self.gradients)

    def record_inside(self, model: MultiTaskModel) -> dict[str, Tensor]:
        return record_inside(model)

    def missing_inside(self, name: str) -> str:
        backbone = self.config["backbone"]
        last = f"block{backbone['depth'] - 1}" if "depth" in backbone else f"layer{len(backbone['depths']) - 1}"
        return NO_EFFECT if name == f"{last}.prompts" else ""


def checks(folder: Folder) -> Iterator[Check]:
    yield from cases(folder, TaskPrompterCase, GROUPS)
    yield from manifests(folder, lambda entry: recognises(entry.get("state_dict", ())), _manifest)


def record_inside(model: MultiTaskModel) -> dict[str, Tensor]:
    """Wraps the steps of a TaskPrompter; after a forward pass the dict holds the features by their names."""
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


def _vit_block(encoder: torch.nn.Module, seen: dict[str, Tensor]) -> Callable:
    def see(args: tuple, out: tuple) -> None:
        name = f"block{list(encoder.blocks).index(args[0])}"
        tokens, scores, channel = out
        seen[f"{name}.prompts"], seen[f"{name}.x"] = encoder.split(tokens)
        seen[f"{name}.raw_spatial_attn_prompt_rows"], seen[f"{name}.raw_channel_attn"] = scores, channel
    return see


def _swin_block(encoder: torch.nn.Module, seen: dict[str, Tensor]) -> Callable:
    names = {block: f"layer{stage}.block{index}" for stage, layer in enumerate(encoder.layers)
             for index, block in enumerate(layer.blocks)}

    def see(args: tuple, out: tuple) -> None:
        feat, prompts, spatial, channel = out
        _keep(seen, names[args[0]], feat, prompts, spatial, channel)
        if args[0] is encoder.layers[-1].blocks[-1]:
            _keep(seen, names[args[0]].partition(".")[0], feat, prompts, spatial, channel)
    return see


def _see_stages(encoder: torch.nn.Module, seen: dict[str, Tensor]) -> None:
    """A stage of the reference ends with the merging, which opens the next one here."""
    for stage, merging in enumerate(encoder.merging):
        encoder.layers[stage + 1].downsample.register_forward_hook(
            lambda _, args, feat, stage=stage: seen.update({f"layer{stage}.x": feat.flatten(1, 2)}))
        names = (f"layer{stage}.prompts", f"layer{stage}.spatial_attn", f"layer{stage}.channel_attn")
        merging.register_forward_hook(
            lambda _, args, out, names=names: seen.update(zip(names, out, strict=True)))


def _keep(seen: dict[str, Tensor], name: str, feat: Tensor, prompts: Tensor, spatial: Tensor, channel: Tensor) -> None:
    seen.update({f"{name}.x": feat.flatten(1, 2), f"{name}.prompts": prompts, f"{name}.spatial_attn": spatial,
                 f"{name}.channel_attn": channel})


# ------------------------------------------------------------ full-size models


def full_size(entry: dict) -> MultiTaskModel:
    """The model of a manifest's entry without memory, with the sizes that its shapes tell."""
    shapes = entry["state_dict"]
    tasks = [task for task in entry["tasks"] if task != DETECTION]
    fused, joint, *_ = shapes[f"backbone.fea_fuse.0.{tasks[0]}.0.weight"]
    options = {"final_embed_dim": fused, "extra_prompts": len(entry["tasks"]) - len(tasks),
               "use_ctr": any(key.startswith("backbone.ctr_attn_conv.") for key in shapes),
               "head": "deconv" if f"heads.{tasks[0]}.mt_proj.3.weight" in shapes else "conv"}
    if "backbone.pos_embed" in shapes:
        backbone, sizes = "vit", _vit_sizes(shapes)
        options |= {"embed_dim": joint // 2}
    else:
        backbone, sizes = "swin", _swin_sizes(shapes)
        width = shapes["backbone.layers.0.blocks.0.chan_q.weight"][0]
        positions = shapes["backbone.layers.0.blocks.0.chan_kv.weight"][1] * sizes["patch_size"]**2
        options |= {"level_embed_dim": joint // 2, "chan_embed_dim": width,
                    "img_ds_ratio": math.sqrt(positions / math.prod(entry["image_size"]))}
    with torch.device("meta"):
        return build_model("TaskPrompter", backbone, {task: entry["num_output"][task] for task in tasks},
                           tuple(entry["image_size"]), backbone_kwargs=sizes, model_kwargs=options)


def _vit_sizes(shapes: dict) -> dict:
    width, _, patch, _ = shapes["backbone.patch_embed.proj.weight"]
    depth = len({key.split(".")[2] for key in shapes if key.startswith("backbone.blocks.")})
    return {"embed_dim": width, "depth": depth, "num_heads": width // HEAD_DIM, "patch_size": patch}


def _swin_sizes(shapes: dict) -> dict:
    width, _, patch, _ = shapes["backbone.patch_embed.proj.weight"]
    tables = {key: shape for key, shape in shapes.items() if key.endswith("relative_position_bias_table")}
    stages = [[shape for key, shape in tables.items() if key.startswith(f"backbone.layers.{stage}.")]
              for stage in range(4)]
    return {"embed_dim": width, "patch_size": patch, "depths": tuple(map(len, stages)),
            "num_heads": tuple(stage[0][1] for stage in stages),
            "window_size": (math.isqrt(stages[0][0][0]) + 1) // 2}  # tables have (2 w - 1)^2 rows


def _manifest(entry: dict) -> Iterator[Measure]:
    model, dead = full_size(entry), dead_keys(entry["state_dict"])
    renamed = {rename(key): shape for key, shape in entry["state_dict"].items() if key not in dead}
    yield Measure("keys that fall together", len(entry["state_dict"]) - len(dead) - len(renamed), 0.0)
    yield from compare_keys(model, renamed)
    lost = sum(math.prod(entry["state_dict"][key]) for key in dead if not key.endswith(BUFFERS))
    count = sum(parameter.numel() for parameter in model.parameters())
    yield Measure("parameters", abs(count + lost - entry["total_parameters"]), 0.0)
    if DETECTION in entry["tasks"]:
        yield Measure("multiply-adds", uncovered="no 3D detection here, and features are projected before they grow")
        return
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, *entry["image_size"], device="meta"))
    convolutions = counter.get_flop_counts()["Global"][torch.ops.aten.convolution] / 2e9
    want = entry["gmacs_batch1_conv_and_matmul_only"]["by_operator"]["aten.convolution"]
    yield Measure("multiply-adds of convolutions", abs(convolutions / want - 1), 1e-6)
