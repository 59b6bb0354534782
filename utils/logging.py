"""What a run tells: one line per interval on the terminal and in log.txt, metrics.jsonl, TensorBoard. Rank 0 only."""

import io
import json
import logging
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import IO

import numpy as np
from tqdm import tqdm

from utils.durable import names_the_file, write_text


class _TqdmHandler(logging.Handler):
    """Writes above a running progress bar instead of through it.

    Where nobody reads any more (a closed pipe, a terminal that is gone) it falls silent, and the run goes on.
    """

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()
        except (OSError, ValueError) as error:
            silence(sys.stdout)
            logging.getLogger(__name__).warning("nobody reads the output any more (%s): it ends here", error)


def say(text: str, stream: IO[str]) -> None:
    """A line for people. Where nobody reads any more, as behind `| head`, that is no error."""
    try:
        print(text, file=stream, flush=True)
    except OSError:
        silence(stream)


def silence(stream: IO[str] | None) -> None:
    """Sends what is written to a stream from now on nowhere: there is no reader, and writing would raise each time."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    except (OSError, ValueError, AttributeError):           # closed altogether, or no file
        sys.stdout = open(os.devnull, "w", encoding="utf-8")    # noqa: SIM115 (until the process ends)


class _LogFile(logging.FileHandler):
    """A log file that cannot be written, on a full disk, is told once: the run itself goes on."""

    told = False

    def handleError(self, record: logging.LogRecord) -> None:      # noqa: N802 (the name is that of the base class)
        if not self.told:
            self.told = True
            print(f"cannot write {self.baseFilename}: {sys.exc_info()[1]}", file=sys.stderr)


def setup_logging(main_process: bool, run_dir: Path | None = None) -> None:
    """Sends log lines of rank 0 to the terminal and, with `run_dir`, to run_dir/log.txt (appended)."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):            # a character that it does not know is no reason to end
            stream.reconfigure(errors="backslashreplace")
    handlers: list[logging.Handler] = [_TqdmHandler()] if main_process else [logging.NullHandler()]
    if main_process and run_dir is not None:
        handlers.append(_LogFile(run_dir / "log.txt", encoding="utf-8", errors="backslashreplace"))
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO, handlers=handlers,
                        force=True)
    for noisy in ("PIL", "matplotlib", "timm", "httpx", "huggingface_hub"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


class RunWriter:
    """metrics.jsonl and TensorBoard of one run. Only rank 0 holds one with a folder; the others write nothing.

    step: where the run begins or goes on. What the files tell of later steps will be told again and is dropped, and
    unless the step is `evaluated`, what they tell of its evaluation. None: whatever is there stays.
    """

    def __init__(self, run_dir: Path | None, tensorboard: bool, step: int | None = None,
                 evaluated: bool = True) -> None:
        self.run_dir, self._jsonl, self._board = run_dir, None, None
        if run_dir is None:
            return
        path = run_dir / "metrics.jsonl"
        kept = [] if step is None else _cut(path, step, evaluated)
        self._jsonl = path.open("a", encoding="ascii")
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter  # slow to import, so only where it is used
            except ImportError as error:
                logging.getLogger(__name__).warning("no tb/: TensorBoard is not installed (%s); metrics.jsonl "
                                                    "holds the same numbers", error)
                return
            began = (run_dir / "tb").exists() and step is not None
            self._board = SummaryWriter(str(run_dir / "tb"), purge_step=step + evaluated if began else None)
            for row in kept if began and not evaluated else []:     # TensorBoard forgets the whole step
                if row["step"] == step:
                    self._on_board(row.pop("kind"), row.pop("step"), row)

    def scalars(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """One JSON line {"kind", "step", ...values} (non-finite numbers as null) and one TensorBoard scalar each."""
        if self._jsonl is not None:
            finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
            with names_the_file(self.run_dir / "metrics.jsonl"):
                self._jsonl.write(json.dumps({"kind": kind, "step": step, **finite}) + "\n")
                self._jsonl.flush()
        self._on_board(kind, step, values)

    def _on_board(self, kind: str, step: int, values: Mapping[str, float | None]) -> None:
        if self._board is not None:
            with names_the_file(self.run_dir / "tb"):
                for name, value in values.items():
                    self._board.add_scalar(f"{kind}/{name}", math.nan if value is None else value, step)

    def image(self, name: str, step: int, picture: np.ndarray) -> None:
        """A TensorBoard picture, (H, W, 3) uint8."""
        if self._board is not None:
            with names_the_file(self.run_dir / "tb"):
                self._board.add_image(name, picture, step, dataformats="HWC")

    def sync(self) -> None:
        """Until what was told so far is on the disk."""
        if self._jsonl is not None:
            with names_the_file(self.run_dir / "metrics.jsonl"):
                os.fsync(self._jsonl.fileno())
        if self._board is not None:
            with names_the_file(self.run_dir / "tb"):
                self._board.flush()

    def close(self) -> None:
        """Flushes and closes the files."""
        if self._jsonl is not None:
            self._jsonl.close()
        if self._board is not None:
            self._board.close()


def _cut(path: Path, step: int, evaluated: bool) -> list[dict]:
    """Drops the lines that will be written again, and one that a dying process did not finish; returns the others."""
    if not path.exists():
        return []
    kept, lines = [], path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    for line in lines:
        try:
            row = json.loads(line)
            known = row["step"] < step or (row["step"] == step and (evaluated or row["kind"] != "eval"))
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
        if known and line.endswith("\n"):
            kept.append((line, row))
    if len(kept) < len(lines):
        write_text(path, "".join(line for line, _ in kept))
    return [row for _, row in kept]


def duration(seconds: float) -> str:
    """7h40, 12m05 or 38s."""
    seconds = int(seconds)
    hours, minutes = seconds // 3600, seconds % 3600 // 60
    return f"{hours}h{minutes:02d}" if hours else f"{minutes}m{seconds % 60:02d}" if minutes else f"{seconds}s"
