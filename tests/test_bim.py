"""BIM: what may depend on what, the orders of its scans, its size. Numbers in names count invariants.

One file, to be read against the numbered list of the specification. Grids are not square and have sides that
four does not divide, so that a swapped axis cannot hide.
"""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from models.blocks.s6 import S6
from models.decoders.bim import BIMConfig, BIMDecoder, MSScan
from models.decoders.coarse_to_fine import PatchExpand, PatchExpandHead
from models.ops.scan_cpp import find_cpp_kernel
from models.ops.selective_scan import count_scan_flops
from models.ops.ss2d import ss2d_core, window_positions
from tests.bim_parts import (
    ROUTES,
    STRIDES,
    WIDTHS,
    bi_scan,
    context,
    encoder_maps,
    exact_arithmetic,  # noqa: F401  (a fixture of every test)
    make_identity,
    randomise,
    scan_sequence,
    small_decoder,
)
from utils.options import parse

# ---- the decoder and its blocks ----

def with_tasks_in_order(decoder, order):
    """A decoder whose task weights are those of `decoder`, met in another order."""
    other = small_decoder(order)
    other.load_state_dict(decoder.state_dict())
    return other


def test_12_order_of_tasks():
    decoder, feats = small_decoder("abc"), encoder_maps()
    with torch.no_grad():
        generic, permuted = decoder(feats).feats, with_tasks_in_order(decoder, "cab")(feats).feats
        assert all((generic[task] - permuted[task]).abs().max() > 1e-6 for task in "abc")
        for stage in decoder.stages:
            make_identity(stage.bcfr.scan)
        plain, permuted = decoder(feats).feats, with_tasks_in_order(decoder, "cab")(feats).feats
    assert list(permuted) == list("cab")
    for task in "abc":
        torch.testing.assert_close(permuted[task], plain[task], rtol=0, atol=1e-13)


def test_13_every_task_reaches_every_task_in_bcfr_and_none_in_msst():
    stage = small_decoder("abc").stages[2]
    feats = torch.randn(3, 1, 3, 5, 8, requires_grad=True)
    for block, reaches in ((stage.bcfr, lambda s, t: True), (stage.msst, lambda s, t: s == t)):
        out = block(feats)
        for target in range(3):
            grad, = torch.autograd.grad(out[target].square().sum(), feats, retain_graph=True)
            assert [bool(part.any()) for part in grad] == [reaches(source, target) for source in range(3)]


def test_14_samples_are_independent():
    decoder = small_decoder("ab").train()  # no layer of the decoder uses statistics of the batch
    feats = encoder_maps(batch=3)
    with torch.no_grad():
        together = decoder(feats).feats
        for i in range(3):
            alone = decoder([feat[i:i + 1] for feat in feats]).feats
            for task in "ab":
                torch.testing.assert_close(alone[task], together[task][i:i + 1], rtol=0, atol=1e-12)


# ---- MS-Scan ----

def ms_scan(width=13, tasks=1, **options):
    return randomise(MSScan(tasks, width, rank=2, config=BIMConfig(d_state=4, **options)))


def of_one_task(scan):
    """MS-Scan as a function of a map (B, H, W, D)."""
    return lambda feat: scan(feat.unsqueeze(3).split(scan.widths, dim=-1)).squeeze(3)


def test_every_task_has_its_own_ms_scan():
    together, feat = ms_scan(tasks=3), torch.randn(2, 7, 9, 3, 13)
    out = together(feat.split(together.widths, dim=-1))
    for task in range(3):
        alone = ms_scan()
        alone.load_state_dict({name: value[4 * task:4 * task + 4] for name, value in together.state_dict().items()})
        torch.testing.assert_close(out[..., task, :], of_one_task(alone)(feat[..., task, :]), rtol=0, atol=1e-13)


def plain_four_routes(feat, weights):
    """The four-route scan of (B, H, W, D) from its table of positions, one route at a time."""
    height, width = feat.shape[1:3]
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    rows, columns = (y * width + x).flatten(), (x * height + y).flatten()
    last, total = height * width - 1, 0
    pixels = rearrange(feat, "b h w d -> b d (h w)")
    for k, position in enumerate((rows, columns, last - rows, last - columns)):
        route = type(weights)(*(value[k:k + 1] for value in weights))
        sequence = torch.empty_like(pixels)
        sequence[..., position] = pixels
        total = total + scan_sequence(sequence, route)[..., position]
    return rearrange(total, "b d (h w) -> b h w d", h=height)


def test_15_scale_one_is_the_four_route_scan():
    feat = torch.randn(2, 7, 9, 13)
    whole = ms_scan(scales=(1,))
    expected = plain_four_routes(feat, whole.groups[0].weights)
    torch.testing.assert_close(of_one_task(whole)(feat), expected, rtol=0, atol=1e-12)
    grouped = ms_scan()
    first = plain_four_routes(feat[..., :5], grouped.groups[0].weights)
    torch.testing.assert_close(of_one_task(grouped)(feat)[..., :5], first, rtol=0, atol=1e-12)


def test_pooling_and_upsampling_of_a_coarse_group():
    feat, scan = torch.randn(1, 7, 9, 13), ms_scan()
    part = feat[..., 9:]  # third group, scale 4
    cells = torch.stack([torch.stack([part[:, i:i + 4, j:j + 4].mean((1, 2)) for j in (0, 4, 8)], 1)
                         for i in (0, 4)], 1)  # (1, 2, 3, 4)
    coarse = plain_four_routes(cells, scan.groups[2].weights).movedim(-1, 1)
    expected = F.interpolate(coarse, size=(7, 9), mode="bilinear", align_corners=False).movedim(1, -1)
    torch.testing.assert_close(of_one_task(scan)(feat)[..., 9:], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", ["scale", "window"])
def test_16_groups_are_isolated(variant):
    scan = ms_scan(ms_scan=variant, windows=(0, 3, 2))
    assert scan.widths == [5, 4, 4]
    feat = torch.randn(1, 7, 9, 13, requires_grad=True)
    for i, out in enumerate(of_one_task(scan)(feat).split(scan.widths, dim=-1)):
        grad, = torch.autograd.grad(out.square().sum(), feat, retain_graph=True)
        for j, part in enumerate(grad.split(scan.widths, dim=-1)):
            assert bool(part.any()) == (i == j)


@pytest.mark.parametrize("group, scale", [(1, 2), (2, 4)])
def test_17_patterns_without_mean_are_invisible_to_a_coarse_group(group, scale):
    scan, feat = ms_scan(12), torch.randn(1, 8, 12, 12)
    pattern = torch.randn(1, 4, 8, 12)
    cells = F.avg_pool2d(pattern, scale)
    pattern = (pattern - F.interpolate(cells, scale_factor=scale, mode="nearest")).movedim(1, -1)
    moved = feat.clone()
    moved[..., 4 * group:4 * group + 4] += pattern
    torch.testing.assert_close(of_one_task(scan)(moved), of_one_task(scan)(feat), rtol=0, atol=1e-12)
    moved[..., :4] += pattern  # the fine group sees it
    assert (of_one_task(scan)(moved) - of_one_task(scan)(feat))[..., :4].abs().max() > 1e-3


@pytest.mark.parametrize("swap, transform", [
    pytest.param((1, 0, 3, 2), lambda x: x.transpose(1, 2), id="transpose"),
    pytest.param((2, 3, 0, 1), lambda x: x.flip(1, 2), id="rotate_180")])
def test_18_symmetries_of_the_routes(swap, transform):
    scan, swapped = ms_scan(12), ms_scan(12)
    swapped.load_state_dict({name: value[list(swap)] for name, value in scan.state_dict().items()})
    feat = torch.randn(2, 8, 12, 12)
    found, expected = of_one_task(swapped)(transform(feat)), transform(of_one_task(scan)(feat))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("width, height, breadth", [(12, 8, 12), (13, 7, 9)])
def test_19_size_and_work_of_ms_scan(width, height, breadth):
    scan, ancestor = ms_scan(width), ms_scan(width, scales=(1,))

    def count(module):
        return sum(p.numel() for p in module.parameters())

    assert count(scan) == count(ancestor) == 4 * width * (2 * 2 + 3 * 4 + 2)  # d (2 R + 3 N + 2) per route
    with count_scan_flops() as counter:
        of_one_task(scan)(torch.randn(1, height, breadth, width))
    groups = zip(scan.widths, (1, 2, 4), strict=True)
    assert counter.elements == sum(4 * -(-height // r) * -(-breadth // r) * d for d, r in groups)
    assert counter.calls == 3
    if width % 3 == 0:
        assert counter.elements == 0.4375 * 4 * height * breadth * width


@pytest.mark.parametrize("height, width, window", [
    (7, 9, 2), (7, 9, 4), (3, 5, 8), (1, 6, 2), (8, 8, 8), (5, 2, 3)])
def test_20_window_orders(height, width, window):
    position = window_positions(height, width, window)
    assert torch.equal(position.sort().values, torch.arange(height * width))
    if window >= max(height, width):
        assert torch.equal(position, torch.arange(height * width))
    order, expected = position.argsort(), []
    for top, left in product(range(0, height, window), range(0, width, window)):
        expected += [y * width + x for y in range(top, min(top + window, height))
                     for x in range(left, min(left + window, width))]
    assert order.tolist() == expected


@pytest.mark.parametrize("window", [2, 3, 99])
def test_20_window_variant_follows_its_positions(window):
    weights, feat = ms_scan(3, scales=(1,)).groups[0].weights, torch.randn(2, 7, 9, 3)
    total, last = 0, 62
    rows, columns = window_positions(7, 9, window), rearrange(window_positions(9, 7, window), "(w h) -> (h w)", h=7)
    for k, position in enumerate((rows, columns, last - rows, last - columns)):
        sequence = feat.flatten(1, 2)[:, position.argsort()].mT
        route = type(weights)(*(value[k:k + 1] for value in weights))
        total = total + scan_sequence(sequence, route).mT[:, position]
    torch.testing.assert_close(ss2d_core(feat, weights, window=window).flatten(1, 2), total, rtol=0, atol=1e-13)


def test_20_window_variant_with_full_windows_is_the_plain_scan():
    scan, feat = ms_scan(6, ms_scan="window", windows=(0, 99)), torch.randn(1, 7, 9, 6)
    expected = [ss2d_core(part, group.weights)
                for part, group in zip(feat.split(3, dim=-1), scan.groups, strict=True)]
    torch.testing.assert_close(of_one_task(scan)(feat), torch.cat(expected, dim=-1), rtol=0, atol=1e-13)


# ---- size of the model ----

NYUD = {"semseg": 40, "depth": 1, "normals": 3, "edge": 1}
PASCAL = {"semseg": 21, "human_parts": 7, "sal": 2, "normals": 3, "edge": 1}


def decoder_and_heads(embed, outputs, **options):
    with torch.device("meta"):
        widths = tuple(embed * 2**i for i in range(4))
        decoder = BIMDecoder(context(outputs, widths), BIMConfig(**options))
        return decoder, nn.ModuleDict({task: decoder.make_head(n) for task, n in outputs.items()})


def count(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


@pytest.mark.parametrize("outputs, parts, total, shallow", [
    (NYUD, (24783360, 6198528, 47932416, 19375104, 2360832, 8685), 100658925, 271893921),
    (PASCAL, (30979200, 7748160, 59915520, 24054912, 2951040, 6562), 125655394, 290898838)],
    ids=["nyud", "pascal"])
def test_21_parameters_of_the_full_model(outputs, parts, total, shallow):
    decoder, heads = decoder_and_heads(192, outputs)
    of_stage = [count(*(getattr(stage, name) for stage in decoder.stages))
                for name in ("expand", "fuse", "msst", "bcfr")]
    of_head = [count(*(getattr(head, name) for head in heads.values())) for name in ("expand", "proj")]
    assert (*of_stage, *of_head) == parts
    assert count(decoder, heads) == total
    encoder = 195201204  # Swin-L with its four output norms
    assert encoder + count(*decoder_and_heads(192, outputs, msst_depth=1)) == shallow


def test_21_parameters_by_stage_and_of_smaller_encoders():
    decoder, _ = decoder_and_heads(192, NYUD)
    assert [count(stage.msst[0]) / 4 for stage in decoder.stages] == [4455936, 1195776, 339840]
    assert [count(stage.bcfr) for stage in decoder.stages] == [14684160, 3729408, 961536]
    assert [count(stage.bcfr.scan) for stage in decoder.stages] == [448512, 150528, 56832]
    assert count(*decoder_and_heads(96, NYUD)) == 26418573
    assert count(*decoder_and_heads(128, NYUD)) == 45851821


def test_21_names_in_files():
    names = set(small_decoder("ab").state_dict())
    route_leaves = ("x_proj", "dt_proj_weight", "dt_proj_bias", "A_log", "D")
    expected = {
        "expand.a": ("proj.weight", "norm.weight", "norm.bias"),
        "fuse.b": ("weight", "bias"),
        "msst.a.1": ("norm.weight", "norm.bias", "in_proj.weight", "conv.weight", "conv.bias",
                     "out_norm.weight", "out_norm.bias", "out_proj.weight"),
        "msst.b.0.scan.groups.2": route_leaves,
        "bcfr": ("norm.a.weight", "norm.a.bias", "in_proj.b.weight", "conv.a.weight", "conv.a.bias",
                 "out_norm.b.weight", "out_norm.b.bias", "out_proj.a.weight"),
        **{f"bcfr.scan.{route}": route_leaves for route in ROUTES}}
    for stage, (module, leaves) in product(range(3), expected.items()):
        assert names >= {f"stages.{stage}.{module}.{leaf}" for leaf in leaves}
    assert set(dict(PatchExpandHead(8, 3).named_parameters())) == {
        "expand.proj.weight", "expand.norm.weight", "expand.norm.bias", "proj.weight", "proj.bias"}


def test_initial_values_of_the_scan():
    route = S6(64, rank=4, state=16, routes=4)
    assert torch.equal(route.A_log[2, 5], torch.arange(1, 17).log())
    assert torch.equal(route.D, torch.ones(4, 64))
    step = F.softplus(route.dt_proj_bias)
    assert 0.001 <= step.min() < 0.003 and 0.03 < step.max() <= 0.1
    assert 0.9 / 8 < route.x_proj.abs().max() <= 1 / 8 and 0.9 / 2 < route.dt_proj_weight.abs().max() <= 1 / 2


# ---- precision, gradients, options, errors ----

def test_22_float32_against_float64():
    torch.manual_seed(3)
    decoder = small_decoder("abc")
    heads = {task: randomise(decoder.make_head(2)) for task in "abc"}
    feats = encoder_maps()
    results = []
    for dtype in (torch.float64, torch.float32):
        with torch.no_grad():
            out = decoder.to(dtype)([feat.to(dtype) for feat in feats]).feats
            results.append({task: heads[task].to(dtype)(feat) for task, feat in out.items()})
    for task in "abc":
        exact, single = results[0][task], results[1][task]
        assert exact.shape == (1, 2, 64, 96) and single.dtype == torch.float32
        assert 0.1 < exact.std() < 10
        assert (exact - single).abs().max() < 1e-4


@pytest.mark.parametrize("backend", ["cpp", "torch"])
@pytest.mark.parametrize("tasks", [1, 3])
def test_23_fast_scan_equals_the_recurrence_in_bi_scan(tasks, backend, monkeypatch):
    """T * L = 45 * T is not a multiple of the chunk length."""
    reason = find_cpp_kernel()
    if backend == "cpp" and reason:
        pytest.skip(reason)
    scan, feat, results = bi_scan(), torch.randn(2, 5, 9, tasks, 6), {}
    for name in (backend, "reference"):
        monkeypatch.setenv("SCAN_BACKEND", name)
        leaf = feat.clone().requires_grad_()
        out = scan(leaf)
        results[name] = [out, *torch.autograd.grad(out.square().sum(), [leaf, *scan.parameters()])]
    for fast, plain in zip(*results.values(), strict=True):
        assert (fast - plain).abs().max() <= 1e-11 * plain.abs().max()


@pytest.mark.parametrize("options", [{}, {"order": "bcfr_first"}, {"ms_scan": "window"}, {"msst_depth": 1},
                                     {"scales": [1]}, {"expand": 1, "d_state": 3}, {"drop_path_rate": 0.5},
                                     {"between_passes": "norm"}])
@pytest.mark.parametrize("tasks", ["a", "abcde"])
def test_every_option_runs_and_uses_every_parameter(tasks, options):
    decoder = small_decoder(tasks, **options)
    assert decoder.channels == 8
    out = decoder(encoder_maps(batch=2)).feats
    assert {task: feat.shape for task, feat in out.items()} == {task: (2, 8, 16, 24) for task in tasks}
    sum(feat.square().sum() for feat in out.values()).backward()
    assert not [name for name, p in decoder.named_parameters() if p.grad is None or not p.grad.any()]


def test_order_of_the_blocks_matters():
    first, second = small_decoder("ab"), small_decoder("ab", order="bcfr_first")
    second.load_state_dict(first.state_dict())
    feats = encoder_maps(height=32, width=64)
    with torch.no_grad():
        assert (first(feats).feats["a"] - second(feats).feats["a"]).abs().max() > 1e-6


@pytest.mark.parametrize("order, rates", [
    ("msst_first", [[0.2, 0.175, 0.15], [0.125, 0.1, 0.075], [0.05, 0.025, 0.0]]),
    ("bcfr_first", [[0.175, 0.15, 0.2], [0.1, 0.075, 0.125], [0.025, 0.0, 0.05]])])
def test_stochastic_depth_falls_to_zero(order, rates):
    decoder = small_decoder("ab", drop_path_rate=0.2, order=order)
    for stage, expected in zip(decoder.stages, rates, strict=True):
        branches = [*stage.msst, stage.bcfr]
        assert [branch.drop_path.drop_prob for branch in branches] == pytest.approx(expected)


def test_patch_expand_puts_channels_into_pixels():
    expand = PatchExpand(3, 5, scale=2)
    feat = torch.randn(1, 2, 3, 3)
    out, raw = expand(feat), expand.proj(feat)
    for y, x, p1, p2 in product(range(2), range(3), range(2), range(2)):
        channels = raw[0, y, x, (2 * p1 + p2) * 5:(2 * p1 + p2 + 1) * 5]  # (p1, p2, c), c fastest
        torch.testing.assert_close(out[0, 2 * y + p1, 2 * x + p2], expand.norm(channels))


@pytest.mark.parametrize("options, message", [
    ({"order": "both"}, "order' must be one of msst_first, bcfr_first, got 'both'"),
    ({"ms_scan": "wavelet"}, "ms_scan' must be one of scale, window, got 'wavelet'"),
    ({"scales": ()}, "scales"), ({"scales": (0, 2)}, "scales"), ({"windows": (-1,)}, "windows"),
    ({"msst_depth": 0}, "msst_depth' must be a whole number of at least 1, got 0"),
    ({"msst_depth": 1.5}, "whole number"), ({"scales": (1, "a")}, "whole number"), ({"scales": 2}, "a list"),
    ({"d_state": 0}, "d_state"), ({"expand": 0}, "expand"),
    ({"drop_path_rate": 1.0}, "drop_path_rate")])
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        parse(BIMConfig, options)


@pytest.mark.parametrize("tasks, widths, strides, message", [
    ("ab", (64,), (16,), r"needs four maps.*got widths \(64,\) and strides \(16,\)"),
    ("ab", (8, 8, 8, 8), STRIDES, r"got widths \(8, 8, 8, 8\)"),
    ("ab", WIDTHS, (2, 4, 8, 16), r"strides \(2, 4, 8, 16\)"),
    ("ab", (), (), r"needs one or more maps; got widths \(\)"), ("", WIDTHS, STRIDES, "one or more tasks, got none")])
def test_wrong_encoders_and_tasks_are_refused(tasks, widths, strides, message):
    with pytest.raises(ValueError, match=message):
        BIMDecoder(context(tasks, widths, strides), BIMConfig())


def test_input_sides_must_be_multiples_of_32():
    feats = encoder_maps()
    feats[2] = feats[2][..., :-1]
    with pytest.raises(ValueError, match="up-sampled map is 4x6, the encoder's 4x5.*multiples of 32"):
        small_decoder()(feats)
