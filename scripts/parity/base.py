"""What all checks share: a folder of reference numbers, one check, and how far off a result may be."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

HALF_ULP = 2.0**-24                      # of float32, relative to the value
SMALLEST = 2.0**-149                     # float32 above 0
Arrays = Mapping[str, np.ndarray]        # such as an .npz file


class NotCovered(Exception):
    """This program has no counterpart for a reference number; the message says which and why."""


@dataclass(frozen=True)
class Options:
    dtype: torch.dtype = torch.float64
    scan_backend: str = "auto"
    device: str = "cpu"

    def pick(self, float64: float, float32: float) -> float:
        """The tolerance that belongs to the arithmetic in use."""
        return float64 if self.dtype == torch.float64 else float32


@dataclass(frozen=True)
class Measure:
    """One compared quantity; with `uncovered` set, the reason why it was not compared."""

    name: str
    error: float = 0.0
    tolerance: float = 0.0
    uncovered: str = ""

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance                            # False for NaN

    @property
    def severity(self) -> float:
        """Failures first, then by share of the tolerance used up."""
        if not self.passed:
            return float("inf")
        return self.error / self.tolerance if self.tolerance else 0.0


@dataclass(frozen=True)
class Bound:
    """How far off a quantity may be: what measures its error, and the limits in float64 and in float32.

    With `as_stored` a reference that is not of float64 has the limit of float32 in any arithmetic.
    """

    error: Callable[[Any, Any], float]
    float64: float
    float32: float
    as_stored: bool = False

    def measure(self, name: str, got: Any, want: Any, options: Options) -> Measure:
        limit = options.pick(self.float64, self.float32)
        if self.as_stored and want.dtype != torch.float64:
            limit = self.float32
        return Measure(name, self.error(got, want), limit)


@dataclass(frozen=True)
class Check:
    """One case: the files and whole folders that it reads, and a function that compares them with this program."""

    case: str
    files: frozenset[Path]
    run: Callable[[Options], Iterable[Measure]]


@dataclass(frozen=True)
class Folder:
    """A directory of reference numbers; files are recognised by what they contain, never by their names."""

    path: Path

    @cached_property
    def tables(self) -> dict[Path, object]:
        """Every JSON file with its content."""
        return {p: json.loads(p.read_text(encoding="utf-8")) for p in sorted(self.path.glob("*.json"))}

    @cached_property
    def arrays(self) -> dict[Path, frozenset[str]]:
        """Every .npz and .safetensors file with the names of its arrays."""
        found = {}
        for path in sorted(self.path.glob("*.npz")):
            with np.load(path, allow_pickle=False) as content:
                found[path] = frozenset(content.files)
        for path in sorted(self.path.glob("*.safetensors")):
            with safe_open(path, "pt") as content:
                found[path] = frozenset(content.keys())
        return found

    @property
    def data_sets(self) -> frozenset[Path]:
        """Sub-folders that are small data sets: those beside a file `<name>...npz` of expected samples."""
        stems = [path.stem for path, keys in self.arrays.items()
                 if any(key.count("/") == 2 and key.endswith("/image") for key in keys)]
        folders = (path for path in self.path.iterdir() if path.is_dir())
        return frozenset(path for path in folders if any(stem.startswith(path.name) for stem in stems))

    def holding(self, needed: Iterable[str]) -> Path | None:
        """The .npz file that has all these arrays."""
        needed = set(needed)
        return next((p for p, keys in self.arrays.items() if p.suffix == ".npz" and needed <= keys), None)

    def beside(self, path: Path) -> dict[Path, frozenset[str] | dict]:
        """The other files with the same name up to the first dot, with the names of what they hold."""
        return {p: names for p, names in {**self.arrays, **self.tables}.items()
                if stem(p) == stem(path) and p != path and not isinstance(names, list)}

    def entries(self, fits: Callable[[dict], bool]) -> Iterator[tuple[Path, str, dict]]:
        """File, name and content of the entries of tables {name: entry} that fit."""
        for path, content in self.tables.items():
            for name, entry in (content.items() if isinstance(content, dict) else ()):
                if isinstance(entry, dict) and fits(entry):
                    yield path, name, entry

    def records(self) -> Iterator[tuple[Path, dict]]:
        """Entries of the JSON files that are lists of named cases."""
        for path, content in self.tables.items():
            if isinstance(content, list):
                yield from ((path, entry) for entry in content if isinstance(entry, dict) and "name" in entry)


def stem(path: Path) -> str:
    """The name up to the first dot, which the files of a case share."""
    return path.name.partition(".")[0]


def below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin so, without that prefix."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _pair(got, want) -> tuple[np.ndarray, np.ndarray]:
    got, want = (x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x) for x in (got, want))
    if got.shape != want.shape:
        raise ValueError(f"result has shape {got.shape}, reference {want.shape}")
    return got.astype(np.float64), want.astype(np.float64)


def absolute_error(got, want) -> float:
    """Largest |got - want|; NaN never equals a number."""
    got, want = _pair(got, want)
    both_nan = np.isnan(got) & np.isnan(want)
    return float(np.where(both_nan, 0.0, np.abs(got - want)).max(initial=0.0))


def stored_error(got: Tensor, want: Tensor) -> float:
    """Largest |got - want|; in float64 only what exceeds the rounding of a `want` that was stored in float32."""
    error = absolute_error(got, want)
    if got.dtype != torch.float64 or want.dtype == torch.float64 or not error > 0:
        return error
    rounding = HALF_ULP * want.double().abs() + SMALLEST / 2
    return ((got.detach().cpu() - want.cpu()).abs() - rounding.cpu()).clamp_min(0).max().item()


def stored_share(got: Tensor, want: Tensor) -> float:
    """`stored_error` over the largest |want|, for gradients."""
    return stored_error(got, want) / max(want.abs().max().item(), 1e-12)


def scaled_error(got, want) -> float:
    """Largest |got - want| over the largest |want| (over 1e-12 for a reference of zeros)."""
    got, want = _pair(got, want)
    return float(np.abs(got - want).max(initial=0.0) / max(np.abs(want).max(initial=0.0), 1e-12))


def entry_error(got, want) -> float:
    """Largest |got - want| / (|want| + median of the non-zero |want|).

    Unlike `scaled_error` a single huge entry (the gradient of a zero-length normal, 1e9) does not hide the
    others.
    """
    got, want = _pair(got, want)
    nonzero = np.abs(want[want != 0])
    floor = np.median(nonzero) if nonzero.size else 1e-12
    return float((np.abs(got - want) / (np.abs(want) + floor)).max(initial=0.0))
