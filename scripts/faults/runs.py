"""Small runs that can be started in a second and hit: what the campaigns share.

A `Stage` has imported everything once; every process of a run is a fork of it with the environment that a launcher
would give, all of them in a group of their own. The network is small, everything else is as in a real run: shuffling,
augmentation, workers, stochastic depth, a moving average, mixed losses, one or two gloo processes.
"""

import json
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml

EXPERIMENT = {
    "model": "fcn", "backbone": "swin", "pretrained": False, "train_db_name": "NYUD", "val_db_name": "NYUD",
    "backbone_kwargs": {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4,
                        "drop_path_rate": 0.3},
    "task_dictionary": {"include_semseg": True, "include_depth": True}, "image_size": [64, 96], "trBatch": 2,
    "valBatch": 1, "nworkers": 1, "max_iter": 40, "val_interval": 15, "log_interval": 4, "device": "cpu",
    "tensorboard": False, "progress": False, "report": False, "ema_decay": 0.9, "checkpoint_interval": 17,
    "save_interval": {"steps": 4, "minutes": 0},
}
ROOT = Path(__file__).resolve().parents[2]
TOLD_BY_TIME = ("images_per_s",)            # of a line in metrics.jsonl: differs from run to run


@dataclass
class Processes:
    """The processes of a running run. output: what they printed, both streams."""

    pids: list[int]
    output: Path
    started: float = field(default_factory=time.monotonic)
    codes: dict[int, int] = field(default_factory=dict)      # pid -> exit code, minus the signal that ended it

    def poll(self) -> bool:
        """Whether all have ended."""
        for pid in self.pids:
            if pid not in self.codes:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
        return len(self.codes) == len(self.pids)

    def wait(self, seconds: float) -> bool:
        """Waits for the end of all; whether it came."""
        end = time.monotonic() + seconds
        while not self.poll():
            if time.monotonic() > end:
                return False
            time.sleep(0.01)
        return True

    def kill(self, number: int = signal.SIGKILL, only: int | None = None) -> None:
        """Sends a signal to the whole group, or to one process of it."""
        try:
            if only is None:
                os.killpg(self.pids[0], number)
            else:
                os.kill(self.pids[only], number)
        except ProcessLookupError:
            return

    def left(self) -> list[int]:
        """Processes of this group that still run, workers included."""
        return [pid for pid in in_group(self.pids[0]) if pid not in self.codes]

    def text(self) -> str:
        return self.output.read_text(encoding="utf-8", errors="replace")


class Stage:
    """A folder with data and experiments, in which runs are started. trap: called in each process before it trains."""

    def __init__(self, folder: Path, num_val: int = 4, size: tuple[int, int] = (64, 96)) -> None:
        from scripts.example_data.write import write_example
        self.folder, self.started, self.runs = folder, 0, []
        write_example(folder / "data", num_train=12, num_val=num_val, size=size, seed=0, workers=1, progress=False)
        import utils.engine.train  # noqa: F401 (once, for all processes to come)
        torch.set_num_threads(1)

    def experiment(self, name: str, **keys: object) -> list[str]:
        """The command line of `main.py` for a run called `name`."""
        path = self.folder / f"{name}.yml"
        values = {**EXPERIMENT, "db_root": str(self.folder / "data"), "out_dir": str(self.folder / "runs"), **keys}
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        return ["main.py", "--config_exp", str(path)]

    def run_dir(self, name: str) -> Path:
        return self.folder / "runs" / name

    def start(self, command: Sequence[str], ranks: int = 1, trap: Callable[[int], None] | None = None) -> Processes:
        """Starts the processes of a run."""
        self.started += 1
        output = self.folder / f"output_{self.started}.txt"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        pids: list[int] = []
        for rank in range(ranks):
            sys.stdout.flush()
            if not (pid := os.fork()):
                _become(rank, ranks, port, output)
                _main(list(command), trap, rank)
            pids.append(pid)
            os.setpgid(pid, pids[0])            # one group for all, and their workers
        self.runs.append(Processes(pids, output))
        return self.runs[-1]

    def end_all(self) -> None:
        """Ends what may still be running."""
        for run in self.runs:
            if run.left():
                run.kill()
                run.wait(10)


def _become(rank: int, ranks: int, port: int, output: Path) -> None:
    """The process of a rank: its streams, its environment."""
    handle = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))
    if ranks > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                       "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def _main(command: list[str], trap: Callable[[int], None] | None, rank: int) -> None:
    """Runs main.py in this process, and ends it."""
    sys.argv, code = command, 1
    try:
        if trap is not None:
            trap(rank)
        runpy.run_path(str(ROOT / "main.py"), run_name="__main__")
        code = 0
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr, flush=True)
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def in_group(group: int) -> list[int]:
    """Processes of a group, zombies left out."""
    return _processes("stat", lambda text: int(text.rpartition(")")[2].split()[2]) == group)


def of_experiment(path: str) -> list[int]:
    """Processes that were started with this file, and their workers: torchrun gives each rank a group of its own."""
    return _processes("cmdline", lambda text: path in text.split("\0"))


def _processes(about: str, wanted: Callable[[str], bool]) -> list[int]:
    """Those of which this file in /proc is as wanted, zombies left out."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state = (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()[0]
            if state not in "ZX" and wanted((folder / about).read_text(errors="replace")):
                found.append(int(folder.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


# ------------------------------------------------------------ what a run has left


def last_step(run_dir: Path) -> int:
    """The newest step that metrics.jsonl tells of; 0 before the first."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    steps = [json.loads(line)["step"] for line in lines if line.endswith("}")]
    return max(steps, default=0)


def checkpoint(run_dir: Path, name: str = "last.pt") -> dict:
    return torch.load(run_dir / name, weights_only=True)


def metrics(run_dir: Path) -> list[dict]:
    """The lines of metrics.jsonl, without what a clock decides."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if key not in TOLD_BY_TIME} for row in rows]


def differences(run_dir: Path, other: Path) -> list[str]:
    """What two finished runs have not in common, bit for bit: parts of their checkpoints, and their metrics."""
    found = []
    for name in ("last.pt", "best.pt", *sorted(path.name for path in other.glob("step_*.pt"))):
        a, b = checkpoint(run_dir, name), checkpoint(other, name)
        found += [f"{name}: {part}" for part in sorted(a.keys() | b.keys())
                  if part not in ("config", "git") and not _same(a.get(part), b.get(part))]
    return found + ([] if metrics(run_dir) == metrics(other) else ["metrics.jsonl"])


def _same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(_same, a, b))
    return a == b or (a != a and b != b)            # not a number on both sides
