"""Precision-recall curve of a set as a picture, with curves of equal F behind it."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from evaluation.boundary.scores import BoundaryTotals, precision_recall_f

SIDE, MARGIN, SCALE = 520, 56, 3           # plot area and frame in pixels; drawn larger, then reduced to smooth it
INK, PAPER, GRID, ISO, CURVE = (30, 30, 30), (255, 255, 255), (228, 228, 228), (120, 180, 120), (200, 40, 40)


def save_plot(path: Path, totals: BoundaryTotals, title: str) -> None:
    """Writes a PNG: the curve over all thresholds, a dot at the best F, and `title` above."""
    size = (SIDE + 2 * MARGIN) * SCALE
    sheet = Image.new("RGB", (size, size), PAPER)
    draw = ImageDraw.Draw(sheet)
    small, large = (ImageFont.load_default(points * SCALE) for points in (11, 14))
    for value in np.arange(0, 1.01, 0.1):
        draw.line([_place(value, 0), _place(value, 1)], GRID, SCALE)
        draw.line([_place(0, value), _place(1, value)], GRID, SCALE)
        x, y = _place(value, 0)
        draw.text((x, y + 5 * SCALE), f"{value:.1f}", INK, small, anchor="ma")
        x, y = _place(0, value)
        draw.text((x - 5 * SCALE, y), f"{value:.1f}", INK, small, anchor="rm")
    for f in np.arange(0.1, 1, 0.1):
        recall = np.geomspace(f / (2 - f), 1, 100)                      # precision f r / (2 r - f) falls from 1
        draw.line([_place(r, f * r / (2 * r - f)) for r in recall], ISO, SCALE)
        x, y = _place(1, f / (2 - f))
        draw.text((x + 4 * SCALE, y), f"F {f:.1f}", ISO, small, anchor="lm")
    precision, recall, f = precision_recall_f(totals.counts)
    measured = totals.counts[:, 3] > 0                                 # P = 1 by definition elsewhere
    points = [_place(r, p) for r, p in zip(recall[measured], precision[measured], strict=True)]
    if len(points) > 1:
        draw.line(points, CURVE, 2 * SCALE, joint="curve")
    x, y = _place(recall[totals.optimum], precision[totals.optimum])
    draw.ellipse([x - 5 * SCALE, y - 5 * SCALE, x + 5 * SCALE, y + 5 * SCALE], CURVE)
    draw.rectangle([*_place(0, 1), *_place(1, 0)], outline=INK, width=SCALE)
    draw.text((size // 2, 14 * SCALE), title, INK, large, anchor="ma")
    draw.text((size // 2, size - 16 * SCALE), "recall", INK, large, anchor="mm")
    draw.text((MARGIN * SCALE, (MARGIN - 6) * SCALE), "precision", INK, large, anchor="mb")
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.resize((size // SCALE, size // SCALE), Image.Resampling.LANCZOS).save(path)


def _place(recall: float, precision: float) -> tuple[float, float]:
    return (MARGIN + recall * SIDE) * SCALE, (MARGIN + (1 - precision) * SIDE) * SCALE
