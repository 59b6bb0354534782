"""Work in three steps: things are read ahead by threads, computed with in batches, and finished behind by threads.

The steps spend their time in libraries that let other threads run (decoders, networks, encoders), so the whole takes
about as long as its slowest step. What is under way is bounded, by number and by cost.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

Item = TypeVar("Item")
Read = TypeVar("Read")
Result = TypeVar("Result")


class Done(NamedTuple):
    """An item and what became of it: its result, or the error that kept it from being read."""

    item: Any
    result: Any
    error: Exception | None


class _Started(NamedTuple):
    item: Any
    future: Future
    cost: float


def pipelined(items: Iterable[Item], read: Callable[[Item], Read], compute: Callable[[Sequence[Read]], Sequence[Any]],
              finish: Callable[[Item, Read, Any], Result], *, batch: int = 1, workers: int = 1,
              cost: Callable[[Item], float] = lambda item: 1, most: float = float("inf"),
              ) -> Iterator[Done]:
    """`finish(item, x, y)` of every item in their order, where x is `read(item)` and y what `compute` makes of it.

    read, finish: run by `workers` threads, for several items at a time. compute: in the caller's thread, a list of at
    most `batch` x -> a list of y. A ValueError, OSError or MemoryError of `read` is the item's own, and reported with
    it; every other error ends the whole. most: of the summed cost of what is under way; one item alone may cost more.
    """
    source, reading, finishing = iter(items), deque(), deque()
    following, under_way = next(source, source), 0.0                 # the iterator itself stands for its end
    pool = ThreadPoolExecutor(workers, thread_name_prefix="pipeline")
    try:
        while following is not source or reading or finishing:
            while following is not source and len(reading) < batch + workers:
                price = cost(following)
                if under_way and under_way + price > most:
                    break
                reading.append(_Started(following, pool.submit(read, following), price))
                under_way, following = under_way + price, next(source, source)
            taken = [reading.popleft() for _ in range(min(batch, len(reading)))]
            for started, outcome in _computed(taken, compute):
                future = pool.submit(finish, started.item, *outcome) if isinstance(outcome, tuple) else outcome
                finishing.append(_Started(started.item, future, started.cost))
            while finishing and (not reading or len(finishing) > workers or _settled(finishing[0].future)):
                item, future, price = finishing.popleft()
                under_way -= price
                yield Done(item, None, future) if isinstance(future, Exception) else Done(item, future.result(), None)
    finally:
        pool.shutdown(cancel_futures=True)


def _settled(future: Future | Exception) -> bool:
    return isinstance(future, Exception) or future.done()


def _computed(taken: Sequence[_Started], compute: Callable[[Sequence[Any]], Sequence[Any]]) -> list[tuple]:
    """(started, (x, y)) or (started, error) for each."""
    read = []
    for started in taken:
        try:
            read.append((started, started.future.result()))
        except (ValueError, OSError, MemoryError) as error:
            read.append((started, error))
    good = [x for _, x in read if not isinstance(x, Exception)]
    answers = iter(compute(good) if good else ())
    return [(started, x if isinstance(x, Exception) else (x, next(answers))) for started, x in read]
