"""Released checkpoints of TaskDiffusion (Yang et al., ICLR 2025), alone and with MLoRE: their keys, and ours."""

from torch import Tensor

from models.released.mlore import EXPERT_TAILS, ReleasedMixtures, module_rows

TREE = "heads.fpn_encoder."
TIME = "<conv_1|norm|time_mlp.1|conv_2>."
OURS = "<conv|norm|modulation.proj|proj>."


class ReleasedTaskDiffusion(ReleasedMixtures):
    """Its vectors for void pixels are tables of one row."""

    def reshaped(self, name: str, value: Tensor) -> Tensor:
        return value[0] if name.endswith(".void") else super().reshaped(name, value)


TASKDIFFUSION = ReleasedTaskDiffusion(("heads.time_mlp.0.",), (
    ("heads.embedding_tables.{task}.", "decoder.codes.codes.{task}."),
    ("heads.invalid_embedding_tables.{task}.weight", "decoder.codes.codes.{task}.void"),
    ("heads.embed_all.", "decoder.codes.mix."),
    ("heads.time_mlp.0.weights", "decoder.noise_level.frequencies"),
    ("heads.time_mlp.<1|3>.", "decoder.noise_level.<expand|proj>."),
    ("heads.transforms.conv_transforms.{tap}.", "decoder.levels.{tap}.inject."),
    (TREE + "share_fpn.fpn_conv.{tap}.{block}." + TIME, "decoder.levels.{tap}.shared.{block}." + OURS),
    (TREE + "mask_task.{tap}." + TIME, "decoder.levels.{tap}.gates." + OURS),
    (TREE + "specific_head.{tap}.{task}." + TIME, "decoder.levels.{tap}.mix.{task}." + OURS),
    *module_rows(TREE + "feat_task.{tap}.<0|1>.", "decoder.features.{tap}.<first|second>."),
    (TREE + "feat_task.{tap}.{task}.", "decoder.features.{tap}.layers.{task}."),
    (TREE + "fpn_mask.{task}." + TIME, "decoder.stages.{task}.levels." + OURS),
    ("heads.encoders.{block}.{task}." + TIME, "decoder.stages.{task}.blocks.{block}." + OURS),
    ("heads.pred_heads.{task}.", "decoder.stages.{task}.predict."),
    ("heads.aux_heads.{task}.0.<conv_1|norm|conv_2|conv_3>.", "decoder.preliminary.{task}.<conv|norm|proj|shortcut>."),
    ("heads.aux_heads.{task}.0.task_mask.<0|1|3>.", "decoder.preliminary.{task}.<squeeze|norm|share>."),
    ("heads.aux_heads.{task}.1.", "decoder.preliminary.{task}.predict."),
    ("backbone.fea_fuse.", "decoder.tap_proj."),
    ("backbone.", "encoder."),
), tails=EXPERT_TAILS)
