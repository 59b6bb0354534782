"""What a backend of the scan says about itself, which one runs a scan, and one line in the log that says why.

A request counts in this order: the argument of the call, the variable SCAN_BACKEND, `set_scan_backend` (the key
`scan_backend` of an experiment). A backend asked for by name runs, or the call raises. Without a request it is the
first of the table that is meant for the device and can run: cuda, triton, mamba_ssm on CUDA, cpp on a CPU, else torch;
where it is not the first of these, training and inference are slower than they could be: a warning.
"""

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from models.ops import SCAN_BACKENDS
from models.ops.scan_args import ScanArgs

logger = logging.getLogger(__name__)


class ScanNeeds(NamedTuple):
    """What decides whether a backend can run a call."""

    device: str  # "cpu", "cuda", ...
    dtype: torch.dtype  # of the arithmetic
    num_states: int  # N
    state_gradient: bool  # will a gradient flow through the last state?
    tokens: torch.dtype = torch.float32  # of u
    num_routes: int = 1


class Kernels(NamedTuple):
    """The two directions of the scan, for the operator `mtdp::scan`.

    forward(args, keep_chunk_states): y like u, the last state (B, K, E, N), and the states (chunks, B, K, N, E) before
        each chunk of tokens, or (0,) where they are not to be kept.
    backward(args, chunk_states, grad_y, grad_last): the gradients of u, delta, A, B, C, D, delta_bias.
    """

    forward: Callable[[ScanArgs, bool], tuple[Tensor, Tensor, Tensor]]
    backward: Callable[[ScanArgs, Tensor, Tensor, Tensor], tuple[Tensor, ...]]
    chunk_tokens: Callable[[torch.device], int]  # tokens between two states that are kept for the backward pass


@dataclass(frozen=True)
class ScanBackend:
    """Either `kernels` for our operator, or a differentiable `scan` of its own: ScanArgs to y and the last state."""

    refusal: Callable[[ScanNeeds], str | None]  # why it cannot run such a call, or None
    kernels: Kernels | None = None
    scan: Callable[[ScanArgs], tuple[Tensor, Tensor]] | None = None
    fastest_on: tuple[str, ...] = ()  # devices on which "auto" tries it


_configured = "auto"
_forced: ScanBackend | None = None  # of an export, whatever is asked for
_logged: set[tuple[str, str]] = set()
_loaded: dict[str, ScanBackend] = {}  # torch.compile can follow a look-up here, but not the import behind the table


def set_scan_backend(name: str) -> None:
    """Sets the backend of calls that name none; SCAN_BACKEND overrides it."""
    global _configured
    _configured = _known(name, "set_scan_backend")


@contextmanager
def scans_as(backend: ScanBackend) -> Iterator[None]:
    """Inside, every scan runs so, whatever is asked for: for exports, which need operators that others know."""
    global _forced
    before, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = before


def choose_backend(needs: ScanNeeds, argument: str) -> tuple[str, ScanBackend]:
    """The backend of such a call and its name. ValueError on an unknown name, and where one cannot run."""
    if _forced is not None:
        return "forced", _forced
    name = _choose(*needs, argument)
    return name, _loaded[name]


@torch.compiler.assume_constant_result
def _choose(device: str, dtype: torch.dtype, num_states: int, state_gradient: bool, tokens: torch.dtype,
            num_routes: int, argument: str) -> str:
    """Name of the backend, which is then in `_loaded`."""
    needs = ScanNeeds(device, dtype, num_states, state_gradient, tokens, num_routes)
    environment = os.environ.get("SCAN_BACKEND") or "auto"
    for request, source in ((argument, "the backend argument"), (environment, "SCAN_BACKEND"),
                            (_configured, "the configuration")):
        name = _known(request, source)
        if name == "auto":
            continue
        refusal = _load(name).refusal(needs)
        if refusal:
            raise ValueError(f"scan backend '{name}' was requested by {source} but cannot run: {refusal}")
        return _log_choice(logging.INFO, name, f"requested by {source}")
    refusals: dict[str, str] = {}
    for name in SCAN_BACKENDS:
        if name != "auto" and device in _load(name).fastest_on:
            refusal = _load(name).refusal(needs)
            if not refusal:
                return _log_automatic_choice(name, refusals)
            refusals[name] = refusal
    if not refusals:
        return _log_choice(logging.INFO, "torch", f"no other for {device} tensors")
    return _log_automatic_choice("torch", refusals)


def _load(name: str) -> ScanBackend:
    if name not in _loaded:
        _loaded[name] = SCAN_BACKENDS.load(name)
    return _loaded[name]


def _known(name: str, place: str) -> str:
    try:
        return SCAN_BACKENDS.find(name)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _log_automatic_choice(name: str, refusals: dict[str, str]) -> str:
    """`refusals`: of the faster backends, by name."""
    if not refusals:
        return _log_choice(logging.INFO, name, "the fastest here")
    return _log_choice(logging.WARNING, name, f"training and inference are slower than with {' or '.join(refusals)}: "
                       + "; ".join(refusals.values()))


def _log_choice(level: int, name: str, reason: str) -> str:
    if (name, reason) not in _logged:
        _logged.add((name, reason))
        logger.log(level, "selective scan: %s backend (%s)", name, reason)
    return name
