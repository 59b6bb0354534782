"""TaskPrompter as published: whole models of toy size in float64, and the keys of the full-size ones."""

import copy
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from models.model import MultiTaskModel
from models.released.taskprompter import TASKPROMPTER
from scripts.parity import compare
from scripts.parity.base import Bound, Measure, stored_error
from scripts.parity.case import MODEL, NO_EFFECT, Bounds, Case, System
from scripts.parity.program import build, flops, shipped

OPTIONS = ("final_embed_dim", "prompt_len", "chan_nheads", "head", "embed_dim", "use_ctr", "level_embed_dim",
           "chan_embed_dim", "img_ds_ratio")
SWIN_BLOCK = ("x", "prompts", "spatial_attn", "channel_attn")    # what a block of the Swin gives
BACKBONE_OPTIONS = ("embed_dim", "depth", "depths", "num_heads", "window_size", "patch_size", "drop_path_rate")


def _build(config: dict) -> MultiTaskModel:
    c, backbone = config, config["backbone"]
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


def _tokens(case: Case, seen: Mapping[str, Tensor], block: str, what: str) -> Tensor:
    """A ViT's prompts are the first of its tokens."""
    tokens, scores = (seen[f"encoder.run_block#{block}[{part}]"] for part in (0, 1))
    prompts = scores.shape[2]
    return tokens[:, :prompts] if what == "prompts" else tokens[:, prompts:]


def _of_swin(case: Case, seen: Mapping[str, Tensor], stage: str, block: str | None, what: str) -> Tensor:
    """Of a block or a whole stage; the reference's ends with the merging, which opens the next one here."""
    depths, number, part = case.config["backbone"]["depths"], int(stage), SWIN_BLOCK.index(what)
    if block is not None or number + 1 == len(depths):
        call = sum(depths[:number]) + (depths[number] - 1 if block is None else int(block))
        got = seen[f"encoder.run_block#{call}[{part}]"]
    else:
        got = seen[f"encoder.merging.{number}[{part - 1}]" if part else f"encoder.layers.{number + 1}.downsample"]
    return got if part else got.flatten(1, 2)


def _full_size(entry: dict) -> Iterator[Measure]:
    tasks = [TASKPROMPTER.tasks.get(task, task) for task in entry["tasks"]]
    model = copy.deepcopy(shipped("taskprompter", tasks, entry["image_size"], entry["total_parameters"]))
    held = {key.split(".")[1] for key in entry["state_dict"] if key.startswith("heads.")}
    headless = [task for task in entry["tasks"] if task not in held]
    for task in headless:  # the head of the detection has a reference of its own (`detection3d`)
        model.heads.pop(TASKPROMPTER.tasks[task])
    yield from compare.keys(model, entry["state_dict"], entry["tasks"], entry["total_parameters"])
    if headless:
        yield Measure("multiply-adds", uncovered="features are projected before they grow")
        return
    convolutions = flops(model, entry["image_size"]).get_flop_counts()["Global"][torch.ops.aten.convolution] / 2e9
    want = entry["gmacs_batch1_conv_and_matmul_only"]["by_operator"]["aten.convolution"]
    yield compare.difference("multiply-adds of convolutions", convolutions / want, 1.0, 1e-6)


SYSTEM = System(
    released=("TaskPrompter",),
    fits=lambda config: config.get("model") == "TaskPrompter" and "backbone" in config,
    build=_build,
    convert=lambda tensors, tasks: {TASKPROMPTER.rename(key): value for key, value in tensors.items()},
    groups={"outputs": (compare.outputs, *MODEL), "features inside": (compare.inside, *MODEL),
            "training": (compare.training, *MODEL),
            "gradient norms": (compare.gradient_norms, *MODEL, "norms")},
    bounds=Bounds(value=Bound(stored_error, 1e-9, 2e-4)),
    uncovered=_uncovered,
    methods=("encoder.run_block", "decoder.run_level"),
    places=((r"block(\d+)\.(prompts|x)", _tokens),
            (r"block(\d+)\.raw_spatial_attn_prompt_rows", r"encoder.run_block#\1[1]"),
            (r"block(\d+)\.raw_channel_attn", r"encoder.run_block#\1[2]"),
            (r"layer(\d)\.(?:block(\d+)\.)?(\w+)", _of_swin),
            (r"task_feature\.level(\d)\.(\w+)", r"decoder.run_level#\1[\2]"),
            (r"backbone_out\.(\w+)", r"decoder[0][\1]")),
    full_size=_full_size)
checks = SYSTEM.checks
