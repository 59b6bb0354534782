"""The small parts below everything: arithmetic by name, batches on their way, memory."""

import os
import subprocess
import sys

import pytest
import torch

from tests.shared import ROOT
from utils.batches import batches_on, to_device
from utils.meta import meta_device
from utils.precision import autocast, set_determinism, set_float32_arithmetic

CPU = torch.device("cpu")


def test_autocast_by_name():
    square = torch.ones(2, 2)
    for precision, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32),
                             ("tf32", torch.float32)):
        with autocast(CPU, precision):
            assert (square @ square).dtype == dtype, precision


def test_only_fp32_forbids_tf32():
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        for precision, matmul, convolution in (("fp32", "highest", False), ("tf32", "high", True),
                                               ("bf16", "high", True)):
            set_float32_arithmetic(precision)
            assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == (matmul, convolution)
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def test_only_tensors_travel():
    batch = {"image": torch.ones(1), "meta": [{"name": "a"}]}
    assert [box.device.type for box in to_device([torch.ones(2), torch.ones(0)], torch.device("meta"))] == ["meta"] * 2
    moved = to_device(batch, torch.device("meta"))
    assert moved["image"].device.type == "meta" and moved["meta"] == batch["meta"]
    assert batch["image"].device.type == "cpu"
    assert [b["meta"] for b in batches_on(CPU, [batch, {"meta": 2}])] == [batch["meta"], 2]


def test_determinism_is_what_was_asked_for_last(monkeypatch):
    """Warnings, not errors: an operation without such a form goes on and is named."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    set_determinism(False)
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ and not torch.are_deterministic_algorithms_enabled()
    try:
        set_determinism(True)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert torch.are_deterministic_algorithms_enabled() and torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        set_determinism(False)


def test_on_the_meta_device_nothing_is_drawn_and_elsewhere_everything():
    with meta_device():
        layer = torch.nn.Linear(3, 5)
        torch.nn.init.trunc_normal_(layer.weight)
        here = torch.zeros(2, device="cpu").add_(1)
    assert layer.weight.is_meta and layer.weight.shape == (5, 3) and layer.weight.requires_grad
    assert here.tolist() == [1, 1] and torch.nn.Linear(3, 5).weight.abs().sum() > 0


KEPT = """
import resource, sys, torch
from utils.machine import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
torch.zeros(2**24 + 2**16)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.zeros(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks glibc, which is Linux's")
def test_freed_memory_is_kept_where_asked_for():
    """Then a map of 64 MiB takes the place of one a little larger; without, the system gives all of its 16384 pages."""
    pages = [int(subprocess.run([sys.executable, "-c", KEPT, how], cwd=ROOT, check=True, capture_output=True,
                                text=True).stdout) for how in ("kept", "given back")]
    assert pages[0] < 100 < 1000 < pages[1]
