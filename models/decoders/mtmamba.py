"""MTMamba: a multi-task decoder of Mamba blocks, with one shared and one own view of the scene per task.

Three stages refine one feature map per task from coarse to fine. In each stage every task is refined alone by
self-task Mamba blocks (STM); then a cross-task Mamba block (CTM) scans all tasks' channels together and lets
every task choose, per pixel and channel, between that shared map and its own.
References: Lin et al., "MTMamba: Enhancing Multi-Task Dense Scene Understanding by Mamba-Based Decoders",
ECCV 2024; Liu et al., "VMamba", 2024 (SS2D, the four-route scan).

Axes: T tasks (their order fixes the order of the shared channels), B batch, H W grid of the stage, C stage
width, D = expand * C, R = ceil(C / 16) rank of the step size. Between layers the maps of all tasks are one tensor
(T, B, H, W, C); scans take (B, H, W, T, D).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from models.blocks.s6 import S6
from models.blocks.stacked import TaskDepthwise, TaskDropPath, TaskLayerNorm, TaskLinear, by_task
from models.decoder import BuildContext
from models.decoders.coarse_to_fine import CoarseToFineDecoder, TaskStage, stage_rates
from models.decoders.options import CoarseToFineOptions
from models.ops.ss2d import ss2d_core


@dataclass(frozen=True)
class MTMambaConfig(CoarseToFineOptions):
    """Options of the decoder."""

    stm_depth: int = 2  # STM blocks per task and stage
    d_state: int = 16  # N of the state-space model
    expand: int = 2  # inner width of a Mamba block / its width (the paper's expansion factor)
    drop_path_rate: float = 0.2  # stochastic depth of the first residual branch, falling to 0 at the last

    def __post_init__(self):
        self.require_counts("stm_depth", "d_state", "expand")
        self.require_rates("drop_path_rate")


class SS2DCore(nn.Module):
    """Depth-wise convolution, SiLU, four-route scan, LayerNorm, per task: (B, H, W, T, D) -> (T, B, H, W, D).

    With `source` (B, H, W, T, D) the scan's step sizes and input and output maps come from there; the sequences
    that are scanned still come from the first argument. The source is not convolved. With `gate` (T, B, H, W, D) the
    result is multiplied by the gate's SiLU.
    """

    def __init__(self, num_tasks: int, channels: int, width: int, state: int):
        super().__init__()
        self.conv = TaskDepthwise(num_tasks, width)
        self.scan = S6(width, math.ceil(channels / 16), state, routes=4 * num_tasks)
        self.norm = TaskLayerNorm(num_tasks, width, tasks_last=True)

    def forward(self, inner: Tensor, source: Tensor | None = None, gate: Tensor | None = None) -> Tensor:
        inner = F.silu(self.conv(inner))  # (B, H, W, T, D)
        scanned = ss2d_core(inner, self.scan.weights, source)
        return self.norm(scanned).permute(3, 0, 1, 2, 4) if gate is None else self.norm.gated(scanned, gate)


class GatedSS2D(nn.Module):
    """SS2D between two projections, with a gate, per task: (T, B, H, W, C) -> the same.

    `steered`: all scans are steered by a second map (B, H, W, C), as MTMamba++ needs it.
    """

    def __init__(self, num_tasks: int, channels: int, expand: int = 2, state: int = 16, steered: bool = False):
        super().__init__()
        width = expand * channels
        self.in_proj = TaskLinear(num_tasks, channels, 2 * width, bias=False)
        self.source_proj = TaskLinear(num_tasks, channels, width, bias=False) if steered else None
        self.core = SS2DCore(num_tasks, channels, width, state)
        self.out_proj = TaskLinear(num_tasks, width, channels, bias=False)

    def forward(self, feat: Tensor, source: Tensor | None = None, norm: TaskLayerNorm | None = None) -> Tensor:
        """`norm`: what the first map goes through before."""
        inner, gate = self.in_proj.halves(feat, norm)  # (B, H, W, T, D), (T, B, H, W, D)
        source = None if source is None else self.source_proj.of_common(source)
        return self.out_proj(self.core(inner, source, gate))


class PlainSS2D(nn.Module):
    """SS2D after a projection, without gate: (T, B, H, W, in_channels) -> (T, B, H, W, D); C sets D and R."""

    def __init__(self, num_tasks: int, in_channels: int, channels: int, expand: int = 2, state: int = 16):
        super().__init__()
        width = expand * channels
        self.in_proj = TaskLinear(num_tasks, in_channels, width, bias=False)
        self.core = SS2DCore(num_tasks, channels, width, state)

    def forward(self, feat: Tensor) -> Tensor:
        return self.core(self.in_proj(feat).permute(1, 2, 3, 0, 4))


class STMLayer(nn.Module):
    """Self-task Mamba block, a residual gated SS2D of each task: (T, B, H, W, C) -> the same."""

    def __init__(self, num_tasks: int, channels: int, drop_path: float, expand: int, state: int):
        super().__init__()
        self.norm = TaskLayerNorm(num_tasks, channels)
        self.ss2d = GatedSS2D(num_tasks, channels, expand, state)
        self.drop_path = TaskDropPath(drop_path)

    def forward(self, feat: Tensor) -> Tensor:
        return self.drop_path(feat, self.ss2d(feat, norm=self.norm))


class STMStage(TaskStage):
    """A stage's work for each task alone; `rates` holds the stochastic depth of each STM block."""

    def __init__(self, tasks: Sequence[str], channels: int, rates: Iterable[float], config: MTMambaConfig):
        super().__init__(tasks, channels, config)
        layers = (STMLayer(len(tasks), channels, rate, config.expand, config.d_state) for rate in rates)
        self.stm = by_task(nn.Sequential(*layers), tasks)

    def forward(self, feats: Tensor, skip: Tensor) -> Tensor:
        """Task maps (T, B, H / 2, W / 2, 2 C) and the skip map (B, H, W, C) to task maps (T, B, H, W, C)."""
        return self.stm(self.join(feats, skip))


class CTMBlock(nn.Module):
    """Cross-task Mamba block at feature level: task maps (T, B, H, W, C) to task maps (T, B, H, W, C).

    The gate is the share of the common branch; 1 takes nothing of the task's own.
    """

    def __init__(self, tasks: Sequence[str], channels: int, drop_path: float, config: MTMambaConfig):
        super().__init__()
        num_tasks, width, sizes = len(tasks), config.expand * channels, (config.expand, config.d_state)
        self.shared_norm = nn.LayerNorm(num_tasks * channels)
        self.shared = PlainSS2D(1, num_tasks * channels, channels, *sizes)
        self.norm = by_task(TaskLayerNorm(num_tasks, channels), tasks)
        self.ss2d = by_task(PlainSS2D(num_tasks, channels, channels, *sizes), tasks)
        self.gate = by_task(TaskLinear(num_tasks, channels, width, bias=False), tasks)
        self.out_proj = by_task(TaskLinear(num_tasks, width, channels, bias=False), tasks)
        self.drop_path = TaskDropPath(drop_path)

    def forward(self, feats: Tensor) -> Tensor:
        joined = rearrange(feats, "t b h w c -> 1 b h w (t c)")  # without the per-task norms
        shared = self.shared(self.shared_norm(joined))  # (1, B, H, W, D)
        normed = self.norm.for_product(feats)
        own, gate = self.ss2d(normed), torch.sigmoid(self.gate(normed))  # (T, B, H, W, D)
        mixed = torch.lerp(own, shared, gate.to(own.dtype))
        return self.drop_path(feats, self.out_proj(mixed))


class MTMambaDecoder(CoarseToFineDecoder):
    """Four encoder maps, finest first, to one map (B, e, H / 4, W / 4) per task.

    In every stage each task's own blocks, then a cross-task block, whose channels are in the order of the tasks.
    """

    Config = MTMambaConfig
    recomputed = (STMLayer, CTMBlock)
    cross_task: ClassVar[type[nn.Module]] = CTMBlock  # built from (tasks, channels, stochastic depth, config)

    def __init__(self, context: BuildContext, config: MTMambaConfig):
        super().__init__(context, config)
        self.stm, self.ctm = nn.ModuleList(), nn.ModuleList()  # one each per stage, coarse to fine
        rates = stage_rates(config.drop_path_rate, config.stm_depth)
        for channels, (*own, last) in zip(reversed(context.channels[:-1]), rates, strict=True):
            self.stm.append(STMStage(self.tasks, channels, own, config))
            self.ctm.append(self.cross_task(self.tasks, channels, last, config))

    def run_stage(self, index: int, feats: Tensor, skip: Tensor) -> Tensor:
        return self.ctm[index](self.stm[index](feats, skip))
