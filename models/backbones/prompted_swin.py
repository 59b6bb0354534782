"""Swin with task prompts in its windows: TaskPrompter's encoder (see `models.blocks.prompting`).

Blocks, merging and published weights are those of `models.backbones.swin`. Every window attends together with
all prompts; a prompt's results are averaged over the windows, and its scores towards the positions are put
together to a map. Linear layers over all positions tie the model to one image size.
Letters: B batch, T prompts, C channels, H W grid of the stage, M heads, K width of the channel branch, n windows
of that branch per side, w attention windows, L positions of one of them.
"""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from models.backbones.swin import SwinBackbone, SwinBlock, SwinConfig
from models.blocks.layers import init_linear
from models.blocks.prompting import PromptedMap, Prompting, channel_attention, channel_scores, new_prompts

NUM_STAGES = 4


class ChannelBranch(nn.Module):
    """A block's scores of prompts towards channels, and what the prompts gather from the channels.

    Positions are mapped to a picture of K points. In the very last block nothing reads the gathered values:
    `is_last` has no layers for them.
    """

    def __init__(self, channels: int, positions: int, prompting: Prompting, is_last: bool):
        super().__init__()
        width = prompting.chan_embed_dim
        self.num_windows, self.side, self.scale = prompting.num_windows, math.isqrt(width), width**-0.5
        self.to_chan = nn.Linear(channels, width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(positions, 2 * width)
        self.update = None if is_last else nn.Sequential(nn.Linear(width, width), nn.Linear(width, channels))
        init_linear(self)

    def forward(self, prompts: Tensor, feat: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, T, C) before any norm, (B, H, W, C) -> scores (B, T, C, n, n), an update (B, T, C)."""
        key, value = self.key_value(rearrange(feat, "b h w c -> b c (h w)")).chunk(2, dim=-1)  # (B, C, K) each
        query = self.query(self.to_chan(prompts))  # (B, T, K)
        query, key, value = (rearrange(x, "b a (y x) -> b a y x", y=self.side) for x in (query, key, value))
        scores = channel_scores(query, key, self.num_windows)
        if self.update is None:
            return scores, None
        gathered = channel_attention(scores, value, self.scale)  # (B, T, K^1/2, K^1/2)
        return scores, self.update(gathered.flatten(2))


class PromptMerging(nn.Module):
    """To the next stage: prompts and channel scores double their width, maps of scores halve their grid."""

    def __init__(self, channels: int, num_heads: int, num_prompts: int):
        super().__init__()
        maps = num_heads * num_prompts
        self.prompts = nn.Linear(channels, 2 * channels, bias=False)
        self.channel = nn.Linear(channels, 2 * channels, bias=False)
        self.spatial = nn.Conv2d(maps, maps, kernel_size=3, stride=2, padding=1)
        init_linear(self)

    def forward(self, prompts: Tensor, spatial: Tensor, channel: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, C), (B, M, T, H, W), (B, T, C, n, n) -> (B, T, 2C), (B, M, T, H/2, W/2), (B, T, 2C, n, n)."""
        maps = self.spatial(rearrange(spatial, "b m t h w -> b (m t) h w"))
        channel = self.channel(rearrange(channel, "b t c i j -> b t i j c"))
        return (self.prompts(prompts), rearrange(maps, "b (m t) h w -> b m t h w", t=prompts.shape[1]),
                rearrange(channel, "b t i j c -> b t c i j"))


class PromptedSwin(SwinBackbone):
    """Swin that returns one `PromptedMap` per stage, the first three after merging: strides 8, 16, 32, 32.

    The image is first resized by `prompting.image_scale`; strides count its pixels then. A stage that is not
    larger than the window is one window without shift. ValueError where the grids fit neither the merging nor the
    windows of the channel branch.
    """

    recomputed = ("run_block",)
    never_pretrained = ("task_prompts", "prompting", "merging")

    def __init__(self, config: SwinConfig, image_size: tuple[int, int], prompting: Prompting):
        if not config.pad_before_roll:
            raise ValueError("a Swin with prompts pads before it rolls; leave backbone_kwargs.pad_before_roll true")
        grids = _grids(image_size, config.patch_size, prompting)
        windows = tuple(min(window, *grid) for window, grid in zip(config.windows, grids, strict=True))
        super().__init__(replace(config, window_size=windows), image_size)
        self.image_size, self.image_scale = image_size, prompting.image_scale
        for layer, window, grid in zip(self.layers, config.windows, grids, strict=True):
            for block in layer.blocks:
                if min(grid) <= window:
                    block.shift_size = (0, 0)
        for stage in range(NUM_STAGES):
            delattr(self, f"norm{stage}")
        self.norm = nn.LayerNorm(self.channels[-1], eps=1e-5)
        num_prompts, last = prompting.num_prompts, (NUM_STAGES - 1, config.depths[-1] - 1)
        self.task_prompts = new_prompts(num_prompts, config.embed_dim)
        self.prompting = nn.ModuleList(
            nn.ModuleList(ChannelBranch(dim, height * width, prompting, is_last=(stage, index) == last)
                          for index in range(config.depths[stage]))
            for stage, (dim, (height, width)) in enumerate(zip(self.channels, grids, strict=True)))
        self.merging = nn.ModuleList(
            PromptMerging(dim, heads, num_prompts)
            for dim, heads in zip(self.channels[:-1], config.num_heads[:-1], strict=True))
        self.num_heads = config.num_heads
        self.channels = (*self.channels[1:], self.channels[-1])
        self.strides = (*self.strides[1:], self.strides[-1])

    def forward(self, image: Tensor) -> list[PromptedMap]:
        """Normalised image (B, 3, H, W) -> one level per stage, finest first."""
        if tuple(image.shape[-2:]) != self.image_size:
            raise ValueError("this Swin with prompts was built for images of {}x{} (height x width) but got {}x{}"
                             .format(*self.image_size, *image.shape[-2:]))
        if self.image_scale != 1:
            image = F.interpolate(image, scale_factor=self.image_scale, mode="bilinear", align_corners=False)
        feat, levels = self.patch_embed(image), []  # (B, H, W, C)
        prompts = self.task_prompts.repeat(image.shape[0], 1, 1)  # (B, T, C)
        for stage, (layer, branches) in enumerate(zip(self.layers, self.prompting, strict=True)):
            for block, branch in zip(layer.blocks, branches, strict=True):
                feat, prompts, spatial, channel = self.run_block(block, branch, feat, prompts)
            if stage < NUM_STAGES - 1:
                feat = self.layers[stage + 1].downsample(feat)
                prompts, spatial, channel = self.merging[stage](prompts, spatial, channel)
            tap = feat if stage < NUM_STAGES - 1 else self.norm(feat)
            levels.append(PromptedMap(rearrange(tap, "b h w c -> b c h w").contiguous(), spatial, channel))
        return levels

    def run_block(self, block: SwinBlock, branch: ChannelBranch, feat: Tensor,
                  prompts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(B, H, W, C), (B, T, C) -> the same, scores (B, M, T, H, W), channel scores (B, T, C, n, n)."""
        for_prompts, out, spatial = window_attention(block, block.norm1(prompts), block.norm1(feat))
        channel, update = branch(prompts, out)
        feat = feat + block.drop_path1(out)
        feat = feat + block.drop_path2(block.mlp(block.norm2(feat)))
        if update is not None:
            prompts = prompts + block.drop_path1(for_prompts + update)
            prompts = prompts + block.drop_path2(block.mlp(block.norm2(prompts)))
        return feat, prompts, spatial, channel


def _grids(image_size: tuple[int, int], patch_size: int, prompting: Prompting) -> list[tuple[int, int]]:
    """(H, W) of the four stages."""
    n, scale, side = prompting.num_windows, prompting.image_scale, math.isqrt(prompting.chan_embed_dim)
    multiple = patch_size * 2 ** (NUM_STAGES - 1) * n
    pixels = [length * scale for length in image_size]
    if any(length % multiple for length in pixels):
        raise ValueError(f"image_size {image_size} times img_ds_ratio {scale} must be multiples of {multiple} with "
                         f"chan_nheads {n * n}")
    if side % n:
        raise ValueError(f"chan_embed_dim {side * side}, a picture of {side}x{side}, cannot be cut into the {n}x{n} "
                         f"windows of chan_nheads {n * n}")
    height, width = (int(length) // patch_size for length in pixels)
    return [(height // 2**stage, width // 2**stage) for stage in range(NUM_STAGES)]


def window_attention(block: SwinBlock, prompts: Tensor, feat: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Attention in the block's windows, each joined by all prompts; both inputs normalised.

    (B, T, C), (B, H, W, C) -> the prompts' results, averaged over the windows, (B, T, C), those of the positions
    (B, H, W, C), and the prompts' raw scores towards the positions (B, M, T, H, W).
    """
    attention, num_prompts = block.attn, prompts.shape[1]
    height, width = feat.shape[1:3]
    window_h, window_w = block.window_size
    # Zeros after the norm, not masked: padded positions are keys like all others.
    feat = F.pad(feat, (0, 0, 0, -width % window_w, 0, -height % window_h))
    rows, columns = feat.shape[1] // window_h, feat.shape[2] // window_w
    mask = block.shift_mask(rows, columns, feat)  # (w, L, L), None without a shift
    feat = feat.roll([-shift for shift in block.shift_size], dims=(1, 2))
    windows = rearrange(feat, "b (i y) (j x) c -> b (i j) (y x) c", y=window_h, x=window_w)
    split = {"three": 3, "m": attention.num_heads}
    for_prompts = rearrange(attention.qkv(prompts), "b t (three m d) -> three b 1 m t d", **split)
    for_windows = rearrange(attention.qkv(windows), "b w l (three m d) -> three b w m l d", **split)
    for_prompts = for_prompts.expand(-1, -1, windows.shape[1], -1, -1, -1)
    q, k, v = torch.cat((for_prompts, for_windows), dim=-2)  # (B, w, M, T + L, C / M), prompts first
    scores = q @ k.mT  # (B, w, M, T + L, T + L)
    bias = attention._get_rel_pos_bias()  # (1, M, L, L), of positions towards positions only
    bias = bias if mask is None else bias + mask[:, None]
    bias = F.pad(bias, (num_prompts, 0, num_prompts, 0))
    out = (scores * attention.scale + bias).softmax(dim=-1) @ v
    out = attention.proj(rearrange(out, "b w m l d -> b w l (m d)"))
    spatial = rearrange(scores[..., :num_prompts, num_prompts:], "b w m t l -> b w l (m t)")

    def put_together(windows: Tensor) -> Tensor:
        whole = rearrange(windows, "b (i j) (y x) c -> b (i y) (j x) c", i=rows, y=window_h)
        return whole.roll(block.shift_size, dims=(1, 2))[:, :height, :width]

    maps = rearrange(put_together(spatial), "b h w (m t) -> b m t h w", t=num_prompts)
    return out[:, :, :num_prompts].mean(dim=1), put_together(out[:, :, num_prompts:]), maps
