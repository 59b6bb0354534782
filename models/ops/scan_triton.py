"""The scan by our Triton kernels: how a call is cut into programs, and whether they run here.

Importing this module does not import Triton, which exists only on some platforms.
"""

import functools
import importlib
import os
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from models.ops.routes import Route
from models.ops.scan_args import ScanArgs, chunk_tokens

MAX_STATE = 64
LOG2_E = 1.4426950408889634


class Blocks(NamedTuple):
    """How work is cut: channels and warps of a program, and how many programs a multiprocessor should get."""

    channels: int
    warps: int
    programs: int


CANDIDATES = (Blocks(32, 1, 16), Blocks(32, 1, 8), Blocks(64, 2, 8))
INTERPRETED = Blocks(32, 1, 6)
TUNING_TOKENS = 8192


@functools.cache
def _kernels() -> ModuleType:
    return importlib.import_module("models.ops.triton_kernels")


@functools.cache
def find_triton(device: str) -> str | None:
    """Why the kernels cannot run on such devices, or None; on CUDA a call with gradients is tried once."""
    try:
        _kernels()
    except ImportError as error:
        return f"triton cannot be imported: {_first_line(error)}"
    if _interpreted():
        return None
    if device != "cuda":
        return f"the triton kernels need CUDA tensors, got tensors on {device}"
    if not torch.cuda.is_available():
        return "triton is installed but no CUDA device is available"
    try:
        return _probe()
    except Exception as error:  # compilers fail in many ways; whichever it was, it is said
        return f"the triton probe call failed: {type(error).__name__}: {_first_line(error)}"


def triton_refusal(device: str, state: int) -> str | None:
    """Why such a call cannot go to the kernels, or None."""
    if state > MAX_STATE:
        return f"the triton kernels hold at most {MAX_STATE} states per channel, got {state}"
    return find_triton(device)


def triton_forward(args: ScanArgs, keep_entries: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y like u, last state (B, K, E, N), and the states (chunks, B, K, N, E) at the entries of chunks, or (0,)."""
    return _forward(_Call(args, _choose_blocks(args)), keep_entries)


def triton_backward(args: ScanArgs, entries: Tensor, grad_y: Tensor, grad_last: Tensor) -> tuple[Tensor, ...]:
    """Gradients of u, delta, A, B, C, D, delta_bias; those without a token axis in the scan's dtype."""
    return _backward(_Call(args, _choose_blocks(args)), entries, grad_y, grad_last)


class _Call:
    """One call as the kernels see it: dense rows, A as (K, N, E) in powers of two, spans of whole chunks."""

    def __init__(self, args: ScanArgs, blocks: Blocks):
        self.args, self.blocks, self.dtype = args, blocks, args.scan_dtype
        self.batch, self.tokens, self.groups, self.channels = args.delta.shape
        self.states, self.device = args.A.shape[2], args.u.device
        self.u, self.delta, self.B, self.C = (_dense(x) for x in (args.u, args.delta, args.B, args.C))
        self.A = (args.A.to(self.dtype) * LOG2_E).mT.contiguous()
        zeros = self.A.new_zeros(self.groups, self.channels)
        self.D, self.bias = (zeros if x is None else x.to(self.dtype).contiguous() for x in (args.D, args.delta_bias))
        self.routes = _route_table(args.routes, self.device)
        self.chunk = chunk_tokens("triton", self.device)
        self.channel_blocks = -(-self.channels // blocks.channels)
        # Routes that share their tokens run one after the other and add to the same rows.
        self.launched = 1 if args.shared else self.groups
        chunks = -(-self.tokens // self.chunk)
        wanted = -(-_multiprocessors(self.device) * blocks.programs // max(self.channel_blocks * self.batch
                                                                            * self.launched, 1))
        chunks_of_span = -(-chunks // max(min(wanted, chunks), 1))
        self.span = chunks_of_span * self.chunk
        self.spans = -(-self.tokens // max(self.span, 1))
        self.chunks = chunks

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return self.tokens, self.groups, self.channels, self.states

    @property
    def tile(self) -> dict[str, int]:
        """Padded states and channels of a program, and its warps."""
        return {"N": max(1 << (self.states - 1).bit_length(), 2), "E": self.blocks.channels,
                "num_warps": self.blocks.warps}

    def per_state(self, *leading: int) -> Tensor:
        return self.A.new_zeros(*leading, self.batch, self.groups, self.states, self.channels)

    def span_states(self, initial: Tensor, grad_y: Tensor | None = None) -> Tensor:
        """What enters each span (spans, B, K, N, E): states, or adjoints where `grad_y` is given."""
        if self.spans <= 1:
            return initial.unsqueeze(0)
        back, kernels = grad_y is not None, _kernels()
        ends = self.A.new_empty(self.spans, *initial.shape)
        sums = self.A.new_empty(self.spans, self.batch, self.groups, self.channels)
        maps, out = (self.C, _dense(grad_y)) if back else (self.B, self.u)
        kernels.span_ends[self.spans, self.channel_blocks, self.batch * self.groups](
            self.u, self.delta, self.A, maps, self.bias, self.routes, ends, sums, out, *_strides(self.u),
            *_strides(self.delta), *_strides(maps), *_strides(out), *self.sizes, self.span,
            SOFTPLUS=self.args.delta_softplus, BACK=back, **self.tile)
        kernels.join_spans[self.channel_blocks, self.batch * self.groups](
            self.A, ends, sums, initial, self.spans, self.groups, self.channels, self.states, BACK=back, **self.tile)
        return ends

    def launches(self) -> list[tuple[tuple[int, int, int], int, int, bool]]:
        """(grid, first group, groups, add) of the launches that together walk all groups."""
        grid = self.spans, self.channel_blocks, self.batch * self.launched
        return [(grid, first, self.launched, first > 0) for first in range(0, self.groups, self.launched)]


def _forward(call: _Call, keep_entries: bool) -> tuple[Tensor, Tensor, Tensor]:
    args = call.args
    y = args.u.new_empty(args.u.shape, dtype=call.dtype if args.shared else args.u.dtype)
    last_state = call.per_state()
    entries = call.A.new_empty((call.chunks, *last_state.shape) if keep_entries else 0)
    if call.batch and call.tokens:
        starts = call.span_states(call.per_state())
        for grid, first, groups, add in call.launches():
            _kernels().walk_forward[grid](
                call.u, call.delta, call.A, call.B, call.C, call.D, call.bias, call.routes, starts, y, entries,
                last_state, *_strides(call.u), *_strides(call.delta), *_strides(call.B), *_strides(call.C),
                *_strides(y), *call.sizes, call.span, first, groups, SOFTPLUS=args.delta_softplus, KEEP=keep_entries,
                ADD=add, CHUNK=call.chunk, **call.tile)
    return y.to(args.u.dtype), last_state.mT.contiguous(), entries


def _backward(call: _Call, entries: Tensor, grad_y: Tensor, grad_last: Tensor) -> tuple[Tensor, ...]:
    args, grad_y = call.args, _dense(grad_y)
    grad_u = args.u.new_empty(args.u.shape, dtype=call.dtype if args.shared else args.u.dtype)
    grad_delta = args.delta.new_empty(args.delta.shape)
    # one part of the gradients of B and C from each block of channels, one of A, D and the bias from each span
    maps = call.A.new_empty(call.channel_blocks, call.batch, call.tokens, call.groups, 2, call.states)
    grad_A = call.per_state(call.spans)
    grad_D = call.A.new_zeros(call.spans, call.batch, call.groups, call.channels)
    grad_bias = torch.zeros_like(grad_D)
    if call.batch and call.tokens:
        exits = call.span_states(grad_last.to(call.dtype).mT.contiguous(), grad_y)
        for grid, first, groups, add in call.launches():
            tile = call.tile
            scratch = call.A.new_empty(grid[0] * grid[1] * grid[2] * call.chunk * tile["N"] * tile["E"])
            _kernels().walk_backward[grid](
                call.u, call.delta, call.A, call.B, call.C, call.D, call.bias, call.routes, entries, exits, grad_y,
                grad_u, grad_delta, maps, grad_A, grad_D, grad_bias, scratch, *_strides(call.u),
                *_strides(call.delta), *_strides(call.B), *_strides(call.C), *_strides(grad_y), *_strides(grad_u),
                *_strides(grad_delta), *call.sizes, call.span, first, groups, SOFTPLUS=args.delta_softplus, ADD=add,
                CHUNK=call.chunk, **tile)
    grad_B, grad_C = maps.sum(0).unbind(-2)
    return (grad_u.to(args.u.dtype), grad_delta, grad_A.sum((0, 1)).mT.contiguous(), grad_B.to(args.B.dtype),
            grad_C.to(args.C.dtype), grad_D.sum((0, 1)), grad_bias.sum((0, 1)))


def _choose_blocks(args: ScanArgs) -> Blocks:
    """The fastest candidate for such channels, states and dtypes, timed once per process; a fixed one where PyTorch is
    asked for deterministic algorithms, as the cut decides the order of sums."""
    if _interpreted():
        return INTERPRETED
    if torch.are_deterministic_algorithms_enabled():
        return CANDIDATES[0]
    device = args.u.device
    return _fastest_blocks(device.index or 0, *args.A.shape, args.shared, args.u.dtype, args.scan_dtype)


@functools.cache
def _fastest_blocks(device: int, groups: int, channels: int, state: int, shared: bool, dtype: torch.dtype,
                    scan_dtype: torch.dtype) -> Blocks:
    from triton.testing import do_bench
    args = _example(torch.device("cuda", device), groups, channels, state, shared, dtype, scan_dtype)

    def both_ways(call: _Call) -> None:
        y, last_state, entries = _forward(call, True)
        _backward(call, entries, y, last_state)

    return min(CANDIDATES, key=lambda blocks: do_bench(lambda: both_ways(_Call(args, blocks)), warmup=5, rep=20))


def _example(device: torch.device, groups: int, channels: int, state: int, shared: bool, dtype: torch.dtype,
             scan_dtype: torch.dtype, tokens: int = TUNING_TOKENS) -> ScanArgs:
    ones = functools.partial(torch.ones, device=device, dtype=dtype)
    maps, per_channel = ones(1, tokens, groups, state), ones(groups, channels, dtype=scan_dtype)
    A = -ones(groups, channels, state, dtype=scan_dtype)
    u, delta = ones(1, tokens, 1 if shared else groups, channels), ones(1, tokens, groups, channels)
    return ScanArgs(u, delta, A, maps, maps, per_channel, per_channel, None, (Route(1, tokens),) * groups, True)


def _probe() -> str | None:
    """Runs a small scan with gradients on the GPU; why its results are wrong, or None."""
    from models.ops.scan_torch import torch_backward, torch_forward
    args = _example(torch.device("cuda"), 2, 40, 16, True, torch.float32, torch.float32, tokens=100)
    call = _Call(args, CANDIDATES[0])
    y, last_state, entries = _forward(call, True)
    grads = _backward(call, entries, y, last_state)
    expected, expected_state, entries = torch_forward(args, True)
    truth = (expected, expected_state, *torch_backward(args, entries, expected, expected_state))
    for found, right in zip((y, last_state, *grads), truth, strict=True):
        if not torch.allclose(found, right, rtol=1e-3, atol=1e-3 * float(right.abs().max())):
            return "the triton probe call gave wrong results"
    return None


@functools.lru_cache(maxsize=256)
def _route_table(routes: tuple, device: torch.device) -> Tensor:
    return torch.tensor([route.rule for route in routes], dtype=torch.int64, device=device)


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Of batch, token and route; a single row that serves all routes has none for the last."""
    return x.stride(0), x.stride(1), 0 if x.shape[2] == 1 else x.stride(2)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
