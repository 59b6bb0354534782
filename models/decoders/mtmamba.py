"""MTMamba: a multi-task decoder of Mamba blocks, with one shared and one own view of the scene per task.

Three stages refine one feature map per task from coarse to fine. In each stage every task is refined alone by
self-task Mamba blocks (STM); then a cross-task Mamba block (CTM) scans all tasks' channels together and lets
every task choose, per pixel and channel, between that shared map and its own.
References: Lin et al., "MTMamba: Enhancing Multi-Task Dense Scene Understanding by Mamba-Based Decoders",
ECCV 2024; Liu et al., "VMamba", 2024 (SS2D, the four-route scan).

Axes: B batch, T tasks (their order fixes the order of the shared channels), H W grid of the stage, C stage
width, D = expand * C, R = ceil(C / 16) rank of the step size. Maps between layers are channels-last.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import DropPath
from torch import Tensor, nn

from models.blocks.s6 import S6
from models.decoder import BuildContext
from models.decoders.coarse_to_fine import CoarseToFineDecoder, TaskStage, per_task, stage_rates
from models.decoders.options import DecoderOptions
from models.ops.ss2d import ss2d_core


@dataclass(frozen=True)
class MTMambaConfig(DecoderOptions):
    """Options of the decoder."""

    stm_depth: int = 2  # STM blocks per task and stage
    d_state: int = 16  # N of the state-space model
    expand: int = 2  # inner width of a Mamba block / its width (the paper's expansion factor)
    drop_path_rate: float = 0.2  # stochastic depth of the first residual branch, falling to 0 at the last

    def __post_init__(self):
        self.require_counts("stm_depth", "d_state", "expand")
        self.require_rates("drop_path_rate")


class SS2DCore(nn.Module):
    """Depth-wise convolution, SiLU, four-route scan, LayerNorm: (B, H, W, D) -> (B, H, W, D).

    With `source` (B, H, W, D) the scan's step sizes and input and output maps come from there; the sequences
    that are scanned still come from the first argument. The source is not convolved.
    """

    def __init__(self, channels: int, width: int, state: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, kernel_size=3, padding=1, groups=width)
        self.scan = S6(width, math.ceil(channels / 16), state, routes=4)
        self.norm = nn.LayerNorm(width)

    def forward(self, inner: Tensor, source: Tensor | None = None) -> Tensor:
        inner = self.conv(rearrange(inner, "b h w d -> b d h w"))  # a view: PyTorch's channels_last format
        inner = F.silu(rearrange(inner, "b d h w -> b h w d"))
        return self.norm(ss2d_core(inner, self.scan.weights, source))


class GatedSS2D(nn.Module):
    """SS2D between two projections, with a gate: (B, H, W, C) -> (B, H, W, C).

    `steered`: the scan is steered by a second map (B, H, W, C), as MTMamba++ needs it.
    """

    def __init__(self, channels: int, expand: int = 2, state: int = 16, steered: bool = False):
        super().__init__()
        width = expand * channels
        self.in_proj = nn.Linear(channels, 2 * width, bias=False)
        self.source_proj = nn.Linear(channels, width, bias=False) if steered else None
        self.core = SS2DCore(channels, width, state)
        self.out_proj = nn.Linear(width, channels, bias=False)

    def forward(self, feat: Tensor, source: Tensor | None = None) -> Tensor:
        inner, gate = self.in_proj(feat).chunk(2, dim=-1)  # (B, H, W, D) each
        source = None if source is None else self.source_proj(source)
        return self.out_proj(self.core(inner, source) * F.silu(gate))


class PlainSS2D(nn.Module):
    """SS2D after a projection, without gate: (B, H, W, in_channels) -> (B, H, W, D); C sets D and R."""

    def __init__(self, in_channels: int, channels: int, expand: int = 2, state: int = 16):
        super().__init__()
        width = expand * channels
        self.in_proj = nn.Linear(in_channels, width, bias=False)
        self.core = SS2DCore(channels, width, state)

    def forward(self, feat: Tensor) -> Tensor:
        return self.core(self.in_proj(feat))


class STMLayer(nn.Module):
    """Self-task Mamba block, a residual gated SS2D: (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, channels: int, drop_path: float, expand: int, state: int):
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.ss2d = GatedSS2D(channels, expand, state)
        self.drop_path = DropPath(drop_path)

    def forward(self, feat: Tensor) -> Tensor:
        return feat + self.drop_path(self.ss2d(self.norm(feat)))


class STMStage(TaskStage):
    """A stage's work for each task alone; `rates` holds the stochastic depth of each STM block."""

    def __init__(self, tasks: Sequence[str], channels: int, rates: Iterable[float], config: MTMambaConfig):
        super().__init__(tasks, channels)
        self.stm = per_task(tasks, lambda: nn.Sequential(
            *(STMLayer(channels, rate, config.expand, config.d_state) for rate in rates)))

    def forward(self, feats: dict[str, Tensor], skip: Tensor) -> dict[str, Tensor]:
        """Task maps (B, H / 2, W / 2, 2 C) and the skip map (B, H, W, C) to task maps (B, H, W, C)."""
        return {task: self.stm[task](feat) for task, feat in self.join(feats, skip).items()}


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


class MTMambaDecoder(CoarseToFineDecoder):
    """Four encoder maps, finest first, to one map (B, e, H / 4, W / 4) per task.

    In every stage each task's own blocks, then a cross-task block, whose channels are in the order of the tasks.
    """

    Config = MTMambaConfig
    recomputed = (STMLayer, CTMBlock)
    cross_task: ClassVar[type[nn.Module]] = CTMBlock  # built from (tasks, channels, stochastic depth, config)

    def __init__(self, context: BuildContext, config: MTMambaConfig):
        super().__init__(context)
        self.stm, self.ctm = nn.ModuleList(), nn.ModuleList()  # one each per stage, coarse to fine
        rates = stage_rates(config.drop_path_rate, config.stm_depth)
        for channels, (*own, last) in zip(reversed(context.channels[:-1]), rates, strict=True):
            self.stm.append(STMStage(self.tasks, channels, own, config))
            self.ctm.append(self.cross_task(self.tasks, channels, last, config))

    def run_stage(self, index: int, feats: dict[str, Tensor], skip: Tensor) -> dict[str, Tensor]:
        return self.ctm[index](self.stm[index](feats, skip))
