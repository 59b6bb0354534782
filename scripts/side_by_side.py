"""Training steps of two checkouts of this program on a CPU, in turns: how much processor time and memory one takes.

`scripts/benchmark.py --compare YAML ... --against DIR` calls `compared_with`; the file is also the program that makes
one step after the other in a checkout, on demand. Of the other checkout it needs `Step` and `load_config` in its
scripts/benchmark.py, as every version of this program has them.
"""

import importlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
MARK = "measured "


class Runner:
    """A process that makes training steps of one experiment in a checkout."""

    def __init__(self, checkout: Path, entry: Path, overrides: Sequence[str]):
        quiet = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}  # threads that wait for each other count no processor time
        self.checkout = checkout
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(HERE), str(checkout), str(entry), *overrides], cwd=checkout, env=quiet,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> "Runner":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.communicate()

    def answer(self) -> Any:
        """What the next step measured. ValueError where the process ends without an answer."""
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line.removeprefix(MARK))
        raise ValueError(f"--against: no training step could be measured in {self.checkout}; its messages stand above")

    def step(self) -> float:
        """Processor seconds of one more step."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.answer()


def compared_with(other: Path, entries: Sequence[Path], overrides: Sequence[str], repeats: int) -> list[dict[str, str]]:
    """One row per experiment, whose file each checkout reads from its own folders."""
    rows = []
    for entry in entries:
        with Runner(other.resolve(), entry, overrides) as there:
            memory = [there.answer()]
            with Runner(HERE.parents[1], entry, overrides) as here:
                memory.append(here.answer())
                times = [(there.step(), here.step()) for _ in range(repeats)]
        ratio = statistics.median(theirs / ours for theirs, ours in times)
        row = {"experiment": entry.stem, "processor time of a step there / here": f"{ratio:.2f}"}
        for where, mib, spent in zip(("there", "here"), memory, zip(*times, strict=True), strict=True):
            row |= {f"step {where}, s": f"{statistics.median(spent):.2f}", f"step {where}, MiB": f"{mib:.0f}"}
        rows.append(row)
    return rows


def run(checkout: str, entry: str, *overrides: str) -> None:
    """Prints the peak memory of a step, then the processor time of one more for every line on the standard input."""
    import measuring  # beside this file: the same yardstick for every checkout
    sys.path.insert(0, checkout)
    benchmark = importlib.import_module("scripts.benchmark")  # that of the checkout
    step = benchmark.Step(benchmark.load_config(entry, list(overrides)))
    step.train()
    print(MARK + json.dumps(measuring.peak_memory(step.train)), flush=True)
    for _ in sys.stdin:
        print(MARK + json.dumps(measuring.seconds(step.train, measuring.CPU)[1]), flush=True)


if __name__ == "__main__":
    run(*sys.argv[1:])
