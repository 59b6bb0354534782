"""MLoRE: task features from a mixture of low-rank experts that all tasks share, chosen per image and task.

Every tap of a plain ViT goes through two MLoRE modules in sequence. A module adds three linear paths per task: the
gated sum of shared low-rank convolutions, one low-rank convolution of the task's own, and one full convolution
common to all tasks, which models their global relation. As all of it is linear between the gates and the
activation, the three paths and two norms fold into one 3 x 3 convolution per image and task for inference
(`reparameterise`). The maps of the taps are then mixed per pixel.
Reference: Yang et al., "Multi-Task Dense Prediction via Mixture of Low-Rank Experts", CVPR 2024.
The published models differ from the text in a learned, unbounded factor of the task's own expert and in the order of
norm, GELU and 1 x 1 convolution.

Axes: B batch, T tasks, C `final_embed_dim`, h w grid of the ViT, N = h w, E experts, k kept ones.
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
from models.blocks.mlore import LowRankExperts, UpsampledConv
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

    final_embed_dim: int = 640  # C
    topk: int = 9  # k
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
    """From a task's map to its gates: (B, C, h, w) -> gates (B, E), factor of the task's own expert (B, 1).

    Two summaries of the map, the mean of projected pixels and a learned sum over the N positions, give E logits,
    E scales of the noise that training adds to them, and the factor. Scales and factor are used as they are: no
    activation, any sign.
    """

    def __init__(self, config: MLoREConfig, positions: int):
        super().__init__()
        channels, quarter, self.num_experts = config.final_embed_dim, config.final_embed_dim // 4, len(config.ranks)
        self.keep, self.mask_first = config.topk, config.pre_softmax
        self.pixel_in = nn.Linear(channels, quarter)
        self.pixel_norm = nn.LayerNorm(quarter)
        self.pixel_out = nn.Linear(quarter, quarter)
        self.pool = nn.Linear(positions, 1)
        nn.init.trunc_normal_(self.pool.weight, std=INIT_STD)
        nn.init.zeros_(self.pool.bias)
        self.pool_norm = nn.LayerNorm(channels)
        self.pool_out = nn.Linear(channels, quarter)
        self.logits = nn.Linear(2 * quarter, 2 * self.num_experts + 1)

    def forward(self, feat: Tensor) -> tuple[Tensor, Tensor]:
        pixels = rearrange(feat, "b c h w -> b (h w) c")
        mean = F.gelu(self.pixel_norm(self.pixel_in(pixels))).mean(dim=1)  # (B, C/4): before the linear layer, cheaper
        pooled = self.pool(rearrange(feat, "b c h w -> b c (h w)")).squeeze(-1)  # (B, C)
        summary = torch.cat((self.pixel_out(mean), self.pool_out(F.gelu(self.pool_norm(pooled)))), dim=1)  # (B, C/2)
        logits = self.logits(summary)  # (B, 2E + 1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        scores, noise_scale, factor = logits.split((self.num_experts, self.num_experts, 1), dim=1)
        if self.training:
            scores = scores + self.draw_noise(scores) * noise_scale
        return self._gates(scores), factor

    def draw_noise(self, scores: Tensor) -> Tensor:
        """Standard normal numbers (B, E)."""
        return torch.randn_like(scores)

    def _gates(self, scores: Tensor) -> Tensor:
        kept = torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.topk(self.keep, dim=1).indices, True)
        if self.mask_first:
            return scores.masked_fill(~kept, -torch.inf).softmax(dim=1)
        return scores.softmax(dim=1) * kept


class MLoREModule(nn.Module):
    """One mixture: {task: (B, C, h, w)} -> the same shapes, and {task: gates (B, E)}.

    The common convolution `generic` learns from the tasks' maps but sends no gradient back into them.
    """

    def __init__(self, tasks: Sequence[str], config: MLoREConfig, positions: int):
        super().__init__()
        channels = config.final_embed_dim
        self.proj_in = nn.ModuleDict({task: nn.Conv2d(channels, channels, 1) for task in tasks})
        self.router = nn.ModuleDict({task: Router(config, positions) for task in tasks})
        self.experts = LowRankExperts(channels, config.ranks)
        self.own_expert = nn.ModuleDict(
            {task: LowRankExperts(channels, (config.spe_rank,), zero_bias=False) for task in tasks})
        self.generic = nn.Conv2d(channels, channels, kernel_size=3, padding=1)
        self.mixture_norm = nn.ModuleDict({task: nn.BatchNorm2d(channels) for task in tasks})
        self.norm = nn.ModuleDict({task: nn.BatchNorm2d(channels) for task in tasks})
        self.proj_out = nn.ModuleDict({task: nn.Conv2d(channels, channels, 1) for task in tasks})
        self.folded: FoldedPaths | None = None
        self.register_load_state_dict_post_hook(MLoREModule._unfold)

    def train(self, mode: bool = True) -> "MLoREModule":
        if mode:
            self._unfold()
        return super().train(mode)

    def _unfold(self, *_) -> None:
        """Folded kernels belong to the weights they were made of."""
        self.folded = None

    def forward(self, maps: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        inner = {task: self.proj_in[task](feat) for task, feat in maps.items()}
        routes = {task: self.router[task](feat) for task, feat in inner.items()}
        gates = {task: gate for task, (gate, _) in routes.items()}
        paths = self._three_paths if self.folded is None else self.folded
        summed = paths(inner, routes)
        return {task: self.proj_out[task](F.gelu(feat)) for task, feat in summed.items()}, gates

    def _three_paths(self, inner: dict[str, Tensor], routes: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        stacked = torch.cat(list(inner.values()))  # (T B, C, h, w): all of task 0, then task 1, ...
        mixture = self.experts(stacked, torch.cat([gate for gate, _ in routes.values()])).chunk(len(inner))
        generic = self.generic(stacked.detach()).chunk(len(inner))
        out = {}
        for (task, feat), mixed, common in zip(inner.items(), mixture, generic, strict=True):
            own = self.own_expert[task](feat, routes[task][1])
            out[task] = self.norm[task](self.mixture_norm[task](mixed) + own + common)
        return out


class FoldedPaths(nn.Module):
    """The three paths of a module and both norms as one 3 x 3 convolution per image and task, in eval mode.

    A kernel is a weighted sum of E + T + 1 kernels: experts, own experts, generic path. Both norms only scale its
    output channels, so one product over that sum, for each output channel, makes the kernels of all tasks and images.
    Dropped experts have weight 0. The tensors here follow from the weights and are not part of the state dict.
    """

    @torch.no_grad()
    def __init__(self, module: MLoREModule):
        super().__init__()
        pairs = [module.experts.kernels(), *(own.kernels() for own in module.own_expert.values()),
                 (module.generic.weight[None], module.generic.bias[None])]
        kernels, biases = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        self._keep("kernels", rearrange(kernels, "n o c u v -> o n (c u v)").contiguous())  # n = E + T + 1
        self._keep("biases", rearrange(biases, "n o -> o n"))
        norms = [(_affine(module.mixture_norm[task]), _affine(module.norm[task])) for task in module.norm]
        self._keep("mixture_scale", torch.stack([inside[0] * after[0] for inside, after in norms]))  # (T, C)
        self._keep("scale", torch.stack([after[0] for _, after in norms]))
        self._keep("shift", torch.stack([inside[1] * after[0] + after[1] for inside, after in norms]))

    def _keep(self, name: str, value: Tensor) -> None:
        self.register_buffer(name, value, persistent=False)

    def forward(self, inner: dict[str, Tensor], routes: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
        kernels, biases = self.mixed(list(routes.values()))
        samples = torch.cat(list(inner.values())).split(1)  # T B maps (1, C, h, w): all of task 0, then task 1, ...
        maps = [F.conv2d(sample, kernel, bias.to(kernel.dtype), padding=1)
                for sample, kernel, bias in zip(samples, kernels, biases, strict=True)]
        return dict(zip(inner, torch.cat(maps).chunk(len(inner)), strict=True))

    def mixed(self, routes: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """[(gates (B, E), factor (B, 1)) per task] -> kernels (T B, C, C, 3, 3), biases (T B, C)."""
        weights = torch.cat([self._weights(index, *route) for index, route in enumerate(routes)], dim=1)
        shift = self.shift.repeat_interleave(len(routes[0][0]), dim=0)  # (T B, C)
        with without_autocast(weights):  # the sum is exact in mixed precision, too
            kernels = weights @ self.kernels  # (C, T B, 9 C)
            biases = einsum(weights, self.biases, "o b n, o n -> b o") + shift
        return rearrange(kernels, "o b (c u v) -> b o c u v", u=3, v=3), biases

    def _weights(self, index: int, gates: Tensor, factor: Tensor) -> Tensor:
        """(C, B, E + T + 1): the share of every kernel in the output channels of this task."""
        others = factor.new_zeros(len(factor), len(self.scale) + 1)  # (B, T + 1)
        others[:, index], others[:, -1] = factor[:, 0], 1
        parts = (einsum(self.mixture_scale[index], gates, "o, b e -> o b e"),
                 einsum(self.scale[index], others, "o, b n -> o b n"))
        return torch.cat(parts, dim=2).to(self.kernels.dtype)


def _affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """(C,) scale and shift that the norm applies in eval mode."""
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
        taps = len(widths)
        self.mix = nn.ModuleDict({  # (B, taps * C, h, w) -> logits (B, taps, h, w)
            task: nn.Sequential(nn.Conv2d(taps * self.channels, self.channels, kernel_size=1),
                                nn.BatchNorm2d(self.channels), nn.GELU(),
                                nn.Conv2d(self.channels, taps, kernel_size=3, padding=1)) for task in tasks})

    @classmethod
    def backbone_options(cls, tasks: Mapping[str, int], config: MLoREConfig) -> dict[str, Any]:
        return {"class_token": False}  # the published ViT has none

    def forward(self, feats: Sequence[Tensor]) -> DecoderOutput:
        levels, gates = [], []
        for proj, first, second, feat in zip(self.tap_proj, self.first, self.second, feats, strict=True):
            maps, first_gates = first(dict.fromkeys(self.mix, proj(feat)))
            maps, second_gates = second(maps)
            levels.append(maps)
            gates += [first_gates, second_gates]
        fused = {}
        for task, mix in self.mix.items():
            maps = [level[task] for level in levels]
            share = mix(torch.cat(maps, dim=1)).softmax(dim=1)  # (B, taps, h, w)
            fused[task] = sum(share[:, i:i + 1] * feat for i, feat in enumerate(maps))
        balance = load_balancing_loss([list(layer.values()) for layer in gates])
        return DecoderOutput(fused, extra={"load_balancing": self.weight * balance})

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
