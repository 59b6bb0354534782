"""File systems of their own, small enough to be filled and broken: what root may mount. Others get an OSError."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SMALLEST_BTRFS = 120            # MiB; it refuses less


def as_root(*command: str) -> str:
    """Runs a command of the system; an OSError with its words where it is not there or fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


@contextmanager
def memory_disk(path: Path, mebibytes: int) -> Iterator[None]:
    """A disk in memory at `path`."""
    with _mounted(path, "-t", "tmpfs", "-o", f"size={mebibytes}m", "tmpfs"):
        yield


@contextmanager
def failing_disk(path: Path, image: Path, mebibytes: int) -> Iterator[Path]:
    """An ext4 disk at `path` that turns read-only at an error; writing to the file it yields is such an error."""
    _image(image, mebibytes)
    as_root("mkfs.ext4", "-q", "-F", str(image))
    with _mounted(path, "-o", "loop,errors=remount-ro", str(image)):
        device = as_root("findmnt", "-n", "-o", "SOURCE", str(path)).strip()
        yield Path("/sys/fs/ext4") / Path(device).name / "trigger_fs_error"


@contextmanager
def disk_with_quota(path: Path, image: Path) -> Iterator[Path]:
    """A btrfs disk at `path`; `set_quota` limits the folder that it yields."""
    _image(image, SMALLEST_BTRFS)
    as_root("mkfs.btrfs", "-q", "-f", str(image))
    with _mounted(path, "-o", "loop", str(image)):
        as_root("btrfs", "quota", "enable", str(path))
        as_root("btrfs", "subvolume", "create", str(path / "limited"))
        yield path / "limited"


def set_quota(folder: Path, mebibytes: int) -> None:
    """So much may lie in a folder of `disk_with_quota`."""
    as_root("btrfs", "qgroup", "limit", f"{mebibytes}M", str(folder))


def _image(path: Path, mebibytes: int) -> None:
    with open(path, "wb") as file:
        file.truncate(mebibytes * 2**20)


@contextmanager
def _mounted(path: Path, *arguments: str) -> Iterator[None]:
    path.mkdir(parents=True, exist_ok=True)
    as_root("mount", *arguments, str(path))
    try:
        yield
    finally:
        as_root("umount", "-l", str(path))
