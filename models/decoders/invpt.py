"""InvPT: a transformer decoder that attends over all tasks and pixels at once, while the resolution grows.

Preliminary decoders make one feature map and one rough prediction per task from the deepest map of a plain
ViT. Three stages then refine the maps of all tasks jointly; the width halves and the grid doubles from stage
to stage, and each stage hands its attention scores, before the softmax, to the next one. The maps of all stages
are summed.
Reference: Ye and Xu, "Inverted Pyramid Multi-task Transformer for Dense Scene Understanding", ECCV 2022.
The options of `InvPTConfig` say where the published models are surprising. Layers of theirs that no output depends on
(a third skip map, in the first stage a fusion of scores and a projection, a last norm) are left out.

Axes: B batch, T tasks (their order matters), C stage width, H W grid of the stage, h w that of the first one,
N heads, Q = T H W / 4 queries, L = T h w / 4 keys (the same number in every stage).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from models.blocks.inverted_pyramid import MultiScaleSum, query_reduction, split_heads, up_embedding
from models.blocks.layers import INIT_STD, conv_bn_relu, init_linear
from models.blocks.resize import resize
from models.decoder import BuildContext, Decoder, DecoderOutput
from models.decoders.options import DecoderOptions

NUM_STAGES = 3


@dataclass(frozen=True)
class InvPTConfig(DecoderOptions):
    """Options of the decoder. The first three are keys of the published experiment files.

    attention_scale: `width` divides the scores by the root of the whole stage width, as the published models
    do in spite of their two heads: softer attention than the usual `head` (the root of a head's width). The
    two are not exchangeable in a trained model.
    drop_path_rate: stochastic depth of the stages, rising linearly from 0 at the first. The published models
    set 0.15, but the rule is evaluated for a single block and yields 0 in every stage; hence 0 here. It acts
    in training only.
    """

    embed_dim: int = 512  # E, width of the preliminary features
    PRED_OUT_NUM_CONSTANT: int = 64  # P: the stages have the widths E + P, (E + P) / 2, (E + P) / 4
    mtt_resolution_downsample_rate: int = 2  # ViT grid / first grid; the skip maps leave no other choice
    num_heads: int = 2  # of the attention
    mlp_ratio: float = 4.0  # hidden width of an MLP / its width
    attention_scale: Literal["width", "head"] = "width"
    drop_path_rate: float = 0.0

    def __post_init__(self):
        self.require_counts("embed_dim", "num_heads")
        self.require_counts("PRED_OUT_NUM_CONSTANT", least=0)
        self.require(self.mtt_resolution_downsample_rate == 2, "mtt_resolution_downsample_rate",
                     "2, the skip maps have twice the first grid")
        self.require(0 < self.mlp_ratio < math.inf, "mlp_ratio", "a positive number")
        self.require_rates("drop_path_rate")
        self.require(all(width and width % self.num_heads == 0 for width in self.widths), "num_heads",
                     f"a divisor of the stage widths {self.widths}")

    @property
    def widths(self) -> tuple[int, ...]:
        """C of the stages."""
        return tuple((self.embed_dim + self.PRED_OUT_NUM_CONSTANT) // 2**stage for stage in range(NUM_STAGES))


class CrossTaskAttention(nn.Module):
    """Attention among all pixels of all tasks, with the scores of the stage before mixed in.

    (B, T, H, W, C) -> the same shape, and this stage's scores (B, N, Q, L) before the softmax. Queries have
    half the side of the map, keys and values half of the first stage's.
    """

    def __init__(self, tasks: Sequence[str], channels: int, stage: int, config: InvPTConfig):
        super().__init__()
        self.num_heads, self.pool = config.num_heads, 2 ** (stage + 1)
        self.scale = (channels if config.attention_scale == "width" else channels // config.num_heads) ** -0.5
        self.query = nn.ModuleDict({task: query_reduction(channels) for task in tasks})
        self.to_q, self.to_k, self.to_v, self.proj = (nn.Linear(channels, channels) for _ in range(4))
        self.fuse = nn.Conv2d(2 * self.num_heads, self.num_heads, kernel_size=1) if stage else None

    def forward(self, feat: Tensor, message: Tensor | None) -> tuple[Tensor, Tensor]:
        tasks, height, width = feat.shape[1:4]
        maps = rearrange(feat, "b t h w c -> t b c h w")
        queries = [reduce(x) for reduce, x in zip(self.query.values(), maps, strict=True)]  # (B, C, H/2, W/2)
        queries = rearrange(queries, "t b c h w -> b (t h w) c")  # (B, Q, C): all of task 0, then task 1, ...
        pooled = F.avg_pool2d(rearrange(feat, "b t h w c -> (b t) c h w"), self.pool)  # (B T, C, h/2, w/2)
        keys = rearrange(pooled, "(b t) c h w -> b (t h w) c", t=tasks)  # (B, L, C), in the same order
        tokens = (self.to_q(queries), self.to_k(keys), self.to_v(keys))
        q, k, v = (split_heads(x, self.num_heads) for x in tokens)  # (B, N, Q, C / N), twice (B, N, L, C / N)
        score = q @ k.transpose(-2, -1) * self.scale  # (B, N, Q, L)
        if self.fuse is not None:
            message = _refine_queries(message, tasks, (height // 4, width // 4))
            score = self.fuse(torch.cat((score, message), dim=1))
        out = self.proj(rearrange(score.softmax(dim=-1) @ v, "b n q d -> b q (n d)"))  # (B, Q, C)
        out = rearrange(out, "b (t h w) c -> (b t) c h w", t=tasks, h=height // 2)
        return rearrange(resize(out, (height, width)), "(b t) c h w -> b t h w c", t=tasks), score


def _refine_queries(score: Tensor, tasks: int, grid: tuple[int, int]) -> Tensor:
    """(B, N, T * grid, L) -> (B, N, 4 T * grid, L): every key's map of queries is doubled bilinearly."""
    height, width = grid
    maps = rearrange(score, "b n (t h w) l -> (b n t) l h w", t=tasks, h=height)
    finer = resize(maps, (2 * height, 2 * width))
    return rearrange(finer, "(b n t) l h w -> b n (t h w) l", n=score.shape[1], t=tasks)


class InvPTStage(nn.Module):
    """Brings the task maps to this stage's width and grid; one transformer block lets them interact."""

    def __init__(self, tasks: Sequence[str], stage: int, config: InvPTConfig):
        super().__init__()
        channels = config.widths[stage]
        self.up = None
        if stage:
            coarser = config.widths[stage - 1]
            self.up = nn.ModuleDict({task: up_embedding(coarser, channels) for task in tasks})
        self.norm1 = nn.LayerNorm(channels)
        self.attention = CrossTaskAttention(tasks, channels, stage, config)
        self.norm2 = nn.LayerNorm(channels)
        self.mlp = Mlp(channels, int(config.mlp_ratio * channels))
        self.drop_path = DropPath(config.drop_path_rate * stage / (NUM_STAGES - 1))
        init_linear(self)

    def forward(self, maps: dict[str, Tensor], skip: Tensor | None,
                message: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
        """{task: map of the stage before}, skip (B, C, H, W), its scores -> {task: (B, C, H, W)}, scores.

        The first stage takes its maps as they are: no skip, no message.
        """
        if self.up is not None:
            maps = {task: self.up[task](feat) + skip for task, feat in maps.items()}
        feat = rearrange(list(maps.values()), "t b c h w -> b t h w c")
        out, score = self.attention(self.norm1(feat), message)
        feat = feat + self.drop_path(out)
        feat = feat + self.drop_path(self.mlp(self.norm2(feat)))
        return dict(zip(maps, rearrange(feat, "b t h w c -> t b c h w"), strict=True)), score


class InvPTDecoder(Decoder):
    """Four maps of a plain ViT to one map per task at a quarter of its stride, and preliminary predictions.

    The order of the tasks is part of the model. Nothing is made of the third map.
    """

    Config = InvPTConfig
    recomputed = (InvPTStage,)
    unread_maps = (2,)

    def __init__(self, context: BuildContext, config: InvPTConfig):
        super().__init__()
        tasks, strides = context.tasks, context.strides
        context.require_maps(len(strides) == 4 and len(set(strides)) == 1 and len(set(context.channels)) == 1,
                             "four maps of one stride and width, as a plain ViT gives", neck="one_stride")
        width, embed, (coarse, middle, fine) = context.channels[0], config.embed_dim, config.widths
        self.channels, self.input_multiple = coarse, 4 * strides[0]
        self.downsample = config.mtt_resolution_downsample_rate
        self.preliminary = nn.ModuleDict({
            task: nn.Sequential(conv_bn_relu(width, width), conv_bn_relu(width, embed)) for task in tasks})
        self.intermediate = nn.ModuleDict({task: nn.Conv2d(embed, n, 1) for task, n in tasks.items()})
        self.mix = nn.ModuleDict({task: nn.Conv2d(embed + n, coarse, 1) for task, n in tasks.items()})
        self.skip_fine = nn.ConvTranspose2d(width, fine, kernel_size=3, stride=2, padding=1, output_padding=1)
        self.skip_middle = nn.Conv2d(width, middle, kernel_size=3, padding=1)
        self.stages = nn.ModuleList(InvPTStage(list(tasks), stage, config) for stage in range(NUM_STAGES))
        self.aggregate = MultiScaleSum(list(tasks), config.widths)
        self.project = nn.ModuleDict({task: conv_bn_relu(coarse, coarse, bias=True) for task in tasks})
        for conv, *_ in self.project.values():
            nn.init.trunc_normal_(conv.weight, std=INIT_STD)

    def forward(self, feats: Sequence[Tensor]) -> DecoderOutput:
        shallow, second, _, deep = feats
        height, width = (side // self.downsample for side in deep.shape[-2:])
        start = resize(deep, (height, width))
        maps, intermediate, message, outputs = {}, {}, None, []
        for task, preliminary in self.preliminary.items():
            feat = preliminary(start)  # (B, E, h, w)
            intermediate[task] = self.intermediate[task](feat)  # (B, n_t, h, w), raw and with its gradient
            maps[task] = self.mix[task](torch.cat((feat, intermediate[task]), dim=1))
        skips = (None, self.skip_middle(second), self.skip_fine(shallow))
        for stage, skip in zip(self.stages, skips, strict=True):
            maps, message = stage(maps, skip, message)
            outputs.append(maps)
        total = self.aggregate(outputs, (8 * height, 8 * width))
        return DecoderOutput({task: self.project[task](feat) for task, feat in total.items()}, intermediate)
