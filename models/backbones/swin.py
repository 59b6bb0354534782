"""Swin Transformer as an image backbone (Liu et al., ICCV 2021), four maps at strides 4, 8, 16, 32.

The multi-task decoders were trained on the segmentation variant of Swin, which differs from timm's classifier
in three ways that change numbers: a LayerNorm on every stage output, windows that never shrink, and the order
of padding and rolling. timm's modules do the arithmetic; this file arranges them and reads the three key
layouts in which Swin weights are published.
Letters: B batch, H W token grid of the stage, C channels, w window side.
"""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import PatchEmbed, resize_rel_pos_bias_table_simple
from timm.models.swin_transformer import PatchMerging, SwinTransformerBlock, WindowAttention
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from models.blocks.layers import ProductLayerNorm, ProductLinear, init_linear
from models.blocks.task_maps import TaskMaps
from utils.options import Options

logger = logging.getLogger(__name__)

MASKED = -100.0  # added to a score
DERIVED_BUFFERS = ("relative_position_index", "attn_mask")  # stored by some releases, computed by us


@dataclass(frozen=True)
class SwinConfig(Options):
    """Options of the backbone.

    embed_dim: channels of the finest map; the four maps have 1, 2, 4, 8 times as many.
    depths, num_heads: blocks and attention heads of every stage.
    window_size: side of the square attention window, in tokens; one for all stages or one per stage.
    drop_path_rate: stochastic depth of the last block; rises linearly from 0 over all blocks.
    pad_before_roll: order of the original code; false is timm's (see `SwinBlock`).
    patch_size: side of a patch in pixels; the stride of the finest map, 4 in all published models.
    """

    embed_dim: int
    depths: tuple[int, int, int, int]
    num_heads: tuple[int, int, int, int]
    window_size: int | tuple[int, int, int, int]
    drop_path_rate: float = 0.1
    pad_before_roll: bool = True
    patch_size: int = 4

    def __post_init__(self):
        self.require_counts("embed_dim", "patch_size")
        self.require_rates("drop_path_rate")
        self.require(min(self.depths) >= 1, "depths", "numbers of at least 1")
        self.require(min(self.windows) >= 1, "window_size", "a side of at least 1")
        divided = all(heads >= 1 and dim % heads == 0 for dim, heads in zip(self.channels, self.num_heads, strict=True))
        self.require(divided, "num_heads", f"divisors of the stages' channels, {self.channels}")

    @property
    def channels(self) -> tuple[int, ...]:
        """Of the stages."""
        return tuple(self.embed_dim * 2**stage for stage in range(4))

    @property
    def windows(self) -> tuple[int, ...]:
        """Window sides of the stages."""
        return (self.window_size,) * 4 if isinstance(self.window_size, int) else self.window_size


class SwinBlock(SwinTransformerBlock):
    """timm's block with the padding order of the original detection and segmentation code.

    The original pads the map to whole windows first and rolls the padded map; timm rolls first. The two are
    sure to agree only where the map is a multiple of the window, which no official input size satisfies in
    all stages: weights fine-tuned with one order give unrelated features in the other.
    """

    def __init__(self, *args, pad_before_roll: bool = True, **kwargs):
        super().__init__(*args, norm_layer=ProductLayerNorm, **kwargs)
        self.attn.__class__ = FusedAttention  # the same weights: timm's block has no place for other layers
        ProductLinear.take_over(self)
        self.pad_before_roll = pad_before_roll

    def _attn(self, tokens: Tensor) -> Tensor:
        """Window attention on normalised tokens (B, H, W, C) -> (B, H, W, C).

        The number of windows is said, not inferred: an export may leave H and W open.
        """
        (height, width), (window_h, window_w) = tokens.shape[1:3], self.window_size
        rows, columns = (height + window_h - 1) // window_h, (width + window_w - 1) // window_w
        padding = (0, 0, 0, columns * window_w - width, 0, rows * window_h - height)
        grid = {"i": rows, "j": columns, "y": window_h, "x": window_w}
        # Zeros after the norm, not masked: padded tokens are keys, with q, k, v equal to the qkv bias.
        if self.pad_before_roll:
            tokens = self._rolled(F.pad(tokens, padding), -1)
        else:
            tokens = F.pad(self._rolled(tokens, -1), padding)
        windows = rearrange(tokens, "b (i y) (j x) c -> (b i j) (y x) c", **grid)
        windows = self.attn(windows, mask=self.shift_mask(rows, columns, tokens))
        tokens = rearrange(windows, "(b i j) (y x) c -> b (i y) (j x) c", b=tokens.shape[0], **grid)
        if self.pad_before_roll:
            return self._rolled(tokens, 1)[:, :height, :width]
        return self._rolled(tokens[:, :height, :width], 1)

    def _rolled(self, tokens: Tensor, sign: int) -> Tensor:
        return tokens.roll([sign * shift for shift in self.shift_size], dims=(1, 2)) if any(self.shift_size) else tokens

    def shift_mask(self, rows: int, columns: int, like: Tensor) -> Tensor | None:
        """(rows columns, N, N), added to the scores of positions that a roll has brought together in one window."""
        if not any(self.shift_size):
            return None
        sides = []
        for windows, side, shift in zip((rows, columns), self.window_size, self.shift_size, strict=True):
            brought = torch.arange(windows * side, device=like.device) >= windows * side - shift
            sides.append(brought.view(windows, side))  # in the last window alone
        below, right = sides[0][:, None, :, None], sides[1][None, :, None, :]
        parts = (2 * below + right).flatten(2).flatten(0, 1)  # (rows columns, N): from where
        return like.new_zeros(()).masked_fill(parts[:, None] != parts[:, :, None], MASKED)


class FusedAttention(WindowAttention):
    """timm's window attention; on a GPU without a map of scores, which is most of what attention in windows moves."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Windows (B w, N, C) and the mask of their positions (w, N, N) -> (B w, N, C)."""
        if not x.is_cuda:
            return super().forward(x, mask)
        return self.fused(x, mask)

    def fused(self, x: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "b n (three m d) -> three b m n d", three=3, m=self.num_heads)
        bias = PositionBias.apply(self.relative_position_bias_table, self.relative_position_index, self.window_size)
        bias = bias.to(q.dtype)  # (1, M, N, N)
        if mask is not None:
            bias = (bias + mask.to(q.dtype)[:, None]).repeat(len(x) // len(mask), 1, 1, 1)
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            out = F.scaled_dot_product_attention(q, k, v, bias.expand(len(x), -1, -1, -1))
        return self.proj(rearrange(out, "b m n d -> b n (m d)"))


class PositionBias(torch.autograd.Function):
    """A bias for each head and offset, ((2 h - 1) (2 w - 1), M), to every pair of positions in a window, (1, M, N, N).

    Pairs of one offset lie on diagonals, which the backward pass adds up as they are; PyTorch would sort all pairs.
    """

    @staticmethod
    def forward(ctx, table, index, window):
        ctx.window, ctx.dtype = window, table.dtype
        return table.T.index_select(1, index.flatten()).view(1, -1, *index.shape)

    @staticmethod
    def backward(ctx, grad):
        h, w = ctx.window
        pairs = rearrange(grad, "1 m (y x) (v u) -> m y v x u", y=h, v=h).flip(2, 4)  # (y, x) to (h - 1 - v, w - 1 - u)
        pairs = F.pad(pairs, (0, w, 0, 0, 0, h)).contiguous()  # rows of 2 w, which start one later in rows of 2 w - 1
        whole, of_m, row = 4 * h * h * w * w, 2 * w * w, 2 * w - 1
        offsets = pairs.as_strided((len(pairs), h, 2 * h - 1, w, row), (whole, (2 * h - 1) * of_m, of_m, row, 1))
        return offsets.sum((1, 3), dtype=ctx.dtype).flatten(1).T, None, None


class SwinStage(nn.Module):
    """Patch merging (not in the first stage), then blocks; in every second one windows shift by w // 2."""

    def __init__(self, dim: int, merge: bool, num_heads: int, window_size: int, drop_path: Sequence[float],
                 pad_before_roll: bool):
        super().__init__()
        self.downsample = PatchMerging(dim // 2, dim, norm_layer=ProductLayerNorm) if merge else nn.Identity()
        self.blocks = nn.Sequential(*[
            SwinBlock(
                dim, input_resolution=(window_size, window_size), num_heads=num_heads,
                window_size=window_size, shift_size=window_size // 2 if index % 2 else 0,
                drop_path=rate, pad_before_roll=pad_before_roll,
                always_partition=True,  # keep window and shift on maps smaller than the window
                dynamic_mask=True,  # none is kept for input_resolution: `shift_mask` follows the map's size
            )
            for index, rate in enumerate(drop_path)
        ])

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens (B, 2H, 2W, C/2), or (B, H, W, C) in the first stage -> (B, H, W, C)."""
        return self.blocks(self.downsample(tokens))


class SwinBackbone(nn.Module):
    """Swin with a LayerNorm (eps 1e-5) on each stage output; accepts any image size (sizes round up)."""

    Config = SwinConfig
    recomputed = (SwinBlock,)
    never_pretrained = ("norm0", "norm1", "norm2", "norm3")  # no such layers in a classifier

    def __init__(self, config: SwinConfig, image_size: tuple[int, int]):
        super().__init__()
        self.channels = config.channels
        self.strides = tuple(config.patch_size * 2**stage for stage in range(4))
        self.patch_embed = PatchEmbed(
            img_size=None, patch_size=config.patch_size, embed_dim=config.embed_dim,
            norm_layer=partial(nn.LayerNorm, eps=1e-5), output_fmt="NHWC", strict_img_size=False, dynamic_img_pad=True)
        rates = torch.linspace(0, config.drop_path_rate, sum(config.depths), device="cpu").split(list(config.depths))
        self.layers = nn.ModuleList(
            SwinStage(dim, stage > 0, config.num_heads[stage], config.windows[stage], rates[stage].tolist(),
                      config.pad_before_roll)
            for stage, dim in enumerate(self.channels))
        init_linear(self)  # the paper's setting; position tables are initialised by timm
        for stage, dim in enumerate(self.channels):
            self.add_module(f"norm{stage}", nn.LayerNorm(dim, eps=1e-5))
        self.tasks: tuple[str, ...] = ()  # that have maps of their own

    def forward(self, image: Tensor) -> list[Tensor] | TaskMaps:
        """Normalised image (B, 3, H, W) -> four maps (B, C_i, ceil(H/s_i), ceil(W/s_i)), finest first."""
        tokens = self.patch_embed(image)  # (B, H/4, W/4, C)
        maps = []
        for stage, layer in enumerate(self.layers):
            tokens = layer(tokens)  # the next merging sees these, not the normalised ones; behind `fan_out` (1 + T) B
            normed = getattr(self, f"norm{stage}")(tokens)
            maps.append(rearrange(normed, "b h w c -> b c h w"))  # channels last in memory
            tokens = tokens[:image.shape[0]]
        if not self.tasks:
            return maps
        of_tasks = [feat.unflatten(0, (1 + len(self.tasks), -1))[1:] for feat in maps]
        return TaskMaps({task: [feat[index] for feat in of_tasks] for index, task in enumerate(self.tasks)})

    def fan_out(self, tasks: Sequence[str]) -> list[str]:
        """From now on the last block of every stage runs for each task, too, and every task has maps of its own.

        Returns the names of these blocks: their rows are those of no task, which go on to the next stage, and then of
        one task after the other.
        """
        self.tasks = tuple(tasks)
        for stage in self.layers:
            stage.blocks[-1].register_forward_pre_hook(partial(_copy_for_tasks, 1 + len(tasks)))
        return [f"layers.{index}.blocks.{len(stage.blocks) - 1}" for index, stage in enumerate(self.layers)]

    def convert_state_dict(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights in any of the three layouts -> this module's keys, position tables fitted to its window."""
        state = to_timm_layout(state)
        own = self.state_dict()
        resized = [key for key, value in state.items() if key.endswith("relative_position_bias_table")
                   and key in own and len(value) != len(own[key]) and math.isqrt(len(value))**2 == len(value)]
        for key in resized:
            side = (math.isqrt(len(own[key])) + 1) // 2  # of the window, whose table has (2 side - 1)^2 rows
            state[key] = resize_rel_pos_bias_table_simple(state[key], (side, side), own[key].shape)
        if resized:
            logger.info("relative position tables resized to another window (bicubic): %d", len(resized))
        return state


def _copy_for_tasks(copies: int, block: nn.Module, inputs: tuple[Tensor]) -> Tensor:
    return inputs[0].repeat(copies, 1, 1, 1)


def to_timm_layout(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Renames Swin weights to timm's keys; buffers that follow from the sizes are dropped.

    The layout is told from the keys: "mmseg" (OpenMMLab segmentation) calls its stages `stages`; "official"
    (Microsoft) merges patches at the end of a stage, so that stage 0 owns a `downsample`; "timm" merges at
    the start of the next stage. Other keys (`norm0`, `head`, ...) pass unchanged.
    """
    is_mmseg = any(key.startswith("stages.") for key in state)
    shift_merging = is_mmseg or any(key.startswith("layers.0.downsample.") for key in state)
    renamed = {}
    for key, value in state.items():
        if key.endswith(DERIVED_BUFFERS):
            continue
        if is_mmseg:
            if ".downsample." in key:
                value = merging_from_unfold_order(value)
            key = _mmseg_key(key)
        if shift_merging:
            key = re.sub(r"^layers\.(\d+)\.down", lambda match: f"layers.{int(match[1]) + 1}.down", key)
        renamed[key] = value
    return renamed


def _mmseg_key(key: str) -> str:
    key = re.sub(r"^patch_embed\.projection\.", "patch_embed.proj.", key)
    key = re.sub(r"^stages\.", "layers.", key)
    key = key.replace(".attn.w_msa.", ".attn.")
    return key.replace(".ffn.layers.0.0.", ".mlp.fc1.").replace(".ffn.layers.1.", ".mlp.fc2.")


def merging_from_unfold_order(value: Tensor) -> Tensor:
    """Patch-merging tensor (..., 4C) from unfold order (c, r) to slice order (p, c), both of 2 x 2 pixels.

    r runs over pixels (row, column) (0,0), (0,1), (1,0), (1,1), the layout of `unfold`; p over (0,0), (1,0),
    (0,1), (1,1), the order in which the official code concatenates its slices.
    """
    pixels = rearrange(value, "... (c r) -> ... r c", r=4)[..., [0, 2, 1, 3], :]
    return rearrange(pixels, "... p c -> ... (p c)")
