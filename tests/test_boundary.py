"""Boundary score: every step against reference numbers, against hand-made cases, and compiled code against SciPy."""

import json

import numpy as np
import pytest
from scipy.sparse.csgraph import maximum_bipartite_matching

from evaluation.boundary.matching import (
    candidates,
    cheapest_match,
    count_annotators,
    count_levels,
    match,
    matching_cost,
    pick_backend,
    thin,
)
from evaluation.boundary.protocol import Protocol, image_counts
from evaluation.boundary.scores import BoundaryTotals, average_precision, best_threshold, precision_recall_f
from evaluation.boundary.suppression import orientation, smoothed, suppress
from evaluation.boundary.truth import connected_components, region_outline, truth_boundary
from tests.shared import SHARED, golden

CASES = sorted(path.stem for path in (SHARED / "golden" / "boundary").glob("[mnp][0-9]*.npz")) or ["absent"]
ONE_TRUTH = [name for name in CASES if not name.startswith("m")]


@pytest.fixture(params=["compiled", "scipy"])
def backend(request) -> str:
    if request.param == "compiled" and pick_backend() != "compiled":
        pytest.skip("no compiler: see the reason in the log")
    return request.param


def case(name: str) -> dict:
    with np.load(golden("boundary") / f"{name}.npz") as content:
        return dict(content.items())


@pytest.mark.parametrize("name", ONE_TRUTH)
def test_counts_equal_exact_matching(name, backend):
    data = case(name)
    thresholds = Protocol(0.1).thresholds
    assert np.array_equal(thresholds, data["thresholds"])
    levels = np.searchsorted(thresholds.astype(np.float32), data["nms"])
    counts = count_levels(levels, data["gt_boundary"][0], len(thresholds), float(data["dist_px"]), backend)
    assert np.array_equal(counts[:, 0], data["exact_matches"])
    assert np.array_equal(counts[:, 1], data["counts"][:, 3])
    assert (counts[:, 0] >= data["counts_runs"][:, :, 0].max(axis=0)).all()


@pytest.mark.parametrize("name", CASES)
def test_ground_truth_and_suppression(name):
    data = case(name)
    kind = "nyud" if data["gt_kind"] == "edge_png" else "regions"
    raws = data["gt_raw"] if data["gt_raw"].ndim == 3 else data["gt_raw"][None]
    assert np.array_equal([truth_boundary(raw, kind) for raw in raws], data["gt_boundary"])
    assert np.array_equal(suppress((data["pred"] / 255).astype(np.float32)), data["nms"])      # bit for bit


def test_single_steps_of_the_suppression_are_equal_to_the_last_bit():
    with np.load(golden("boundary") / "steps.npz") as steps:
        for i in range(4):
            edges = (steps[f"nms_pred_{i}"] / 255).astype(np.float32)
            smooth = smoothed(edges)
            assert smooth.dtype == np.float32 and np.array_equal(smooth, steps[f"nms_smoothed_{i}"])
            np.testing.assert_array_max_ulp(orientation(edges), steps[f"nms_orient_{i}"], 4)   # arctan of the C library
            assert np.array_equal(suppress(edges), steps[f"nms_out_{i}"])


@pytest.mark.parametrize("group", ["pascal_all", "pascal_nonempty", "nyud_all", "nyud_nonempty"])
def test_scores_of_sets(group):
    want = json.loads((golden("boundary") / "summary.json").read_text())[group]
    totals = None
    for name in want["cases"]:
        data = case(name)
        protocol = Protocol(float(data["max_dist"]))
        totals = totals or BoundaryTotals.empty(len(protocol.thresholds))
        totals.add(image_counts(data["pred"], list(data["gt_boundary"]), protocol))
    ours = totals.scores(protocol.thresholds)
    for key, reference in (("odsF", "ods"), ("oisF", "ois"), ("ap", "ap"), ("threshold", "ods_threshold")):
        assert ours[key] == pytest.approx(want["exact_matching"][reference], abs=1e-12)
        for run in want["over_runs"].get(reference, []):
            assert abs(ours[key] - run) <= 0.0012
    assert ours["images"] == len(want["cases"])


def test_several_ground_truths_within_the_references_range(backend):
    data = case("m01_multigt_90x120")
    counts = image_counts(data["pred"], list(data["gt_boundary"]), Protocol(float(data["max_dist"])), backend)
    assert np.array_equal(counts[:, [1, 3]], data["counts"][:, [1, 3]])
    assert (counts >= data["counts_lo"]).all()
    assert (counts <= data["counts_hi"] + [1, 0, 0, 0]).all()          # the reference loses a match now and then


def test_thinning_and_regions(backend):
    with np.load(golden("boundary") / "steps.npz") as steps:
        for i in range(16):
            assert np.array_equal(thin(steps[f"thin_in_{i}"], backend), steps[f"thin_out_{i}"])
        for i in range(6):
            assert np.array_equal(region_outline(connected_components(steps[f"seg_in_{i}"])), steps[f"seg_bmap_{i}"])
            assert np.array_equal(region_outline(steps[f"seg_in_{i}"]), steps[f"seg_bmap_raw_{i}"])


def test_plain_protocol():
    with np.load(golden("boundary") / "protocol_no_nms.npz") as stored:
        for name in ("p01_curves_60x80", "p10_borders_97x131", "n01_thin_120x160"):
            data = case(name)
            protocol = Protocol(float(data["max_dist"]), "plain")
            counts = image_counts(data["pred"], list(data["gt_boundary"]), protocol)
            assert np.array_equal(protocol.thresholds, stored["thresholds"])
            assert np.array_equal(counts[:, 0], stored[f"{name}/exact_matches"])
            assert np.array_equal(counts[:, [1, 3]], stored[f"{name}/counts"][:, [1, 3]])


@pytest.mark.parametrize("seed", range(40))
def test_compiled_counts_equal_scipy(seed):
    """Levels that jump between thresholds, so that pixels leave and regions reopen."""
    if pick_backend() != "compiled":
        pytest.skip("no compiler: see the reason in the log")
    rng = np.random.default_rng(seed)
    size, num = tuple(rng.integers(1, 40, 2)), 12
    smooth = rng.random(size) * np.abs(np.sin(np.arange(size[1]) / rng.uniform(1, 6)))
    levels = (smooth * rng.integers(1, num + 2)).astype(int).clip(0, num)
    truth = thin(rng.random(size) < rng.uniform(0, 0.7), "scipy")
    distance = rng.choice([0.5, 1.0, 1.5, 2.9, 5.0, 60.0])
    assert np.array_equal(count_levels(levels, truth, num, distance, "compiled"),
                          count_levels(levels, truth, num, distance, "scipy"))


@pytest.mark.parametrize("seed", range(20))
def test_matching_is_valid_and_maximum(seed, backend):
    rng = np.random.default_rng(seed)
    size = tuple(rng.integers(1, 50, 2))
    prediction, truth = (rng.random(size) < rng.uniform(0.02, 0.4) for _ in range(2))
    distance = rng.uniform(0.5, 6)
    partner = match(prediction, truth, distance, backend)
    pixels, partners = np.argwhere(partner >= 0), partner[partner >= 0]
    assert prediction[tuple(pixels.T)].all() and truth.ravel()[partners].all()
    assert len(np.unique(partners)) == len(partners)
    offset = pixels - np.stack(np.unravel_index(partners, size), axis=1)
    assert (np.hypot(*offset.T) <= distance).all()
    best = maximum_bipartite_matching(candidates(prediction, truth, distance)[2], perm_type="column")
    assert len(partners) == (best >= 0).sum()


@pytest.mark.parametrize("seed", range(30))
def test_the_cheapest_matching_is_maximum_and_costs_the_same_in_both_backends(seed):
    rng = np.random.default_rng(seed)
    size = tuple(rng.integers(1, 40, 2))
    prediction, truth = (rng.random(size) < rng.uniform(0.02, 0.5) for _ in range(2))
    distance = rng.choice([0.5, 1.0, 1.5, 3.2, 5.0, 50.0])
    compiled, scipy = (cheapest_match(prediction, truth, distance, name) for name in ("auto", "scipy"))
    for partner in (compiled, scipy):
        pixels, partners = np.argwhere(partner >= 0), partner[partner >= 0]
        assert prediction[tuple(pixels.T)].all() and truth.ravel()[partners].all()
        assert len(np.unique(partners)) == len(partners) == (match(prediction, truth, distance) >= 0).sum()
        assert (np.hypot(*(pixels - np.stack(np.unravel_index(partners, size), axis=1)).T) <= distance).all()
    assert matching_cost(compiled) == matching_cost(scipy)


@pytest.mark.parametrize("seed", range(12))
def test_annotators_are_matched_as_well_in_turn_as_threshold_by_threshold(seed):
    """Levels that jump between thresholds, so that pixels arrive and leave."""
    rng = np.random.default_rng(seed)
    size, num = tuple(rng.integers(2, 40, 2)), 12
    smooth = rng.random(size) * np.abs(np.sin(np.arange(size[1]) / rng.uniform(1, 6)))
    levels = (smooth * rng.integers(1, num + 2)).astype(int).clip(0, num)
    truths = np.stack([thin(rng.random(size) < rng.uniform(0, 0.7)) for _ in range(3)])
    distance = rng.choice([0.5, 1.5, 2.9, 5.0, 60.0])
    counts = count_annotators(levels, truths, num, distance)
    slow = count_annotators(levels, truths, num, distance, "scipy")
    assert np.array_equal(counts[:, [0, 2, 3]], slow[:, [0, 2, 3]])
    pairs = sum(count_levels(levels, truth, num, distance)[:, 0] for truth in truths)
    assert np.array_equal(counts[:, 0], pairs)
    assert (np.abs(counts[:, 1] - slow[:, 1]) <= 1 + 0.05 * counts[:, 1]).all()        # matchings of equal cost differ
    assert (counts[:, 1] <= counts[:, 2]).all() and (counts[:, 1] * 3 >= counts[:, 0]).all()


def test_counts_of_annotators_by_hand():
    """Row 0 has a partner for the first annotator, row 4 for the second, row 8 for both, row 12 for none."""
    levels, truths = np.zeros((14, 5), int), np.zeros((2, 14, 5), bool)
    levels[[0, 4, 8, 12], 2] = [1, 2, 2, 3]
    truths[0, [0, 8], 3] = truths[1, [4, 8], 1] = True
    for name in ("auto", "scipy"):
        assert count_annotators(levels, truths, 3, 1.0, name).tolist() == [[4, 3, 4, 400], [3, 2, 3, 300], [0, 0, 1, 0]]


def test_region_boundaries_by_hand():
    label = np.array([[1, 1, 1, 2],
                      [1, 1, 1, 2],
                      [3, 1, 1, 1]])
    assert np.array_equal(region_outline(label), [[0, 0, 1, 0],
                                                  [1, 0, 1, 1],
                                                  [1, 0, 0, 0]])
    corner = np.array([[5, 0], [0, 5]])                                # equal labels that only touch at a corner
    assert len(np.unique(connected_components(corner))) == 4


def test_a_wide_edge_becomes_two_lines_in_the_published_nyud_rule():
    picture = np.zeros((20, 30), np.uint8)
    picture[:, 14:16] = 255
    assert truth_boundary(picture, "nyud")[10].sum() == 2
    assert truth_boundary(picture, "boundary")[10].sum() == 1


@pytest.mark.parametrize("raw, kind, message", [
    (np.zeros((3, 3), np.uint8), "edges", "unknown kind of ground truth 'edges'; known: boundary, regions, nyud, bsds"),
    (np.zeros((3, 3)), "regions", "H x W integers"),
    (np.zeros((3, 3, 3), np.uint8), "nyud", "H x W integers"),
    (np.arange(9, dtype=np.uint8).reshape(3, 3), "boundary", "this one has 9"),
    (np.arange(9, dtype=np.uint8).reshape(3, 3), "bsds", "is it a label map"),
    (np.full((3, 3), 7, np.uint8) + np.eye(3, dtype=np.uint8), "boundary", "0 and another"),
])
def test_wrong_ground_truth_is_one_sentence(raw, kind, message):
    with pytest.raises(ValueError, match=message):
        truth_boundary(raw, kind)


def test_suppression_keeps_the_ridge_and_damps_the_border():
    edges = np.tile(np.array([0, .2, .6, .9, .6, .2, 0], np.float32), (30, 1))
    edges = np.pad(edges, ((0, 0), (12, 12)))                          # the ridge is column 15
    ridges = suppress(edges)
    assert np.array_equal(np.flatnonzero(ridges[15]), [15])
    assert ridges[15, 15] == np.float32(0.9)
    assert ridges[[0, 29], 15].tolist() == [0, 0] and ridges[1, 15] == pytest.approx(0.9 / 5)


def test_scores_by_hand():
    counts = np.array([[3, 4, 3, 6], [2, 4, 2, 2], [0, 4, 0, 0]])
    precision, recall, f = precision_recall_f(counts)
    assert precision.tolist() == [0.5, 1, 1] and recall.tolist() == [0.75, 0.5, 0]
    assert f == pytest.approx([0.6, 2 / 3, 0])
    empty = np.array([[0, 0, 0, 9], [0, 0, 0, 2], [0, 0, 0, 0]])       # no ground truth
    assert [x.tolist() for x in precision_recall_f(empty)] == [[0] * 3, [1] * 3, [0] * 3]
    assert (best_threshold(counts), best_threshold(empty)) == (1, 0)   # it contributes all its false positives
    totals = BoundaryTotals.empty(3)
    totals.add(counts)
    totals.add(empty)
    scores = totals.scores(np.array([0.1, 0.5, 0.9]))
    assert scores["odsF"] == pytest.approx(2 * 0.5 * 0.5 / (0.5 + 0.5)) and scores["threshold"] == 0.5
    assert totals.best.tolist() == [2, 4, 2, 11] and scores["oisF"] == pytest.approx(4 / 15)
    assert scores["images"] == 2


def test_ois_sees_six_decimals():
    low, high = [333333, 1000000, 333333, 1000000], [3333334, 10000000, 3333334, 10000000]      # both print 0.333333
    assert best_threshold(np.array([low, high])) == 0


def test_average_precision_by_hand():
    assert average_precision(np.array([[10, 10, 10, 10], [5, 10, 5, 5], [0, 10, 0, 0]])) == pytest.approx(1.01)
    assert average_precision(np.array([[5, 10, 5, 10]] * 3)) == 0     # one recall only
    # precision falls from 1 at recall 0.5 to 0.5 at recall 1, nothing below 0.5
    line = average_precision(np.array([[10, 10, 10, 20], [5, 10, 5, 5]]))
    assert line == pytest.approx(sum(1 - (r - 0.5) for r in np.arange(50, 101) / 100) / 100)
    # of two thresholds with the same recall the lower one counts
    assert average_precision(np.array([[10, 10, 10, 20], [5, 10, 5, 5], [5, 10, 5, 10]])) == pytest.approx(line)


EMPTY, FULL = np.zeros((24, 31), np.uint8), np.full((24, 31), 255, np.uint8)


@pytest.mark.parametrize("prediction, truth, ods", [
    (EMPTY, EMPTY, 0), (EMPTY, FULL, 0), (FULL, EMPTY, 0), (FULL, FULL, 1),
    *[(np.full(size, 255, np.uint8), np.ones(size, np.uint8), None) for size in ((1, 1), (1, 9), (9, 1), (2, 2))]])
@pytest.mark.parametrize("name", ["nms", "plain"])
def test_degenerate_maps_have_scores(prediction, truth, ods, name, backend):
    protocol = Protocol(0.011, name)
    counts = image_counts(prediction, [truth_boundary(truth, "boundary")], protocol, backend)
    totals = BoundaryTotals.empty(len(protocol.thresholds))
    totals.add(counts)
    scores = totals.scores(protocol.thresholds)
    assert all(np.isfinite(value) for value in scores.values())
    assert ods is None or scores["odsF"] == ods
    several = image_counts(prediction, [truth_boundary(truth, "boundary")] * 2, protocol, backend)
    assert np.array_equal(several, counts * [2, 2, 1, 1])


@pytest.mark.parametrize("prediction, message", [
    (np.full((8, 9), np.nan), "spans nan..nan"), (np.full((8, 9), 1.5), "spans 1.5..1.5"),
    (np.zeros((8, 9), np.int32), "not int32"), (np.zeros((8, 9, 3), np.uint8), "H x W"),
    (np.zeros((9, 8), np.uint8), r"\(9, 8\), its ground truth \(8, 9\)")])
def test_wrong_predictions_are_one_sentence(prediction, message):
    with pytest.raises(ValueError, match=message):
        image_counts(prediction, [np.zeros((8, 9), bool)], Protocol(0.011))


def test_wrong_settings_are_one_sentence():
    with pytest.raises(ValueError, match=r"max_dist must be a share .* got 4.3"):
        Protocol(4.3)
    with pytest.raises(ValueError, match="unknown protocol 'hed'; known: nms, plain"):
        Protocol(0.01, "hed")
    with pytest.raises(ValueError, match="unknown backend 'matlab'; known: auto, compiled, scipy"):
        pick_backend("matlab")


def test_float_and_8_bit_predictions_agree():
    rng = np.random.default_rng(3)
    prediction = rng.integers(0, 256, (40, 50), np.uint8)
    truth = [thin(rng.random((40, 50)) < 0.2)]
    for name in ("nms", "plain"):
        assert np.array_equal(image_counts(prediction, truth, Protocol(0.02, name)),
                              image_counts(prediction / 255, truth, Protocol(0.02, name)))
