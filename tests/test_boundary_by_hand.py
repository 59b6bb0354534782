"""The boundary score on maps small enough to count by hand, and the settings that published scores rest on."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.datasets import DATASETS
from evaluation.boundary.__main__ import parse_arguments, summary, table
from evaluation.boundary.evaluator import BoundaryEvaluator
from evaluation.boundary.matching import candidates, cheapest_match, match, pick_backend
from evaluation.boundary.plot import CURVE, INK, ISO, PAPER, save_plot
from evaluation.boundary.pool import CountingPool, default_workers
from evaluation.boundary.protocol import Protocol, as_probability, image_counts
from evaluation.boundary.scores import BoundaryTotals
from evaluation.boundary.settings import BoundarySettings, BoundaryTruth
from evaluation.boundary.source import TruthSource, truth_source
from evaluation.boundary.suppression import orientation, smoothed, suppress
from evaluation.evaluator import Split

BACKENDS = ["scipy", pytest.param("compiled", marks=pytest.mark.skipif(pick_backend() != "compiled",
                                                                       reason="no compiler"))]

PASCAL = DATASETS.load("PASCALContext")


def column(at: int, value: float = 1.0, size: tuple[int, int] = (30, 40)) -> np.ndarray:
    """A vertical line, one pixel wide."""
    picture = np.zeros(size)
    picture[:, at] = value
    return picture


# Protocol ------------------------------------------------------------------------------------------------------------

def test_thresholds():
    nms, plain = (Protocol(0.01, name).thresholds for name in ("nms", "plain"))
    assert len(nms) == 101 and nms[[0, 1, 50, 99, 100]].tolist() == [0.001, 0.01, 0.5, 0.99, 0.999]
    assert len(plain) == 99 and plain[[0, 49, 98]].tolist() == [0.01, 0.5, 0.99]
    assert Protocol(0.01).name == "nms"


def test_a_value_at_a_threshold_passes_it_in_plain_only():
    """Inside a wide frame, where nothing is damped; the ridge is one pixel wide, so nothing is suppressed."""
    for value, plain, nms in ((0.5, 50, 50), (0.505, 50, 51), (0.01, 1, 1), (0.0, 0, 0), (1.0, 99, 101), (0.001, 0, 0),
                              (0.0011, 0, 1)):
        picture = column(20, value)
        assert Protocol(0.01, "plain").levels(picture)[15, 20] == plain
        assert Protocol(0.01, "nms").levels(picture)[15, 20] == nms, value


def test_the_distance_is_a_share_of_the_diagonal():
    assert Protocol(0.01).distance((300, 400)) == pytest.approx(5)
    for share in (0, 1, -0.1, 1.5):
        with pytest.raises(ValueError, match=r"max_dist must be a share of the image's diagonal, in \(0, 1\)"):
            Protocol(share)


def test_predictions_are_probabilities():
    assert as_probability(np.array([[0, 51, 255]], np.uint8)).tolist() == [[0, 0.2, 1]]
    assert as_probability(np.array([[0, 1]], np.float32)).dtype == np.float64
    assert as_probability(np.array([[0.25, 0.5]])).tolist() == [[0.25, 0.5]]           # the limits need not occur
    for wrong, words in ((np.zeros((0, 3)), r"H x W, this one has shape \(0, 3\)"), (np.zeros(3), "H x W"),
                         (np.zeros((2, 2), bool), "not bool"), (np.array([[-0.1, 0.5]]), r"spans -0\.1\.\.0\.5"),
                         (np.array([[0, 1.01]]), r"spans 0\.\.1\.01")):
        with pytest.raises(ValueError, match=words):
            as_probability(wrong)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("offset", "matched"), [(0, 30), (3, 30), (-3, 30), (4, 0)])
def test_lines_match_within_the_distance(offset, matched, backend):
    """A line of 30 pixels; the diagonal is 50, so 0.06 of it is 3 pixels. 50 of 99 thresholds leave a line of 0.5."""
    counts = image_counts(column(20 + offset, 0.5), [column(20) > 0], Protocol(0.06, "plain"), backend)
    assert counts[:50].tolist() == [[matched, 30, matched, 30]] * 50
    assert counts[50:].tolist() == [[0, 30, 0, 0]] * 49


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_true_pixel_is_matched_once(backend):
    """Two predicted lines at one true one: half of the predicted pixels find no partner."""
    counts = image_counts(column(18) + column(22), [column(20) > 0], Protocol(0.05, "plain"), backend)
    assert counts[0].tolist() == [30, 30, 30, 60]


def test_several_truths_add_up_and_a_predicted_pixel_counts_once():
    truths = [column(10) > 0, column(11) > 0, column(30) > 0]
    counts = image_counts(column(10, 0.5) + column(25, 0.7), truths, Protocol(0.021, "plain"))       # 1.05 pixels
    assert counts[0].tolist() == [60, 90, 30, 60]          # both of the first two truths are matched by one line
    assert counts[60].tolist() == [0, 90, 0, 30] and counts[80].tolist() == [0, 90, 0, 0]
    with pytest.raises(ValueError, match="an image needs at least one ground truth"):
        image_counts(column(10), [], Protocol(0.1))


# Matching ------------------------------------------------------------------------------------------------------------

def test_candidates_lie_within_the_distance():
    prediction, truth = np.zeros((5, 5), bool), np.zeros((5, 5), bool)
    prediction[2, 2], truth[2, 4], truth[3, 4], truth[0, 0] = True, True, True, True
    for distance, near in ((2, [[2, 4]]), (1.9, []), (2.24, [[2, 4], [3, 4]]), (2.9, [[0, 0], [2, 4], [3, 4]])):
        pixels, truths, graph = candidates(prediction, truth, distance)
        assert pixels.tolist() == [[2, 2]] and truths[graph.toarray()[0] > 0].tolist() == near or not near
        assert graph.nnz == len(near)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_cheapest_matching_is_the_shortest(backend):
    """Two predictions, two truths in one row: 0-1 and 4-5 cost 1 each, crossing would cost 5 and 3."""
    prediction, truth = np.zeros((1, 9), bool), np.zeros((1, 9), bool)
    prediction[0, [0, 4]], truth[0, [1, 5]] = True, True
    assert cheapest_match(prediction, truth, 6, backend).tolist() == [[1, -1, -1, -1, 5, -1, -1, -1, -1]]
    truth[0, 1] = False                                    # one truth: the nearer of the two takes it
    assert cheapest_match(prediction, truth, 6, backend).tolist() == [[-1] * 4 + [5] + [-1] * 4]
    assert cheapest_match(prediction, truth, 0.5, backend).tolist() == [[-1] * 9]
    # a chain: the most pairs come before the least distance
    prediction[:], truth[:] = False, False
    prediction[0, [3, 5]], truth[0, [4, 1]] = True, True
    assert cheapest_match(prediction, truth, 2, backend).tolist() == [[-1, -1, -1, 1, -1, 4, -1, -1, -1]]
    assert (match(prediction, truth, 2, "scipy") == cheapest_match(prediction, truth, 2, backend)).all()


# Suppression ---------------------------------------------------------------------------------------------------------

def test_a_point_is_smoothed_to_a_pyramid():
    picture = np.zeros((20, 30), np.float32)
    picture[8, 15] = 1
    triangle = np.array([1, 2, 3, 4, 5, 4, 3, 2, 1]) / 25
    np.testing.assert_allclose(smoothed(picture)[4:13, 11:20], np.outer(triangle, triangle), atol=1e-6)
    assert smoothed(picture).sum() == pytest.approx(1, abs=1e-4)
    np.testing.assert_allclose(smoothed(np.full((3, 2), 0.25, np.float32)), 0.25, rtol=1e-5)  # small beside the filter


def test_the_angle_is_that_of_the_normal():
    bump = np.exp(-((np.arange(40) - 20) / 4.0)**2).astype(np.float32)
    angle = orientation(np.tile(bump, (40, 1)))[20, 20]
    assert min(angle, np.pi - angle) < 1e-6                # a vertical line has a horizontal normal
    assert orientation(np.tile(bump, (40, 1)).T)[20, 20] == 0           # as published: its mixed derivative has no sign
    y, x = np.mgrid[:40, :40]
    for slope in (-0.05, 0.05):
        tilted = np.exp(-((y - 20 + slope * (x - 20)) / 4.0)**2).astype(np.float32)
        assert orientation(tilted)[20, 20] == pytest.approx(np.pi / 2, abs=0.06)
    for sign, expected in ((1, np.pi / 4), (-1, 3 * np.pi / 4)):
        ridge = np.exp(-((x + sign * (y - 20) - 20) / 5.0)**2).astype(np.float32)
        assert orientation(ridge)[20, 20] == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize(("beside", "kept"), [(0.907, True), (0.911, False), (0.5, True)])
def test_a_ridge_survives_a_neighbour_that_is_one_percent_stronger(beside, kept):
    edges = (column(20, 0.9) + column(21, beside)).astype(np.float32)
    assert (suppress(edges)[15, 20] == np.float32(0.9)) == kept


def test_the_border_is_damped_on_all_sides():
    flat = suppress(np.ones((12, 14), np.float32))
    frame = np.array([0, 0.2, 0.4, 0.6, 0.8])
    np.testing.assert_allclose(flat[6, :5], frame, rtol=1e-6)
    np.testing.assert_allclose(flat[6, -5:], frame[::-1], rtol=1e-6)
    np.testing.assert_allclose(flat[:5, 7], frame, rtol=1e-6)
    np.testing.assert_allclose(flat[-5:, 7], frame[::-1], rtol=1e-6)
    assert flat[1, 1] == pytest.approx(0.04) and flat[6, 7] == 1 == flat[5, 5]
    assert suppress(np.ones((4, 4), np.float32))[:, 2].tolist() == [0, 0.25, 0.25, 0]      # half of a short side
    assert suppress(np.ones((4, 40), np.float32))[:, 20].tolist() == [0, 0.5, 0.5, 0]
    assert suppress(np.ones((40, 4), np.float32))[20].tolist() == [0, 0.5, 0.5, 0]


# Sets ----------------------------------------------------------------------------------------------------------------

def test_defaults_are_those_of_published_scores():
    settings = BoundarySettings()
    assert (settings.images, settings.nyud_gt, settings.protocol, settings.max_dist, settings.workers) == (
        "auto", "seism", "nms", None, None)


def source(**changes) -> TruthSource:
    read = lambda path: (column(20) > 0).astype(np.uint8)  # noqa: E731
    truth = BoundaryTruth(("{id}",), read, changes.pop("kind", "boundary"), 0.06)
    return TruthSource(**({"folder": Path(), "truth": truth, "num_images": 2, "covered": "a test"} | changes))


def batch(*pictures: np.ndarray) -> tuple[torch.Tensor, None, list[dict]]:
    prediction = torch.from_numpy(np.stack(pictures)).float()[:, None]
    return prediction, None, [{"name": f"im{i}", "size": (30, 40)} for i in range(len(pictures))]


def test_a_benchmark_counts_and_reports():
    benchmark = BoundaryEvaluator(source(), BoundarySettings(protocol="plain", workers=0))
    benchmark.update(*batch(column(20), column(35, 0.3)))
    benchmark.reduce()
    scores = benchmark.compute()
    assert scores["images"] == 2 and scores["threshold"] == 0.3        # 255 * 0.3 is cut to 76, below 0.3
    assert scores["odsF"] == pytest.approx(2 / 3)          # P 1, R 1/2: the second image finds nothing
    assert benchmark.report() == (
        f"odsF 66.67 at threshold 0.3 over 2 images (a test), oisF 50.00, AP 0.00; cntR 30, sumR 60, cntP 30, sumP 30; "
        f"ground truth boundary, max_dist 0.06, protocol plain, {pick_backend()} matching")


def test_a_benchmark_asks_every_annotator():
    def read(path):
        return np.stack([column(at) > 0 for at in (20, 30)]).astype(np.uint8)

    benchmark = BoundaryEvaluator(source(truth=BoundaryTruth(("{id}",), read, "bsds", 0.06)),
                                  BoundarySettings(protocol="plain", workers=0))
    benchmark.update(*batch(column(20)))
    benchmark.reduce()
    assert benchmark.totals.counts[0].tolist() == [30, 60, 30, 30]     # one of them drew the line, the other did not


def test_settings_choose_distance_kind_images_and_workers(monkeypatch):
    monkeypatch.setattr("evaluation.boundary.evaluator.default_workers", lambda processes: 5 * processes)

    def made(settings=None, **changes) -> BoundaryEvaluator:
        return BoundaryEvaluator(source(**changes), BoundarySettings(**(settings or {})))

    assert made().protocol.max_dist == 0.06 and made({"max_dist": 0.02}).protocol.max_dist == 0.02
    assert [made({"nyud_gt": rule}, kind="nyud").kind for rule in ("seism", "thin")] == ["nyud", "boundary"]
    assert made({"nyud_gt": "thin"}, kind="regions").kind == "regions"
    assert [made(num_images=number).pool.workers for number in (32, 33)] == [0, 5]
    assert made({"workers": 3}).pool.workers == 3 and made({"workers": 0}, num_images=99).pool.workers == 0
    chosen = made({"protocol": "plain"}, names=frozenset({"im1"}))
    chosen.update(*batch(column(20), column(20)))
    assert chosen.compute()["images"] == 1


def test_workers_per_process(monkeypatch):
    for cores, processes, workers in ((16, 1, 8), (6, 1, 6), (6, 2, 3), (6, 4, 1), (2, 4, 1), (64, 4, 8)):
        monkeypatch.setattr("os.sched_getaffinity", lambda _, cores=cores: set(range(cores)), raising=False)
        assert default_workers(processes) == workers
    assert default_workers() == 8
    with pytest.raises(ValueError, match="must not be negative, got -1"):
        CountingPool(BoundaryTotals.empty(1), -1)


def split_of(number: int, folder: Path, truth: BoundaryTruth | None = PASCAL.labels["edge"].boundary) -> Split:
    """A split with these ids whose list of published images lies in `folder`."""
    return Split(PASCAL.name, "val", folder, tuple(f"{i:03}" for i in range(number)), truth)


@pytest.mark.parametrize(("number", "stride"), [(5, 1), (63, 1), (64, 2), (255, 7), (256, 8), (288, 8), (1000, 8)])
def test_the_fast_score_takes_every_eighth_but_at_least_32(tmp_path, number, stride):
    chosen = truth_source(split_of(number, tmp_path), "all", fast=True)
    assert chosen.names == {f"{i:03}" for i in range(0, number, stride)} and chosen.num_images == len(chosen.names)
    assert chosen.covered == f"a sample of {len(chosen.names)} from all of val"
    assert (chosen.truth.kind, chosen.truth.max_dist) == ("regions", 0.0075)
    assert truth_source(split_of(number, tmp_path), "all").num_images == number


def test_the_fast_score_samples_the_published_list(tmp_path):
    path = tmp_path / "ImageSets" / "Context" / "test_new.txt"
    path.parent.mkdir(parents=True)
    path.write_text("\n".join(f"{i:03}" for i in range(100, 164)))
    chosen = truth_source(split_of(200, tmp_path), "auto", fast=True)
    assert chosen.names == {f"{i:03}" for i in range(100, 164, 2)}
    assert chosen.covered == "a sample of 32 from the list test_new.txt"
    assert truth_source(split_of(200, tmp_path), "test_new").num_images == 64
    nothing = split_of(200, tmp_path, None)
    with pytest.raises(ValueError, match="PASCALContext has no ground truth for the boundary score"):
        truth_source(nothing, "all")


# The tool ------------------------------------------------------------------------------------------------------------

TOTALS = BoundaryTotals(np.array([[8, 10, 8, 16], [6, 10, 6, 8], [0, 10, 0, 0]]), np.array([6, 10, 6, 8]), 3)


def test_the_tools_table():
    protocol = Protocol(0.5, "plain")
    result = summary(TOTALS, protocol)
    assert result == pytest.approx({"ods_f": 2 / 3, "ois_f": 2 / 3, "ap": result["ap"], "threshold": 0.02, "images": 3,
                                    "cntR": 6, "sumR": 10, "cntP": 6, "sumP": 8})
    assert table(result | {"ap": 0.5}).splitlines() == [
        "| images | odsF % ^ | oisF % ^ | AP % ^ | threshold | cntR | sumR | cntP | sumP |",
        "| ---    | ---      | ---      | ---    | ---       | ---  | ---  | ---  | ---  |",
        "| 3      | 66.67    | 66.67    | 50.00  | 0.02      | 6    | 10   | 6    | 8    |"]
    arguments = parse_arguments(["--pred", "p", "--gt", "g", "--gt_kind", "nyud", "--max_dist", "0.011"])
    assert (arguments.protocol, arguments.max_dist, arguments.workers, arguments.images) == ("nms", 0.011, None, None)


def test_the_plotted_curve(tmp_path):
    """The plot is 520 pixels wide in a frame of 56; recall runs to the right, precision upwards."""
    save_plot(tmp_path / "new" / "curve.png", TOTALS, "title")
    picture = np.asarray(Image.open(tmp_path / "new" / "curve.png")).astype(int)
    assert picture.shape == (632, 632, 3)

    def colour(recall: float, precision: float) -> list[int]:
        return picture[round(56 + (1 - precision) * 520), round(56 + recall * 520)].tolist()

    assert colour(0.6, 0.75) == list(CURVE)                # the best F: P 6/8, R 6/10
    assert colour(0.7, 0.625) == pytest.approx(CURVE, abs=60)           # half way to P 8/16, R 8/10
    assert np.abs(np.array(colour(0.3, 0.87)) - CURVE).max() > 60       # no line to the threshold that finds nothing
    assert colour(0.55, 0.55) == list(PAPER) and picture[0, 0].tolist() == list(PAPER)
    assert colour(0.3, 0.3) == pytest.approx(ISO, abs=90) and colour(0, 0.55) == pytest.approx(INK, abs=40)
    assert colour(0.45, 0.2) == pytest.approx((228, 228, 228), abs=20)  # a grid line every tenth
