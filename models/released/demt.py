"""Released checkpoints of DeMT and of the baselines it was compared with: their keys, and ours.

Both come from one program: a backbone and, as `head`, the rest. DeMT's mixers exist in two layouts, one per
order of their two steps; the names of the layers tell which.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from models.backbones.swin import to_timm_layout
from models.decoders.demt import MIXER_ORDERS
from models.released.renaming import rename_key, rename_table

ORDER = "decoder._extra_state"  # where DeMTDecoder keeps the order of its mixers
MIXER = r"head\.defor_mixers\.(?P<index>\d+)\.blocks\.(?P<block>\d+)\."
SPATIAL_FIRST = re.compile(MIXER + r"0\.fn\.")

RENAMES = rename_table(
    (r"head\.linear1\.", "decoder.fuse."),
    (MIXER + r"[01]\.(?!fn\.)", "decoder.mixers.{task}.{block}.channel.0."),
    (MIXER + r"[23]\.(?!fn\.)", "decoder.mixers.{task}.{block}.channel.2."),
    (MIXER + r"[03]\.fn\.0\.get_offset\.p_conv\.", "decoder.mixers.{task}.{block}.deform.reduce."),
    (MIXER + r"[03]\.fn\.0\.get_offset\.opt\.", "decoder.mixers.{task}.{block}.deform.spread."),
    (MIXER + r"[03]\.fn\.0\.(?=weight|bias)", "decoder.mixers.{task}.{block}.deform.conv."),
    (MIXER + r"[03]\.fn\.2\.", "decoder.mixers.{task}.{block}.norm."),
    (r"head\.task_fusion\.in_proj_", "decoder.interaction.attention.qkv."),
    (r"head\.task_fusion\.out_proj\.", "decoder.interaction.attention.proj."),
    (r"head\.smlp\.", "decoder.interaction.out."),
    (r"head\.task_querys\.(?P<index>\d+)\.in_proj_", "decoder.queries.{task}.attention.qkv."),
    (r"head\.task_querys\.(?P<index>\d+)\.out_proj\.", "decoder.queries.{task}.attention.proj."),
    (r"head\.smlp2\.(?P<index>\d+)\.", "decoder.queries.{task}.out."),
    (r"head\.bottleneck\.(?P<name>\w+)\.conv\.", "decoder.project.{name}.0."),
    (r"head\.bottleneck\.(?P<name>\w+)\.bn\.", "decoder.project.{name}.1."),
    (r"head\.final_logits\.", "heads."),
)

# A constant beside every deformable convolution, which the original never reads.
DEAD = re.compile(MIXER + r"[03]\.fn\.0\.offset$")


def recognises(keys: Iterable[str]) -> bool:
    """Whether these are the keys of a DeMT."""
    return any(key.startswith("head.defor_mixers.") for key in keys)


def recognises_baseline(keys: Iterable[str]) -> bool:
    """Whether these are the keys of a baseline: a head of nothing but its two layers per task."""
    head = [key for key in keys if key.startswith("head.")]
    return bool(head) and all(key.startswith(("head.bottleneck.", "head.final_logits.")) for key in head)


def is_dead(key: str) -> bool:
    """Whether the key belongs to a constant without influence on any output."""
    return DEAD.match(key) is not None


def mixer_order(keys: Iterable[str]) -> str:
    """Which of MIXER_ORDERS the layers of a DeMT were saved in."""
    return MIXER_ORDERS[any(SPATIAL_FIRST.match(key) for key in keys)]


def rename(key: str, tasks: Sequence[str]) -> str:
    """Our name of a key of the head; a key that the original does not have stays as it is."""
    return rename_key(key, RENAMES, tasks)


def convert(state: Mapping[str, Tensor], tasks: Sequence[str]) -> dict[str, Tensor]:
    """Released weights, or any part of them, under our keys, without the dead ones; gradients go the same way.

    `tasks` in the order of the original, which is that of the task table.
    """
    backbone = {key.removeprefix("backbone."): value for key, value in state.items() if key.startswith("backbone.")}
    head = {rename(key, tasks): value for key, value in state.items()
            if not key.startswith("backbone.") and not is_dead(key)}
    return {f"encoder.{key}": value for key, value in to_timm_layout(backbone).items()} | head


def convert_demt(state: Mapping[str, Tensor], tasks: Sequence[str]) -> dict[str, Tensor]:
    """A whole DeMT under our keys: the weights, and the order of the mixers they belong to."""
    order = torch.tensor(MIXER_ORDERS.index(mixer_order(state)))
    return convert(state, tasks) | {ORDER: order}
