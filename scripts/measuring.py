"""What the benchmarks share: how long a call takes, how much memory it needs, and a table of such numbers."""

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

CPU = torch.device("cpu")
Row = dict[str, str | float | int]


class Cost(NamedTuple):
    ms: float           # by the clock
    cpu_ms: float       # given to the process, all threads together
    mib: float          # of tensors, beyond those that were there before


def measure(runs: Mapping[str, Callable[[], object]], repeats: int, device: torch.device = CPU,
            warm_ups: int = 1) -> dict[str, Cost]:
    """Median times and peak memory of each run; they take turns, so that other programs slow all of them alike."""
    peaks = {}
    for name, run in runs.items():
        for _ in range(warm_ups):
            run()
        peaks[name] = peak_memory(run, device)
    times = [{name: seconds(run, device) for name, run in runs.items()} for _ in range(repeats)]
    return {name: Cost(*medians([time[name] for time in times], 1e3), peaks[name]) for name in runs}


def medians(times: Sequence[tuple[float, ...]], unit: float = 1.0) -> tuple[float, ...]:
    """Of each kind of time."""
    return tuple(statistics.median(kind) * unit for kind in zip(*times, strict=True))


def seconds(run: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """Time of a call by the clock, on a GPU that between its own events, and processor time."""
    start = time.perf_counter(), time.process_time()
    if device.type != "cuda":
        run()
        return time.perf_counter() - start[0], time.process_time() - start[1]
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3, time.process_time() - start[1]


def peak_memory(run: Callable[[], object], device: torch.device = CPU) -> float:
    """MiB of tensors alive at once during the call, beyond those alive before, as PyTorch's allocator counts them."""
    if device.type == "cuda":
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        return (torch.cuda.max_memory_allocated(device) - held) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = run()
    del result
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(alive, default=0) / 2**20


def markdown(rows: Sequence[Row]) -> str:
    """A table whose columns are all keys of the rows."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns), *([_cell(row.get(column, "")) for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: str | float | int) -> str:
    if isinstance(value, (str, int)):
        return str(value)
    return f"{value:.1e}" if abs(value) < 1e-2 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
