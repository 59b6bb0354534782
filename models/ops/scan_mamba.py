"""The fused CUDA scan of the mamba-ssm package, used where it is installed, loads and really runs.

The kernel knows sequences only, so routes become copies in scan order and back.
Reference: package mamba-ssm (Gu and Dao, Apache-2.0), function `selective_scan_fn`.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from models.ops.routes import from_sequences, to_sequences
from models.ops.scan_args import ScanArgs
from models.ops.scan_choice import ScanBackend, ScanNeeds
from utils.extension import first_line


@functools.cache
def find_mamba_kernel(device: str = "cuda") -> tuple[Callable | None, str]:
    """(kernel, reason); the kernel is None where it cannot run. Tried once per process and device type.

    Three things go wrong in practice: the package is absent, its library was built for another PyTorch or
    CUDA, or it was built for another GPU generation and only fails when called.
    """
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError as error:
        return None, f"mamba_ssm cannot be imported: {first_line(error)}"
    except OSError as error:
        return None, f"the mamba_ssm library does not load: {first_line(error)}"
    if device == "cuda" and not torch.cuda.is_available():
        return None, "mamba_ssm is installed but no CUDA device is available"
    try:
        sequence, matrix = torch.ones(1, 4, 8, device=device), torch.ones(4, 2, device=device)
        B = C = torch.ones(1, 1, 2, 8, device=device)
        probe = selective_scan_fn(sequence, sequence, -matrix, B, C)
        float(probe.sum())  # a kernel built for another GPU fails here, at the first wait
    except RuntimeError as error:
        return None, f"the mamba_ssm probe call failed: {first_line(error)}"
    return selective_scan_fn, "mamba_ssm is installed and its probe call works"


def mamba_refusal(needs: ScanNeeds) -> str | None:
    """Why such a call cannot go to the kernel, or None."""
    if needs.device != "cuda":
        return f"mamba_ssm needs CUDA tensors, got tensors on {needs.device}"
    if needs.dtype != torch.float32:
        return "mamba_ssm computes in float32, got float64 input"
    if needs.state_gradient:
        return "mamba_ssm gives no gradient through last_state"
    kernel, reason = find_mamba_kernel()
    return None if kernel else reason


def mamba_scan(args: ScanArgs) -> tuple[Tensor, Tensor]:
    """Returns y, like u, and the last state (B, K, E, N) in float32, without gradient."""
    kernel, _ = find_mamba_kernel()
    args, out_dtype = args.to_scan_dtype(), args.u.dtype
    u, delta, B, C = (to_sequences(x, args.routes) for x in (args.u, args.delta, args.B, args.C))
    D, bias = (None if x is None else x.flatten() for x in (args.D, args.delta_bias))
    y, last_state = kernel(u.flatten(1, 2), delta.flatten(1, 2), args.A.flatten(0, 1), B, C, D=D, z=None,
                           delta_bias=bias, delta_softplus=args.delta_softplus, return_last_state=True)
    per_route = (len(args.routes), -1)
    y = from_sequences(y.unflatten(1, per_route), args.routes, args.u.shape[2])
    return y.to(out_dtype), last_state.unflatten(1, per_route)


MAMBA_SSM = ScanBackend(mamba_refusal, scan=mamba_scan, fastest_on=("cuda",))
