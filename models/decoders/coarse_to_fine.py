"""What BIM, MTMamba and MTMamba++ have in common: one map per task, refined in stages from coarse to fine.

Reference: Lin et al., "MTMamba: Enhancing Multi-Task Dense Scene Understanding by Mamba-Based Decoders", ECCV 2024,
whose skeleton BIM (Cao et al., ICCV 2025) shares.
Axes: T tasks (their order is part of the model), B batch, H W grid of the stage, C stage width. Inside, the maps of all
tasks are one tensor, channels last.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from einops import rearrange
from torch import Tensor, nn

from models.blocks.products import normed_linear
from models.blocks.stacked import JoinLinear, TaskLayerNorm, TaskLinear, by_task
from models.decoder import BuildContext, Decoder, DecoderOutput
from models.decoders.options import CoarseToFineOptions

STRIDES = (4, 8, 16, 32)


class CoarseToFineDecoder(Decoder):
    """Four encoder maps, finest first, to one map (B, e, H / 4, W / 4) per task, in three stages."""

    def __init__(self, context: BuildContext, config: CoarseToFineOptions):
        super().__init__()
        self.upsample_init = config.upsample_init
        widths_fit = all(fine * 2 == coarse for fine, coarse in pairwise(context.channels))
        context.require_maps(context.strides == STRIDES and widths_fit,
                             "four maps with strides 4, 8, 16, 32 and widths e, 2e, 4e, 8e", neck="pyramid")
        self.tasks, self.channels = tuple(context.tasks), context.channels[0]

    def run_stage(self, index: int, feats: Tensor, skip: Tensor) -> Tensor:
        """Task maps (T, B, H / 2, W / 2, 2 C) and the encoder's map (B, H, W, C) -> task maps (T, B, H, W, C)."""
        return self.stages[index](feats, skip)

    def forward(self, feats: Sequence[Tensor]) -> DecoderOutput:
        *skips, coarsest = (rearrange(feat, "b c h w -> b h w c").contiguous() for feat in feats)
        refined = coarsest.expand(len(self.tasks), *coarsest.shape)  # every task starts from the same map
        for index, skip in enumerate(reversed(skips)):
            refined = self.run_stage(index, refined, skip)
        maps = rearrange(refined, "t b h w c -> t b c h w")
        return DecoderOutput(dict(zip(self.tasks, maps.unbind(), strict=True)))

    def make_head(self, num_outputs: int) -> nn.Module:
        """The head of MTMamba and of BIM (Psi and P there): four-fold patch expansion to full resolution, then a linear
        layer per pixel."""
        return PatchExpandHead(self.channels, num_outputs, self.upsample_init)


@torch.no_grad()
def init_upsample(proj: nn.Linear, pixels: int, tasks: int = 1, init: str = "plain") -> None:
    """The start of a layer whose outputs are (task, pixel of the block, channel).

    plain: as PyTorch starts it, every pixel with weights of its own, so that an untrained network draws blocks instead
    of shapes. icnr: all pixels of a block with the weights of the first, as if it were repeated (Aitken et al.,
    "Checkerboard artifact free sub-pixel convolution", 2017); training tells them apart.
    """
    if init == "icnr":
        weight = proj.weight.unflatten(0, (tasks, pixels, -1))
        weight.copy_(weight[:, :1].clone().expand_as(weight))


class PatchExpand(nn.Module):
    """(B, H, W, in_channels) -> (B, scale H, scale W, out_channels), layer-normed: a linear layer predicts finer pixels
    as channels. Reference: Lin et al., "MTMamba", ECCV 2024; the idea is Swin-Unet's (Cao et al., 2022).
    """

    def __init__(self, in_channels: int, out_channels: int, scale: int, init: str = "plain"):
        super().__init__()
        self.scale = scale
        self.proj = nn.Linear(in_channels, scale * scale * out_channels, bias=False)
        init_upsample(self.proj, scale * scale, init=init)
        self.norm = nn.LayerNorm(out_channels)

    def forward(self, feat: Tensor) -> Tensor:
        fine = self.proj(feat)
        fine = rearrange(fine, "b h w (p1 p2 c) -> b (h p1) (w p2) c", p1=self.scale, p2=self.scale)
        return self.norm(fine)


class PatchExpandHead(nn.Module):
    """Psi and P of BIM: four-fold patch expansion to full resolution, then a linear layer per pixel.

    (B, C, H, W) -> (B, num_outputs, 4 H, 4 W), without activation. The widest maps of the model are here: C channels at
    full resolution. They are only made once, as channels of the coarse pixels; what is brought to its place are logits.
    """

    def __init__(self, in_channels: int, num_outputs: int, init: str = "plain"):
        super().__init__()
        self.expand = PatchExpand(in_channels, in_channels, scale=4, init=init)
        self.proj = nn.Conv2d(in_channels, num_outputs, kernel_size=1)

    def forward(self, feat: Tensor) -> Tensor:
        batch, channels, height, _ = feat.shape
        pixels = self.expand.proj(rearrange(feat, "b c h w -> b h w c"))  # (B, H, W, 16 C)
        norm, weight = self.expand.norm, self.proj.weight.view(1, -1, channels)
        logits = normed_linear(pixels.view(1, -1, channels), norm.weight, norm.bias, norm.eps, weight,
                               self.proj.bias.view(1, 1, -1))  # (1, B H W 16, n)
        return rearrange(logits, "1 (b h w p1 p2) n -> b n (h p1) (w p2)", b=batch, h=height, p1=4, p2=4)

    def plain(self, feat: Tensor) -> Tensor:
        """The same as the definition reads. For tests."""
        fine = self.expand(rearrange(feat, "b c h w -> b h w c"))  # (B, 4 H, 4 W, C)
        return self.proj(rearrange(fine, "b h w c -> b c h w"))


def stage_rates(largest: float, blocks: int) -> list[list[float]]:
    """Stochastic depth of the residual branches, stage by stage, falling linearly from `largest` to 0 at the last.

    A stage has `blocks` branches of each task's own and one common to all.
    """
    per_stage = blocks + 1
    rates = torch.linspace(largest, 0, 3 * per_stage, device="cpu").tolist()
    return [rates[first:first + per_stage] for first in range(0, 3 * per_stage, per_stage)]


class TaskPatchExpand(nn.Module):
    """`PatchExpand` of all tasks: (T, B, H, W, in_channels) -> (T, B, scale H, scale W, out_channels)."""

    def __init__(self, num_tasks: int, in_channels: int, out_channels: int, scale: int, init: str = "plain"):
        super().__init__()
        self.scale = scale
        self.proj = TaskLinear(num_tasks, in_channels, scale * scale * out_channels, bias=False)
        init_upsample(self.proj, scale * scale, num_tasks, init)
        self.norm = TaskLayerNorm(num_tasks, out_channels)

    def forward(self, feat: Tensor) -> Tensor:
        fine = self.proj(feat)
        fine = rearrange(fine, "t b h w (p1 p2 c) -> t b (h p1) (w p2) c", p1=self.scale, p2=self.scale)
        return self.norm.for_product(fine)


class TaskStage(nn.Module):
    """How every stage begins, for each task alone: up-sample, join the encoder's map."""

    def __init__(self, tasks: Sequence[str], channels: int, config: CoarseToFineOptions):
        super().__init__()
        expand = TaskPatchExpand(len(tasks), 2 * channels, channels, scale=2, init=config.upsample_init)
        self.expand = by_task(expand, tasks)
        self.fuse = by_task(JoinLinear(len(tasks), 2 * channels, channels), tasks)

    def join(self, feats: Tensor, skip: Tensor) -> Tensor:
        """Task maps (T, B, H / 2, W / 2, 2 C) and the encoder's map (B, H, W, C) -> task maps (T, B, H, W, C)."""
        fine = self.expand(feats)  # (T, B, H, W, C)
        height, width = fine.shape[2:4]
        if (height, width) != skip.shape[1:3]:
            raise ValueError(f"up-sampled map is {height}x{width}, the encoder's {skip.shape[1]}x{skip.shape[2]}; "
                             f"the image's sides must be multiples of {STRIDES[-1]}")
        return self.fuse(fine, skip)
