"""The scan on a GPU: our kernels, in CUDA and in Triton, beside mamba-ssm's, and all beside what the card can do.

    python scripts/bench_scan.py --device cuda [--json FILE] [--repeats 20] [--only PART]

Times are medians by the clock, memory is the peak of the allocator beyond what was held before. mamba-ssm's
users stack, transpose and flip the map, scan, and undo it; that belongs to their time, as our index rules do to ours.
A contender that is not installed is left out and named.
"""

import functools
import sys
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from models.blocks.s6 import S6
from models.decoders.bim import BIScan
from models.ops.scan_choice import set_scan_backend
from models.ops.scan_cuda import find_cuda
from models.ops.scan_mamba import find_mamba_kernel
from models.ops.scan_triton import find_triton
from models.ops.ss2d import ss2d_core
from scripts import scan_contenders as scans
from scripts.measuring import Row, measure
from scripts.scan_contenders import CHANNELS, PASSES, STATE

HEIGHT, WIDTH, TASKS = 112, 144, 4  # the finest maps of BIM on NYUD
EXP_ROUNDS = 512
GPU = torch.device("cuda")
OURS = ("cuda", "triton")  # backends; numbers of the others are given as ratios to the first
Contenders = dict[str, tuple[Callable[..., Tensor], list[Tensor]]]


@triton.jit
def _exponentials(out, ROUNDS: tl.constexpr, SIZE: tl.constexpr):
    offset = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    x = offset.to(tl.float32) * 1e-9
    for _ in range(ROUNDS):
        x = tl.exp2(-x)
    tl.store(out + offset, x)


@functools.cache
def ceilings() -> dict[str, float]:
    """What the card reaches: bytes per second of a copy (read and written), exponentials per second in registers."""
    source = torch.zeros(2**28, device="cuda")
    out = torch.empty(2**22, device="cuda")
    copy, exp = measure({"copy": source.clone, "exp": lambda: _exponentials[out.numel() // 256,](
        out, ROUNDS=EXP_ROUNDS, SIZE=256)}, 10, GPU).values()
    return {"TB/s copied": 2 * 4 * source.numel() / copy.ms / 1e9, "T exp/s": out.numel() * EXP_ROUNDS / exp.ms / 1e9}


def bench_ceilings(_: int) -> list[Row]:
    """What the card reaches."""
    return [{"what": "ceiling", **ceilings()}]


def bench_one_scan(repeats: int) -> list[Row]:
    """One scan over a contiguous sequence, as long as the finest maps of all tasks, and of one."""
    rows = []
    for length in (HEIGHT * WIDTH, TASKS * HEIGHT * WIDTH):
        for dtype in (torch.float32, torch.bfloat16):
            inputs = [x.to(GPU, dtype if i in (0, 1, 3, 4) else torch.float32)
                      for i, x in enumerate(scans.scan_inputs(length, CHANNELS))]
            sequence = [x.squeeze(2).mT.contiguous() if x.dim() == 4 else x.squeeze(0) for x in inputs]
            contenders: Contenders = {name: (scans.scan_with(name), inputs) for name in OURS}
            if kernel := _mamba():
                contenders["mamba_ssm"] = (lambda u, s, A, B, C, D, bias, f=kernel: f(u, s, A, B.unsqueeze(1),
                                           C.unsqueeze(1), D, None, bias, True), sequence)
            name = f"L = {length}, {str(dtype).removeprefix('torch.')}"
            exponentials = length * CHANNELS * STATE
            rows += _compare(f"scan, {name}", contenders, repeats, exponentials, _bytes(inputs))
    return rows


def bench_orders(repeats: int) -> list[Row]:
    """SS2D and BI-Scan with their projections, copies included."""
    torch.manual_seed(0)
    four, bi = S6(CHANNELS, rank=12, routes=4).to(GPU), BIScan(CHANNELS, rank=12, state=STATE).to(GPU)
    rows, kernel = [], _mamba()
    for batch in (1, 4):
        x = torch.randn(batch, HEIGHT, WIDTH, CHANNELS, device=GPU)
        feat = torch.randn(batch, HEIGHT, WIDTH, TASKS, CHANNELS, device=GPU)
        parts = {"SS2D": (x, four, lambda x, *_: ss2d_core(x, four.weights),
                          lambda x, *_: scans.usual_ss2d(x, four.weights, kernel)),
                 "BI-Scan": (feat, bi, lambda x, *_: bi(x), lambda x, *_: scans.usual_bi_scan(bi, x, kernel))}
        for what, (given, module, ours, usual) in parts.items():
            inputs = [given, *module.parameters()]
            contenders = {f"{name}, routes": (_with_backend(name, ours), inputs) for name in OURS}
            contenders |= {"mamba_ssm, usual": (usual, inputs)} if kernel else {}
            _assert_equal(contenders)
            exponentials = given[..., 0].numel() * CHANNELS * STATE * (4 if what == "SS2D" else 2)
            rows += _compare(f"{what}, batch {batch}", contenders, repeats, exponentials, _bytes([given] * 2))
    set_scan_backend("auto")
    return rows


def _with_backend(name: str, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*inputs):
        set_scan_backend(name)
        return forward(*inputs)
    return run


def _assert_equal(contenders: Contenders) -> None:
    """All compute the same, or there is nothing to compare."""
    with torch.no_grad():
        expected, *others = (forward(*inputs) for forward, inputs in contenders.values())
    for other in others:
        torch.testing.assert_close(other, expected, rtol=1e-2, atol=1e-2)


PARTS = {"ceilings": bench_ceilings, "scan": bench_one_scan, "orders": bench_orders}


def _compare(what: str, contenders: Contenders, repeats: int, exponentials: int, moved: int) -> list[Row]:
    """Rows of both directions; "floor": the larger of the time to move inputs and results once, and to take the
    exponentials of the recurrence once (three times with gradients), at the card's measured rates."""
    rows = []
    for (name, prepare), passes in zip(PASSES.items(), (1, 3), strict=True):
        found = measure({key: prepare(f, inputs) for key, (f, inputs) in contenders.items()}, repeats, GPU)
        ours = found[next(iter(found))]
        floor = max(passes * moved / ceilings()["TB/s copied"], passes * exponentials / ceilings()["T exp/s"]) / 1e9
        rows += [{"what": f"{what}, {name}", "contender": key, "ms": cost.ms, "MiB": cost.mib,
                  "times our time": cost.ms / ours.ms, "our memory": ours.mib / cost.mib,
                  "times the floor": cost.ms / floor} for key, cost in found.items()]
    return rows


def _bytes(tensors: list[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


@functools.cache
def _mamba() -> Callable[..., Tensor] | None:
    kernel, reason = find_mamba_kernel()
    if kernel is None:
        print(f"mamba_ssm is left out: {reason}", file=sys.stderr)
    return kernel


def machine() -> dict[str, str]:
    """The card and its software; ends the program where the kernels do not run."""
    for refusal in (find_cuda("cuda", torch.float32), find_triton("cuda")):
        if refusal:
            sys.exit(f"error: {refusal}")
    return {"gpu": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda), "triton": triton.__version__}
