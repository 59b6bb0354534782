"""The CUDA kernels of the scan, emulated on the CPU: every order, type, odd size and way of cutting a call; and that
they compile for GPUs, where tests/test_scan_gpu.py runs them."""

import dataclasses

import pytest
import torch

from models.ops import scan_choice, scan_cuda
from models.ops.routes import Route, four_routes
from models.ops.scan_choice import ScanNeeds
from models.ops.scan_cuda import CUDA, HEADERS, SOURCE, Kind, choose_span, cuda_refusal, make_plan, rounds_of
from models.ops.scan_probe import probe
from models.ops.selective_scan import scan_routes, selective_scan
from tests.emulated_card import COMPILER, emulate
from tests.scan_backends import draw, relative_error
from tests.test_scan_routes import ORDERS, arguments, route_of
from utils import cuda_kernels
from utils.cuda_kernels import CudaError, compile_kernels

pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")


@pytest.fixture(autouse=True)
def forget_plans():
    yield
    scan_cuda.make_plan.cache_clear()


def results(backend, inputs, routes, **kwargs):
    """y, the last state and the gradients of all inputs, with cotangents for both that every type can hold."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    y, state = scan_routes(**leaves, routes=routes, return_last_state=True, backend=backend, **kwargs)
    cotangents = ((draw(seed)(*x.shape) * 4).round() / 4 for seed, x in ((1, y), (2, state)))
    loss = sum((x.double() * cotangent).sum() for x, cotangent in zip((y, state), cotangents, strict=True))
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return dict(zip(("y", "state", *leaves), (y, state, *grads), strict=True))


def assert_equals_reference(inputs, routes, limit=2e-6, softplus=True):
    """The reference in float64, of the same float32 numbers."""
    floats = {name: x.float() for name, x in inputs.items()}
    found = results("cuda", floats, routes, delta_softplus=softplus)
    expected = results("reference", {name: x.double() for name, x in floats.items()}, routes, delta_softplus=softplus)
    for name in found:
        assert found[name].shape == expected[name].shape
        assert relative_error(found[name], expected[name]) <= limit, name


@pytest.mark.parametrize("height, width", [(1, 1), (3, 11), (8, 5)])
@pytest.mark.parametrize("order", ORDERS)
def test_every_order(order, height, width, monkeypatch):
    emulate(monkeypatch)
    assert_equals_reference(arguments(height * width, channels=9, state=16), [route_of(order, height, width)])


@pytest.mark.parametrize("blocks_at_once", [1, 6, 40])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_routes_of_groups_in_one_span_or_several(groups, blocks_at_once, monkeypatch):
    cards = emulate(monkeypatch, blocks_at_once)
    assert_equals_reference(arguments(7 * 9, routes=4, channels=33, state=16, groups=groups), four_routes(7, 9))
    card, = cards.values()
    assert [launch[0] for launch in card.launches] == [False, True]  # one launch for each direction


def test_tasks_with_all_orders_and_rounds_of_their_own(monkeypatch):
    """Three groups: two pairs of opposite orders, the same order twice and others, one after the other."""
    emulate(monkeypatch, 9)
    rows, columns, rows_back, columns_back = four_routes(4, 6)
    routes = (rows, columns, rows_back, columns_back, rows, rows, Route(2, 12, by_column=True), columns,
              columns_back, columns, columns_back, columns)
    assert_equals_reference(arguments(24, routes=12, channels=5, state=3, batch=1, groups=3), routes)


@pytest.mark.parametrize("channels, state", [(1, 1), (130, 4), (65, 7), (33, 17), (9, 64)])
def test_widths_that_fill_no_block(channels, state, monkeypatch):
    emulate(monkeypatch, 12)
    assert_equals_reference(arguments(35, routes=2, channels=channels, state=state, batch=1),
                            [Route(5, 7), Route(7, 5, by_column=True, reverse=True)])


@pytest.mark.parametrize("missing", ["D", "delta_bias"])
def test_absent_arguments_and_no_softplus(missing, monkeypatch):
    emulate(monkeypatch)
    inputs = arguments(20, channels=4, state=2, batch=1)
    del inputs[missing]
    assert_equals_reference({**inputs, "delta": inputs["delta"].abs() / 2}, [Route(4, 5)], softplus=False)


@pytest.mark.parametrize("dtype, rounding", [(torch.float32, 1e-6), (torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_error_against_float64_of_every_tensor(dtype, rounding, monkeypatch):
    """The error of a result is that of its own rounding; routes of a group are added up before it."""
    emulate(monkeypatch, 9)
    inputs = {name: x.to(dtype) for name, x in arguments(30, routes=4, channels=8, batch=1, groups=2).items()}
    doubles = {name: tensor.double() for name, tensor in inputs.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = results("cuda", inputs, four_routes(5, 6), delta_softplus=True)
    expected = results("reference", doubles, four_routes(5, 6), delta_softplus=True)
    assert found["y"].dtype == dtype and found["state"].dtype == torch.float32
    for name, value in found.items():
        assert relative_error(value, expected[name]) < (1e-6 if name == "state" else rounding), name


def test_types_that_differ_and_any_strides(monkeypatch):
    """u in float32 and what is projected in bfloat16, as under autocast; slices of wider rows, rows that are no
    multiple of four numbers apart, maps that serve all tokens."""
    emulate(monkeypatch)
    inputs = {name: x.float() for name, x in arguments(35, routes=2, channels=8, state=4).items()}
    wide = torch.cat((inputs["u"], inputs["u"][..., :3]), dim=-1)
    strided = {**inputs, "u": wide[..., 3:], "delta": inputs["delta"].movedim(2, 0).contiguous().movedim(0, 2),
               "B": inputs["B"].mT.contiguous().mT, "C": inputs["C"][:1, :1].expand(2, 35, -1, -1)}
    for features in (torch.float32, torch.bfloat16):
        given = {name: x.to(features) if name in ("delta", "B", "C") else x for name, x in strided.items()}
        found, expected = (results(backend, {name: x.to(dtype or x.dtype) for name, x in given.items()},
                                   [Route(5, 7), Route(7, 5, True)], delta_softplus=True)
                           for backend, dtype in (("cuda", None), ("reference", torch.float64)))
        for name, value in found.items():
            limit = 2**-8 if features == torch.bfloat16 and name in ("delta", "B", "C") else 2e-6
            assert relative_error(value, expected[name]) < limit, (features, name)


@pytest.mark.parametrize("groups", [1, 4])
def test_step_sizes_of_low_rank_whose_gradients_take_their_place(groups, monkeypatch):
    """And only there: what the caller gave is as it was, and a second backward pass gives the same."""
    emulate(monkeypatch, 9)
    inputs = arguments(40, routes=4, channels=8, state=4, groups=groups)
    inputs |= {"delta": draw(1)(2, 40, 4, 3), "delta_weight": draw(2)(4, 8, 3) / 2}
    assert_equals_reference(inputs, four_routes(5, 8))
    leaves = {name: x.float().requires_grad_() for name, x in inputs.items()}
    before = {name: x.detach().clone() for name, x in leaves.items()}
    y = scan_routes(**leaves, routes=four_routes(5, 8), delta_softplus=True, backend="cuda")
    first, second = (torch.autograd.grad(y.sum(), list(leaves.values()), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(x, before[name]) for name, x in leaves.items())


@pytest.mark.parametrize("batch, tokens", [(0, 4), (2, 0)])
def test_empty_batch_and_empty_sequence(batch, tokens, monkeypatch):
    emulate(monkeypatch)
    inputs = {name: x.float() for name, x in arguments(tokens, routes=2, batch=batch).items()}
    found = results("cuda", inputs, [Route(1, tokens)] * 2)
    assert found["y"].shape == (batch, tokens, 2, 3) and not found["A"].any() and not found["state"].any()


def test_softplus_of_small_and_large_step_sizes(monkeypatch):
    """Relative to each value: 1e-9 of a step matters where steps are that small."""
    emulate(monkeypatch)
    delta = torch.tensor([-80.0, -20, -5, -0.1, 0, 0.1, 5, 19.9, 20.1, 30])
    leaf, one, maps = delta.view(1, 1, 10).clone().requires_grad_(), torch.ones(1, 1, 10), torch.ones(1, 1, 1)
    y = selective_scan(one.mT, leaf.mT, -torch.ones(10, 1), maps, maps, delta_softplus=True, backend="cuda").flatten()
    exact = delta.double().requires_grad_()  # y = s u B C from a fresh state
    expected = torch.nn.functional.softplus(exact)
    slope, = torch.autograd.grad(y.sum(), leaf)
    expected_slope, = torch.autograd.grad(expected.sum(), exact)
    torch.testing.assert_close(y.double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(slope.flatten().double(), expected_slope, rtol=1e-6, atol=0)


def test_decays_that_underflow_and_not_a_number(monkeypatch):
    emulate(monkeypatch)
    inputs = {name: tensor.float() for name, tensor in arguments(40, channels=4, batch=1).items()}
    inputs["delta"] *= 1000
    found = results("cuda", inputs, [Route(1, 40)], delta_softplus=True)
    assert all(value.isfinite().all() for value in found.values())
    inputs["delta"][0, 3, 0, 1] = torch.nan
    y = scan_routes(**inputs, routes=[Route(1, 40)], delta_softplus=True, backend="cuda")[0, :, 0]
    assert y[3:, 1].isnan().all() and y[:3].isfinite().all() and y[:, [0, 2, 3]].isfinite().all()


def test_the_probe_accepts_the_kernels(monkeypatch):
    emulate(monkeypatch, 40)
    assert probe(CUDA.kernels, torch.device("cpu")) is None


# ---- how a call is cut ----

def test_a_bim_decoder_of_nyud_takes_one_launch_per_scan(monkeypatch):
    """18 SS2D calls and 6 of BI-Scan, with the four tasks as groups: 24 launches forward, 24 backward."""
    cards = emulate(monkeypatch, 6)
    for calls, routes, groups in ((18, four_routes(2, 3) * 4, 4), (6, [Route(4, 6), Route(4, 6, True)], 2)):
        inputs = {name: x.float() for name, x in arguments(routes[0].length, len(routes), 4, 2, 1, groups).items()}
        for _ in range(calls):
            results("cuda", inputs, routes)
    launches = [launch for card in cards.values() for launch in card.launches]
    assert [sum(launch[0] == back for launch in launches) for back in (False, True)] == [24, 24]


def test_rounds_of_routes():
    """Opposite orders share a round; the first route of a group writes, the last one finishes what is shared."""
    rows, columns, rows_back, columns_back = four_routes(4, 6)
    first, last = scan_cuda.FIRST_OF_GROUP, scan_cuda.LAST_OF_GROUP
    assert rounds_of((rows, columns, rows_back, columns_back), 1) == [first, 1, 0, 1 + last]
    assert rounds_of((rows, columns, rows_back, columns_back), 2) == [first, 1 + last, first, 1 + last]
    assert rounds_of((rows, rows_back), 2) == [first + last] * 2


@pytest.mark.parametrize("chunks, tasks, resident, spans", [(1008, 12, 528, 44), (1008, 300, 528, 1),
                                                            (2, 1, 528, 1), (62500, 1, 528, 509)])
def test_spans_fill_the_card_or_there_is_one(chunks, tasks, resident, spans):
    assert -(-chunks // choose_span(chunks, tasks, resident)) == spans


def test_a_plan_is_made_once_and_for_the_shape(monkeypatch):
    cards = emulate(monkeypatch)
    inputs = {name: x.float() for name, x in arguments(35, channels=200, state=16, batch=1).items()}
    for _ in range(3):
        scan_routes(**inputs, routes=[Route(5, 7)], backend="cuda")
    assert make_plan.cache_info().misses == 1
    card, = cards.values()
    assert card.launches[0][1:3] == (2, 4)  # 7 times 32 channels


# ---- when it runs ----

@pytest.mark.parametrize("needs, reason", [
    (ScanNeeds("cuda", torch.float64, 16, False), "compute in float32, got float64"),
    (ScanNeeds("cuda", torch.float32, 65, False), "at most 64 states per channel, got 65"),
    (ScanNeeds("cuda", torch.float32, 16, False, num_routes=129), "at most 128 routes in one call, got 129"),
    (ScanNeeds("cpu", torch.float32, 16, False), "need CUDA tensors, got tensors on cpu")])
def test_calls_that_are_refused(needs, reason):
    assert reason in cuda_refusal(needs)


def test_auto_on_cuda_takes_these_kernels_first_and_triton_where_they_refuse(monkeypatch):
    for name in ("cuda", "triton"):
        backend = scan_choice._load(name)
        def refusal(needs, name=name):
            return "no" if name == "cuda" and needs.dtype == torch.float64 else None
        monkeypatch.setitem(scan_choice._loaded, name, dataclasses.replace(backend, refusal=refusal))
    for dtype, chosen in ((torch.float32, "cuda"), (torch.float64, "triton")):
        assert scan_choice.choose_backend(ScanNeeds("cuda", dtype, 16, False), "auto")[0] == chosen


def test_kernels_are_compiled_once_per_machine(monkeypatch, tmp_path):
    """And again where a source, an option or the compiler is another, or where they cannot be kept."""
    compiled = []
    monkeypatch.setattr(cuda_kernels, "_compile", lambda *args: compiled.append(args) or b"code")
    folder = tmp_path / "cache"
    monkeypatch.setattr(cuda_kernels, "cache_root", lambda: folder)
    for architecture, number in (("sm_90", 1), ("sm_90", 1), ("sm_80", 2)):
        assert compile_kernels(SOURCE, HEADERS, architecture, {}) == b"code" and len(compiled) == number
    compile_kernels(SOURCE, HEADERS[1:], "sm_90", {})
    assert len(compiled) == 3 and len(list(folder.rglob("*"))) == 1 + 3
    folder = tmp_path / "file"
    folder.touch()
    assert [compile_kernels(SOURCE, HEADERS, "sm_90", {}) for _ in range(2)] == [b"code"] * 2 and len(compiled) == 5


def test_a_mistake_in_the_source_is_shown_with_its_place():
    kind = Kind(torch.float32, torch.float32, 4, True, True)
    with pytest.raises(CudaError, match="scan_kernels.cu for sm_90: .*error"):
        compile_kernels(SOURCE, HEADERS, "sm_90", kind.defines(1 << 17) | {"SCAN_LANES": "none"})
