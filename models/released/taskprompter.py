"""Released checkpoints of TaskPrompter (Ye and Xu, ICLR 2023): their keys, and ours."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import Tensor

from models.backbones.swin import DERIVED_BUFFERS
from models.released.renaming import rename_table

DETECTION = "3ddet"  # a task that this program does not have
LEVEL = r"(?P<level>\d)\.(?P<name>\w+)\."
VIT_BLOCK = r"backbone\.blocks\.(?P<block>\d+)\.attn\."
SWIN_BLOCK = r"backbone\.layers\.(?P<stage>\d)\.blocks\.(?P<block>\d+)\."
MERGING = r"backbone\.layers\.(?P<stage>\d)\.downsample\."
HEAD = r"heads\.(?P<name>\w+)\."

RENAMES = rename_table(
    (VIT_BLOCK + r"token_trans\.", "encoder.prompting.{block}.to_map."),
    (VIT_BLOCK + r"token_trans1\.", "encoder.prompting.{block}.to_prompts."),
    (SWIN_BLOCK + r"token_trans\.", "encoder.prompting.{stage}.{block}.to_chan."),
    (SWIN_BLOCK + r"chan_q\.", "encoder.prompting.{stage}.{block}.query."),
    (SWIN_BLOCK + r"chan_kv\.", "encoder.prompting.{stage}.{block}.key_value."),
    (SWIN_BLOCK + r"chan_proj\.", "encoder.prompting.{stage}.{block}.update.0."),
    (SWIN_BLOCK + r"token_trans1\.", "encoder.prompting.{stage}.{block}.update.1."),
    (MERGING + r"task_prompts_up\.", "encoder.merging.{stage}.prompts."),
    (MERGING + r"process_chan_attn\.", "encoder.merging.{stage}.channel."),
    (MERGING + r"spa_attn_ds\.", "encoder.merging.{stage}.spatial."),
    (MERGING, "encoder.layers.{next_stage}.downsample."),
    (r"backbone\.multi_scale_fuse\.", "decoder.merge."),
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
)


def recognises(keys: Iterable[str]) -> bool:
    """Whether these are the keys of a TaskPrompter."""
    return any(key.startswith("backbone.fea_decode_spa.") for key in keys)


def dead_keys(keys: Collection[str]) -> set[str]:
    """Those of layers without influence on any output here.

    In the last block of a ViT the update of the prompts; of a Swin the task of 3D detection, except its prompt,
    and buffers that follow from the sizes.
    """
    blocks = {int(match[1]) for key in keys if (match := re.match(r"backbone\.blocks\.(\d+)\.", key))}
    last = f"backbone.blocks.{max(blocks, default=0)}.attn.token_trans1."
    return {key for key in keys
            if key.startswith(last) or f".{DETECTION}." in key or key.endswith(DERIVED_BUFFERS)}


def rename(key: str) -> str:
    """Our name of a key; a key that the original does not have stays as it is."""
    for pattern, target in RENAMES:
        if match := pattern.match(key):
            parts = match.groupdict()
            if "stage" in parts:  # ours merge at the start of the next stage
                parts["next_stage"] = int(parts["stage"]) + 1
            return target.format(**parts) + key[match.end():]
    return key


def convert(state: Mapping[str, Tensor], tasks: Sequence[str]) -> dict[str, Tensor]:
    """The same weights under our keys, without the dead layers; the keys name the tasks, so `tasks` plays no part."""
    dead = dead_keys(state)
    return {rename(key): value for key, value in state.items() if key not in dead}
