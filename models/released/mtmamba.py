"""Released checkpoints of MTMamba and MTMamba++: their parameter names to ours.

Both files hold one state dict whose backbone is OpenMMLab's Swin. Only names and shapes change, and the order
of channels in the Swin's patch merging (see `models.backbones.swin`).
"""

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from models.backbones.swin import to_timm_layout
from models.released.renaming import rename_table

TASK, STAGE = r"(?P<task>[a-z_]+)", r"(?P<stage>\d)"

# Pattern of a published prefix -> ours. In `block_3`, `in_proj.<task>` is the gate.
PREFIXES = rename_table(
    (rf"expand_layers\.{TASK}_{STAGE}\.expand\.", "decoder.stm.{stage}.expand.{task}.proj."),
    (rf"expand_layers\.{TASK}_{STAGE}\.norm\.", "decoder.stm.{stage}.expand.{task}.norm."),
    (rf"concat_layers\.{TASK}_{STAGE}\.", "decoder.stm.{stage}.fuse.{task}."),
    (rf"block_1\.{TASK}_{STAGE}\.", "decoder.stm.{stage}.stm.{task}.0."),
    (rf"block_2\.{TASK}_{STAGE}\.", "decoder.stm.{stage}.stm.{task}.1."),
    (rf"block_stm\.{TASK}_{STAGE}\.(?P<block>\d+)\.", "decoder.stm.{stage}.stm.{task}.{block}."),
    # MTMamba's cross-task block
    (rf"block_3\.{STAGE}\.norm_share\.", "decoder.ctm.{stage}.shared_norm."),
    (rf"block_3\.{STAGE}\.op_share\.", "decoder.ctm.{stage}.shared."),
    (rf"block_3\.{STAGE}\.norm\.{TASK}\.", "decoder.ctm.{stage}.norm.{task}."),
    (rf"block_3\.{STAGE}\.op\.{TASK}\.", "decoder.ctm.{stage}.ss2d.{task}."),
    (rf"block_3\.{STAGE}\.in_proj\.{TASK}\.", "decoder.ctm.{stage}.gate.{task}."),
    (rf"block_3\.{STAGE}\.out_proj\.{TASK}\.", "decoder.ctm.{stage}.out_proj.{task}."),
    # MTMamba++'s
    (rf"block_ctm\.{STAGE}\.0\.norm_share\.", "decoder.ctm.{stage}.shared.norm."),
    (rf"block_ctm\.{STAGE}\.0\.conv_share\.0\.", "decoder.ctm.{stage}.shared.proj."),
    (rf"block_ctm\.{STAGE}\.0\.conv_share\.1\.", "decoder.ctm.{stage}.shared.conv."),
    (rf"block_ctm\.{STAGE}\.0\.norm\.{TASK}\.", "decoder.ctm.{stage}.norm.{task}."),
    (rf"block_ctm\.{STAGE}\.0\.op\.{TASK}\.", "decoder.ctm.{stage}.ss2d.{task}."),
    # heads: MTMamba's, then MTMamba++'s
    (rf"final_expand\.{TASK}\.expand\.", "heads.{task}.expand.proj."),
    (rf"final_expand\.{TASK}\.norm\.", "heads.{task}.expand.norm."),
    (rf"final_expand\.{TASK}\.0\.", "heads.{task}.conv."),
    (rf"final_expand\.{TASK}\.1\.", "heads.{task}.norm."),
    (rf"final_project\.{TASK}\.", "heads.{task}.proj."),
)

# Names inside a Mamba block -> ours, at the end of a key.
SS2D = {
    "conv2d.weight": "core.conv.weight",
    "conv2d.bias": "core.conv.bias",
    "x_proj_weight": "core.scan.x_proj",
    "dt_projs_weight": "core.scan.dt_proj_weight",
    "dt_projs_bias": "core.scan.dt_proj_bias",
    "A_logs": "core.scan.A_log",
    "Ds": "core.scan.D",
    "out_norm.weight": "core.norm.weight",
    "out_norm.bias": "core.norm.bias",
    "in_proj_cross.weight": "source_proj.weight",
}


def recognises(keys: Iterable[str]) -> bool:
    """Whether these are the keys of a released MTMamba or MTMamba++ (without `module.`)."""
    return any(key.startswith(("block_3.0.op_share.", "block_ctm.0.0.conv_share.")) for key in keys)


def convert(state: Mapping[str, Tensor], tasks: Sequence[str]) -> dict[str, Tensor]:
    """Released weights, or any part of them, in our names and shapes; gradients go the same way.

    `tasks` plays no part, as the file's keys name the tasks. A key of no known form keeps its name.
    """
    backbone, converted = {}, {}
    for key, value in state.items():
        if key.startswith("backbone."):
            backbone[key.removeprefix("backbone.")] = value
        else:
            converted[rename(key)] = _reshaped(key, value)
    return {f"encoder.{key}": value for key, value in to_timm_layout(backbone).items()} | converted


def rename(key: str) -> str:
    """Our name of a decoder's or head's key."""
    for pattern, prefix in PREFIXES:
        if match := pattern.match(key):
            rest = key[match.end():]
            if rest.startswith("op."):  # of a self-task block: those of cross-task blocks are in the prefix
                rest, prefix = rest.removeprefix("op."), f"{prefix}ss2d."
            return prefix.format(**match.groupdict()) + SS2D.get(rest, rest)
    return key


def _reshaped(key: str, value: Tensor) -> Tensor:
    if key.endswith((".A_logs", ".Ds")):
        return value.unflatten(0, (4, -1))  # (4 D, ..) -> (4, D, ..): one row of the first axis per route
    if value.ndim == 4 and re.match(r"concat_layers\.|block_ctm\.\d\.0\.conv_share\.0\.", key):
        return value[:, :, 0, 0]  # a 1 x 1 convolution is a linear layer
    return value
