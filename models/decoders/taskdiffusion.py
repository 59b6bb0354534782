"""TaskDiffusion: the labels of all tasks are one noisy latent, which the decoder denoises by predicting the labels.

In training the labels are coded on the grid of the ViT, joined, and noise of a random level is added; the decoder sees
the noisy latent beside the image and predicts all tasks. For inference the latent begins as noise and is replaced, step
by step, by the code of what was just predicted (DDIM, no new noise). Tasks exchange information through gates that see
the latent; their features come from the image alone and are computed once.
Reference: Yang et al., "Multi-Task Dense Predictions via Unleashing the Power of Diffusion", ICLR 2025.
Kept from the published models: the code of saliency stays beside the joint one, the latent is tiny against the noise,
and a step's update goes one step further than the next step is told.

Axes: B batch, T tasks, C `final_embed_dim`, M channels of the latent, h w grid of the ViT, S steps.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum, rearrange
from torch import Tensor, nn

from losses.load_balancing import load_balancing_loss
from models.blocks.diffusion import (
    EnlargingTimeBlock,
    NoiseLevelEmbedding,
    PreliminaryHead,
    PreliminaryMixHead,
    ResidualTimeBlock,
    TimeBlock,
    TimeConv,
    log_snr,
    signal_and_noise,
)
from models.blocks.label_codes import LabelCodes
from models.blocks.layers import without_autocast
from models.decoder import BuildContext, Decoder, DecoderOutput
from models.decoders.mlore import FoldedPaths, MLoREConfig, MLoREModule

LAST_TIME = 0.999  # training draws times in [0, LAST_TIME)
LOOK_AHEAD = 1  # how many steps further than the next one an update goes
NOISE_SEED = 0


@dataclass(frozen=True)
class TaskDiffusionConfig(MLoREConfig):
    """Options of the decoder: those of MLoRE, which belong to its mixtures of experts but for the width, and its own.
    Of these timesteps, randsteps and module_layer are keys of the published experiment files.

    mask_void: False codes void pixels as the published training did, see `ValueCode`; inference does not depend on it.
    """

    final_embed_dim: int = 376
    topk: int = 3
    spe_rank: int = 72
    load_balancing_weight: float = 3e-4
    experts: bool = False  # task features from mixtures of experts instead of plain convolutions
    timesteps: int = 3  # S, steps from noise to the prediction
    randsteps: int = 1  # draws of the first noise, whose predictions are averaged
    module_layer: int = 3  # blocks per task behind the mixing
    bit_scale: float = 0.01  # the latent lies in (-bit_scale, bit_scale)
    mask_void: bool = True

    def __post_init__(self):
        super().__post_init__()
        self.require_counts("timesteps", "randsteps", "module_layer")
        self.require(0 < self.bit_scale < math.inf, "bit_scale", "a number above 0")


class ConvFeatures(nn.Module):
    """Features of every task from a map of the ViT: (B, C, h, w) -> (B, T, C, h, w), and no gates."""

    def __init__(self, tasks: Sequence[str], channels: int):
        super().__init__()
        self.layers = nn.ModuleDict({task: nn.Sequential(*_two_layers(channels), *_two_layers(channels))
                                     for task in tasks})

    def forward(self, feat: Tensor) -> tuple[Tensor, list[Tensor]]:
        return torch.stack([layers(feat) for layers in self.layers.values()], dim=1), []


def _two_layers(channels: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, channels, kernel_size=3, padding=1), nn.BatchNorm2d(channels), nn.GELU(),
            nn.Conv2d(channels, channels, kernel_size=1)]


class ExpertFeatures(nn.Module):
    """The same from two mixtures of experts, with the gates (T, B, E) of both for the balancing loss."""

    def __init__(self, tasks: Sequence[str], config: MLoREConfig, positions: int):
        super().__init__()
        self.num_tasks = len(tasks)
        self.first, self.second = (MLoREModule(tasks, config, positions) for _ in range(2))
        for module in (self.first, self.second):
            module.router.pool.reset_parameters()  # published with PyTorch's own, unlike those of MLoRE

    def forward(self, feat: Tensor) -> tuple[Tensor, list[Tensor]]:
        maps, first_gates = self.first(feat)
        maps, second_gates = self.second(maps)
        return maps.unflatten(1, (self.num_tasks, -1)), [first_gates, second_gates]


class Injection(nn.Conv2d):
    """A 1 x 1 convolution of map and latent side by side; its share of the map is computed once per image."""

    def __init__(self, channels: int, latent_channels: int):
        super().__init__(channels + latent_channels, channels, kernel_size=1)

    def of_map(self, feat: Tensor) -> Tensor:
        return F.conv2d(feat, self.weight[:, :self.out_channels], self.bias)

    def of_latent(self, latent: Tensor) -> Tensor:
        return F.conv2d(latent, self.weight[:, self.out_channels:])


class LevelStage(nn.Module):
    """What happens at one level: the latent joins the map, and gates from both mix the features of the tasks."""

    def __init__(self, tasks: Sequence[str], channels: int, latent_channels: int):
        super().__init__()
        self.inject = Injection(channels, latent_channels)
        self.shared = nn.ModuleList(TimeBlock(channels, channels, channels, (3, 1)) for _ in range(2))
        self.gates = TimeConv(channels, len(tasks) ** 2, channels, kernel_size=3)
        self.mix = nn.ModuleDict({task: TimeConv(channels, channels, channels, kernel_size=1) for task in tasks})

    def forward(self, injected: Tensor, latent: Tensor, feats: Tensor, time: Tensor) -> list[Tensor]:
        """Shares of the map (B, C, h, w), latent (B, M, h, w), features (B, T, C, h, w) -> T maps (B, C, h, w)."""
        feat = injected + self.inject.of_latent(latent)
        for block in self.shared:
            feat = block(feat, time)
        gates = self.gates(feat, time).sigmoid()  # (B, T T, h, w): one per pixel, target and source
        gates = rearrange(gates, "b (target source) h w -> b target source h w", source=feats.shape[1])
        mixed = einsum(gates, feats, "b t s h w, b s c h w -> t b c h w")
        return [mix(task_map, time) for mix, task_map in zip(self.mix.values(), mixed, strict=True)]


class TaskStage(nn.Module):
    """What happens to one task: its levels are weighted per pixel, refined, and predicted."""

    def __init__(self, num_outputs: int, channels: int, levels: int, blocks: int):
        super().__init__()
        self.levels = TimeBlock(levels * channels, levels, channels, (1, 3))
        self.blocks = nn.ModuleList([*(ResidualTimeBlock(channels) for _ in range(blocks - 1)),
                                     EnlargingTimeBlock(channels)])
        self.predict = nn.Conv2d(channels, num_outputs, kernel_size=3, padding=1)

    def forward(self, maps: Sequence[Tensor], time: Tensor, enlarge: bool) -> Tensor:
        """One map (B, C, h, w) per level -> raw outputs (B, n, 4 h, 4 w), or (B, n, h, w) without enlargement."""
        share = self.levels(torch.cat(list(maps), dim=1), time).softmax(dim=1)
        feat = sum(share[:, i:i + 1] * level for i, level in enumerate(maps))
        for block in self.blocks[:-1]:
            feat = block(feat, time)
        feat = self.blocks[-1](feat, time, enlarge)
        with without_autocast(feat):  # like the heads of all models
            return self.predict(feat.to(torch.promote_types(feat.dtype, torch.float32)))


class TaskDiffusionDecoder(Decoder):
    """Maps of one stride to raw outputs of all tasks, at a quarter of that stride; there are no heads behind it.

    In training it needs the labels, see `MultiTaskModel.forward`, and draws noise from the global generator. In eval
    mode the first noise is the same for every image, whatever the batch: results repeat.
    """

    Config = TaskDiffusionConfig
    needs_labels = True
    recomputed = (LevelStage, TaskStage)

    def __init__(self, context: BuildContext, config: TaskDiffusionConfig):
        super().__init__()
        tasks, widths, (stride, *others) = dict(context.tasks), context.channels, context.strides
        context.require_maps(all(other == stride for other in others), "maps of one stride, as a plain ViT gives",
                             neck="one_stride")
        channels, levels = config.final_embed_dim, len(widths)
        self.tasks, self.config = tuple(tasks), config
        self.codes = LabelCodes(tasks, channels, config.bit_scale, config.mask_void)
        self.noise_level = NoiseLevelEmbedding(channels)
        self.tap_proj = nn.ModuleList(nn.Conv2d(width, channels, kernel_size=1) for width in widths)
        positions = math.prod(side // stride for side in context.image_size)
        self.features = nn.ModuleList(
            ExpertFeatures(self.tasks, config, positions) if config.experts
            else ConvFeatures(self.tasks, channels) for _ in widths)
        self.levels = nn.ModuleList(LevelStage(self.tasks, channels, self.codes.channels) for _ in widths)
        self.stages = nn.ModuleDict({task: TaskStage(num_outputs, channels, levels, config.module_layer)
                                     for task, num_outputs in tasks.items()})
        preliminary = PreliminaryMixHead if config.experts else PreliminaryHead
        self.preliminary = nn.ModuleDict({task: preliminary(num_outputs, channels, levels)
                                          for task, num_outputs in tasks.items()})
        self.first_noise: dict[tuple, Tensor] = {}

    @classmethod
    def backbone_options(cls, tasks: Mapping[str, int], config: TaskDiffusionConfig) -> dict[str, Any]:
        return {"class_token": False}  # the published ViT has none

    def forward(self, feats: Sequence[Tensor], labels: Mapping[str, Tensor] | None = None) -> DecoderOutput:
        injected, task_maps, gates = self.of_image(feats)
        if not self.training:
            return DecoderOutput(self._sample(injected, task_maps))
        if labels is None:
            raise ValueError("this decoder learns from coded labels: in training mode call model(image, labels)")
        latent, log_ratio = self._noisy(self.codes.of_labels(labels, injected[0].shape[-2:]))
        final = self.predict(injected, task_maps, latent, log_ratio, enlarge=True)
        preliminary = {task: head([level[:, index] for level in task_maps])
                       for index, (task, head) in enumerate(self.preliminary.items())}
        return DecoderOutput(final, preliminary, self._balance(gates))

    def of_image(self, feats: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """What does not depend on the latent: shares of the injected maps (B, C, h, w) and features of the tasks
        (B, T, C, h, w) per level, and the gates (T, B, E) of all mixtures of experts."""
        injected, task_maps, gates = [], [], []
        for feat, proj, level, features in zip(feats, self.tap_proj, self.levels, self.features, strict=True):
            level_map = proj(feat)
            injected.append(level.inject.of_map(level_map))
            maps, level_gates = features(level_map)
            task_maps.append(maps)
            gates += level_gates
        return injected, task_maps, gates

    def _balance(self, gates: Sequence[Tensor]) -> dict[str, Tensor]:
        if not gates:
            return {}
        loss = load_balancing_loss([[layer.flatten(0, 1)] for layer in gates])
        return {"load_balancing": self.config.load_balancing_weight * loss}

    def predict(self, injected: Sequence[Tensor], feats: Sequence[Tensor], latent: Tensor, log_ratio: Tensor,
                 enlarge: bool) -> dict[str, Tensor]:
        """Raw outputs of all tasks from a noisy latent (B, M, h, w) and its log-SNR (B,)."""
        time = F.silu(self.noise_level(log_ratio.to(latent.dtype)))
        maps = [level(*shares, time) for level, *shares in zip(
            self.levels, injected, [latent] * len(injected), feats, strict=True)]  # per level and task
        return {task: stage(task_maps, time, enlarge)
                for (task, stage), task_maps in zip(self.stages.items(), zip(*maps, strict=True), strict=True)}

    def _noisy(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """The latent with noise of a random level per image, and the log-SNR (B,)."""
        log_ratio = log_snr(self.draw_times(latent))
        alpha, sigma = (factor.to(latent.dtype)[:, None, None, None] for factor in signal_and_noise(log_ratio))
        return alpha * latent + sigma * self.draw_noise(latent), log_ratio

    def draw_times(self, latent: Tensor) -> Tensor:
        """(B,) in [0, LAST_TIME), for training."""
        return LAST_TIME * torch.rand(len(latent), dtype=torch.float64, device=latent.device)

    def draw_noise(self, latent: Tensor) -> Tensor:
        """Standard normal numbers like the latent, for training."""
        return torch.randn_like(latent)

    def _sample(self, injected: Sequence[Tensor], feats: Sequence[Tensor]) -> dict[str, Tensor]:
        """Predictions, averaged over the draws of the first noise."""
        draws = [self._denoise(injected, feats, latent) for latent in self.first_latents(injected[0])]
        return {task: sum(draw[task] for draw in draws) / len(draws) for task in self.tasks}

    def first_latents(self, like: Tensor) -> Sequence[Tensor]:
        """One latent (B, M, h, w) of pure noise per draw; every image begins with the same numbers."""
        size, place = tuple(like.shape[-2:]), (like.device, torch.promote_types(like.dtype, torch.float32))
        if not all(isinstance(side, int) for side in size):  # in a graph whose image size is open
            raise ValueError("its first noise is drawn for a grid of known size")
        if (size, *place) not in self.first_noise:
            generator = torch.Generator().manual_seed(NOISE_SEED)
            noise = torch.randn(self.config.randsteps, 1, self.codes.channels, *size, generator=generator, device="cpu")
            self.first_noise[(size, *place)] = noise.to(*place)
        return [noise.expand(like.shape[0], -1, -1, -1) for noise in self.first_noise[(size, *place)]]

    def _denoise(self, injected: Sequence[Tensor], feats: Sequence[Tensor], latent: Tensor) -> dict[str, Tensor]:
        """S steps of DDIM from pure noise; only the last one, which gives the result, works at the finer grid."""
        steps = self.config.timesteps
        for step in range(steps):
            is_last = step == steps - 1
            now = log_snr(torch.full((latent.shape[0],), 1 - step / steps, dtype=torch.float64, device=latent.device))
            logits = self.predict(injected, feats, latent, now, enlarge=is_last)
            if not is_last:
                latent = self.update(latent, self.codes.of_predictions(logits), step)
        return self.codes.bounded(logits)

    def update(self, latent: Tensor, predicted: Tensor, step: int) -> Tensor:
        """The latent behind a step, from the one before it and the code of what was predicted."""
        (alpha, next_alpha), (sigma, next_sigma) = _factors(step, self.config.timesteps)
        noise = (latent - alpha * predicted) / max(sigma, 1e-8)
        return next_alpha * predicted + next_sigma * noise

    def reparameterise(self) -> None:
        """Folds the mixtures of experts, see `MLoREModule`; nothing where there are none."""
        assert not self.training, "reparameterise() folds running statistics: call eval() first"
        for features in self.features if self.config.experts and self.config.fold else ():
            for module in (features.first, features.second):
                module.folded = FoldedPaths(module)

    def make_head(self, num_outputs: int) -> nn.Module:
        """Nothing: predictions are made inside, since they are coded again between the steps."""
        return nn.Identity()


@functools.cache
def _factors(step: int, steps: int) -> list[list[float]]:
    """Of the signal, and of the noise, at a step and at the time of the next one. Plain numbers: never traced."""
    times = torch.tensor([1 - step / steps, max(1 - (step + 1 + LOOK_AHEAD) / steps, 0)], dtype=torch.float64,
                         device="cpu")
    return [factors.tolist() for factors in signal_and_noise(log_snr(times))]
