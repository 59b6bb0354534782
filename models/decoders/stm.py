"""What MTMamba and MTMamba++ have in common: all but the cross-task block and the head.

Reference: Lin et al., "MTMamba: Enhancing Multi-Task Dense Scene Understanding by Mamba-Based Decoders",
ECCV 2024.
Axes: B batch, H W grid of the stage, C stage width. Maps are channels-last.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from timm.layers import DropPath
from torch import Tensor, nn

from models.blocks.patch_expand import PatchExpand
from models.blocks.ss2d import GatedSS2D
from models.decoder import BuildContext
from models.decoders.coarse_to_fine import CoarseToFineDecoder, join, per_task, stage_rates
from models.decoders.options import DecoderOptions


@dataclass(frozen=True)
class STMConfig(DecoderOptions):
    """Options of both decoders."""

    stm_depth: int = 2  # STM blocks per task and stage
    d_state: int = 16  # N of the state-space model
    expand: int = 2  # inner width of a Mamba block / its width (the papers' expansion factor)
    drop_path_rate: float = 0.2  # stochastic depth of the first residual branch, falling to 0 at the last

    def __post_init__(self):
        self.require_counts("stm_depth", "d_state", "expand")
        self.require_rates("drop_path_rate")


class STMLayer(nn.Module):
    """Self-task Mamba block, a residual gated SS2D: (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, channels: int, drop_path: float, expand: int = 2, state: int = 16):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.ss2d = GatedSS2D(channels, expand, state)
        self.drop_path = DropPath(drop_path)

    def forward(self, feat: Tensor) -> Tensor:
        return feat + self.drop_path(self.ss2d(self.norm(feat)))


class STMStage(nn.Module):
    """A stage's work for each task alone: up-sample, join the encoder's map, STM blocks.

    `rates` holds the stochastic depth of each STM block.
    """

    def __init__(self, tasks: Sequence[str], channels: int, rates: Iterable[float], expand: int, state: int):
        super().__init__()
        rates = tuple(rates)
        self.expand = per_task(tasks, lambda: PatchExpand(2 * channels, channels, scale=2))
        self.fuse = per_task(tasks, lambda: nn.Linear(2 * channels, channels))
        self.stm = per_task(
            tasks, lambda: nn.Sequential(*(STMLayer(channels, rate, expand, state) for rate in rates)))

    def forward(self, feats: dict[str, Tensor], skip: Tensor) -> dict[str, Tensor]:
        """Task maps (B, H / 2, W / 2, 2 C) and the skip map (B, H, W, C) to task maps (B, H, W, C)."""
        refined = {}
        for task, feat in feats.items():
            fine = self.expand[task](feat)  # (B, H, W, C)
            refined[task] = self.stm[task](self.fuse[task](join(fine, skip)))
        return refined


class STMDecoder(CoarseToFineDecoder):
    """In every stage each task's own blocks, then a cross-task block, whose channels are in the order of `tasks`."""

    cross_task: ClassVar[type[nn.Module]]  # built from (tasks, channels, stochastic depth, config)

    def __init__(self, context: BuildContext, config: STMConfig):
        super().__init__(context)
        self.stm, self.ctm = nn.ModuleList(), nn.ModuleList()  # one each per stage, coarse to fine
        rates = stage_rates(config.drop_path_rate, config.stm_depth)
        for channels, (*own, last) in zip(reversed(context.channels[:-1]), rates, strict=True):
            self.stm.append(STMStage(self.tasks, channels, own, config.expand, config.d_state))
            self.ctm.append(self.cross_task(self.tasks, channels, last, config))

    def run_stage(self, index: int, feats: dict[str, Tensor], skip: Tensor) -> dict[str, Tensor]:
        return self.ctm[index](self.stm[index](feats, skip))
