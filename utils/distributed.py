"""Processes and devices: one place that knows about ranks. Nothing happens at import.

Works alone, under `torchrun` and under `python -m torch.distributed.launch` (both set RANK, WORLD_SIZE and
LOCAL_RANK; the latter also passes --local-rank, which main.py accepts). NCCL on CUDA, gloo on CPU.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from utils.exits import ToldElsewhere

Value = TypeVar("Value")
LOST = "another process of the run has ended or cannot be reached"
TIMEOUT = timedelta(minutes=30)     # every rank evaluates its share, so none waits for long


def rank() -> int:
    """Number of this process, 0 when alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 when alone."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process prints and writes files."""
    return rank() == 0


def barrier() -> None:
    """Waits for all processes."""
    if dist.is_initialized():
        dist.barrier()


def launched() -> bool:
    """Whether a launcher started this process, alone or with others."""
    return "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("WORLD_SIZE", 1)) > 1


def attempt() -> int:
    """How often torchrun has restarted the processes (`--max-restarts`)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def from_main(function: Callable[[], Value]) -> Value:
    """What `function` returns on rank 0, on every rank. Its error is raised there, a `ToldElsewhere` on the others."""
    value, error = None, None
    if is_main():
        try:
            value = function()
        except Exception as caught:             # raised below, once the others know
            error = caught
    if dist.is_initialized():
        outcome = [value, None if error is None else str(error)]
        dist.broadcast_object_list(outcome, src=0)
        value = outcome[0]
        if outcome[1] is not None and error is None:
            raise ToldElsewhere(outcome[1])
    if error is not None:
        raise error
    return value


@contextmanager
def main_first() -> Iterator[None]:
    """Rank 0 goes through the block before the others enter it."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum of a CPU tensor over all processes, the same on each; every process takes part."""
    if not dist.is_initialized():
        return values
    summed = values.to("cuda" if dist.get_backend() == "nccl" else "cpu", copy=True)
    dist.all_reduce(summed)
    return summed.cpu()


def mean_over_ranks(values: Tensor) -> Tensor:
    """Mean of a tensor over all processes (the same on each)."""
    if dist.is_initialized():
        values = values.clone()
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def norm_over_ranks(norms: Tensor, order: float) -> Tensor:
    """Norms of tensors of which every process holds a part, from those of the parts."""
    highest = order == float("inf")
    summed = norms if highest else norms.double() ** order
    dist.all_reduce(summed, dist.ReduceOp.MAX if highest else dist.ReduceOp.SUM)
    return summed if highest else (summed ** (1 / order)).to(norms.dtype)


def true_everywhere(flag: Tensor) -> Tensor:
    """Whether a 0-dim flag is true on all processes, the same on each; the host does not wait for it."""
    if not dist.is_initialized():
        return flag
    lowest = flag.to(torch.float32)
    dist.all_reduce(lowest, dist.ReduceOp.MIN)
    return lowest > 0


def average_gradients(parameters: Iterable[Parameter]) -> None:
    """Replaces each gradient by its mean over all processes; every process holds the same parameters."""
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad = mean_over_ranks(parameter.grad)


def copy_from_main(tensors: Iterable[Tensor]) -> None:
    """Gives tensors of every process the values that they have on rank 0, in place."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def gather_objects(item: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """One picklable object from every process, in rank order, on every process; `group`: over which they meet."""
    if not dist.is_initialized():
        return [item]
    items: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(items, item, group=group)
    return items


def pick_device(wanted: str) -> torch.device:
    """The device for `device: auto|cpu|cuda`; asking for CUDA where there is none is a ValueError."""
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("device: cuda was asked for, but PyTorch finds no CUDA device; use device=cpu or device=auto")
    local_rank, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if local_rank >= count:
        raise ValueError(f"local rank {local_rank} needs its own GPU, but this machine has {count}; "
                         f"start at most {count} processes here (--nproc_per_node {count})")
    return torch.device("cuda", local_rank)


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Joins the launcher's process group for the duration; does nothing without a launcher.

    The launcher's store outlives a restart of the processes: every attempt has keys of its own there.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store, rank_, world = next(dist.rendezvous("env://", timeout=TIMEOUT))
    store.set_timeout(TIMEOUT)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT, rank=rank_, world_size=world,
                            store=dist.PrefixStore(f"attempt_{attempt()}", store),
                            device_id=device if device.type == "cuda" else None)
    try:
        yield
    except RuntimeError as error:
        if not lost_another(error):
            raise
        # The one that has gone has told why, or somebody has ended it; of the others one speaks.
        raise (ConnectionError if is_main() else ToldElsewhere)(LOST) from error
    finally:
        dist.destroy_process_group()


def lost_another(error: Exception) -> bool:
    """Whether an error says that another process has gone."""
    return dist.is_initialized() and (isinstance(error, dist.DistError) or
                                      (isinstance(error, RuntimeError) and "gloo" in str(error)))
