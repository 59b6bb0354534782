"""The scan by our Triton kernels: how a call is cut into programs, and whether they run here.

Importing this module does not import Triton, which exists only on some platforms. Axes and terms are those of
`models.ops.triton_kernels`: B images, P tokens, K routes, E channels, N states; chunks and spans of a route.
"""

import functools
import importlib
import math
import os
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from models.ops.routes import Route
from models.ops.scan_args import ScanArgs
from models.ops.scan_choice import Kernels, ScanBackend, ScanNeeds
from models.ops.scan_probe import probe
from utils.extension import first_line

CHUNK_TOKENS = 32  # a GPU wants few launches
MAX_STATE = 64
LOG2_E = 1.4426950408889634


class Rows(NamedTuple):
    """A tensor (B, P, K or G, columns) as the kernels address it; the columns lie side by side."""

    data: Tensor
    batch: int  # strides
    token: int
    route: int  # of routes, or of their groups


class Inputs(NamedTuple):
    """What is scanned."""

    u: Rows
    delta: Rows
    B: Rows
    C: Rows
    A: Tensor  # (K, N, E), times log2(e)
    D: Tensor  # (K, E)
    bias: Tensor  # (K, E)
    routes: Tensor  # (K, 5): index rules


class Gradients(NamedTuple):
    """Where `backward_kernel` writes: gradients, or parts of them that are yet to be added up."""

    u: Rows
    delta: Rows
    B_C: Tensor  # (blocks of channels, B, P, K, 2, N)
    A: Tensor  # (spans, B, K, N, E)
    D: Tensor  # (spans, B, K, E)
    bias: Tensor  # (spans, B, K, E)


class Widths(NamedTuple):
    """Sizes that do not change with the size of an image; the kernels are compiled for them."""

    routes: int
    groups: int
    channels: int
    states: int


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
        return f"triton cannot be imported: {first_line(error)}"
    if _interpreted():
        return None
    if device != "cuda":
        return f"the triton kernels need CUDA tensors, got tensors on {device}"
    if not torch.cuda.is_available():
        return "triton is installed but no CUDA device is available"
    fixed = {"blocks": CANDIDATES[0]}  # candidates are timed for the sizes of a model
    kernels = Kernels(functools.partial(triton_forward, **fixed), functools.partial(triton_backward, **fixed),
                      TRITON.kernels.chunk_tokens)
    reason = probe(kernels, torch.device("cuda"))
    return reason and f"the triton kernels cannot be used: {reason}"


def triton_refusal(needs: ScanNeeds) -> str | None:
    """Why such a call cannot go to the kernels, or None."""
    if needs.num_states > MAX_STATE:
        return f"the triton kernels hold at most {MAX_STATE} states per channel, got {needs.num_states}"
    return find_triton(needs.device)


class _Call:
    """One call as the kernels see it, cut into spans of whole chunks and blocks of channels."""

    def __init__(self, args: ScanArgs, blocks: Blocks):
        self.args, self.blocks, self.dtype = args, blocks, args.scan_dtype
        self.batch, self.tokens, self.num_routes, self.channels = args.delta.shape
        self.states, self.device = args.A.shape[2], args.u.device
        self.A = (args.A.to(self.dtype) * LOG2_E).mT.contiguous()
        zeros = self.A.new_zeros(self.num_routes, self.channels)
        D, bias = (zeros if x is None else x.to(self.dtype).contiguous() for x in (args.D, args.delta_bias))
        self.inputs = Inputs(*(_rows(x) for x in (args.u, args.delta, args.B, args.C)), self.A, D, bias,
                             _route_table(args.routes, self.device))
        self.groups = args.u.shape[2]
        self.widths = Widths(self.num_routes, self.groups, self.channels, self.states)
        self.channel_blocks = -(-self.channels // blocks.channels)
        self.chunks = -(-self.tokens // CHUNK_TOKENS)
        programs_per_span = self.channel_blocks * self.batch * self.groups
        wanted_spans = -(-_multiprocessors(self.device) * blocks.programs // max(programs_per_span, 1))
        chunks_of_span = -(-self.chunks // max(min(wanted_spans, self.chunks), 1))
        self.span = chunks_of_span * CHUNK_TOKENS
        self.spans = -(-self.tokens // max(self.span, 1))

    @property
    def tile(self) -> dict[str, int]:
        """Padded states and channels of a program, and its warps."""
        return {"N": max(1 << (self.states - 1).bit_length(), 2), "E": self.blocks.channels,
                "num_warps": self.blocks.warps}

    def new_states(self, *leading: int) -> Tensor:
        """Zeros (.., B, K, N, E)."""
        return self.A.new_zeros(*leading, self.batch, self.num_routes, self.states, self.channels)

    def scan_over_spans(self, initial: Tensor, grad_y: Rows | None = None) -> Tensor:
        """The state before each span (spans, B, K, N, E), from that before the first one; with `grad_y` the gradient of
        the state behind each span, from that behind the last one."""
        if self.spans <= 1:
            return initial.unsqueeze(0)
        back, grad_y = (False, self.inputs.u) if grad_y is None else (True, grad_y)
        kernels, sequences = _kernels(), self.batch * self.num_routes
        states = self.A.new_empty(self.spans, *initial.shape)
        step_sums = self.A.new_empty(self.spans, self.batch, self.num_routes, self.channels)
        kernels.span_kernel[self.spans, self.channel_blocks, sequences](
            self.inputs, grad_y, states, step_sums, self.widths, self.tokens, self.span,
            SOFTPLUS=self.args.delta_softplus, BACK=back, **self.tile)
        kernels.scan_over_spans_kernel[self.channel_blocks, sequences](
            self.A, states, step_sums, initial, self.widths, self.spans, BACK=back, **self.tile)
        return states

    def launches(self) -> list[tuple[tuple[int, int, int], int, bool]]:
        """(grid, route in its group, add) of the launches: each scans one route of every group and adds to what the
        launch before it has left in the rows of the group."""
        grid = self.spans, self.channel_blocks, self.batch * self.groups
        return [(grid, route, route > 0) for route in range(self.args.routes_per_group)]

    def new_rows(self) -> Tensor:
        """Like u, in the dtype in which the routes of a group are added up."""
        u = self.args.u
        return u.new_empty(u.shape, dtype=self.dtype if self.args.routes_per_group > 1 else u.dtype)


def triton_forward(args: ScanArgs, keep_chunk_states: bool, blocks: Blocks | None = None,
                   ) -> tuple[Tensor, Tensor, Tensor]:
    """y like u, last state (B, K, E, N), and the states (chunks, B, K, N, E) before each chunk, or (0,)."""
    call = _Call(args, blocks or _choose_blocks(args))
    y = call.new_rows()
    last_state = call.new_states()
    chunk_states = call.A.new_empty((call.chunks, *last_state.shape) if keep_chunk_states else 0)
    if call.batch and call.tokens:
        first_states = call.scan_over_spans(call.new_states())
        for grid, route, add in call.launches():
            _kernels().forward_kernel[grid](
                call.inputs, first_states, _rows(y), chunk_states, last_state, call.widths, call.tokens, call.span,
                route, SOFTPLUS=args.delta_softplus, KEEP=keep_chunk_states, ADD=add, CHUNK=CHUNK_TOKENS,
                **call.tile)
    return y.to(args.u.dtype), last_state.mT.contiguous(), chunk_states


def triton_backward(args: ScanArgs, chunk_states: Tensor, grad_y: Tensor, grad_last: Tensor,
                    blocks: Blocks | None = None) -> tuple[Tensor, ...]:
    """Gradients of u, delta, A, B, C, D, delta_bias; those without a token axis in the scan's dtype."""
    call = _Call(args, blocks or _choose_blocks(args))
    tile, grad_u = call.tile, call.new_rows()
    grad_delta = args.delta.new_empty(args.delta.shape)
    # one part of the gradients of B and C from each block of channels, one of A, D and the bias from each span
    grad_B_C = call.A.new_empty(call.channel_blocks, call.batch, call.tokens, call.num_routes, 2, call.states)
    grad_A = call.new_states(call.spans)
    grad_D = call.A.new_zeros(call.spans, call.batch, call.num_routes, call.channels)
    grad_bias = torch.zeros_like(grad_D)
    if call.batch and call.tokens:
        grad_y = _rows(grad_y)
        grads = Gradients(_rows(grad_u), _rows(grad_delta), grad_B_C, grad_A, grad_D, grad_bias)
        grad_last_states = call.scan_over_spans(grad_last.to(call.dtype).mT.contiguous(), grad_y)
        for grid, route, add in call.launches():
            scratch = call.A.new_empty(math.prod(grid) * CHUNK_TOKENS * tile["N"] * tile["E"])
            _kernels().backward_kernel[grid](
                call.inputs, chunk_states, grad_last_states, grad_y, grads, scratch, call.widths, call.tokens,
                call.span, route, SOFTPLUS=args.delta_softplus, ADD=add, CHUNK=CHUNK_TOKENS, **tile)
    grad_B, grad_C = grad_B_C.sum(0).unbind(-2)
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
    return _fastest_blocks(device.index or 0, (*args.A.shape, args.u.shape[2], args.u.dtype, args.scan_dtype))


@functools.cache
def _fastest_blocks(device: int, kind: tuple) -> Blocks:
    from triton.testing import do_bench
    args = _example(torch.device("cuda", device), *kind)
    return min(CANDIDATES, key=lambda blocks: do_bench(lambda: _both_ways(args, blocks), warmup=5, rep=20))


def _example(device: torch.device, num_routes: int, channels: int, state: int, groups: int, dtype: torch.dtype,
             scan_dtype: torch.dtype) -> ScanArgs:
    tokens, ones = TUNING_TOKENS, functools.partial(torch.ones, device=device, dtype=dtype)
    B = C = ones(1, tokens, num_routes, state)
    D = bias = ones(num_routes, channels, dtype=scan_dtype)
    A = -ones(num_routes, channels, state, dtype=scan_dtype)
    u, delta = ones(1, tokens, groups, channels), ones(1, tokens, num_routes, channels)
    return ScanArgs(u, delta, A, B, C, D, bias, None, (Route(1, tokens),) * num_routes, True)


def _both_ways(args: ScanArgs, blocks: Blocks) -> tuple[Tensor, ...]:
    """y, the last state, and the gradients where these two stand for their own gradients."""
    y, last_state, chunk_states = triton_forward(args, True, blocks)
    return y, last_state, *triton_backward(args, chunk_states, y, last_state, blocks)


@functools.lru_cache(maxsize=256)
def _route_table(routes: tuple, device: torch.device) -> Tensor:
    return torch.tensor([route.index_rule for route in routes], dtype=torch.int64, device=device)


def _rows(x: Tensor) -> Rows:
    x = x if x.stride(-1) == 1 else x.contiguous()
    return Rows(x, *x.stride()[:3])


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


TRITON = ScanBackend(triton_refusal, Kernels(triton_forward, triton_backward, lambda device: CHUNK_TOKENS),
                     fastest_on=("cuda",))
