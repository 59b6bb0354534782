"""MTMamba++: MTMamba's decoder with a cross-task block in which the shared map steers each task's scan.

Three stages refine one feature map per task from coarse to fine. In each stage every task is refined alone by
self-task Mamba blocks (STM); then the semantic-level cross-task block (S-CTM) fuses all tasks into one map,
and each task's scan takes its step sizes and its input and output maps from that one. The heads work at a
quarter of the resolution.
Reference: Lin et al., "MTMamba++: Enhancing Multi-Task Dense Scene Understanding via Mamba-Based Decoders",
TPAMI 2025. Its feature-level block is that of MTMamba and exists there only, as in the published code.

Axes: T tasks (their order fixes the order of the fused channels), B batch, H W grid of the stage, C stage
width. Between layers the maps of all tasks are one tensor (T, B, H, W, C).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from einops import rearrange
from torch import Tensor, nn

from models.blocks.layers import lite_head
from models.blocks.stacked import TaskDropPath, TaskLayerNorm, by_task
from models.decoder import BuildContext
from models.decoders.mtmamba import GatedSS2D, MTMambaConfig, MTMambaDecoder, STMLayer


@dataclass(frozen=True)
class MTMambaPlusConfig(MTMambaConfig):
    """Options of the decoder: `MTMambaConfig` and its heads'."""

    head_channels: int = 96  # width of the heads' 3 x 3 convolution

    def __post_init__(self):
        super().__post_init__()
        self.require_counts("head_channels")


class TaskFusion(nn.Module):
    """All task maps (T, B, H, W, C) into one map (B, H, W, C), without any activation."""

    def __init__(self, num_tasks: int, channels: int):
        super().__init__()
        self.norm = nn.LayerNorm(num_tasks * channels)
        self.proj = nn.Linear(num_tasks * channels, channels)
        self.conv = nn.Conv2d(channels, channels, kernel_size=3, padding=1)

    def forward(self, feats: Tensor) -> Tensor:
        joined = rearrange(feats, "t b h w c -> b h w (t c)")
        fused = self.conv(rearrange(self.proj(self.norm(joined)), "b h w c -> b c h w"))  # T C -> C channels
        return rearrange(fused, "b c h w -> b h w c")


class SCTMBlock(nn.Module):
    """Cross-task Mamba block at semantic level: task maps (T, B, H, W, C) to task maps (T, B, H, W, C)."""

    def __init__(self, tasks: Sequence[str], channels: int, drop_path: float, config: MTMambaPlusConfig):
        super().__init__()
        num_tasks = len(tasks)
        self.shared = TaskFusion(num_tasks, channels)
        self.norm = by_task(TaskLayerNorm(num_tasks, channels), tasks)
        self.ss2d = by_task(GatedSS2D(num_tasks, channels, config.expand, config.d_state, steered=True), tasks)
        self.drop_path = TaskDropPath(drop_path)

    def forward(self, feats: Tensor) -> Tensor:
        return self.drop_path(feats, self.ss2d(feats, self.shared(feats), self.norm))


class MTMambaPlusDecoder(MTMambaDecoder):
    """Four encoder maps, finest first, to one map (B, e, H / 4, W / 4) per task.

    The order of the tasks is that of the fused channels.
    """

    Config = MTMambaPlusConfig
    recomputed = (STMLayer, SCTMBlock)
    cross_task = SCTMBlock

    def __init__(self, context: BuildContext, config: MTMambaPlusConfig):
        super().__init__(context, config)
        self.head_channels = config.head_channels

    def make_head(self, num_outputs: int) -> nn.Module:
        """The paper's head: one 3 x 3 convolution and a projection, at the decoder's resolution."""
        return lite_head(self.channels, self.head_channels, num_outputs)
