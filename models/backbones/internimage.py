"""InternImage as an image backbone (Wang et al., CVPR 2023), four maps at strides 4, 8, 16, 32.

A pyramid of transformer-like blocks whose attention is replaced by DCNv3: every pixel predicts where to look and
how much each place counts. The published files order their tensors for channels-first and channels-last norms, with
odd indices in the keys; `to_own_layout` renames them. Maps are channels-last inside.
Letters: B batch, H W grid of the level, C channels, G groups, K points of a kernel.
"""

import math
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from models.blocks.layers import ChannelLayerNorm, init_linear
from models.ops.dcnv3 import Kernel, dcnv3
from utils.options import Options

EPS = 1e-6  # of every LayerNorm

# Patterns of published keys and what they become.
RENAMES = tuple((re.compile(pattern), target) for pattern, target in (
    (r"\bdcn\.dw_conv\.0\.", "dcn.dw_conv."), (r"\bdcn\.dw_conv\.1\.1\.", "dcn.dw_norm."),
    (r"\bdcn\.center_feature_scale_proj_", "dcn.centre_scale."), (r"(norm\d?)\.[01]\.(?=weight|bias)", r"\1."),
))


@dataclass(frozen=True)
class InternImageConfig(Options):
    """Options of the backbone.

    embed_dim: channels of the finest map; the four maps have 1, 2, 4, 8 times as many.
    depths, groups: blocks and DCNv3 groups per level (published: 16 channels per group).
    offset_scale: factor of the sampling grid, regular part and offsets alike.
    post_norm, layer_scale, res_post_norm: see `InternImageBlock`. Without post_norm, or with center_feature_scale,
    every level ends with a norm.
    dw_kernel_size: side of the convolution that predicts places and weights; empty: kernel_size.
    drop_path_rate: stochastic depth of the last block; rises linearly from 0 over all blocks.
    """

    embed_dim: int
    depths: tuple[int, int, int, int]
    groups: tuple[int, int, int, int]
    offset_scale: float = 1.0
    post_norm: bool = True
    layer_scale: float | None = 1.0
    res_post_norm: bool = False
    center_feature_scale: bool = False
    kernel_size: int = 3
    dw_kernel_size: int | None = None
    mlp_ratio: float = 4.0
    drop_path_rate: float = 0.4

    def __post_init__(self):
        self.require(self.embed_dim >= 2 and self.embed_dim % 2 == 0, "embed_dim", "an even number of at least 2")
        self.require(min(self.depths) >= 1, "depths", "numbers of at least 1")
        divided = all(groups >= 1 and dim % groups == 0 for dim, groups in zip(self.channels, self.groups, strict=True))
        self.require(divided, "groups", f"divisors of the levels' channels, {self.channels}")
        for name in ("kernel_size", "dw_kernel_size"):
            side = getattr(self, name)
            self.require(side is None or (side >= 1 and side % 2 == 1), name, "an odd number")
        self.require(0 < self.mlp_ratio < math.inf, "mlp_ratio", "a positive number")
        self.require(0 < self.offset_scale < math.inf, "offset_scale", "a positive number")
        self.require(not self.res_post_norm or (not self.post_norm and self.layer_scale is None), "res_post_norm",
                     "false unless post_norm is false and layer_scale empty")
        self.require_rates("drop_path_rate")

    @property
    def channels(self) -> tuple[int, ...]:
        """Of the levels."""
        return tuple(self.embed_dim * 2**level for level in range(4))


def to_own_layout(key: str) -> str:
    """Our name of a published key; others pass unchanged."""
    for pattern, target in RENAMES:
        key = pattern.sub(target, key)
    return key


class DeformableConv(nn.Module):
    """DCNv3 with the layers around it, (B, H, W, C) -> the same shape.

    The K weights of a group add up to 1. `centre_scale` mixes each group with the value at the pixel itself.
    """

    def __init__(self, channels: int, groups: int, kernel_size: int = 3, padding: int = 1, dilation: int = 1,
                 offset_scale: float = 1.0, dw_kernel_size: int | None = None, centre_scale: bool = False):
        super().__init__()
        self.groups = groups
        self.kernel = Kernel((kernel_size,) * 2, padding=(padding,) * 2, dilation=(dilation,) * 2,
                             offset_scale=offset_scale)
        side, points = dw_kernel_size or kernel_size, groups * self.kernel.num_points
        self.dw_conv = nn.Conv2d(channels, channels, side, padding=(side - 1) // 2, groups=channels)
        self.dw_norm = nn.LayerNorm(channels, eps=EPS)
        self.offset, self.mask = nn.Linear(channels, 2 * points), nn.Linear(channels, points)
        self.input_proj, self.output_proj = nn.Linear(channels, channels), nn.Linear(channels, channels)
        self.centre_scale = nn.Linear(channels, groups) if centre_scale else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """At first every point lies on the regular grid and counts 1 / K."""
        for layer in (self.offset, self.mask, *([self.centre_scale] if self.centre_scale else [])):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        for layer in (self.input_proj, self.output_proj):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, feat: Tensor) -> Tensor:
        value = self.input_proj(feat)
        around = self.dw_conv(rearrange(feat, "b h w c -> b c h w"))  # of the input, not of the values
        around = F.gelu(self.dw_norm(rearrange(around, "b c h w -> b h w c")))
        offset = self.offset(around)  # (B, H, W, G K 2)
        mask = rearrange(self.mask(around), "b h w (g k) -> b h w g k", g=self.groups).softmax(dim=-1)
        out = dcnv3(value, offset, rearrange(mask, "b h w g k -> b h w (g k)"), self.groups, self.kernel)
        if self.centre_scale is not None:
            share = self.centre_scale(around).sigmoid()  # (B, H, W, G)
            share = share.repeat_interleave(out.shape[-1] // self.groups, dim=-1)  # (B, H, W, C), group by group
            out = (1 - share) * out + share * value
        return self.output_proj(out)


class InternImageBlock(nn.Module):
    """DCNv3 and an MLP, each with a residual connection, (B, H, W, C) -> the same shape.

    post_norm: norm the branches' outputs instead of their inputs. res_post_norm: norm both (sizes H and G).
    layer_scale: first value of the factors per channel on the branches; None = no such factors.
    """

    def __init__(self, channels: int, groups: int, mlp_ratio: float, post_norm: bool, layer_scale: float | None,
                 res_post_norm: bool, drop_path: float, **conv):
        super().__init__()
        self.post_norm = post_norm
        self.norm1, self.norm2 = nn.LayerNorm(channels, eps=EPS), nn.LayerNorm(channels, eps=EPS)
        self.dcn = DeformableConv(channels, groups, **conv)
        self.mlp = Mlp(channels, int(mlp_ratio * channels))
        self.drop_path1, self.drop_path2 = DropPath(drop_path), DropPath(drop_path)
        self.gamma1 = self.gamma2 = self.res_post_norm1 = self.res_post_norm2 = None
        if layer_scale is not None:
            self.gamma1 = nn.Parameter(torch.full((channels,), float(layer_scale)))
            self.gamma2 = nn.Parameter(torch.full((channels,), float(layer_scale)))
        if res_post_norm:
            self.res_post_norm1 = nn.LayerNorm(channels, eps=EPS)
            self.res_post_norm2 = nn.LayerNorm(channels, eps=EPS)

    def forward(self, feat: Tensor) -> Tensor:
        feat = feat + self.drop_path1(self._branch(feat, self.dcn, self.norm1, self.gamma1, self.res_post_norm1))
        return feat + self.drop_path2(self._branch(feat, self.mlp, self.norm2, self.gamma2, self.res_post_norm2))

    def _branch(self, feat: Tensor, layer: nn.Module, norm: nn.Module, gamma: Tensor | None,
                after: nn.Module | None) -> Tensor:
        out = norm(layer(feat)) if self.post_norm else layer(norm(feat))
        out = out if after is None else after(out)
        return out if gamma is None else gamma * out


class Stem(nn.Module):
    """Image (B, 3, H, W) -> (B, H / 4, W / 4, C)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels // 2, kernel_size=3, stride=2, padding=1)
        self.norm1 = nn.LayerNorm(channels // 2, eps=EPS)
        self.conv2 = nn.Conv2d(channels // 2, channels, kernel_size=3, stride=2, padding=1)
        self.norm2 = nn.LayerNorm(channels, eps=EPS)

    def forward(self, image: Tensor) -> Tensor:
        feat = F.gelu(self.norm1(rearrange(self.conv1(image), "b c h w -> b h w c")))
        feat = self.conv2(rearrange(feat, "b h w c -> b c h w"))
        return self.norm2(rearrange(feat, "b c h w -> b h w c"))


class Level(nn.Module):
    """The blocks of one resolution, (B, H, W, C) -> the same shape; the backbone applies `downsample`, to NCHW maps."""

    def __init__(self, channels: int, drop_path: Sequence[float], last: bool, has_norm: bool, **block):
        super().__init__()
        self.blocks = nn.Sequential(*(InternImageBlock(channels, drop_path=rate, **block) for rate in drop_path))
        self.norm = nn.LayerNorm(channels, eps=EPS) if has_norm else nn.Identity()
        self.downsample = nn.Identity() if last else nn.Sequential(OrderedDict(
            conv=nn.Conv2d(channels, 2 * channels, kernel_size=3, stride=2, padding=1, bias=False),
            norm=ChannelLayerNorm(2 * channels, eps=EPS)))

    def forward(self, feat: Tensor) -> Tensor:
        return self.norm(self.blocks(feat))


class InternImageBackbone(nn.Module):
    """InternImage; accepts any image size (sizes round up)."""

    Config = InternImageConfig
    recomputed = (InternImageBlock,)
    never_pretrained = ()
    pretrained_home = "https://huggingface.co/OpenGVLab/InternImage"

    def __init__(self, config: InternImageConfig, image_size: tuple[int, int]):
        super().__init__()
        self.channels, self.strides = config.channels, (4, 8, 16, 32)
        self.patch_embed = Stem(config.embed_dim)
        rates = torch.linspace(0, config.drop_path_rate, sum(config.depths), device="cpu").split(list(config.depths))
        block = {"mlp_ratio": config.mlp_ratio, "post_norm": config.post_norm, "layer_scale": config.layer_scale,
                 "res_post_norm": config.res_post_norm, "kernel_size": config.kernel_size,
                 "padding": config.kernel_size // 2, "offset_scale": config.offset_scale,
                 "dw_kernel_size": config.dw_kernel_size, "centre_scale": config.center_feature_scale}
        has_norm = not config.post_norm or config.center_feature_scale
        self.levels = nn.ModuleList(
            Level(channels, rates[level].tolist(), level == 3, has_norm, groups=config.groups[level], **block)
            for level, channels in enumerate(self.channels))
        init_linear(self)
        for module in self.modules():
            if isinstance(module, DeformableConv):
                module.reset_parameters()

    def forward(self, image: Tensor) -> list[Tensor]:
        """Normalised image (B, 3, H, W) -> four maps (B, C_i, ceil(H/s_i), ceil(W/s_i)), finest first."""
        feat, maps = self.patch_embed(image), []
        for level in self.levels:
            feat = rearrange(level(feat), "b h w c -> b c h w")
            maps.append(feat.contiguous())
            feat = rearrange(level.downsample(feat), "b c h w -> b h w c")
        return maps

    def convert_state_dict(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Published weights under this module's keys; a classifier's head stays as it is."""
        return {to_own_layout(key): value for key, value in state.items()}
