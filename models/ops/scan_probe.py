"""Whether the scan's kernels give the right numbers on this machine, found out by one small scan."""

import torch
from torch import Tensor

from models.ops.routes import four_routes
from models.ops.scan_args import ScanArgs
from models.ops.scan_choice import Kernels
from models.ops.scan_torch import torch_backward, torch_forward
from models.ops.trial import try_out

LIMITS = {torch.float32: 1e-4, torch.bfloat16: 2**-7, torch.float16: 2**-10}  # of errors, over the largest value
HEIGHT, WIDTH, CHANNELS, STATE = 13, 11, 40, 16  # chunks and blocks of channels that are not full


def probe(kernels: Kernels, device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Why the kernels do not work on that device with tokens of that dtype, or None; errors as of `try_out`."""
    return try_out("the scan", device, lambda: _compare(kernels, device, dtype))


def _compare(kernels: Kernels, device: torch.device, dtype: torch.dtype) -> str | None:
    """Every result of one call with two groups of four routes against its value in float64."""
    args = _arguments(dtype)
    exact = ScanArgs(*(x.double() if isinstance(x, Tensor) else x for x in args))
    grad_y, grad_last = _normal(7, dtype, *args.u.shape), _normal(8, torch.float32, 2, *args.A.shape)
    moved = ScanArgs(*(x.to(device) if isinstance(x, Tensor) else x for x in args))
    found = _both_ways(kernels, moved, grad_y.to(device), grad_last.to(device))
    truth = _both_ways(Kernels(torch_forward, torch_backward, kernels.chunk_tokens), exact, grad_y.double(),
                       grad_last.double())
    names = ("y", "last state", *(f"gradient of {name}" for name in ("u", "delta", "A", "B", "C", "D", "delta_bias")))
    for name, value, right in zip(names, found, truth, strict=True):
        error = float((value.cpu().double() - right).abs().max() / right.abs().max())
        if not error <= LIMITS[dtype]:
            return f"their trial gave wrong numbers: {name} in {dtype} is off by {error:.1e} of its largest value"
    return None


def _both_ways(kernels: Kernels, args: ScanArgs, grad_y: Tensor, grad_last: Tensor) -> tuple[Tensor, ...]:
    y, last_state, chunk_states = kernels.forward(args, True)
    return y, last_state, *kernels.backward(args, chunk_states, grad_y, grad_last)[:7]


def _arguments(dtype: torch.dtype) -> ScanArgs:
    routes = four_routes(HEIGHT, WIDTH) * 2
    tokens, channels = (2, HEIGHT * WIDTH, len(routes)), (len(routes), CHANNELS)
    return ScanArgs(_normal(0, dtype, *tokens[:2], 2, CHANNELS), _normal(1, dtype, *tokens, CHANNELS) - 2,
                    -_normal(2, torch.float32, *channels, STATE).exp(), _normal(3, dtype, *tokens, STATE),
                    _normal(4, dtype, *tokens, STATE), _normal(5, torch.float32, *channels),
                    _normal(6, torch.float32, *channels), None, routes, True)


def _normal(seed: int, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32).to(dtype)
