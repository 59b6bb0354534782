"""What the guards of a run cost, as a share of an update: looking at its numbers, the watchdog, the agreement of ranks.

    python scripts/bench_guards.py --config_exp configs/example/bim_nyud.yml pretrained=false

Updates and guards run in turn, `--repeats` times each; the table has medians of processor time, so that other programs
on the machine do not count. On CUDA the host's time is what is measured. Saving is `save_interval`'s matter
(docs/reliability.md).
"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from scripts.benchmark import Step
from scripts.command_line import Command
from utils.engine.config import load_config
from utils.engine.guard import Guard
from utils.engine.update import Update
from utils.engine.watchdog import Watchdog


def bench(config_exp: str, overrides: Sequence[str], repeats: int) -> None:
    """Prints a table in Markdown."""
    step = Step(load_config(config_exp, overrides))
    step.step = 0                                       # a run counts its updates
    update = Update(step)
    outcome = step.train()
    step.update([step.batch])
    update([step.batch])                                # knows the names of losses and gradients
    guard, watchdog = Guard(step, update, lambda: None), Watchdog(Path("unused"), factor=20)
    times: dict[str, list[float]] = {"update": [], "guard": [], "watchdog": []}
    for _ in range(repeats):
        times["update"].append(_processor_time(step.train))
        times["guard"].append(_processor_time(lambda: guard.check(outcome, [step.batch])))
        times["watchdog"].append(_processor_time(watchdog.beat))
    medians = {name: 1e3 * statistics.median(values) for name, values in times.items()}
    print(f"{torch.get_num_threads()} thread(s), {step.device}, {repeats} repeats, {config_exp}\n")
    print("| part | processor time, ms | of an update, % |\n| --- | --- | --- |")
    for name, value in medians.items():
        print(f"| {name} | {value:.3f} | {100 * value / medians['update']:.3f} |")


def _processor_time(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


main = Command(__doc__, bench, {
    "--config_exp": dict(required=True, metavar="YAML", help="experiment file"),
    "--repeats": dict(type=int, default=20, help="of updates and of guards"),
    "overrides": dict(nargs="*", metavar="key=value", help="as for main.py"),
})

if __name__ == "__main__":
    sys.exit(main())
