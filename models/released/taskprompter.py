"""Released checkpoints of TaskPrompter (Ye and Xu, ICLR 2023): their keys, and ours."""

import re
from collections.abc import Collection

from models.backbones.swin import DERIVED_BUFFERS
from models.released.kind import Released

DETECTION = "3ddet"  # a task that this program does not have
BLOCK, OURS = "backbone.layers.{stage}.blocks.{block}.", "encoder.prompting.{stage}.{block}."  # of a Swin
LEVEL, DECODER_LEVEL = "{level}.{task}.", "decoder.levels.{level}.{task}."


class ReleasedTaskPrompter(Released):
    """Which layers of a ViT are dead, the number of its blocks decides."""

    def dead_keys(self, keys: Collection[str]) -> set[str]:
        """Those of layers without influence on any output here.

        In the last block of a ViT the update of the prompts; of a Swin the task of 3D detection, except its prompt,
        and buffers that follow from the sizes.
        """
        blocks = {int(match[1]) for key in keys if (match := re.match(r"backbone\.blocks\.(\d+)\.", key))}
        last = f"backbone.blocks.{max(blocks, default=0)}.attn.token_trans1."
        return {key for key in keys
                if key.startswith(last) or f".{DETECTION}." in key or key.endswith(DERIVED_BUFFERS)}


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
    ("heads.{task}.mt_proj.<0|1|3|4>.", "heads.{task}.<conv|norm|refine|refine_norm>."),
    ("heads.{task}.linear_pred.", "heads.{task}.proj."),
))
