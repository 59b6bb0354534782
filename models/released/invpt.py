"""Released checkpoints of InvPT (Ye and Xu, ECCV 2022): their keys, and ours."""

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from models.released.renaming import rename_key, rename_table

STAGE = r"multi_task_decoder\.invpt\.invpt_stages\.(?P<stage>\d)\."
BLOCK = STAGE + r"blocks\.0\."

RENAMES = rename_table(
    (r"backbone\.", "encoder."),
    (r"heads\.(?P<name>\w+)\.linear_pred\.", "heads.{name}."),
    (r"multi_task_decoder\.preliminary_decoder\.(?P<name>\w+)\.(?P<layer>[01])\.conv\.",
     "decoder.preliminary.{name}.{layer}.0."),
    (r"multi_task_decoder\.preliminary_decoder\.(?P<name>\w+)\.(?P<layer>[01])\.bn1\.",
     "decoder.preliminary.{name}.{layer}.1."),
    (r"multi_task_decoder\.intermediate_head\.", "decoder.intermediate."),
    (r"multi_task_decoder\.scale_embed\.0\.", "decoder.skip_fine."),
    (r"multi_task_decoder\.scale_embed\.1\.", "decoder.skip_middle."),
    (r"multi_task_decoder\.invpt\.mix_proj\.(?P<name>\w+)\.0\.", "decoder.mix.{name}."),
    (STAGE + r"patch_embed\.(?P<index>\d)\.proj\.1\.", "decoder.stages.{stage}.up.{task}.1.0."),
    (STAGE + r"patch_embed\.(?P<index>\d)\.proj\.2\.", "decoder.stages.{stage}.up.{task}.1.1."),
    (STAGE + r"patch_embed\.(?P<index>\d)\.proj\.4\.", "decoder.stages.{stage}.up.{task}.2.0."),
    (STAGE + r"patch_embed\.(?P<index>\d)\.proj\.5\.", "decoder.stages.{stage}.up.{task}.2.1."),
    (BLOCK + r"attn\.conv_proj_q\.(?P<index>\d)\.conv\.", "decoder.stages.{stage}.attention.query.{task}.0."),
    (BLOCK + r"attn\.conv_proj_q\.(?P<index>\d)\.bn\.", "decoder.stages.{stage}.attention.query.{task}.1."),
    (BLOCK + r"attn\.proj_(?P<which>[qkv])\.", "decoder.stages.{stage}.attention.to_{which}."),
    (BLOCK + r"attn\.proj\.", "decoder.stages.{stage}.attention.proj."),
    (BLOCK + r"attn\.fuse_attn\.", "decoder.stages.{stage}.attention.fuse."),
    (BLOCK + r"(?P<which>norm1|norm2|mlp)\.", "decoder.stages.{stage}.{which}."),
    (r"multi_task_decoder\.invpt\.norm_mts\.", "decoder.aggregate.norms."),
    (r"multi_task_decoder\.invpt\.redu_chan\.1\.(?P<index>\d)\.", "decoder.aggregate.reduce.0.{task}."),
    (r"multi_task_decoder\.invpt\.redu_chan\.2\.(?P<index>\d)\.", "decoder.aggregate.reduce.1.{task}."),
    (r"multi_task_decoder\.invpt\.mt_proj\.", "decoder.project."),
)

# Layers that no output of the original depends on; our decoder has none of them.
DEAD = re.compile(r"multi_task_decoder\.(scale_embed\.2|invpt\.norm_mt|invpt\.redu_chan\.0\.\d"
                  r"|invpt\.invpt_stages\.0\.blocks\.0\.attn\.fuse_attn)\.")


def recognises(keys: Iterable[str]) -> bool:
    """Whether these are the keys of an InvPT."""
    return any(key.startswith("multi_task_decoder.invpt.") for key in keys)


def is_dead(key: str) -> bool:
    """Whether the key belongs to a layer without influence on any output."""
    return DEAD.match(key) is not None


def rename(key: str, tasks: Sequence[str]) -> str:
    """Our name of a key; a key that the original does not have stays as it is."""
    return rename_key(key, RENAMES, tasks)


def convert(state: Mapping[str, Tensor], tasks: Sequence[str]) -> dict[str, Tensor]:
    """The same weights under our keys, without the dead layers; `tasks` in the order of the task table."""
    return {rename(key, tasks): value for key, value in state.items() if not is_dead(key)}
