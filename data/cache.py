"""Decoded files on disk: after the first epoch no PNG, JPEG or Matlab file has to be unpacked any more.

One entry per image and set of labels. It holds what the readers gave, losslessly: maps of at most 256 different values
as 8 bits and a table. All workers and ranks of a machine read it from one copy in the system's page cache, at one go:
mapping it into memory costs more, page by page. An entry is used only while sizes and modification times of its files
are the noted ones and, when a process first sees it, its checksum holds; else it is written anew. The folder never
grows beyond its bound by more than one entry per process: what does not fit is read from its files, every time.
"""

import hashlib
import json
import logging
import os
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np

logger = logging.getLogger(__name__)
MAGIC = b"mtdpmap2"          # change it where the meaning of an entry changes
SUFFIX = ".maps"
ALIGNMENT = 64               # bytes: where header and maps begin
Maps = dict[str, np.ndarray]


class DecodedCache:
    """A folder of entries, at most `max_bytes` in all."""

    def __init__(self, folder: str | Path, max_bytes: float):
        self.folder, self.max_bytes = Path(folder).expanduser(), max_bytes
        self.verified: set[str] = set()          # entries whose checksum this process has compared
        self.is_open = True                      # whether entries are still added
        self.folder.mkdir(parents=True, exist_ok=True)

    def fetch(self, name: str, files: Sequence[Path], read: Callable[[], dict]) -> dict:
        """What `read()` gives, from the entry `name` where `files` are as they were when it was written."""
        entry = self.folder / (hashlib.sha256(name.encode()).hexdigest()[:32] + SUFFIX)
        stamp = [[str(path), (found := path.stat()).st_size, found.st_mtime_ns] for path in files]
        maps = self._load(entry, stamp)
        if maps is None:
            maps = read()
            if self.is_open:
                self._store(entry, stamp, maps)
        return maps

    def _load(self, entry: Path, stamp: list) -> Maps | None:
        """The maps, or None: no entry, one of other files, or a damaged one."""
        try:
            memory = np.fromfile(entry, np.uint8)
            start = len(MAGIC) + 8
            if memory[:len(MAGIC)].tobytes() != MAGIC:
                return None
            data = start + int.from_bytes(memory[len(MAGIC):start], "little")
            header = json.loads(memory[start:data].tobytes())
            if header["stamp"] != stamp:
                return None
            if entry.name not in self.verified:
                if zlib.crc32(memory[data:]) != header["crc32"]:
                    logger.warning("%s is damaged and is written anew", entry)
                    return None
                self.verified.add(entry.name)
            return {key: _unpacked(memory[data + offset:], *rest) for key, offset, *rest in header["maps"]}
        except (FileNotFoundError, ValueError):            # no entry; an empty or cut one, or no JSON in it
            return None

    def _store(self, entry: Path, stamp: list, maps: Mapping[str, np.ndarray]) -> None:
        rows, parts, offset = [], [], 0
        for key, value in maps.items():
            packed, table = _packed(value)
            rows.append((key, offset, packed.dtype.str, packed.shape, table))
            parts.append(_filled_up(packed.tobytes(), b"\0"))
            offset += len(parts[-1])
        content = b"".join(parts)
        header = json.dumps({"stamp": stamp, "crc32": zlib.crc32(content), "maps": rows}).encode()
        header = _filled_up(header, b" ", len(MAGIC) + 8)
        try:
            used = sum(file.stat().st_size for file in os.scandir(self.folder))
            if used + len(content) + len(header) + 16 > self.max_bytes:
                self._close(f"its bound of {self.max_bytes / 1e9:g} GB is reached")
                return
            handle, temporary = tempfile.mkstemp(dir=self.folder)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(MAGIC + len(header).to_bytes(8, "little") + header + content)
                os.replace(temporary, entry)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
        except OSError as error:
            self._close(str(error))

    def _close(self, reason: str) -> None:
        """No more entries in this process."""
        self.is_open = False
        logger.warning("data cache %s takes no more images (%s): the others are read from their files", self.folder,
                       reason)


def _packed(array: np.ndarray) -> tuple[np.ndarray, list[float] | None]:
    """The array as 8-bit indices and the float32 values they stand for, where it has few values; else itself, None."""
    if array.dtype != np.float32 or array.size == 0:
        return array, None
    table = np.unique(array.reshape(-1)[::17])                   # a guess that the comparison below confirms or not
    for _ in range(2):
        if len(table) > 256:
            return array, None
        index = np.minimum(np.searchsorted(table, array), len(table) - 1)
        if np.array_equal(table[index].view(np.uint32), array.view(np.uint32)):
            return index.astype(np.uint8), [float(value) for value in table]
        table = np.unique(array)
    return array, None


def _filled_up(content: bytes, filling: bytes, before: int = 0) -> bytes:
    """Longer, so that what follows is aligned; `before`: bytes that come first."""
    return content + filling * (-(before + len(content)) % ALIGNMENT)


def _unpacked(memory: np.ndarray, dtype: str, shape: list[int], table: list[float] | None) -> np.ndarray:
    """The map whose bytes `memory` begins with; a view of it where there is no table."""
    stored = memory[:int(np.prod(shape)) * np.dtype(dtype).itemsize].view(dtype).reshape(shape)
    if table is None:
        return stored
    full = np.zeros(256, np.float32)
    full[:len(table)] = table
    return cv2.LUT(stored, full).reshape(shape)
