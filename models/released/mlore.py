"""Released checkpoints of MLoRE (Yang et al., CVPR 2024): their keys, and ours.

The original keeps every expert in a module of its own; here the experts of a mixture share tensors. Its position
embedding has a row for a class token that the ViT does not have.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from models.released.kind import Released

# Beginnings of the two modules of a tap; the second names are those of the code before its release.
MODULE = "backbone.<MLoRE_1|q_generate|MLoRE_2|feat_decode_increa>.{tap}."
OURS = "decoder.<first|first|second|second>.{tap}."
# The two convolutions of an expert.
EXPERT_TAILS = {"W.weight": "down.weight", "W.bias": "down.bias", "M.weight": "up", "M.bias": "up_bias"}


def module_rows(old: str, new: str) -> tuple[tuple[str, str], ...]:
    """Rows of a mixture of experts whose keys begin so."""
    return ((old + "lora_list_1.{expert}.", new + "experts."),
            (old + "<conv1|conv2|conv3>.{task}.", new + "<proj_in|own_expert|proj_out>.{task}."),
            (old + "share_conv.", new + "generic."),
            (old + "<bn_all|bn>.{task}.", new + "<mixture_norm|norm>.{task}."),
            (old + "router_1.{task}.0.<conv1|ln|conv3>.", new + "router.{task}.<pixel_in|pixel_norm|pixel_out>."),
            (old + "router_1.{task}.0.<convsp|ln_sp|conv2>.", new + "router.{task}.<pool|pool_norm|pool_out>."),
            (old + "router_1.{task}.1.", new + "router.{task}.logits."))


class ReleasedMixtures(Released):
    """Experts are joined to the tensors of their mixture."""

    def convert(self, state: Mapping[str, Tensor], tasks: Sequence[str]) -> dict[str, Tensor]:
        found: dict[str, dict[int, Tensor]] = {}
        dead = self.dead_keys(state)
        for key in (key for key in state if key not in dead):
            name, place = self.locate(key)
            found.setdefault(name, {})[place] = self.reshaped(name, state[key])
        return {name: joined(name, [parts[place] for place in sorted(parts)]) for name, parts in found.items()}

    def locate(self, key: str) -> tuple[str, int]:
        """Our name of a key, and the place of its expert in that tensor (0 where there is no list of experts)."""
        name, parts = self.find(key)
        return name, int(parts.get("expert", 0))

    def reshaped(self, name: str, value: Tensor) -> Tensor:
        """A tensor of the original in the shape it has here, an expert's as the slice it becomes."""
        if name == "encoder.pos_embed":
            return value[:, 1:]  # the row of the class token that is not there
        if name.endswith(".up_bias"):
            return value[None]  # (C,) -> (1, C)
        is_linear = name.endswith(".up") or (".router." in name and value.ndim == 4)
        return value[:, :, 0, 0] if is_linear else value  # a 1 x 1 convolution is a linear layer


MLORE = ReleasedMixtures(("backbone.MLoRE_1.", "backbone.q_generate."), (
    *module_rows(MODULE, OURS),
    ("backbone.<fea_fuse|task_mask>.", "decoder.<tap_proj|mix>."),
    ("backbone.", "encoder."),
    ("heads.{task}.<mt_proj.0|mt_proj.1|linear_pred>.", "heads.{task}.<conv|norm|proj>."),
), dead=r"(backbone.q_fuse.|backbone.classify_route_\d.|aux_heads.|[^ ]*.virt_conv.)", tails=EXPERT_TAILS)
# Dead: unused layers of the ViT-B model, and kernels that its files store after folding, which follow from the factors.


def joined(name: str, parts: list[Tensor]) -> Tensor:
    """The tensor of a mixture from the slices of its experts, in their order."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1 if name.endswith(".up") else 0)
