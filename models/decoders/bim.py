"""BIM: a multi-task decoder built on Mamba scans that run in both directions through all tasks at once.

Three stages refine one feature map per task from coarse to fine. In each stage every task is refined alone by
a multi-scale scan (MSST), and all tasks exchange information through one bidirectional scan (BCFR) over a
sequence that holds every pixel of every task, at a cost linear in the number of tasks.
Re-implemented from the description in Cao et al., "Enhancing Mamba Decoder with Bidirectional Interaction in
Multi-Task Dense Prediction", ICCV 2025. No code of it was published; options marked (gap) fill what the
readable part of the paper leaves open.

Axes: B batch, T tasks (their order matters), H W grid of the stage, L = H * W, C stage width,
D = expand * C, N state size, R = ceil(C / 16) rank of the step size. Maps between layers are channels-last.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from models.blocks.s6 import S6, scan_together
from models.decoder import BuildContext
from models.decoders.coarse_to_fine import CoarseToFineDecoder, TaskStage, per_task, stage_rates
from models.decoders.options import DecoderOptions
from models.ops.routes import Route
from models.ops.ss2d import ss2d_core


@dataclass(frozen=True)
class BIMConfig(DecoderOptions):
    """Options of the decoder; the paper's symbols where it gives any."""

    msst_depth: int = 2  # N in F^s_{t,N}: MSST layers per task and stage (gap filled from MTMamba)
    order: Literal["msst_first", "bcfr_first"] = "msst_first"  # which block leads a stage (gap)
    ms_scan: Literal["scale", "window"] = "scale"  # how MS-Scan makes its granularities (gap)
    scales: tuple[int, ...] = (1, 2, 4)  # pooling factor of each group of channels, for ms_scan = scale
    windows: tuple[int, ...] = (0, 8, 2)  # window side of each group, 0 = full map, for ms_scan = window
    d_state: int = 16  # N of the state-space model
    expand: int = 2  # D / C
    drop_path_rate: float = 0.2  # stochastic depth of the first residual branch, falling linearly to 0 at the last

    def __post_init__(self):
        self.require(self.scales and min(self.scales) >= 1, "scales", "one or more pooling factors of at least 1")
        self.require(self.windows and min(self.windows) >= 0, "windows", "one or more window sides of at least 0")
        self.require_counts("msst_depth", "d_state", "expand")
        self.require_rates("drop_path_rate")


class MSScan(nn.Module):
    """Four-route scans of channel groups, each at a granularity of its own: (B, H, W, D) -> (B, H, W, D)."""

    def __init__(self, width: int, rank: int, config: BIMConfig):
        super().__init__()
        self.pooled = config.ms_scan == "scale"
        self.sizes = config.scales if self.pooled else config.windows
        share, extra = divmod(width, len(self.sizes))
        if share == 0:
            raise ValueError(f"{width} channels cannot be split into {len(self.sizes)} MS-Scan groups")
        self.widths = [share + (g < extra) for g in range(len(self.sizes))]
        self.groups = nn.ModuleList(S6(group, rank, config.d_state, routes=4) for group in self.widths)

    def forward(self, feat: Tensor) -> Tensor:
        parts = zip(feat.split(self.widths, dim=-1), self.groups, self.sizes, strict=True)
        return torch.cat([self._scan_group(*part) for part in parts], dim=-1)

    def _scan_group(self, feat: Tensor, group: S6, size: int) -> Tensor:
        if not self.pooled or size == 1:
            return ss2d_core(feat, group.weights, window=0 if self.pooled else size)
        # Border cells are means over the pixels that exist.
        coarse = F.avg_pool2d(feat.movedim(-1, 1), size, ceil_mode=True, count_include_pad=False)
        coarse = ss2d_core(coarse.movedim(1, -1), group.weights)  # (B, ceil(H / size), ceil(W / size), D_g)
        fine = F.interpolate(coarse.movedim(-1, 1), size=feat.shape[1:3], mode="bilinear", align_corners=False)
        return fine.movedim(1, -1)


class BIScan(nn.Module):
    """Scans the tokens of all tasks task-first, then position-first: (B, T, H, W, D) -> (B, T, H, W, D).

    One half of the channels runs forward, the other backward. The state is never reset, neither at the border
    of a task nor of a row.
    """

    def __init__(self, width: int, rank: int, state: int):
        super().__init__()
        forward, backward = width - width // 2, width // 2
        self.fwd_tf, self.bwd_tf = S6(forward, rank, state), S6(backward, rank, state)
        self.fwd_pf, self.bwd_pf = S6(forward, rank, state), S6(backward, rank, state)

    def forward(self, feat: Tensor) -> Tensor:
        tasks, height, width = feat.shape[1:4]
        tokens = feat.flatten(1, 3)  # (B, T L, D): a (T, L) grid of tokens
        task_first = Route(tasks, height * width)
        position_first = Route(tasks, height * width, by_column=True)
        tokens = scan_together((self.fwd_tf, self.bwd_tf), tokens, (task_first, task_first.reversed()))
        tokens = scan_together((self.fwd_pf, self.bwd_pf), tokens, (position_first, position_first.reversed()))
        return tokens.view_as(feat)


class MSSTLayer(nn.Module):
    """Multi-scale single-task layer, a gated residual branch around MS-Scan: (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, channels: int, drop_path: float, config: BIMConfig):
        super().__init__()
        width = config.expand * channels
        self.norm = nn.LayerNorm(channels)
        self.in_proj = nn.Linear(channels, 2 * width, bias=False)
        self.conv = nn.Conv2d(width, width, kernel_size=3, padding=1, groups=width)
        self.scan = MSScan(width, math.ceil(channels / 16), config)
        self.out_norm = nn.LayerNorm(width)
        self.out_proj = nn.Linear(width, channels, bias=False)
        self.drop_path = DropPath(drop_path)

    def forward(self, feat: Tensor) -> Tensor:
        inner, gate = self.in_proj(self.norm(feat)).chunk(2, dim=-1)  # (B, H, W, D) each
        inner = self.conv(inner.movedim(-1, 1)).movedim(1, -1)  # seen in PyTorch's channels_last format; nothing moves
        scanned = self.scan(F.silu(inner))
        return feat + self.drop_path(self.out_proj(self.out_norm(scanned) * F.silu(gate)))


class BCFRBlock(nn.Module):
    """Bidirectional cross-task feature refine: one BI-Scan for all tasks, everything else per task."""

    def __init__(self, tasks: Sequence[str], channels: int, drop_path: float, config: BIMConfig):
        super().__init__()
        width = config.expand * channels
        self.norm = per_task(tasks, lambda: nn.LayerNorm(channels))
        self.in_proj = per_task(tasks, lambda: nn.Linear(channels, 2 * width, bias=False))
        self.conv = per_task(tasks, lambda: nn.Conv2d(width, width, kernel_size=3, padding=1, groups=width))
        self.scan = BIScan(width, math.ceil(channels / 16), config.d_state)
        self.out_norm = per_task(tasks, lambda: nn.LayerNorm(width))
        self.out_proj = per_task(tasks, lambda: nn.Linear(width, channels, bias=False))
        self.drop_path = DropPath(drop_path)

    def forward(self, feats: dict[str, Tensor]) -> dict[str, Tensor]:
        inner, gates = [], {}
        for task, feat in feats.items():
            projected = self.in_proj[task](self.norm[task](feat))  # (B, H, W, 2 D)
            task_inner, gates[task] = projected.chunk(2, dim=-1)
            inner.append(F.silu(self.conv[task](task_inner.movedim(-1, 1)).movedim(1, -1)))
        scanned = self.scan(torch.stack(inner, dim=1))  # (B, T, H, W, D)
        out = {}
        for (task, feat), task_scanned in zip(feats.items(), scanned.unbind(1), strict=True):
            gated = self.out_norm[task](task_scanned) * F.silu(gates[task])
            out[task] = feat + self.drop_path(self.out_proj[task](gated))
        return out


class MFRStage(TaskStage):
    """Mamba feature refinement: up-sample, fuse the encoder's map, refine each task, let tasks interact."""

    def __init__(self, tasks: Sequence[str], channels: int, rates: Iterable[float], config: BIMConfig):
        super().__init__(tasks, channels)
        rates = list(rates)  # one per residual branch, in the order they run
        bcfr_rate = rates.pop(0 if config.order == "bcfr_first" else -1)
        self.interact_first = config.order == "bcfr_first"
        self.msst = per_task(
            tasks, lambda: nn.Sequential(*(MSSTLayer(channels, rate, config) for rate in rates)))
        self.bcfr = BCFRBlock(tasks, channels, bcfr_rate, config)

    def forward(self, feats: dict[str, Tensor], skip: Tensor) -> dict[str, Tensor]:
        """Task maps (B, H / 2, W / 2, 2 C) and the skip map (B, H, W, C) to task maps (B, H, W, C)."""
        fused = self.join(feats, skip)
        if self.interact_first:
            return self._refine(self.bcfr(fused))
        return self.bcfr(self._refine(fused))

    def _refine(self, feats: dict[str, Tensor]) -> dict[str, Tensor]:
        return {task: self.msst[task](feat) for task, feat in feats.items()}


class BIMDecoder(CoarseToFineDecoder):
    """Four encoder maps, finest first, to one map (B, e, H / 4, W / 4) per task.

    The order of the tasks is that of the scans.
    """

    Config = BIMConfig
    recomputed = (MSSTLayer, BCFRBlock)

    def __init__(self, context: BuildContext, config: BIMConfig):
        super().__init__(context)
        rates = stage_rates(config.drop_path_rate, config.msst_depth)
        self.stages = nn.ModuleList(
            MFRStage(self.tasks, width, rates[stage], config)
            for stage, width in enumerate(reversed(context.channels[:-1])))
