"""Layer norms of tasks' maps, alone and times the SiLU of a gate: on a GPU one kernel each way.

PyTorch's layer norm on CUDA takes and gives float32 under autocast, has no weights by task, and keeps a block of
threads for each row, however short. Here maps are read and written in the types they are stored in; sums and
arithmetic are in float32. Elsewhere the same functions are PyTorch's.

Axes: t tasks, each with a scale and a shift of its own; i rows of a task; c channels.
"""

import functools
import importlib
import logging
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.ops.trial import try_out

logger = logging.getLogger(__name__)

FORWARD, BACKWARD = 1024, 512  # values that a warp holds: whole rows where they are short, so that it waits for none
WARPS = 1024  # of a backward pass at most: each program leaves sums
MAX_CHANNELS, MAX_OUTPUTS = 4096, 4
TRIAL_LIMIT = 1e-4  # as of the scan


class Map(NamedTuple):
    """A tensor (t, i, c) as the kernels address it; the channels lie side by side."""

    data: Tensor
    task: int  # strides
    row: int


class Statistics(NamedTuple):
    """Of rows (t, i), float32."""

    mean: Tensor
    rstd: Tensor


class Gradients(NamedTuple):
    """Of a map (t, i, c), its gate, its scale and its shift (t, c)."""

    x: Tensor
    gate: Tensor | None
    scale: Tensor
    shift: Tensor


def layer_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float, dtype: torch.dtype, gate: Tensor | None = None,
               ) -> Tensor:
    """x (t, i, c), normed, times scale, plus shift (t, c), times SiLU(gate) if there is one (t, i, c), in that dtype.

    For maps that `has_kernels`. Nothing but the arguments and two numbers of each row is kept for the backward pass.
    """
    return _LayerNorm.apply(x, scale, shift, eps, dtype, gate)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, shift, eps, dtype, gate):
        value, statistics = norm_forward(x, scale, shift, eps, dtype, gate)
        ctx.save_for_backward(x, scale, shift, gate, *statistics)
        return value

    @staticmethod
    def backward(ctx, grad):
        x, scale, shift, gate, *statistics = ctx.saved_tensors
        grads = norm_backward(grad, x, Statistics(*statistics), scale, shift, gate)
        return grads.x, grads.scale, grads.shift, None, None, grads.gate


def has_kernels(x: Tensor) -> bool:
    """Do kernels run on such a map (.., c)? To torch.compile, which makes kernels of its own, they do not."""
    if not x.is_cuda or x.dtype == torch.float64 or x.shape[-1] > MAX_CHANNELS or torch.compiler.is_compiling():
        return False
    return find_kernels(x.device) is None


@functools.cache
def find_kernels(device: torch.device) -> str | None:
    """Why the kernels do not run on that device, or None; they are tried once. Errors as of `try_out`."""
    if reason := try_out("layer norms", device, lambda: trial(device)):
        logger.warning("layer norms: PyTorch's, slower than ours: %s", reason)
    return reason


def trial(device: torch.device) -> str | None:
    """A small gated norm and a norm with few outputs, with gradients, against float64."""
    generator = torch.Generator().manual_seed(0)
    x, gate, scale, shift, weight, bias = (torch.randn(*shape, generator=generator) for shape in (
        (2, 37, 24), (2, 37, 24), (2, 24), (2, 24), (2, 3, 24), (2, 3)))
    cases = {"gated": ((x, gate, scale, shift), lambda x, gate, *to: layer_norm(x, *to, 1e-5, x.dtype, gate),
                       lambda x, gate, *to: plain(x, gate, *to, 1e-5)),
             "few outputs": ((x, scale, shift, weight, bias), lambda x, a, b, *to: few_outputs(x, a, b, 1e-5, *to),
                             lambda x, a, b, w, c: plain(x, None, a, b, 1e-5) @ w.mT + c[:, None])}
    for name, (inputs, ours, in_words) in cases.items():
        results = []
        for run, place, dtype in ((ours, device, torch.float32), (in_words, torch.device("cpu"), torch.float64)):
            leaves = [tensor.to(place, dtype).requires_grad_() for tensor in inputs]
            out = run(*leaves)
            results.append([out.detach(), *torch.autograd.grad(out.square().sum(), leaves)])
        for value, right in zip(*results, strict=True):
            error = float((value.cpu() - right).abs().max() / right.abs().max())
            if not error <= TRIAL_LIMIT:
                return f"their trial gave wrong numbers, {name}: off by {error:.1e} of the largest value"
    return None


def plain(x: Tensor, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """What is computed, as it reads: x and gate (t, i, c), scale and shift (t, c)."""
    normed = torch.nn.functional.layer_norm(x, x.shape[-1:], eps=eps) * scale[:, None] + shift[:, None]
    return normed if gate is None else normed * torch.nn.functional.silu(gate)


def norm_forward(x: Tensor, scale: Tensor, shift: Tensor, eps: float, dtype: torch.dtype, gate: Tensor | None = None,
                 ) -> tuple[Tensor, Statistics]:
    """`layer_norm` without gradients, and the statistics of x."""
    tasks, rows, channels = x.shape
    x, gate, scale, shift = _dense(x), _dense(gate), scale.contiguous(), shift.contiguous()
    value = torch.empty(x.shape, dtype=dtype, device=x.device)
    mean, rstd = (torch.empty(tasks, rows, dtype=torch.float32, device=x.device) for _ in range(2))
    tile = _tile(channels, FORWARD)
    if x.numel():
        _launch("norm_kernel", -(-rows // tile["ROWS"]), tasks)(
            _map(x), _map(x if gate is None else gate), scale, shift, _map(value), mean, rstd, rows, eps,
            GATED=gate is not None, CHANNELS=channels, **tile)
    return value, Statistics(mean, rstd)


def norm_backward(grad: Tensor, x: Tensor, statistics: Statistics, scale: Tensor, shift: Tensor,
                  gate: Tensor | None = None) -> Gradients:
    """Gradients in the types of what they belong to; that of x lies in memory as x does."""
    tasks, rows, channels = x.shape
    grad, x, gate, scale, shift = _dense(grad), _dense(x), _dense(gate), scale.contiguous(), shift.contiguous()
    tile = _tile(channels, BACKWARD)
    grad_x = torch.empty_like(x)
    grad_gate = None if gate is None else torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    programs = _programs(tasks, rows, tile)
    parts = _parts(x, programs, 2, tasks, channels)  # of the gradients of scale and shift
    if x.numel():
        _launch("norm_backward_kernel", programs, tasks)(
            _map(grad), _map(x), _map(x if gate is None else gate), scale, shift, *statistics,
            _map(grad_x), _map(grad_x if gate is None else grad_gate), parts, rows,
            GATED=gate is not None, CHANNELS=channels, **tile)
    grad_scale, grad_shift = parts.sum(0)
    return Gradients(grad_x, grad_gate, grad_scale.to(scale.dtype), grad_shift.to(shift.dtype))


def few_outputs(x: Tensor, scale: Tensor, shift: Tensor, eps: float, weight: Tensor, bias: Tensor) -> Tensor:
    """x (t, i, c), normed, times scale, plus shift (t, c), through linear layers with weight (t, n, c) and bias (t, n)
    -> (t, i, n), float32. For maps that `has_kernels` and n <= MAX_OUTPUTS: what is normed is never in memory."""
    return _FewOutputs.apply(x, scale, shift, eps, weight, bias)


class _FewOutputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scale, shift, eps, weight, bias):
        x, (tasks, rows, channels), outputs = _dense(x), x.shape, weight.shape[1]
        scale, shift, weight, bias = (tensor.contiguous() for tensor in (scale, shift, weight, bias))
        out = torch.empty(tasks, rows, outputs, dtype=torch.float32, device=x.device)
        mean, rstd = (torch.empty(tasks, rows, dtype=torch.float32, device=x.device) for _ in range(2))
        tile = _tile(channels, FORWARD)
        if x.numel():
            _launch("norm_product_kernel", -(-rows // tile["ROWS"]), tasks)(
                _map(x), scale, shift, weight, bias, out, mean, rstd, rows, eps, OUTPUTS=outputs, CHANNELS=channels,
                **tile)
        ctx.save_for_backward(x, scale, shift, weight, mean, rstd)
        return out

    @staticmethod
    def backward(ctx, grad):
        x, scale, shift, weight, mean, rstd = ctx.saved_tensors
        (tasks, rows, channels), outputs, grad = x.shape, weight.shape[1], grad.contiguous()
        tile, grad_x = _tile(channels, BACKWARD), torch.empty_like(x)
        programs = _programs(tasks, rows, tile)
        totals = _parts(x, programs, tasks, outputs, channels)
        if x.numel():
            _launch("norm_product_backward_kernel", programs, tasks)(
                grad, _map(x), scale, weight, mean, rstd, _map(grad_x), totals, rows, OUTPUTS=outputs,
                CHANNELS=channels, **tile)
        totals, sums = totals.sum(0), grad.sum(1)  # (t, n, c), (t, n)
        grad_weight = totals * scale[:, None] + sums[..., None] * shift[:, None]
        grad_scale, grad_shift = (weight * totals).sum(1), (weight * sums[..., None]).sum(1)
        return grad_x, grad_scale, grad_shift, None, grad_weight.to(weight.dtype), sums


def _parts(x: Tensor, *shape: int) -> Tensor:
    """What the programs of a backward pass over x leave; where there is nothing to do, none of them runs."""
    return (torch.empty if x.numel() else torch.zeros)(shape, dtype=torch.float32, device=x.device)


def _tile(channels: int, values: int) -> dict[str, int]:
    width = 1 << max(channels - 1, 1).bit_length()
    return {"WIDTH": width, "ROWS": max(1, values // width), "num_warps": max(1, width // values)}


def _programs(tasks: int, rows: int, tile: dict[str, int]) -> int:
    """Of a backward pass, for each task."""
    return max(1, min(-(-rows // tile["ROWS"]), WARPS // tile["num_warps"] // tasks))


def _dense(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _map(x: Tensor) -> Map:
    return Map(x, *x.stride()[:2])


def _launch(name: str, *grid: int) -> Callable[..., None]:
    """A kernel on a grid of programs, on the device of the first map that it is called with."""
    def run(x: Map | Tensor, *others: Any, **constants: Any) -> None:
        with torch.cuda.device_of(x.data):
            getattr(_kernels(), name)[grid](x, *others, **constants)
    return run


@functools.cache
def _kernels() -> ModuleType:
    return importlib.import_module("models.ops.norm_kernels")
