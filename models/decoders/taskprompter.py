"""TaskPrompter: learned task prompts inside the backbone; the decoder reads its features off their scores.

One prompt per task runs through the backbone among the patches. Its raw attention scores towards the positions
multiply the backbone's map in groups of channels, its scores towards the channels multiply it window by window,
and both products are fused to a feature of that task. Four levels are summed.
Reference: Ye and Xu, "TaskPrompter: Spatial-Channel Multi-Task Prompting for Dense Scene Understanding", ICLR
2023. The prompts live in `models.backbones.prompted_vit` and `prompted_swin`, which `build_model` takes in place of the
plain backbone: the decoder runs on no other.

Axes: B batch, T prompts (in the order of the tasks), C channels of the level, M heads of its attention, E
branch width, F feature width, H W grid, n windows per side.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor, nn

from models.blocks.layers import INIT_STD, lite_head
from models.blocks.prompting import PromptedMap, Prompting, scale_groups, scale_windows
from models.blocks.resize import resize
from models.decoder import BuildContext, Decoder, DecoderOutput
from models.decoders.options import DecoderOptions


@dataclass(frozen=True)
class TaskPrompterConfig(DecoderOptions):
    """Options of the decoder and of the prompts in its backbone. All but the last are published keys.

    dd_label_map_size: (height, width) of predictions and labels, for data sets that have a label size of their own;
    None: that size.
    prompt_update: of the prompts of a ViT: `linear`, as in the published models, by a linear map of their channel
    query; `attention`, as in the paper's text, by what they gather from the channels. Weights of one do not fit the
    other.
    """

    embed_dim: int = 768  # E, width of both branches, on a ViT
    final_embed_dim: int = 768  # F, width of every task's features
    prompt_len: int = 1  # tokens of a task; the published models have no other number
    chan_nheads: int = 1  # n * n; the sides of every grid must be multiples of n
    use_ctr: bool = False  # cross-task reweighting, on a ViT only
    head: Literal["conv", "deconv"] = "conv"  # deconv: twice the grid, half the width
    level_embed_dim: int = 256  # E, width of both branches, on a Swin
    chan_embed_dim: int = 256  # width of the channel branch of a Swin, a square number
    img_ds_ratio: float = 1.0  # resizes the image inside a Swin
    dd_label_map_size: tuple[int, int] | None = None
    prompt_update: Literal["linear", "attention"] = "linear"

    def __post_init__(self):
        self.require_counts("embed_dim", "final_embed_dim", "level_embed_dim")
        self.require(self.prompt_len == 1, "prompt_len", "1, the published models have no other")
        for name in ("chan_nheads", "chan_embed_dim"):
            value = getattr(self, name)
            self.require(value >= 1 and math.isqrt(value) ** 2 == value, name, "a square number")
        self.require(0 < self.img_ds_ratio < math.inf, "img_ds_ratio", "a positive number")
        self.require(self.dd_label_map_size is None or min(self.dd_label_map_size) >= 1, "dd_label_map_size",
                     "a height and a width of at least 1")

    @property
    def label_size(self) -> tuple[int, int] | None:
        return self.dd_label_map_size

    @property
    def num_windows(self) -> int:
        """n."""
        return math.isqrt(self.chan_nheads)


class TaskFeature(nn.Module):
    """One task's feature of one level: its two score maps applied to the map, projected and fused.

    `fine_kernel` is the side of the last convolution, `upscale` the factor of the grid.
    """

    def __init__(self, channels: int, embed_dim: int, out_channels: int, fine_kernel: int, upscale: int):
        super().__init__()
        self.upscale = upscale
        self.spatial = nn.Conv2d(channels, embed_dim, kernel_size=1)
        self.channel = nn.Conv2d(channels, embed_dim, kernel_size=1)
        self.fuse = nn.Sequential(
            nn.Conv2d(2 * embed_dim, out_channels, kernel_size=1),
            nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1),
            nn.BatchNorm2d(out_channels), nn.GELU(),
            nn.Conv2d(out_channels, out_channels, fine_kernel, padding=fine_kernel // 2))

    def forward(self, feat: Tensor, spatial: Tensor, channel: Tensor) -> Tensor:
        """(B, C, H, W), (B, M, H, W), (B, C, n, n) -> (B, F, H * upscale, W * upscale)."""
        by_position = self.spatial(scale_groups(feat, spatial) + feat)  # (B, E, H, W)
        by_channel = self.channel(scale_windows(feat, channel) + feat)  # (B, E, H, W)
        joint = torch.cat((by_position, by_channel), dim=1)
        # A 1 x 1 convolution and a resize commute; the published order, resize first, costs four times as much.
        return self.fuse(resize(joint, tuple(self.upscale * side for side in feat.shape[-2:])))


class Reweighting(nn.Module):
    """Cross-task reweighting: features of one level to weighted sums over the tasks, neither softmax nor residual."""

    def __init__(self, tasks: Sequence[str], num_heads: int):
        super().__init__()
        self.gates = nn.ModuleDict({
            task: nn.Sequential(nn.Conv2d(num_heads, num_heads, 1), nn.GELU(), nn.Conv2d(num_heads, 1, 1))
            for task in tasks})

    def forward(self, feats: dict[str, Tensor], mutual: Tensor) -> dict[str, Tensor]:
        """{task: (B, F, H, W)}, prompts' scores towards prompts (B, M, T, T) -> {task: (B, F, H, W)}."""
        stacked = torch.stack(tuple(feats.values()), dim=1)  # (B, T, F, H, W)
        out = {}
        for index, (task, gate) in enumerate(self.gates.items()):
            weight = gate(mutual[:, :, index:index + 1])  # (B, 1, 1, T)
            out[task] = torch.einsum("bu,bufhw->bfhw", weight[:, 0, 0], stacked)
        return out


class TaskPrompterDecoder(Decoder):
    """Levels of a prompted backbone to one map per task.

    The order of the tasks is that of the prompts. Levels of one stride (ViT) are summed and enlarged four times, a
    pyramid (Swin) is summed at twice its finest grid; tasks whose head takes levels get the pyramid's as they are.
    """

    Config = TaskPrompterConfig
    recomputed = (TaskFeature,)
    input_multiple = 1  # the backbone itself checks that its grids fit the windows

    def __init__(self, context: BuildContext, config: TaskPrompterConfig):
        super().__init__()
        tasks, pyramid = list(context.tasks), len(set(context.strides)) > 1
        if pyramid and config.use_ctr:
            raise ValueError("option use_ctr needs a ViT, whose prompts all meet in one sequence; set it to false")
        self.channels, self.head = config.final_embed_dim, config.head
        embed, kernel, upscale = (config.level_embed_dim, 3, 2) if pyramid else (config.embed_dim, 1, 1)
        self.upscale = 1 if pyramid else 4
        self.leveled = context.leveled if pyramid else frozenset()
        factors = {task: 1 if task in self.leveled else upscale for task in tasks}
        self.levels = nn.ModuleList(
            nn.ModuleDict({task: TaskFeature(width, embed, self.channels, kernel, factors[task]) for task in tasks})
            for width in context.channels)
        self.reweighting = nn.ModuleList(
            Reweighting(tasks, heads) for heads in context.num_heads if config.use_ctr)
        self.merge = nn.ModuleDict({
            task: nn.Conv2d(self.channels, self.channels, kernel_size=3, padding=1)
            for task in tasks if pyramid and task not in self.leveled})

    @classmethod
    def backbone_options(cls, tasks: Mapping[str, int], config: TaskPrompterConfig) -> dict[str, Any]:
        return {"prompting": Prompting(len(tasks), config.num_windows, config.chan_embed_dim, config.img_ds_ratio,
                                       config.prompt_update == "attention")}

    def forward(self, maps: Sequence[PromptedMap]) -> DecoderOutput:
        outputs = [self.run_level(index, level) for index, level in enumerate(maps)]
        return DecoderOutput({task: [feats[task] for feats in outputs] if task in self.leveled else
                              self.sum_levels(task, [feats[task] for feats in outputs]) for task in outputs[0]})

    def sum_levels(self, task: str, feats: Sequence[Tensor]) -> Tensor:
        """The task's levels (B, F, h_i, w_i), finest first -> one map (B, F, h, w)."""
        height, width = feats[0].shape[-2:]
        total = sum(resize(feat, (height, width)) for feat in feats)
        total = self.merge[task](total) if self.merge else total
        return resize(total, (self.upscale * height, self.upscale * width))

    def run_level(self, index: int, level: PromptedMap) -> dict[str, Tensor]:
        """One level's features, {task: (B, F, h, w)}."""
        spatial = rearrange(level.spatial, "b m t h w -> t b m h w")
        channel = rearrange(level.channel, "b t c i j -> t b c i j")
        feats = {task: feature(level.feat, spatial[number], channel[number])
                 for number, (task, feature) in enumerate(self.levels[index].items())}
        return self.reweighting[index](feats, level.mutual) if self.reweighting else feats

    def make_head(self, num_outputs: int) -> nn.Module:
        """The head that the option `head` names; (B, F, H, W) to logits, which the model resizes.

        `deconv`: the grid doubled by a transposed convolution, half the width, one more 3 x 3 convolution.
        """
        if self.head == "conv":
            return lite_head(self.channels, self.channels, num_outputs, activation=nn.GELU)
        width = self.channels // 2
        head = nn.Sequential(OrderedDict(
            conv=nn.ConvTranspose2d(self.channels, width, kernel_size=2, stride=2), norm=nn.BatchNorm2d(width),
            activation=nn.GELU(), refine=nn.Conv2d(width, width, kernel_size=3, padding=1),
            refine_norm=nn.BatchNorm2d(width), refine_activation=nn.GELU(),
            proj=nn.Conv2d(width, num_outputs, kernel_size=1)))  # (B, num_outputs, 2 H, 2 W)
        for layer in (head.conv, head.refine, head.proj):
            nn.init.trunc_normal_(layer.weight, std=INIT_STD)
        return head
