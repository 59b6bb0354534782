"""BridgeNet: tasks meet in one bridge feature per stage, made by letting the backbone's map query all task maps.

Preliminary decoders make one map per task. Task pattern propagation (TPP) mixes the tasks' attention patterns for
one rough prediction each. Then three stages, each of half the width and twice the grid: the bridge feature extractor
(BFE) lets a backbone map attend to the maps of all tasks, and the task-feature refiner (TFR) feeds the result, the
bridge, into a stack of dilated convolutions of every task. The maps of all stages are summed.
Reference: Zhang et al., "BridgeNet: Comprehensive and Effective Feature Interactions via Bridge Feature for
Multi-Task Dense Predictions", IEEE TPAMI 2025.
The options of `BridgeNetConfig` say where the published models are surprising. Layers of theirs that no output depends
on (a convolution of the finest backbone map, one norm, one set of projections) are left out: that map is not used.

Axes: B batch, T tasks (their order matters), D preliminary width, C stage width, h w first grid, H W grid of the
stage's task maps, H' W' that of its bridge, N heads, Q queries, L keys.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import DropPath
from torch import Tensor, nn

from models.blocks.inverted_pyramid import MultiScaleSum, query_reduction, split_heads, up_embedding
from models.blocks.layers import INIT_STD, ChannelLayerNorm, ChannelMlp, conv_bn_relu
from models.blocks.resize import resize
from models.decoder import BuildContext, Decoder, DecoderOutput
from models.decoders.options import DecoderOptions

NUM_STAGES = 3
CONV_STD = 0.001  # of the initial weights of the stages; linear layers as everywhere
FEW_TASKS, DEPTH_OF_FEW, DEPTH_OF_MANY = 4, 18, 12  # published for NYUD-v2's four and PASCAL-Context's five tasks


@dataclass(frozen=True)
class BridgeNetConfig(DecoderOptions):
    """Options of the decoder. The first three are keys of the published experiment files.

    mtt_resolution_downsample_rate: deepest backbone map / first grid; empty = 2 for a plain ViT, 1 for a pyramid.
    refine_depth: TFR blocks per stage; empty = 18 for up to four tasks, 12 for more, as published.
    attention_scale: `width` divides the scores by the root of the whole width, as the published models do in
    spite of their two heads; `head` is the usual root of a head's width. Not exchangeable in a trained model.
    refine_from: what TFR starts from. In the published code that is the `preliminary` map, so TPP acts through the
    rough predictions alone; `tpp` starts from what TPP has refined, as the paper's text suggests.
    """

    embed_dim: int = 512  # D, width of the preliminary features
    PRED_OUT_NUM_CONSTANT: int = 64  # P: the stages have the widths D + P, (D + P) / 2, (D + P) / 4
    mtt_resolution_downsample_rate: Literal[1, 2, 4] | None = None
    refine_depth: tuple[int, int, int] | None = None
    dilations: tuple[int, ...] = (1, 2, 5)  # of a TFR stack's blocks, repeated
    squeeze_ratio: int = 2  # stage width / width inside a TFR block
    num_heads: int = 2  # of the attention
    mlp_ratio: float = 4.0  # hidden width of an MLP / its width
    attention_scale: Literal["width", "head"] = "width"
    refine_from: Literal["preliminary", "tpp"] = "preliminary"
    drop_path_rate: float = 0.15  # of a TFR stack's last block, rising linearly from 0

    def __post_init__(self):
        self.require_counts("embed_dim", "num_heads", "squeeze_ratio")
        self.require_counts("PRED_OUT_NUM_CONSTANT", least=0)
        self.require(self.refine_depth is None or min(self.refine_depth) >= 1, "refine_depth",
                     "three whole numbers of at least 1, or empty")
        self.require(self.dilations and min(self.dilations) >= 1, "dilations", "one or more numbers of at least 1")
        self.require(0 < self.mlp_ratio < math.inf, "mlp_ratio", "a positive number")
        self.require_rates("drop_path_rate")
        widths = (self.embed_dim, *self.widths)
        self.require(all(width and width % self.num_heads == 0 for width in widths), "num_heads",
                     f"a divisor of the widths {widths}")

    @property
    def widths(self) -> tuple[int, ...]:
        """C of the stages."""
        return tuple((self.embed_dim + self.PRED_OUT_NUM_CONSTANT) // 2**stage for stage in range(NUM_STAGES))

    def scale(self, channels: int) -> float:
        """Factor of the attention scores."""
        return (channels if self.attention_scale == "width" else channels // self.num_heads) ** -0.5


def _tokens(feat: Tensor) -> Tensor:
    return rearrange(feat, "b c h w -> b (h w) c")


class PatternProduction(nn.Module):
    """TPP, first half, of one task: (B, D, h, w) -> scores (B, N, Q, L) before the softmax, values (B, N, L, D / N).

    Q = h/2 w/2. Keys are pooled with their rim: an even side n becomes n/2 + 1, the last window half outside.
    """

    def __init__(self, channels: int, config: BridgeNetConfig):
        super().__init__()
        self.num_heads, self.scale = config.num_heads, config.scale(channels)
        self.norm = ChannelLayerNorm(channels)
        self.query = query_reduction(channels)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))

    def forward(self, feat: Tensor) -> tuple[Tensor, Tensor]:
        feat = self.norm(feat)
        query = _tokens(self.query(feat))  # (B, Q, D)
        keys = _tokens(F.avg_pool2d(feat, kernel_size=3, stride=2, padding=1, ceil_mode=True))  # (B, L, D)
        q, k, v = (split_heads(x, self.num_heads) for x in (self.to_q(query), self.to_k(keys), self.to_v(keys)))
        return q @ k.transpose(-2, -1) * self.scale, v


class PatternFusion(nn.Module):
    """TPP, second half, of one task: its map, the scores of all tasks and its values -> (B, D, h, w)."""

    def __init__(self, num_tasks: int, channels: int, config: BridgeNetConfig):
        super().__init__()
        self.fuse = nn.Conv2d(num_tasks * config.num_heads, config.num_heads, kernel_size=1)
        self.proj = nn.Linear(channels, channels)
        self.norm = ChannelLayerNorm(channels)
        self.mlp = ChannelMlp(channels, int(config.mlp_ratio * channels))

    def forward(self, feat: Tensor, scores: Tensor, value: Tensor) -> Tensor:
        """feat (B, D, h, w), scores (B, T N, Q, L), all of task 0, then task 1, ...; value (B, N, L, D / N)."""
        out = self.fuse(scores).softmax(dim=-1) @ value
        out = self.proj(rearrange(out, "b n q d -> b q (n d)"))  # (B, Q, D)
        height, width = feat.shape[-2:]
        out = rearrange(out, "b (h w) c -> b c h w", h=(height + 1) // 2)
        feat = feat + resize(out, (height, width))
        return feat + self.mlp(self.norm(feat))


class BridgeExtraction(nn.Module):
    """BFE: a backbone map as queries, the maps of all tasks as keys, (B, C, H', W') -> the same shape.

    Keys are pooled to half of the first grid in every stage. The query is not normed.
    """

    def __init__(self, channels: int, stage: int, config: BridgeNetConfig):
        super().__init__()
        self.num_heads, self.pool, self.scale = config.num_heads, 2 ** (stage + 1), config.scale(channels)
        self.norm1 = ChannelLayerNorm(channels)
        self.query = query_reduction(channels)
        self.to_q, self.to_k, self.to_v, self.proj = (nn.Linear(channels, channels) for _ in range(4))
        self.restore = nn.Conv2d(channels, channels, kernel_size=3, padding=1, groups=channels)
        self.norm2 = ChannelLayerNorm(channels)
        self.mlp = ChannelMlp(channels, int(config.mlp_ratio * channels))

    def forward(self, query: Tensor, maps: Mapping[str, Tensor]) -> Tensor:
        pooled = [F.avg_pool2d(self.norm1(feat), self.pool, ceil_mode=True) for feat in maps.values()]
        keys = rearrange(pooled, "t b c h w -> b (t h w) c")  # (B, L, C): all of task 0, then task 1, ...
        reduced = self.query(query)  # (B, C, H'/2, W'/2)
        q, k, v = (split_heads(x, self.num_heads)
                   for x in (self.to_q(_tokens(reduced)), self.to_k(keys), self.to_v(keys)))
        score = q @ k.transpose(-2, -1) * self.scale  # (B, N, Q, L)
        out = self.proj(rearrange(score.softmax(dim=-1) @ v, "b n q d -> b q (n d)"))
        out = rearrange(out, "b (h w) c -> b c h w", h=reduced.shape[-2])
        bridge = query + self.restore(resize(out, query.shape[-2:]))
        return bridge + self.mlp(self.norm2(bridge))


class RefinerBlock(nn.Module):
    """TFR block of one task: a dilated bottleneck on the task's map and the bridge; (B, C, H, W), twice -> once."""

    def __init__(self, channels: int, squeeze_ratio: int, dilation: int, drop_path: float):
        super().__init__()
        inner = channels // squeeze_ratio
        self.layers = nn.Sequential(
            nn.Conv2d(2 * channels, inner, kernel_size=1), nn.BatchNorm2d(inner), nn.GELU(),
            nn.Conv2d(inner, inner, 3, padding=dilation, dilation=dilation, groups=inner, bias=False),
            nn.BatchNorm2d(inner), nn.GELU(), nn.Conv2d(inner, channels, kernel_size=1))
        self.drop_path = DropPath(drop_path)

    def forward(self, feat: Tensor, bridge: Tensor) -> Tensor:
        return feat + self.drop_path(self.layers(torch.cat((feat, bridge), dim=1)))


class BridgeStage(nn.Module):
    """Brings the task maps to this stage's width and grid, makes the bridge, refines every task's map with it."""

    def __init__(self, tasks: Sequence[str], stage: int, in_channels: int, depth: int, config: BridgeNetConfig):
        super().__init__()
        channels, self.up, self.reduce = config.widths[stage], None, None
        if stage:
            coarser = config.widths[stage - 1]
            self.up = nn.ModuleDict({task: up_embedding(coarser, channels) for task in tasks})
            self.reduce = nn.Conv2d(coarser, channels, kernel_size=1)
        self.query = nn.Sequential(nn.Conv2d(in_channels, channels, 1), nn.BatchNorm2d(channels), nn.ReLU())
        self.extract = BridgeExtraction(channels, stage, config)
        rates = torch.linspace(0, config.drop_path_rate, depth, device="cpu").tolist()
        self.refine = nn.ModuleList(
            nn.ModuleDict({task: RefinerBlock(channels, config.squeeze_ratio,
                                              config.dilations[index % len(config.dilations)], rate)
                           for task in tasks})
            for index, rate in enumerate(rates))
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.trunc_normal_(module.weight, std=INIT_STD if isinstance(module, nn.Linear) else CONV_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, maps: dict[str, Tensor], source: Tensor,
                bridge: Tensor | None) -> tuple[dict[str, Tensor], Tensor]:
        """{task: map of the stage before}, backbone map, its bridge -> {task: (B, C, H, W)}, (B, C, H', W').

        The first stage takes its maps as they are, and no bridge.
        """
        if self.up is not None:
            maps = {task: self.up[task](feat) for task, feat in maps.items()}
        extracted = self.extract(self.query(source), maps)
        if self.reduce is not None:
            extracted = extracted + resize(self.reduce(bridge), extracted.shape[-2:])
        size = next(iter(maps.values())).shape[-2:]
        resized = resize(extracted, size)  # the same for all blocks
        for blocks in self.refine:
            maps = {task: blocks[task](feat, resized) for task, feat in maps.items()}
        return maps, extracted


class BridgeNetDecoder(Decoder):
    """Four maps of a plain ViT or of a pyramid to one map per task, and preliminary predictions.

    The order of the tasks is part of the model. Nothing is made of the finest map.
    """

    Config = BridgeNetConfig
    recomputed = (BridgeStage,)
    unread_maps = (0,)
    intermediate_weight = 0.5

    def __init__(self, context: BuildContext, config: BridgeNetConfig):
        super().__init__()
        tasks, strides = context.tasks, context.strides
        plain, doubling = (tuple(strides[0] * factor**level for level in range(4)) for factor in (1, 2))
        context.require_maps(strides in (plain, doubling),
                             "four maps, of one stride as a plain ViT gives or of strides that double", neck="pyramid")
        self.downsample = config.mtt_resolution_downsample_rate or (2 if strides == plain else 1)
        self.input_multiple = strides[3] * self.downsample
        self.refine_from = config.refine_from
        depth = config.refine_depth or (DEPTH_OF_FEW if len(tasks) <= FEW_TASKS else DEPTH_OF_MANY,) * NUM_STAGES
        _, fine, middle, deep = context.channels
        embed, widths = config.embed_dim, config.widths
        self.channels = widths[0]
        self.preliminary = nn.ModuleDict({
            task: nn.Sequential(conv_bn_relu(deep, deep), conv_bn_relu(deep, embed)) for task in tasks})
        self.produce = nn.ModuleDict({task: PatternProduction(embed, config) for task in tasks})
        self.fuse = nn.ModuleDict({task: PatternFusion(len(tasks), embed, config) for task in tasks})
        self.intermediate = nn.ModuleDict({task: nn.Conv2d(embed, n, 1) for task, n in tasks.items()})
        self.mix = nn.ModuleDict({task: nn.Conv2d(embed + n, widths[0], 1) for task, n in tasks.items()})
        self.lateral_middle = nn.Conv2d(middle, widths[0], kernel_size=3, padding=1)
        self.lateral_fine = nn.Conv2d(fine, widths[1], kernel_size=3, padding=1)
        self.stages = nn.ModuleList(
            BridgeStage(list(tasks), stage, channels, depth[stage], config)
            for stage, channels in enumerate((deep, widths[0], widths[1])))
        self.aggregate = MultiScaleSum(list(tasks), widths)
        self.project = nn.ModuleDict({task: conv_bn_relu(widths[0], widths[0], bias=True) for task in tasks})
        for conv, *_ in self.project.values():
            nn.init.trunc_normal_(conv.weight, std=INIT_STD)

    def forward(self, feats: Sequence[Tensor]) -> DecoderOutput:
        _, fine, middle, deep = feats
        height, width = (side // self.downsample for side in deep.shape[-2:])
        start = resize(deep, (height, width))
        maps, intermediate = self._preliminary({task: layers(start) for task, layers in self.preliminary.items()})
        sources, bridge, outputs = (deep, self.lateral_middle(middle), self.lateral_fine(fine)), None, []
        for stage, source in zip(self.stages, sources, strict=True):
            maps, bridge = stage(maps, source, bridge)
            outputs.append(maps)
        total = self.aggregate(outputs, (8 * height, 8 * width))
        return DecoderOutput({task: self.project[task](feat) for task, feat in total.items()}, intermediate)

    def _preliminary(self, maps: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """{task: (B, D, h, w)} -> the first stage's maps (B, C, h, w), raw predictions (B, n_t, h, w)."""
        patterns = {task: self.produce[task](feat) for task, feat in maps.items()}
        scores = torch.cat([score for score, _ in patterns.values()], dim=1)  # (B, T N, Q, L)
        mixed, intermediate = {}, {}
        for task, feat in maps.items():
            refined = self.fuse[task](feat, scores, patterns[task][1]) + feat  # a second time: fusion has added it
            intermediate[task] = self.intermediate[task](refined)
            begin = feat if self.refine_from == "preliminary" else refined
            mixed[task] = self.mix[task](torch.cat((begin, intermediate[task]), dim=1))
        return mixed, intermediate
