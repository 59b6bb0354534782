"""Selective scan (S6): one operator, interchangeable backends, one line in the log saying which and why.

`scan_routes` scans tokens along routes without reordering them and is what models use; `selective_scan` is the same
scan with Mamba's arguments, for sequences. Neither caller sees a backend: `reference` is the plain recurrence, `torch`
runs everywhere in bounded memory, `cpp` is compiled for the CPU on first use, `triton` are our kernels for CUDA and
`mamba_ssm` is that package's. A backend asked for by name runs, or the call raises.
Reference: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.ops.routes import Route
from models.ops.scan_args import ScanArgs, check_scan, check_tensor
from models.ops.scan_cpp import find_cpp_kernel
from models.ops.scan_mamba import mamba_refusal, mamba_scan
from models.ops.scan_op import scan_flops, scan_op
from models.ops.scan_reference import reference_scan
from models.ops.scan_triton import triton_refusal

logger = logging.getLogger(__name__)

SCAN_BACKENDS = ("auto", "triton", "cpp", "mamba_ssm", "torch", "reference")

_FASTEST = {"cuda": ("triton", "mamba_ssm"), "cpu": ("cpp",)}  # of these the first that runs, else torch
_PLAIN = {"reference": reference_scan, "mamba_ssm": mamba_scan}  # the others run inside our operator

_configured = "auto"
_logged: set[tuple[str, str]] = set()
_counters: list["ScanCounter"] = []


def scan_routes(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, routes: Sequence[Route],
                D: Tensor | None = None, delta_bias: Tensor | None = None, delta_softplus: bool = False,
                return_last_state: bool = False, backend: str = "auto", delta_weight: Tensor | None = None,
                ) -> Tensor | tuple[Tensor, Tensor]:
    """K scans of tokens in spatial order, each along its route: at the p-th token of a route, with h = 0 before it,

    h_p = exp(s_p A) h_{p-1} + s_p B_p u_p;  y_p = sum_n C_p h_p + D u_p;  s is delta + delta_bias, through softplus
    if `delta_softplus`.

    Args:
        u: (B, P, K, E), or (B, P, 1, E) if all routes scan the same tokens; their results are then added up.
        delta: (B, P, K, E), or (B, P, K, R) with delta_weight (K, E, R); then only R columns are kept for gradients.
        A: (K, E, N), real, negative for a decaying state.
        B, C: (B, P, K, N).
        routes: K orders of the P tokens.
        D, delta_bias: (K, E).
        backend: one of SCAN_BACKENDS; "auto" leaves the choice to the variable SCAN_BACKEND, then to
            `set_scan_backend`, then to the first that runs: triton, then mamba_ssm on CUDA; cpp on CPU; else torch.

    Tensors may have any strides; only those whose last axis is not dense are copied. Returns y, like u and in its
    dtype, in spatial order, and with `return_last_state` also the states (B, K, E, N) behind the last tokens. The
    state is float32, or float64 if any input is, also under autocast. On the meta device results are only shapes.
    Raises ValueError on mismatched shapes and unknown backends, RuntimeError when a backend asked for by name cannot
    run.
    """
    args = ScanArgs(u, delta, A, B, C, D, delta_bias, delta_weight, tuple(routes), delta_softplus)
    check_scan(args)
    for counter in _counters:
        counter.add(delta.shape[0], A.shape[0] * A.shape[1], delta.shape[1], A.shape[2])
    y, last_state = _run(args, return_last_state, backend)
    return (y, last_state) if return_last_state else y


def selective_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
                   z: Tensor | None = None, delta_bias: Tensor | None = None, delta_softplus: bool = False,
                   return_last_state: bool = False, backend: str = "auto") -> Tensor | tuple[Tensor, Tensor]:
    """h_t = exp(s_t A) h_{t-1} + s_t B_t u_t with h_{-1} = 0;  y_t = (sum_n C_t h_t + D u_t) SiLU(z_t).

    s_t is delta_t + delta_bias, through softplus if `delta_softplus`. Channel c reads group
    c // (channels / G).

    Args:
        u, delta, z: (batch, channels, L); without z there is no gate.
        A: (channels, N), real, negative for a decaying state.
        B, C: (batch, G, N, L), or (batch, N, L) for one group, or (channels, N) if constant in time, which is
            slow: every channel then counts as a group.
        D, delta_bias: (channels,).
        backend: as in `scan_routes`.

    Returns y (batch, channels, L) in u's dtype, channels-last in memory, and with `return_last_state` also h_{L-1},
    of shape (batch, channels, N), which contains neither D nor z. Precision and errors: as in `scan_routes`.
    """
    B, C = (m.unsqueeze(1) if m.dim() == 3 else m for m in (B, C))  # (batch, N, L) -> (batch, 1, N, L)
    groups = _check_sequences(u, delta, A, B, C, D, z, delta_bias)
    out_dtype = u.dtype
    if z is not None:  # one rounding to half precision, behind the gate
        u = u.to(torch.float64 if torch.float64 in (u.dtype, z.dtype) else torch.float32)
    per_channel = (None if x is None else x.unflatten(0, (groups, -1)) for x in (A, D, delta_bias))
    A, D, delta_bias = per_channel
    rows = (x.mT.unflatten(2, (groups, -1)) for x in (u, delta))  # (batch, L, G, channels / G)
    maps = (_group_maps(x, groups, u.shape) for x in (B, C))  # (batch, L, G, N)
    y, last_state = scan_routes(*rows, A, *maps, [Route(1, u.shape[2])] * groups, D, delta_bias, delta_softplus,
                                return_last_state=True, backend=backend)
    y = y.flatten(2).mT  # (batch, channels, L)
    if z is not None:
        y = (y * F.silu(z.to(y.dtype))).to(out_dtype)
    return (y, last_state.flatten(1, 2)) if return_last_state else y


def _group_maps(maps: Tensor, groups: int, shape: torch.Size) -> Tensor:
    """(batch, G, N, L) to (batch, L, G, N); a constant map (channels, N), or one of fewer groups, is repeated."""
    batch, channels, length = shape
    if maps.dim() == 2:
        return maps.expand(batch, length, -1, -1)
    return maps.permute(0, 3, 1, 2).repeat_interleave(groups // maps.shape[1], dim=2) if groups != maps.shape[1] \
        else maps.permute(0, 3, 1, 2)


def _check_sequences(u, delta, A, B, C, D, z, delta_bias) -> int:
    """The number of groups. Raises ValueError naming the argument, its shape and the shape it should have."""
    if u.dim() != 3 or A.dim() != 2:
        raise ValueError(f"selective_scan needs u (B, D, L) and A (D, N), got u {tuple(u.shape)} "
                         f"and A {tuple(A.shape)}")
    batch, channels, length = u.shape
    groups = next((m.shape[1] for m in (B, C) if m.dim() == 4), 1)
    if groups < 1 or channels % groups:
        raise ValueError(f"selective_scan: {groups} groups of B, C do not divide {channels} channels")
    constant, varying = (channels, A.shape[1]), (batch, groups, A.shape[1], length)
    allowed = {"delta": [u.shape], "A": [constant], "B": [varying, constant], "C": [varying, constant],
               "D": [(channels,)], "z": [u.shape], "delta_bias": [(channels,)]}
    for name, tensor in zip(allowed, (delta, A, B, C, D, z, delta_bias), strict=True):
        if tensor is None:
            continue
        if tuple(tensor.shape) not in map(tuple, allowed[name]):
            raise ValueError(f"selective_scan: {name} has shape {tuple(tensor.shape)}, "
                             f"expected {' or '.join(str(tuple(s)) for s in allowed[name])} for u {tuple(u.shape)}")
        check_tensor(name, tensor, u)
    return channels if B.dim() == 2 or C.dim() == 2 else groups


def set_scan_backend(name: str) -> None:
    """Sets the backend of calls that name none (config key `scan_backend`); SCAN_BACKEND overrides it."""
    global _configured
    _configured = _known(name, "set_scan_backend")


def _run(args: ScanArgs, return_last_state: bool, backend: str) -> tuple[Tensor, Tensor]:
    if args.u.is_meta:
        return scan_op(args, "torch")
    state_gradient = (return_last_state and torch.is_grad_enabled()
                      and any(tensor.requires_grad for tensor in args.tensors.values()))
    name = _choose(args.u.device.type, args.scan_dtype, args.A.shape[2], state_gradient, backend)
    if name in _PLAIN:
        return _PLAIN[name](args.with_wide_delta())
    return scan_op(args, name)


@torch.compiler.assume_constant_result
def _choose(device: str, dtype: torch.dtype, state: int, state_gradient: bool, argument: str) -> str:
    """Name of the backend of such a call: argument, then environment, then configuration, then what works."""
    environment = os.environ.get("SCAN_BACKEND") or "auto"
    requests = ((argument, "the backend argument"), (environment, "SCAN_BACKEND"),
                (_configured, "the configuration"))
    for name, source in requests:
        if _known(name, source) == "auto":
            continue
        refusal = _refusal(name, device, dtype, state, state_gradient)
        if refusal:
            raise RuntimeError(f"scan backend '{name}' was requested by {source} but cannot run: {refusal}")
        return _log_choice(name, f"requested by {source}")
    refusals = []
    for name in _FASTEST.get(device, ()):
        refusal = _refusal(name, device, dtype, state, state_gradient)
        if not refusal:
            return _log_choice(name, "; ".join(refusals) or "the fastest here")
        refusals.append(refusal)
    return _log_choice("torch", "; ".join(refusals) or f"no other for {device} tensors")


def _refusal(name: str, device: str, dtype: torch.dtype, state: int, state_gradient: bool) -> str | None:
    """Why the backend cannot run such a call, or None."""
    if name == "triton":
        return triton_refusal(device, state)
    if name == "mamba_ssm":
        return mamba_refusal(device, dtype, state_gradient)
    if name == "cpp":
        return find_cpp_kernel() if device == "cpu" else f"cpp needs CPU tensors, got tensors on {device}"
    return None


def _known(name: str, place: str) -> str:
    if name not in SCAN_BACKENDS:
        raise ValueError(f"{place}: unknown scan backend {name!r}, choose from {', '.join(SCAN_BACKENDS)}")
    return name


def _log_choice(name: str, reason: str) -> str:
    if (name, reason) not in _logged:
        _logged.add((name, reason))
        logger.info("selective scan: %s backend (%s)", name, reason)
    return name


@dataclass
class ScanCounter:
    """What the scans of a `count_scan_flops` block did; `elements` sums batch * channels * length."""

    calls: int = 0
    elements: int = 0
    flops: int = 0

    def add(self, batch: int, channels: int, length: int, state: int) -> None:
        self.calls += 1
        self.elements += batch * channels * length
        self.flops += scan_flops(batch, length, channels, state)


@contextmanager
def count_scan_flops() -> Iterator[ScanCounter]:
    """Counts the scans run inside the block, on any device and with any backend, one unit per multiply-add."""
    counter = ScanCounter()
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters.remove(counter)
