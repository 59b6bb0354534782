"""Released checkpoints of TaskPrompter (Ye and Xu, ICLR 2023): their keys, and ours."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import Tensor

LEVEL = r"(?P<level>\d)\.(?P<name>\w+)\."
VIT_BLOCK = r"backbone\.blocks\.(?P<block>\d+)\.attn\."
HEAD = r"heads\.(?P<name>\w+)\."

# What a key begins with, and what that becomes.
RENAMES = tuple((re.compile(pattern), target) for pattern, target in (
    (VIT_BLOCK + r"token_trans\.", r"encoder.prompting.{block}.to_map."),
    (VIT_BLOCK + r"token_trans1\.", r"encoder.prompting.{block}.to_prompts."),
    (r"backbone\.fea_decode_spa\." + LEVEL + r"0\.", "decoder.levels.{level}.{name}.spatial."),
    (r"backbone\.fea_decode_chan\." + LEVEL + r"0\.", "decoder.levels.{level}.{name}.channel."),
    (r"backbone\.fea_fuse\." + LEVEL, "decoder.levels.{level}.{name}.fuse."),
    (r"backbone\.ctr_attn_conv\." + LEVEL, "decoder.reweighting.{level}.gates.{name}."),
    (r"backbone\.", "encoder."),
    (HEAD + r"mt_proj\.0\.", "heads.{name}.conv."),
    (HEAD + r"mt_proj\.1\.", "heads.{name}.norm."),
    (HEAD + r"mt_proj\.3\.", "heads.{name}.refine."),
    (HEAD + r"mt_proj\.4\.", "heads.{name}.refine_norm."),
    (HEAD + r"linear_pred\.", "heads.{name}.proj."),
))


def recognises(keys: Iterable[str]) -> bool:
    """Whether these are the keys of a TaskPrompter."""
    return any(key.startswith("backbone.fea_decode_spa.") for key in keys)


def dead_keys(keys: Collection[str]) -> set[str]:
    """Those of layers without influence on any output: in the last block of a ViT, the update of the prompts."""
    blocks = {int(match[1]) for key in keys if (match := re.match(r"backbone\.blocks\.(\d+)\.", key))}
    last = f"backbone.blocks.{max(blocks, default=0)}.attn.token_trans1."
    return {key for key in keys if key.startswith(last)}


def rename(key: str) -> str:
    """Our name of a key; a key that the original does not have stays as it is."""
    for pattern, target in RENAMES:
        if match := pattern.match(key):
            return target.format(**match.groupdict()) + key[match.end():]
    return key


def convert(state: Mapping[str, Tensor], tasks: Sequence[str]) -> dict[str, Tensor]:
    """The same weights under our keys, without the dead layers; the keys name the tasks, so `tasks` plays no part."""
    dead = dead_keys(state)
    return {rename(key): value for key, value in state.items() if key not in dead}
