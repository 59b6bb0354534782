"""What runs on a GPU alone: layer norms by kernels and other layers, against float64 and what runs elsewhere."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.blocks import layers, products, stacked
from models.blocks.layers import HalfLinear, ProductLayerNorm
from models.blocks.resize import Average, average
from models.blocks.stacked import TaskLayerNorm, TaskLinear
from models.ops import norms
from models.ops.norms import Statistics, few_outputs, norm_backward, norm_forward, plain

EPS = 1e-5
ON_A_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=ON_A_GPU)]  # on a CPU Triton interprets the kernels
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}  # of the error over the largest value


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def kernels_everywhere(monkeypatch):
    """Layers take the kernels also where Triton interprets them."""
    for module in (stacked, products, layers):
        monkeypatch.setattr(module, "has_kernels", lambda x: True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tasks, rows, channels", [(1, 7, 192), (3, 5, 24), (2, 9, 1100), (2, 0, 8), (1, 1, 1)])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", LIMITS)
def test_against_float64(tasks, rows, channels, gated, dtype, device):
    """Values and gradients of maps in that type; those of scale and shift are in float32. Two runs are equal."""
    x, grad = draw(0, rows, tasks, channels).to(dtype).transpose(0, 1), draw(1, tasks, rows, channels).to(dtype)
    gate = draw(2, tasks, rows, 2 * channels).to(dtype)[..., channels:] if gated else None
    scale, shift = draw(3, tasks, channels), draw(4, tasks, channels)
    inputs = [None if t is None else t.double().requires_grad_() for t in (x, gate, scale, shift)]
    right = plain(*inputs, EPS)
    truth = right, *torch.autograd.grad(right, [t for t in inputs if t is not None], grad.double())
    x, grad, gate, scale, shift = (None if t is None else t.to(device) for t in (x, grad, gate, scale, shift))
    runs = []
    for _ in range(2):
        value, statistics = norm_forward(x, scale, shift, EPS, dtype, gate)
        assert isinstance(statistics, Statistics) and value.dtype == dtype
        runs.append([value, *(t for t in norm_backward(grad, x, statistics, scale, shift, gate) if t is not None)])
    for one, other, expected in zip(*runs, truth, strict=True):
        assert torch.equal(one, other) and one.shape == expected.shape
        if rows:
            truncated = device == "cpu" and one.dtype == torch.bfloat16  # by Triton's interpreter
            limit = LIMITS[one.dtype] * (1 + truncated) * expected.abs().max().clamp_min(1e-3)
            assert (one.cpu() - expected).abs().max() <= limit


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("tasks, rows, channels, outputs", [(1, 7, 192, 1), (2, 5, 24, 3), (1, 9, 40, 4), (2, 0, 8, 2)])
def test_few_outputs_against_float64(tasks, rows, channels, outputs, device):
    x, grad = draw(0, rows, tasks, channels).transpose(0, 1), draw(1, tasks, rows, outputs)
    parameters = [draw(2, tasks, channels), draw(3, tasks, channels), draw(4, tasks, outputs, channels),
                  draw(5, tasks, outputs)]
    results = []
    for dtype, run in ((torch.float32, few_outputs), (torch.float64, in_words)):
        place = device if dtype == torch.float32 else "cpu"
        leaves = [t.to(place, dtype).requires_grad_() for t in (x, *parameters)]
        out = run(*leaves[:3], EPS, *leaves[3:])
        results.append([out, *torch.autograd.grad(out, leaves, grad.to(place, dtype))])
    for found, exact in zip(*results, strict=True):
        assert found.dtype == torch.float32 and found.shape == exact.shape
        if rows:
            assert (found.cpu() - exact).abs().max() <= LIMITS[torch.float32] * exact.abs().max()


def in_words(x, scale, shift, eps, weight, bias):
    return plain(x, None, scale, shift, eps) @ weight.mT + bias[:, None]


def both_ways(run, leaves, monkeypatch):
    """Results and gradients with kernels and without."""
    results = []
    for kernels in (True, False):
        with monkeypatch.context() as patch:
            for module in (stacked, products, layers):
                patch.setattr(module, "has_kernels", lambda x, kernels=kernels: kernels)
            out = run()
            results.append([out, *torch.autograd.grad(out, leaves, draw(9, *out.shape).to(out))])
    return zip(*results, strict=True)


@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("way", ["forward", "for_product", "gated", "of_normed", "halves"])
def test_layers_with_kernels_are_those_without(tasks, way, monkeypatch):
    norm = TaskLayerNorm(tasks, 6, tasks_last=way == "gated")
    linear = TaskLinear(tasks, 6, 8, bias=way != "halves")
    for number, parameter in enumerate((*norm.parameters(), *linear.parameters())):
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(number))
    feat, gate = draw(0, tasks, 2, 3, 4, 6).requires_grad_(), draw(1, tasks, 2, 3, 4, 12).requires_grad_()
    last = feat.permute(1, 2, 3, 0, 4).contiguous()
    runs = {"forward": lambda: norm(feat), "for_product": lambda: norm.for_product(feat),
            "gated": lambda: norm.gated(last, gate[..., 6:]), "of_normed": lambda: linear.of_normed(norm, feat),
            "halves": lambda: torch.cat([half.flatten() for half in linear.halves(feat, norm)])}
    leaves = [feat, *norm.parameters(), *([gate] if way == "gated" else []),
              *(linear.parameters() if way in ("of_normed", "halves") else [])]
    for found, expected in both_ways(runs[way], leaves, monkeypatch):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_norm_before_products(kernels_everywhere, monkeypatch):
    """Under autocast it is PyTorch's, rounded to the type of products; elsewhere it is PyTorch's."""
    norm, feat = ProductLayerNorm(6, eps=EPS), draw(0, 2, 3, 4, 6)
    nn.init.normal_(norm.weight)
    right = F.layer_norm(feat, (6,), norm.weight, norm.bias, EPS)
    results = {}
    for kernels in (True, False):
        monkeypatch.setattr(layers, "has_kernels", lambda x, kernels=kernels: kernels)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results[kernels] = norm(feat)
        torch.testing.assert_close(norm(feat), right)
    assert torch.equal(results[False], right.bfloat16()) and results[True].dtype == torch.bfloat16
    torch.testing.assert_close(results[True], results[False], rtol=2**-7, atol=1e-6)


def test_linear_layers_as_on_a_gpu():
    """Values and gradients of rows in bfloat16; the gradients of weight and bias are not rounded to it."""
    rows, weight, bias, grad = (draw(0, 40, 6).bfloat16(), draw(1, 5, 6).bfloat16().float(),
                                draw(2, 5).bfloat16().float(), draw(3, 40, 5).bfloat16())
    leaves = [x.requires_grad_() for x in (rows, weight, bias)]
    out = HalfLinear.apply(*leaves)
    right = F.linear(rows.float(), weight, bias)
    assert out.dtype == torch.bfloat16 and (out - right).abs().max() <= 2**-8 * right.abs().max()
    found, exact = (torch.autograd.grad(y, leaves, grad.to(y)) for y in (out, right))
    assert (found[0] - exact[0]).abs().max() <= 2**-7 * exact[0].abs().max()
    for one, other in zip(found[1:], exact[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", [1, 2, 3])
def test_means_over_whole_squares(side):
    """The gradient that runs on a GPU, of maps in both memory formats."""
    feat = draw(0, 2, 5, 6, 12).double()
    for given in (feat, feat.contiguous(memory_format=torch.channels_last)):
        leaf = given.clone().requires_grad_()
        results = [(y, torch.autograd.grad(y, leaf, draw(1, *y.shape).double())[0])
                   for y in (Average.apply(leaf, side), average(leaf, side))]
        for one, other in zip(*results, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-14)


def test_kernels_that_give_wrong_numbers_are_not_taken(monkeypatch):
    assert norms.trial(torch.device("cpu")) is None
    right = norms.norm_forward

    def wrong(*args):
        value, statistics = right(*args)
        return value * 1.001, statistics

    monkeypatch.setattr(norms, "norm_forward", wrong)
    assert "wrong numbers" in norms.trial(torch.device("cpu"))


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=ON_A_GPU)])
def test_a_layer_on_a_gpu(device):
    """What a model calls, under autocast, against float64 on the CPU."""
    norm, linear = TaskLayerNorm(3, 40), TaskLinear(3, 40, 16)
    feat = draw(0, 3, 2, 9, 7, 40)
    exact = copy.deepcopy(linear).double().of_normed(copy.deepcopy(norm).double(), feat.double())
    assert norms.find_kernels(torch.device(device, 0)) is None
    with torch.autocast(device, dtype=torch.bfloat16):
        found = linear.to(device).of_normed(norm.to(device), feat.to(device))
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.cpu().double(), exact.detach(), rtol=0, atol=0.03 * exact.abs().max().item())
