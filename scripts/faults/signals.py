"""Every signal, to a process, a group or torchrun's agent, while a run trains, evaluates or saves: it must be saved.

    python scripts/faults/signals.py --rounds 5                     # all combinations
    python scripts/faults/signals.py --rounds 1 --to process group  # those without torchrun, which are quick

After each signal: all processes have ended within ten seconds, with exit code 75 (torchrun's agent has a code of its
own, never 0), none is left, and last.pt is whole and holds the last step that was told of. Exit code 1 where not.
"""

import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.command_line import Command
from scripts.faults.runs import Processes, Stage, checkpoint, in_group, last_step, of_experiment
from utils.engine.manifest import newest_whole
from utils.exits import CONTINUE

SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")
TARGETS = ("process", "group", "agent")
PHASES = {          # keys of the experiment that make a run spend its time there
    "training": {"save_interval": {"steps": 0, "minutes": 0}, "val_interval": 100000},
    "evaluating": {"val_interval": 2},
    "saving": {"save_interval": {"steps": 1, "minutes": 0}, "val_interval": 100000},
}
BEGINS_AT = {"training": 6, "evaluating": 2, "saving": 6}        # the step after which the signal is sent
WITHIN_S, START_S = 10.0, 240.0
ROOT = Path(__file__).resolve().parents[2]


def _wait_for_step(run_dir: Path, step: int, ended: Processes | subprocess.Popen) -> None:
    end = time.monotonic() + START_S
    while last_step(run_dir) < step:
        over = ended.poll() if isinstance(ended, Processes) else ended.poll() is not None
        if over or time.monotonic() > end:
            told = ended.text() if isinstance(ended, Processes) else ""
            raise ValueError(f"step {step} was not reached ({'the run ended' if over else 'too slow'}): {told[-1500:]}")
        time.sleep(0.02)


def hit(stage: Stage, rng: random.Random, number: str, target: str, phase: str, workers: int, ranks: int) -> list[str]:
    """One run, one signal; what was wrong afterwards, and how long the end took as the last entry."""
    name = "hit"
    run_dir, keys = stage.run_dir(name), {"nworkers": workers, "max_iter": 100000, "log_interval": 1, **PHASES[phase]}
    command = stage.experiment(name, **keys)
    for path in sorted(run_dir.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    run = _under_an_agent(stage, command, ranks) if target == "agent" else stage.start(command, ranks)
    group = run.pid if isinstance(run, subprocess.Popen) else run.pids[0]

    def there() -> list[int]:
        return of_experiment(command[-1]) if target == "agent" else in_group(group)

    try:
        _wait_for_step(run_dir, BEGINS_AT[phase], run)
        time.sleep(rng.uniform(0, 0.4))
        start = time.monotonic()
        if target == "group":
            os.killpg(group, getattr(signal, number))
        else:
            os.kill(run.pid if target == "agent" else rng.choice(run.pids), getattr(signal, number))
        wrong = _judge(run, run_dir, there, target, start)
    finally:
        for pid in there():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        run.wait(30)
    return wrong


def _judge(run: Processes | subprocess.Popen, run_dir: Path, there: Callable[[], list[int]], target: str,
           start: float) -> list[str]:
    wrong, told = [], False
    while there() and time.monotonic() - start < WITHIN_S + 5:
        over = run.poll()
        if target == "process" and run.codes and not over and not told:
            told = True                     # a launcher ends the others once one has gone
            time.sleep(0.2)
            run.kill(signal.SIGTERM)
        time.sleep(0.02)
    took = time.monotonic() - start
    if not there():
        run.wait(5)
    if left := there():
        wrong.append(f"{len(left)} processes left")
    if took > WITHIN_S:
        wrong.append("too slow")
    run.poll()
    if isinstance(run, Processes):
        if set(run.codes.values()) != {CONTINUE}:
            wrong.append(f"exit codes {sorted(run.codes.values())}")
    elif run.returncode in (0, None):
        wrong.append(f"exit code {run.returncode} of the agent")
    if newest_whole(run_dir) is None:
        wrong.append("nothing saved")
    elif checkpoint(run_dir)["step"] < last_step(run_dir):
        wrong.append(f"last.pt holds step {checkpoint(run_dir)['step']} of {last_step(run_dir)}")
    return [*wrong, f"{took:.1f} s"]


def _under_an_agent(stage: Stage, command: Sequence[str], ranks: int) -> subprocess.Popen:
    with open(stage.folder / "agent.txt", "w", encoding="utf-8") as output:
        return subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone",
                                 f"--nproc_per_node={ranks}", *command], cwd=ROOT, stdout=output, stderr=output,
                                start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def campaign(rounds: int, seed: int, to: Sequence[str], phases: Sequence[str], ranks: Sequence[int],
             signals: Sequence[str]) -> int:
    """Prints a line for each run, and the counts."""
    rng, failed, done, slowest = random.Random(seed), 0, 0, 0.0
    signal.signal(signal.SIGINT, signal.default_int_handler)    # a shell's background job ignores it, one of nohup
    signal.signal(signal.SIGHUP, signal.SIG_DFL)                # SIGHUP, and so would all that is started here
    with tempfile.TemporaryDirectory() as name:
        stage = Stage(Path(name), num_val=40)
        for _ in range(rounds):
            for combination in itertools.product(signals, to, phases, (0, 2), ranks):
                *wrong, took = hit(stage, rng, *combination)
                done, slowest = done + 1, max(slowest, float(took.split()[0]))
                failed += bool(wrong)
                print(*combination, *(wrong or ["ok"]), took, flush=True)
    print(f"{done - failed} of {done} saved, ended with the right exit code and left nothing; slowest {slowest:.1f} s")
    return int(bool(failed))


main = Command(__doc__, campaign, {
    "--rounds": dict(type=int, default=5, help="how often each combination"),
    "--seed": dict(type=int, default=0, help="of the instants"),
    "--to": dict(nargs="+", default=TARGETS, choices=TARGETS, help="who gets the signal"),
    "--phases": dict(nargs="+", default=tuple(PHASES), choices=tuple(PHASES), help="what the run is doing"),
    "--ranks": dict(nargs="+", type=int, default=(1, 2), help="processes of a run"),
    "--signals": dict(nargs="+", default=SIGNALS, choices=SIGNALS, help="which"),
})

if __name__ == "__main__":
    sys.exit(main())
