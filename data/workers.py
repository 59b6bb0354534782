"""The processes that read and prepare samples: they end when the run ends them, and at nobody else's word.

A terminal, `timeout` and schedulers send signals to every process of a group. A worker that obeyed would be missing
before the run has saved; one that ignored them could not be ended by the run either, which waits for its workers when
it leaves. So a worker ends on a SIGTERM of its own parent alone.
"""

import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader

FOR_THE_PARENT = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
                       if hasattr(signal, name))
CAN_TELL_THE_SENDER = hasattr(signal, "sigwaitinfo")      # not on macOS and Windows: there a worker obeys everyone


SHARED_MEMORY = Path("/dev/shm")        # where workers hand batches over, on Linux
SCARCE = 128 * 2**20                    # bytes free there that may be too few for a batch


class WorkerLost(ChildProcessError):
    """A worker ended unexpectedly."""


class Loader(DataLoader):
    """A DataLoader whose workers hear of signals by `obey_the_parent` alone, and whose loss is a `WorkerLost`.

    PyTorch raises the loss of a worker in the middle of whatever the main thread is doing, by a SIGCHLD handler.
    Without it the loss is noticed where the batch is missing, within five seconds.
    """

    def __iter__(self) -> Iterator[Any]:
        if not self.num_workers:
            return super().__iter__()
        in_main = threading.current_thread() is threading.main_thread()
        child_handler = signal.getsignal(signal.SIGCHLD) if in_main and hasattr(signal, "SIGCHLD") else None
        before = signal.pthread_sigmask(signal.SIG_BLOCK, FOR_THE_PARENT) if CAN_TELL_THE_SENDER else None
        try:
            batches = super().__iter__()                  # a worker starts with these signals blocked
        finally:
            if before is not None:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if child_handler is not None:
            signal.signal(signal.SIGCHLD, child_handler)
        return _watched(batches)


def obey_the_parent() -> None:
    """In a worker of `Loader`: a thread takes the signals and ends the process where its parent sent a SIGTERM."""
    if CAN_TELL_THE_SENDER:
        signal.pthread_sigmask(signal.SIG_BLOCK, FOR_THE_PARENT)
        run = multiprocessing.parent_process()              # not the server that forked this process, if any
        parent = os.getppid() if run is None else run.pid
        threading.Thread(target=_listen, args=(parent,), daemon=True).start()


def _listen(parent: int) -> None:
    while True:
        received = signal.sigwaitinfo(FOR_THE_PARENT)
        if received.si_signo == signal.SIGTERM and received.si_pid == parent:
            os._exit(0)


def _watched(batches: Iterator[Any]) -> Iterator[Any]:
    try:
        yield from batches
    except (ConnectionError, EOFError) as error:            # it is missed while it is asked for a batch
        raise _lost() from error
    except RuntimeError as error:
        words = str(error)
        if "DataLoader timed out" in words:
            seconds = words.split("after ")[-1].split(" ")[0]
            raise TimeoutError(f"the data loader's workers have delivered no batch for {seconds} s (loader_timeout): "
                               "does the file system with the data answer?") from error
        if "No space left on device" in words or "allocate shared memory" in words:
            raise OSError(f"the data loader's workers cannot hand a batch over: {_shared_memory()}") from error
        if "DataLoader worker" not in words or "exited unexpectedly" not in words:
            raise
        raise _lost() from error


def _lost() -> WorkerLost:
    why = _shared_memory() if _free() < SCARCE else "most often for want of memory: use a smaller nworkers"
    return WorkerLost(f"a data loader worker was ended from outside, {why}")


def _free() -> float:
    return shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else float("inf")


def _shared_memory() -> str:
    return (f"shared memory is short ({_free() / 2**20:.0f} MiB free in {SHARED_MEMORY}): give the container more "
            "(docker run --shm-size=8g), or use a smaller nworkers, or 0")
