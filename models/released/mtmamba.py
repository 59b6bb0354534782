"""Released checkpoints of MTMamba and MTMamba++: their parameter names to ours.

Both files hold one state dict whose backbone is OpenMMLab's Swin. Only names and shapes change, and the order
of channels in the Swin's patch merging (see `models.backbones.swin`).
"""

import re

from torch import Tensor

from models.released.kind import ReleasedOnSwin

LINEAR = re.compile(r"decoder\.(stm\.\d\.fuse|ctm\.\d\.shared\.proj)\.")  # 1 x 1 convolutions there


class ReleasedMTMamba(ReleasedOnSwin):
    """Both systems: all their layers have names of their own."""

    def reshaped(self, name: str, value: Tensor) -> Tensor:
        if name.endswith((".A_log", ".D")):
            return value.unflatten(0, (4, -1))  # (4 D, ..) -> (4, D, ..): one row of the first axis per route
        return value[:, :, 0, 0] if value.ndim == 4 and LINEAR.match(name) else value


MTMAMBA = ReleasedMTMamba(("block_3.0.op_share.", "block_ctm.0.0.conv_share."), (
    ("expand_layers.{task}_{stage}.<expand|norm>.", "decoder.stm.{stage}.expand.{task}.<proj|norm>."),
    ("concat_layers.{task}_{stage}.", "decoder.stm.{stage}.fuse.{task}."),
    ("block_<1|2>.{task}_{stage}.<op.|>", "decoder.stm.{stage}.stm.{task}.<0|1>.<ss2d.|>"),
    ("block_stm.{task}_{stage}.{block}.<op.|>", "decoder.stm.{stage}.stm.{task}.{block}.<ss2d.|>"),
    # MTMamba's cross-task block, where `in_proj.<task>` is the gate
    ("block_3.{stage}.<norm_share|op_share>.", "decoder.ctm.{stage}.<shared_norm|shared>."),
    ("block_3.{stage}.<norm|op|in_proj|out_proj>.{task}.", "decoder.ctm.{stage}.<norm|ss2d|gate|out_proj>.{task}."),
    # MTMamba++'s
    ("block_ctm.{stage}.0.<norm_share|conv_share.0|conv_share.1>.", "decoder.ctm.{stage}.shared.<norm|proj|conv>."),
    ("block_ctm.{stage}.0.<norm|op>.{task}.", "decoder.ctm.{stage}.<norm|ss2d>.{task}."),
    # heads: MTMamba's, then MTMamba++'s
    ("final_expand.{task}.<expand|norm>.", "heads.{task}.expand.<proj|norm>."),
    ("final_expand.{task}.<0|1>.", "heads.{task}.<conv|norm>."),
    ("final_project.{task}.", "heads.{task}.proj."),
), tails={  # names inside a Mamba block
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
})
