"""Batches in memory that is used again: they say what they would without it, as long as anybody looks at them."""

import gc
import itertools
import os
import pickle
from collections import namedtuple

import numpy as np
import pytest
import torch

from data.labels import stack
from data.lending import BLOCKS, IN_USE, LentMemory, _arrive, room
from data.workers import Loader

Boxes = namedtuple("Boxes", "size place")


class Counting(torch.utils.data.Dataset):
    """Sample i is full of i; later ones are larger."""

    def __init__(self, number: int = 60):
        self.number = number

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((3, 40 + index // 20, 50), float(index))


def collate(samples: list) -> dict:
    """Of every kind that a batch may have."""
    number = int(samples[0][0, 0, 0])
    return {"image": stack(samples), "flipped": samples[0].flip(-1).transpose(0, 1), "none": torch.empty(0, 4),
            "codes": torch.arange(5, dtype=torch.uint8) + number, "yes": torch.tensor([True, number % 2 == 0]),
            "boxes": [Boxes(torch.full((number % 3, 3), number, dtype=torch.float64), torch.tensor(number))],
            "other": torch.nn.Parameter(torch.full((2,), float(number))),
            "meta": [{"name": str(number), "array": np.full(3, number)}]}


def loader(workers: int = 1, start: str = "fork", number: int = 60) -> Loader:
    return Loader(Counting(number), collate, workers, batch_size=2, multiprocessing_context=start if workers else None)


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return type(a) is type(b) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return np.array_equal(a, b)


@pytest.mark.parametrize(("start", "workers"), [("fork", 2), ("spawn", 1)])
def test_batches_are_those_of_no_worker(start, workers):
    wanted, taken = list(loader(0)), loader(workers, start)
    for _ in range(2):                                                   # epochs of the same workers
        found = 0
        for batch, other in zip(taken, wanted, strict=True):
            assert same(batch, other)
            found += 1
        assert found == 30


def test_whoever_keeps_a_part_of_a_batch_keeps_its_content():
    kept, numbers = [], range(0, 60, 2)
    for batch, number in zip(loader(), numbers, strict=True):
        part = (batch["image"][1, :, 3:5], batch["image"].numpy()[0, 0], batch["image"].reshape(-1)[-1:],
                torch.utils.dlpack.from_dlpack(batch["codes"]), batch)[number // 2 % 5]
        kept.append((part, pickle.dumps(part)))
        del batch, part
    for part, content in kept:
        again = pickle.loads(content)
        assert same(part, again) if isinstance(part, (torch.Tensor, dict)) else np.array_equal(part, again)


def test_a_graph_keeps_what_it_needs():
    batches = iter(loader(number=60))
    weight = torch.ones((), requires_grad=True)
    loss = (next(batches)["image"] * weight).sum()                       # saved for the gradient, and nowhere else
    for _ in batches:
        pass
    loss.backward()
    assert weight.grad == 40 * 50 * 3


def test_memory_is_used_again():
    """Two made ahead and one or two in the run's hands: no further block is touched, whatever the number of batches."""
    taken, addresses = loader(), set()
    for _ in range(3):
        for batch in taken:
            addresses.add(batch["image"].untyped_storage().data_ptr())
            del batch
        memory = taken.collate_fn.memory
        assert 0 < len(memory.blocks) <= 4 and not (memory.states == IN_USE).any()
    assert len(addresses) <= 4 * 9  # of 90: a block grows when a larger batch comes, of three images and three boxes


def test_who_collects_more_than_there_are_blocks_gets_them_all_the_same():
    taken = loader()
    everything = list(taken)
    memory = taken.collate_fn.memory
    assert (memory.states == IN_USE).all() and len(memory.blocks) == BLOCKS
    assert all(map(same, everything, loader(0)))
    everything.clear()
    gc.collect()
    assert not (memory.states == IN_USE).any()
    assert all(map(same, taken, loader(0)))


def test_an_epoch_that_is_left_gives_its_blocks_back():
    taken = loader(workers=2)
    for _ in range(6):
        first = list(itertools.islice(taken, 2))
        assert same(first[1], list(itertools.islice(loader(0), 2))[1])
        del first
    for batch in taken:
        del batch
    assert not (taken.collate_fn.memory.states == IN_USE).any()


def test_another_process_gives_nothing_back():
    taken = loader()
    batch = next(iter(taken))
    in_use = taken.collate_fn.memory.states.clone()
    child = os.fork()
    if child == 0:
        del batch
        gc.collect()
        os._exit(0)
    os.waitpid(child, 0)
    assert in_use.any() and (taken.collate_fn.memory.states >= in_use).all()
    assert same(batch, next(iter(loader(0))))


def refuse_odd(samples: list) -> torch.Tensor:
    if int(samples[0][0, 0, 0]) % 4:
        raise ValueError("odd")
    return stack(samples)


def test_a_batch_that_cannot_be_made_costs_no_block():
    taken = Loader(Counting(), refuse_odd, 1, batch_size=2)
    for _ in range(2 * BLOCKS):
        batches = iter(taken)
        assert next(batches)[0, 0, 0, 0] == 0
        with pytest.raises(ValueError, match="odd"):
            next(batches)
    assert not (taken.collate_fn.memory.states == IN_USE).all()             # but for what was made ahead


def test_new_workers_have_blocks_of_their_own():
    taken = loader()
    kept = next(iter(taken))
    for _ in range(BLOCKS):                              # what was under way to the run gets lost
        taken.close()
        assert same(next(iter(taken)), kept)
    memory = taken.collate_fn.memory
    for batch in taken:
        del batch
    assert not (memory.states == IN_USE).any() and same(kept, next(iter(loader(0))))


def test_batches_of_a_loader_that_is_gone():
    """Its iterator needs it no more, and what it gave stays."""
    batches = iter(loader())
    first = next(batches)
    gc.collect()
    assert all(same(batch, other) for batch, other in zip([first, *batches], loader(0), strict=True))
    memory = LentMemory(1)
    name = memory.name
    del memory
    gc.collect()
    assert _arrive(name, (0, 0), b"", [], None) is None


def test_without_a_worker_there_is_room_on_the_heap():
    assert room((2, 3), torch.float16).shape == (2, 3) and not room((1,), torch.uint8).is_shared()
