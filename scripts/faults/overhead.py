"""What keeping and guarding a run costs: in a run that saves every minute, of a checkpoint, of asking all processes.

    python scripts/faults/overhead.py --config_exp configs/example/bim_nyud.yml --minutes 10 --mebibytes 512

A run of this experiment, on made data and a CPU, takes so many minutes; what its keeper, guard and watchdog do is
summed up while it goes on, in processor time, so that other programs on the machine do not count: of an update compared
with the whole update, of a checkpoint with a minute. Then a checkpoint of the given size: it stops the training while
the state is copied to the host; a thread writes it. Then, of two processes, what an agreement adds to an update.
"""

import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from scripts.command_line import Command
from scripts.faults.runs import Stage
from utils.engine.leaving import GOING_ON, Agreement
from utils.engine.saving import Saver

UPDATES = 1000


def of_a_checkpoint(mebibytes: int, folder: Path) -> None:
    """Three checkpoints of this size, the fastest counts."""
    part = torch.randn(2**18)                                           # 1 MiB
    state = {"step": 0, "model": {str(i): part + i for i in range(mebibytes)}}
    times = []
    for step in range(3):
        saver = Saver(folder, lambda: None)
        state["step"] = step
        wall, used = time.perf_counter(), time.process_time()
        saver.save(state)
        stopped = time.perf_counter() - wall
        saver.wait()
        times.append((stopped, time.perf_counter() - wall, time.process_time() - used))
    stopped, wall, used = (min(column) for column in zip(*times, strict=True))
    print(f"{mebibytes} MiB: the training stops for {stopped:.3f} s ({stopped / 60:.2%} of a minute), written after "
          f"{wall:.2f} s, {used:.2f} s of processor time ({used / 60:.2%} of a core)")


class Meter:
    """Sums up the processor time of methods, each call in the thread that makes it."""

    def __init__(self) -> None:
        self.times: dict[str, list[float]] = {}

    def watch(self, owner: type, name: str, part: str) -> None:
        """Replaces a method by one that is measured."""
        method, times = getattr(owner, name), self.times.setdefault(part, [])

        def measured(*arguments: object, **options: object) -> object:
            start = time.thread_time()
            try:
                return method(*arguments, **options)
            finally:
                times.append(time.thread_time() - start)

        setattr(owner, name, measured)

    def table(self, used: float) -> str:
        """used: seconds of processor time of the whole run. Of checkpoints one a minute counts, of an own core."""
        total = {part: sum(times) for part, times in self.times.items()}
        updates, saves = len(self.times["guard"]), len(self.times["writing"])
        update, rows = used / updates, []
        for part, seconds in (("keeper", total["keeper"] - total["copying"]), ("guard", total["guard"]),
                              ("watchdog", total["watchdog"])):
            rows.append((f"{part}, of an update", 1000 * seconds / updates, 100 * seconds / updates / update))
        for part in ("copying", "writing"):
            rows.append((f"{part} a checkpoint", 1000 * total[part] / saves, 100 * total[part] / saves / 60))
        rows.append(("all of it", 0, sum(share for _, _, share in rows)))
        return "\n".join([f"{updates} updates of {1000 * update:.1f} ms of processor time, {saves} checkpoints\n",
                          "| part | ms | % |", "| --- | --- | --- |",
                          *(f"| {part} | {f'{ms:.3f}' if ms else ''} | {share:.3f} |" for part, ms, share in rows)])


def in_a_run(config_exp: str, overrides: Sequence[str], minutes: float, stage: Stage) -> None:
    """A run in a process of its own, asked to leave after so many minutes; the table that it prints then."""
    def trap(rank: int) -> None:
        from utils.engine.guard import Guard
        from utils.engine.keeper import Keeper
        from utils.engine.watchdog import Watchdog
        meter, start = Meter(), 0.0
        for owner, name, part in ((Keeper, "begin_update", "keeper"), (Keeper, "end_update", "keeper"),
                                  (Saver, "save", "copying"), (Saver, "_write", "writing"), (Guard, "check", "guard"),
                                  (Watchdog, "beat", "watchdog")):
            meter.watch(owner, name, part)
        begin, leave = Keeper.begin_update, Keeper.leave

        def begin_update(keeper: Keeper) -> None:
            nonlocal start
            start = start or time.process_time()            # not the building of the run
            begin(keeper)

        def report(keeper: Keeper) -> None:
            print(meter.table(time.process_time() - start))
            leave(keeper)

        Keeper.begin_update, Keeper.leave = begin_update, report

    command = ["main.py", "--config_exp", config_exp, *overrides, "device=cpu", "pretrained=false", "progress=false",
               "max_iter=1000000", "val_interval=1000000", "epochs=1000000", f"db_root={stage.folder / 'data'}",
               f"out_dir={stage.folder / 'runs'}", "version_name=measured", "save_interval.minutes=1"]
    run = stage.start(command, trap=trap)
    if not run.wait(60 * minutes):
        run.kill(signal.SIGTERM)
    run.wait(60)
    print(run.text()[-3000:])


def _rank(rank: int, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    agreement = Agreement(lambda: GOING_ON)
    used = []
    for ask in (True, False):
        dist.barrier()
        start = time.process_time()
        for _ in range(UPDATES):
            if ask:
                agreement.announce()
            time.sleep(0.005)                                           # the update
            if ask:
                agreement.result()
        used.append((time.process_time() - start) / UPDATES)
    if rank == 0:
        print(f"agreements of 2 processes, updates of 5 ms: {1e6 * (used[0] - used[1]):.0f} us of processor time each")
    dist.destroy_process_group()


def measure(config_exp: str, overrides: Sequence[str], minutes: float, mebibytes: int) -> None:
    """Prints all."""
    with tempfile.TemporaryDirectory() as name:
        in_a_run(config_exp, overrides, minutes, Stage(Path(name), size=(120, 160)))
        of_a_checkpoint(mebibytes, Path(name))
    mp.spawn(_rank, (29741,), nprocs=2)


main = Command(__doc__, measure, {
    "--config_exp": dict(default="configs/example/bim_nyud.yml", metavar="YAML", help="experiment file on NYUD"),
    "--minutes": dict(type=float, default=10, help="how long to train"),
    "--mebibytes": dict(type=int, default=512, help="size of the checkpoint"),
    "overrides": dict(nargs="*", metavar="key=value", help="as for main.py"),
})

if __name__ == "__main__":
    sys.exit(main())
