"""torchrun's restarts: a process is killed three times, the launcher starts all anew, the end is that of a quiet run.

    python scripts/faults/restarts.py --runs 10

`torchrun --max-restarts 3` runs two processes, without --resume. One of them, at random, is killed with -9 at random
instants, three times. The launcher must come to its end with exit code 0, and the run must equal, bit for bit, the
undisturbed one. Exit code 1 where not.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.command_line import Command
from scripts.faults.runs import Stage, differences, last_step, of_experiment

ROOT, RANKS, KILLS, LIMIT_S = Path(__file__).resolve().parents[2], 2, 3, 600.0


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    return [int(number) for number in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()]


def disturbed(stage: Stage, rng: random.Random) -> list[str]:
    """One run through three kills; what was wrong."""
    command, run_dir = stage.experiment("disturbed", log_interval=1), stage.run_dir("disturbed")
    shutil.rmtree(run_dir, ignore_errors=True)
    log = stage.folder / "agent.txt"
    with open(log, "w", encoding="utf-8") as output:
        agent = subprocess.Popen([sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=3",
                                  f"--nproc_per_node={RANKS}", *command], cwd=ROOT, stdout=output, stderr=output,
                                 start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    steps = sorted(rng.sample(range(1, 38), KILLS))
    start = time.monotonic()
    while agent.poll() is None and time.monotonic() - start < LIMIT_S:
        if steps and last_step(run_dir) >= steps[0] and len(ranks := children(agent.pid)) == RANKS:
            time.sleep(rng.uniform(0, 0.5))
            os.kill(rng.choice(ranks), signal.SIGKILL)
            steps.pop(0)
            while agent.poll() is None and set(children(agent.pid)) & set(ranks):
                time.sleep(0.1)
        time.sleep(0.02)
    left = of_experiment(command[-1])
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    if agent.wait(10) != 0 or left or steps:
        return [f"exit code {agent.returncode}, {len(left)} processes left, {len(steps)} kills not made: "
                + log.read_text(encoding="utf-8")[-3000:]]
    return differences(run_dir, stage.run_dir("quiet"))


def campaign(runs: int, seed: int) -> int:
    """Prints what became of every run."""
    rng, equal = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as name:
        stage = Stage(Path(name))
        quiet = stage.start(stage.experiment("quiet", log_interval=1), RANKS)
        if not quiet.wait(LIMIT_S) or set(quiet.codes.values()) != {0}:
            raise ValueError(f"the undisturbed run failed: {quiet.text()[-2000:]}")
        for number in range(1, runs + 1):
            wrong = disturbed(stage, rng)
            equal += not wrong
            print(f"run {number}: {wrong or 'equal'}", flush=True)
    print(f"{equal} of {runs} runs, each killed {KILLS} times, equal the undisturbed run")
    return int(equal < runs)


main = Command(__doc__, campaign, {
    "--runs": dict(type=int, default=10, help="how many"),
    "--seed": dict(type=int, default=0, help="of the instants"),
})

if __name__ == "__main__":
    sys.exit(main())
