"""DCNv3: every output pixel reads its group of channels at K freely placed points and adds them up with weights.

The published operator is a CUDA extension that has to be compiled for the installed PyTorch, and does not run on
a CPU. Here it is K bilinear samplings by `grid_sample`, which exists on every device; one point after another,
because K sampled maps at once are K times the feature map. The backward pass samples again instead of keeping
them, so that a layer stores nothing beyond its inputs.
Reference: Wang et al., "InternImage: Exploring Large-Scale Vision Foundation Models with Deformable
Convolutions", CVPR 2023, section 3.1.

Axes: B batch, H W input grid, h w output grid, G groups, c channels of a group, K points, S samples per point.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.autograd.function import once_differentiable

SAMPLES_AT_ONCE = 2**22  # elements of one sampled map (16 MiB of float32); small maps take several points at once

Pair = tuple[int, int]


class Kernel(NamedTuple):
    """Geometry of the operator; pairs are (vertical, horizontal). `size` 3 x 3 has K = 9 points."""

    size: Pair = (3, 3)
    stride: Pair = (1, 1)
    padding: Pair = (1, 1)
    dilation: Pair = (1, 1)
    offset_scale: float = 1.0

    @property
    def num_points(self) -> int:
        return self.size[0] * self.size[1]

    def output_size(self, input_size: Pair) -> Pair:
        """(h, w) of an input of (H, W)."""
        height, width = (
            (side + 2 * pad - dilation * (size - 1) - 1) // stride + 1 for side, pad, dilation, size, stride
            in zip(input_size, self.padding, self.dilation, self.size, self.stride, strict=True))
        return height, width


THREE_BY_THREE = Kernel()


def dcnv3(value: Tensor, offset: Tensor, mask: Tensor, groups: int, kernel: Kernel = THREE_BY_THREE) -> Tensor:
    """value (B, H, W, G c), offset (B, h, w, G K 2), mask (B, h, w, G K) -> (B, h, w, G c).

    The two offsets of a point are (dx, dy), in pixels, and points are counted column by column: the vertical
    index runs fastest. Places outside the map read 0. The mask is used as it is, without a softmax. The offset
    scale multiplies the regular grid as well. Arithmetic is float32 at least: half precision has no room for
    places. At whole-numbered places (an untrained layer's) the gradient of an offset is one-sided, and rounding
    decides to which side.
    """
    if value.ndim != 4 or value.shape[-1] % groups:
        raise ValueError(f"dcnv3 needs values (B, H, W, C) with C a multiple of {groups} groups, got "
                         f"{tuple(value.shape)}")
    wanted = (len(value), *kernel.output_size(value.shape[1:3]), groups * kernel.num_points)
    if tuple(mask.shape) != wanted or tuple(offset.shape) != (*wanted[:3], 2 * wanted[3]):
        raise ValueError(f"dcnv3 on {tuple(value.shape)} needs masks {wanted} and twice as many offsets in the last "
                         f"axis, got masks {tuple(mask.shape)} and offsets {tuple(offset.shape)}")
    dtype = torch.promote_types(value.dtype, torch.float32)
    maps = rearrange(value.to(dtype), "b h w (g c) -> (b g) c h w", g=groups)
    mask = rearrange(mask.to(dtype), "b h w (g k) -> (b g) 1 k h w", g=groups)
    grid = rearrange(offset.to(dtype), "b h w (g k xy) -> (b g) k h w xy", g=groups, xy=2)
    out = _WeightedSamples.apply(maps, sampling_grid(grid, value.shape[1:3], kernel), mask)  # (B G, c, h, w)
    return rearrange(out, "(b g) c h w -> b h w (g c)", g=groups).to(value.dtype)


def sampling_grid(offset: Tensor, input_size: Pair, kernel: Kernel) -> Tensor:
    """Offsets (B G, K, h, w, 2) in pixels -> places (same shape) as `grid_sample` takes them, x before y.

    Pixel i of n lies at (2 i + 1) / n - 1: the convention without aligned corners, whose zeros begin outside.
    """
    centres, regular, ends = [], [], []
    for axis, count in ((1, offset.shape[3]), (0, offset.shape[2])):  # x, then y
        middle = kernel.dilation[axis] * (kernel.size[axis] - 1) // 2  # an even kernel's is half a step off
        positions = torch.arange(count, device=offset.device, dtype=offset.dtype)
        centres.append(positions * kernel.stride[axis] - kernel.padding[axis] + middle)
        steps = torch.arange(kernel.size[axis], device=offset.device, dtype=offset.dtype)
        regular.append(steps * kernel.dilation[axis] - middle)
        ends.append(offset.new_full((), input_size[axis]))
    centre = torch.stack(torch.meshgrid(*centres, indexing="xy"), dim=-1)  # (h, w, 2)
    points = torch.stack(torch.meshgrid(*regular, indexing="ij"), dim=-1)  # (kw, kh, 2): column by column
    place = centre + kernel.offset_scale * (points.view(-1, 1, 1, 2) + offset)
    return (2 * place + 1) / torch.stack(ends) - 1


class _WeightedSamples(torch.autograd.Function):
    """maps (N, c, H, W), grid (N, K, h, w, 2), mask (N, 1, K, h, w) -> (N, c, h, w), a few points at a time."""

    @staticmethod
    def forward(ctx, maps: Tensor, grid: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(maps, grid, mask)
        out = maps.new_zeros(*maps.shape[:2], *grid.shape[2:4])
        if maps.is_meta:  # only shapes are wanted, and PyTorch would sample in Python there: seconds for a backbone
            return out
        for points in _portions(maps, grid):
            sampled = _sample(maps, grid[:, points])  # (N, c, k, h, w)
            for one, weight in zip(sampled.unbind(2), mask[:, :, points].unbind(2), strict=True):
                out.addcmul_(one, weight)  # in place: the sum of a product would write three more maps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        maps, grid, mask = ctx.saved_tensors
        if maps.is_meta:
            return torch.empty_like(maps), torch.empty_like(grid), torch.empty_like(mask)
        grad_maps, grads_grid, grads_mask = torch.zeros_like(maps), [], []
        grad_out = grad_out.unsqueeze(2)  # (N, c, 1, h, w)
        for points in _portions(maps, grid):
            with torch.enable_grad():
                leaves = maps.detach().requires_grad_(), grid[:, points].detach().requires_grad_()
                sampled = _sample(*leaves)  # (N, c, k, h, w)
            grads_mask.append((sampled.detach() * grad_out).sum(dim=1, keepdim=True))
            to_maps, to_grid = torch.autograd.grad(sampled, leaves, grad_out * mask[:, :, points])
            grad_maps += to_maps
            grads_grid.append(to_grid)
        return grad_maps, torch.cat(grads_grid, dim=1), torch.cat(grads_mask, dim=2)


def _portions(maps: Tensor, grid: Tensor) -> list[slice]:
    """The K points in runs of as many as SAMPLES_AT_ONCE allows, one at least."""
    num_points = grid.shape[1]
    run = max(1, SAMPLES_AT_ONCE // max(1, maps.shape[0] * maps.shape[1] * grid.shape[2] * grid.shape[3]))
    return [slice(first, first + run) for first in range(0, num_points, run)]


def _sample(maps: Tensor, grid: Tensor) -> Tensor:
    """maps (N, c, H, W) at grid (N, k, h, w, 2), bilinear, zeros outside -> (N, c, k, h, w)."""
    sampled = F.grid_sample(maps, rearrange(grid, "n k h w xy -> n (k h) w xy"), mode="bilinear",
                            padding_mode="zeros", align_corners=False)
    return rearrange(sampled, "n c (k h) w -> n c k h w", k=grid.shape[1])
