"""BIM's BI-Scan: the orders of its passes, and what may depend on what. Numbers in names count invariants."""

from itertools import product

import pytest
import torch
from einops import rearrange
from torch import nn

from models.blocks.s6 import S6
from models.decoders.bim import BCFRBlock, BIMConfig
from models.ops.selective_scan import count_scan_flops
from tests.bim_parts import (
    bi_scan,
    dependence,
    exact_arithmetic,  # noqa: F401  (a fixture of every test)
    make_identity,
    one_pass,
    over_tasks,
    randomise,
    scan_sequence,
)

# ---- BI-Scan ----

def recorded_routes(monkeypatch, scan, feat):
    """The routes that BI-Scan asks its two rounds of scans to take, and what is scanned, when scans change nothing."""
    rounds = []

    def identity(tokens, weights, routes):
        rounds.append((tokens.clone(), weights, routes))
        return tokens

    monkeypatch.setattr("models.decoders.bim.s6_scan", identity)
    out = over_tasks(scan)(feat)
    return rounds, out


@pytest.mark.parametrize("tasks, height, width", [(1, 3, 4), (2, 7, 9), (3, 3, 5), (5, 2, 3), (4, 1, 1)])
def test_01_orders_of_the_four_passes(monkeypatch, tasks, height, width):
    length = height * width
    t, y, x = torch.meshgrid(*map(torch.arange, (tasks, height, width)), indexing="ij")
    token = t * length + y * width + x  # the value encodes the token
    feat = token[None, ..., None].expand(2, tasks, height, width, 6).double()
    feat = feat + torch.tensor([0, 0, 0, 0.5, 0.5, 0.5])  # .. and the half of the channels
    scan = bi_scan(6)
    rounds, out = recorded_routes(monkeypatch, scan, feat)
    task_first = (t * length + y * width + x).flatten()
    position_first = ((y * width + x) * tasks + t).flatten()
    last = tasks * length - 1
    expected = ((("fwd_tf", "bwd_tf"), task_first), (("fwd_pf", "bwd_pf"), position_first))
    for (tokens, weights, routes), (names, position) in zip(rounds, expected, strict=True):
        assert tokens.shape == (2, tasks * length, 2, 3)
        for k, (route, where) in enumerate(zip(routes, (position, last - position), strict=True)):
            visited = tokens[1, route.tokens(), k, 0]  # by position; the forward half comes first
            assert torch.equal(visited[where], token.flatten() + 0.5 * k)
            assert all(torch.equal(used[k:k + 1], own) for used, own in
                       zip(weights, one_pass(scan, names[k]), strict=True))
    assert torch.equal(out, feat)  # written back to where each token came from


@pytest.mark.parametrize("normed", [False, True])
def test_02_one_task_scans_the_raster_twice(normed):
    scan, feat = bi_scan(normed=normed), torch.randn(2, 1, 3, 5, 6)
    raster = rearrange(feat, "b 1 h w d -> b d (h w)")
    forward, backward = raster[:, :3], raster[:, 3:].flip(-1)
    for order in ("tf", "pf"):
        if normed and order == "pf":
            forward, backward = (nn.functional.layer_norm(half.mT, (3,)).mT for half in (forward, backward))
        forward = scan_sequence(forward, one_pass(scan, f"fwd_{order}"))
        backward = scan_sequence(backward, one_pass(scan, f"bwd_{order}"))
    expected = rearrange(torch.cat((forward, backward.flip(-1)), dim=1), "b d (h w) -> b 1 h w d", h=3)
    torch.testing.assert_close(over_tasks(scan)(feat), expected, rtol=0, atol=1e-13)


def test_03_one_pixel_makes_both_orders_the_task_order(monkeypatch):
    rounds, _ = recorded_routes(monkeypatch, bi_scan(), torch.randn(1, 5, 1, 1, 6))
    for _, _, (forward, backward) in rounds:
        assert forward.tokens().tolist() == [0, 1, 2, 3, 4]
        assert backward.tokens().tolist() == [4, 3, 2, 1, 0]


@pytest.mark.parametrize("tasks, normed", [(1, False), (2, False), (3, False), (3, True)])
def test_04_mirror(tasks, normed):
    scan, mirrored = bi_scan(normed=normed), bi_scan(normed=normed)
    swap = {"fwd": "bwd", "bwd": "fwd"}
    mirrored.load_state_dict({swap[name[:3]] + name[3:]: value for name, value in scan.state_dict().items()})

    def mirror(feat):
        return torch.cat((feat[..., 3:], feat[..., :3]), dim=-1).flip(1, 2, 3)

    feat = torch.randn(2, tasks, 3, 5, 6)
    torch.testing.assert_close(over_tasks(mirrored)(mirror(feat)), mirror(over_tasks(scan)(feat)), rtol=0, atol=1e-13)


def test_05_one_pass_is_lower_triangular_and_dense():
    route = randomise(S6(4, rank=2, state=3))
    sequence = torch.randn(1, 4, 12, requires_grad=True)
    out = scan_sequence(sequence, route.weights).sum((0, 1))
    rows = [torch.autograd.grad(value, sequence, retain_graph=True)[0].abs().sum((0, 1)) for value in out]
    assert torch.equal(torch.stack(rows) > 0, torch.ones(12, 12).tril().bool())


def forward_rule(tasks, length):
    """The closed form of the forward half's dependence, as (T L, T L) bool."""
    allowed = torch.zeros(tasks, length, tasks, length, dtype=torch.bool)
    for t, q, s, p in product(range(tasks), range(length), range(tasks), range(length)):
        if q == 0:
            allowed[t, q, s, p] = s < t or (s == t and p == 0)
        else:
            allowed[t, q, s, p] = s < tasks - 1 or p <= q - 1 or (t == tasks - 1 and p <= q)
    return allowed.flatten(2).flatten(0, 1)


def test_06_07_dependence_of_both_halves():
    tasks, height, width = 3, 3, 4
    scan, feat = over_tasks(bi_scan()), torch.randn(1, tasks, height, width, 6)
    forward, backward = slice(0, 3), slice(3, 6)
    rule = forward_rule(tasks, height * width)
    forward_found, backward_found = dependence(scan, feat, forward), dependence(scan, feat, backward)
    assert torch.equal(forward_found, rule)
    assert torch.equal(backward_found, rule.flip(0, 1))  # t -> T-1-t and q -> L-1-q on both sides
    assert (forward_found | backward_found).all()  # global receptive field
    leaf = feat.clone().requires_grad_()
    out = scan(leaf)
    for seen, other in ((forward, backward), (backward, forward)):
        grad = torch.autograd.grad(out[..., seen].square().sum(), leaf, retain_graph=True)[0]
        assert grad[..., seen].abs().min() > 0 and not grad[..., other].any()


@pytest.mark.parametrize("tasks, height, width", [(1, 1, 1), (1, 2, 3), (2, 1, 2), (5, 2, 2)])
def test_07_global_receptive_field_for_any_size(tasks, height, width):
    scan, feat = over_tasks(bi_scan()), torch.randn(1, tasks, height, width, 6)
    assert dependence(scan, feat, slice(None)).all()


def test_08_identity():
    scan, feat = bi_scan(), torch.randn(2, 3, 5, 3, 6)
    assert (scan(feat) - feat).abs().max() > 0.1
    make_identity(scan)
    assert torch.equal(scan(feat), feat)


def test_09_memoryless_limit():
    scan, feat = bi_scan(), torch.randn(1, 2, 3, 4, 6)
    nn.init.constant_(scan.A_log, 30)
    assert torch.equal(dependence(over_tasks(scan), feat, slice(None)), torch.eye(24).bool())


def test_10_causality_across_the_border_of_a_task():
    tasks, height, width = 3, 3, 4
    scan, feat = over_tasks(bi_scan()), torch.randn(1, tasks, height, width, 6)

    def changed(task):
        other = feat.clone()
        other[0, task, -1, -1, :3] += 1
        difference = (scan(other) - scan(feat))[0, ..., :3].abs().sum(-1)  # (T, H, W)
        return difference > 0

    assert changed(0)[1:].all()
    last = changed(tasks - 1)
    assert last.sum() == 1 and last[-1, -1, -1]


def test_11_parameters_do_not_grow_with_tasks_and_work_is_linear():
    def routes_parameters(tasks):
        return sum(p.numel() for p in BCFRBlock(list(tasks), 8, 0.0, BIMConfig()).scan.parameters())

    assert routes_parameters("ab") == routes_parameters("abcde")

    def work(tasks, height, width, channels=6):
        with count_scan_flops() as counter:
            bi_scan(channels)(torch.randn(1, height, width, tasks, channels))
        return counter

    base = work(2, 3, 5)
    assert (base.calls, base.elements) == (2, 4 * 2 * 15 * 3)
    for doubled in (work(4, 3, 5), work(2, 6, 5), work(2, 3, 10)):
        assert doubled.elements == 2 * base.elements


def test_the_norm_between_the_passes_bounds_the_second():
    """Without it large tokens grow to their sixteenth power, and the block's norm squares what float32 cannot hold."""
    sizes = {}
    for normed in (False, True):
        scan, feat = bi_scan(normed=normed), torch.randn(1, 3, 4, 2, 6)
        sizes[normed] = [scan(scale * feat).abs().max() for scale in (1e2, 1e4)]
    assert sizes[False][1] / sizes[False][0] > 100.0**12
    assert sizes[True][1] / sizes[True][0] < 2


def test_an_odd_width_cannot_be_halved():
    with pytest.raises(ValueError, match="BI-Scan halves the 7 channels of a stage; expand times its width must be"):
        bi_scan(7)
