"""The processes that read and prepare samples: they end when the run ends them, and at nobody else's word.

A terminal, `timeout` and schedulers send signals to every process of a group. A worker that obeyed would be missing
before the run has saved; one that ignored them could not be ended by the run either, which waits for its workers when
it leaves. So a worker ends on a SIGTERM of its own parent alone.
"""

import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

FOR_THE_PARENT = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
                       if hasattr(signal, name))
CAN_TELL_THE_SENDER = hasattr(signal, "sigwaitinfo")      # not on macOS and Windows: there a worker obeys everyone


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
        threading.Thread(target=_listen, args=(os.getppid(),), daemon=True).start()


def _listen(parent: int) -> None:
    while True:
        received = signal.sigwaitinfo(FOR_THE_PARENT)
        if received.si_signo == signal.SIGTERM and received.si_pid == parent:
            os._exit(0)


def _watched(batches: Iterator[Any]) -> Iterator[Any]:
    try:
        yield from batches
    except RuntimeError as error:
        if "DataLoader worker" not in str(error) or "exited unexpectedly" not in str(error):
            raise
        raise WorkerLost("a data loader worker was ended from outside, most often for want of memory: use a smaller "
                         "nworkers or more memory") from error
