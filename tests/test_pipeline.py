"""Three steps behind each other: order, batches, errors, and what is under way at most."""

import threading
import time

import pytest

from utils.engine.pipeline import pipelined


def run(items, batch=1, workers=2, read=lambda x: x, finish=lambda item, x, y: (item, x, y), **bounds):
    sizes = []

    def compute(xs):
        sizes.append(len(xs))
        return [10 * x for x in xs]

    return list(pipelined(items, read, compute, finish, batch=batch, workers=workers, **bounds)), sizes


@pytest.mark.parametrize(("batch", "workers"), [(1, 1), (1, 4), (3, 2), (20, 3)])
def test_results_come_in_order_in_batches(batch, workers):
    done, sizes = run(range(17), batch, workers, read=lambda x: time.sleep(0.002 * (x % 3)) or x + 1)
    assert [d.result for d in done] == [(i, i + 1, 10 * (i + 1)) for i in range(17)]
    assert all(d.error is None for d in done) and sum(sizes) == 17 and max(sizes) == min(batch, 17)
    assert run([])[0] == []


@pytest.mark.parametrize("error", [ValueError("bad"), FileNotFoundError("gone"), MemoryError()])
def test_what_cannot_be_read_costs_nothing_else(error):
    def read(x):
        if x in (0, 3, 4):
            raise error
        return x

    done, _ = run(range(6), batch=2, read=read)
    assert [d.item for d in done] == list(range(6))
    assert [d.error for d in done] == [error, None, None, error, error, None]
    assert [d.result and d.result[2] for d in done] == [None, 10, 20, None, None, 50]


def test_errors_of_the_other_steps_end_it():
    def fails(*arguments):
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        run(range(5), finish=fails)
    with pytest.raises(TypeError):                      # a fault of the program is no fault of a picture
        run(range(5), read=lambda x: x + "1")
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("pipeline")]


def test_what_is_under_way_is_bounded():
    now, highest = [], []
    lock = threading.Lock()

    def read(x):
        with lock:
            now.append(x)
            highest.append(sum(now))
        return x

    def finish(item, x, y):
        time.sleep(0.002)
        with lock:
            now.remove(x)

    weights = [3, 3, 3, 9, 1, 1, 12, 2]
    run(weights, batch=2, workers=3, read=read, finish=finish, cost=lambda x: x, most=10)
    assert max(highest) == 12 and highest[weights.index(12)] == 12          # alone, although it is more than the bound
    assert sorted(highest)[-2] <= 10


def test_items_are_taken_as_they_are_needed():
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield len(taken)

    steps = pipelined(endless(), lambda x: x, list, lambda item, x, y: x, batch=2, workers=2)
    assert [next(steps).result for _ in range(5)] == [1, 2, 3, 4, 5]
    assert len(taken) < 20
    steps.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("pipeline")]
