"""Released checkpoints of TaskPrompter (Ye and Xu, ICLR 2023): their keys, and ours."""

import re
from collections.abc import Collection

from models.backbones.swin import DERIVED_BUFFERS
from models.released.kind import Released

BLOCK, OURS = "backbone.layers.{stage}.blocks.{block}.", "encoder.prompting.{stage}.{block}."  # of a Swin
LEVEL, DECODER_LEVEL = "{level}.{task}.", "decoder.levels.{level}.{task}."
HEAD, UNIT = "heads.{task}.", "<conv.conv_offset|conv|gn>."
OUR_UNIT = "<conv.offset|conv|norm>."
# 3-D detection; the class branch has two units before its last layer, the others one.
DETECTION = (
    (HEAD + "neck.<lateral_convs|fpn_convs>.{level}.conv.", HEAD + "pyramid.<lateral|output>.{level}."),
    (HEAD + "<cls_convs|reg_convs>.{number}." + UNIT, HEAD + "<class_tower|box_tower>.{number}." + OUR_UNIT),
    (HEAD + "conv_cls_prev.{number}." + UNIT, HEAD + "classes.{number}." + OUR_UNIT),
    (HEAD + "conv_reg_prevs.<0|1|2|3|4>.0." + UNIT, HEAD + "branches.<offset|depth|size|rotation|box>.0." + OUR_UNIT),
    (HEAD + "conv_regs.<0|1|2|3|4>.", HEAD + "branches.<offset|depth|size|rotation|box>.1."),
    (HEAD + "<conv_dir_cls_prev|conv_centerness_prev>.0." + UNIT,
     HEAD + "branches.<direction|centerness>.0." + OUR_UNIT),
    (HEAD + "<conv_dir_cls|conv_centerness>.", HEAD + "branches.<direction|centerness>.1."),
    (HEAD + "conv_cls.", HEAD + "classes.2."),
    (HEAD + "scales.{level}.<0|1|2|3>.scale", HEAD + "scales.{level}.<offset|depth|size|box>"),
)


class ReleasedTaskPrompter(Released):
    """Which layers of a ViT are dead, the number of its blocks decides."""

    def dead_keys(self, keys: Collection[str]) -> set[str]:
        """Those without influence on any output.

        In the last block of a ViT the update of the prompts, of a Swin the buffers that follow from the sizes.
        """
        blocks = {int(match[1]) for key in keys if (match := re.match(r"backbone\.blocks\.(\d+)\.", key))}
        last = f"backbone.blocks.{max(blocks, default=0)}.attn.token_trans1."
        return {key for key in keys if key.startswith(last) or key.endswith(DERIVED_BUFFERS)}


TASKPROMPTER = ReleasedTaskPrompter(("backbone.fea_decode_spa.",), (
    ("backbone.blocks.{block}.attn.<token_trans|token_trans1>.", "encoder.prompting.{block}.<to_map|to_prompts>."),
    (BLOCK + "<token_trans|chan_q|chan_kv>.", OURS + "<to_chan|query|key_value>."),
    (BLOCK + "<chan_proj|token_trans1>.", OURS + "update.<0|1>."),
    ("backbone.layers.{stage}.downsample.<task_prompts_up|process_chan_attn|spa_attn_ds>.",
     "encoder.merging.{stage}.<prompts|channel|spatial>."),
    ("backbone.layers.<0|1|2>.downsample.", "encoder.layers.<1|2|3>.downsample."),  # ours start the next stage
    ("backbone.multi_scale_fuse.", "decoder.merge."),
    ("backbone.<fea_decode_spa|fea_decode_chan>." + LEVEL + "0.", DECODER_LEVEL + "<spatial|channel>."),
    ("backbone.fea_fuse." + LEVEL, DECODER_LEVEL + "fuse."),
    ("backbone.ctr_attn_conv." + LEVEL, "decoder.reweighting.{level}.gates.{task}."),
    ("backbone.", "encoder."),
    (HEAD + "mt_proj.<0|1|3|4>.", HEAD + "<conv|norm|refine|refine_norm>."),
    (HEAD + "linear_pred.", HEAD + "proj."),
    *DETECTION,
), tasks={"3ddet": "det3d"})
