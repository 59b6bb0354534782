"""The scan at the size of a feature map against float64, tensor by tensor, in every dtype; on a GPU where there is one.

Tokens and what is computed from them are in the dtype, parameters in float32, as in a model under autocast. The C++
kernels run the same cases on a CPU, so that the limits are known to be right before any GPU sees them.
"""

import functools
import math

import pytest
import torch

from models.ops import scan_triton
from models.ops.routes import four_routes
from models.ops.scan_triton import CANDIDATES
from models.ops.selective_scan import scan_routes
from tests.scan_backends import device_of, draw, relative_error
from tests.test_scan_routes import arguments

HEIGHT, WIDTH, CHANNELS, STATE = 35, 53, 70, 16
ON_A_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
TOKENS = ("u", "delta", "B", "C")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def limits(inputs, dtype):
    """Of the error over the largest value, for y and each gradient: one rounding to the dtype of the result, and
    float32's roundings of a sum, which grow as the root of the number of its terms where they have both signs."""
    batch, tokens, _, channels = inputs["u"].shape
    terms = {"y": STATE, "u": STATE, "delta": STATE, "B": channels, "C": channels}
    unit = {name: torch.finfo(dtype if name in terms else torch.float32).eps / 2 for name in ("y", *inputs)}
    return {name: (unit[name] if dtype != torch.float32 else 0) + 2**-24 * (10 + 2 * math.sqrt(terms.get(
        name, batch * tokens))) for name in unit}


@functools.cache
def case(dtype, groups, low_rank):
    """Arguments, a gradient of y, and y and all gradients in float64, from the same rounded numbers."""
    inputs = arguments(HEIGHT * WIDTH, routes=4, channels=CHANNELS, state=STATE, groups=groups)
    if low_rank:
        inputs |= {"delta": draw(3)(2, HEIGHT * WIDTH, 4, 5), "delta_weight": draw(4)(4, CHANNELS, 5) / 2}
    inputs = {name: x.to(dtype if name in TOKENS else torch.float32) for name, x in inputs.items()}
    grad_y = draw(9)(*inputs["u"].shape).to(dtype)
    exact = results("torch", {name: x.double() for name, x in inputs.items()}, grad_y.double())
    return inputs, grad_y, exact


def results(backend, inputs, grad_y):
    leaves = [x.clone().requires_grad_() for x in inputs.values()]
    y = scan_routes(**dict(zip(inputs, leaves, strict=True)), routes=four_routes(HEIGHT, WIDTH), delta_softplus=True,
                    backend=backend)
    return [y, *torch.autograd.grad(y, leaves, grad_y)]


def assert_exact_and_repeatable(backend, device, dtype, groups, low_rank=False):
    inputs, grad_y, exact = case(dtype, groups, low_rank)
    moved = {name: x.to(device) for name, x in inputs.items()}
    found, again = (results(backend, moved, grad_y.to(device)) for _ in range(2))
    allowed = limits(inputs, dtype)
    for name, value, repeated, right in zip(("y", *inputs), found, again, exact, strict=True):
        assert torch.equal(value, repeated), name
        assert relative_error(value, right) <= allowed[name], name


@pytest.mark.parametrize("dtype, groups", [(torch.float32, 1), (torch.float32, 2), (torch.float32, 4),
                                           (torch.bfloat16, 2), (torch.float16, 1)])
def test_cpp(dtype, groups):
    device_of("cpp")
    assert_exact_and_repeatable("cpp", "cpu", dtype, groups)


@pytest.mark.parametrize("low_rank", [pytest.param(flag, marks=ON_A_GPU) for flag in (False, True)])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda(dtype, groups, low_rank):
    assert_exact_and_repeatable("cuda", "cuda", dtype, groups, low_rank and dtype == torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_captured_graph_replays_the_same_numbers(backend):
    inputs, grad_y, _ = case(torch.float32, 1, False)
    inputs, grad_y = {name: x.cuda() for name, x in inputs.items()}, grad_y.cuda()
    with torch.cuda.stream(torch.cuda.Stream()):
        eager = results(backend, inputs, grad_y)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = results(backend, inputs, grad_y)
    for _ in range(2):
        graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(eager, captured, strict=True))


@pytest.mark.parametrize("blocks", [pytest.param(blocks, marks=ON_A_GPU) for blocks in CANDIDATES])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_triton(dtype, groups, blocks, monkeypatch):
    monkeypatch.setattr(scan_triton, "_choose_blocks", lambda args: blocks)
    assert_exact_and_repeatable("triton", "cuda", dtype, groups)
