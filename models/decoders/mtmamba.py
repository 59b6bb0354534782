"""MTMamba: a multi-task decoder of Mamba blocks, with one shared and one own view of the scene per task.

Three stages refine one feature map per task from coarse to fine. In each stage every task is refined alone by
self-task Mamba blocks (STM); then a cross-task Mamba block (CTM) scans all tasks' channels together and lets
every task choose, per pixel and channel, between that shared map and its own.
Reference: Lin et al., "MTMamba: Enhancing Multi-Task Dense Scene Understanding by Mamba-Based Decoders",
ECCV 2024.

Axes: B batch, T tasks (their order fixes the order of the shared channels), H W grid of the stage, C stage
width, D = expand * C. Maps between layers are channels-last.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from models.blocks.heads import PatchExpandHead
from models.blocks.ss2d import PlainSS2D
from models.decoders.coarse_to_fine import per_task
from models.decoders.stm import STMConfig, STMDecoder, STMLayer


@dataclass(frozen=True)
class MTMambaConfig(STMConfig):
    """Options of the decoder: see `STMConfig`."""


class CTMBlock(nn.Module):
    """Cross-task Mamba block at feature level: task maps (B, H, W, C) to task maps (B, H, W, C).

    The gate is the share of the common branch; 1 takes nothing of the task's own.
    """

    def __init__(self, tasks: Sequence[str], channels: int, drop_path: float, config: MTMambaConfig):
        super().__init__()
        width, sizes = config.expand * channels, (config.expand, config.d_state)
        self.shared_norm = nn.LayerNorm(len(tasks) * channels)
        self.shared = PlainSS2D(len(tasks) * channels, channels, *sizes)
        self.norm = per_task(tasks, lambda: nn.LayerNorm(channels))
        self.ss2d = per_task(tasks, lambda: PlainSS2D(channels, channels, *sizes))
        self.gate = per_task(tasks, lambda: nn.Linear(channels, width, bias=False))
        self.out_proj = per_task(tasks, lambda: nn.Linear(width, channels, bias=False))
        self.drop_path = DropPath(drop_path)

    def forward(self, feats: dict[str, Tensor]) -> dict[str, Tensor]:
        stacked = torch.cat(list(feats.values()), dim=-1)  # (B, H, W, T C), without the per-task norms
        shared = self.shared(self.shared_norm(stacked))  # (B, H, W, D)
        out = {}
        for task, feat in feats.items():
            normed = self.norm[task](feat)
            gate = torch.sigmoid(self.gate[task](normed))  # (B, H, W, D)
            mixed = gate * shared + (1 - gate) * self.ss2d[task](normed)
            out[task] = feat + self.drop_path(self.out_proj[task](mixed))
        return out


class MTMambaDecoder(STMDecoder):
    """Four encoder maps, finest first, to one map (B, e, H / 4, W / 4) per task.

    The order of the tasks is that of the shared channels. Raises ValueError when the encoder's maps do not fit.
    """

    Config = MTMambaConfig
    recomputed = (STMLayer, CTMBlock)
    cross_task = CTMBlock

    def make_head(self, num_outputs: int) -> PatchExpandHead:
        """The paper's head: four-fold patch expansion to full resolution, then a linear layer per pixel."""
        return PatchExpandHead(self.channels, num_outputs)
