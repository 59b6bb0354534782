"""Whether kernels that were compiled for this machine give the right numbers, found out by one small scan.

The first scan of a process is usually called deep inside a model: under autocast, without gradients, in a mode that
counts or fakes operations. None of this may decide whether kernels are right, and all of it belongs to a thread: so the
trial has a thread of its own. What is right is computed in float64 on the CPU, which no setting of a GPU changes.
"""

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from models.ops.routes import four_routes
from models.ops.scan_args import ScanArgs
from models.ops.scan_choice import Kernels
from models.ops.scan_torch import torch_backward, torch_forward
from utils.extension import first_line

LIMITS = {torch.float32: 1e-4, torch.bfloat16: 2**-7, torch.float16: 2**-10}  # of errors, over the largest value
HEIGHT, WIDTH, CHANNELS, STATE = 13, 11, 40, 16  # chunks and blocks of channels that are not full


def probe(kernels: Kernels, device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Why the kernels do not work on that device with tokens of that dtype, or None.

    Raises RuntimeError while a CUDA graph is captured: a trial waits for its results.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("the kernels of the scan are tried once before their first use, which cannot happen inside "
                           "the capture of a CUDA graph: run the model once before it is captured")
    with ThreadPoolExecutor(max_workers=1) as thread:
        try:
            return thread.submit(_compare, kernels, device, dtype).result()
        except Exception as error:  # compilers and drivers fail in many ways; whichever it was, it is said
            return f"their trial failed: {type(error).__name__}: {first_line(error)}"


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
