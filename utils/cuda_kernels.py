"""CUDA C++ kernels compiled at run time by NVRTC and launched by the driver, both through `cuda-bindings`, which
PyTorch brings along: no compiler on the machine is needed, and none of CUDA's headers.

Importing this module needs no GPU and no bindings, and compiling needs no GPU.
"""

import ctypes
import functools
import hashlib
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

import torch

from utils.extension import cache_root

logger = logging.getLogger(__name__)


class CudaError(RuntimeError):
    """What NVRTC or the driver answered, in its words."""


@functools.cache
def bindings() -> tuple[ModuleType, ModuleType]:
    """The modules of the driver and of NVRTC. Raises ImportError where they are not installed."""
    from cuda.bindings import driver, nvrtc
    return driver, nvrtc


def compile_kernels(source: Path, headers: Sequence[Path], architecture: str, defines: Mapping[str, object]) -> bytes:
    """The cubin of a .cu file for an architecture like "sm_90", compiled once per machine: it is kept beside torch's
    extensions, under a name that holds a hash of all that it depends on. Raises CudaError with the compiler's log."""
    _, nvrtc = bindings()
    options = [f"--gpu-architecture={architecture}", "--std=c++17", *(f"-D{k}={v}" for k, v in defines.items())]
    about = "\n".join((*options, *map(str, nvrtc.nvrtcVersion()[1:]))).encode()
    name = hashlib.sha256(b"".join(path.read_bytes() for path in (source, *headers)) + about).hexdigest()[:24]
    kept = cache_root() / "mtdp_cuda" / f"{source.stem}_{name}.cubin"
    if kept.exists():
        return kept.read_bytes()
    cubin = _compile(source, headers, architecture, options)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=kept.parent, delete=False) as file:
            file.write(cubin)
        os.replace(file.name, kept)
    except OSError as error:
        logger.info("compiled kernels are not kept: %s", error)
    return cubin


def _compile(source: Path, headers: Sequence[Path], architecture: str, options: list[str]) -> bytes:
    _, nvrtc = bindings()
    texts, names = ([f(path) for path in headers] for f in (Path.read_bytes, lambda path: path.name.encode()))
    program = _checked(nvrtc.nvrtcCreateProgram(source.read_bytes(), source.name.encode(), len(headers), texts, names))
    status, = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
        nvrtc.nvrtcGetProgramLog(program, log)
        text = log.decode().strip(" \0")
        raise CudaError(f"{source.name} for {architecture}: {text}")
    cubin = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
    _checked(nvrtc.nvrtcGetCUBIN(program, cubin))
    _checked(nvrtc.nvrtcDestroyProgram(program))
    return cubin


class Kernel:
    """A kernel that takes one structure as its only argument, loaded for the current device."""

    def __init__(self, cubin: bytes, name: str):
        self.driver, _ = bindings()
        torch.cuda.init()
        torch.cuda.synchronize()  # its context is then the current one
        self.module = _checked(self.driver.cuModuleLoadData(cubin))
        self.function = _checked(self.driver.cuModuleGetFunction(self.module, name.encode()))
        self.success = self.driver.CUresult.CUDA_SUCCESS

    def allow_shared(self, shared_bytes: int) -> None:
        """More than the 48 KiB that any kernel may have."""
        kind = self.driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(self.driver.cuFuncSetAttribute(self.function, kind, shared_bytes))

    def resident_blocks(self, threads: int, shared_bytes: int) -> int:
        """Blocks that one multiprocessor runs at once."""
        return _checked(self.driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(self.function, threads, shared_bytes))

    def launch(self, arguments: bytes, blocks: int, threads: int, shared_bytes: int, barrier: int | None) -> None:
        """On PyTorch's current stream. With the address of a counter, which is set to zero before, all blocks run at
        once and may wait for each other."""
        buffer = ctypes.create_string_buffer(arguments, len(arguments))
        pointer = ctypes.c_void_p(ctypes.addressof(buffer))
        stream = torch.cuda.current_stream().cuda_stream
        shape = blocks, 1, 1, threads, 1, 1, shared_bytes, stream, ctypes.addressof(pointer)
        if barrier is None:
            status, = self.driver.cuLaunchKernel(self.function, *shape, 0)
        else:
            status, = self.driver.cuMemsetD32Async(barrier, 0, 1, stream)
            if status == self.success:
                status, = self.driver.cuLaunchCooperativeKernel(self.function, *shape)
        if status != self.success:
            _checked((status,))


def _checked(result: tuple):
    """The value behind the status of a call. Raises CudaError where it failed."""
    status, *values = result
    if int(status):
        raise CudaError(f"{type(status).__name__}: {status.name}")
    return values[0] if values else None
