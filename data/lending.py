"""Batches travel from a worker to the run in shared memory that is used again and again.

PyTorch's workers put every tensor of every batch into new shared memory: the system zeroes and maps its pages one after
the other, on both sides, which takes as long as half of what a worker does to an image. Here each worker has a few
blocks, each of which holds a whole batch. The run keeps them mapped, and a block is free again when the last tensor or
array that shows any part of its batch is gone: whoever keeps a batch, or a piece of one, keeps its content.

Where all blocks of a worker are in use (somebody collects batches) its batches travel as PyTorch sends them.
"""

import io
import os
import pickle
import uuid
import weakref
from collections.abc import Callable, Sequence
from math import prod
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

BLOCKS = 8          # of a worker at most: two batches made ahead, and those that the run holds
ALIGNMENT = 64      # bytes: a line of the processor's cache
FREE, IN_USE = 0, 1

Layout = list[tuple[int, torch.dtype, torch.Size]]        # of the tensors in a block: first byte, type, shape
Place = tuple[int, int]                                   # worker, and which of its blocks


class LentMemory:
    """The blocks of a loader's workers: as the run keeps them; in a worker its own.

    states: (workers, BLOCKS) uint8 in shared memory. A worker writes IN_USE and then the block; the run writes FREE
    when nobody reads it any more.
    """

    def __init__(self, num_workers: int):
        self.name = uuid.uuid4().hex
        self.states = torch.full((num_workers, BLOCKS), FREE, dtype=torch.uint8).share_memory_()
        self.blocks: dict[Place, Tensor] = {}
        _MEMORIES[self.name] = self

    def __getstate__(self) -> dict:
        return {"name": self.name, "states": self.states, "blocks": {}}

    def open(self, place: Place, packed: bytes, layout: Layout, block: Tensor | None) -> Any:
        """The batch in a block; `block` where it is a new one."""
        if block is not None:
            self.blocks[place] = block
        lent = self.blocks[place].numpy()[:]             # an array of its own, to which all tensors of the batch refer
        weakref.finalize(lent, _give_back, self.states.numpy(), place, os.getpid()).atexit = False
        memory = torch.from_numpy(lent)
        return _Unpacker(packed, [_part(memory, *row) for row in layout]).load()

    def lend(self, worker: int) -> int | None:
        """Which of the worker's blocks it may use now; None: somebody reads each of them."""
        states = self.states[worker].numpy()
        free = np.flatnonzero(states == FREE)
        if not free.size:
            return None
        states[free[0]] = IN_USE
        return int(free[0])


def _give_back(states: np.ndarray, place: Place, owner: int) -> None:
    if os.getpid() == owner:            # not in a process that was forked from the run, which may still read it
        states[place] = FREE


_MEMORIES: weakref.WeakValueDictionary[str, LentMemory] = weakref.WeakValueDictionary()      # of this process, by name


class Sender:
    """Collates samples, in a worker into a block that is free."""

    def __init__(self, collate: Callable[[list], Any], memory: LentMemory):
        self.collate, self.memory = collate, memory

    def __call__(self, samples: list) -> Any:
        worker = get_worker_info().id
        number = self.memory.lend(worker)
        if number is None:
            return self.collate(samples)
        place = worker, number
        old = self.memory.blocks.get(place)
        try:
            with _Filling(torch.empty(0, dtype=torch.uint8) if old is None else old) as filling:
                packed, layout = filling.pack(self.collate(samples))
        except BaseException:
            self.memory.states[place] = FREE
            raise
        self.memory.blocks[place] = new = filling.memory
        return _Parcel((self.memory.name, place, packed, layout, None if new is old else new))


class _Parcel:
    """A batch on its way; it arrives as the batch itself."""

    def __init__(self, content: tuple):
        self.content = content

    def __reduce__(self) -> tuple:
        return _arrive, self.content


def _arrive(name: str, *content: Any) -> Any:
    memory = _MEMORIES.get(name)
    return None if memory is None else memory.open(*content)          # None: the loader is gone, nobody takes it


class _Filling:
    """A block while a worker collates into it: the context in which `room` gives of it."""

    now: "_Filling | None" = None

    def __init__(self, memory: Tensor):
        self.memory, self.used = memory, 0

    def __enter__(self) -> "_Filling":
        _Filling.now = self
        return self

    def __exit__(self, *error: object) -> None:
        _Filling.now = None

    def take(self, size: int) -> int | None:
        """The first of `size` bytes that nobody has taken; None: there are not as many."""
        start, end = self.used, self.used + _aligned(size)
        if end > len(self.memory):
            return None
        self.used = end
        return start

    def pack(self, batch: Any) -> tuple[bytes, Layout]:
        """Puts all tensors of the batch into the block, a larger one if they need it; the rest, and where they are."""
        packer = _Packer(io.BytesIO())
        packer.dump(batch)
        if self.used + sum(_aligned(t.nbytes) for t in packer.tensors if self._start(t) is None) > len(self.memory):
            size = sum(_aligned(t.nbytes) for t in packer.tensors)
            self.memory, self.used = torch.empty(size, dtype=torch.uint8).share_memory_(), 0
        return packer.file.getvalue(), [(self._put(t), t.dtype, t.shape) for t in packer.tensors]

    def _put(self, tensor: Tensor) -> int:
        """The first byte of the tensor in the block, into which it is copied unless it is there already."""
        start = self._start(tensor)
        if start is None:
            start = self.take(tensor.nbytes)
            _part(self.memory, start, tensor.dtype, tensor.shape).copy_(tensor)
        return start

    def _start(self, tensor: Tensor) -> int | None:
        start = tensor.data_ptr() - self.memory.data_ptr()
        inside = 0 <= start <= start + tensor.nbytes <= len(self.memory)
        return start if inside and tensor.is_contiguous() else None


def room(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An empty tensor for a batch: in a worker, while there is space, in the block that the batch travels in."""
    filling = _Filling.now
    start = None if filling is None else filling.take(prod(shape) * dtype.itemsize)
    return torch.empty(shape, dtype=dtype) if start is None else _part(filling.memory, start, dtype, shape)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _part(memory: Tensor, start: int, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """A tensor in a block."""
    return memory[start:start + prod(shape) * dtype.itemsize].view(dtype).view(shape)


class _Packer(ForkingPickler):
    """Leaves out plain tensors: `tensors` has them, in their order."""

    def __init__(self, file: io.BytesIO):
        super().__init__(file)
        self.file, self.tensors = file, []

    def persistent_id(self, value: Any) -> int | None:
        plain = type(value) is Tensor and value.layout is torch.strided and value.device.type == "cpu"
        if not plain or value.requires_grad:
            return None
        self.tensors.append(value)
        return len(self.tensors) - 1


class _Unpacker(pickle.Unpickler):
    """Puts tensors where they were left out."""

    def __init__(self, packed: bytes, tensors: list[Tensor]):
        super().__init__(io.BytesIO(packed))
        self.tensors = tensors

    def persistent_load(self, index: int) -> Tensor:
        return self.tensors[index]
