"""What the machine says of itself, as far as it says it."""

import ctypes
import sys

import torch

try:
    import resource
except ImportError:         # Windows has none
    resource = None


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


def in_words(size: int | float | None) -> str:
    """Bytes as 1.2G or 0.05G; "?" where they are not known."""
    return "?" if size is None else f"{size / 2**30:.{1 if size >= 2**29 else 2}f}G"
