"""What a step of gpu_check.py has found, written as it is found."""

import gc
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from utils.exits import one_sentence


@dataclass
class Report:
    """Rows of a step, appended to OUT/<step>.jsonl. A row with the key `wrong` is for the reader's attention."""

    out: Path
    step: str

    def row(self, **values: str | float | int) -> None:
        with (self.out / f"{self.step}.jsonl").open("a") as file:
            file.write(json.dumps(values) + "\n")
        print(*(f"{key} {value:.5g}" if isinstance(value, float) else f"{key} {value}"
                for key, value in values.items()), sep=", ", flush=True)

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """What fails inside is a row; the next attempt goes on."""
        try:
            yield
        except Exception as error:      # whatever it is, it is told, and the card's minutes go on
            self.row(what=what, wrong=f"{type(error).__name__}: {one_sentence(error)[:400]}")
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class Check(NamedTuple):
    """A step: its title, the seconds it may take, and `run(report, device)`."""

    title: str
    limit_s: float
    run: Callable[[Report, torch.device], None]
