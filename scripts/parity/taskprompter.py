"""TaskPrompter as published: outputs, features inside, loss and gradients of whole models, and full-size keys.

Cases have the form of InvPT's (see there). Prompts after the last block are not compared: no output depends on
them, and ours does not compute them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from models.build import build_model
from models.model import MultiTaskModel
from models.released.taskprompter import dead_keys, recognises, rename
from scripts.parity.base import Check, Folder, Measure
from scripts.parity.invpt import NO_EFFECT, Case, cases, gradient_norms, inside, manifests, outputs, training

BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
GROUPS = {"outputs": outputs, "features inside": inside, "training": training, "gradient norms": gradient_norms}
HEAD_DIM = 64  # of the published ViTs


class TaskPrompterCase(Case):
    """One published model of toy size."""

    family: ClassVar[str] = "TaskPrompter"
    recognises: ClassVar[Callable] = staticmethod(recognises)
    tolerance: ClassVar[float] = 2e-4

    def model(self) -> MultiTaskModel:
        c, backbone = self.config, self.config["backbone"]
        names = ("final_embed_dim", "prompt_len", "chan_nheads", "head", "embed_dim", "use_ctr", "level_embed_dim",
                 "chan_embed_dim", "img_ds_ratio")
        sizes = {"vit": ("embed_dim", "depth", "num_heads", "patch_size", "drop_path_rate")}[backbone["type"]]
        backbone_kwargs = {name: backbone[name] for name in sizes}
        if "tap_after_blocks" in backbone:
            backbone_kwargs["taps"] = backbone["tap_after_blocks"]
        model = build_model(
            c["model"], backbone["type"], dict(zip(self.tasks, c["num_output"], strict=True)), tuple(c["image_size"]),
            backbone_kwargs=backbone_kwargs, output_size=tuple(c["dd_label_map_size"] or c["image_size"]),
            model_kwargs={name: c[name] for name in names if name in c})
        return self.loaded(model)

    def rename(self, key: str) -> str:
        return rename(key)

    def is_dead(self, key: str) -> bool:
        return key in dead_keys(self.gradients)

    def record_inside(self, model: MultiTaskModel) -> dict[str, Tensor]:
        return record_inside(model)

    def missing_inside(self, name: str) -> str:
        last = self.config["backbone"].get("depth", 0) - 1
        return NO_EFFECT if name == f"block{last}.prompts" else ""


def checks(folder: Folder) -> Iterator[Check]:
    yield from cases(folder, TaskPrompterCase, GROUPS)
    yield from manifests(folder, recognises, _manifest)


def record_inside(model: MultiTaskModel) -> dict[str, Tensor]:
    """Wraps the steps of a TaskPrompter; after a forward pass the dict holds the features by their names."""
    seen: dict[str, Tensor] = {}
    model.encoder.run_block = _watch(model.encoder.run_block, _vit_block(model.encoder, seen))
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


# ------------------------------------------------------------ full-size models


def full_size(entry: dict) -> MultiTaskModel:
    """The model of a manifest's entry without memory, with the sizes that its shapes tell."""
    shapes = entry["state_dict"]
    outputs = {task: entry["num_output"][task] for task in entry["tasks"]}
    first = next(iter(outputs))
    fused, joint, *_ = shapes[f"backbone.fea_fuse.0.{first}.0.weight"]
    width, _, patch, _ = shapes["backbone.patch_embed.proj.weight"]
    depth = len({key.split(".")[2] for key in shapes if key.startswith("backbone.blocks.")})
    options = {"embed_dim": joint // 2, "final_embed_dim": fused,
               "use_ctr": any(key.startswith("backbone.ctr_attn_conv.") for key in shapes)}
    with torch.device("meta"):
        return build_model("TaskPrompter", "vit", outputs, tuple(entry["image_size"]), model_kwargs=options,
                           backbone_kwargs={"embed_dim": width, "depth": depth, "num_heads": width // HEAD_DIM,
                                            "patch_size": patch})


def _manifest(entry: dict) -> Iterator[Measure]:
    model, dead = full_size(entry), dead_keys(entry["state_dict"])
    own = {key: list(value.shape) for key, value in model.state_dict().items()}
    renamed = {rename(key): shape for key, shape in entry["state_dict"].items() if key not in dead}
    yield Measure("keys that fall together", len(entry["state_dict"]) - len(dead) - len(renamed), 0.0)
    yield Measure("keys only here or only there", len(own.keys() ^ renamed.keys()), 0.0)
    yield Measure("other shapes", sum(own[key] != renamed[key] for key in own.keys() & renamed.keys()), 0.0)
    lost = sum(math.prod(entry["state_dict"][key]) for key in dead if not key.endswith(BUFFERS))
    count = sum(parameter.numel() for parameter in model.parameters())
    yield Measure("parameters", abs(count + lost - entry["total_parameters"]), 0.0)
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, *entry["image_size"], device="meta"))
    convolutions = counter.get_flop_counts()["Global"][torch.ops.aten.convolution] / 2e9
    want = entry["gmacs_batch1_conv_and_matmul_only"]["by_operator"]["aten.convolution"]
    yield Measure("multiply-adds of convolutions", abs(convolutions / want - 1), 1e-6)
