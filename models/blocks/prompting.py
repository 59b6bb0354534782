"""Task prompts that travel through a backbone: the parts that its ViT and its Swin variant share.

Reference: Ye and Xu, "TaskPrompter: Spatial-Channel Multi-Task Prompting for Dense Scene Understanding", ICLR
2023. One learned token per task attends to the patches in every block, and its raw attention scores say where,
and in which channels, the task finds its features.
Letters: B batch, T prompts, C channels, H W grid, n windows per side, M heads.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn


@dataclass(frozen=True)
class Prompting:
    """What a backbone must know to carry prompts; the options of the same name are TaskPrompter's."""

    num_prompts: int  # T
    num_windows: int  # n; channel scores are taken in n x n windows
    chan_embed_dim: int | None = None  # width of the channel branch; only where it is not the number of positions
    image_scale: float = 1.0
    attend_channels: bool = False


class PromptedMap(NamedTuple):
    """One level of a prompted backbone. All scores are raw: neither scaled nor normalised."""

    feat: Tensor  # (B, C, H, W)
    spatial: Tensor  # (B, M, T, H, W), of every prompt towards every position
    channel: Tensor  # (B, T, C, n, n), of every prompt towards every channel, window by window
    mutual: Tensor | None = None  # (B, M, T, T), of every prompt towards all prompts


def new_prompts(num_prompts: int, channels: int) -> nn.Parameter:
    """(T, C), normal around 1 as published."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(num_prompts, channels), 1.0, 1.0, -2.0, 2.0))


def channel_scores(query: Tensor, feat: Tensor, num_windows: int) -> Tensor:
    """Inner products over the positions of each window: (B, T, H, W), (B, C, H, W) -> (B, T, C, n, n)."""
    return rearrange(_windows(query, num_windows) @ _windows(feat, num_windows).mT, "b i j t c -> b t c i j")


def channel_attention(scores: Tensor, values: Tensor, scale: float) -> Tensor:
    """What the prompts gather from the channels: (B, T, C, n, n), (B, C, H, W) -> (B, T, H, W)."""
    num_windows, side = scores.shape[-1], values.shape[-2] // scores.shape[-1]
    weight = rearrange((scores * scale).softmax(dim=2), "b t c i j -> b i j t c")
    gathered = weight @ _windows(values, num_windows)  # (B, n, n, T, positions of a window)
    return rearrange(gathered, "b i j t (y x) -> b t (i y) (j x)", y=side)


def scale_windows(feat: Tensor, factor: Tensor) -> Tensor:
    """Every channel times one factor per window: (B, C, H, W), (B, C, n, n) -> (B, C, H, W)."""
    n = factor.shape[-1]
    scaled = rearrange(feat, "b c (i y) (j x) -> b c i y j x", i=n, j=n) * factor[:, :, :, None, :, None]
    return rearrange(scaled, "b c i y j x -> b c (i y) (j x)")


def scale_groups(feat: Tensor, factor: Tensor) -> Tensor:
    """Every consecutive group of C / M channels times one map: (B, C, H, W), (B, M, H, W) -> (B, C, H, W)."""
    scaled = rearrange(feat, "b (m d) h w -> b m d h w", m=factor.shape[1]) * factor[:, :, None]
    return rearrange(scaled, "b m d h w -> b (m d) h w")


def _windows(maps: Tensor, num_windows: int) -> Tensor:
    """(B, A, H, W) -> (B, n, n, A, H W / n^2)."""
    return rearrange(maps, "b a (i y) (j x) -> b i j a (y x)", i=num_windows, j=num_windows)
