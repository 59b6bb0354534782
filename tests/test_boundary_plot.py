"""The picture of a precision-recall curve: everything that is drawn, and where."""

import numpy as np
import pytest
from PIL import ImageDraw

from evaluation.boundary.plot import save_plot
from evaluation.boundary.scores import BoundaryTotals

# Counts at three thresholds: P 8/16, R 8/10; P 6/8, R 6/10, the best F; nothing predicted, which is not drawn.
TOTALS = BoundaryTotals(np.array([[8, 10, 8, 16], [6, 10, 6, 8], [0, 10, 0, 0]]), np.array([6, 10, 6, 8]), 3)


def x(recall: float) -> float:
    """520 pixels beside a margin of 56, drawn three times as large."""
    return 3 * (56 + 520 * recall)


def y(precision: float) -> float:
    return 3 * (56 + 520 * (1 - precision))


@pytest.fixture
def drawn(monkeypatch, tmp_path) -> dict[str, list[tuple]]:
    """Method -> the arguments of its calls, in order."""
    calls = {"line": [], "text": [], "ellipse": [], "rectangle": []}
    real = ImageDraw.Draw

    def recorder(sheet):
        assert sheet.size == (1896, 1896)
        draw = real(sheet)
        for name, method in [(name, getattr(draw, name)) for name in calls]:
            def record(*args, _name=name, _method=method, **options):
                calls[_name].append((*args, options))
                _method(*args, **options)
            monkeypatch.setattr(draw, name, record)
        return draw

    monkeypatch.setattr(ImageDraw, "Draw", recorder)
    save_plot(tmp_path / "curve.png", TOTALS, "a title")
    return calls


def test_a_grid_line_every_tenth_with_its_number(drawn):
    lines, texts = drawn["line"][:22], drawn["text"][:22]
    for k in range(11):
        (upright, colour, width, _), (level, *_) = lines[2 * k], lines[2 * k + 1]
        assert np.array(upright) == pytest.approx(np.array([(x(k / 10), y(0)), (x(k / 10), y(1))]))
        assert np.array(level) == pytest.approx(np.array([(x(0), y(k / 10)), (x(1), y(k / 10))]))
        assert (colour, width) == ((228, 228, 228), 3)
        (below, number, ink, font, anchor), (beside, other, *_, left) = texts[2 * k], texts[2 * k + 1]
        assert below == pytest.approx((x(k / 10), y(0) + 15)) and beside == pytest.approx((x(0) - 15, y(k / 10)))
        assert number == other == f"{k / 10:.1f}" and ink == (30, 30, 30) and font.size == 33
        assert (anchor, left) == ({"anchor": "ma"}, {"anchor": "rm"})


def test_curves_of_equal_f(drawn):
    curves, texts = drawn["line"][22:-1], drawn["text"][22:-3]
    assert len(curves) == len(texts) == 9
    for k, ((points, colour, width, _), (place, words, ink, font, anchor)) in enumerate(
            zip(curves, texts, strict=True), start=1):
        recall, height = (np.array(points).T / 3 - 56) / 520
        precision = 1 - height
        assert 2 * precision * recall / (precision + recall) == pytest.approx(np.full(100, k / 10))
        assert precision[0] == pytest.approx(1) and recall[-1] == pytest.approx(1)
        end = (k / 10) / (2 - k / 10)                      # where F = k / 10 meets recall 1
        assert place == pytest.approx((x(1) + 12, y(end))) and words == f"F {k / 10:.1f}"
        assert (colour, width, ink, font.size, anchor) == ((120, 180, 120), 3, (120, 180, 120), 33, {"anchor": "lm"})


def test_the_curve_its_best_point_and_the_frame(drawn):
    points, colour, width, options = drawn["line"][-1]
    assert np.array(points) == pytest.approx(np.array([(x(0.8), y(0.5)), (x(0.6), y(0.75))]))
    assert (colour, width, options) == ((200, 40, 40), 6, {"joint": "curve"})
    [(dot, filled, _)] = drawn["ellipse"]
    assert dot == pytest.approx([x(0.6) - 15, y(0.75) - 15, x(0.6) + 15, y(0.75) + 15]) and filled == (200, 40, 40)
    assert drawn["rectangle"] == [([168, 168, 1728, 1728], {"outline": (30, 30, 30), "width": 3})]


def test_title_and_axes(drawn):
    found = [(place, words, ink, font.size, options["anchor"])
             for place, words, ink, font, options in drawn["text"][-3:]]
    ink = (30, 30, 30)
    assert found == [((948, 42), "a title", ink, 42, "ma"), ((948, 1848), "recall", ink, 42, "mm"),
                     ((168, 150), "precision", ink, 42, "mb")]


def test_a_single_point_has_no_curve(monkeypatch, tmp_path):
    one = BoundaryTotals(np.array([[6, 10, 6, 8], [0, 10, 0, 0]]), np.array([6, 10, 6, 8]), 1)
    save_plot(tmp_path / "a" / "b" / "curve.png", one, "")
    save_plot(tmp_path / "a" / "b" / "curve.png", one, "")              # the folder may exist
    assert (tmp_path / "a" / "b" / "curve.png").is_file()
