"""How far a long piece of work is: a bar on a terminal, a line now and then elsewhere; both say what time is left."""

import logging
import sys
import time

from tqdm import tqdm

from utils.logging import duration

logger = logging.getLogger(__name__)

EVERY = 30.0                # seconds between two lines


class Progress:
    """A context manager; `step` after each of `total` pieces (None: their number is not known)."""

    def __init__(self, total: int | None, what: str, unit: str, wanted: bool = True) -> None:
        self.total, self.what, self.unit, self.done = total, what, unit, 0
        self.lines = wanted and not sys.stderr.isatty()
        self.began = self.told = time.monotonic()
        self._bar = tqdm(total=total, desc=what, unit=unit, leave=False, disable=not wanted or self.lines)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()

    def step(self) -> None:
        """One more is done."""
        self.done += 1
        self._bar.update()
        now = time.monotonic()
        if self.lines and now - self.told >= EVERY:
            self.told = now
            logger.info("%s", self.line(now - self.began))

    def line(self, seconds: float) -> str:
        """How far it is after so many seconds."""
        rate = self.done / max(seconds, 1e-9)
        left = "" if self.total is None else f", {duration((self.total - self.done) / rate)} left"
        of = "" if self.total is None else f" of {self.total}"
        return f"{self.what}: {self.done}{of} {self.unit}s, {rate:.2g} {self.unit}s/s{left}"
