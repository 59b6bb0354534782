"""Compare this program with reference numbers of the published implementations.

    python scripts/check_parity.py --golden DIR [--dtype float32] [--only SUBSTR] [--scan_backend NAME]

DIR is searched with all its sub-folders. One row per case; the exit status is 1 if any case fails or none was
found. Reference files that no check reads are listed as "not covered", never as passed.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.command_line import Command
from scripts.parity import FAMILIES
from scripts.parity.base import Check, Folder, NotCovered, Options

PASS, FAIL, NOT_COVERED = "pass", "FAIL", "not covered"
DTYPES = {"float64": torch.float64, "float32": torch.float32}


@dataclass(frozen=True)
class Row:
    """A compared case as a line of the output; error and tolerance are None where nothing is compared."""

    family: str
    case: str
    status: str
    error: float | None = None
    tolerance: float | None = None
    note: str = ""

    def __str__(self) -> str:
        error, limit = ("-" if x is None else f"{x:.1e}" for x in (self.error, self.tolerance))
        numbers = f"{error:>9} {limit:>9}"
        return f"{self.family:<16}{self.case:<50} {numbers}  {self.status:<12}{self.note}".rstrip()


def compare(root: Path, options: Options, only: str = "") -> Iterator[Row]:
    """One row per case below `root`, then the files that nothing reads; `only` is a part of "family/case".

    A folder that a check reads as a whole (a small data set, prediction files) is not looked into.
    """
    whole: set[Path] = set()
    for path in sorted([root, *(p for p in root.rglob("*") if p.is_dir())]):
        if path in whole or path.parent in whole:
            whole.add(path)
            continue
        folder, used = Folder(path), set()
        for family in FAMILIES:
            for check in FAMILIES.load(family)(folder):
                used |= check.files
                name = f"{path.name}: {check.case}"
                if only in f"{family}/{name}":
                    yield from _rows(family, name, check, options)
        whole |= folder.data_sets | {file for file in used if file.is_dir()}
        yield from _unread(folder, used, only)


def _rows(family: str, case: str, check: Check, options: Options) -> Iterator[Row]:
    """The worst quantity of a case; quantities without counterpart get a row of their own."""
    try:
        measures = list(check.run(options))
    except NotCovered as reason:
        yield Row(family, case, NOT_COVERED, note=str(reason))
        return
    except Exception as error:       # a failure of the code under test is a result; the other cases go on
        yield Row(family, case, FAIL, note=f"{type(error).__name__}: {error}".splitlines()[0][:160])
        return
    if compared := [m for m in measures if not m.uncovered]:
        worst = max(compared, key=lambda m: m.severity)
        yield Row(family, case, PASS if worst.passed else FAIL, worst.error, worst.tolerance, worst.name)
    for reason in dict.fromkeys(m.uncovered for m in measures if m.uncovered):
        names = ", ".join(m.name for m in measures if m.uncovered == reason)
        yield Row(family, case, NOT_COVERED, note=f"{names}: {reason}")


def _unread(folder: Folder, used: set[Path], only: str) -> Iterator[Row]:
    """One row per group of files (same name up to the first dot) that no check has read."""
    unread = {*folder.tables, *folder.arrays} - used
    for stem in sorted({path.name.split(".")[0] for path in unread}):
        if only in f"{folder.path.name}/{stem}":
            yield Row(folder.path.name, stem, NOT_COVERED, note="no check reads these files")


def check(golden: Path, dtype: str, only: str, scan_backend: str, device: str) -> int:
    """0 if something was compared and everything agrees."""
    if not golden.is_dir():
        main.parser.error(f"--golden {golden}: no such folder")
    counts = dict.fromkeys((PASS, FAIL, NOT_COVERED), 0)
    print(f"{'family':<16}{'case':<50} {'error':>9} {'tolerance':>9}  status")
    for row in compare(golden, Options(DTYPES[dtype], scan_backend, device), only):
        counts[row.status] += 1
        print(row, flush=True)
    print(f"{counts[PASS]} passed, {counts[FAIL]} failed, {counts[NOT_COVERED]} not covered ({dtype})")
    if counts[PASS] + counts[FAIL] == 0:
        print(f"nothing was compared: no reference numbers of a known kind below {golden}"
              + (f" match '{only}'" if only else ""))
    return 0 if counts[PASS] and not counts[FAIL] else 1


main = Command(__doc__, check, {
    "--golden": dict(type=Path, required=True, metavar="DIR", help="folder of reference numbers"),
    "--dtype": dict(choices=DTYPES, default="float64", help="arithmetic of losses, predictions and scans"),
    "--only": dict(default="", metavar="SUBSTR", help="only cases whose family/case contains this"),
    "--scan_backend": dict(default="auto", metavar="NAME", help="backend of the selective scan"),
    "--device": dict(default="cpu", help="device of the scans, e.g. cuda"),
})

if __name__ == "__main__":
    sys.exit(main())
