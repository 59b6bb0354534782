"""What BIM, MTMamba and MTMamba++ have in common: one map per task, refined in stages from coarse to fine.

Reference: Lin et al., "MTMamba: Enhancing Multi-Task Dense Scene Understanding by Mamba-Based Decoders", ECCV 2024,
whose skeleton BIM (Cao et al., ICCV 2025) shares.
Axes: B batch, H W grid of the stage, C stage width. Maps inside are channels-last.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from einops import rearrange
from torch import Tensor, nn

from models.decoder import BuildContext, Decoder, DecoderOutput

STRIDES = (4, 8, 16, 32)


class CoarseToFineDecoder(Decoder):
    """Four encoder maps, finest first, to one map (B, e, H / 4, W / 4) per task, in three stages.

    Raises ValueError when the encoder's maps do not fit.
    """

    def __init__(self, context: BuildContext):
        super().__init__()
        widths_fit = all(fine * 2 == coarse for fine, coarse in pairwise(context.channels))
        context.require_maps(context.strides == STRIDES and widths_fit,
                             "four maps with strides 4, 8, 16, 32 and widths e, 2e, 4e, 8e")
        self.tasks, self.channels = tuple(context.tasks), context.channels[0]

    def run_stage(self, index: int, feats: dict[str, Tensor], skip: Tensor) -> dict[str, Tensor]:
        """Task maps (B, H / 2, W / 2, 2 C) and the encoder's map (B, H, W, C) -> task maps (B, H, W, C)."""
        raise NotImplementedError

    def forward(self, feats: Sequence[Tensor]) -> DecoderOutput:
        *skips, coarsest = (rearrange(feat, "b c h w -> b h w c") for feat in feats)
        refined = dict.fromkeys(self.tasks, coarsest)  # every task starts from the same map
        for index, skip in enumerate(reversed(skips)):
            refined = self.run_stage(index, refined, skip)
        return DecoderOutput({task: rearrange(feat, "b h w c -> b c h w") for task, feat in refined.items()})


def stage_rates(largest: float, blocks: int) -> list[list[float]]:
    """Stochastic depth of the residual branches, stage by stage, falling linearly from `largest` to 0 at the last.

    A stage has `blocks` branches of each task's own and one common to all.
    """
    per_stage = blocks + 1
    rates = torch.linspace(largest, 0, 3 * per_stage, device="cpu").tolist()
    return [rates[first:first + per_stage] for first in range(0, 3 * per_stage, per_stage)]


def join(fine: Tensor, skip: Tensor) -> Tensor:
    """Up-sampled map and the encoder's map of that stage, (B, H, W, C) each -> (B, H, W, 2 C)."""
    if fine.shape[:3] != skip.shape[:3]:
        raise ValueError(f"up-sampled map is {fine.shape[1]}x{fine.shape[2]}, the encoder's {skip.shape[1]}x"
                         f"{skip.shape[2]}; the image's sides must be multiples of {STRIDES[-1]}")
    return torch.cat((fine, skip), dim=-1)


def per_task(tasks: Sequence[str], build: Callable[[], nn.Module]) -> nn.ModuleDict:
    """One module with weights of its own for each task."""
    return nn.ModuleDict({task: build() for task in tasks})
