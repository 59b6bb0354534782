"""What a run tells: one line per interval on the terminal and in log.txt, metrics.jsonl, TensorBoard. Rank 0 only."""

import json
import logging
import math
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tqdm import tqdm


class _TqdmHandler(logging.Handler):
    """Writes above a running progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stdout)
        sys.stdout.flush()


def setup_logging(main_process: bool, run_dir: Path | None = None) -> None:
    """Sends log lines of rank 0 to the terminal and, with `run_dir`, to run_dir/log.txt (appended)."""
    handlers: list[logging.Handler] = [_TqdmHandler()] if main_process else [logging.NullHandler()]
    if main_process and run_dir is not None:
        handlers.append(logging.FileHandler(run_dir / "log.txt", encoding="utf-8"))
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO, handlers=handlers,
                        force=True)
    for noisy in ("PIL", "matplotlib", "timm", "httpx", "huggingface_hub"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


class RunWriter:
    """metrics.jsonl and TensorBoard of one run. Only rank 0 holds one with a folder; the others write nothing."""

    def __init__(self, run_dir: Path | None, tensorboard: bool) -> None:
        self._jsonl = None if run_dir is None else (run_dir / "metrics.jsonl").open("a", encoding="ascii")
        self._board = None
        if run_dir is not None and tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, so only where it is used
            self._board = SummaryWriter(str(run_dir / "tb"))

    def scalars(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """One JSON line {"kind", "step", ...values} (non-finite numbers as null) and one TensorBoard scalar each."""
        if self._jsonl is not None:
            finite = {k: v if math.isfinite(v) else None for k, v in values.items()}
            self._jsonl.write(json.dumps({"kind": kind, "step": step, **finite}) + "\n")
            self._jsonl.flush()
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def image(self, name: str, step: int, picture: np.ndarray) -> None:
        """A TensorBoard picture, (H, W, 3) uint8."""
        if self._board is not None:
            self._board.add_image(name, picture, step, dataformats="HWC")

    def close(self) -> None:
        """Flushes and closes the files."""
        if self._jsonl is not None:
            self._jsonl.close()
        if self._board is not None:
            self._board.close()


def one_sentence(error: Exception) -> str:
    """The message of an error on one line.

    A data loader's worker wraps the message in its traceback; there the sentence is the last line.
    """
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].split("Error: ", 1)[-1] if str(error).startswith("Caught ") else " ".join(lines)


def duration(seconds: float) -> str:
    """7h40, 12m05 or 38s."""
    seconds = int(seconds)
    hours, minutes = seconds // 3600, seconds % 3600 // 60
    return f"{hours}h{minutes:02d}" if hours else f"{minutes}m{seconds % 60:02d}" if minutes else f"{seconds}s"
