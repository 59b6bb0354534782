"""Which images a split takes: listed in a file, found by a pattern, or a share of those found.

An id names an image within its data set. It may contain spaces and, for images in sub-folders, slashes. What a split
list assumes is checked here, and every mistake is told with its file and line.
"""

import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path, PurePosixPath

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm")
WILDCARDS = frozenset("*?[")


class SplitRule(ABC):
    """Says which images belong to a split."""

    @abstractmethod
    def ids(self, folder: Path, image: str) -> list[str]:
        """Ids of the images in `folder`; `image` is the pattern of their files, such as "images/{id}.jpg"."""


@dataclass(frozen=True)
class SplitList(SplitRule):
    """A text file below the data folder, one id per line; its order is kept."""

    file: str

    def ids(self, folder: Path, image: str) -> list[str]:
        path = folder / self.file
        if not path.is_file():
            raise FileNotFoundError(f"split file not found: {path} (one image id per line)")
        return [name for _, name in read_split_list(path)]


@dataclass(frozen=True)
class SplitGlob(SplitRule):
    """The images that a pattern finds below the data folder, such as "images/train/**/*.jpg", sorted by path.

    A share (low, high) of [0, 1) keeps the images whose id falls into it: the same ones wherever and however often it
    is asked, also after images have been added.
    """

    pattern: str
    share: tuple[float, float] = (0.0, 1.0)

    def ids(self, folder: Path, image: str) -> list[str]:
        parts = PurePosixPath(self.pattern).parts
        fixed = list(takewhile(lambda part: not WILDCARDS & set(part), parts[:-1]))
        if not (head := folder.joinpath(*fixed)).is_dir():
            raise FileNotFoundError(f"folder of the images not found: {head}")
        found = sorted(p.relative_to(folder).as_posix() for p in folder.glob(self.pattern) if p.is_file())
        if image.endswith(".*"):
            found = [path for path in found if path.lower().endswith(PICTURES)]
        names = [id_of(path, image) for path in found]
        if foreign := [path for path, name in zip(found, names, strict=True) if name is None]:
            raise ValueError(f"{folder}: {foreign[0]} is among the images of the split ({self.pattern}), but is not "
                             f"named like an image of the data set ({image})")
        return [name for name in names if self.share[0] <= _position(name) < self.share[1]]


@dataclass(frozen=True)
class PartOfSplit(SplitRule):
    """The images of another split but for a fraction that is `held_out`, or that fraction alone, in their order.

    Which images are held out depends on the ids alone: neither on the seed of a run nor on the order of the list.
    """

    whole: SplitRule
    fraction: float
    held_out: bool

    def ids(self, folder: Path, image: str) -> list[str]:
        names = self.whole.ids(folder, image)
        held = set(sorted(names, key=_position)[:max(1, round(self.fraction * len(names)))])
        if len(held) == len(names):
            raise ValueError(f"val_from_train {self.fraction:g} leaves nothing to train on: the training split of "
                             f"{folder} has {len(names)} image(s)")
        return [name for name in names if (name in held) == self.held_out]


def listed(file: str, splits: Iterable[str] = ("train", "val")) -> dict[str, SplitRule]:
    """Splits that are listed in files, such as "gt_sets/{split}.txt"."""
    return {split: SplitList(file.format(split=split)) for split in splits}


def id_of(path: str, image: str) -> str | None:
    """The id of an image file below the data folder, None where the file is not named like `image`."""
    before, _, after = image.partition("{id}")
    if after.endswith(".*"):
        path, after = path.rpartition(".")[0], after[:-2]
    fits = path.startswith(before) and path.endswith(after) and len(path) > len(before) + len(after)
    return path[len(before):len(path) - len(after)] if fits else None


def read_split_list(path: Path) -> list[tuple[int, str]]:
    """(line, id) of every line of a split list that is not empty.

    UTF-8 with or without a byte-order mark, or UTF-16 with one; any ends of lines. A ValueError names file and line for
    another encoding, an invisible character within an id, an id that leaves the data folder, and an id listed twice.
    """
    entries: dict[str, int] = {}
    for number, line in enumerate(re.split(r"\r\n|\r|\n", _decode(path)), start=1):
        name = line.strip()
        if not name:
            continue
        if hidden := next((c for c in name if not c.isprintable()), None):
            raise ValueError(f"{path}, line {number}: the id {name!r} holds the invisible character "
                             f"U+{ord(hidden):04X}; write one id per line, without it")
        if name.startswith(("/", "\\")) or ".." in PurePosixPath(name).parts:
            raise ValueError(f"{path}, line {number}: {name!r} leaves the data folder; an id is the name of an image "
                             "without folder and ending")
        if name in entries:
            raise ValueError(f"{path}, line {number}: {name!r} is listed already in line {entries[name]}; "
                             "remove one of the lines")
        entries[name] = number
    return [(number, name) for name, number in entries.items()]


def explain_unknown(name: str, known: Collection[str]) -> str:
    """Why a listed id may name no image, in words to add to a message, or nothing. `known`: ids that are images."""
    first = name.split()[0]
    if first != name and first in known:
        return (f"; the line has more than one column, and {first!r} alone is an image: keep the first column "
                "(of VOC's lists: of the lines that end with 1)")
    bare = PurePosixPath(name).stem
    if bare != name and bare in known:
        return f"; {bare!r} is an image: an id has no folder and no ending"
    return ""


def _decode(path: Path) -> str:
    content = path.read_bytes()
    encoding = "utf-16" if content.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content[:error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: byte 0x{content[min(error.start, len(content) - 1)]:02x} is no text in "
                         f"{encoding.removesuffix('-sig').upper()} (saved in another encoding, such as Windows-1252?); "
                         "save the list as UTF-8") from error


def _position(name: str) -> float:
    """A number in [0, 1) that depends on the id alone."""
    return zlib.crc32(name.encode("utf-8")) / 2**32
