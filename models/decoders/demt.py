"""DeMT: a decoder whose tasks look at one shared map through deformable mixers and then query each other.

All maps of the backbone are brought to the finest size and reduced to C channels. Per task a deformable mixer
resamples every channel at displacements of its own. A task interaction block joins the tasks' tokens, and each
task queries the joined tokens, pixel by pixel, for what the other tasks know there.
Reference: Xu, Yang and Zhang, "DeMT: Deformable Mixer Transformer for Multi-Task Learning of Dense Prediction",
AAAI 2023. The published program differs from the text:

- No attention runs between pixels. As published it runs over the images of the batch (see
  `DeMTConfig.attention`), which no reader of the paper expects.
- Displacements are made from absolute pixel coordinates, so they depend on the place and on the map's size.
- The first half of the channels gets both components of its displacement from the row coordinates, the second
  half from the column coordinates: the convolution writes all rows first, the sampling reads pairs.
- In the mixer's channel step the activation comes before the norm.

Axes: B batch, T tasks (their order does not matter), K channels of all maps together, C width, N heads,
h w size of the finest map, P = h w; in attention G independent groups of L queries and S keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from models.blocks.deformable_conv import NOT_RECORDED
from models.blocks.layers import conv_bn_relu, without_autocast
from models.blocks.resize import concat_at_finest
from models.decoder import BuildContext, Decoder, DecoderOutput
from models.decoders.options import DecoderOptions

MIXER_ORDERS = ("channel_first", "spatial_first")
NEIGHBOURS = 9  # of the 3 x 3 window whose coordinates the displacements are made from
REDUCTION = 8  # the task features have floor(K / 8) channels


@dataclass(frozen=True)
class DeMTConfig(DecoderOptions):
    """Options of the decoder.

    mixer_order: `channel_first` mixes channels, then samples, as the paper and the program since March 2023;
    `spatial_first` the other way round, as all released checkpoints. `auto` is channel first in a new model and
    otherwise what the loaded weights were trained with; they know it.
    attention: `per_sample` treats every image as if it were alone; `batch` attends over all images of a batch,
    as the published program does, where the prediction of an image depends on its neighbours in the batch. The
    two are the same for batches of one, which the published runs had on each of 8 processes.
    """

    dim: int = 256  # C, width of the tokens; the published HRNet-18 models have 128
    num_heads: int = 4  # N, of the attention
    mixer_depth: int = 1  # blocks of each task's mixer
    mixer_order: Literal["auto", "channel_first", "spatial_first"] = "auto"
    attention: Literal["per_sample", "batch"] = "per_sample"

    def __post_init__(self):
        self.require_counts("dim", "num_heads", "mixer_depth")
        self.require(self.dim % self.num_heads == 0, "num_heads", f"a divisor of dim = {self.dim}")


class DeformableConv(nn.Module):
    """1 x 1 convolution that reads every input channel at a displaced place of its own; (B, C, h, w) to the same.

    Sampling is bilinear with zeros outside the map. In float32 whatever the precision of the rest: coordinates
    reach 140, where bfloat16 is a whole pixel apart.
    """

    not_recorded = NOT_RECORDED  # see `utils.recording.reason_against`

    def __init__(self, channels: int):
        super().__init__()
        self.reduce = nn.Conv2d(channels, 2 * NEIGHBOURS, kernel_size=3, padding=1)
        nn.init.zeros_(self.reduce.weight)
        self.spread = nn.Conv2d(2 * NEIGHBOURS, 2 * channels, kernel_size=3, padding=1, groups=2)
        self.conv = nn.Conv2d(channels, channels, kernel_size=1)

    def forward(self, feat: Tensor) -> Tensor:
        with without_autocast(feat):
            feat = feat.to(self.conv.weight.dtype)
            offset = self.spread(self.reduce(feat) + window_coordinates(feat))  # (B, 2 C, h, w): dy, dx, dy, dx, ..
            return deform_conv2d(feat, offset, self.conv.weight, self.conv.bias)


def window_coordinates(feat: Tensor) -> Tensor:
    """(1, 18, h, w): rows, then columns, of the 3 x 3 window around each pixel, counted from 1."""
    height, width = feat.shape[-2:]
    step, y, x = (torch.arange(first, end, device=feat.device, dtype=feat.dtype)
                  for first, end in ((-1, 2), (1, height + 1), (1, width + 1)))
    window = torch.cartesian_prod(step, step).T.reshape(2, NEIGHBOURS, 1, 1)  # (dy, dx), row-major
    pixels = torch.stack(torch.meshgrid(y, x, indexing="ij"))[:, None]  # (2, 1, h, w)
    return (window + pixels).flatten(0, 1)[None]


class MixerBlock(nn.Module):
    """One block of a deformable mixer: a step over channels and a residual step over space, in either order."""

    def __init__(self, channels: int):
        super().__init__()
        self.channel = nn.Sequential(nn.Conv2d(channels, channels, kernel_size=1), nn.GELU(), nn.BatchNorm2d(channels))
        self.deform = DeformableConv(channels)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, feat: Tensor, spatial_first: bool) -> Tensor:
        return self.channel(self._spatial(feat)) if spatial_first else self._spatial(self.channel(feat))

    def _spatial(self, feat: Tensor) -> Tensor:
        return feat + self.norm(F.gelu(self.deform(feat)))


class GroupAttention(nn.Module):
    """Multi-head attention inside many small groups: queries (G, L, C), memory (G, S, C) -> (G, L, C)."""

    def __init__(self, channels: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv, self.proj = nn.Linear(channels, 3 * channels), nn.Linear(channels, channels)
        nn.init.xavier_uniform_(self.qkv.weight)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.proj.bias)

    def forward(self, query: Tensor, memory: Tensor) -> Tensor:
        (q_weight, k_weight, v_weight), (q_bias, k_bias, v_bias) = self.qkv.weight.chunk(3), self.qkv.bias.chunk(3)
        value = F.linear(memory, v_weight, v_bias)  # (G, S, C)
        if memory.shape[1] == 1:  # the softmax over a single key is 1, whatever query and key are
            return self.proj(value.expand_as(query))
        q, k, v = (rearrange(tokens, "g l (n d) -> g n l d", n=self.num_heads) for tokens in
                   (F.linear(query, q_weight, q_bias), F.linear(memory, k_weight, k_bias), value))
        score = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5  # (G, N, L, S)
        return self.proj(rearrange(score.softmax(dim=-1) @ v, "g n l d -> g l (n d)"))


class TaskInteraction(nn.Module):
    """Tokens of all tasks (T, B, P, C) -> the same shape. Per image no token sees another one."""

    def __init__(self, channels: int, config: DeMTConfig):
        super().__init__()
        self.group = "(t b p) 1 c" if config.attention == "per_sample" else "(t p) b c"
        self.attention = GroupAttention(channels, config.num_heads)
        self.out = nn.Sequential(nn.Linear(channels, channels), nn.LayerNorm(channels))

    def forward(self, tokens: Tensor) -> Tensor:
        tasks, batch, pixels, _ = tokens.shape
        groups = rearrange(tokens, f"t b p c -> {self.group}")
        mixed = self.out(self.attention(groups, groups))
        return rearrange(mixed, f"{self.group} -> t b p c", t=tasks, b=batch, p=pixels)


class TaskQuery(nn.Module):
    """One task's tokens (B, P, C) ask the joined tokens (T, B, P, C) of the same pixel -> (B, P, C)."""

    def __init__(self, channels: int, config: DeMTConfig):
        super().__init__()
        per_sample = config.attention == "per_sample"
        self.group, self.memory = ("(b p) 1 c", "(b p) t c") if per_sample else ("p b c", "p (t b) c")
        self.attention = GroupAttention(channels, config.num_heads)
        self.out = nn.Sequential(nn.Linear(channels, channels), nn.LayerNorm(channels))

    def forward(self, tokens: Tensor, joined: Tensor) -> Tensor:
        batch, pixels, _ = tokens.shape
        query, memory = rearrange(tokens, f"b p c -> {self.group}"), rearrange(joined, f"t b p c -> {self.memory}")
        answer = rearrange(self.attention(query, memory), f"{self.group} -> b p c", b=batch, p=pixels)
        return tokens + self.out(answer)


class DeMTDecoder(Decoder):
    """Maps of any number, width and stride, finest first, to one map (B, K / 8, h, w) per task.

    The state dict holds the order of the mixers beside the weights, which mean nothing in the other order.
    """

    Config = DeMTConfig
    recomputed = (MixerBlock, TaskInteraction, TaskQuery)
    input_multiple = 1  # every size the backbone takes
    logit_std = 0.01

    def __init__(self, context: BuildContext, config: DeMTConfig):
        super().__init__()
        tasks, width, dim = context.tasks, sum(context.channels), config.dim
        context.require_maps(width >= REDUCTION, f"maps of {REDUCTION} or more channels together")
        self.channels = width // REDUCTION
        self.asked_order = config.mixer_order
        self.mixer_order = MIXER_ORDERS[0] if config.mixer_order == "auto" else config.mixer_order
        self.fuse = nn.Sequential(nn.Linear(width, dim), nn.LayerNorm(dim))
        self.mixers = nn.ModuleDict({
            task: nn.ModuleList(MixerBlock(dim) for _ in range(config.mixer_depth)) for task in tasks})
        self.interaction = TaskInteraction(dim, config)
        self.queries = nn.ModuleDict({task: TaskQuery(dim, config) for task in tasks})
        self.project = nn.ModuleDict({task: conv_bn_relu(dim, self.channels) for task in tasks})

    def forward(self, feats: Sequence[Tensor]) -> DecoderOutput:
        fused = self.fuse(rearrange(concat_at_finest(feats), "b k h w -> b h w k"))  # (B, h, w, C)
        height, spatial_first = fused.shape[1], self.mixer_order == "spatial_first"
        mixed = []
        for blocks in self.mixers.values():
            feat = rearrange(fused, "b h w c -> b c h w")
            for block in blocks:
                feat = block(feat, spatial_first)
            mixed.append(rearrange(feat, "b c h w -> b (h w) c"))
        joined = self.interaction(torch.stack(mixed))  # (T, B, P, C)
        out = {}
        for (task, query), tokens in zip(self.queries.items(), mixed, strict=True):
            out[task] = self.project[task](rearrange(query(tokens, joined), "b (h w) c -> b c h w", h=height))
        return DecoderOutput(out)

    def get_extra_state(self) -> Tensor:
        """The order of the mixers, as its number: part of the state dict."""
        return torch.tensor(MIXER_ORDERS.index(self.mixer_order), device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Takes over the order that loaded weights were trained with; ValueError where another one was asked for."""
        held = MIXER_ORDERS[int(state)]
        if self.asked_order not in ("auto", held):
            raise ValueError(f"model_kwargs.mixer_order {self.asked_order} does not suit these weights: their mixers "
                             f"are {held}; leave it out or set it to auto")
        self.mixer_order = held
