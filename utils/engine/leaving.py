"""Leaving on request: which signals ask for it, and how all processes of a run come to leave after the same update.

The first signal asks the run to finish its update, save and leave; a second one ends the process at once. A terminal, a
scheduler and torchrun's agent often send one request several times, to the group and to each process, so what follows
within `SAME_REQUEST_S` is the same request.
"""

import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist

from utils import distributed
from utils.exits import BY_SIGNAL, CONTINUE, end_at_once, end_children

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
                if hasattr(signal, name))
SAME_REQUEST_S = 1.0                # between two signals of one request
SAME_REQUEST_LAUNCHED_S = 5.0       # the same under a launcher, which hands them on
GOING_ON, SAVE, LEAVE, BREAK = range(4)     # what a process wishes; the greatest wish of all is what all do


class Departure:
    """Whether this process has been asked to leave. A context manager; signals are caught while it is open.

    Python's own handlers run in the main thread, which may be waiting for another process inside a library: a thread
    reads the signals' numbers, so that a second one always ends the process. Under a launcher, the launcher's death is
    a request to leave, too: nobody else would end this process.

    Until `something_to_lose` a request ends the process at once: it may be waiting for one that never comes.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.something_to_lose = False
        self._asked = threading.Event()
        self._at_once: Callable[[], None] | None = None
        self._first = 0.0
        self._launcher = os.getppid() if distributed.launched() else None
        self._same = SAME_REQUEST_S if self._launcher is None else SAME_REQUEST_LAUNCHED_S
        self._handlers: dict[int, object] = {}

    def __enter__(self) -> "Departure":
        global _open
        if threading.current_thread() is not threading.main_thread():
            return self                                       # signals are handled where they can be
        self._read, self._write = socket.socketpair()
        self._write.setblocking(False)
        # nohup and its like have SIGHUP ignored, which stays so.
        caught = [s for s in SIGNALS if s == signal.SIGINT or signal.getsignal(s) != signal.SIG_IGN]
        self._wakeup = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        self._handlers = {number: signal.signal(number, self._in_main) for number in caught}
        self._thread = threading.Thread(target=self._watch, name="departure", daemon=True)
        self._thread.start()
        _open = self
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        global _open
        if not self._handlers:
            return
        _open = None
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._write.send(b"\0")                               # ends the thread
        self._thread.join()
        self._read.close()
        self._write.close()

    @property
    def asked(self) -> bool:
        """Whether to leave."""
        return self._asked.is_set()

    def wait(self, seconds: float) -> bool:
        """Waits for a request; whether there is one."""
        return self._asked.wait(seconds)

    def request(self, reason: str) -> None:
        """Asks this process to leave."""
        self.reason, self._first = reason, time.monotonic()
        self._asked.set()
        if not self.something_to_lose:
            end_at_once(CONTINUE)

    @contextmanager
    def at_once(self, leave: Callable[[], None]) -> Iterator[None]:
        """While it is open a request calls `leave` in the main thread, which raises, whatever is running there."""
        if self.asked:
            leave()
        self._at_once = leave
        try:
            yield
        finally:
            self._at_once = None

    def _in_main(self, number: int, frame: object) -> None:
        """Python's handler of the signals. The thread hears of them without it, but something has to stand here."""
        if self._at_once is not None:
            leave, self._at_once = self._at_once, None
            if not self.asked:
                self.request(signal.Signals(number).name)
            leave()

    def forget(self) -> None:
        """In a child that was forked: its signals are its own."""
        signal.set_wakeup_fd(-1)
        for number in self._handlers:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)

    def _watch(self) -> None:
        while True:
            ready, _, _ = select.select([self._read], [], [], 1.0)
            for number in self._read.recv(64) if ready else b"":
                if number == 0:
                    return
                if number in self._handlers:
                    self._received(number)
            if self._launcher is not None and os.getppid() != self._launcher and not self.asked:
                self.request("its launcher ended")
                os.kill(os.getpid(), signal.SIGUSR1)          # for `at_once`

    def _received(self, number: int) -> None:
        if not self.asked:
            self.request(signal.Signals(number).name)
        elif time.monotonic() - self._first > self._same:
            end_children()
            os._exit(BY_SIGNAL + number)


class Agreement:
    """All processes act on the same wish after the same update.

    Each announces its wish at the beginning of an update, and reads the greatest of all at the end: the reduction runs
    beside the update, so a wish is acted on at most two updates later. A process alone acts at once. At every update,
    because a process that cannot read the batches of the next one has only this one left to say so.
    """

    def __init__(self, wish: Callable[[], int]) -> None:
        self.wish = wish
        self._group = dist.new_group(backend="gloo", timeout=distributed.TIMEOUT) if dist.is_initialized() else None

    def announce(self) -> None:
        """Begins to tell the others."""
        if self._group is not None:
            self._value = torch.tensor([self.wish()], dtype=torch.int32)
            self._work = dist.all_reduce(self._value, dist.ReduceOp.MAX, group=self._group, async_op=True)

    def result(self) -> int:
        """The greatest wish that was announced."""
        if self._group is None:
            return self.wish()
        self._work.wait()
        return int(self._value.item())

    def gather(self, item: Any) -> list[Any]:
        """One picklable object of every process, in rank order, on every process; the device is not waited for."""
        return distributed.gather_objects(item, self._group)

    def meet(self) -> None:
        """Waits for all processes, on the host."""
        if self._group is not None:
            dist.barrier(group=self._group)


_open: Departure | None = None


def _forget_in_child() -> None:
    global _open
    if _open is not None:
        _open.forget()
        _open = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
