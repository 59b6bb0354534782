"""MLoRE: task features from a mixture of low-rank experts that all tasks share, chosen per image and task.

Every tap of a plain ViT goes through two MLoRE modules in sequence. A module adds three linear paths per task: the
gated sum of shared low-rank convolutions, one low-rank convolution of the task's own, and one full convolution
common to all tasks, which models their global relation. As all of it is linear between the gates and the
activation, the three paths and two norms fold into one 3 x 3 convolution per image and task for inference
(`reparameterise`). The maps of the taps are then mixed per pixel.
Reference: Yang et al., "Multi-Task Dense Prediction via Mixture of Low-Rank Experts", CVPR 2024.
The published models differ from the text in a learned, unbounded factor of the task's own expert and in the order of
norm, GELU and 1 x 1 convolution.

Axes: B batch, T tasks, C `final_embed_dim`, h w grid of the ViT, N = h w, E experts, k kept ones. The maps of all tasks
are one tensor (B, T C, h, w); what all tasks share sees it as (B T, C, h, w).
"""

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from losses.load_balancing import load_balancing_loss
from models.blocks.layers import INIT_STD, without_autocast
from models.blocks.mlore import LowRankExperts, OwnExperts, UpsampledConv
from models.blocks.stacked import TaskConv, TaskLayerNorm, TaskLinear, by_task
from models.decoder import BuildContext, Decoder, DecoderOutput
from models.decoders.options import DecoderOptions

HEAD_SCALE = 4  # the head works at a quarter of the ViT's stride

# First rank, last rank and step: of the published models by their width; of the paper for any other.
PUBLISHED_RANKS = {192: (8, 64, 4), 768: (16, 240, 16)}
PAPER_RANKS = (16, 128, 8)


@dataclass(frozen=True)
class MLoREConfig(DecoderOptions):
    """Options of the decoder. The first five are keys of the published experiment files.

    pre_softmax: True drops experts before the softmax, so that the gates of the kept ones sum to 1 (published for
    NYUD-v2); False drops them after it, without normalising again (published for PASCAL-Context).
    rank_list: one rank per expert; empty takes those of the published model of this width.
    load_balancing_weight: factor of the balancing loss, summed over all modules.
    fold: whether `infer` and `predict` fold the modules, which takes room for 9 C^2 (E + T + 1) numbers per module.
    """

    final_embed_dim: int = 640  # C, width of every task's maps
    topk: int = 9  # k, experts that are kept for an image and task
    spe_rank: int = 64  # rank of the task's own expert
    pre_softmax: bool = False
    rank_list: tuple[int, ...] = ()
    load_balancing_weight: float = 1e-4
    fold: bool = True

    def __post_init__(self):
        self.require(self.final_embed_dim >= 4 and self.final_embed_dim % 4 == 0, "final_embed_dim", "a multiple of 4")
        self.require(len(self.ranks) >= 2 and min(self.ranks) >= 1, "rank_list", "two or more ranks of at least 1")
        self.require(1 <= self.topk <= len(self.ranks), "topk",
                     f"1 to {len(self.ranks)}, the number of experts in rank_list")
        self.require_counts("spe_rank")
        self.require(0 <= self.load_balancing_weight < math.inf, "load_balancing_weight", "a number of at least 0")

    @property
    def ranks(self) -> tuple[int, ...]:
        """One per expert."""
        first, last, step = PUBLISHED_RANKS.get(self.final_embed_dim, PAPER_RANKS)
        return self.rank_list or tuple(range(first, last + 1, step))


class Router(nn.Module):
    """From each task's map to its gates: (B, T C, h, w) -> gates (T, B, E), factor of the task's own expert (T, B, 1).

    Two summaries of the map, the mean of projected pixels and a learned sum over the N positions, give E logits,
    E scales of the noise that training adds to them, and the factor. Scales and factor are used as they are: no
    activation, any sign.
    """

    def __init__(self, num_tasks: int, config: MLoREConfig, positions: int):
        super().__init__()
        channels, quarter, self.num_experts = config.final_embed_dim, config.final_embed_dim // 4, len(config.ranks)
        self.num_tasks, self.keep, self.mask_first = num_tasks, config.topk, config.pre_softmax
        self.pixel_in = TaskLinear(num_tasks, channels, quarter)
        self.pixel_norm = TaskLayerNorm(num_tasks, quarter)
        self.pixel_out = TaskLinear(num_tasks, quarter, quarter)
        self.pool = TaskLinear(num_tasks, positions, 1)
        nn.init.trunc_normal_(self.pool.weight, std=INIT_STD)
        nn.init.zeros_(self.pool.bias)
        self.pool_norm = TaskLayerNorm(num_tasks, channels)
        self.pool_out = TaskLinear(num_tasks, channels, quarter)
        self.logits = TaskLinear(num_tasks, 2 * quarter, 2 * self.num_experts + 1)

    def forward(self, feat: Tensor) -> tuple[Tensor, Tensor]:
        pixels = rearrange(feat, "b (t c) h w -> t b (h w) c", t=self.num_tasks)
        if pixels.shape[2] != self.pool.in_features:
            raise ValueError(f"its routers weigh {self.pool.in_features} positions one by one but got a map of "
                             f"{pixels.shape[2]}")
        mean = F.gelu(self.pixel_norm(self.pixel_in(pixels))).mean(dim=2)  # (T, B, C/4): before the layer, cheaper
        pooled = self.pool(pixels.mT).squeeze(-1)  # (T, B, C)
        summary = torch.cat((self.pixel_out(mean), self.pool_out(F.gelu(self.pool_norm(pooled)))), dim=2)  # (T, B, C/2)
        logits = self.logits(summary)  # (T, B, 2E + 1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        scores, noise_scale, factor = logits.split((self.num_experts, self.num_experts, 1), dim=2)
        if self.training:
            scores = torch.addcmul(scores, self.draw_noise(scores), noise_scale)
        return self._gates(scores), factor

    def draw_noise(self, scores: Tensor) -> Tensor:
        """Standard normal numbers (T, B, E)."""
        return torch.randn_like(scores)

    def _gates(self, scores: Tensor) -> Tensor:
        kept = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(self.keep, dim=-1).indices, True)
        if self.mask_first:
            return scores.masked_fill(~kept, -torch.inf).softmax(dim=-1)
        return scores.softmax(dim=-1) * kept


class MLoREModule(nn.Module):
    """One mixture: maps (B, T C, h, w), or one for all tasks (B, C, h, w) -> (B, T C, h, w), and gates (T, B, E).

    The common convolution `generic` learns from the tasks' maps but sends no gradient back into them.
    """

    def __init__(self, tasks: Sequence[str], config: MLoREConfig, positions: int):
        super().__init__()
        self.num_tasks, channels = len(tasks), config.final_embed_dim
        self.proj_in = TaskConv(self.num_tasks, channels, channels, 1)
        self.router = Router(self.num_tasks, config, positions)
        self.experts = LowRankExperts(channels, config.ranks)
        self.own_expert = OwnExperts(self.num_tasks, channels, config.spe_rank)
        self.generic = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.mixture_norm = nn.BatchNorm2d(self.num_tasks * channels)
        self.norm = nn.BatchNorm2d(self.num_tasks * channels)
        self.proj_out = TaskConv(self.num_tasks, channels, channels, 1)
        by_task(self, tasks, "proj_in", "router", "own_expert", "mixture_norm", "norm", "proj_out")
        self.folded: FoldedPaths | None = None
        self.register_load_state_dict_post_hook(MLoREModule._unfold)

    def train(self, mode: bool = True) -> "MLoREModule":
        if mode:
            self._unfold()
        return super().train(mode)

    def _unfold(self, *_) -> None:
        """Folded kernels belong to the weights they were made of."""
        self.folded = None

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        inner = self.proj_in(maps)
        gates, factor = self.router(inner)
        paths = self._three_paths if self.folded is None else self.folded
        return self.proj_out(F.gelu(paths(inner, gates, factor))), gates

    def _three_paths(self, inner: Tensor, gates: Tensor, factor: Tensor) -> Tensor:
        single = inner.unflatten(1, (self.num_tasks, -1)).flatten(0, 1)  # (B T, C, h, w)
        mixture = self.experts(single, rearrange(gates, "t b e -> (b t) e")).view_as(inner)
        generic = self.generic(single.detach()).view_as(inner)
        own = self.own_expert(inner, rearrange(factor, "t b 1 -> b t"))
        return self.norm(self.mixture_norm(mixture) + own + generic)


class FoldedPaths(nn.Module):
    """The three paths of a module and both norms as one 3 x 3 convolution per image and task, in eval mode.

    A kernel is a weighted sum of E + T + 1 kernels: experts, own experts, generic path. Both norms only scale its
    output channels, so one product over that sum, for each output channel, makes the kernels of all tasks and images.
    Dropped experts have weight 0. The tensors here follow from the weights and are not part of the state dict.
    """

    @torch.no_grad()
    def __init__(self, module: MLoREModule):
        super().__init__()
        self.num_tasks = module.num_tasks
        pairs = [module.experts.kernels(), module.own_expert.kernels(),
                 (module.generic.weight[None], module.generic.bias[None])]
        kernels, biases = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        self._keep("kernels", rearrange(kernels, "n o c u v -> o n (c u v)").contiguous())  # n = E + T + 1
        self._keep("biases", rearrange(biases, "n o -> o n"))
        (inside_scale, inside_shift), (scale, shift) = _affine(module.mixture_norm), _affine(module.norm)
        for name, value in (("mixture_scale", inside_scale * scale), ("scale", scale),
                            ("shift", inside_shift * scale + shift)):
            self._keep(name, value.unflatten(0, (self.num_tasks, -1)))  # (T, C)

    def _keep(self, name: str, value: Tensor) -> None:
        self.register_buffer(name, value, persistent=False)

    def forward(self, inner: Tensor, gates: Tensor, factor: Tensor) -> Tensor:
        kernels, biases = self.mixed(gates, factor)
        samples = rearrange(inner, "b (t c) h w -> (t b) 1 c h w", t=self.num_tasks)
        maps = [F.conv2d(sample, kernel, bias.to(kernel.dtype), padding=1)
                for sample, kernel, bias in zip(samples, kernels, biases, strict=True)]
        return rearrange(torch.cat(maps), "(t b) c h w -> b (t c) h w", t=self.num_tasks)

    def mixed(self, gates: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
        """gates (T, B, E), factor (T, B, 1) -> kernels (T B, C, C, 3, 3), biases (T B, C), task by task."""
        weights = torch.cat([self._weights(index, *route) for index, route in
                             enumerate(zip(gates, factor, strict=True))], dim=1)
        shift = self.shift.repeat_interleave(gates.shape[1], dim=0)  # (T B, C)
        with without_autocast(weights):  # the sum is exact in mixed precision, too
            kernels = weights @ self.kernels  # (C, T B, 9 C)
            biases = einsum(weights, self.biases, "o b n, o n -> b o") + shift
        return rearrange(kernels, "o b (c u v) -> b o c u v", u=3, v=3), biases

    def _weights(self, index: int, gates: Tensor, factor: Tensor) -> Tensor:
        """(C, B, E + T + 1): the share of every kernel in the output channels of this task."""
        others = factor.new_zeros(factor.shape[0], self.num_tasks + 1)  # (B, T + 1)
        others[:, index], others[:, -1] = factor[:, 0], 1
        parts = (einsum(self.mixture_scale[index], gates, "o, b e -> o b e"),
                 einsum(self.scale[index], others, "o, b n -> o b n"))
        return torch.cat(parts, dim=2).to(self.kernels.dtype)


def _affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """(T C,) scale and shift that the norm applies in eval mode."""
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    return scale, norm.bias - norm.running_mean * scale


class MLoREDecoder(Decoder):
    """Maps of one stride, one per tap, to one map (B, C, h, w) per task.

    The routers weigh every position, so that the module belongs to images of one size.
    """

    Config = MLoREConfig
    recomputed = (MLoREModule,)

    def __init__(self, context: BuildContext, config: MLoREConfig):
        super().__init__()
        tasks, widths, (stride, *others) = list(context.tasks), context.channels, context.strides
        context.require_maps(all(other == stride for other in others), "maps of one stride, as a plain ViT gives",
                             neck="one_stride")
        self.channels = config.final_embed_dim
        self.weight, self.fold = config.load_balancing_weight, config.fold
        positions = math.prod(side // stride for side in context.image_size)
        self.tap_proj = nn.ModuleList(nn.Conv2d(width, self.channels, 1) for width in widths)
        self.first, self.second = (nn.ModuleList(MLoREModule(tasks, config, positions) for _ in widths)
                                   for _ in range(2))
        self.tasks, taps, width = tuple(tasks), len(widths), len(tasks) * self.channels
        self.mix = by_task(nn.Sequential(  # (B, T taps C, h, w) -> logits (B, T taps, h, w)
            TaskConv(len(tasks), taps * self.channels, self.channels, 1), nn.BatchNorm2d(width), nn.GELU(),
            TaskConv(len(tasks), self.channels, taps, 3)), tasks)

    @classmethod
    def backbone_options(cls, tasks: Mapping[str, int], config: MLoREConfig) -> dict[str, Any]:
        return {"class_token": False}  # the published ViT has none

    def forward(self, feats: Sequence[Tensor]) -> DecoderOutput:
        levels, gates = [], []
        for proj, first, second, feat in zip(self.tap_proj, self.first, self.second, feats, strict=True):
            maps, first_gates = first(proj(feat))
            maps, second_gates = second(maps)
            levels.append(maps.unflatten(1, (len(self.tasks), -1)))
            gates += [first_gates, second_gates]
        share = self.mix(torch.stack(levels, dim=2).flatten(1, 3))  # (B, T taps, h, w)
        share = share.unflatten(1, (len(self.tasks), -1)).softmax(dim=2).unsqueeze(3)  # (B, T, taps, 1, h, w)
        fused = share[:, :, 0] * levels[0]
        for index, level in enumerate(levels[1:], start=1):
            fused = torch.addcmul(fused, share[:, :, index], level)  # (B, T, C, h, w)
        balance = load_balancing_loss([[layer.flatten(0, 1)] for layer in gates])
        maps = dict(zip(self.tasks, fused.unbind(1), strict=True))
        return DecoderOutput(maps, extra={"load_balancing": self.weight * balance})

    def reparameterise(self) -> None:
        """Folds every module for inference: the same outputs in eval mode, fewer products.

        Only with the option `fold`. Loading weights or changing to training mode undoes it.
        """
        assert not self.training, "reparameterise() folds running statistics: call eval() first"
        for module in (*self.first, *self.second) if self.fold else ():
            module.folded = FoldedPaths(module)

    def make_head(self, num_outputs: int) -> nn.Module:
        """Convolution, norm, GELU, linear layer at a quarter of the stride: (B, C, h, w) -> (B, n, 4 h, 4 w)."""
        head = nn.Sequential(OrderedDict(
            conv=UpsampledConv(self.channels, self.channels, HEAD_SCALE), norm=nn.BatchNorm2d(self.channels),
            activation=nn.GELU(), proj=nn.Conv2d(self.channels, num_outputs, kernel_size=1)))
        nn.init.trunc_normal_(head.conv.weight, std=INIT_STD)
        nn.init.normal_(head.proj.bias, std=INIT_STD)
        return head
