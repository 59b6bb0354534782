"""Scans along routes: every order against an explicit permutation, groups, strides, and what compilers see of them."""


import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from models.ops.routes import Route, four_routes
from models.ops.scan_args import Projection, project, sum_of_products
from models.ops.scan_choice import set_scan_backend
from models.ops.scan_op import scan_flops
from models.ops.selective_scan import count_scan_flops, scan_routes
from models.ops.ss2d import S6Weights, aligned, s6_scan, ss2d_core
from tests.scan_backends import FAST, chunk_tokens, device_of, draw, relative_error, tolerance

# The token (row, column) at each position, written out as loops.
ORDERS = {
    "rows": lambda h, w: [(y, x) for y in range(h) for x in range(w)],
    "columns": lambda h, w: [(y, x) for x in range(w) for y in range(h)],
    "rows_back": lambda h, w: [(y, x) for y in reversed(range(h)) for x in reversed(range(w))],
    "columns_back": lambda h, w: [(y, x) for x in reversed(range(w)) for y in reversed(range(h))],
}
NAMES = ("u", "delta", "A", "B", "C", "D", "delta_bias")


def tokens_of(order, height, width):
    return [y * width + x for y, x in ORDERS[order](height, width)]


def route_of(order, height, width):
    return Route(height, width, by_column=order.startswith("columns"), reverse=order.endswith("back"))


def arguments(tokens, routes=1, channels=3, state=2, batch=2, groups=None, seed=0):
    """Arguments of `scan_routes`; every route is a group, where no other number of groups is given."""
    normal = draw(seed)
    return {"u": normal(batch, tokens, groups or routes, channels),
            "delta": normal(batch, tokens, routes, channels) - 1, "A": -torch.exp(normal(routes, channels, state)),
            "B": normal(batch, tokens, routes, state), "C": normal(batch, tokens, routes, state),
            "D": normal(routes, channels), "delta_bias": normal(routes, channels)}


def plain_scan(inputs, orders):
    """The recurrence, token after token in the listed order; results are put where the tokens lie."""
    group_of = [g for g in range(inputs["u"].shape[2]) for _ in range(len(orders) // inputs["u"].shape[2])]
    results = [0] * inputs["u"].shape[2]
    for k, order in enumerate(orders):
        u = inputs["u"][:, :, group_of[k]]
        step = F.softplus(inputs["delta"][:, :, k] + inputs["delta_bias"][k])
        state, found = 0, {}
        for token in order:
            push = (step[:, token] * u[:, token])[..., None] * inputs["B"][:, token, k, None]
            state = torch.exp(step[:, token, :, None] * inputs["A"][k]) * state + push
            found[token] = (state * inputs["C"][:, token, k, None]).sum(-1) + inputs["D"][k] * u[:, token]
        results[group_of[k]] += torch.stack([found[token] for token in range(len(order))], dim=1)
    return torch.stack(results, dim=2)


def assert_equals_plain(inputs, orders, routes, backend, limit=1e-11):
    device = device_of(backend)
    dtype = torch.float32 if backend == "mamba_ssm" else torch.float64
    plain = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
    fast = {name: tensor.detach().to(device, dtype).requires_grad_() for name, tensor in inputs.items()}
    expected = plain_scan(plain, orders)
    y = scan_routes(**fast, routes=routes, delta_softplus=True, backend=backend)
    assert y.shape == inputs["u"].shape
    cotangent = draw(9)(*y.shape)
    results = [y, *torch.autograd.grad((y * cotangent.to(y)).sum(), list(fast.values()))]
    truth = [expected, *torch.autograd.grad((expected * cotangent).sum(), list(plain.values()))]
    for name, a, b in zip(("y", *inputs), results, truth, strict=True):
        assert relative_error(a, b) <= tolerance(backend, limit), name


# ---- orders ----

@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("height, width", [(1, 1), (1, 5), (4, 1), (3, 5), (7, 9)])
def test_a_route_names_the_token_at_each_position(order, height, width):
    route = route_of(order, height, width)
    expected = tokens_of(order, height, width)
    assert route.tokens().tolist() == expected
    assert route.reversed().tokens().tolist() == expected[::-1]
    outer, inner, outer_stride, inner_stride, reverse = route.index_rule
    by_rule = [p // inner * outer_stride + p % inner * inner_stride for p in range(outer * inner)]
    assert (by_rule[::-1] if reverse else by_rule) == expected
    assert route.is_raster == (order == "rows")


def test_four_routes_of_a_map():
    assert [route.tokens().tolist() for route in four_routes(3, 5)] == [tokens_of(order, 3, 5) for order in ORDERS]


@pytest.mark.parametrize("backend", (*FAST, "reference"))
@pytest.mark.parametrize("height, width", [(1, 1), (1, 33), (5, 13), (13, 10)])
@pytest.mark.parametrize("order", ORDERS)
def test_every_order_against_a_permutation_and_the_recurrence(order, height, width, backend):
    """65 tokens are one chunk, or two, and one token; 130 are two, or four, and two."""
    inputs = arguments(height * width)
    assert_equals_plain(inputs, [tokens_of(order, height, width)], [route_of(order, height, width)], backend)


@pytest.mark.parametrize("backend", (*FAST, "reference"))
@pytest.mark.parametrize("channels", [1, 17, 70])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_four_routes_in_one_call(groups, channels, backend):
    """The results of the routes of a group are added up, as are the gradients of its tokens."""
    inputs = arguments(35, routes=4, channels=channels, groups=groups)
    orders = [tokens_of(order, 5, 7) for order in ORDERS]
    assert_equals_plain(inputs, orders, [route_of(order, 5, 7) for order in ORDERS], backend)


@pytest.mark.parametrize("backend", (*FAST, "reference"))
def test_several_tasks_with_all_orders_in_one_call(backend):
    """3 groups of 4 routes over more than one chunk."""
    orders = [tokens_of(order, 10, 7) for order in ORDERS] * 3
    inputs = arguments(70, routes=12, channels=5, state=3, groups=3)
    assert_equals_plain(inputs, orders, [route_of(order, 10, 7) for order in ORDERS] * 3, backend)


@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_orders_of_all_tasks_with_more_than_65536_tokens(backend):
    """Position-first over (T, L) = (5, 14001), against a sequence that was reordered beforehand."""
    device_of(backend)
    tasks, pixels = 5, 14_001
    inputs = arguments(tasks * pixels, channels=2, state=1, batch=1)
    inputs["A"] = torch.full_like(inputs["A"], -1e-3)
    order = torch.arange(tasks * pixels).view(tasks, pixels).T.flatten()
    moved = {name: x[:, order] if x.dim() == 4 else x for name, x in inputs.items()}
    results = []
    for tensors, route in ((inputs, Route(tasks, pixels, by_column=True)), (moved, Route(1, tasks * pixels))):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in tensors.items()}
        y = scan_routes(**leaves, routes=[route], delta_softplus=True, backend=backend)
        grads = torch.autograd.grad((y * tensors["u"]).sum(), list(leaves.values()))
        results.append([y, *grads])
    for name, a, b in zip(("y", *NAMES), *results, strict=True):
        assert relative_error(a[:, order] if a.dim() == 4 else a, b) <= 1e-13, name


@pytest.mark.parametrize("backend", FAST)
def test_any_strides(backend):
    """Slices of wider rows, group-major projections and broadcast maps, as blocks hand them over."""
    inputs = arguments(35, routes=2, channels=6)
    wide = torch.cat((inputs["u"], inputs["u"]), dim=-1)
    strided = {**inputs, "u": wide[..., 6:], "delta": inputs["delta"].movedim(2, 0).contiguous().movedim(0, 2),
               "B": torch.cat((inputs["B"], inputs["C"]), dim=-1)[..., :2],
               "C": inputs["C"][:1, :1].expand(2, 35, -1, -1), "A": inputs["A"].mT.contiguous().mT,
               "D": inputs["D"].T.contiguous().T}
    assert not any(strided[name].is_contiguous() for name in ("u", "delta", "A", "B", "C", "D"))
    routes = [Route(5, 7), Route(5, 7, by_column=True, reverse=True)]
    orders = [tokens_of("rows", 5, 7), tokens_of("columns_back", 5, 7)]
    assert_equals_plain({name: tensor.clone() for name, tensor in strided.items()}, orders, routes, backend)
    device = device_of(backend)
    dtype = torch.float32 if backend == "mamba_ssm" else torch.float64
    moved = {name: tensor.to(device, dtype) for name, tensor in strided.items()}
    expected = scan_routes(**{name: tensor.contiguous() for name, tensor in moved.items()}, routes=routes,
                           backend=backend)
    assert torch.equal(scan_routes(**moved, routes=routes, backend=backend), expected)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_half_results_of_several_routes_are_added_in_single_precision(backend, groups):
    device_of(backend)
    inputs = {name: tensor.bfloat16() for name, tensor in arguments(35, routes=4, groups=groups).items()}
    routes = four_routes(5, 7)
    doubles = {name: tensor.double() for name, tensor in inputs.items()}
    exact = scan_routes(**doubles, routes=routes, delta_softplus=True, backend="reference")
    y = scan_routes(**inputs, routes=routes, delta_softplus=True, backend=backend)
    assert y.dtype == torch.bfloat16
    # One rounding of each sum, not of each of its terms.
    assert ((y.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-6 * exact.abs().max()).all()


@pytest.mark.parametrize("backend", (*FAST, "reference"))
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_step_sizes_of_low_rank(groups, backend):
    """Brought to the channels inside the operator, as outside of it."""
    device = device_of(backend)
    dtype = torch.float32 if backend == "mamba_ssm" else torch.float64
    inputs = arguments(35, routes=4, channels=6, groups=groups)
    inputs |= {"delta": draw(1)(2, 35, 4, 3), "delta_weight": draw(2)(4, 6, 3)}
    leaves = {name: tensor.to(device, dtype).requires_grad_() for name, tensor in inputs.items()}
    wide = {**leaves, "delta": torch.einsum("bpkr,ker->bpke", leaves["delta"], leaves["delta_weight"])}
    del wide["delta_weight"]
    routes, results = four_routes(5, 7), []
    for tensors in (leaves, wide):
        y = scan_routes(**tensors, routes=routes, delta_softplus=True, backend=backend)
        results.append([y, *torch.autograd.grad((y * draw(9)(*y.shape).to(y)).sum(), list(leaves.values()))])
    for name, a, b in zip(("y", *leaves), *results, strict=True):
        assert relative_error(a, b) <= tolerance(backend, 1e-12), name


@pytest.mark.parametrize("batch, tokens", [(1, 1), (2, 127), (3, 512), (1, 1021), (0, 7), (2, 0)])
def test_sum_over_tokens_in_pieces(batch, tokens):
    """As on a GPU; 1021 is prime and one piece."""
    left, right = draw(1)(batch, tokens, 3, 5), draw(2)(batch, tokens, 3, 2)
    torch.testing.assert_close(sum_of_products(left, right), torch.einsum("bpke,bpkr->ker", left, right))


@pytest.mark.parametrize("groups, per_group", [(1, 4), (2, 1), (3, 2)])
def test_projections_as_on_a_gpu(groups, per_group):
    """Values and gradients, of rows that are part of wider ones; results lie as they are read."""
    x, weight = draw(1)(2, 35, groups, 9)[..., :6].double(), draw(2)(groups * per_group, 5, 6).double()
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    found = Projection.apply(x, weight.unflatten(0, (groups, -1)).flatten(1, 2))
    assert found.is_contiguous()
    right = project(x, weight)
    torch.testing.assert_close(found.view_as(right), right, rtol=1e-12, atol=1e-12)
    grad = draw(3)(*found.shape).double()
    for one, other in zip(torch.autograd.grad(found, leaves, grad),
                          torch.autograd.grad(right, leaves, grad.view_as(right)), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


def test_a_rank_in_eights_changes_nothing():
    """Values and gradients; the weights of steps get zeros, those of B and C keep their place behind them."""
    normal, routes = draw(5), four_routes(5, 7)
    weights = S6Weights(*(x.double().requires_grad_() for x in (
        normal(4, 3 + 8, 6), normal(4, 6, 3), normal(4, 6), normal(4, 6, 4), normal(4, 6))))
    wide = aligned(weights)
    assert wide.x_proj.shape == (4, 8 + 8, 6) and wide.dt_proj_weight.shape == (4, 6, 8) and aligned(wide) is wide
    x, grad = normal(2, 35, 1, 6).double(), normal(2, 35, 1, 6).double()
    results = [[y, *torch.autograd.grad(y, weights, grad)] for y in (s6_scan(x, each, routes)
                                                                     for each in (weights, wide))]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_step_sizes_of_low_rank_are_what_is_kept():
    inputs = arguments(35, routes=2, channels=6) | {"delta": draw(1)(2, 35, 2, 3), "delta_weight": draw(2)(2, 6, 3)}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(tuple(x.shape)) or x, lambda x: x):
        scan_routes(**{name: x.requires_grad_() for name, x in inputs.items()}, routes=[Route(5, 7)] * 2,
                    backend="torch")
    assert kept.count((2, 35, 2, 3)) == 1 and kept.count((2, 35, 2, 6)) == 1  # the step sizes, and u


@pytest.mark.parametrize("backend", FAST)
def test_s6_scan_of_one_group_equals_its_part_of_a_grouped_scan(backend):
    device, normal = device_of(backend), draw()
    set_scan_backend(backend)
    try:
        weights = S6Weights(*(x.to(device, torch.float32) for x in (
            normal(4, 3 + 8, 6), normal(4, 6, 3), normal(4, 6), normal(4, 6, 4), normal(4, 6))))
        x, source = (normal(2, 35, 4, 6).to(device, torch.float32) for _ in range(2))
        routes = four_routes(5, 7)
        together, shared = s6_scan(x, weights, routes, source), s6_scan(x[:, :, :1], weights, routes)
        pairs = s6_scan(x[:, :, :2], weights, routes, source[:, :, :1])
        total, total_of_pair = 0, torch.zeros_like(pairs)
        for k, route in enumerate(routes):
            own = S6Weights(*(value[k:k + 1] for value in weights))
            part = s6_scan(x[:, :, k:k + 1], own, [route], source[:, :, k:k + 1])
            torch.testing.assert_close(together[:, :, k:k + 1], part, rtol=1e-5, atol=1e-5)
            total = total + s6_scan(x[:, :, :1], own, [route])
            total_of_pair[:, :, k // 2] += s6_scan(x[:, :, k // 2, None], own, [route], source[:, :, :1]).squeeze(2)
        torch.testing.assert_close(shared, total, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(pairs, total_of_pair, rtol=1e-5, atol=1e-4)
    finally:
        set_scan_backend("auto")


@pytest.mark.parametrize("window", [0, 2])
@pytest.mark.parametrize("source_of", ["own", "one for all", None])
def test_maps_of_several_tasks_in_one_call_equal_calls_one_by_one(source_of, window):
    normal = draw()
    weights = S6Weights(normal(12, 3 + 8, 6), normal(12, 6, 3), normal(12, 6), normal(12, 6, 4), normal(12, 6))
    x, sources = normal(2, 5, 7, 3, 6), normal(2, 5, 7, 3, 6)
    source = {"own": sources, "one for all": sources[:, :, :, 0], None: None}[source_of]
    together = ss2d_core(x, weights, source, window)
    for t in range(3):
        own = S6Weights(*(value[4 * t:4 * t + 4] for value in weights))
        source_t = source[:, :, :, t] if source_of == "own" else source
        torch.testing.assert_close(together[:, :, :, t], ss2d_core(x[:, :, :, t], own, source_t, window), rtol=1e-12,
                                   atol=1e-12)


# ---- what torch sees of the operator ----

def operator_inputs(groups=1):
    inputs = arguments(35, routes=2, channels=5, batch=3, groups=groups)
    inputs["delta"] = inputs["delta"].movedim(2, 0).contiguous().movedim(0, 2)
    return {name: x.requires_grad_() for name, x in inputs.items()}


@pytest.mark.parametrize("kernel", ["cpp", "torch"])
@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_operator_is_registered_correctly(groups, low_rank, kernel):
    """Schema, fake tensors, autograd registration and AOT dispatch with fixed and with symbolic shapes."""
    device_of(kernel)
    inputs = operator_inputs(groups)
    if low_rank:
        inputs |= {"delta": draw(1)(3, 35, 2, 3).requires_grad_(), "delta_weight": draw(2)(2, 5, 3).requires_grad_()}
    tensors = (*inputs.values(), *([] if low_rank else [None]))
    arguments_ = (*tensors, [5, 7, 0, 0, 5, 7, 1, 1], True, True, kernel)
    torch.library.opcheck(torch.ops.mtdp.scan.default, arguments_)
    values = [None if x is None else x.detach() for x in tensors]
    torch.library.opcheck(torch.ops.mtdp.scan.default, (*values, *arguments_[8:10], False, kernel))


@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiles_without_a_graph_break(compiler, backend):
    device_of(backend)
    torch._dynamo.reset()
    inputs, routes = operator_inputs(), (Route(5, 7), Route(5, 7, by_column=True))

    def run(u, delta, A, B, C, D, delta_bias):
        return scan_routes(torch.sin(u), delta, A, B, C, routes, D, delta_bias, True, backend=backend).sum(2)

    compiled = torch.compile(run, fullgraph=True, backend=compiler)
    results = [[y, *torch.autograd.grad(y.square().sum(), list(inputs.values()))]
               for y in (function(*inputs.values()) for function in (run, compiled))]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_exports_as_one_node():
    class Block(torch.nn.Module):
        def forward(self, u, delta, A, B, C):
            return scan_routes(u, delta, A, B, C, [Route(5, 7), Route(5, 7)])

    inputs = [x.detach() for x in list(operator_inputs(groups=2).values())[:5]]
    program = torch.export.export(Block(), tuple(inputs))
    assert [str(node.target) for node in program.graph.nodes].count("mtdp.scan.default") == 1
    torch.testing.assert_close(program.module()(*inputs), Block()(*inputs))


@pytest.mark.parametrize("kernel", ["cpp", "torch"])
def test_gradient_where_none_was_expected_at_tracing(kernel):
    """An operator traced without keeping states replays them in the backward pass."""
    device_of(kernel)
    inputs, results = operator_inputs(), []
    for keep in (False, True):
        y = torch.ops.mtdp.scan(*inputs.values(), None, [5, 7, 0, 0, 5, 7, 1, 1], True, keep, kernel)[0]
        results.append(torch.autograd.grad(y.square().sum(), list(inputs.values())))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("kernel", ["cpp", "torch"])
def test_states_are_kept_only_where_asked_for(kernel):
    device_of(kernel)
    arguments_ = (*(x.detach() for x in operator_inputs().values()), None, [5, 7, 0, 0] * 2, True)
    shapes = [tuple(torch.ops.mtdp.scan(*arguments_, keep, kernel)[2].shape) for keep in (False, True)]
    assert shapes == [(0,), (-(-35 // chunk_tokens(kernel)), 3, 2, 2, 5)]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_cost_is_counted_by_torch_and_by_us(device):
    inputs = {name: x.detach().to(device).requires_grad_() for name, x in operator_inputs().items()}
    macs = scan_flops(3, 35, 2 * 5, 2)
    assert macs == 9 * 3 * 35 * 10 * 2 + 3 * 35 * 10
    with FlopCounterMode(display=False) as torch_counter, count_scan_flops() as counter:
        y = scan_routes(**inputs, routes=[Route(5, 7), Route(7, 5)])
        forward = torch_counter.get_total_flops()
        torch.autograd.grad(y.sum(), list(inputs.values()))
    assert forward == 2 * macs and torch_counter.get_total_flops() == 3 * forward
    assert (counter.calls, counter.flops, counter.elements) == (1, macs, 3 * 35 * 10)


# ---- errors ----

@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "C", "D", "delta_bias"])
@pytest.mark.parametrize("shape", [(2, 35, 2, 4)])
def test_wrong_shape_names_the_argument(name, shape):
    inputs = arguments(35, routes=2) | {name: torch.zeros(shape, dtype=torch.float64)}
    with pytest.raises(ValueError, match=rf"{name if name != 'delta' else 'u'}.*expected|needs delta"):
        scan_routes(**inputs, routes=[Route(5, 7)] * 2)


@pytest.mark.parametrize("groups", [0, 3, 8])
def test_groups_must_divide_the_routes(groups):
    inputs = arguments(35, routes=4) | {"u": torch.zeros(2, 35, groups, 3, dtype=torch.float64)}
    with pytest.raises(ValueError, match=r"u has shape \(2, 35, ., 3\), expected \(2, 35, G, 3\) with G groups that "
                                         "divide 4 routes"):
        scan_routes(**inputs, routes=four_routes(5, 7))


@pytest.mark.parametrize("routes", [[Route(5, 7)], [Route(5, 7), Route(5, 6)]])
def test_every_route_must_cover_the_tokens(routes):
    with pytest.raises(ValueError, match="2 parameters over 35 tokens need as many routes of that length, got 5 x 7"):
        scan_routes(**arguments(35, routes=2), routes=routes)


def test_arguments_must_be_floating_and_on_one_device():
    inputs = arguments(35)
    with pytest.raises(ValueError, match="B has dtype torch.int64, expected floating point"):
        scan_routes(**{**inputs, "B": inputs["B"].long()}, routes=[Route(5, 7)])
    with pytest.raises(ValueError, match="C is on meta, other arguments on cpu"):
        scan_routes(**{**inputs, "C": inputs["C"].to("meta")}, routes=[Route(5, 7)])
