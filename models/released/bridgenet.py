"""Released checkpoints of BridgeNet (Zhang et al., TPAMI 2025): their keys, and ours."""

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from models.backbones.internimage import to_own_layout
from models.released.renaming import rename_key, rename_table

DECODER = r"multi_task_decoder\."
STAGE = DECODER + r"trfl\.trfl_stages\.(?P<stage>\d)\."
BLOCK = STAGE + r"blocks\.0\."

RENAMES = rename_table(
    (r"backbone\.", "encoder."),
    (r"heads\.(?P<name>\w+)\.linear_pred\.", "heads.{name}."),
    (DECODER + r"preliminary_decoder\.(?P<name>\w+)\.(?P<layer>[01])\.conv\.", "decoder.preliminary.{name}.{layer}.0."),
    (DECODER + r"preliminary_decoder\.(?P<name>\w+)\.(?P<layer>[01])\.bn1\.", "decoder.preliminary.{name}.{layer}.1."),
    (DECODER + r"atten_production\.(?P<name>\w+)\.norm1\.", "decoder.produce.{name}.norm."),
    (DECODER + r"atten_production\.(?P<name>\w+)\.attn_production\.conv_proj_q\.conv\.",
     "decoder.produce.{name}.query.0."),
    (DECODER + r"atten_production\.(?P<name>\w+)\.attn_production\.conv_proj_q\.bn\.",
     "decoder.produce.{name}.query.1."),
    (DECODER + r"atten_production\.(?P<name>\w+)\.attn_production\.proj_(?P<which>[qkv])\.",
     "decoder.produce.{name}.to_{which}."),
    (DECODER + r"atten_fusion\.(?P<name>\w+)\.norm2\.", "decoder.fuse.{name}.norm."),
    (DECODER + r"atten_fusion\.(?P<name>\w+)\.mlp\.", "decoder.fuse.{name}.mlp."),
    (DECODER + r"atten_fusion\.(?P<name>\w+)\.attn_fusion\.proj\.", "decoder.fuse.{name}.proj."),
    (DECODER + r"atten_fusion\.(?P<name>\w+)\.attn_fusion\.fuse_attn\.", "decoder.fuse.{name}.fuse."),
    (DECODER + r"intermediate_head\.", "decoder.intermediate."),
    (DECODER + r"scale_embed\.1\.", "decoder.lateral_fine."),
    (DECODER + r"scale_embed\.2\.", "decoder.lateral_middle."),
    (DECODER + r"trfl\.mix_proj\.(?P<name>\w+)\.0\.", "decoder.mix.{name}."),
    (STAGE + r"back_feature_embed\.", "decoder.stages.{stage}.query."),
    (STAGE + r"patch_embed\.(?P<index>\d)\.proj\.1\.", "decoder.stages.{stage}.up.{task}.1.0."),
    (STAGE + r"patch_embed\.(?P<index>\d)\.proj\.2\.", "decoder.stages.{stage}.up.{task}.1.1."),
    (STAGE + r"patch_embed\.(?P<index>\d)\.proj\.4\.", "decoder.stages.{stage}.up.{task}.2.0."),
    (STAGE + r"patch_embed\.(?P<index>\d)\.proj\.5\.", "decoder.stages.{stage}.up.{task}.2.1."),
    (STAGE + r"reduce_channel\.", "decoder.stages.{stage}.reduce."),
    (STAGE + r"reconv\.re_blocks\.(?P<block>\d+)\.(?P<index>\d)\.conv_layer\.",
     "decoder.stages.{stage}.refine.{block}.{task}.layers."),
    (BLOCK + r"attn\.conv_proj_q\.conv\.", "decoder.stages.{stage}.extract.query.0."),
    (BLOCK + r"attn\.conv_proj_q\.bn\.", "decoder.stages.{stage}.extract.query.1."),
    (BLOCK + r"attn\.restore_proj_q\.conv\.", "decoder.stages.{stage}.extract.restore."),
    (BLOCK + r"attn\.proj_(?P<which>[qkv])\.", "decoder.stages.{stage}.extract.to_{which}."),
    (BLOCK + r"attn\.proj\.", "decoder.stages.{stage}.extract.proj."),
    (BLOCK + r"(?P<which>norm1|norm2|mlp)\.", "decoder.stages.{stage}.extract.{which}."),
    (DECODER + r"trfl\.norm_mts\.", "decoder.aggregate.norms."),
    (DECODER + r"trfl\.redu_chan\.1\.(?P<index>\d)\.", "decoder.aggregate.reduce.0.{task}."),
    (DECODER + r"trfl\.redu_chan\.2\.(?P<index>\d)\.", "decoder.aggregate.reduce.1.{task}."),
    (DECODER + r"trfl\.mt_proj\.", "decoder.project."),
)

# Layers that no output of the original depends on; our decoder has none of them.
DEAD = re.compile(DECODER + r"(scale_embed\.0|trfl\.norm_mt|trfl\.redu_chan\.0\.\d)\.")


def recognises(keys: Iterable[str]) -> bool:
    """Whether these are the keys of a BridgeNet."""
    return any(key.startswith("multi_task_decoder.trfl.") for key in keys)


def is_dead(key: str) -> bool:
    """Whether the key belongs to a layer without influence on any output."""
    return DEAD.match(key) is not None


def rename(key: str, tasks: Sequence[str]) -> str:
    """Our name of a key; a key that the original does not have stays as it is."""
    name = rename_key(key, RENAMES, tasks)
    return to_own_layout(name) if name.startswith(("encoder.patch_embed.", "encoder.levels.")) else name


def convert(state: Mapping[str, Tensor], tasks: Sequence[str]) -> dict[str, Tensor]:
    """The same weights under our keys, without the dead layers; `tasks` in the order of the task table."""
    return {rename(key, tasks): value for key, value in state.items() if not is_dead(key)}
