"""Builds our C++ sources with the machine's compiler on first use, once per machine and PyTorch version.

Nothing is compiled at install time and nothing has to be: every compiled routine has a twin in PyTorch or SciPy that
runs where there is no compiler. The build lies in torch's extension cache, in a folder whose name holds a hash of
the sources, the flags, the PyTorch version and the processor's features, because `-march=native` code of one
machine may not run on another that shares the home directory.
"""

import functools
import hashlib
import logging
import os
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch

log = logging.getLogger(__name__)

FLAGS = ("-O3", "-march=native", "-fopenmp", "-std=c++17")


@functools.cache
def load_extension(name: str, sources: Sequence[Path]) -> tuple[ModuleType | None, str]:
    """The compiled module and "", or None and the reason why there is none (one clause, for a log line).

    `name` is the Python module's; `sources` a tuple of .cpp files, which register themselves with TORCH_LIBRARY or
    PYBIND11_MODULE. NO_CPP=1 in the environment switches all compiled routines off.
    """
    if os.environ.get("NO_CPP") == "1":
        return None, "NO_CPP=1 is set"
    compiler = os.environ.get("CXX", "c++")
    for tool in (compiler, "ninja"):
        if shutil.which(tool) is None and not (tool == "ninja" and _bundled_ninja()):
            return None, f"'{tool}' was not found"
    from torch.utils import cpp_extension
    fingerprint = hashlib.sha256()
    for source in sources:
        fingerprint.update(source.read_bytes())
    fingerprint.update("\n".join((*FLAGS, torch.__version__, platform.python_version(), _processor())).encode())
    tagged = f"{name}_{fingerprint.hexdigest()[:12]}"
    folder = Path(cpp_extension.get_default_build_root()) / tagged
    folder.mkdir(parents=True, exist_ok=True)
    if not any(folder.glob("*.so")):
        log.info("compiling %s with %s (once, about a minute)", ", ".join(s.name for s in sources), compiler)
    try:
        module = cpp_extension.load(tagged, [str(s) for s in sources], build_directory=str(folder),
                                    extra_cflags=list(FLAGS), extra_ldflags=["-fopenmp"])
    except (RuntimeError, OSError, ImportError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        return None, f"compiling failed ({lines[0] if lines else type(error).__name__}; log in {folder})"
    return module, ""


def _bundled_ninja() -> bool:
    """Puts the pip package's ninja on PATH; it lies beside the interpreter, which need not be on PATH."""
    import sys
    beside = Path(sys.executable).parent
    if (beside / "ninja").exists():
        os.environ["PATH"] = f"{beside}{os.pathsep}{os.environ.get('PATH', '')}"
        return True
    return False


def _processor() -> str:
    """The instruction sets of this machine, as far as the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        flags = [line for line in cpuinfo.read_text().splitlines() if line.startswith(("flags", "Features"))]
        return flags[0] if flags else platform.processor()
    return platform.processor()
