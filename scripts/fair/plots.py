"""The two plots of a suite's page, as SVG that depends on the numbers alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

from utils.durable import atomic_path

matplotlib.use("agg")
matplotlib.rcParams.update({"svg.hashsalt": "fair table", "svg.fonttype": "none", "font.size": 9,
                            "axes.spines.top": False, "axes.spines.right": False})

from matplotlib import pyplot  # noqa: E402  after the choice of its backend


class Point(NamedTuple):
    """A row in the plane of cost and accuracy; `axis` says what the accuracy is."""

    name: str
    gmacs: float
    accuracy: float
    spread: float
    axis: str


def draw_cost(points: Sequence[Point], path: Path) -> None:
    """Accuracy with its spread over the seeds against multiply-adds; what is cheap and good is top left."""
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for number, point in enumerate(points):
        axes.errorbar(point.gmacs, point.accuracy, yerr=point.spread or None, fmt="o", capsize=3, color=_colour(number))
        axes.annotate(point.name, (point.gmacs, point.accuracy), xytext=(5, 4), textcoords="offset points", fontsize=8)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel("multiply-adds per image, 10^9")
    axes.set_ylabel(points[0].axis)
    axes.grid(alpha=0.3)
    _save(figure, path)


def draw_curves(curves: Mapping[str, Sequence[tuple[int, float]]], path: Path) -> None:
    """One line per row."""
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for number, (name, points) in enumerate(curves.items()):
        axes.plot(*zip(*points, strict=True), marker=".", label=name, color=_colour(number),
                  linestyle="-" if number < 10 else "--")
    axes.set_xlabel("update")
    axes.set_ylabel("selection score")
    axes.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.grid(alpha=0.3)
    _save(figure, path)


def _colour(number: int) -> str:
    return f"C{number % 10}"


def _save(figure: "pyplot.Figure", path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="svg", metadata={"Date": None, "Creator": None})
    pyplot.close(figure)
