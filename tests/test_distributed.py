"""Processes and devices: what two gloo processes see, what one process sees alone, and which device a rank gets."""

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from evaluation.boundary.evaluator import BoundaryEvaluator
from evaluation.boundary.settings import BoundarySettings, BoundaryTruth
from evaluation.boundary.source import TruthSource
from tests.processes import on_ranks
from utils import distributed

CPU = torch.device("cpu")
LINE = np.zeros((20, 24), np.uint8)
LINE[:, 12] = 255


def read_line(path: Path) -> np.ndarray:
    return LINE


def benchmark_of(images: int) -> BoundaryEvaluator:
    """The boundary score after so many perfect predictions."""
    source = TruthSource(Path(), BoundaryTruth(("x",), read_line, "boundary", 0.02), 3)
    benchmark = BoundaryEvaluator(source, BoundarySettings(protocol="plain", workers=0))
    for i in range(images):
        benchmark.update(torch.from_numpy(LINE / 255).float()[None, None], None,
                         [{"name": f"im{i}", "size": LINE.shape}])
    return benchmark


def _process(rank: int, folder: Path) -> None:
    """Writes down what this rank of two sees; rank 0 is late wherever the order must not depend on luck."""
    seen, times = {}, {}
    with distributed.process_group(CPU):
        seen["who"] = [distributed.rank(), distributed.world_size(), distributed.is_main(), dist.get_backend()]
        values = torch.tensor([1.0 + rank, 10.0 * rank])
        seen["mean"], seen["kept"] = distributed.mean_over_ranks(values).tolist(), values.tolist()
        seen["agreed"] = [distributed.true_everywhere(torch.tensor(flag)).item() for flag in (True, rank == 0, False)]
        seen["gathered"] = distributed.gather_objects({"rank": rank})
        with distributed.main_first():
            times["entered"] = time.time()
            time.sleep(0.3 if rank == 0 else 0)
            times["left"] = time.time()
        if rank == 0:
            time.sleep(0.3)
            times["before"] = time.time()
        distributed.barrier()
        times["after"] = time.time()
        benchmark = benchmark_of(2 - rank)
        benchmark.reduce()
        seen["boundary"] = [benchmark.totals.counts.tolist(), benchmark.totals.best.tolist(), benchmark.totals.images]
    seen["closed"] = not dist.is_initialized()
    (folder / f"{rank}.json").write_text(json.dumps({"seen": seen, "times": times}))


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("two")
    on_ranks(_process, 2, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def test_every_process_knows_who_it_is(two):
    assert [process["seen"]["who"] for process in two] == [[0, 2, True, "gloo"], [1, 2, False, "gloo"]]
    assert all(process["seen"]["closed"] for process in two)


def test_means_and_objects_are_the_same_everywhere(two):
    for rank, process in enumerate(two):
        assert process["seen"]["mean"] == [1.5, 5.0] and process["seen"]["kept"] == [1.0 + rank, 10.0 * rank]
        assert process["seen"]["agreed"] == [True, False, False]          # one process alone is not everywhere
        assert process["seen"]["gathered"] == [{"rank": 0}, {"rank": 1}]


def test_rank_0_goes_first_and_a_barrier_waits_for_it(two):
    first, second = (process["times"] for process in two)
    assert second["entered"] >= first["left"]
    assert second["after"] >= first["before"]


def test_the_boundary_score_adds_up_over_processes(two):
    """Two images on rank 0 and one on rank 1, each a matched line of 20 pixels at all 99 thresholds."""
    for process in two:
        counts, best, images = process["seen"]["boundary"]
        assert counts == [[60, 60, 60, 60]] * 99 and best == [60] * 4 and images == 3


# Alone ---------------------------------------------------------------------------------------------------------------

def test_one_process_is_rank_0_of_one(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with distributed.process_group(CPU), distributed.main_first():
        distributed.barrier()
        assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
        assert not dist.is_initialized()
    values = torch.ones(2)
    assert distributed.mean_over_ranks(values) is values and distributed.gather_objects("x") == ["x"]
    monkeypatch.setenv("WORLD_SIZE", "1")
    with distributed.process_group(CPU):
        assert not dist.is_initialized()


def machine(monkeypatch, gpus: int, local_rank: int | None = None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))


@pytest.mark.parametrize(("wanted", "gpus", "local_rank", "device"), [
    ("auto", 0, None, "cpu"), ("cpu", 0, None, "cpu"), ("cpu", 2, 1, "cpu"), ("auto", 1, None, "cuda:0"),
    ("cuda", 2, 1, "cuda:1"), ("auto", 2, 0, "cuda:0")])
def test_every_local_rank_has_its_own_device(monkeypatch, wanted, gpus, local_rank, device):
    machine(monkeypatch, gpus, local_rank)
    assert str(distributed.pick_device(wanted)) == device


def test_devices_that_are_not_there_are_named(monkeypatch):
    machine(monkeypatch, 0)
    with pytest.raises(ValueError, match="cuda was asked for, but PyTorch finds no CUDA device"):
        distributed.pick_device("cuda")
    machine(monkeypatch, 2, 2)
    with pytest.raises(ValueError, match=r"local rank 2 needs its own GPU, .* machine has 2; .*--nproc_per_node 2"):
        distributed.pick_device("auto")
