"""Counting images in worker processes while the caller goes on, in bounded memory."""

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager

import numpy as np
from tqdm import tqdm

from evaluation.boundary.matching import pick_backend
from evaluation.boundary.scores import BoundaryTotals

WAITING_PER_WORKER = 2


class CountingPool(AbstractContextManager):
    """Runs functions that return an image's counts, and adds the counts up; a context manager.

    At most `WAITING_PER_WORKER` images per worker wait, so memory does not grow with the set and a caller that is
    faster than the workers is slowed down. `workers` 0 counts in the calling process. Workers are started by a server
    process without threads: a fork of a process that uses CUDA or OpenMP may hang. They end with the calling process,
    however that ends.
    """

    def __init__(self, totals: BoundaryTotals, workers: int):
        if workers < 0:
            raise ValueError(f"the number of boundary workers must not be negative, got {workers}")
        self.totals, self.workers = totals, workers
        self._pending: set[Future] = set()
        self._executor: ProcessPoolExecutor | None = None
        pick_backend()                                     # compiles here, once, and not in every worker

    def __exit__(self, *_: object) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)    # what runs takes a second; the rest is dropped

    def submit(self, function: Callable[..., np.ndarray], *arguments: object) -> int:
        """Adds `function(*arguments)`, counts (K, 4), to the totals, soon. Returns how many images were added by now.

        Function and arguments must be picklable. An error of an earlier image is raised here or in `finish`.
        """
        if not self.workers:
            self.totals.add(function(*arguments))
            return 1
        if self._executor is None:
            self._executor = ProcessPoolExecutor(self.workers, _context(), initializer=_start_worker)
        try:
            self._pending.add(self._executor.submit(function, *arguments))
        except BrokenProcessPool:
            raise _dead_worker() from None
        done = 0
        while len(self._pending) > WAITING_PER_WORKER * self.workers:
            done += self._collect()
        return done

    def __len__(self) -> int:
        """Number of images that are not counted yet."""
        return len(self._pending)

    def finish(self, bar: tqdm | None = None) -> BoundaryTotals:
        """Waits for everything submitted; `bar` is advanced by one per image."""
        while self._pending:
            done = self._collect()
            if bar is not None:
                bar.update(done)
        return self.totals

    def _collect(self) -> int:
        """Waits until some images are done and adds their counts; returns how many."""
        done, self._pending = wait(self._pending, return_when=FIRST_COMPLETED)
        for future in done:
            try:
                self.totals.add(future.result())
            except BrokenProcessPool:
                raise _dead_worker() from None
        return len(done)


def default_workers(processes: int = 1) -> int:
    """Worker processes for each of `processes` ranks on this machine: its cores, at most 8 each."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cores // processes))


def _context() -> multiprocessing.context.BaseContext:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "evaluation.boundary.protocol"])
    return context


def _start_worker() -> None:
    """Ctrl-C is for the calling process, which then stops the workers; they also end when it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.getLogger("evaluation.boundary").setLevel(logging.ERROR)   # the caller has given the warnings already
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _dead_worker() -> ChildProcessError:
    return ChildProcessError("a worker of the boundary score ended unexpectedly (killed for want of memory?); "
                             "use fewer workers")
