"""Released checkpoints of BridgeNet (Zhang et al., TPAMI 2025): their keys, and ours."""

from collections.abc import Sequence

from models.backbones.internimage import to_own_layout
from models.released.invpt import BLOCK, COMMON_ROWS, DECODER, STAGE
from models.released.kind import Released


class ReleasedBridgeNet(Released):
    """Its backbone may be an InternImage, whose published keys say more than ours."""

    def rename(self, key: str, tasks: Sequence[str] = ()) -> str:
        return to_own_layout(super().rename(key, tasks))


BRIDGENET = ReleasedBridgeNet(("multi_task_decoder.trfl.",), (
    *COMMON_ROWS,
    (DECODER + "atten_production.{task}.norm1.", "decoder.produce.{task}.norm."),
    (DECODER + "atten_production.{task}.attn_production.conv_proj_q.<conv|bn>.",
     "decoder.produce.{task}.query.<0|1>."),
    (DECODER + "atten_production.{task}.attn_production.proj_{which}.", "decoder.produce.{task}.to_{which}."),
    (DECODER + "atten_fusion.{task}.<norm2|mlp>.", "decoder.fuse.{task}.<norm|mlp>."),
    (DECODER + "atten_fusion.{task}.attn_fusion.<proj|fuse_attn>.", "decoder.fuse.{task}.<proj|fuse>."),
    (DECODER + "scale_embed.<1|2>.", "decoder.<lateral_fine|lateral_middle>."),
    (STAGE + "<back_feature_embed|reduce_channel>.", "decoder.stages.{stage}.<query|reduce>."),
    (STAGE + "reconv.re_blocks.{block}.{index}.conv_layer.", "decoder.stages.{stage}.refine.{block}.{task}.layers."),
    (BLOCK + "attn.conv_proj_q.<conv|bn>.", "decoder.stages.{stage}.extract.query.<0|1>."),
    (BLOCK + "attn.restore_proj_q.conv.", "decoder.stages.{stage}.extract.restore."),
    (BLOCK + "attn.proj_{which}.", "decoder.stages.{stage}.extract.to_{which}."),
    (BLOCK + "attn.proj.", "decoder.stages.{stage}.extract.proj."),
    (BLOCK + "<norm1|norm2|mlp>.", "decoder.stages.{stage}.extract.<norm1|norm2|mlp>."),
), dead=DECODER + r"(scale_embed.0|trfl.norm_mt|trfl.redu_chan.0.\d).")
