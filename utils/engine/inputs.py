"""What `predict` was asked for, file by file, what their results are called, and which of them are there already."""

import glob
import itertools
import json
import logging
import os
import re
import time
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from utils.durable import names_the_file

logger = logging.getLogger(__name__)

PICTURES = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".avif", ".jp2", ".ppm", ".pgm",
            ".heic", ".heif")
VIDEOS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv")
LISTS = (".txt", ".lst")
CAMERA = re.compile(r"camera:\d+")
Source = str | os.PathLike


def find_inputs(sources: Source | Sequence[Source]) -> list[Path]:
    """The pictures and videos that are meant, in order, none twice; a `camera:N` stays as it is.

    Each source is a file, a folder (its pictures and videos by name; hidden files, such as ._x.jpg, are none), a
    pattern (photos/**/*.jpg), or a list, a .txt file with one path per line, relative to itself. FileNotFoundError
    where no source exists and holds anything; one among others stays as it is, for what reads it to report.
    """
    sources = [sources] if isinstance(sources, (str, os.PathLike)) else list(sources)
    found: dict[Path, None] = {}
    missing: list[FileNotFoundError] = []
    for source in sources:
        try:
            found.update(dict.fromkeys(_of_source(str(source))))
        except FileNotFoundError as error:
            missing.append(error)
            found[Path(source)] = None
    if missing and len(missing) == len(sources):
        raise missing[0]
    return list(found)


def _of_source(source: str) -> list[Path]:
    path = Path(source).expanduser()
    if CAMERA.fullmatch(source):
        return [Path(source)]
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if _is_input(p))
        paths = [p for p in files if p.suffix.lower() in (*PICTURES, *VIDEOS)]
        what = f"the folder holds no picture or video ({' '.join((*PICTURES, *VIDEOS))})"
        others = Counter(p.suffix.lower() or p.name for p in sorted(set(files) - set(paths)))
        if paths and others:
            logger.info("%s: left out, because no pictures or videos: %s", path,
                        ", ".join(f"{number} {ending}" for ending, number in others.most_common(10)))
    elif path.is_file() and path.suffix.lower() in LISTS:
        lines = path.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
        paths, what = [path.parent / line.strip() for line in lines if line.strip()], "the list is empty"
    elif path.is_file():
        return [path]
    elif glob.has_magic(source):
        paths = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if _is_input(p))
        what = "no file fits the pattern"
    else:
        raise FileNotFoundError(f"--input {source}: no such image, video, folder or list; a camera is camera:0")
    if not paths:
        raise FileNotFoundError(f"--input {source}: {what}")
    return paths


def _is_input(path: Path) -> bool:
    return path.is_file() and not path.name.startswith(".")


def is_camera(path: Path) -> bool:
    """Whether this is no file but a camera."""
    return CAMERA.fullmatch(str(path)) is not None


def is_video(path: Path) -> bool:
    """Whether this is a video file or a camera."""
    return path.suffix.lower() in VIDEOS or is_camera(path)


def output_names(paths: Sequence[Path], taken: Mapping[str, Path] | None = None) -> dict[Path, str]:
    """What the files of each input are called: its path below the folder that all have in common, without its ending.

    With the ending where two would be called the same, and with a number where that is not enough. Two names that
    differ in case or in the composition of letters alone are the same: they would be on some disks. `taken`: names of
    earlier runs and whose they are; an input keeps the name that it had.
    """
    owners = {_folded(name): owner for name, owner in (taken or {}).items()}
    kept = {owner: name for name, owner in (taken or {}).items()}
    absolute = {path: Path(os.path.abspath(path)) for path in paths}
    parents = {str(path.parent) for path in absolute.values()}
    common = Path(os.path.commonpath(parents)) if parents else Path()
    relative = {path: time.strftime(f"camera_{path.name.partition(':')[2]}_%Y-%m-%d_%H-%M-%S") if is_camera(path) else
                whole.relative_to(common).as_posix() for path, whole in absolute.items()}
    short = {path: name.removesuffix(path.suffix) for path, name in relative.items()}
    counts = Counter(map(_folded, short.values()))
    names = {}
    for path, name in relative.items():
        alone = [short[path]] if counts[_folded(short[path])] == 1 else []
        before = [kept[absolute[path]]] if absolute[path] in kept else []
        candidates = itertools.chain(before, alone, [name], (f"{name}_{number}" for number in itertools.count(2)))
        names[path] = next(c for c in candidates if owners.get(_folded(c), absolute[path]) == absolute[path])
        owners[_folded(names[path])] = absolute[path]
    return names


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


class Journal:
    """predictions.jsonl: a line for every input whose files have all been written: its name, itself, and by what.

    by: what stands for the checkpoint and the settings. A line is appended as a whole, also by several processes.
    """

    def __init__(self, folder: Path, by: str) -> None:
        self.path, self.by = folder / "predictions.jsonl", by
        self._lines: dict[str, dict] = {}
        if self.path.is_file():
            text = self.path.read_text(encoding="utf-8", errors="replace")
            if text and not text.endswith("\n"):           # a process died while it wrote
                self._append(b"\n")
            for line in text.splitlines():
                try:
                    row = json.loads(line)
                    self._lines[row["name"]] = row
                except (json.JSONDecodeError, KeyError, TypeError):
                    continue

    def names(self) -> dict[str, Path]:
        """The names that are taken, and whose they are."""
        return {name: Path(str(row.get("source"))) for name, row in self._lines.items()}

    def has(self, path: Path, name: str) -> bool:
        """Whether the files of this input are there: made of what it is now, by this network with these settings."""
        row = self._lines.get(name)
        return row is not None and not is_camera(path) and row == {**row, **self._row(path, name)}

    def add(self, path: Path, name: str) -> None:
        """All files of this input have been written."""
        self._append(json.dumps(self._row(path, name)).encode("ascii") + b"\n")

    def _append(self, data: bytes) -> None:
        with names_the_file(self.path), self.path.open("ab") as file:
            file.write(data)

    def _row(self, path: Path, name: str) -> dict:
        stamp = path.stat() if path.is_file() else None
        return {"name": name, "source": os.path.abspath(path), "by": self.by,
                "bytes": stamp and stamp.st_size, "modified": stamp and stamp.st_mtime_ns}
