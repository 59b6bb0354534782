"""Released checkpoints of InvPT (Ye and Xu, ECCV 2022): their keys, and ours."""

from models.released.kind import Released

DECODER = "multi_task_decoder."
CORE = DECODER + "(invpt|trfl)."
STAGE = CORE + "(invpt|trfl)_stages.{stage}."
BLOCK = STAGE + "blocks.0."

# BridgeNet's files have these, too; they say `trfl` for `invpt`.
COMMON_ROWS = (
    ("backbone.", "encoder."),
    ("heads.{task}.linear_pred.", "heads.{task}."),
    (DECODER + "preliminary_decoder.{task}.{layer}.<conv|bn1>.", "decoder.preliminary.{task}.{layer}.<0|1>."),
    (DECODER + "intermediate_head.", "decoder.intermediate."),
    (CORE + "mix_proj.{task}.0.", "decoder.mix.{task}."),
    (STAGE + "patch_embed.{index}.proj.<1|2|4|5>.", "decoder.stages.{stage}.up.{task}.<1.0|1.1|2.0|2.1>."),
    (CORE + "norm_mts.", "decoder.aggregate.norms."),
    (CORE + "redu_chan.<1|2>.{index}.", "decoder.aggregate.reduce.<0|1>.{task}."),
    (CORE + "mt_proj.", "decoder.project."),
)

INVPT = Released(("multi_task_decoder.invpt.",), (
    *COMMON_ROWS,
    (DECODER + "scale_embed.<0|1>.", "decoder.<skip_fine|skip_middle>."),
    (BLOCK + "attn.conv_proj_q.{index}.<conv|bn>.", "decoder.stages.{stage}.attention.query.{task}.<0|1>."),
    (BLOCK + "attn.proj_{which}.", "decoder.stages.{stage}.attention.to_{which}."),
    (BLOCK + "attn.<proj|fuse_attn>.", "decoder.stages.{stage}.attention.<proj|fuse>."),
    (BLOCK + "<norm1|norm2|mlp>.", "decoder.stages.{stage}.<norm1|norm2|mlp>."),
), dead=DECODER + r"(scale_embed.2|invpt.norm_mt|invpt.redu_chan.0.\d|invpt.invpt_stages.0.blocks.0.attn.fuse_attn).")
