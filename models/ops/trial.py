"""One trial of kernels that were compiled for this machine, where no setting of the caller is seen.

The first call of a process is usually deep inside a model: under autocast, without gradients, in a mode that counts or
fakes operations. None of this may decide whether kernels are right, and all of it belongs to a thread: so a trial has a
thread of its own. What is right is computed in float64 on the CPU, which no setting of a GPU changes.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

from utils.extension import first_line


def try_out(kernels: str, device: torch.device, trial: Callable[[], str | None]) -> str | None:
    """What `trial` finds wrong, or how it fails; None: nothing. kernels: which, in words.

    Raises RuntimeError while a CUDA graph is captured: a trial waits for its results.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(f"the kernels of {kernels} are tried once before their first use, which cannot happen "
                           "inside the capture of a CUDA graph: run the model once before it is captured")
    with ThreadPoolExecutor(max_workers=1) as thread:
        try:
            return thread.submit(trial).result()
        except Exception as error:  # compilers and drivers fail in many ways; whichever it was, it is said
            return f"their trial failed: {type(error).__name__}: {first_line(error)}"
