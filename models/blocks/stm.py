"""What MTMamba and MTMamba++ have in common: each task's own part of a decoder stage, options, checks.

Reference: Lin et al., "MTMamba: Enhancing Multi-Task Dense Scene Understanding by Mamba-Based Decoders",
ECCV 2024.
Axes: B batch, H W grid of the stage, C stage width. Maps are channels-last.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from models.blocks.checks import Options
from models.blocks.patch_expand import PatchExpand
from models.blocks.ss2d import GatedSS2D

STRIDES = (4, 8, 16, 32)
REQUIRES = "four maps with strides 4, 8, 16, 32 and widths e, 2e, 4e, 8e"


@dataclass
class STMOptions(Options):
    """Options of both decoders."""

    stm_depth: int = 2  # STM blocks per task and stage
    d_state: int = 16  # N of the state-space model
    expand: int = 2  # inner width of a Mamba block / its width (the papers' expansion factor)
    drop_path_rate: float = 0.2  # stochastic depth of the first residual branch, falling to 0 at the last

    def __post_init__(self):
        self.require_counts("stm_depth", "d_state", "expand")
        self.require(0 <= self.drop_path_rate < 1, "drop_path_rate", "a rate in [0, 1)")

    def stage_rates(self) -> list[list[float]]:
        """Stochastic depth of a stage's branches, stage by stage: STM blocks, then the cross-task block."""
        per_stage = self.stm_depth + 1
        rates = torch.linspace(self.drop_path_rate, 0, 3 * per_stage, device="cpu").tolist()
        return [rates[first:first + per_stage] for first in range(0, 3 * per_stage, per_stage)]


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
            if fine.shape[:3] != skip.shape[:3]:
                raise ValueError(f"up-sampled map is {fine.shape[1]}x{fine.shape[2]}, the encoder's "
                                 f"{skip.shape[1]}x{skip.shape[2]}; image sides must be multiples of 32")
            refined[task] = self.stm[task](self.fuse[task](torch.cat((fine, skip), dim=-1)))
        return refined


def per_task(tasks: Sequence[str], build: Callable[[], nn.Module]) -> nn.ModuleDict:
    """One module with weights of its own for each task."""
    return nn.ModuleDict({task: build() for task in tasks})


def check_inputs(decoder: str, tasks: Sequence[str], in_channels: Sequence[int],
                 strides: Sequence[int]) -> None:
    """Raises ValueError when the encoder's maps are not `REQUIRES`, or when there is no task or one twice."""
    widths_fit = all(fine * 2 == coarse for fine, coarse in pairwise(in_channels))
    if tuple(strides) != STRIDES or len(in_channels) != len(STRIDES) or not widths_fit:
        raise ValueError(f"decoder '{decoder}' needs {REQUIRES}, got widths {tuple(in_channels)} "
                         f"and strides {tuple(strides)}")
    if not tasks or len(set(tasks)) != len(tasks):
        raise ValueError(f"decoder '{decoder}' needs one or more different tasks, got {tuple(tasks)}")
