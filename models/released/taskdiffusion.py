"""Released checkpoints of TaskDiffusion (Yang et al., ICLR 2025), alone and with MLoRE: their keys, and ours."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from models.released import mlore
from models.released.kind import Released
from models.released.mlore import EXPERT_TAILS, joined, module_rows

TREE = "heads.fpn_encoder."
TIME = "<conv_1|norm|time_mlp.1|conv_2>."
OURS = "<conv|norm|modulation.proj|proj>."


class ReleasedTaskDiffusion(Released):
    """Experts are joined to the tensors of their mixture."""

    def convert(self, state: Mapping[str, Tensor], tasks: Sequence[str]) -> dict[str, Tensor]:
        found: dict[str, dict[int, Tensor]] = {}
        for key in state:
            name, place = locate(key)
            found.setdefault(name, {})[place] = reshaped(name, state[key])
        return {name: joined(name, [parts[place] for place in sorted(parts)]) for name, parts in found.items()}


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


def locate(key: str) -> tuple[str, int]:
    """Our name of a key, and the place of its expert in that tensor (0 where there is no list of experts)."""
    name, parts = TASKDIFFUSION.find(key)
    return name, int(parts.get("expert", 0))


def reshaped(name: str, value: Tensor) -> Tensor:
    """A tensor of the original in the shape it has here, an expert's as the slice it becomes."""
    return value[0] if name.endswith(".void") else mlore.reshaped(name, value)
