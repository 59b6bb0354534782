"""Products of float32 matrices on processors for which PyTorch's are slow.

PyTorch leaves them to MKL, which uses the widest vectors (AVX-512) of Intel's processors only; others that have them
reach half their speed (docs/training_speed.md). There our kernels (`csrc/products.cpp`) stand in for PyTorch's own of
`mm`, `addmm`, `bmm` and `baddbmm` on the CPU, by torch.library: below gradients, autocast, compilers and counters,
which see what they always see. What is not float32, small or narrow stays where it was. Results differ in rounding,
not with the number of threads.
"""

import functools
import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor

from utils.extension import load_extension
from utils.machine import cpu_info

logger = logging.getLogger(__name__)

SOURCES = tuple(Path(__file__).parent / "csrc" / name for name in ("products.cpp", "scan_simd.h"))
SMALLEST = 2**20    # multiply-adds; below, the way to our kernels through Python takes longer than what they save
NARROWEST = 4       # rows, columns and terms of a sum; ours work in tiles
aten = torch.ops.aten


@functools.cache
def find_products() -> str | None:
    """Compiles or loads the kernels once per process; why they cannot run, or None. The log says so, too."""
    module, reason = load_extension("mtdp_products", SOURCES)
    if module is None:
        logger.warning("products of matrices run at about half the speed of this processor: %s", reason)
    return None if module else reason


def mkl_is_slow() -> bool:
    """Whether PyTorch's products are MKL's on another maker's processor with AVX-512."""
    return (torch.backends.mkl.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"
            and cpu_info().get("vendor_id", "GenuineIntel") != "GenuineIntel")


@functools.cache
def speed_up_products() -> None:
    """From now on, in this process, where it is a gain. The kernels are compiled when the first product needs them."""
    if mkl_is_slow():
        logger.info("products of float32 matrices: by kernels of ours (MKL's are slow on this processor)")
        _kept.append(replace_products())


_kept: list[torch.library.Library] = []  # replacements end with their library


def replace_products() -> torch.library.Library:
    """Puts our kernels in the place of PyTorch's until the library that is returned is gone."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")  # that a kernel is replaced
        for name, kernel in {"mm": _mm, "addmm": _addmm, "bmm": _bmm, "baddbmm": _baddbmm}.items():
            library.impl(name, kernel, "CPU", allow_override=True)
    return library


def multiply(left: Tensor, right: Tensor, out: Tensor, add: bool = False) -> Tensor:
    """float32 (B, M, K) times (B, K, N), of any strides, into `out` (B, M, N), whose rows are dense; or added to it."""
    torch.ops.mtdp_products.batched(left, right, out, add)
    return out


def _mm(left: Tensor, right: Tensor) -> Tensor:
    if not _ours(left, right):
        return aten.mm.out(left, right, out=left.new_empty(0))
    out = left.new_empty(left.shape[0], right.shape[1])
    multiply(left[None], right[None], out[None])
    return out


def _bmm(left: Tensor, right: Tensor) -> Tensor:
    if not _ours(left, right):
        return aten.bmm.out(left, right, out=left.new_empty(0))
    return multiply(left, right, left.new_empty(*left.shape[:2], right.shape[2]))


def _addmm(start: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if not _ours(left, right, start, beta, alpha):
        return aten.addmm.out(start, left, right, beta=beta, alpha=alpha, out=left.new_empty(0))
    out = _dense(start, left.shape[0], right.shape[1])
    multiply(left[None], right[None], out[None], add=True)
    return out


def _baddbmm(start: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if not _ours(left, right, start, beta, alpha):
        return aten.baddbmm.out(start, left, right, beta=beta, alpha=alpha, out=left.new_empty(0))
    return multiply(left, right, _dense(start, *left.shape[:2], right.shape[2]), add=True)


def _dense(start: Tensor, *shape: int) -> Tensor:
    """A copy of what a sum starts from."""
    return start.expand(shape).clone(memory_format=torch.contiguous_format)


def _ours(left: Tensor, right: Tensor, start: Tensor | None = None, beta: float = 1, alpha: float = 1) -> bool:
    """Whether our kernels take this product. Shapes that do not fit are left to PyTorch, which says so."""
    (*batch, rows, depth), columns = left.shape, right.shape[-1]
    if left.shape[:-2] != right.shape[:-2] or right.shape[-2] != depth or beta != 1 or alpha != 1:
        return False
    large = rows * columns * depth * (batch[0] if batch else 1) >= SMALLEST
    alike = all(x.dtype == torch.float32 for x in (left, right, start) if x is not None)
    return large and alike and min(rows, columns, depth) >= NARROWEST and find_products() is None
