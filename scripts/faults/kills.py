"""kill -9 at random instants: nothing may be lost but what was not saved, and the end must be that of a quiet run.

    python scripts/faults/kills.py --kills 200
    python scripts/faults/kills.py --kills 200 --parallel fsdp      # each process holds a part of the model

A run of two processes with shuffling, augmentation, workers, stochastic depth and a moving average is killed and
resumed until it is done, over and over. A third of the kills comes inside a save, at a random one of its calls to the
disk; of the others half hit the whole group and half one process. Every resumed run must begin at the newest checkpoint
or one before it; the finished one must equal, bit for bit, the undisturbed run: weights, optimizer, moving average,
scores, random states, metrics.jsonl. Exit code 1 where anything differs.
"""

import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.command_line import Command
from scripts.faults.runs import Stage, differences, last_step

RANKS, SAVE_STEPS = 2, 4
LIMIT_S = 300.0


def in_a_save(calls: int, writing: bool) -> Callable[[int], None]:
    """A trap: rank 0 kills its whole group at the `calls`-th call to the disk that its saves make.

    writing: counts the writes of content, a few thousand per save; else the few that make files durable and name them.
    """
    left = [calls]

    def trap(rank: int) -> None:
        if rank != 0:
            return
        import utils.seals

        def mortal(function: Callable) -> Callable:
            def call(*arguments: object, **options: object) -> object:
                left[0] -= 1
                if left[0] <= 0:
                    os.killpg(os.getpgid(0), signal.SIGKILL)
                return function(*arguments, **options)
            return call

        if writing:
            utils.seals._write_all = mortal(utils.seals._write_all)
            return
        for name in ("replace", "link", "fsync"):
            setattr(os, name, mortal(getattr(os, name)))

    return trap


def disturbed(stage: Stage, command: list[str], run_dir: Path, rng: random.Random, quiet_s: float,
              kills: int) -> tuple[Counter, list[str]]:
    """Runs to the end through at most so many kills; what happened, and what was wrong."""
    counts, wrong = Counter(), []
    while True:
        inside = rng.random() < 1 / 3
        kill = counts["kills"] < kills
        before = last_step(run_dir)
        writing = rng.random() < 0.5
        trap = in_a_save(rng.randrange(1, 12_000 if writing else 60), writing) if inside and kill else None
        processes = stage.start([*command, "--resume"], RANKS, trap)
        if kill and not inside and not processes.wait(rng.uniform(0, quiet_s)):
            processes.kill(only=rng.choice((None, 0, 1)))
        while not processes.poll() and not processes.codes and time.monotonic() - processes.started < LIMIT_S:
            time.sleep(0.05)
        if not processes.wait(0.5 if -signal.SIGKILL in processes.codes.values() else LIMIT_S):
            processes.kill(signal.SIGTERM)              # as a launcher does once a process has gone
        if not processes.wait(30):
            wrong.append("hung")
        hit = any(code == -signal.SIGKILL for code in processes.codes.values())
        processes.kill()
        processes.wait(10)
        counts["kills"] += hit
        counts["inside a save"] += hit and inside
        text = processes.text()
        resumed = re.search(r"resumed at step (\d+) from \S+/(\w+\.pt)", text)
        if resumed:
            counts["resumes"] += 1
            counts["from another than last.pt"] += resumed[2] != "last.pt"
            counts["most steps lost"] = max(counts["most steps lost"], before - int(resumed[1]))
        elif before > 2 * SAVE_STEPS and "nothing to resume" in text:
            wrong.append(f"began anew after step {before}")
        if "is damaged" in text or ("Traceback" in text and not hit):
            wrong.append(text[-2000:])
        if not hit:
            if set(processes.codes.values()) != {0}:
                wrong.append(f"exit codes {list(processes.codes.values())}: {text[-2000:]}")
            return counts, wrong


def campaign(kills: int, seed: int, parallel: str) -> int:
    """Prints a line for every run that was disturbed until it was done, and the sum of all."""
    rng, total, wrong = random.Random(seed), Counter(), []
    with tempfile.TemporaryDirectory() as name:
        stage = Stage(Path(name))
        start = time.monotonic()
        quiet = stage.start(stage.experiment("quiet", parallel=parallel), RANKS)
        if not quiet.wait(LIMIT_S) or set(quiet.codes.values()) != {0}:
            raise ValueError(f"the undisturbed run failed: {quiet.text()[-2000:]}")
        quiet_s, runs = time.monotonic() - start, 0
        while total["kills"] < kills and not wrong:
            runs += 1
            command, run_dir = stage.experiment("disturbed", parallel=parallel), stage.run_dir("disturbed")
            counts, wrong = disturbed(stage, command, run_dir, rng, quiet_s, min(8, kills - total["kills"]))
            wrong += [] if wrong else [f"differs: {part}" for part in differences(run_dir, stage.run_dir("quiet"))]
            lost = max(total["most steps lost"], counts["most steps lost"])
            total += counts
            total["most steps lost"] = lost
            print(f"run {runs}: {dict(counts)}{'; WRONG' if wrong else ''}", flush=True)
            shutil.rmtree(run_dir)
    for words in wrong:
        print(words)
    print(f"{runs} runs of {RANKS} processes: {dict(total)}; equal to the undisturbed run bit for bit: "
          f"{runs - bool(wrong)} of {runs}")
    return int(bool(wrong))


main = Command(__doc__, campaign, {
    "--kills": dict(type=int, default=200, help="how many"),
    "--seed": dict(type=int, default=0, help="of the instants"),
    "--parallel": dict(default="ddp", choices=("ddp", "fsdp"), help="how the model is spread"),
})

if __name__ == "__main__":
    sys.exit(main())
