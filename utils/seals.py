"""Checkpoint files that tell when they are no longer what was written.

A sealed file is what `torch.save` writes, a zip archive, with a line in the archive's comment: the step it belongs to
and the SHA-256 of everything before the line. Any reader of such archives reads it; the seal travels with every copy.
"""

import hashlib
import os
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

COMMENT = "mtdp seal: step {step:012d} sha256 {sha256}"
PATTERN = re.compile(rb"mtdp seal: step (\d{12}) sha256 ([0-9a-f]{64})")
LENGTH = len(COMMENT.format(step=0, sha256="0" * 64))
WORDS = (b"mtdp seal: ", b" sha256 ")        # by which a damaged seal is told from none
LAST_RECORD = 22                             # bytes of an archive's last record, without the comment
CHUNK = 2**22


class DamagedError(ValueError):
    """A file is not what was written."""


@dataclass(frozen=True)
class Seal:
    """What a sealed file says of itself."""

    step: int
    sha256: str


def save_sealed(path: Path, content: Any, step: int) -> Seal:
    """`torch.save` of `content` into `path`, with a seal. Use it inside `atomic_path`."""
    with open(path, "wb", buffering=0) as file:
        target = _Hashed(file)
        try:
            torch.save(content, target)
        except RuntimeError as error:           # what PyTorch makes of an error of `write`
            raise target.error or error from error
        seal = Seal(step, _digest(target.sha256, step))
        comment = COMMENT.format(step=step, sha256=seal.sha256).encode("ascii")
        file.seek(-2, os.SEEK_END)              # the length of the comment, 0 so far, is the last field of an archive
        _write_all(file, LENGTH.to_bytes(2, "little") + comment)
        os.fsync(file.fileno())
    return seal


def read_seal(path: Path) -> Seal | None:
    """The seal at the end of a file, unchecked; None where there is none."""
    end = _end(path)[-LENGTH - 2:]
    found = PATTERN.fullmatch(end[2:])
    if found is None or end[:2] != LENGTH.to_bytes(2, "little"):
        return None
    return Seal(int(found[1]), found[2].decode("ascii"))


def check_whole(path: Path) -> None:
    """DamagedError unless the content is what was written: by its seal, or by the zip archive's own sums.

    A file that is neither sealed nor an archive has nothing to be checked by.
    """
    if (seal := read_seal(path)) is None:
        if any(word in _end(path) for word in WORDS) or _is_cut(path):
            raise DamagedError(f"{path} is damaged: its end, which seals it, is cut off or changed")
        _check_archive(path)
        return
    sha256, left = hashlib.sha256(), path.stat().st_size - LENGTH - 2
    with open(path, "rb") as file:
        while left and (chunk := file.read(min(left, CHUNK))):
            sha256.update(chunk)
            left -= len(chunk)
    sha256.update(b"\0\0")                      # the length of the comment, as it was then
    if _digest(sha256, seal.step) != seal.sha256:
        raise DamagedError(f"{path} is damaged: its content is not what was written (SHA-256 differs)")


def _end(path: Path) -> bytes:
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - LENGTH - LAST_RECORD))
        return file.read()


def _is_cut(path: Path) -> bool:
    """Whether an archive's comment is shorter than it says."""
    if not _is_archive(path):
        return False
    _, signature, rest = _end(path).rpartition(b"PK\5\6")
    record = rest[LAST_RECORD - 6:]
    return bool(signature) and len(record) >= 2 and int.from_bytes(record[:2], "little") > len(record) - 2


def _is_archive(path: Path) -> bool:
    """By how it begins: what marks the end of an archive may stand in any file."""
    with open(path, "rb") as file:
        return file.read(4) == b"PK\3\4"


def _check_archive(path: Path) -> None:
    if not (_is_archive(path) and zipfile.is_zipfile(path)):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()
    except (zipfile.BadZipFile, NotImplementedError, EOFError, UnicodeDecodeError) as error:
        raise DamagedError(f"{path} is damaged: {error}") from error
    if bad is not None:
        raise DamagedError(f"{path} is damaged: the entry {bad} is not what was written (CRC differs)")


def _digest(sha256: Any, step: int) -> str:
    sha256.update(f"step {step}".encode("ascii"))
    return sha256.hexdigest()


def _write_all(file: Any, data: Any) -> None:
    view = memoryview(data).cast("B")
    while view:
        view = view[file.write(view):]


class _Hashed:
    """A file for `torch.save` that sums up what passes through, and remembers why writing failed."""

    def __init__(self, file: Any) -> None:
        self.file, self.sha256, self.error = file, hashlib.sha256(), None

    def write(self, data: Any) -> int:
        try:
            _write_all(self.file, data)
        except OSError as error:
            self.error = self.error or error
            raise
        self.sha256.update(data)
        return len(data)

    def flush(self) -> None:
        """Nothing is held back."""
