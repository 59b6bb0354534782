"""Selective scan (S6): one operator with interchangeable backends (`models.ops.SCAN_BACKENDS`).

`scan_routes` scans tokens along routes without reordering them and is what models use; `selective_scan` is the same
scan with Mamba's arguments, for sequences. Neither caller sees a backend; `models.ops.scan_choice` chooses it.
Reference: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.ops.routes import Route
from models.ops.scan_args import ScanArgs, check_scan, check_tensor
from models.ops.scan_choice import ScanNeeds, choose_backend
from models.ops.scan_op import scan_flops, scan_op

_counters: list["ScanCounter"] = []


def scan_routes(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, routes: Sequence[Route],
                D: Tensor | None = None, delta_bias: Tensor | None = None, delta_softplus: bool = False,
                return_last_state: bool = False, backend: str = "auto", delta_weight: Tensor | None = None,
                ) -> Tensor | tuple[Tensor, Tensor]:
    """K scans of tokens in spatial order, each along its route: at the p-th token of a route, with h = 0 before it,

    h_p = exp(s_p A) h_{p-1} + s_p B_p u_p;  y_p = sum_n C_p h_p + D u_p;  s is delta + delta_bias, through softplus
    if `delta_softplus`.

    Args:
        u: (B, P, G, E) in G groups, which divide the K routes: group g's tokens are scanned by routes g K / G to
            (g + 1) K / G - 1, and the results of these are added up. With G = K every route has tokens of its own, with
            G = 1 all share theirs.
        delta: (B, P, K, E), or (B, P, K, R) with delta_weight (K, E, R); then only R columns are kept for gradients.
        A: (K, E, N), real, negative for a decaying state.
        B, C: (B, P, K, N).
        routes: K orders of the P tokens.
        D, delta_bias: (K, E).
        backend: one of SCAN_BACKENDS; "auto" leaves the choice to the variable SCAN_BACKEND, then to
            `set_scan_backend`, then to the fastest that can run (see `models.ops.scan_choice`).

    Tensors may have any strides; only those whose last axis is not dense are copied. Returns y, like u and in its
    dtype, in spatial order, and with `return_last_state` also the states (B, K, E, N) behind the last tokens. The
    state is float32, or float64 if any input is, also under autocast. On the meta device results are only shapes.
    Raises ValueError on mismatched shapes, unknown backends, and when a backend asked for by name cannot
    run.
    """
    args = ScanArgs(u, delta, A, B, C, D, delta_bias, delta_weight, tuple(routes), delta_softplus)
    check_scan(args)
    for counter in _counters:
        counter.calls += 1
        counter.elements += delta.shape[0] * delta.shape[1] * A.shape[0] * A.shape[1]
        counter.flops += scan_flops(delta.shape[0], delta.shape[1], A.shape[0] * A.shape[1], A.shape[2])
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
    B, C = (x.unsqueeze(1) if x.dim() == 3 else x for x in (B, C))  # (batch, N, L) -> (batch, 1, N, L)
    groups = _check_sequences(u, delta, A, B, C, D, z, delta_bias)
    out_dtype = u.dtype
    if z is not None:  # one rounding to half precision, behind the gate
        u = u.to(torch.float64 if torch.float64 in (u.dtype, z.dtype) else torch.float32)
    A, D, delta_bias = (None if x is None else x.unflatten(0, (groups, -1)) for x in (A, D, delta_bias))
    rows = (x.mT.unflatten(2, (groups, -1)) for x in (u, delta))  # (batch, L, G, channels / G)
    B, C = (_per_group(x, groups, u.shape) for x in (B, C))  # (batch, L, G, N)
    y, last_state = scan_routes(*rows, A, B, C, [Route(1, u.shape[2])] * groups, D, delta_bias, delta_softplus,
                                return_last_state=True, backend=backend)
    y = y.flatten(2).mT  # (batch, channels, L)
    if z is not None:
        y = (y * F.silu(z.to(y.dtype))).to(out_dtype)
    return (y, last_state.flatten(1, 2)) if return_last_state else y


def _per_group(x: Tensor, groups: int, shape: torch.Size) -> Tensor:
    """B or C (batch, G, N, L) to (batch, L, G, N); a constant one (channels, N), or fewer groups, are repeated."""
    batch, channels, length = shape
    if x.dim() == 2:
        return x.expand(batch, length, -1, -1)
    rows = x.permute(0, 3, 1, 2)
    return rows if groups == x.shape[1] else rows.repeat_interleave(groups // x.shape[1], dim=2)


def _check_sequences(u, delta, A, B, C, D, z, delta_bias) -> int:
    """The number of groups. Raises ValueError naming the argument, its shape and the shape it should have."""
    if u.dim() != 3 or A.dim() != 2:
        raise ValueError(f"selective_scan needs u (B, D, L) and A (D, N), got u {tuple(u.shape)} "
                         f"and A {tuple(A.shape)}")
    batch, channels, length = u.shape
    groups = next((x.shape[1] for x in (B, C) if x.dim() == 4), 1)
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


def _run(args: ScanArgs, return_last_state: bool, backend: str) -> tuple[Tensor, Tensor]:
    if args.u.is_meta:
        return scan_op(args, "torch")
    state_gradient = (return_last_state and torch.is_grad_enabled()
                      and any(tensor.requires_grad for tensor in args.tensors.values()))
    needs = ScanNeeds(args.u.device.type, args.scan_dtype, args.A.shape[2], state_gradient, args.u.dtype,
                      len(args.routes))
    name, chosen = choose_backend(needs, backend)
    return scan_op(args, name) if chosen.scan is None else chosen.scan(args.with_full_delta())


@dataclass
class ScanCounter:
    """What the scans of a `count_scan_flops` block did; `elements` sums batch * channels * length."""

    calls: int = 0
    elements: int = 0
    flops: int = 0


@contextmanager
def count_scan_flops() -> Iterator[ScanCounter]:
    """Counts the scans run inside the block, on any device and with any backend, one unit per multiply-add."""
    counter = ScanCounter()
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters.remove(counter)
