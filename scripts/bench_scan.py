"""Speed, memory and precision of the selective scan, every contender in one process.

    python scripts/bench_scan.py [--json FILE] [--repeats 10] [--only PART] [--device cuda]

On a CPU, the default (for CUDA see bench_scan_cuda.py), contenders take turns, so that a busy machine slows all alike.
Times are medians: "ms" by the clock, "CPU ms" what the process was given, which other programs disturb less; on one
thread of an idle machine they agree, and ratios are of CPU time there. Memory is the peak of tensors during the call,
results included, inputs not. "usual" is the formulation of SS2D in the literature (scan_contenders.py), over the same
scan kernels, copies included on both sides.
"""

import datetime
import gc
import json
import os
import platform
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models.blocks.s6 import S6
from models.build import build_model
from models.decoders.bim import BIScan
from models.ops.scan_choice import set_scan_backend
from models.ops.ss2d import ss2d_core
from scripts import scan_contenders as scans
from scripts.command_line import Command
from scripts.measuring import Cost, Row, markdown, measure
from scripts.scan_contenders import CHANNELS, PASSES, STATE
from utils.machine import cpu_info

# ---- one scan ----

def bench_one_scan(repeats: int) -> list[Row]:
    """One scan of 4032 tokens, 384 channels, 16 states, float32, one thread."""
    contenders = {"recurrence": scans.scan_with("reference"), "torch (chunked)": scans.scan_with("torch"),
                  "mambapy": scans.parallel_scan(), "cpp": scans.scan_with("cpp")}
    inputs, rows = scans.scan_inputs(), []
    for name, prepare in PASSES.items():
        found = measure({key: prepare(f, inputs) for key, f in contenders.items() if f}, repeats)
        rows += [_row(f"scan, {name}", key, cost, found["cpp"]) for key, cost in found.items()]
        if contenders["mambapy"] is None:
            rows.append({"what": f"scan, {name}", "contender": "mambapy", "ms": "not installed"})
    return rows


def bench_threads(repeats: int) -> list[Row]:
    """The compiled kernels on one and on two threads, by the clock. The matrix product is a control: where it does not
    run twice as fast, the second core was busy otherwise."""
    rows, inputs, matrix = [], scans.scan_inputs(), torch.randn(1000, 1000)
    runs = {"matrix product": lambda: matrix @ matrix,
            **{name: prepare(scans.scan_with("cpp"), inputs) for name, prepare in PASSES.items()}}
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

def bench_orders(repeats: int) -> list[Row]:
    """Forward and backward pass, at a width of 192 (SS2D) and 2 x 192 (BI-Scan of four tasks)."""
    torch.manual_seed(0)
    four, bi = S6(192, rank=12, routes=4), BIScan(CHANNELS, rank=12, state=STATE)
    feat, tasks = torch.randn(1, 56, 72, 192), torch.randn(1, 28, 36, 4, CHANNELS)
    parts = {
        "SS2D": (feat, list(four.parameters()), {
            "usual": lambda x, *_: scans.usual_ss2d(x, four.weights),
            "usual, channels last": lambda x, *_: scans.usual_ss2d_channels_last(x, four.weights),
            "routes": lambda x, *_: ss2d_core(x, four.weights)}),
        "BI-Scan": (tasks, list(bi.parameters()), {
            "usual": lambda x, *_: scans.usual_bi_scan(bi, x), "routes": lambda x, *_: bi(x)}),
    }
    rows = []
    for what, (x, parameters, contenders) in parts.items():
        expected = next(iter(contenders.values()))(x).detach()
        for forward in contenders.values():
            torch.testing.assert_close(forward(x).detach(), expected, rtol=1e-3, atol=1e-3)
        found = measure({key: scans.with_gradients(f, [x, *parameters]) for key, f in contenders.items()}, repeats)
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
        inputs = scans.scan_inputs(length)
        for name, prepare in PASSES.items():
            cost = measure({"cpp": prepare(scans.scan_with("cpp"), inputs)}, repeats)["cpp"]
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
        inputs = scans.scan_inputs(1008, 96, dtype)
        results = []
        for precision in (torch.float64, dtype):
            leaves = [x.to(precision).requires_grad_() for x in inputs]
            y = scans.scan_with("cpp")(*leaves)
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
    model = cpu_info().get("model name", platform.processor())
    return {"date": datetime.date.today().isoformat(), "processor": model, "cores": os.cpu_count() or 0,
            "vectors": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__,
            "load": round(os.getloadavg()[0], 2)}


def bench(json_file: Path | None, repeats: int, only: str | None, device: str) -> None:
    """Prints a table per part, and writes their numbers."""
    parts, about = PARTS, machine()
    if device == "cuda":
        from scripts import bench_scan_cuda
        parts, about = bench_scan_cuda.PARTS, about | bench_scan_cuda.machine()
    if only not in (None, *parts):
        raise ValueError(f"--only {only}: on {device} the parts are {', '.join(parts)}")
    torch.set_num_threads(1)
    report: dict[str, object] = {"machine": about}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    for name, part in parts.items():
        if only in (None, name):
            gc.collect()
            report[name] = part(repeats)
            print(f"\n{part.__doc__}\n{markdown(report[name])}", flush=True)
    if json_file:
        json_file.write_text(json.dumps(report, indent=1))


main = Command(__doc__, bench, {
    "--json": dict(type=Path, metavar="FILE", dest="json_file", help="also write the numbers there"),
    "--repeats": dict(type=int, default=10),
    "--only": dict(metavar="PART", help="one part of the benchmark"),
    "--device": dict(choices=("cpu", "cuda"), default="cpu"),
})

if __name__ == "__main__":
    sys.exit(main())
