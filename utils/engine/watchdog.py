"""Notices a run that hangs: every process writes down where its threads stand when an update takes far too long.

A hung process of many says nothing by itself, and the others wait for it without a word. The stacks of all of them show
which one it is and where: in the data loader, in a reduction, in a file system.
"""

import faulthandler
import logging
import statistics
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils import distributed

logger = logging.getLogger(__name__)

LEAST_SECONDS = 60.0        # shorter updates are no hang, however fast the others are
ENOUGH = 5                  # updates to know a median from
REMEMBERED = 101


class Watchdog:
    """A thread that compares the time since the last `beat` with the median between beats. A context manager.

    folder: receives rank_N.txt, appended. factor: of the median; 0 never looks.
    """

    def __init__(self, folder: Path, factor: float, least_seconds: float = LEAST_SECONDS) -> None:
        self.folder, self.factor, self.least = folder, factor, least_seconds
        self.times: deque[float] = deque(maxlen=REMEMBERED)
        self.last: float | None = None          # of the last beat; None while nothing is expected
        self.told = 1.0                         # how much more patient it has become with this update
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self.factor:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self.factor:
            self._thread.join()

    def beat(self) -> None:
        """An update has been made."""
        now = time.monotonic()
        if self.last is not None:
            self.times.append(now - self.last)
        self.last, self.told = now, 1.0

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Around what is no update: evaluations take as long as they take."""
        self.last = None
        yield
        self.last = time.monotonic()

    @property
    def limit(self) -> float | None:
        """Seconds that the next update may take; None before there is a median."""
        if len(self.times) < ENOUGH:
            return None
        return max(self.factor * statistics.median(self.times), self.least)

    def _watch(self) -> None:
        while not self._end.wait(min(1.0, self.least / 4)):
            last, limit = self.last, self.limit
            if last is not None and limit is not None and time.monotonic() - last > limit * self.told:
                self.told *= 4
                self._write(time.monotonic() - last)

    def _write(self, seconds: float) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / f"rank_{distributed.rank()}.txt").open("a", encoding="utf-8") as file:
                file.write(f"\n{time.strftime('%Y-%m-%d %H:%M:%S')}: an update takes {seconds:.0f} s\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            logger.warning("an update takes %.0f s, and the stacks cannot be written: %s", seconds, error)
            return
        logger.warning("an update takes %.0f s, more than %g times the median of %.2f s; where every process stands is "
                       "written into %s", seconds, self.factor, statistics.median(self.times), self.folder)
