"""Selective scan (S6): one function, interchangeable backends, one line in the log saying which and why.

Models call `selective_scan` and never see a backend. `reference` is the plain recurrence, `torch` runs
everywhere in bounded memory, `mamba_ssm` is the fused CUDA kernel. A backend asked for by name runs, or the
call raises.
Reference: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023.
"""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from models.ops.scan_args import ScanArgs
from models.ops.scan_mamba import mamba_refusal, mamba_scan
from models.ops.scan_reference import reference_scan
from models.ops.scan_torch import torch_scan

logger = logging.getLogger(__name__)

SCAN_BACKENDS = ("auto", "torch", "mamba_ssm", "reference")
_RUN = {"torch": torch_scan, "mamba_ssm": mamba_scan, "reference": reference_scan}

_configured = "auto"
_logged: set[tuple[str, str]] = set()
_counters: list["ScanCounter"] = []


def selective_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
                   z: Tensor | None = None, delta_bias: Tensor | None = None, delta_softplus: bool = False,
                   return_last_state: bool = False, backend: str = "auto") -> Tensor | tuple[Tensor, Tensor]:
    """h_t = exp(s_t A) h_{t-1} + s_t B_t u_t with h_{-1} = 0;  y_t = (sum_n C_t h_t + D u_t) SiLU(z_t).

    s_t is delta_t + delta_bias, through softplus if `delta_softplus`. Channel c reads group
    c // (channels / G).

    Args:
        u, delta, z: (batch, channels, L); without z there is no gate.
        A: (channels, N), real, negative for a decaying state.
        B, C: (batch, G, N, L), or (batch, N, L) for one group, or (channels, N) if constant in time.
        D, delta_bias: (channels,).
        backend: one of SCAN_BACKENDS; "auto" leaves the choice to the variable SCAN_BACKEND, then to
            `set_scan_backend`, then to mamba_ssm on CUDA tensors where it works and torch elsewhere.

    Returns y (batch, channels, L) in u's dtype, and with `return_last_state` also h_{L-1}, of shape
    (batch, channels, N), which contains neither D nor z. The state is float32, or float64 if any input is,
    also under autocast. On the meta device y is only a shape. Raises ValueError on mismatched shapes and
    unknown backends, RuntimeError when a backend asked for by name cannot run.
    """
    B, C = (m.unsqueeze(1) if m.dim() == 3 else m for m in (B, C))  # (batch, N, L) -> (batch, 1, N, L)
    args = ScanArgs(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    for counter in _counters:
        counter.add(*u.shape, A.shape[1])
    if u.is_meta:
        y, last_state = torch.empty_like(u), u.new_empty(*u.shape[:2], A.shape[1], dtype=args.scan_dtype)
    else:
        y, last_state = _RUN[_choose(args, return_last_state, backend)](args)
    return (y, last_state) if return_last_state else y


def set_scan_backend(name: str) -> None:
    """Sets the backend of calls that name none (config key `scan_backend`); SCAN_BACKEND overrides it."""
    global _configured
    _configured = _known(name, "set_scan_backend")


def _known(name: str, place: str) -> str:
    if name not in SCAN_BACKENDS:
        raise ValueError(f"{place}: unknown scan backend {name!r}, choose from {', '.join(SCAN_BACKENDS)}")
    return name


def _choose(args: ScanArgs, return_last_state: bool, argument: str) -> str:
    """Name of the backend of this call: argument, then environment, then configuration, then what works."""
    environment = os.environ.get("SCAN_BACKEND") or "auto"
    requests = ((argument, "the backend argument"), (environment, "SCAN_BACKEND"),
                (_configured, "the configuration"))
    for name, source in requests:
        if _known(name, source) == "auto":
            continue
        refusal = mamba_refusal(args, return_last_state) if name == "mamba_ssm" else None
        if refusal:
            raise RuntimeError(f"scan backend '{name}' was requested by {source} but cannot run: {refusal}")
        return _log_choice(name, f"requested by {source}")
    refusal = mamba_refusal(args, return_last_state)
    if refusal:
        return _log_choice("torch", refusal)
    return _log_choice("mamba_ssm", "installed, and its probe call works")


def _log_choice(name: str, reason: str) -> str:
    if (name, reason) not in _logged:
        _logged.add((name, reason))
        logger.info("selective scan: %s backend (%s)", name, reason)
    return name


def scan_flops(batch: int, length: int, channels: int, state: int) -> int:
    """Cost of one scan as this family of papers counts it, one unit per multiply-add: 9 B L D N + B L D."""
    return 9 * batch * length * channels * state + batch * length * channels


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
    """Counts the scans run inside the block, on any device including meta; FLOP counters do not see them."""
    counter = ScanCounter()
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters.remove(counter)
