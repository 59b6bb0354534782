"""Workers of a loader end with it, whatever it is collected with, and with the process that started them."""

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data.workers import Loader

ROOT = Path(__file__).resolve().parents[1]


def cycle_of(workers: int) -> list:
    """A loader, what it gives, and the list itself: only the garbage collector can end this."""
    loader = Loader(list(range(8)), num_workers=workers)
    batches = iter(loader)
    next(batches)
    cycle = [batches, loader, loader._iterator]
    cycle.append(cycle)
    return cycle


def test_workers_end_with_a_loader_that_is_garbage():
    gc.disable()                                    # until it is asked for
    try:
        cycle = cycle_of(2)
        workers = cycle[2]._workers
        assert all(worker.is_alive() for worker in workers)
        start = time.monotonic()
        del cycle
        gc.collect()
        assert time.monotonic() - start < 8         # PyTorch waits five seconds for each that does not hear
    finally:
        gc.enable()
    assert [worker.exitcode for worker in workers] == [0, 0]


BUSY = """
import time
from data.workers import Loader

class Busy(list):
    def __getitem__(self, index):
        time.sleep(1000 * index)                    # of the second sample a worker knows no end
        return index

loader = Loader(Busy(range(4)), num_workers=1)
batches = iter(loader)
print(int(next(batches)), flush=True)
"""


def test_a_busy_worker_ends_with_the_process():
    """No more has to be known of a Loader than of PyTorch's own."""
    run = subprocess.run([sys.executable, "-c", BUSY], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (run.returncode, run.stdout) == (0, "0\n"), run.stderr


def test_a_closed_loader_starts_again():
    loader = Loader(list(range(4)), num_workers=1)
    first = [int(batch) for batch in loader]
    loader.close()
    assert not multiprocessing.active_children()
    assert [int(batch) for batch in loader] == first == [0, 1, 2, 3]
    loader.close()


ORPHANS = """
import gc, sys, time
from tests.test_workers import cycle_of
if __name__ == "__main__":
    gc.disable()
    garbage = cycle_of(1)
    del garbage
    cycle = cycle_of(2)                             # whose workers inherit the first loader, which they may not end
    print(*(worker.pid for worker in cycle[2]._workers), flush=True)
    time.sleep(60)
"""
STARTING = """
import time
from data.workers import Loader
loader = Loader(range(8), num_workers=2, worker_init_fn=lambda number: time.sleep(2))
batches = iter(loader)
print(*(worker.pid for worker in loader._iterator._workers), flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
@pytest.mark.parametrize("program", [ORPHANS, STARTING], ids=["at work", "starting"])
def test_workers_do_not_outlive_a_killed_process(program):
    run = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    workers = [int(pid) for pid in run.stdout.readline().split()]
    assert len(workers) == 2
    run.kill()
    run.wait()
    until = time.monotonic() + 30                   # they look for their parent every five seconds
    while alive := [pid for pid in workers if _alive(pid)]:
        assert time.monotonic() < until, f"{alive} are still there"
        time.sleep(0.1)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
