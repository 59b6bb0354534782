"""Files that are there as a whole or not at all."""

import contextlib
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)     # of file systems that cannot


class WriteError(OSError):
    """A file could not be written: one sentence with the file and the cause; `errno` is the system's."""


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Gives an empty file with a name of its own in the same folder; on success renames it to `path`, else removes it.

    The folder is made where it is not there. A failure to write is a `WriteError`.
    """
    path = Path(path)
    with names_the_file(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))     # never through a link
    try:
        with names_the_file(path):
            yield temporary
            _sync(temporary)                    # the rename must not reach the disk before the content
            os.replace(temporary, path)
            sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):      # a disk that has turned read-only lets nothing go; the cause is told
            temporary.unlink(missing_ok=True)
        raise


def leftovers(folder: Path) -> list[Path]:
    """Files that an interrupted `atomic_path` left in a folder."""
    return sorted(folder.glob(".*.tmp"))


def write_text(path: Path, text: str) -> None:
    """Writes a text file, all of it or nothing."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on the disk."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except PermissionError:                     # Windows opens no folders
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def names_the_file(path: Path) -> Iterator[None]:
    """An OSError inside becomes a `WriteError` that names this file."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        told = WriteError(f"cannot write {path}: {error.strerror or error}")
        told.errno = error.errno
        raise told from error


@contextlib.contextmanager
def whole_or_none(path: Path) -> Iterator[None]:
    """Around the writing of a file: as `names_the_file`, and where it fails nothing is left of the file."""
    try:
        with names_the_file(path):
            yield
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        raise


def _sync(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
