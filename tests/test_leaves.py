"""The small parts below everything: the check for finite numbers, arithmetic by name, batches on their way."""

import math

import pytest
import torch

from utils.batches import batches_on, to_device
from utils.finite import FiniteGuard
from utils.precision import autocast, set_float32_arithmetic

CPU = torch.device("cpu")


def losses(**values: float) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(value) for name, value in values.items()}


def test_finite_numbers_pass():
    guard = FiniteGuard(CPU)
    guard.flush()
    guard.check(1, [losses(semseg=1.0, depth=-2.0)], torch.tensor(3.0))
    guard.check(2, [losses(semseg=1.0)], None)
    guard.check(3, [losses(semseg=torch.finfo(torch.float32).max)], torch.tensor(0.0))
    guard.flush()


@pytest.mark.parametrize(("passes", "norm", "words"), [
    ([losses(semseg=math.nan, depth=1.0)], 1.0, "step 7: loss 'semseg' is nan; training stopped before"),
    ([losses(depth=1.0), losses(depth=-math.inf)], 1.0, "step 7: loss 'depth' is -inf; training"),
    ([losses(depth=1.0)], math.inf, "step 7: gradient norm is inf; training"),
    ([losses(depth=math.inf)], math.nan, "step 7: loss 'depth' is inf, gradient norm is nan; training"),
    ([losses(depth=math.inf)], None, "step 7: loss 'depth' is inf; training")])
def test_bad_numbers_stop_the_run_at_once_on_a_cpu(passes, norm, words):
    guard = FiniteGuard(CPU)
    with pytest.raises(FloatingPointError, match=words):
        guard.check(7, passes, None if norm is None else torch.tensor(norm))
    guard.flush()                                          # what was reported is not reported again


def test_losses_with_gradients_and_of_any_precision_are_read():
    loss = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    FiniteGuard(CPU).check(1, [{"a": loss, "b": loss.bfloat16()}], loss)


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
