"""Saving while the training goes on: the state is copied to the host, a thread writes the copy."""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from utils.engine.checkpoint import check_plain
from utils.engine.manifest import write_checkpoint


class Saver:
    """Writes the checkpoints of one run, one at a time. Only rank 0 has one.

    before: called in the thread ahead of every checkpoint, to bring what the run has told so far to the disk.
    """

    def __init__(self, folder: Path, before: Callable[[], None]) -> None:
        self.folder, self.before = folder, before
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self.written = 0                # the step of the newest checkpoint that this run has on the disk

    def save(self, state: Mapping[str, Any], names: Sequence[str] = (), score: float | None = None) -> None:
        """Begins to write `state`, as last.pt and under these further names.

        Waits for the checkpoint before it, and for the copy. What went wrong with that one is raised here.
        """
        self.wait()
        check_plain(state, "state")
        copy = on_host(state)
        self._thread = threading.Thread(target=self._write, args=(copy, tuple(names), score), name="saver")
        self._thread.start()

    def wait(self) -> None:
        """Until everything is on the disk; raises what went wrong, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    @property
    def failed(self) -> bool:
        """Whether something went wrong that has not been raised yet."""
        return self._error is not None

    def _write(self, state: Mapping[str, Any], names: Sequence[str], score: float | None) -> None:
        try:
            self.before()
            write_checkpoint(self.folder, state, names, score)
            self.written = state["step"]
        except Exception as error:          # raised again in the run's own thread, by `wait`
            self._error = error


class Clock:
    """When the next checkpoint is due: `steps` updates or `minutes` after the one before, whichever comes first."""

    def __init__(self, steps: int, minutes: float, step: int) -> None:
        self.steps, self.seconds = steps, 60 * minutes
        self.restart(step)

    def restart(self, step: int) -> None:
        """A checkpoint of this step is being written."""
        self.step, self.start = step, time.monotonic()

    def due_by_steps(self, step: int) -> bool:
        """The same on every process."""
        return self.steps > 0 and step - self.step >= self.steps

    def due_by_time(self) -> bool:
        """On this process: the others have to be told."""
        return self.seconds > 0 and time.monotonic() - self.start >= self.seconds


def on_host(value: Any) -> Any:
    """A copy of nested containers whose tensors lie in host memory and share nothing with the original."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return type(value)((key, on_host(entry)) for key, entry in value.items())
    return type(value)(map(on_host, value)) if isinstance(value, (list, tuple)) else value
