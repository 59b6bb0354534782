"""Which backend runs a scan, and one line in the log that says which and why.

A request counts in this order: the argument of the call, the variable SCAN_BACKEND, `set_scan_backend` (the key
`scan_backend` of an experiment). A backend asked for by name runs, or the call raises. Without a request it is the
first of the table that is meant for the device and can run: triton, then mamba_ssm on CUDA; cpp on a CPU; else torch.
"""

import logging
import os

import torch

from models.ops import SCAN_BACKENDS
from models.ops.scan_backend import ScanBackend, ScanNeeds

logger = logging.getLogger(__name__)

_configured = "auto"
_logged: set[tuple[str, str]] = set()
_loaded: dict[str, ScanBackend] = {}  # torch.compile can follow a look-up here, but not the import behind the table


def set_scan_backend(name: str) -> None:
    """Sets the backend of calls that name none; SCAN_BACKEND overrides it."""
    global _configured
    _configured = _known(name, "set_scan_backend")


def choose_backend(needs: ScanNeeds, argument: str) -> tuple[str, ScanBackend]:
    """The backend of such a call and its name. ValueError on an unknown name, RuntimeError where one cannot run."""
    name = _choose(*needs, argument)
    return name, _loaded[name]


@torch.compiler.assume_constant_result
def _choose(device: str, dtype: torch.dtype, num_states: int, state_gradient: bool, argument: str) -> str:
    """Name of the backend, which is then in `_loaded`."""
    needs = ScanNeeds(device, dtype, num_states, state_gradient)
    environment = os.environ.get("SCAN_BACKEND") or "auto"
    for request, source in ((argument, "the backend argument"), (environment, "SCAN_BACKEND"),
                            (_configured, "the configuration")):
        name = _known(request, source)
        if name == "auto":
            continue
        refusal = _load(name).refusal(needs)
        if refusal:
            raise RuntimeError(f"scan backend '{name}' was requested by {source} but cannot run: {refusal}")
        return _log_choice(name, f"requested by {source}")
    refusals = []
    for name in SCAN_BACKENDS:
        if name != "auto" and device in _load(name).fastest_on:
            refusal = _load(name).refusal(needs)
            if not refusal:
                return _log_choice(name, "; ".join(refusals) or "the fastest here")
            refusals.append(refusal)
    return _log_choice("torch", "; ".join(refusals) or f"no other for {device} tensors")


def _load(name: str) -> ScanBackend:
    if name not in _loaded:
        _loaded[name] = SCAN_BACKENDS.load(name)
    return _loaded[name]


def _known(name: str, place: str) -> str:
    try:
        return SCAN_BACKENDS.find(name)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _log_choice(name: str, reason: str) -> str:
    if (name, reason) not in _logged:
        _logged.add((name, reason))
        logger.info("selective scan: %s backend (%s)", name, reason)
    return name
