"""The trial of compiled kernels: what it must not depend on, and what it must find."""

import contextlib
import functools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from models.ops import norms, scan_triton
from models.ops.scan_choice import Kernels
from models.ops.scan_probe import probe
from models.ops.scan_torch import TORCH
from tests.scan_backends import device_of

CPU = torch.device("cpu")
SURROUNDINGS = {
    "nothing": contextlib.nullcontext, "autocast": functools.partial(torch.autocast, "cpu", dtype=torch.bfloat16),
    "no gradients": torch.no_grad, "inference": torch.inference_mode, "fake tensors": FakeTensorMode,
    "another device": functools.partial(torch.device, "meta")}


@pytest.mark.parametrize("where", SURROUNDINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_right_kernels_are_right_wherever_the_first_scan_is_called(dtype, where):
    """Products of a float32 trial in bfloat16, as under autocast, would be off by 1e-3 and more."""
    with SURROUNDINGS[where]():
        assert probe(TORCH.kernels, CPU, dtype) is None


def test_the_triton_kernels_are_tried_without_autocast(monkeypatch):
    """The trial as a model in bfloat16 makes it, on the CPU with the kernels of another backend."""
    device_of("cpp")
    real, tried = torch.device, []

    def compare(kernels, device, dtype=torch.float32):
        tried.append(device.type)
        return probe(TORCH.kernels, real("cpu"), dtype)

    monkeypatch.setattr(scan_triton, "probe", compare)
    monkeypatch.setattr(scan_triton, "_interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        assert scan_triton.find_triton.__wrapped__("cuda") is None
    assert tried == ["cuda"]


def spoiled(index, error):
    """The kernels of the torch backend with one result of the backward pass that is wrong in one place."""
    def backward(*args):
        results = list(TORCH.kernels.backward(*args))
        results[index].flatten()[7] += error * results[index].abs().max()
        return tuple(results)
    return Kernels(TORCH.kernels.forward, backward, TORCH.kernels.chunk_tokens)


@pytest.mark.parametrize("index, name", enumerate(("u", "delta", "A", "B", "C", "D", "delta_bias")))
def test_one_wrong_number_is_found_and_named(index, name):
    reason = probe(spoiled(index, 1e-3), CPU)
    assert reason.startswith(f"their trial gave wrong numbers: gradient of {name} in torch.float32 is off by ")
    assert "is off by nan" in probe(spoiled(index, torch.nan), CPU)


def test_kernels_that_fail_are_said_to():
    def forward(*args):
        raise OSError("no kernel image\nis available")
    reason = probe(Kernels(forward, None, None), CPU)
    assert reason == "their trial failed: OSError: no kernel image"


def test_a_trial_inside_a_captured_graph_is_refused_with_the_remedy(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for trial in (lambda device: probe(TORCH.kernels, device), norms.find_kernels.__wrapped__):
        with pytest.raises(RuntimeError, match="cannot happen inside the capture of a CUDA graph: run the model once"):
            trial(torch.device("cuda"))
