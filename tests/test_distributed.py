"""What `utils.distributed` promises, alone and in two processes over gloo. Imports little: children import it again."""

import socket
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from utils import distributed


def _in_two(rank: int, port: int, folder: str) -> None:
    """One of two processes; an assertion that fails here fails the test."""
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2,
                            timeout=timedelta(minutes=5))
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (rank, 2, rank == 0)
    mine = torch.tensor([1.0 + 2 * rank, 10.0])
    assert distributed.mean_over_ranks(mine).tolist() == [2.0, 10.0]
    assert mine.tolist() == [1.0 + 2 * rank, 10.0]                             # a copy is reduced
    assert distributed.gather_objects({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
    order = Path(folder) / "order"
    with distributed.main_first(), order.open("a") as file:
        time.sleep(0.0 if rank else 0.5)                                       # the other would be faster
        file.write(f"{rank} ")
    distributed.barrier()
    assert order.read_text() == "0 1 "
    dist.destroy_process_group()


def test_two_processes_agree(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_in_two, (port, str(tmp_path)), nprocs=2)


def test_alone_everything_is_local(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with distributed.process_group(torch.device("cpu")):
        assert not dist.is_initialized()
        assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
        value = torch.tensor(3.0)
        assert distributed.mean_over_ranks(value).item() == 3.0 and distributed.gather_objects(5) == [5]
        with distributed.main_first():
            distributed.barrier()


@pytest.mark.parametrize("wanted, found, local_rank, expected", [
    ("auto", 0, None, "cpu"), ("cpu", 2, "1", "cpu"), ("auto", 2, None, "cuda:0"), ("auto", 2, "1", "cuda:1"),
    ("cuda", 2, "1", "cuda:1"), ("auto", 2, "2", "local rank 2 needs its own GPU, but this machine has 2"),
    ("cuda", 0, None, "finds no CUDA device"),
])
def test_every_process_has_its_own_device(monkeypatch, wanted, found, local_rank, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: found)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    if " " in expected:
        with pytest.raises(ValueError, match=expected):
            distributed.pick_device(wanted)
    else:
        assert distributed.pick_device(wanted) == torch.device(expected)
