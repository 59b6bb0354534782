"""BIM: a multi-task decoder built on Mamba scans that run in both directions through all tasks at once.

Three stages refine one feature map per task from coarse to fine. In each stage every task is refined alone by
a multi-scale scan (MSST), and all tasks exchange information through one bidirectional scan (BCFR) over a
sequence that holds every pixel of every task, at a cost linear in the number of tasks.
Re-implemented from the description in Cao et al., "Enhancing Mamba Decoder with Bidirectional Interaction in
Multi-Task Dense Prediction", ICCV 2025. No code of it was published; options marked (gap) fill what the
readable part of the paper leaves open.

Axes: T tasks (their order matters), B batch, H W grid of the stage, L = H * W, C stage width,
D = expand * C, N state size, R = ceil(C / 16) rank of the step size. Between layers the maps of all tasks are one
tensor (T, B, H, W, C); scans take (B, H, W, T, D).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.blocks.resize import average
from models.blocks.s6 import S6
from models.blocks.stacked import TaskDepthwise, TaskDropPath, TaskLayerNorm, TaskLinear, by_task
from models.decoder import BuildContext
from models.decoders.coarse_to_fine import CoarseToFineDecoder, TaskStage, stage_rates
from models.decoders.options import CoarseToFineOptions
from models.ops.routes import Route
from models.ops.ss2d import S6Weights, s6_scan, ss2d_core


@dataclass(frozen=True)
class BIMConfig(CoarseToFineOptions):
    """Options of the decoder; the paper's symbols where it gives any."""

    msst_depth: int = 2  # N in F^s_{t,N}: MSST layers per task and stage (gap filled from MTMamba)
    order: Literal["msst_first", "bcfr_first"] = "msst_first"  # which block leads a stage (gap)
    ms_scan: Literal["scale", "window"] = "scale"  # how MS-Scan makes its granularities (gap)
    scales: tuple[int, ...] = (1, 2, 4)  # pooling factor of each group of channels, for ms_scan = scale
    windows: tuple[int, ...] = (0, 8, 2)  # window side of each group, 0 = full map, for ms_scan = window
    between_passes: Literal["nothing", "norm"] = "nothing"  # what a half of BI-Scan meets between its two passes (gap)
    d_state: int = 16  # N of the state-space model
    expand: int = 2  # D / C
    drop_path_rate: float = 0.2  # stochastic depth of the first residual branch, falling linearly to 0 at the last

    def __post_init__(self):
        self.require(self.scales and min(self.scales) >= 1, "scales", "one or more pooling factors of at least 1")
        self.require(self.windows and min(self.windows) >= 0, "windows", "one or more window sides of at least 0")
        self.require_counts("msst_depth", "d_state", "expand")
        self.require_rates("drop_path_rate")


class MSScan(nn.Module):
    """Four-route scans of channel groups, each at a granularity of its own.

    The groups (B, H, W, T, D_g), one tensor each, to (B, H, W, T, D). Every task has weights of its own.
    """

    def __init__(self, num_tasks: int, width: int, rank: int, config: BIMConfig):
        super().__init__()
        self.pooled = config.ms_scan == "scale"
        self.sizes = config.scales if self.pooled else config.windows
        share, extra = divmod(width, len(self.sizes))
        if share == 0:
            raise ValueError(f"{width} channels cannot be split into {len(self.sizes)} MS-Scan groups")
        self.widths = [share + (g < extra) for g in range(len(self.sizes))]
        self.groups = nn.ModuleList(S6(group, rank, config.d_state, routes=4 * num_tasks) for group in self.widths)

    def forward(self, parts: Sequence[Tensor]) -> Tensor:
        scanned = [self._scan_group(*part) for part in zip(parts, self.groups, self.sizes, strict=True)]
        return torch.cat(scanned, dim=-1)

    def _scan_group(self, feat: Tensor, group: S6, size: int) -> Tensor:
        if not self.pooled or size == 1:
            return ss2d_core(feat, group.weights, window=0 if self.pooled else size)
        tasks = feat.shape[3]
        maps = feat.flatten(3).movedim(-1, 1)  # (B, T D_g, H, W)
        coarse = average(maps, size).movedim(1, -1)
        coarse = ss2d_core(coarse.unflatten(-1, (tasks, -1)), group.weights)  # (B, ceil(H / size), .., T, D_g)
        fine = F.interpolate(coarse.flatten(3).movedim(-1, 1), size=feat.shape[1:3], mode="bilinear",
                             align_corners=False)
        return fine.movedim(1, -1).unflatten(-1, (tasks, -1))


class BIScan(S6):
    """Scans the tokens of all tasks task-first, then position-first: (B, H, W, T, D) -> (B, H, W, T, D).

    One half of the channels runs forward, the other backward; each pass of a half has a route's weights of its own. The
    state is never reset, neither at the border of a task nor of a row.
    A pass gives products of up to four terms that grow with the tokens (step size, B, C, the token), two in a row of up
    to sixteen. `normed` puts a layer norm between them, without parameters, as the second pass has them.
    """

    passes = ("fwd_tf", "bwd_tf", "fwd_pf", "bwd_pf")

    def __init__(self, width: int, rank: int, state: int, normed: bool = False):
        if width % 2:
            raise ValueError(f"BI-Scan halves the {width} channels of a stage; expand times its width must be even")
        super().__init__(width // 2, rank, state, routes=len(self.passes))
        self.between = nn.LayerNorm(width // 2, elementwise_affine=False) if normed else nn.Identity()
        by_task(self, self.passes)

    def forward(self, feat: Tensor) -> Tensor:
        height, width, tasks = feat.shape[1:4]
        tokens = feat.flatten(1, 3).unflatten(-1, (2, -1))  # (B, L T, 2, D / 2): an (L, T) grid of tokens
        task_first, position_first = (Route(height * width, tasks, by_column) for by_column in (True, False))
        tokens = s6_scan(tokens, self.pair("tf"), (task_first, task_first.reversed()))
        tokens = self.between(tokens).to(feat.dtype)
        tokens = s6_scan(tokens, self.pair("pf"), (position_first, position_first.reversed()))
        return tokens.view_as(feat)

    def pair(self, order: str) -> S6Weights:
        """Weights of the forward and the backward pass of an order, "tf" or "pf"."""
        first = self.passes.index(f"fwd_{order}")
        return S6Weights(*(weight[first:first + 2] for weight in self.weights))


class GatedBranch(nn.Module):
    """What both blocks of BIM have around their scans, per task: (T, B, H, W, C) -> the same.

    Norm, projection to two halves, depthwise convolution and SiLU of one, a scan, norm, the other as gate, projection,
    residual.
    """

    def __init__(self, tasks: Sequence[str], channels: int, drop_path: float, config: BIMConfig):
        super().__init__()
        num_tasks, width = len(tasks), config.expand * channels
        self.norm = TaskLayerNorm(num_tasks, channels)
        self.in_proj = TaskLinear(num_tasks, channels, 2 * width, bias=False)
        self.conv = TaskDepthwise(num_tasks, width)
        self.scan = self.build_scan(num_tasks, width, math.ceil(channels / 16), config)
        self.out_norm = TaskLayerNorm(num_tasks, width, tasks_last=True)
        self.out_proj = TaskLinear(num_tasks, width, channels, bias=False)
        self.drop_path = TaskDropPath(drop_path)

    def forward(self, feat: Tensor) -> Tensor:
        inner, gate = self.in_proj.halves(feat, self.norm)  # (B, H, W, T, D), (T, B, H, W, D)
        scanned = self.activate_and_scan(self.conv(inner))  # (B, H, W, T, D)
        return self.drop_path(feat, self.out_proj(self.out_norm.gated(scanned, gate)))


class MSSTLayer(GatedBranch):
    """Multi-scale single-task layer: each task's map through MS-Scan."""

    @staticmethod
    def build_scan(num_tasks: int, width: int, rank: int, config: BIMConfig) -> nn.Module:
        return MSScan(num_tasks, width, rank, config)

    def activate_and_scan(self, inner: Tensor) -> Tensor:
        return self.scan([F.silu(part) for part in inner.split(self.scan.widths, dim=-1)])


class BCFRBlock(GatedBranch):
    """Bidirectional cross-task feature refine: one BI-Scan for all tasks, everything else per task."""

    def __init__(self, tasks: Sequence[str], channels: int, drop_path: float, config: BIMConfig):
        super().__init__(tasks, channels, drop_path, config)
        by_task(self, tasks, "norm", "in_proj", "conv", "out_norm", "out_proj")

    @staticmethod
    def build_scan(num_tasks: int, width: int, rank: int, config: BIMConfig) -> nn.Module:
        return BIScan(width, rank, config.d_state, config.between_passes == "norm")

    def activate_and_scan(self, inner: Tensor) -> Tensor:
        return self.scan(F.silu(inner))


class MFRStage(TaskStage):
    """Mamba feature refinement: up-sample, fuse the encoder's map, refine each task, let tasks interact."""

    def __init__(self, tasks: Sequence[str], channels: int, rates: Iterable[float], config: BIMConfig):
        super().__init__(tasks, channels, config)
        rates = list(rates)  # one per residual branch, in the order they run
        bcfr_rate = rates.pop(0 if config.order == "bcfr_first" else -1)
        self.interact_first = config.order == "bcfr_first"
        layers = (MSSTLayer(tasks, channels, rate, config) for rate in rates)
        self.msst = by_task(nn.Sequential(*layers), tasks)
        self.bcfr = BCFRBlock(tasks, channels, bcfr_rate, config)

    def forward(self, feats: Tensor, skip: Tensor) -> Tensor:
        """Task maps (T, B, H / 2, W / 2, 2 C) and the skip map (B, H, W, C) to task maps (T, B, H, W, C)."""
        fused = self.join(feats, skip)
        return self.msst(self.bcfr(fused)) if self.interact_first else self.bcfr(self.msst(fused))


class BIMDecoder(CoarseToFineDecoder):
    """Four encoder maps, finest first, to one map (B, e, H / 4, W / 4) per task.

    The order of the tasks is that of the scans.
    """

    Config = BIMConfig
    recomputed = (MSSTLayer, BCFRBlock)

    def __init__(self, context: BuildContext, config: BIMConfig):
        super().__init__(context, config)
        rates = stage_rates(config.drop_path_rate, config.msst_depth)
        self.stages = nn.ModuleList(
            MFRStage(self.tasks, width, rates[stage], config)
            for stage, width in enumerate(reversed(context.channels[:-1])))
