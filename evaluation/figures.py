"""What an evaluator can show beside its scores: plain numbers with names and units, for a report to draw."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Bars:
    """One value per name (a class), in per cent."""

    title: str
    names: tuple[str, ...]
    values: np.ndarray          # (n,)


@dataclass(frozen=True)
class Confusion:
    """How many pixels with a label (row) were predicted as what (column)."""

    title: str
    names: tuple[str, ...]
    counts: np.ndarray          # (n, n)


@dataclass(frozen=True)
class Histogram:
    """How many pixels lie between neighbouring edges; the last bin holds whatever is beyond, too."""

    title: str
    unit: str
    edges: np.ndarray           # (n + 1,)
    counts: np.ndarray          # (n,)


@dataclass(frozen=True)
class PrecisionRecall:
    """A curve over thresholds; `best` is the index of the largest F."""

    title: str
    precision: np.ndarray       # (K,)
    recall: np.ndarray          # (K,)
    thresholds: np.ndarray      # (K,)
    best: int


Figure = Bars | Confusion | Histogram | PrecisionRecall
