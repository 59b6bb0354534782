"""Signals: what asks a run to leave, what that does to its workers, and how processes agree."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from data.workers import Loader, WorkerLost
from tests.processes import on_ranks
from tests.shared import ROOT
from utils import distributed
from utils.engine.leaving import GOING_ON, LEAVE, SAVE, SIGNALS, Agreement, Departure
from utils.exits import BY_SIGNAL, CONTINUE


def wait_for(condition, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_a_request_and_the_handlers_come_back(number):
    before = signal.getsignal(number)
    with Departure() as departure:
        departure.something_to_lose = True
        assert not departure.asked
        os.kill(os.getpid(), number)
        assert departure.wait(10) and departure.reason == number.name
        os.kill(os.getpid(), number)                    # at once after it: the same request, sent twice
        time.sleep(0.05)
    assert signal.getsignal(number) == before


def test_a_request_interrupts_what_may_be_interrupted():
    with Departure() as departure:
        departure.something_to_lose = True

        def leave():
            raise KeyboardInterrupt("left")

        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt, match="left"), departure.at_once(leave):
            time.sleep(30)
        assert time.monotonic() - start < 10 and departure.asked
        with pytest.raises(KeyboardInterrupt, match="left"), departure.at_once(leave):
            pass                                            # asked before


def script(code: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                            start_new_session=True)


SECOND = """
import signal, time
from utils.engine import leaving
leaving.SAME_REQUEST_S = 0.2
with leaving.Departure() as departure:
    departure.something_to_lose = True
    print("ready", flush=True)
    departure.wait(60)
    print("asked", flush=True)
    import torch
    while True:
        time.sleep(0.01)        # deaf: nothing looks at the request any more
"""


def test_the_second_signal_ends_the_process_at_once():
    process = script(SECOND)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "asked\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == BY_SIGNAL + signal.SIGTERM


EARLY = """
import torch
from utils.engine.leaving import Departure
with Departure():
    print("ready", flush=True)
    torch.distributed.TCPStore("127.0.0.1", 1, is_master=False)       # waits for what never comes
"""


def test_a_signal_ends_a_process_that_has_nothing_to_save_yet():
    process = script(EARLY)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == CONTINUE


NOHUP = """
import os, signal
from utils.engine.leaving import Departure
signal.signal(signal.SIGHUP, signal.SIG_IGN)
with Departure() as departure:
    os.kill(os.getpid(), signal.SIGHUP)
    print(departure.wait(0.5), signal.getsignal(signal.SIGHUP) == signal.SIG_IGN)
child = os.fork()
"""


def test_nohup_is_respected():
    assert script(NOHUP).communicate(timeout=60)[0].startswith("False True")


def test_a_forked_child_has_the_default_handlers():
    with Departure() as departure:
        child = os.fork()
        if child == 0:
            time.sleep(30)
            os._exit(0)
        time.sleep(0.1)
        os.kill(child, signal.SIGTERM)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM and not departure.wait(0.2)


# ------------------------------------------------------------ workers


class Numbers(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> int:
        time.sleep(0.01)
        return index


def loader() -> Loader:
    return Loader(Numbers(), batch_size=2, num_workers=2)


def workers_of(numbers: Loader) -> list:
    return numbers._iterator._workers if numbers._iterator else []


def test_workers_live_through_the_signals_of_a_group_and_end_with_their_loader():
    import multiprocessing
    batches = iter(loader())
    next(batches)
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    for number in SIGNALS:
        for worker in workers:
            sender = subprocess.run(["kill", f"-{number.value}", str(worker.pid)], check=True)
            assert sender.returncode == 0
    assert [next(batches)[0].item() for _ in range(20)] == [2 * i for i in range(1, 21)]
    start = time.monotonic()
    batches.close()
    del batches
    wait_for(lambda: not any(worker.is_alive() for worker in workers), 15)
    assert time.monotonic() - start < 15


def test_the_parent_may_end_a_worker():
    import multiprocessing
    batches = iter(loader())
    next(batches)
    [first, _] = multiprocessing.active_children()
    first.terminate()
    wait_for(lambda: not first.is_alive())
    with pytest.raises(WorkerLost, match="a data loader worker was ended from outside"):
        list(batches)


def test_a_killed_worker_is_noticed_where_its_batch_is_missing():
    import multiprocessing
    batches = iter(loader())
    next(batches)
    before = signal.getsignal(signal.SIGCHLD)
    multiprocessing.active_children()[0].kill()
    time.sleep(0.3)                                         # no error here, in the middle of something else
    with pytest.raises(WorkerLost, match="want of memory"):
        list(batches)
    assert signal.getsignal(signal.SIGCHLD) == before


# ------------------------------------------------------------ several processes


def _agreeing(rank: int, folder: Path) -> None:
    """Rank 1 wishes something after its 50th update, at which rank 0 wishes less; both write down when they heard."""
    update = 0
    with distributed.process_group(torch.device("cpu")):
        agreement = Agreement(lambda: (LEAVE if rank else SAVE) if update >= 50 else GOING_ON)
        heard = GOING_ON
        while heard < LEAVE:
            agreement.announce()
            time.sleep(0.004 * (1 + rank))
            update += 1
            heard = agreement.result()
        (folder / str(rank)).write_text(f"{update} {agreement.gather(rank)}")


def test_processes_leave_after_the_same_update(tmp_path):
    on_ranks(_agreeing, 2, tmp_path)
    words = (tmp_path / "0").read_text()
    assert words == (tmp_path / "1").read_text() and words.endswith("[0, 1]")
    assert 50 < int(words.split()[0]) <= 53
