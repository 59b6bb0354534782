"""A figure of an evaluator as HTML: the drawing, what it shows in words, and its numbers."""

import numpy as np

from evaluation.figures import Bars, Confusion, Figure, Histogram, PrecisionRecall
from utils.engine.report.page import folded, plot, table
from utils.engine.report.plots import figure_svg, shares_of_labels

MOST = 12           # confusions that are listed


def figure_html(task: str, figure: Figure) -> str:
    """With the numbers folded below, where there are any that the words do not hold."""
    words, rows = _TOLD[type(figure)](figure)
    title = f"{task}: {figure.title}"
    numbers = folded(f"{title}, numbers", table(title, rows)) if rows else ""
    return plot(figure_svg(figure), f"{title}. {words}", f"{title}. {words}") + numbers


def _bars(figure: Bars) -> tuple[str, list[list[str]]]:
    order = np.argsort(-figure.values, kind="stable")
    name = lambda i: f"{figure.names[i]} ({figure.values[i]:.1f} %)"  # noqa: E731
    words = f"Mean {figure.values.mean():.1f} %; best {name(order[0])}, worst {name(order[-1])}."
    return words, [["class", "%"], *([figure.names[i], f"{figure.values[i]:.2f}"] for i in order)]


def _confusion(figure: Confusion) -> tuple[str, list[list[str]]]:
    share = 100 * shares_of_labels(figure.counts)
    off = np.where(np.eye(len(share), dtype=bool), 0, figure.counts)
    rows = [["label", "taken for", "% of the label's pixels", "pixels"]]
    for flat in np.argsort(-off, axis=None, kind="stable")[:MOST]:
        label, taken = divmod(int(flat), len(share))
        if off[label, taken]:
            rows.append([figure.names[label], figure.names[taken], f"{share[label, taken]:.1f}",
                         f"{figure.counts[label, taken]}"])
    if len(rows) == 1:
        return "No pixel was taken for another class.", []
    return f"Most often {rows[1][0]} was taken for {rows[1][1]} ({rows[1][2]} % of its pixels).", rows


def _histogram(figure: Histogram) -> tuple[str, list[list[str]]]:
    total = figure.counts.sum()
    if not total:
        return "No pixel was valid.", []
    reached = np.cumsum(figure.counts) / total
    quantiles = [figure.edges[1 + int(np.searchsorted(reached, share))] for share in (0.5, 0.9)]
    return (f"Half of the pixels lie below {quantiles[0]:.3g} {figure.unit}, nine of ten below {quantiles[1]:.3g} "
            f"{figure.unit} (upper edges of bins); whatever is beyond {figure.edges[-2]:.3g} {figure.unit} is in the "
            "last bin."), []


def _precision_recall(figure: PrecisionRecall) -> tuple[str, list[list[str]]]:
    p, r = figure.precision, figure.recall
    f = 2 * p * r / np.maximum(p + r, 1e-12)
    best = figure.best
    words = (f"Best F {100 * f[best]:.2f} % at threshold {figure.thresholds[best]:g}, precision {100 * p[best]:.1f} %, "
             f"recall {100 * r[best]:.1f} %; thin lines are of equal F.")
    rows = [[f"{t:g}", f"{100 * a:.2f}", f"{100 * b:.2f}", f"{100 * c:.2f}"]
            for t, a, b, c in zip(figure.thresholds, p, r, f, strict=True)]
    return words, [["threshold", "precision %", "recall %", "F %"], *rows[::5]]


_TOLD = {Bars: _bars, Confusion: _confusion, Histogram: _histogram, PrecisionRecall: _precision_recall}
