"""The batches of one update after the other, read one update ahead."""

from collections.abc import Iterator, Mapping
from itertools import islice


class BatchesAhead:
    """The batches of the next update are read before this one is made.

    So that a process that cannot read on can say so while there is a whole update to save after it; the error is raised
    where the batches are missing.
    """

    def __init__(self, batches: Iterator[Mapping], per_update: int) -> None:
        self._batches, self._per_update = batches, per_update
        self._ready: list[Mapping] = []
        self._error: Exception | None = None

    @property
    def failed(self) -> bool:
        """Whether the next update cannot be made."""
        return self._error is not None

    def take(self, last: bool) -> list[Mapping]:
        """The batches of an update; unless it is the `last`, reads those of the next one."""
        if not self._ready:
            self._read()
        if self._error is not None:
            raise self._error
        ready, self._ready = self._ready, []
        if not last:
            self._read()
        return ready

    def _read(self) -> None:
        try:
            self._ready = list(islice(self._batches, self._per_update))
        except Exception as error:              # raised by `take`
            self._error = error
