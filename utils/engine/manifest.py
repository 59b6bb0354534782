"""The checkpoints in a run's folder: which there are, which of them are whole, and how a new one takes its place.

`last.pt` is the newest, `previous.pt` the newest of an earlier step, `best.pt` that of the best score, `step_N.pt` stay
for good. `checkpoints.json`, the manifest, lists them with step, SHA-256 and score. A file whose seal is not in the
manifest was not written by this run, so `--resume` leaves it alone; a folder without a manifest (files copied there, or
written by an earlier version) is taken as it is.

The manifest is written before a new file gets its name, and again after: whenever the process dies, every whole file of
the run is in it.
"""

import hashlib
import json
import logging
import math
import os
import re
import shutil
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from utils.durable import atomic_path, leftovers, write_text
from utils.seals import DamagedError, Seal, check_whole, read_seal, save_sealed

LAST, PREVIOUS, BEST = "last.pt", "previous.pt", "best.pt"
MANIFEST = "checkpoints.json"
STEP_NAME = re.compile(r"step_(\d+)\.pt")
ABOUT = "Checkpoints of this run, newest first. Written by the run, read by --resume."

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entry:
    """A checkpoint in the manifest. score: of the last evaluation, the larger the better; None before the first."""

    step: int
    sha256: str
    bytes: int
    saved: str                      # when, ISO 8601
    score: float | None = None
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Found:
    """A checkpoint file in the folder, its seal unchecked. step: by its seal, else by the manifest or the name."""

    path: Path
    seal: Seal | None
    step: float
    ours: bool                      # written by this run, as far as can be told


def step_name(step: int) -> str:
    """The name of a checkpoint that stays for good."""
    return f"step_{step}.pt"


def found_in(folder: Path) -> list[Found]:
    """The checkpoints of a folder, the newest first; of equal steps first the file that knows most of the run."""
    known, found = _read(folder), []
    listed = {name: entry.step for entry in (known or {}).values() for name in entry.files}
    for path in folder.glob("*.pt"):
        if _rank(path.name) is None:
            continue
        seal = read_seal(path)
        step = seal.step if seal else listed.get(path.name, _step_by_name(path.name))
        found.append(Found(path, seal, step, known is None or (seal is not None and seal.sha256 in known)))
    return sorted(found, key=lambda one: (-one.step, _rank(one.path.name)))


def newest_whole(folder: Path) -> Path | None:
    """The newest checkpoint that is what was written; None where the folder holds none at all.

    Every file that is passed over is told. A ValueError where there are files, but none is whole.
    """
    refused = []
    for found in found_in(folder):
        if found.ours:
            try:
                check_whole(found.path)
                if found.seal is None and not zipfile.is_zipfile(found.path):
                    raise DamagedError(f"{found.path} is damaged: it is cut off")
            except (ValueError, OSError) as error:
                refused.append(str(error))
                continue
            for reason in refused:
                logger.warning("%s: going back to %s", reason, found.path.name)
            return found.path
        refused.append(f"{found.path} " + (f"was not written by this run (it is not in {MANIFEST})" if found.seal
                                           else "is damaged: it ends before its seal"))
    if refused:
        raise ValueError(f"no checkpoint in {folder} can be resumed: {'; '.join(refused)}; nothing was changed")
    return None


def has_run(folder: Path) -> bool:
    """Whether a run has saved something here."""
    return (folder / MANIFEST).exists() or bool(found_in(folder))


def take_over(folder: Path, resumed: Path | None) -> None:
    """Before a run writes here: what interrupted writes left is removed, what stands above `resumed` steps aside.

    Otherwise the next save would make a damaged last.pt the previous one, in place of a whole one. A folder without a
    manifest gets one.
    """
    for path in leftovers(folder):
        path.unlink()
    for found in found_in(folder) if resumed else []:
        if found.path == resumed:
            break
        aside = found.path.with_name(f"{found.path.name}.unusable")
        os.replace(found.path, aside)
        logger.warning("%s is now %s", found.path, aside.name)
    if _read(folder) is None and (files := [found for found in found_in(folder) if found.seal]):
        _write(folder, {f.seal.sha256: Entry(f.seal.step, f.seal.sha256, f.path.stat().st_size, _iso(
            f.path.stat().st_mtime)) for f in files})
        _write(folder, _present(folder))


def write_checkpoint(folder: Path, state: Mapping, names: Sequence[str], score: float | None) -> None:
    """Writes `state` as last.pt and under these further names; the last.pt of an earlier step becomes previous.pt."""
    last = folder / LAST
    with atomic_path(last) as temporary:
        seal = save_sealed(temporary, state, state["step"])
        entry = Entry(seal.step, seal.sha256, temporary.stat().st_size, _iso(time.time()), score, (LAST, *names))
        _write(folder, {**_present(folder), seal.sha256: entry})
        for name in names:
            with atomic_path(folder / name) as other:
                _link(temporary, other)
        if last.exists() and ((old := read_seal(last)) is None or old.step < seal.step):
            os.replace(last, folder / PREVIOUS)
    _write(folder, _present(folder))


def _link(file: Path, name: Path) -> None:
    """A second name for a file, or a copy where the file system has no second names."""
    name.unlink()
    try:
        os.link(file, name)
    except OSError:
        shutil.copyfile(file, name)


def _present(folder: Path) -> dict[str, Entry]:
    """What the manifest says of the files that are there, under the names they have now."""
    known = _read(folder) or {}
    names: dict[str, list[str]] = {}
    for found in found_in(folder):
        if found.seal is not None:
            names.setdefault(found.seal.sha256, []).append(found.path.name)
    return {sha256: replace(known[sha256], files=tuple(files)) for sha256, files in names.items() if sha256 in known}


def _read(folder: Path) -> dict[str, Entry] | None:
    """The manifest by SHA-256; None where there is none, or none that can be read."""
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = content["checkpoints"]
        if content["sha256"] != _sum(rows):
            raise ValueError("its SHA-256 differs")
        return {row["sha256"]: Entry(**{**row, "files": tuple(row["files"])}) for row in rows}
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, KeyError) as error:
        logger.warning("%s is damaged (%s): the files are judged by their own seals", path, error)
        return None


def _write(folder: Path, entries: Mapping[str, Entry]) -> None:
    rows = sorted((asdict(entry) for entry in entries.values()), key=lambda row: -row["step"])
    rows = json.loads(json.dumps(rows))                  # as they are read again
    content = {"about": ABOUT, "checkpoints": rows, "sha256": _sum(rows)}
    write_text(folder / MANIFEST, json.dumps(content, indent=1) + "\n")


def _sum(rows: list) -> str:
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode("ascii")).hexdigest()


def _rank(name: str) -> int | None:
    """Of files with equal steps the first knows most; None for a file that is no checkpoint of a run."""
    fixed = (LAST, BEST, PREVIOUS)
    if name in fixed:
        return fixed.index(name)
    return len(fixed) if STEP_NAME.fullmatch(name) else None


def _step_by_name(name: str) -> float:
    """A guess where neither a seal nor the manifest tells: last.pt first, best.pt and previous.pt at the end."""
    if found := STEP_NAME.fullmatch(name):
        return int(found[1])
    return math.inf if name == LAST else -1


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="seconds")
