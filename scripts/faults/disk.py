"""Disks and workers that fail under a run: it must end in one sentence, and what it had saved must be whole.

    python scripts/faults/disk.py        # what mounts a file system or locks a folder takes root, and is skipped else

A full disk, a quota (btrfs) and a limit on the size of files that are reached, a disk that turns read-only (ext4, after
an error of its own), a folder in which no file may be made any more, a folder that vanishes, a file where the folder
should be; shared memory that is too small from the start or lost under the run; a worker that is killed or
stopped, alone and in one of two processes. Exit code 1 where a run hangs, ends in a traceback or with exit code 0, or
where a saved file is not whole.
"""

import ctypes
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.command_line import Command
from scripts.faults.file_systems import as_root, disk_with_quota, failing_disk, memory_disk, set_quota
from scripts.faults.runs import Processes, Stage, in_group, last_step
from utils.engine.manifest import newest_whole

KEYS = {"max_iter": 100000, "val_interval": 100000, "log_interval": 1, "checkpoint_interval": 0}
EVERY_STEP = {"save_interval": {"steps": 1, "minutes": 0}}
NEVER = {"save_interval": {"steps": 0, "minutes": 0}}
START_S, END_S = 120.0, 30.0
NEW_MOUNTS = 0x00020000                  # CLONE_NEWNS of <sched.h>
SHARED_MEMORY = "/dev/shm"


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
    return f"WRONG: {', '.join(problems)}\n{text[-15000:]}" if problems else f"ok: {sentence}"


def full_disk(stage: Stage) -> str:
    """Something else fills the disk while the run saves in every step."""
    run_dir = stage.run_dir("full")
    with memory_disk(run_dir, 12):
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


def quota(stage: Stage) -> str:
    """The quota of the run's folder sinks below what is there."""
    with disk_with_quota(stage.folder / "quota", stage.folder / "quota.img") as folder:
        run_dir = folder / "run"
        run = stage.start(stage.experiment("run", **KEYS, **EVERY_STEP, out_dir=str(folder)))
        _until(lambda: last_step(run_dir) >= 4, run)
        set_quota(folder, 1)
        return _judge(run, run_dir, "Disk quota exceeded")


def read_only_disk(stage: Stage) -> str:
    """An error makes the file system read-only."""
    with failing_disk(stage.folder / "failing", stage.folder / "failing.img", 48) as trigger:
        run_dir = stage.folder / "failing" / "run"
        run = stage.start(stage.experiment("run", **KEYS, **EVERY_STEP, out_dir=str(stage.folder / "failing")))
        _until(lambda: last_step(run_dir) >= 4, run)
        trigger.write_text("1", encoding="ascii")
        return _judge(run, run_dir, f"cannot write {run_dir}")      # the file system says EROFS or EIO


def file_limit(stage: Stage) -> str:
    """No file may be larger than 300 kB, which a checkpoint is."""
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
    as_root("chattr", "+i", str(run_dir))
    try:
        return _judge(run, run_dir, "Operation not permitted")
    finally:
        as_root("chattr", "-i", str(run_dir))


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


def hit_worker(stage: Stage, number: int, words: str, ranks: int) -> str:
    """A worker of one process gets a signal that it cannot hear."""
    name = f"worker_{number}_{ranks}"
    run_dir = stage.run_dir(name)
    run = stage.start(stage.experiment(name, **KEYS, **NEVER, nworkers=2, loader_timeout=5), ranks)
    _until(lambda: last_step(run_dir) >= 4, run)
    os.kill([pid for pid in in_group(run.pids[0]) if pid not in run.pids][-1], number)
    return _judge(run, run_dir, words)


killed_worker = partial(hit_worker, number=signal.SIGKILL, words="a data loader worker was ended from outside")
stopped_worker = partial(hit_worker, number=signal.SIGSTOP, words="workers have delivered no batch for 5 s")


def shared_memory(stage: Stage, kibibytes: int, lost: bool = False) -> str:
    """In a file system of the run's own. lost: one that nobody may write to is mounted over it once the run trains."""
    name = f"shared_{kibibytes}"
    run_dir = stage.run_dir(name)

    def trap(rank: int) -> None:
        if ctypes.CDLL(None).unshare(NEW_MOUNTS):
            raise OSError("cannot have mounts of its own")
        as_root("mount", "--make-rprivate", "/")
        as_root("mount", "-t", "tmpfs", "-o", f"size={kibibytes}k", "tmpfs", SHARED_MEMORY)

    run = stage.start(stage.experiment(name, **KEYS, **NEVER, nworkers=2, loader_timeout=20), trap=trap)
    if lost:
        _until(lambda: last_step(run_dir) >= 4, run)
        as_root("nsenter", "-t", str(run.pids[0]), "-m", "mount", "-t", "tmpfs", "-o", "ro", "tmpfs", SHARED_MEMORY)
    return _judge(run, run_dir, "shared memory", saved=lost)


def unwritable(stage: Stage) -> str:
    """A file stands where the run's folder is to be."""
    (stage.folder / "runs").mkdir(exist_ok=True)
    stage.run_dir("file").write_text("not a folder")
    run = stage.start(stage.experiment("file", **KEYS))
    return _judge(run, stage.run_dir("file"), f"{stage.run_dir('file')} is a file", saved=False)


FAULTS: dict[str, Callable[[Stage], str]] = {
    "full disk": full_disk, "quota": quota, "limit on the size of files": file_limit,
    "disk that turns read-only": read_only_disk, "locked folder": locked_folder, "vanished folder": vanished_folder,
    "a file where the folder should be": unwritable,
    "shared memory of 64 KiB": partial(shared_memory, kibibytes=64),
    "shared memory that is lost": partial(shared_memory, kibibytes=2**16, lost=True),
    "killed worker": partial(killed_worker, ranks=1), "killed worker of one of two": partial(killed_worker, ranks=2),
    "stopped worker": partial(stopped_worker, ranks=1),
    "stopped worker of one of two": partial(stopped_worker, ranks=2),
}


def campaign(only: Sequence[str]) -> int:
    """Prints a line for every fault."""
    wrong = 0
    with tempfile.TemporaryDirectory() as name:
        stage = Stage(Path(name))
        for fault, make in ((name, FAULTS[name]) for name in only or FAULTS):
            try:
                outcome = make(stage)
            except OSError as error:
                outcome = f"skipped: {error}"
                stage.end_all()
            wrong += outcome.startswith("WRONG")
            print(f"{fault}: {outcome}", flush=True)
    return int(bool(wrong))


main = Command(__doc__, campaign, {
    "--only": dict(nargs="+", default=(), choices=tuple(FAULTS), metavar="FAULT", help="these: " + ", ".join(FAULTS)),
})

if __name__ == "__main__":
    sys.exit(main())
