"""The scan as two operators of torch.library, `mtdp::scan` and `mtdp::scan_backward`.

Registered with shapes for fake and meta tensors, a gradient formula and a cost, so that torch.compile, torch.export,
meta-device counting and torch.utils.flop_counter all see one node where a scan runs. Step sizes of low rank are brought
to the channels inside, so that only the former are kept for the backward pass. Which backend's kernels run, by its name
in `models.ops.SCAN_BACKENDS`, is an argument, decided by the caller. Routes travel as a flat list, four integers each.
"""

import functools

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from models.ops import SCAN_BACKENDS
from models.ops.routes import Route
from models.ops.scan_args import ScanArgs, rows_by_weights, sum_of_products
from models.ops.scan_choice import Kernels

_INPUTS = ("Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? delta_bias, Tensor? delta_weight, "
           "int[] routes, bool delta_softplus")
torch.library.define("mtdp::scan", f"({_INPUTS}, bool keep_chunk_states, str backend) -> (Tensor, Tensor, Tensor)")
torch.library.define(
    "mtdp::scan_backward", f"(Tensor grad_y, Tensor grad_last, Tensor chunk_states, {_INPUTS}, str backend) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")


def scan_op(args: ScanArgs, backend: str) -> tuple[Tensor, Tensor]:
    """y, like u, and the last state (B, K, E, N) in the scan's dtype, with gradients through both."""
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in args.tensors.values())
    routes = [int(number) for route in args.routes for number in route]
    dtype = args.scan_dtype
    D, bias = (None if x is None else x.to(dtype) for x in (args.D, args.delta_bias))
    y, last_state, _ = torch.ops.mtdp.scan(args.u, args.delta, args.A.to(dtype), args.B, args.C, D, bias,
                                           args.delta_weight, routes, args.delta_softplus, keep, backend)
    return y, last_state


def _args(u, delta, A, B, C, D, delta_bias, delta_weight, routes, delta_softplus) -> ScanArgs:
    """From the operator's arguments."""
    return ScanArgs(u, delta, A, B, C, D, delta_bias, delta_weight, _routes(tuple(routes)), delta_softplus)


@functools.lru_cache(maxsize=256)
def _routes(numbers: tuple[int, ...]) -> tuple[Route, ...]:
    """One of four integers each."""
    return tuple(Route(rows, columns, bool(by_column), bool(reverse)) for rows, columns, by_column, reverse
                 in zip(*[iter(numbers)] * len(Route._fields), strict=True))


def _kernels(backend: str) -> Kernels:
    return SCAN_BACKENDS.load(backend).kernels


@torch.library.impl("mtdp::scan", ("CPU", "CUDA"))
def _scan(u, *inputs):
    *inputs, keep_chunk_states, backend = inputs
    with torch.autocast(u.device.type, enabled=False):
        return _kernels(backend).forward(_args(u, *inputs).with_full_delta(), keep_chunk_states)


@torch.library.impl("mtdp::scan_backward", ("CPU", "CUDA"))
def _scan_backward(grad_y, grad_last, chunk_states, *inputs):
    *inputs, backend = inputs
    args, kernels = _args(*inputs), _kernels(backend)
    with torch.autocast(grad_y.device.type, enabled=False):
        full = args.with_full_delta()
        if not chunk_states.numel():  # traced where no gradient was asked for
            chunk_states = kernels.forward(full, True)[2]
        grad_u, grad_delta, *grads = kernels.backward(full, chunk_states, grad_y, grad_last)
        if args.delta_weight is None:
            return grad_u, grad_delta, *grads, grad_delta.new_empty(0)
        weight = args.delta_weight.to(args.delta.dtype)
        if grad_delta.is_cuda:
            grad_weight, grad_delta = sum_of_products(grad_delta, args.delta), rows_by_weights(grad_delta, weight.mT)
        else:
            grad_weight = torch.einsum("bpke,bpkr->ker", grad_delta, args.delta)
            grad_delta = torch.einsum("bpke,ker->bpkr", grad_delta, weight).contiguous()
        return grad_u, grad_delta, *grads, grad_weight.to(args.delta_weight)


@torch.library.register_fake("mtdp::scan")
def _fake_scan(u, delta, A, B, C, D, delta_bias, delta_weight, routes, delta_softplus, keep_chunk_states, backend):
    batch, tokens = delta.shape[:2]
    num_routes, channels, state = A.shape
    chunks = -(-tokens // _kernels(backend).chunk_tokens(u.device))
    chunk_states = (chunks, batch, num_routes, state, channels) if keep_chunk_states else (0,)
    return u.new_empty(u.shape), A.new_empty(batch, num_routes, channels, state), A.new_empty(chunk_states)


@torch.library.register_fake("mtdp::scan_backward")
def _fake_scan_backward(grad_y, grad_last, chunk_states, u, delta, A, B, C, D, delta_bias, delta_weight, *constants):
    per_channel = A.shape[:2]
    grad_weight = u.new_empty(0) if delta_weight is None else delta_weight.new_empty(delta_weight.shape)
    return (*(x.new_empty(x.shape) for x in (u, delta, A, B, C)), A.new_empty(per_channel), A.new_empty(per_channel),
            grad_weight)


def _save(ctx, inputs, output):
    *tensors, routes, delta_softplus, _, backend = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.constants = routes, delta_softplus, backend
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad_y, grad_last, grad_chunk_states):
    *tensors, chunk_states = ctx.saved_tensors
    u, _, A = tensors[:3]
    grad_y = torch.zeros_like(u) if grad_y is None else grad_y
    if grad_last is None:
        grad_last = A.new_zeros(u.shape[0], *A.shape)
    grads = torch.ops.mtdp.scan_backward(grad_y, grad_last, chunk_states, *tensors, *ctx.constants)
    return *(None if x is None else grad for x, grad in zip(tensors, grads, strict=True)), None, None, None, None


torch.library.register_autograd("mtdp::scan", _gradients, setup_context=_save)


def scan_flops(batch: int, length: int, channels: int, state: int) -> int:
    """Cost of one scan as this family of papers counts it: 9 B L D N + B L D, added to the multiply-adds of other
    layers."""
    return 9 * batch * length * channels * state + batch * length * channels


@register_flop_formula(torch.ops.mtdp.scan)
def _flops(u_shape, delta_shape, A_shape, B_shape, C_shape, D_shape, bias_shape, delta_weight_shape, *args,
           **kwargs) -> int:
    """FLOP counters count two per multiply-add."""
    batch, length, num_routes, rank = delta_shape
    channels = num_routes * A_shape[1]
    projection = 0 if delta_weight_shape is None else batch * length * channels * rank
    return 2 * (scan_flops(batch, length, channels, A_shape[2]) + projection)


@register_flop_formula(torch.ops.mtdp.scan_backward)
def _backward_flops(grad_y_shape, grad_last_shape, chunk_states_shape, *args, **kwargs) -> int:
    """Twice the forward pass, as for matrix products."""
    return 2 * _flops(*args)
