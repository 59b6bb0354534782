"""Models whose parameters lie in parts on all processes (FSDP2): each `DTensor` is a whole of which one holds a part.

In what is saved, tensors are whole, as they are without: files do not tell how a model was spread.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from utils import distributed


def shard(model: nn.Module, blocks: Iterable[nn.Module], device: torch.device) -> None:
    """Leaves 1/processes of every parameter here, in place, on `device`.

    Each block, and what is in none of them, is brought together when it is used, and parted again. Every process must
    hold the same values before, and later use the same blocks in the same order.
    """
    mesh = device_mesh.init_device_mesh(device.type, (distributed.world_size(),))
    for module in [*reversed(list(blocks)), model]:             # what lies inside another block comes first
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` has had it."""
    return isinstance(model, FSDPModule)


def local(tensor: Tensor) -> Tensor:
    """The part of it that lies here; all of an ordinary tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(value: Any, keep: bool) -> Any:
    """Nested containers with whole tensors, those of several processes in host memory; all processes take part.

    keep: whether this process needs them; elsewhere they are None.
    """
    if isinstance(value, DTensor):
        full = value.detach().full_tensor()
        return full.cpu() if keep else None
    if isinstance(value, Mapping):
        return type(value)((key, whole(entry, keep)) for key, entry in value.items())
    return type(value)(whole(entry, keep) for entry in value) if isinstance(value, (list, tuple)) else value


def parted_like(tensor: Tensor, own: Tensor) -> Tensor:
    """A whole tensor, the same on every process, spread as `own` is; one that is spread already stays as it is."""
    if isinstance(tensor, DTensor) or not isinstance(own, DTensor) or tensor.shape != own.shape:
        return tensor
    return distribute_tensor(tensor.to(own.device), own.device_mesh, own.placements, src_data_rank=None)


def norms_of(tensors: list[Tensor], order: float) -> Tensor:
    """The norm of each tensor, (tensors,), the same on every process."""
    parts = [part if part.numel() else part.new_zeros(1) for part in map(local, tensors)]     # few rows, many processes
    norms = torch.stack(torch._foreach_norm(parts, order))
    return distributed.norm_over_ranks(norms, order) if isinstance(tensors[0], DTensor) else norms
