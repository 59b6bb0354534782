"""Pictures for people: one panel per image with the input, every task's prediction and a legend."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from data.transforms import MEAN, STD
from evaluation.evaluator import TaskContext
from utils.engine.tasks import TASKS
from utils.engine.views import Legend

TILE_WIDTH = 320
TALLEST = 1280              # what is higher gets a narrower picture
TITLE_HEIGHT = 22
LEGEND_LINE = 16
INK, PAPER = (30, 30, 30), (255, 255, 255)


def to_array(prediction: Any) -> Any:
    """One image's prediction or label: a map (C, H, W) as (H, W, C) array, anything else as it is."""
    is_map = isinstance(prediction, Tensor) and prediction.ndim == 3
    return prediction.permute(1, 2, 0).cpu().numpy() if is_map else prediction


def batch_panel(batch: Mapping, predictions: Mapping[str, Any], contexts: Mapping[str, TaskContext]) -> np.ndarray:
    """First image of a validation batch: predictions in the upper row, labels below. Returns RGB (H, W, 3) uint8."""
    image = batch["image"][0].permute(1, 2, 0).cpu().numpy() * STD + MEAN
    rgb = (np.clip(image, 0, 1) * 255).astype(np.uint8)
    labels = {task: to_array(batch[task][0]) for task in predictions}
    contexts = {task: coloured_as(label, task, contexts[task]) for task, label in labels.items()}
    rows = []
    for maps in ({task: to_array(p[0]) for task, p in predictions.items()}, labels):
        pictures = [TASKS.load(task).view.picture(m, contexts[task], rgb) for task, m in maps.items()]
        fitting = [cv2.resize(p, rgb.shape[1::-1], interpolation=cv2.INTER_NEAREST) for p in pictures]
        rows.append(np.concatenate([rgb, *fitting], axis=1))
    return np.concatenate(rows, axis=0)


def coloured_as(label: Any, task: str, context: TaskContext) -> TaskContext:
    """The context in which a prediction has the colours of its label, where each would be stretched over its own range.

    A label without a valid pixel has none.
    """
    shown_range = TASKS.load(task).view.shown_range
    near, far = shown_range(label, context) if shown_range else (0, 0)
    return replace(context, shown=(near, far)) if near < far else context


def prediction_panel(rgb: np.ndarray, predictions: Mapping[str, Any],
                     contexts: Mapping[str, TaskContext]) -> np.ndarray:
    """Input (H, W, 3) uint8 and decoded predictions of one image -> titled tiles with legends, RGB uint8."""
    tiles = [tile("input", rgb, [])]
    for task, prediction in predictions.items():
        view, context = TASKS.load(task).view, contexts[task]
        tiles.append(tile(task, view.picture(prediction, context, rgb), view.legend(prediction, context)))
    return sheet(tiles)


def sheet(tiles: Sequence[Image.Image]) -> np.ndarray:
    """Tiles in rows of three, RGB uint8."""
    columns = min(3, len(tiles))
    tallest = max(one.height for one in tiles)
    rows = -(-len(tiles) // columns)
    paper = Image.new("RGB", (columns * (TILE_WIDTH + 8) + 8, rows * (tallest + 8) + 8), PAPER)
    for i, one in enumerate(tiles):
        paper.paste(one, (8 + i % columns * (TILE_WIDTH + 8), 8 + i // columns * (tallest + 8)))
    return np.asarray(paper)


def tile(title: str, picture: np.ndarray, legend: Legend) -> Image.Image:
    """One picture with its title above and its legend below, `TILE_WIDTH` wide."""
    height = min(TALLEST, max(1, round(TILE_WIDTH * picture.shape[0] / picture.shape[1])))
    width = min(TILE_WIDTH, max(1, round(height * picture.shape[1] / picture.shape[0])))
    lines = -(-len(legend) // 2)
    framed = Image.new("RGB", (TILE_WIDTH, TITLE_HEIGHT + height + 4 + lines * LEGEND_LINE), PAPER)
    draw = ImageDraw.Draw(framed)
    draw.text((2, 3), title, INK, ImageFont.load_default(15))
    resized = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)
    framed.paste(Image.fromarray(resized), (0, TITLE_HEIGHT))
    font = ImageFont.load_default(11)
    for i, (colour, text) in enumerate(legend):
        x, y = i % 2 * (TILE_WIDTH // 2), TITLE_HEIGHT + height + 4 + i // 2 * LEGEND_LINE
        draw.rectangle((x + 2, y + 2, x + 14, y + 13), fill=colour, outline=INK)
        draw.text((x + 19, y + 1), text, INK, font)
    return framed
