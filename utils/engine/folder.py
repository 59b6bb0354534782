"""The folder of a run while the run is in it: locked, and entered at its newest whole checkpoint."""

import logging
import os
import socket
from contextlib import ExitStack
from pathlib import Path

from utils import distributed
from utils.engine.config import Config
from utils.engine.manifest import BEST, has_run, newest_whole, take_over
from utils.locks import FolderLock

logger = logging.getLogger(__name__)


class RunFolder(ExitStack):
    """A context manager that holds the lock of the folder. Rank 0 looks at the files and tells the others."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.path = config.run_dir
        self.lock: FolderLock | None = None

    def checkpoint(self, resume: bool) -> Path | None:
        """What the run goes on from; None where it begins. A folder that holds a run is refused without `resume`.

        A process that torchrun has restarted resumes what its launcher has begun, also without being told. A folder
        that is not there is not made.
        """
        return distributed.from_main(lambda: self._checkpoint(resume))

    def enter(self, resumed: Path | None) -> bool:
        """Before anything is written here. Whether there is a best.pt."""
        return distributed.from_main(lambda: self._enter(resumed))

    def _checkpoint(self, resume: bool) -> Path | None:
        if not self.path.exists():
            return None
        lock = self._lock()
        resume = resume or (distributed.attempt() > 0 and lock.before.get("launch") == _launch())
        if not resume and has_run(self.path):
            raise ValueError(f"{self.path} already holds a run (last.pt); continue it with --resume, "
                             "or choose another version_name or out_dir")
        return newest_whole(self.path) if resume else None

    def _enter(self, resumed: Path | None) -> bool:
        if self.lock is None:
            self._lock()
            if has_run(self.path):
                raise ValueError(f"another run has begun in {self.path}; choose another version_name or out_dir")
        take_over(self.path, resumed)
        return (self.path / BEST).exists()

    def _lock(self) -> FolderLock:
        self.lock = self.enter_context(FolderLock(self.path, {"launch": _launch()}))
        return self.lock


def _launch() -> str:
    """Tells one launcher from another; its restarts of this process have the same."""
    return f"{os.environ.get('TORCHELASTIC_RUN_ID')} {socket.gethostname()} {os.getppid()}"
