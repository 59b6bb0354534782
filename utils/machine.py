"""What the machine says of itself, as far as it says it."""

import ctypes
import subprocess
import sys
from pathlib import Path

import torch

try:
    import resource
except ImportError:         # Windows has none
    resource = None

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4       # of mallopt, from malloc.h


def peak_memory(device: torch.device) -> int | None:
    """Bytes that this process has had at most: on a GPU its tensors there, else all of it. None: not known here."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def release_freed_memory() -> None:
    """Gives memory that this process has freed back to the system, where the C library (glibc) would keep it."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None:
        trim(0)


def keep_freed_memory() -> None:
    """Leaves freed memory with this process, where the C library is glibc. It gives maps of more than 32 MiB back to
    the system each time, which clears every page of them before they can be written again."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def cpu_info() -> dict[str, str]:
    """What the system tells of the first processor ("vendor_id", "model name", "flags"); empty where it does not."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().split("\n\n")[0].splitlines() if file.exists() else []
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}


def git_hash() -> str | None:
    """The commit of this code, or None outside a git checkout."""
    where = Path(__file__).resolve().parent
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=where, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None


def in_words(size: int | float | None) -> str:
    """Bytes as 1.2G or 0.05G; "?" where they are not known."""
    return "?" if size is None else f"{size / 2**30:.{1 if size >= 2**29 else 2}f}G"
