"""The benchmark of the scan on a GPU runs all its parts, with tiny maps on the CPU and a stand-in for mamba-ssm."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from models.ops.selective_scan import selective_scan
from scripts import bench_scan_cuda as bench


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    for name, value in {"GPU": torch.device("cpu"), "OURS": ("cpp", "torch"), "HEIGHT": 3, "WIDTH": 4, "TASKS": 2,
                        "CHANNELS": 16}.items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(bench, "ceilings", lambda: {"TB/s copied": 1.0, "T exp/s": 1.0})

    def mamba(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
        return selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, backend="cpp")
    monkeypatch.setattr(bench, "_mamba", lambda: mamba)


def test_one_scan():
    rows = bench.bench_one_scan(1)
    assert len(rows) == 2 * 2 * 2 * 3  # lengths, dtypes, passes, contenders
    assert {row["contender"] for row in rows} == {"cpp", "torch", "mamba_ssm"} and all(row["ms"] > 0 for row in rows)


def test_orders_with_gradients_of_the_modules_own_parameters():
    rows = bench.bench_orders(1)
    assert len(rows) == 2 * 2 * 2 * 3  # batches, SS2D and BI-Scan, passes, contenders
    assert {row["contender"] for row in rows} == {"cpp, routes", "torch, routes", "mamba_ssm, usual"}


def test_contenders_that_disagree_are_not_compared():
    one = torch.ones(1)
    with pytest.raises(AssertionError):
        bench._assert_equal({"a": (lambda x: x, [one]), "b": (lambda x: 2 * x, [one])})
