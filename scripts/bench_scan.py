"""Speed, memory and precision of the selective scan, every contender in one process.

    python scripts/bench_scan.py [--json FILE] [--repeats 10] [--only PART] [--device cuda]

On a CPU, the default (for CUDA see bench_scan_cuda.py):

Contenders take turns, so that a busy machine slows all of them. Times are medians: "ms" by the clock, "CPU ms" what
the process was given, which other programs disturb less; on one thread of an idle machine they agree, and ratios are
of CPU time there. Memory is what the process needs at most beyond what it held before the call, results included
(from /proc, so only on Linux). "usual" is the formulation of SS2D in the literature: the map is copied into four
sequences (stack, transpose, flip), scanned, and the four results are brought back and added. It runs over the same
scan kernels, copies included on both sides.
"""

import argparse
import ctypes
import datetime
import gc
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.blocks.s6 import S6
from models.build import build_model
from models.decoders.bim import BIScan
from models.ops import Route, S6Weights, scan_routes, selective_scan, set_scan_backend, ss2d_core

LENGTH, CHANNELS, STATE = 4032, 384, 16  # a map of 56 x 72 cells, or four of 28 x 36
Row = dict[str, str | float]


class Cost(NamedTuple):
    ms: float
    cpu_ms: float
    mib: float


def measure(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, Cost]:
    """Median times and peak memory of each run."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    peaks = {}
    for name, run in runs.items():
        run()
        peaks[name] = peak_memory(run)
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter(), time.process_time()
            run()
            times[name].append((time.perf_counter() - start[0], time.process_time() - start[1]))
    return {name: Cost(*(statistics.median(t) * 1e3 for t in zip(*times[name], strict=True)), peaks[name])
            for name in runs}


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt


def peak_memory(run: Callable[[], object]) -> float:
    """MiB that the process holds at most during the call, beyond what it holds before; NaN where unknown.

    Meanwhile freed tensors go back to the system at once: otherwise the allocator's reserves are measured.
    """
    try:
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 16)
        libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = _status("VmRSS")
        result = run()
        peak = _status("VmHWM")
        libc.mallopt(M_MMAP_THRESHOLD, 1 << 25)  # as after a while of work, for the times
        libc.mallopt(M_TRIM_THRESHOLD, 1 << 26)
    except (OSError, AttributeError):
        return float("nan")
    del result
    return (peak - before) / 1024


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def with_gradients(forward: Callable[..., Tensor], leaves: list[Tensor]) -> Callable[[], object]:
    """A run of forward and backward pass."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]

    def run():
        y = forward(*leaves)
        return torch.autograd.grad(y, leaves, torch.ones_like(y))
    return run


def without_gradients(forward: Callable[..., Tensor], leaves: list[Tensor]) -> Callable[[], object]:
    return torch.inference_mode()(lambda: forward(*leaves))


# ---- one scan ----

def scan_inputs(length: int = LENGTH, channels: int = CHANNELS, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """u, delta, A, B, C, D, delta_bias of `scan_routes`, in the range a trained block has."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    A = -torch.arange(1, STATE + 1) * torch.exp(0.3 * draw(1, channels, STATE))
    return [x.to(dtype) for x in (draw(1, length, 1, channels), draw(1, length, 1, channels), A,
                                  draw(1, length, 1, STATE), draw(1, length, 1, STATE), draw(1, channels),
                                  draw(1, channels) - 4)]


def scan_with(backend: str) -> Callable[..., Tensor]:
    def forward(u, delta, A, B, C, D, bias):
        return scan_routes(u, delta, A, B, C, [Route(1, u.shape[1])], D, bias, True, backend=backend)
    return forward


def parallel_scan() -> Callable[..., Tensor] | None:
    """The scan by the package mambapy (MIT), where it is installed."""
    try:
        from mambapy.pscan import pscan
    except ImportError:
        return None

    def forward(u, delta, A, B, C, D, bias):
        u, step, B, C = u[:, :, 0], F.softplus(delta[:, :, 0] + bias), B[:, :, 0], C[:, :, 0]
        states = pscan(torch.exp(step[..., None] * A[0]), (step * u)[..., None] * B[:, :, None])  # (B, L, D, N)
        return ((states @ C[..., None]).squeeze(-1) + D * u).unsqueeze(2)
    return forward


def bench_one_scan(repeats: int) -> list[Row]:
    """One scan of 4032 tokens, 384 channels, 16 states, float32, one thread."""
    contenders = {"recurrence": scan_with("reference"), "torch (chunked)": scan_with("torch"),
                  "mambapy": parallel_scan(), "cpp": scan_with("cpp")}
    inputs, rows = scan_inputs(), []
    for name, prepare in (("forward", without_gradients), ("forward + backward", with_gradients)):
        found = measure({key: prepare(f, inputs) for key, f in contenders.items() if f}, repeats)
        rows += [_row(f"scan, {name}", key, cost, found["cpp"]) for key, cost in found.items()]
        if contenders["mambapy"] is None:
            rows.append({"what": f"scan, {name}", "contender": "mambapy", "ms": "not installed"})
    return rows


def bench_threads(repeats: int) -> list[Row]:
    """The compiled kernels on one and on two threads, by the clock. The matrix product is a control: where it does not
    run twice as fast, the second core was busy otherwise."""
    rows, inputs, matrix = [], scan_inputs(), torch.randn(1000, 1000)
    runs = {"matrix product": lambda: matrix @ matrix, "forward": without_gradients(scan_with("cpp"), inputs),
            "forward + backward": with_gradients(scan_with("cpp"), inputs)}
    for name, run in runs.items():
        costs = {}
        for threads in (1, 2):  # one after the other: a change of the number of threads costs milliseconds
            torch.set_num_threads(threads)
            costs[threads] = measure({"cpp": run}, 3 * repeats)["cpp"]
        torch.set_num_threads(1)
        rows += [{"what": f"threads, {name}", "contender": f"{threads} thread(s)", "ms": cost.ms,
                  "CPU ms": cost.cpu_ms, "speed-up": costs[1].ms / cost.ms} for threads, cost in costs.items()]
    return rows


# ---- orders ----

def usual_ss2d(x: Tensor, weights: S6Weights, scan: Callable[..., Tensor] = selective_scan) -> Tensor:
    """(B, H, W, D) -> (B, H, W, D), by copies in scan order, channels first."""
    height, width = x.shape[1:3]
    rows, columns = rearrange(x, "b h w d -> b d (h w)"), rearrange(x, "b h w d -> b d (w h)")
    forward = torch.stack((rows, columns), dim=1)  # (B, 2, D, L)
    y = usual_scan(torch.cat((forward, forward.flip(-1)), dim=1), weights, scan)
    rows, columns = (y[:, :2] + y[:, 2:].flip(-1)).unbind(1)
    return rearrange(rows, "b d (h w) -> b h w d", h=height) + rearrange(columns, "b d (w h) -> b h w d", h=height)


def usual_scan(sequences: Tensor, weights: S6Weights, scan: Callable[..., Tensor] = selective_scan) -> Tensor:
    """(B, K, D, L) -> (B, K, D, L): projections and one grouped scan over sequences."""
    state, rank = weights.A_log.shape[-1], weights.dt_proj_weight.shape[-1]
    features = weights.x_proj @ sequences
    step_features, in_maps, out_maps = features.split((rank, state, state), dim=2)
    delta = weights.dt_proj_weight @ step_features
    y = scan(sequences.flatten(1, 2), delta.flatten(1, 2), -torch.exp(weights.A_log).flatten(0, 1), in_maps, out_maps,
             weights.D.flatten(), None, weights.dt_proj_bias.flatten(), True)
    return y.unflatten(1, sequences.shape[1:3])


def usual_ss2d_channels_last(x: Tensor, weights: S6Weights) -> Tensor:
    """The same copies as rows of channels, which suits our kernels better than any sequence."""
    height, width = x.shape[1:3]
    forward = torch.stack((x.flatten(1, 2), x.transpose(1, 2).flatten(1, 2)), dim=2)  # (B, L, 2, D)
    sequences = torch.cat((forward, forward.flip(1)), dim=2)
    state, rank = weights.A_log.shape[-1], weights.dt_proj_weight.shape[-1]
    features = torch.einsum("blkd,kfd->blkf", sequences, weights.x_proj)
    step_features, in_maps, out_maps = features.split((rank, state, state), dim=-1)
    delta = torch.einsum("blkr,kdr->blkd", step_features, weights.dt_proj_weight)
    y = scan_routes(sequences, delta, -torch.exp(weights.A_log), in_maps, out_maps, [Route(1, height * width)] * 4,
                    weights.D, weights.dt_proj_bias, True)
    rows, columns = (y[:, :, :2] + y[:, :, 2:].flip(1)).unbind(2)
    return rows.unflatten(1, (height, width)) + columns.unflatten(1, (width, height)).transpose(1, 2)


def usual_bi_scan(module: BIScan, feat: Tensor, scan: Callable[..., Tensor] = selective_scan) -> Tensor:
    """(B, T, H, W, D) -> (B, T, H, W, D), by copies in scan order."""
    tasks, height = feat.shape[1:3]
    forward, backward = rearrange(feat, "b t h w d -> b d (t h w)").chunk(2, dim=1)
    halves = torch.stack((forward, backward.flip(-1)), dim=1)  # (B, 2, D / 2, T L)
    halves = usual_scan(halves, _pair(module.fwd_tf, module.bwd_tf), scan)
    halves = rearrange(halves, "b k d (t q) -> b k d (q t)", t=tasks)
    halves = usual_scan(halves, _pair(module.fwd_pf, module.bwd_pf), scan)
    both = torch.cat((halves[:, 0], halves[:, 1].flip(-1)), dim=1)
    return rearrange(both, "b d (h w t) -> b t h w d", h=height, t=tasks)


def _pair(first: S6, second: S6) -> S6Weights:
    return S6Weights(*map(torch.cat, zip(first.weights, second.weights, strict=True)))


def bench_orders(repeats: int) -> list[Row]:
    """Forward and backward pass, at a width of 192 (SS2D) and 2 x 192 (BI-Scan of four tasks)."""
    torch.manual_seed(0)
    four, bi = S6(192, rank=12, routes=4), BIScan(CHANNELS, rank=12, state=STATE)
    feat, tasks = torch.randn(1, 56, 72, 192), torch.randn(1, 4, 28, 36, CHANNELS)
    parts = {
        "SS2D": (feat, list(four.parameters()), {
            "usual": lambda x, *_: usual_ss2d(x, four.weights),
            "usual, channels last": lambda x, *_: usual_ss2d_channels_last(x, four.weights),
            "routes": lambda x, *_: ss2d_core(x, four.weights)}),
        "BI-Scan": (tasks, list(bi.parameters()), {
            "usual": lambda x, *_: usual_bi_scan(bi, x), "routes": lambda x, *_: bi(x)}),
    }
    rows = []
    for what, (x, parameters, contenders) in parts.items():
        x.requires_grad_()
        expected = next(iter(contenders.values()))(x).detach()
        for forward in contenders.values():
            torch.testing.assert_close(forward(x).detach(), expected, rtol=1e-3, atol=1e-3)

        def run(forward, x=x, parameters=parameters):
            y = forward(x)
            return torch.autograd.grad(y, [x, *parameters], torch.ones_like(y))
        found = measure({key: lambda f=f, run=run: run(f) for key, f in contenders.items()}, repeats)
        rows += [_row(what, key, cost, found["routes"]) for key, cost in found.items()]
    return rows


# ---- the model, growth, precision ----

def bench_model(repeats: int) -> list[Row]:
    """Forward and backward pass of BIM on Swin-T, four tasks, one image of 224 x 288."""
    torch.manual_seed(0)
    model = build_model("bim", "swin_tiny", {"semseg": 40, "depth": 1, "normals": 3, "edge": 1}, (224, 288))
    image = torch.randn(1, 3, 224, 288)

    def step(backend):
        set_scan_backend(backend)
        model.zero_grad(set_to_none=True)
        sum(out.square().mean() for out in model(image).final.values()).backward()
    found = measure({name: lambda name=name: step(name) for name in ("torch", "cpp")}, repeats)
    set_scan_backend("auto")
    return [_row("BIM, Swin-T, forward + backward", key, cost, found["cpp"]) for key, cost in found.items()]


def bench_growth(repeats: int) -> list[Row]:
    """Time per token of longer and longer sequences."""
    rows, first = [], {}
    for length in (4096, 16384, 65536, 262144):
        inputs = scan_inputs(length)
        for name, prepare in (("forward", without_gradients), ("forward + backward", with_gradients)):
            cost = measure({"cpp": prepare(scan_with("cpp"), inputs)}, repeats)["cpp"]
            nanoseconds = cost.cpu_ms * 1e6 / length
            first.setdefault(name, nanoseconds)
            rows.append({"what": f"growth, {name}", "contender": f"L = {length}", "ms": cost.ms,
                         "CPU ms": cost.cpu_ms, "MiB": cost.mib, "CPU ns per token": nanoseconds,
                         "of the shortest": nanoseconds / first[name]})
    return rows


def bench_precision(_: int) -> list[Row]:
    """Largest error over the largest value, against float64, of each result and gradient; inputs count as exact."""
    names = ("u", "delta", "A", "B", "C", "D", "delta_bias")
    rows = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        inputs = scan_inputs(1008, 96, dtype)
        results = []
        for precision in (torch.float64, dtype):
            leaves = [x.to(precision).requires_grad_() for x in inputs]
            y = scan_with("cpp")(*leaves)
            results.append([y, *torch.autograd.grad(y, leaves, torch.ones_like(y))])
        errors = {name: ((a - b.double()).abs().max() / a.abs().max()).item()
                  for name, a, b in zip(("y", *names), *results, strict=True)}
        rows.append({"what": "error", "contender": str(dtype).removeprefix("torch."), **errors})
    return rows


PARTS = {"scan": bench_one_scan, "threads": bench_threads, "orders": bench_orders, "model": bench_model,
         "growth": bench_growth, "precision": bench_precision}


def _row(what: str, contender: str, cost: Cost, ours: Cost) -> Row:
    return {"what": what, "contender": contender, "ms": cost.ms, "CPU ms": cost.cpu_ms, "MiB": cost.mib,
            "times our time": cost.cpu_ms / ours.cpu_ms, "our memory": ours.mib / cost.mib}


def machine() -> dict[str, str | int | float]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    return {"date": datetime.date.today().isoformat(), "processor": model, "cores": os.cpu_count() or 0,
            "vectors": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__,
            "load": round(os.getloadavg()[0], 2)}


def _table(rows: list[Row]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[_cell(row.get(column, "")) for column in columns] for row in rows]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join(lines + ["| " + " | ".join(line) + " |" for line in cells])


def _cell(value: str | float) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.1e}" if abs(value) < 1e-2 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers there")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--only", metavar="PART", help="one part of the benchmark")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    parts, about = PARTS, machine()
    if args.device == "cuda":
        from scripts import bench_scan_cuda
        parts, about = bench_scan_cuda.PARTS, about | bench_scan_cuda.machine()
    if args.only not in (None, *parts):
        parser.error(f"--only {args.only}: on {args.device} the parts are {', '.join(parts)}")
    torch.set_num_threads(1)
    report: dict[str, object] = {"machine": about}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    for name, part in parts.items():
        if args.only in (None, name):
            gc.collect()
            rows = part(args.repeats)
            report[name] = rows
            print(f"\n{part.__doc__}\n{_table(rows)}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
