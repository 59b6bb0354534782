"""One process at a time: a lock on a folder that the system releases when its holder dies, however it dies."""

import json
import os
import socket
import time
from pathlib import Path
from types import TracebackType

try:
    import fcntl
except ImportError:                 # Windows
    fcntl = None

WAIT_S = 3.0                        # for a holder that is about to end


class Busy(ValueError):
    """Another process holds the lock."""


class FolderLock:
    """A context manager that holds the folder's `run.lock`; a `Busy` that names the holder where another does.

    A record lock of POSIX: forked workers do not inherit it, and it works on network file systems. `before`: what the
    file said of its last holder, {} if nothing. Where the system has no such locks, nothing is locked.
    """

    def __init__(self, folder: Path, about: dict[str, str]) -> None:
        self.path = folder / "run.lock"
        self.about = about
        self.before: dict[str, str] = {}

    def __enter__(self) -> "FolderLock":
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise ValueError(f"{error.filename} is a file where a run needs a folder; remove it, or choose another "
                             "version_name or out_dir") from error
        # Opened once: closing any other handle of the file would release the lock.
        self._file = os.fdopen(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666), "r+", encoding="utf-8")
        try:
            self._lock()
            self.before = _parse(self._file.read())
            self._file.seek(0)
            self._file.truncate()
            json.dump({"process": os.getpid(), "host": socket.gethostname(), **self.about}, self._file)
            self._file.flush()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def _lock(self) -> None:
        if fcntl is None:
            return
        end = time.monotonic() + WAIT_S
        while True:
            try:
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > end:
                    raise Busy(self._busy()) from None
                time.sleep(0.1)

    def _busy(self) -> str:
        holder = _parse(self._file.read())
        words = "process {process} on {host}".format(**holder) if holder else "another process"
        return f"{self.path.parent} is in use by {words}; end that run first, or choose another version_name or out_dir"


def _parse(text: str) -> dict[str, str]:
    """The file's content; {} where a holder died while writing it."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}
