"""Numbers as SVG pictures (matplotlib), light or dark as the reader's system is; text stays text."""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from evaluation.figures import Bars, Confusion, Figure, Histogram, PrecisionRecall

# Stand-ins that become variables of the picture's own style sheet.
INK, FAINT, BLUE, RED, GREEN = "#010203", "#040506", "#070809", "#0a0b0c", "#0d0e0f"
COLOURS = {INK: ("ink", "#1d2430", "#e6e9ee"), FAINT: ("faint", "#c9ced6", "#4a5261"),
           BLUE: ("blue", "#1f62b5", "#7db4f5"), RED: ("red", "#b3261e", "#ff8a80"),
           GREEN: ("green", "#1d7a3e", "#6fce8f")}
CYCLE = (BLUE, RED, GREEN, INK)


def draw(paint: Callable[[Any], None], width: float, height: float) -> str:
    """An SVG of so many inches; `paint(axes)` draws into it."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Canvas
    style = {"svg.fonttype": "none", "svg.hashsalt": "report", "font.size": 9, "font.family": "sans-serif",
             "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": FAINT, "xtick.color": INK, "ytick.color": INK,
             "axes.facecolor": "none", "figure.facecolor": "none", "legend.frameon": False, "axes.spines.top": False,
             "axes.spines.right": False, "grid.color": FAINT, "grid.linewidth": 0.6}
    with rc_context(style):
        canvas = FigureCanvasSVG(Canvas(figsize=(width, height), layout="constrained"))
        axes = canvas.figure.subplots()
        axes.set_axisbelow(True)
        paint(axes)
        out = io.BytesIO()
        canvas.print_svg(out, metadata={"Date": None, "Creator": None})
    return _with_themes(out.getvalue().decode("utf-8"))


def _with_themes(svg: str) -> str:
    """Replaces the stand-in colours by variables that follow the reader's choice of a light or dark page."""
    for colour, (name, _, _) in COLOURS.items():
        svg = svg.replace(colour, f"var(--{name})")
    light, dark = (";".join(f"--{row[0]}:{row[i]}" for row in COLOURS.values()) for i in (1, 2))
    style = f"<style>:root{{{light}}}@media (prefers-color-scheme: dark){{:root{{{dark}}}}}</style>"
    head, tag, rest = svg.partition("<defs>")
    return f"{head}{style}{tag}{rest}"


def figure_svg(figure: Figure) -> str:
    """The picture of what an evaluator shows."""
    return _DRAWN[type(figure)](figure)


def _bars(figure: Bars) -> str:
    order = np.argsort(figure.values, kind="stable")

    def paint(axes: Any) -> None:
        axes.barh(range(len(order)), figure.values[order], color=BLUE, height=0.7)
        axes.set_yticks(range(len(order)), [figure.names[i] for i in order])
        axes.set_xlim(0, 100)
        axes.set_ylim(-0.6, len(order) - 0.4)
        axes.set_xlabel("%")
        axes.grid(axis="x")
    return draw(paint, 6.4, 0.8 + 0.2 * len(order))


def _confusion(figure: Confusion) -> str:
    share = shares_of_labels(figure.counts)
    many = len(figure.names) > 12

    def paint(axes: Any) -> None:
        shown = axes.imshow(100 * share, cmap="viridis", vmin=0, vmax=100, interpolation="nearest")
        ticks = range(len(figure.names))
        small = {"fontsize": 6 if many else 9}
        axes.set_xticks(ticks, figure.names, rotation=90, **small)
        axes.set_yticks(ticks, figure.names, **small)
        axes.set_xlabel("prediction")
        axes.set_ylabel("label")
        axes.figure.colorbar(shown, ax=axes, shrink=0.7, label="% of the label's pixels")
    side = max(3.6, min(7.5, 2.2 + 0.16 * len(figure.names)))
    return draw(paint, side + 1, side)


def shares_of_labels(counts: np.ndarray) -> np.ndarray:
    """Rows of a confusion matrix as shares of their sum; 0 where a class has no label."""
    return counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)


def _histogram(figure: Histogram) -> str:
    share = 100 * figure.counts / max(figure.counts.sum(), 1)
    logarithmic = figure.edges[0] > 0

    def paint(axes: Any) -> None:
        axes.stairs(share, figure.edges, fill=True, color=BLUE)
        if logarithmic:
            axes.set_xscale("log")
        axes.set_xlim(figure.edges[0], figure.edges[-1])
        axes.set_xlabel(figure.unit)
        axes.set_ylabel("% of the pixels")
        axes.grid(axis="y")
        right = axes.twinx()
        right.stairs(np.cumsum(share), figure.edges, color=RED, linewidth=1.2)
        right.set_ylim(0, 100)
        right.set_ylabel("% so far (line)", color=RED)
    return draw(paint, 6.4, 3)


def _precision_recall(figure: PrecisionRecall) -> str:
    def paint(axes: Any) -> None:
        for f in np.arange(0.1, 1, 0.1):
            recall = np.linspace(f / (2 - f), 1, 100)
            axes.plot(recall, f * recall / (2 * recall - f), color=FAINT, linewidth=0.8)
            axes.annotate(f"F {f:.1f}", (1, f / (2 - f)), fontsize=7, xytext=(3, 0), textcoords="offset points",
                          va="center", annotation_clip=False)
        axes.plot(figure.recall, figure.precision, color=BLUE, linewidth=1.8)
        axes.plot(figure.recall[figure.best], figure.precision[figure.best], "o", color=RED)
        axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="recall", ylabel="precision", aspect="equal")
    return draw(paint, 4.6, 4.2)


_DRAWN = {Bars: _bars, Confusion: _confusion, Histogram: _histogram, PrecisionRecall: _precision_recall}


def lines_svg(lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], x_label: str, y_label: str,
              logarithmic: bool = False) -> str:
    """Named lines (x, y) in one picture, told apart by colour and dashes."""
    dashes = ("solid", "dashed", "dotted", "dashdot")

    def paint(axes: Any) -> None:
        for i, (name, (x, y)) in enumerate(lines.items()):
            axes.plot(x, y, label=name, color=CYCLE[i % 4], linestyle=dashes[i // 4 % 4], linewidth=1.4,
                      marker="o" if len(x) < 20 else None, markersize=3)
        if logarithmic:
            axes.set_yscale("log")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set(xlabel=x_label, ylabel=y_label)
        axes.grid()
        if len(lines) > 1:
            axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))      # beside them: over none
    return draw(paint, 6.4, 3)


def scatter_svg(x: np.ndarray, y: np.ndarray, x_label: str, y_label: str) -> str:
    """A point per image, and the line where both are equal."""
    low, high = (float(limit(values)) for limit, values in ((np.min, np.r_[x, y]), (np.max, np.r_[x, y])))

    def paint(axes: Any) -> None:
        axes.plot([low, high], [low, high], color=FAINT)
        axes.scatter(x, y, s=9, color=BLUE, alpha=0.6, linewidths=0)
        axes.set(xlabel=x_label, ylabel=y_label, aspect="equal")
        axes.grid()
    return draw(paint, 4.4, 4.2)
