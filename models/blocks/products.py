"""Batched products of several tasks' layers, and norms in front of them or behind a gate.

PyTorch's own formulas would transpose the gradients of weights, and keep maps that are made again in no time.
Axes: T tasks, R rows of a task.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.ops.norms import MAX_OUTPUTS, Statistics, few_outputs, has_kernels, norm_backward, norm_forward
from utils.precision import product_dtype


def batched_linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """rows (T, R, in), weight (T, out, in), bias (T, 1 or R, out) -> (T, R, out)."""
    return _BatchedLinear.apply(*_for_products(rows, weight), bias)


def normed_linear(rows: Tensor, scale: Tensor, shift: Tensor, eps: float, weight: Tensor,
                  bias: Tensor | None) -> Tensor:
    """Layer norm of rows (T, R, in) with scale and shift (T in), then `batched_linear` with bias (T, 1, out).

    Without kernels of our own those of several tasks go into the weights: one pass over the rows less each way. The
    norm runs in float32.
    """
    kernels = has_kernels(rows)
    in_float32 = product_dtype(rows, weight.dtype) == torch.float32
    if kernels and in_float32 and weight.shape[1] <= MAX_OUTPUTS and bias is not None:
        per_task = (x.view(len(weight), -1) for x in (scale, shift))
        return few_outputs(rows, *per_task, eps, weight, bias.squeeze(1))
    if not kernels:
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    if kernels or len(weight) == 1:
        return _NormedLinear.apply(rows, scale, shift, _for_products(weight)[0], bias, eps)
    per_task = (len(weight), 1, weight.shape[2])
    shifted = (weight * shift.view(per_task)).sum(dim=2).unsqueeze(1)
    bias = shifted if bias is None else shifted + bias
    return _NormedLinear.apply(rows, None, None, _for_products(weight * scale.view(per_task))[0], bias, eps)


def normed_halves(rows: Tensor, scale: Tensor, shift: Tensor, eps: float, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Layer norm of rows (T, R, in), scale and shift (T, in), then products with weight (T, 2 D, in) -> (R, T, D) and
    (T, R, D). For rows that `has_kernels`: nothing is copied on the way."""
    return _NormedHalves.apply(rows, scale, shift, eps, *_for_products(weight))


def gated_norm(feat: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """Layer norm of feat (B, H, W, T, C), scale and shift (T, C), times SiLU(gate): like gate, (T, B, H, W, C)."""
    return _GatedNorm.apply(feat, gate, scale, shift, eps)


def _for_products(*tensors: Tensor) -> tuple[Tensor, ...]:
    """In the type that autocast asks products to have."""
    return tuple(x.to(product_dtype(tensors[0], x.dtype)) for x in tensors)


def _product(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.bmm(rows, weight.mT) if bias is None else torch.baddbmm(bias.to(rows.dtype), rows, weight.mT)


class _BatchedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, weight, bias):
        ctx.save_for_backward(rows, weight)
        ctx.bias = None if bias is None else (bias.shape[1] == 1, bias.dtype)
        return _product(rows, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        rows, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return (torch.bmm(grad, weight) if wanted[0] else None, torch.bmm(grad.mT, rows) if wanted[1] else None,
                _bias_gradient(grad, *ctx.bias) if wanted[2] else None)


def _bias_gradient(grad: Tensor, of_task: bool, dtype: torch.dtype) -> Tensor:
    return (grad.sum(dim=1, keepdim=True) if of_task else grad).to(dtype)


class _NormedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, scale, shift, weight, bias, eps):
        normed, statistics = _normed(rows, scale, shift, eps, weight.dtype)
        ctx.save_for_backward(rows, scale, shift, *statistics, weight)
        ctx.eps, ctx.bias_dtype = eps, None if bias is None else bias.dtype
        return _product(normed, weight, bias)

    @staticmethod
    def backward(ctx, grad):
        rows, scale, shift, mean, rstd, weight = ctx.saved_tensors
        normed = _normed(rows, scale, shift, ctx.eps, weight.dtype)[0]
        grad_weight = torch.bmm(grad.mT, normed)
        grads = _norm_gradients(torch.bmm(grad, weight), rows, mean, rstd, scale, shift)
        grad_bias = None if ctx.bias_dtype is None else _bias_gradient(grad, True, ctx.bias_dtype)
        return *grads, grad_weight, grad_bias, None


class _NormedHalves(torch.autograd.Function):
    """Rows (T, R, C), scale and shift (T, C), weight (T, 2 D, C) -> (R, T, D), (T, R, D), by kernels."""

    @staticmethod
    def forward(ctx, rows, scale, shift, eps, weight):
        normed, statistics = norm_forward(rows, scale, shift, eps, weight.dtype)
        ctx.save_for_backward(rows, scale, shift, *statistics, weight)
        ctx.eps = eps
        to_first, to_second = weight.chunk(2, dim=1)
        first = normed.new_empty(rows.shape[1], len(rows), to_first.shape[1])
        torch.bmm(normed, to_first.mT, out=first.transpose(0, 1))
        return first, torch.bmm(normed, to_second.mT)

    @staticmethod
    def backward(ctx, grad_first, grad_second):
        rows, scale, shift, mean, rstd, weight = ctx.saved_tensors
        normed = norm_forward(rows, scale, shift, ctx.eps, weight.dtype)[0]
        grad_weight, grad_first = torch.empty_like(weight), grad_first.transpose(0, 1)  # (T, R, D)
        for grad, part in zip((grad_first, grad_second), grad_weight.chunk(2, dim=1), strict=True):
            torch.bmm(grad.mT, normed, out=part)
        to_first, to_second = weight.chunk(2, dim=1)
        grad_normed = torch.bmm(grad_first, to_first).baddbmm_(grad_second, to_second)
        grads = norm_backward(grad_normed, rows, Statistics(mean, rstd), scale, shift)
        return grads.x, grads.scale, grads.shift, None, grad_weight


def _normed(rows: Tensor, scale: Tensor | None, shift: Tensor | None, eps: float, dtype: torch.dtype,
            ) -> tuple[Tensor, Statistics]:
    """Layer norm of rows (T, R, C) with scale and shift (T C), in that dtype; none of the latter without kernels."""
    if has_kernels(rows):
        return norm_forward(rows, scale.view(len(rows), -1), shift.view(len(rows), -1), eps, dtype)
    normed, *statistics = torch.native_layer_norm(rows, rows.shape[2:], scale, shift, eps)
    return normed.to(dtype), Statistics(*statistics)


def _norm_gradients(grad: Tensor, feat: Tensor, mean: Tensor, rstd: Tensor, scale: Tensor | None = None,
                    shift: Tensor | None = None) -> tuple[Tensor | None, ...]:
    """Of a layer norm over the last axis: for what is normed, scale and shift."""
    affine, tasks = scale is not None, len(feat)
    if affine and has_kernels(feat):
        grads = norm_backward(grad, feat, Statistics(mean, rstd), scale.view(tasks, -1), shift.view(tasks, -1))
        return grads.x, grads.scale.flatten(), grads.shift.flatten()
    return torch.ops.aten.native_layer_norm_backward(grad.to(feat.dtype), feat, feat.shape[-1:], mean, rstd, scale,
                                                     shift, [True, affine, affine])


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, feat, gate, weight, bias, eps):
        feat = feat.to(weight.dtype)
        normed, mean, rstd = torch.native_layer_norm(feat, feat.shape[-1:], None, None, eps)
        ctx.save_for_backward(feat, gate, mean, rstd, weight, bias)
        ctx.eps = eps
        return torch.addcmul(bias, normed, weight).permute(3, 0, 1, 2, 4) * F.silu(gate)

    @staticmethod
    def backward(ctx, grad):
        feat, gate, mean, rstd, weight, bias = ctx.saved_tensors
        normed = torch.native_layer_norm(feat, feat.shape[-1:], None, None, ctx.eps)[0]
        affine = torch.addcmul(bias, normed, weight)
        grad_gate = torch.ops.aten.silu_backward((grad * affine.permute(3, 0, 1, 2, 4)).to(gate.dtype), gate)
        grad_affine = grad.permute(1, 2, 3, 0, 4) * F.silu(gate).permute(1, 2, 3, 0, 4)  # (B, H, W, T, C)
        grad_bias = grad_affine.sum(dim=(0, 1, 2))
        grad_weight = (grad_affine * normed).sum(dim=(0, 1, 2))
        grad_feat = _norm_gradients((grad_affine * weight).contiguous(), feat, mean, rstd)[0]
        return grad_feat, grad_gate, grad_weight, grad_bias, None
