"""Parts of TaskDiffusion: the schedule of the noise, layers that know its level, heads of preliminary predictions.

Reference: Yang et al., "Multi-Task Dense Predictions via Unleashing the Power of Diffusion", ICLR 2025; the schedule
and the layers follow Ji et al., "DDP: Diffusion Model for Dense Prediction", ICCV 2023.

Axes: B batch, C width, h w grid. `time` is the activated embedding (B, C) of the noise level.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.blocks.mlore import UpsampledConv

SNR_FLOOR = 1e-5  # holds the log-SNR at 11.51 for times below 0.0018
FREQUENCIES = 8
ENLARGEMENT = 4  # of the grid, for predictions


def log_snr(times: Tensor) -> Tensor:
    """Logarithm of the signal-to-noise ratio at times in [0, 1], cosine schedule; computed in float64.

    In float32 it is ill-conditioned at both ends: an ulp of the time 1 moves it by 3e-3.
    """
    angle = 0.5 * math.pi * (times.double() + 0.0002) / 1.00025
    return -(angle.cos() ** -2 - 1).clamp(min=SNR_FLOOR).log()


def signal_and_noise(log_ratio: Tensor) -> tuple[Tensor, Tensor]:
    """Factors alpha of the signal and sigma of the noise, alpha^2 + sigma^2 = 1."""
    return log_ratio.sigmoid().sqrt(), (-log_ratio).sigmoid().sqrt()


class NoiseLevelEmbedding(nn.Module):
    """(B,) log-SNR -> (B, C): the number itself with sines and cosines of learned frequencies, then two layers."""

    def __init__(self, channels: int):
        super().__init__()
        self.frequencies = nn.Parameter(torch.randn(FREQUENCIES))
        self.expand = nn.Linear(1 + 2 * FREQUENCIES, channels)
        self.proj = nn.Linear(channels, channels)

    def forward(self, log_ratio: Tensor) -> Tensor:
        level = log_ratio[:, None]
        angle = 2 * math.pi * level * self.frequencies
        return self.proj(F.gelu(self.expand(torch.cat((level, angle.sin(), angle.cos()), dim=1))))


class Modulation(nn.Module):
    """feat * (scale + 1) + shift per image and channel, both linear in `time`: (B, out, h, w) -> the same shape."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.proj = nn.Linear(channels, 2 * out_channels)

    def forward(self, feat: Tensor, time: Tensor) -> Tensor:
        scale, shift = self.proj(time)[..., None, None].chunk(2, dim=1)
        return feat * (scale + 1) + shift


class TimeConv(nn.Module):
    """Convolution, norm, modulation: (B, in, h, w) -> (B, out, h, w). `channels` is the width of `time`."""

    def __init__(self, in_channels: int, out_channels: int, channels: int, kernel_size: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        self.norm = nn.BatchNorm2d(out_channels)
        self.modulation = Modulation(channels, out_channels)

    def forward(self, feat: Tensor, time: Tensor) -> Tensor:
        return self.modulation(self.norm(self.conv(feat)), time)


class TimeBlock(TimeConv):
    """A `TimeConv` to `channels`, GELU, convolution: (B, in, h, w) -> (B, out, h, w)."""

    def __init__(self, in_channels: int, out_channels: int, channels: int, kernel_sizes: tuple[int, int]):
        super().__init__(in_channels, channels, channels, kernel_sizes[0])
        self.proj = nn.Conv2d(channels, out_channels, kernel_sizes[1], padding=kernel_sizes[1] // 2)

    def forward(self, feat: Tensor, time: Tensor) -> Tensor:
        return self.proj(F.gelu(super().forward(feat, time)))


class ResidualTimeBlock(TimeBlock):
    """A `TimeBlock` added to its input: (B, C, h, w) -> the same shape."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, channels, (3, 1))

    def forward(self, feat: Tensor, time: Tensor) -> Tensor:
        return feat + super().forward(feat, time)


class EnlargingTimeBlock(ResidualTimeBlock):
    """The same block behind a bilinear enlargement where asked: (B, C, h, w) -> (B, C, 4 h, 4 w)."""

    def __init__(self, channels: int):
        super().__init__(channels)
        self.conv = UpsampledConv(channels, channels, ENLARGEMENT)

    def forward(self, feat: Tensor, time: Tensor, enlarge: bool = True) -> Tensor:
        inner = self.conv(feat) if enlarge else self.conv.at_input_size(feat)
        out = self.proj(F.gelu(self.modulation(self.norm(inner), time)))
        return out + (self.conv.enlarged(feat) if enlarge else feat)


class PreliminaryHead(nn.Module):
    """Raw outputs (B, n, 4 h, 4 w) of a task from its features alone, (B, C, h, w) per level; only for training."""

    def __init__(self, num_outputs: int, channels: int, levels: int):
        super().__init__()
        self.conv = UpsampledConv(levels * channels, channels, ENLARGEMENT)
        self.norm = nn.BatchNorm2d(channels)
        self.proj = nn.Conv2d(channels, channels, kernel_size=1)
        self.shortcut = nn.Conv2d(levels * channels, channels, kernel_size=1)
        self.predict = nn.Conv2d(channels, num_outputs, kernel_size=3, padding=1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        feat = torch.cat(list(maps), dim=1)
        short = self.conv.enlarged(self.shortcut(feat))  # commutes with the enlargement, and costs a sixteenth
        return self.predict(short + self.proj(F.gelu(self.norm(self.conv(feat)))))


class PreliminaryMixHead(nn.Module):
    """The same for mixtures of experts: the enlarged levels are weighted per pixel."""

    def __init__(self, num_outputs: int, channels: int, levels: int):
        super().__init__()
        self.squeeze = nn.Conv2d(levels * channels, channels, kernel_size=1)
        self.norm = nn.BatchNorm2d(channels)
        self.share = nn.Conv2d(channels, levels, kernel_size=3, padding=1)
        self.predict = nn.Conv2d(channels, num_outputs, kernel_size=3, padding=1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        squeezed = _enlarged(self.squeeze(torch.cat(list(maps), dim=1)))
        share = self.share(F.gelu(self.norm(squeezed))).softmax(dim=1)
        return self.predict(sum(share[:, i:i + 1] * _enlarged(level) for i, level in enumerate(maps)))


def _enlarged(feat: Tensor) -> Tensor:
    return F.interpolate(feat, scale_factor=ENLARGEMENT, mode="bilinear", align_corners=False)
