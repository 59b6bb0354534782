"""The Triton kernels under the interpreter, on the CPU: every order, dtype, odd size and way of cutting a call; and
that they compile for GPUs, where tests/test_scan_gpu.py runs them.

The interpreter needs a hundred microseconds per operation, so that sequences are short and chunks shorter.
"""

import os
import subprocess
import sys

import pytest
import torch

from models.ops import scan_triton
from models.ops.routes import Route, four_routes
from models.ops.scan_choice import ScanNeeds
from models.ops.scan_triton import Blocks, find_triton, triton_refusal
from models.ops.selective_scan import scan_routes, selective_scan
from tests.scan_backends import draw, relative_error
from tests.shared import ROOT
from tests.test_scan_routes import ORDERS, arguments, route_of

pytest.importorskip("triton", reason="Triton is not installed")
interpreted = pytest.mark.skipif(find_triton("cpu") is not None, reason=str(find_triton("cpu")))


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    monkeypatch.setattr(scan_triton, "CHUNK_TOKENS", 4)


def results(backend, inputs, routes, **kwargs):
    """y, the last state and the gradients of all inputs, with cotangents for both."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    y, state = scan_routes(**leaves, routes=routes, return_last_state=True, backend=backend, **kwargs)
    loss = (y.double() * draw(1)(*y.shape)).sum() + (state.double() * draw(2)(*state.shape)).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return dict(zip(("y", "state", *leaves), (y, state, *grads), strict=True))


def assert_equals_reference(inputs, routes, limit=1e-11, **kwargs):
    found, expected = (results(backend, inputs, routes, delta_softplus=True, **kwargs)
                       for backend in ("triton", "reference"))
    for name in found:
        assert found[name].shape == expected[name].shape and found[name].dtype == expected[name].dtype
        assert relative_error(found[name], expected[name]) <= limit, name


@interpreted
@pytest.mark.parametrize("height, width", [(1, 1), (3, 3)])
@pytest.mark.parametrize("order", ORDERS)
def test_every_order(order, height, width):
    """Nine tokens are two chunks, and one token."""
    assert_equals_reference(arguments(height * width), [route_of(order, height, width)])


@interpreted
@pytest.mark.parametrize("programs", [1, 4, 100])
def test_a_route_in_one_span_or_several(programs, monkeypatch):
    monkeypatch.setattr(scan_triton, "INTERPRETED", Blocks(4, 1, programs))
    assert_equals_reference(arguments(14, channels=6, batch=1), [Route(2, 7, by_column=True, reverse=True)])


@interpreted
@pytest.mark.parametrize("groups", [1, 2])
def test_routes_of_a_group_are_added(groups):
    assert_equals_reference(arguments(6, routes=4, channels=5, batch=2 // groups, groups=groups), four_routes(2, 3))


@interpreted
@pytest.mark.parametrize("channels, state", [(1, 1), (33, 2), (3, 17)])
def test_widths_that_fill_no_block(channels, state):
    assert_equals_reference(arguments(5, routes=2, channels=channels, state=state, batch=1), [Route(1, 5), Route(5, 1)])


@interpreted
def test_step_sizes_of_low_rank_and_any_strides():
    inputs = arguments(6, routes=2, channels=6, batch=2)
    inputs |= {"delta": draw(3)(2, 6, 2, 3), "delta_weight": draw(4)(2, 6, 3)}
    inputs["u"] = torch.cat((inputs["u"], inputs["u"]), dim=-1)[..., 6:]
    inputs["B"] = inputs["B"].mT.contiguous().mT
    assert not inputs["u"].is_contiguous() and inputs["B"].stride(-1) != 1
    assert_equals_reference(inputs, [Route(2, 3), Route(2, 3, by_column=True)])


# The error of a result is that of its own rounding: inputs are taken as exact and the state is float32.
@interpreted
@pytest.mark.parametrize("dtype, rounding", [(torch.float32, 1e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_error_against_float64_of_every_tensor(dtype, rounding):
    inputs = {name: tensor.to(dtype) for name, tensor in arguments(9, routes=2, channels=8, batch=1).items()}
    doubles = {name: tensor.double() for name, tensor in inputs.items()}
    routes = [Route(3, 3), Route(3, 3, by_column=True, reverse=True)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = results("triton", inputs, routes, delta_softplus=True)
    expected = results("reference", doubles, routes, delta_softplus=True)
    assert found["y"].dtype == dtype and found["state"].dtype == torch.float32
    for name, value in found.items():
        assert relative_error(value, expected[name]) < (1e-6 if name == "state" else rounding), name


@interpreted
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_softplus_of_small_and_large_step_sizes(dtype, limit):
    """Relative to each value: 1e-9 of a step matters where steps are that small."""
    delta = torch.tensor([-80.0, -20, -5, -0.1, 0, 0.1, 5, 19.9, 20.1, 30], dtype=dtype)
    one = torch.ones(1, 1, 10, dtype=dtype)
    leaf = delta.view(1, 1, 10).clone().requires_grad_()  # y = s u B C from a fresh state
    maps = one[..., :1]
    y = selective_scan(one.mT, leaf.mT, -torch.ones(10, 1, dtype=dtype), maps, maps, delta_softplus=True,
                       backend="triton").flatten()
    exact = delta.double().requires_grad_()
    expected = torch.nn.functional.softplus(exact)
    torch.testing.assert_close(y.double(), expected, rtol=limit, atol=0)
    slope, = torch.autograd.grad(y.sum(), leaf)
    expected_slope, = torch.autograd.grad(expected.sum(), exact)
    torch.testing.assert_close(slope.flatten().double(), expected_slope, rtol=limit, atol=0)


@interpreted
def test_decays_that_underflow_and_not_a_number():
    inputs = {name: tensor.float() for name, tensor in arguments(9, channels=4, batch=1).items()}
    inputs["delta"] *= 1000
    found = results("triton", inputs, [Route(1, 9)], delta_softplus=True)
    assert all(value.isfinite().all() for value in found.values())
    inputs["delta"][0, 3, 0, 1] = torch.nan
    y = scan_routes(**inputs, routes=[Route(1, 9)], delta_softplus=True, backend="triton")[0, :, 0]
    assert y[3:, 1].isnan().all() and y[:3].isfinite().all() and y[:, [0, 2, 3]].isfinite().all()


@interpreted
@pytest.mark.parametrize("batch, tokens", [(0, 4), (2, 0)])
def test_empty_batch_and_empty_sequence(batch, tokens):
    found = results("triton", arguments(tokens, routes=2, batch=batch), [Route(1, tokens)] * 2)
    assert found["y"].shape == (batch, tokens, 2, 3) and not found["A"].any() and not found["state"].any()


@interpreted
def test_operator_is_registered_correctly():
    inputs = arguments(5, routes=2, channels=3, state=2, batch=1)
    tensors = [*(x.requires_grad_() for x in inputs.values()), None]
    torch.library.opcheck(torch.ops.mtdp.scan.default, (*tensors, [1, 5, 0, 0, 5, 1, 1, 1], True, True, "triton"),
                          test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


def test_too_many_states_are_refused():
    needs = ScanNeeds("cuda", torch.float32, num_states=65, state_gradient=False)
    assert triton_refusal(needs) == "the triton kernels hold at most 64 states per channel, got 65"
    inputs = arguments(4, state=65)
    with pytest.raises(ValueError, match="scan backend 'triton' was requested .* at most 64 states"):
        scan_routes(**inputs, routes=[Route(1, 4)], backend="triton")


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from models.ops import triton_kernels
from models.ops.scan_triton import CANDIDATES, Gradients, Inputs, Rows, Widths

states, rows = "*fp32", Rows("*bf16", "i32", "i32", "i32")
TYPES = {"inputs": Inputs(rows, rows, rows, rows, states, states, states, "*i64"), "y": rows, "grad_y": rows,
         "grads": Gradients(rows, rows, states, states, states, states), "widths": Widths("i32", "i32", "i32", "i32"),
         "tokens": "i32", "span": "i32", "spans": "i32", "route": "i32"}
VARIANTS = {"span_kernel": {"SOFTPLUS": True, "BACK": False}, "scan_over_spans_kernel": {"BACK": True},
            "forward_kernel": {"SOFTPLUS": True, "KEEP": True, "ADD": True, "CHUNK": 32},
            "backward_kernel": {"SOFTPLUS": True, "ADD": True, "CHUNK": 32}}
blocks = CANDIDATES[0]
for name, constants in VARIANTS.items():
    kernel = getattr(triton_kernels, name)
    constants = {**constants, "N": 16, "E": blocks.channels}
    types = {p.name: "constexpr" if p.name in constants else TYPES.get(p.name, states) for p in kernel.params}
    built = triton.compile(ASTSource(kernel, types, constants), target=GPUTarget("cuda", 90, 32),
                           options={"num_warps": blocks.warps})
    print(name, len(built.asm["cubin"]), built.metadata.shared)
"""


def test_kernels_compile_for_a_gpu_without_one():
    """For compute capability 9.0, by Triton's own assembler; the forward kernels need no shared memory."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", COMPILE], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    sizes = {name: (int(code), int(shared)) for name, code, shared in map(str.split, run.stdout.splitlines())}
    assert all(code > 1000 for code, _ in sizes.values())
    assert sizes["span_kernel"][1] == sizes["forward_kernel"][1] == 0
