"""Released checkpoints of DeMT and of the baselines it was compared with: their keys, and ours.

Both come from one program: a backbone and, as `head`, the rest. DeMT's mixers exist in two layouts, one per
order of their two steps; the names of the layers tell which.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from models.decoders.demt import MIXER_ORDERS
from models.released.kind import ReleasedOnSwin

ORDER = "decoder._extra_state"  # where DeMTDecoder keeps the order of its mixers
SPATIAL_FIRST = re.compile(r"head\.defor_mixers\.\d+\.blocks\.\d+\.0\.fn\.")
MIXER, OURS = "head.defor_mixers.{index}.blocks.{block}.", "decoder.mixers.{task}.{block}."

ROWS = (
    ("head.linear1.", "decoder.fuse."),
    (MIXER + "<[01]|[23]>.(?!fn.)", OURS + "channel.<0|2>."),
    (MIXER + "[03].fn.0.get_offset.<p_conv|opt>.", OURS + "deform.<reduce|spread>."),
    (MIXER + "[03].fn.0.(?=weight|bias)", OURS + "deform.conv."),
    (MIXER + "[03].fn.2.", OURS + "norm."),
    ("head.task_fusion.<in_proj_|out_proj.>", "decoder.interaction.attention.<qkv.|proj.>"),
    ("head.smlp.", "decoder.interaction.out."),
    ("head.task_querys.{index}.<in_proj_|out_proj.>", "decoder.queries.{task}.attention.<qkv.|proj.>"),
    ("head.smlp2.{index}.", "decoder.queries.{task}.out."),
    ("head.bottleneck.{task}.<conv|bn>.", "decoder.project.{task}.<0|1>."),
    ("head.final_logits.", "heads."),
)


# A constant beside every deformable convolution, which the original never reads.
DEAD = MIXER + "[03].fn.0.offset$"


class ReleasedBaseline(ReleasedOnSwin):
    """A head of nothing but its two layers per task."""

    def recognises(self, keys: Iterable[str]) -> bool:
        head = [key for key in keys if key.startswith("head.")]
        return bool(head) and all(key.startswith(self.marks) for key in head)


class ReleasedDeMT(ReleasedOnSwin):
    """The weights, and the order of the mixers they belong to."""

    def convert(self, state: Mapping[str, Tensor], tasks: Sequence[str]) -> dict[str, Tensor]:
        order = "spatial_first" if any(SPATIAL_FIRST.match(key) for key in state) else "channel_first"
        return super().convert(state, tasks) | {ORDER: torch.tensor(MIXER_ORDERS.index(order))}


BASELINE = ReleasedBaseline(("head.bottleneck.", "head.final_logits."), ROWS, DEAD)
DEMT = ReleasedDeMT(("head.defor_mixers.",), ROWS, DEAD)
