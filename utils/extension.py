"""Builds our C++ sources with the machine's compiler on first use, once per machine and PyTorch version.

Nothing is compiled at install time and nothing has to be: every compiled routine has a twin in PyTorch or SciPy that
runs where there is no compiler. The build lies in torch's extension cache, in a folder whose name holds a hash of
the sources, the flags, the PyTorch version and the processor's features, because `-march=native` code of one
machine may not run on another that shares the home directory.

Torch's own loader marks a running build by a lock file that survives an interrupted process, and every later process
waits for it forever. Here the processes of a machine queue up at a lock that the system releases when its holder
dies; whoever holds it may remove torch's. A build counts only once its "complete" mark is written.
"""

import functools
import hashlib
import importlib.util
import logging
import os
import platform
import shutil
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch

from utils.machine import cpu_info

logger = logging.getLogger(__name__)

FLAGS = ("-O3", "-march=native", "-fopenmp", "-std=c++17")
LDFLAGS = ("-fopenmp",)  # without OpenMP at::parallel_for runs on one thread
COMPLETE = "complete"


@functools.cache
def load_extension(name: str, sources: Sequence[Path]) -> tuple[ModuleType | None, str]:
    """The compiled module and "", or None and the reason why there is none (one clause, for a log line).

    `sources` is a tuple of .cpp files, which are compiled, and .h files, which belong to them. They define a
    Python module with PYBIND11_MODULE(TORCH_EXTENSION_NAME, ..), or operators with TORCH_LIBRARY; then
    `torch.ops` is returned. NO_CPP=1 in the environment switches all compiled routines off.
    """
    if os.environ.get("NO_CPP") == "1":
        return None, "NO_CPP=1 is set"
    code, compiler = b"".join(source.read_bytes() for source in sources), os.environ.get("CXX", "c++")
    about = "\n".join((*FLAGS, compiler, torch.__version__, platform.python_version(), _processor()))
    tagged = f"{name}_{hashlib.sha256(code + about.encode()).hexdigest()[:12]}"
    folder = cache_root() / tagged
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if reason := untrusted(folder):
            return None, reason
        with _only_process(folder):
            if not (folder / COMPLETE).exists() and (reason := _build(tagged, sources, folder, compiler)):
                return None, reason
        return _load(tagged, folder / f"{tagged}.so", b"PYBIND11_MODULE" in code), ""
    except (OSError, ImportError) as error:
        return None, f"no usable library in {folder}: {first_line(error)}"


def untrusted(folder: Path) -> str:
    """Why code in a folder may be another user's: whose it is, or who can write there; or nothing."""
    if not hasattr(os, "getuid"):               # Windows
        return ""
    folder = folder.resolve()
    if folder.stat().st_uid not in (0, os.getuid()):
        return f"{folder} belongs to another user; set TORCH_EXTENSIONS_DIR to a folder of yours"
    for place in (folder, *folder.parents):
        found = place.stat()
        sticky = found.st_mode & stat.S_ISVTX and place != folder       # there nobody renames others' files
        if found.st_mode & stat.S_IWOTH and not sticky:
            return f"everybody can write into {place}; set TORCH_EXTENSIONS_DIR to a folder of yours"
    return ""


def _build(tagged: str, sources: Sequence[Path], folder: Path, compiler: str) -> str:
    """Compiles into `folder`; returns why it did not work, or nothing."""
    if shutil.which(compiler) is None:
        return f"the compiler '{compiler}' was not found"
    if not _find_ninja():
        return "'ninja' was not found"
    noisy = logging.getLogger("torch.utils.cpp_extension")  # speaks of CUDA, which no source of ours needs
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    start = time.perf_counter()
    files = [str(source) for source in sources if source.suffix == ".cpp"]
    logger.info("compiling %s (once on this machine)", ", ".join(Path(file).name for file in files))
    try:
        from torch.utils import cpp_extension
        for leftover in (*folder.glob("*.so"), folder / "lock"):
            leftover.unlink(missing_ok=True)
        cpp_extension.JIT_EXTENSION_VERSIONER.entries.pop(tagged, None)  # an interrupted build would count as done
        cpp_extension.load(tagged, files, build_directory=str(folder), extra_cflags=list(FLAGS),
                           extra_ldflags=list(LDFLAGS), is_python_module=False, is_standalone=False)
    except RuntimeError as error:
        lines = (line for line in str(error).splitlines() if "error" in line and "Error building" not in line)
        return f"compiling failed: {next(lines, first_line(error))}"
    finally:
        noisy.setLevel(level)
    (folder / COMPLETE).touch()
    logger.info("compiled in %.0f s", time.perf_counter() - start)
    return ""


def _load(tagged: str, library: Path, is_module: bool) -> ModuleType:
    if not is_module:
        torch.ops.load_library(library)
        return torch.ops
    spec = importlib.util.spec_from_file_location(tagged, library)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def _only_process(folder: Path) -> Iterator[None]:
    """Waits until no other process of this machine is inside for the same folder."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system; two processes may then compile the same file twice
        yield
        return
    with open(folder / "queue", "w", encoding="ascii") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def cache_root() -> Path:
    """Where torch keeps extensions: TORCH_EXTENSIONS_DIR, or the user's cache folder."""
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    cache = os.environ.get("XDG_CACHE_HOME", "~/.cache")
    return Path(given or Path(cache) / "torch_extensions").expanduser()


def _find_ninja() -> bool:
    """Is ninja on PATH? That of the pip package, beside the interpreter, is put there."""
    beside = Path(sys.executable).parent
    if shutil.which("ninja") is None and (beside / "ninja").exists():
        os.environ["PATH"] = f"{beside}{os.pathsep}{os.environ.get('PATH', '')}"
    return shutil.which("ninja") is not None


def _processor() -> str:
    """The instruction sets of this machine, as far as the system tells."""
    about = cpu_info()
    return about.get("flags") or about.get("Features") or platform.processor()


def first_line(error: Exception) -> str:
    """Of its message, or its type: for a log line that says why something cannot run."""
    return (str(error).splitlines() or [type(error).__name__])[0]
