"""The small parts below everything: the check for finite numbers, arithmetic by name, batches on their way."""

import math

import pytest
import torch

from utils.batches import batches_on, to_device
from utils.finite import FiniteGuard
from utils.precision import autocast, set_float32_arithmetic

CPU = torch.device("cpu")


NAMES = ["semseg", "depth"]


def test_finite_numbers_pass():
    guard = FiniteGuard(CPU)
    guard.flush()
    guard.check(1, NAMES, torch.tensor([[1.0, -2.0]]), torch.tensor(3.0))
    guard.check(2, NAMES[:1], torch.tensor([[1.0]]), None)
    guard.check(3, NAMES[:1], torch.tensor([[torch.finfo(torch.float32).max]]), torch.tensor(0.0))
    guard.flush()


@pytest.mark.parametrize(("passes", "norm", "words"), [
    ([[math.nan, 1.0]], 1.0, "step 7: loss 'semseg' is nan; training stopped before"),
    ([[0.0, 1.0], [0.0, -math.inf]], 1.0, "step 7: loss 'depth' is -inf; training"),
    ([[0.0, 1.0]], math.inf, "step 7: gradient norm is inf; training"),
    ([[0.0, math.inf]], math.nan, "step 7: loss 'depth' is inf, gradient norm is nan; training"),
    ([[0.0, math.inf]], None, "step 7: loss 'depth' is inf; training")])
def test_bad_numbers_stop_the_run_at_once_on_a_cpu(passes, norm, words):
    guard = FiniteGuard(CPU)
    with pytest.raises(FloatingPointError, match=words):
        guard.check(7, NAMES, torch.tensor(passes), None if norm is None else torch.tensor(norm))
    guard.flush()                                          # what was reported is not reported again


def test_a_norm_of_any_precision_is_read():
    FiniteGuard(CPU).check(1, NAMES, torch.ones(1, 2), torch.tensor(1.0, dtype=torch.float64))


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
