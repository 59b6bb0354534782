"""The processes that read and prepare samples: they end when the run ends them, and at nobody else's word.

A terminal, `timeout` and schedulers send signals to every process of a group. A worker that obeyed would be missing
before the run has saved; one that ignored them could not be ended by the run either, which waits for its workers when
it leaves. So a worker ends on a SIGTERM of its own parent alone.
"""

import atexit
import gc
import multiprocessing
import os
import shutil
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.utils.data import DataLoader, Dataset, default_collate

from data.lending import LentMemory, Sender
from utils.exits import end_children, one_sentence

FOR_THE_PARENT = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
                       if hasattr(signal, name))
CAN_TELL_THE_SENDER = hasattr(signal, "sigwaitinfo")      # not on macOS and Windows: there a worker obeys everyone


SHARED_MEMORY = Path("/dev/shm")        # where workers hand batches over, on Linux
GRACE_S = 5.0                           # PyTorch's time-out is to come first
WATCH_S = 5.0                           # between two looks for the parent
SCARCE = 128 * 2**20                    # bytes free there that may be too few for a batch


class WorkerLost(ChildProcessError):
    """A worker ended unexpectedly."""


class Loader(DataLoader):
    """A DataLoader whose workers obey the process that started them alone, and whose loss is a `WorkerLost`.

    PyTorch raises the loss of a worker in the middle of whatever the main thread is doing, by a SIGCHLD handler.
    Without it the loss is noticed where the batch is missing, within five seconds.

    Workers stay from one iteration to the next, and lend the memory of their batches (`data.lending`). They end with
    `close`, or with the loader, whichever comes first. PyTorch ends them when the iterator is collected; of what is
    collected together with it, as it is out of a cycle of references, its queues may be the first: then no worker hears
    of the end, and each costs five seconds.
    """

    _end: weakref.finalize | None = None

    def __init__(self, dataset: Dataset, collate_fn: Callable[[list], Any] = default_collate, num_workers: int = 0,
                 worker_init_fn: Callable[[int], None] | None = None, **kwargs: Any):
        super().__init__(dataset, collate_fn=collate_fn, num_workers=num_workers, persistent_workers=num_workers > 0,
                         worker_init_fn=_Start(worker_init_fn), **kwargs)
        self._collate = collate_fn

    def close(self) -> None:
        """Ends the workers; another iteration starts new ones."""
        if self._end is not None:
            self._end()
        self._iterator = None

    def __iter__(self) -> Iterator[Any]:
        if not self.num_workers:
            return super().__iter__()
        if self._iterator is None:                        # new workers, which know nothing of the memory of others
            self.collate_fn = Sender(self._collate, LentMemory(self.num_workers))
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
        if self._end is None or not self._end.alive:
            self._end = weakref.finalize(self, _end_workers, batches, os.getpid())
            atexit.register(self._end)                    # before PyTorch's own, which wait for each worker
        return _watched(batches, self)


def _end_workers(batches: Any, owner: int) -> None:
    if os.getpid() == owner:            # not in a worker, which inherits the loaders that were there when it was forked
        batches._shutdown_workers()


@dataclass(frozen=True)
class _Start:
    """What a worker does first: without it nobody could end one that is busy with a sample."""

    then: Callable[[int], None] | None

    def __call__(self, worker_id: int) -> None:
        gc.freeze()                     # what a fork inherits is its parent's to collect, other loaders' queues too
        obey_the_parent()
        if self.then is not None:
            self.then(worker_id)


def obey_the_parent() -> None:
    """In a worker of `Loader`: a thread takes the signals and ends the process where its parent sent a SIGTERM.

    Or is gone: PyTorch looks for the parent, too, but takes whoever that is once the worker has started for it.
    """
    if CAN_TELL_THE_SENDER:
        signal.pthread_sigmask(signal.SIG_BLOCK, FOR_THE_PARENT)
        run = multiprocessing.parent_process()              # not the server that forked this process, if any
        parent = os.getppid() if run is None else run.pid
        threading.Thread(target=_listen, args=(parent,), daemon=True).start()


def _listen(parent: int) -> None:
    while True:
        received = signal.sigtimedwait(FOR_THE_PARENT, WATCH_S)
        if received is None:
            if not _exists(parent):
                os._exit(0)
        elif received.si_signo == signal.SIGTERM and received.si_pid == parent:
            os._exit(0)


def _exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, PermissionError):       # nobody's, or somebody else's by now
        return False
    return True


class _Patience:
    """Ends the workers where the run waits for a batch much longer than PyTorch's own time-out, 0: never.

    That one covers a worker that sends nothing, not one that stops while it hands over what it has sent. A context
    manager around each wait.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self.over = seconds, False
        self._since: float | None = None
        self._closed = threading.Event()
        if seconds:
            threading.Thread(target=self._watch, name="patience", daemon=True).start()

    def __enter__(self) -> None:
        self._since = time.monotonic()

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._since = None

    def close(self) -> None:
        """The thread ends within a second."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(1.0):
            since = self._since
            if since is not None and time.monotonic() - since > self.seconds + GRACE_S:
                self.over = True
                end_children()
                return


def _watched(batches: Iterator[Any], loader: Loader) -> Iterator[Any]:
    """The batches; as long as they are asked for, the loader is there, and with it its workers."""
    seconds = loader.timeout
    patience = _Patience(seconds)
    try:
        while True:
            try:
                with patience:
                    batch = next(batches)
            except StopIteration:
                return
            except Exception as error:
                raise _explained(error, "DataLoader timed out" in str(error) or patience.over, seconds) from error
            yield batch
    finally:
        patience.close()


def _explained(error: Exception, too_long: bool, seconds: float) -> Exception:
    """In the words of who runs a training, where the error is one of the workers; else the error itself."""
    words = str(error)
    if too_long:
        return TimeoutError(f"the data loader's workers have delivered no batch for {seconds:g} s (loader_timeout): "
                            "does the file system with the data answer?")
    if isinstance(error, (ConnectionError, EOFError)):      # it is missed while it is asked for a batch
        return _lost()
    if any(part in words for part in ("No space left on device", "shared memory", "</torch_")):     # its names there
        return OSError(f"the data loader's workers cannot hand a batch over: {_shared_memory(one_sentence(error))}")
    if "DataLoader worker" in words and "exited unexpectedly" in words:
        return _lost()
    return error


def _lost() -> WorkerLost:
    why = _shared_memory("") if _free() < SCARCE else "most often for want of memory: use a smaller nworkers"
    return WorkerLost(f"a data loader worker was ended from outside, {why}")


def _free() -> float:
    return shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else float("inf")


def _shared_memory(words: str) -> str:
    if _free() >= SCARCE:
        return f"shared memory ({SHARED_MEMORY}) cannot be used ({words}); mount it anew, or use nworkers=0"
    return (f"shared memory is short ({_free() / 2**20:.0f} MiB free in {SHARED_MEMORY}): give the container more "
            "(docker run --shm-size=8g), or use a smaller nworkers, or 0")
