"""Disks and workers that fail under a run: it must end in one sentence, and what it had saved must be whole.

    python scripts/faults/disk.py        # a full disk and a locked folder take root; else they are skipped

A full disk, a limit on the size of files, a folder in which no file may be made any more, a folder that vanishes, a
file where the folder should be, a worker that is killed, alone and in one of two processes. Exit code 1 where a run
hangs, ends in a traceback or with exit code 0, or where a saved file is not whole.
"""

import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.command_line import Command
from scripts.faults.runs import Processes, Stage, in_group, last_step
from utils.engine.manifest import newest_whole

KEYS = {"max_iter": 100000, "val_interval": 100000, "log_interval": 1, "checkpoint_interval": 0}
EVERY_STEP = {"save_interval": {"steps": 1, "minutes": 0}}
START_S, END_S = 120.0, 30.0


@contextmanager
def small_disk(path: Path, mebibytes: int) -> Iterator[None]:
    """A disk of its own at `path`; an OSError where this user may not mount one."""
    path.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs", str(path)],
                          capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"cannot mount a disk: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def _until(condition: Callable[[], bool], run: Processes) -> None:
    end = time.monotonic() + START_S
    while not condition():
        if run.poll() or time.monotonic() > end:
            raise ValueError(f"the run did not get there: {run.text()[-1500:]}")
        time.sleep(0.02)


def _judge(run: Processes, run_dir: Path, words: str, saved: bool = True) -> str:
    """"ok" and the sentence, or what is wrong."""
    ended = run.wait(END_S)
    text = run.text()
    sentence = next((line for line in text.splitlines() if line.startswith("error: ")), "")
    problems = [] if ended else ["hung"]
    if not ended:
        run.kill()
        run.wait(10)
    problems += ["traceback"] if "Traceback" in text else []
    problems += [f"exit codes {list(run.codes.values())}"] if 0 in run.codes.values() else []
    time.sleep(0.5)                         # workers are killed at the end, which takes the system a moment
    problems += ["left processes"] if in_group(run.pids[0]) else []
    problems += [f"no {words!r} in {sentence!r}"] if words not in sentence else []
    problems += ["said more than once"] if text.count("error: ") > 1 else []
    if saved and newest_whole(run_dir) is None:
        problems.append("nothing whole is left")
    run.kill()
    return f"WRONG: {', '.join(problems)}\n{text[-1500:]}" if problems else f"ok: {sentence}"


def full_disk(stage: Stage) -> str:
    run_dir = stage.run_dir("full")
    with small_disk(run_dir, 12):
        run = stage.start(stage.experiment("full", **KEYS, **EVERY_STEP))
        _until(lambda: last_step(run_dir) >= 4, run)
        with open(run_dir / "ballast", "wb") as file:
            try:
                while True:
                    file.write(bytes(2**16))
                    file.flush()
            except OSError:
                pass
        return _judge(run, run_dir, "No space left on device")


def file_limit(stage: Stage) -> str:
    run_dir = stage.run_dir("limit")
    size = 300_000

    def trap(rank: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    run = stage.start(stage.experiment("limit", **KEYS, **EVERY_STEP), trap=trap)
    return _judge(run, run_dir, "File too large", saved=False)


def locked_folder(stage: Stage) -> str:
    """A folder in which files may no longer be made, as on a disk that has turned read-only."""
    run_dir = stage.run_dir("locked")
    run = stage.start(stage.experiment("locked", **KEYS, **EVERY_STEP))
    _until(lambda: last_step(run_dir) >= 4, run)
    done = subprocess.run(["chattr", "+i", str(run_dir)], capture_output=True, text=True, check=False)
    try:
        if done.returncode:
            run.kill()
            run.wait(10)
            raise OSError(done.stderr.strip())
        return _judge(run, run_dir, "Operation not permitted")
    finally:
        subprocess.run(["chattr", "-i", str(run_dir)], capture_output=True, check=False)


def vanished_folder(stage: Stage) -> str:
    """The folder is made again, so that the run is not lost; nothing has to be said."""
    run_dir = stage.run_dir("vanished")
    run = stage.start(stage.experiment("vanished", **KEYS, **EVERY_STEP))
    _until(lambda: last_step(run_dir) >= 4, run)
    shutil.rmtree(run_dir, ignore_errors=True)
    _until(lambda: (run_dir / "last.pt").exists(), run)
    run.kill(signal.SIGTERM)
    ended = run.wait(END_S)
    whole = ended and newest_whole(run_dir)
    return "ok: written anew" if whole and "Traceback" not in run.text() else f"WRONG: {run.text()[-1500:]}"


def killed_worker(stage: Stage, ranks: int = 1) -> str:
    name = f"worker{ranks}"
    run_dir = stage.run_dir(name)
    run = stage.start(stage.experiment(name, **KEYS, save_interval={"steps": 0, "minutes": 0}, nworkers=2), ranks)
    _until(lambda: last_step(run_dir) >= 4, run)
    workers = [pid for pid in in_group(run.pids[0]) if pid not in run.pids]
    os.kill(workers[-1], signal.SIGKILL)
    return _judge(run, run_dir, "a data loader worker was ended from outside")


def unwritable(stage: Stage) -> str:
    (stage.folder / "runs").mkdir(exist_ok=True)
    stage.run_dir("file").write_text("not a folder")
    run = stage.start(stage.experiment("file", **KEYS))
    return _judge(run, stage.run_dir("file"), str(stage.run_dir("file")), saved=False)


FAULTS: dict[str, Callable[[Stage], str]] = {
    "full disk": full_disk, "limit on the size of files": file_limit, "locked folder": locked_folder,
    "vanished folder": vanished_folder, "a file where the folder should be": unwritable,
    "killed worker": killed_worker, "killed worker of one of two processes": lambda stage: killed_worker(stage, 2),
}


def campaign() -> int:
    """Prints a line for every fault."""
    wrong = 0
    with tempfile.TemporaryDirectory() as name:
        stage = Stage(Path(name))
        for fault, make in FAULTS.items():
            try:
                outcome = make(stage)
            except OSError as error:
                outcome = f"skipped: {error}"
            wrong += outcome.startswith("WRONG")
            print(f"{fault}: {outcome}", flush=True)
    return int(bool(wrong))


main = Command(__doc__, campaign, {})

if __name__ == "__main__":
    sys.exit(main())
