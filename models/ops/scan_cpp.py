"""The compiled CPU kernels of the scan (`csrc/scan_kernels.cpp`), built on first use where there is a compiler."""

import functools
from pathlib import Path

import torch
from torch import Tensor

from models.ops.scan_args import ScanArgs
from models.ops.scan_choice import Kernels, ScanBackend, ScanNeeds
from utils.extension import load_extension

SOURCES = tuple(Path(__file__).parent / "csrc" / name
                for name in ("scan_kernels.cpp", "scan_block.h", "scan_call.h", "scan_simd.h"))
CHUNK_TOKENS = 64  # kChunk in C++: three chunks of states should fit the processor's cache


@functools.cache
def find_cpp_kernel() -> str | None:
    """Compiles or loads the kernels once per process; why they cannot run, or None."""
    module, reason = load_extension("mtdp_scan", SOURCES)
    return None if module else f"no compiled kernels: {reason}"


def cpp_refusal(needs: ScanNeeds) -> str | None:
    """Why such a call cannot go to the kernels, or None."""
    return find_cpp_kernel() if needs.device == "cpu" else f"cpp needs CPU tensors, got tensors on {needs.device}"


def cpp_forward(args: ScanArgs, keep_chunk_states: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y like u, last state (B, K, E, N), and the states (chunks, B, K, N, E) before each chunk, or (0,)."""
    return torch.ops.mtdp_scan.forward(*_flat(args), keep_chunk_states)


def cpp_backward(args: ScanArgs, chunk_states: Tensor, grad_y: Tensor, grad_last: Tensor) -> tuple[Tensor, ...]:
    """Gradients of u, delta, A, B, C, D, delta_bias; those without a token axis in the scan's dtype."""
    return tuple(torch.ops.mtdp_scan.backward(grad_y, grad_last, chunk_states, *_flat(args)))


def _flat(args: ScanArgs) -> tuple:
    """The arguments in the kernels' order; the dtype of A decides their arithmetic."""
    rules = [number for route in args.routes for number in route.index_rule]
    return (args.u, args.delta, args.A.to(args.scan_dtype), args.B, args.C, args.D, args.delta_bias, rules,
            args.delta_softplus)


CPP = ScanBackend(cpp_refusal, Kernels(cpp_forward, cpp_backward, lambda device: CHUNK_TOKENS), fastest_on=("cpu",))
