"""Pictures for people: one panel per image with the input, every task's prediction and a legend."""

from collections.abc import Mapping
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
    rows = []
    for maps in ({t: to_array(p[0]) for t, p in predictions.items()}, {t: to_array(batch[t][0]) for t in predictions}):
        pictures = [TASKS.load(task).view.picture(m, contexts[task], rgb) for task, m in maps.items()]
        fitting = [cv2.resize(p, rgb.shape[1::-1], interpolation=cv2.INTER_NEAREST) for p in pictures]
        rows.append(np.concatenate([rgb, *fitting], axis=1))
    return np.concatenate(rows, axis=0)


def prediction_panel(rgb: np.ndarray, predictions: Mapping[str, Any],
                     contexts: Mapping[str, TaskContext]) -> np.ndarray:
    """Input (H, W, 3) uint8 and decoded predictions of one image -> titled tiles with legends, RGB uint8."""
    height = max(1, round(TILE_WIDTH * rgb.shape[0] / rgb.shape[1]))
    tiles = [_tile("input", rgb, height, [])]
    for task, prediction in predictions.items():
        view, context = TASKS.load(task).view, contexts[task]
        tiles.append(_tile(task, view.picture(prediction, context, rgb), height, view.legend(prediction, context)))
    columns = min(3, len(tiles))
    tallest = max(tile.height for tile in tiles)
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (columns * (TILE_WIDTH + 8) + 8, rows * (tallest + 8) + 8), PAPER)
    for i, tile in enumerate(tiles):
        sheet.paste(tile, (8 + i % columns * (TILE_WIDTH + 8), 8 + i // columns * (tallest + 8)))
    return np.asarray(sheet)


def _tile(title: str, picture: np.ndarray, height: int, legend: Legend) -> Image.Image:
    """One picture with its title above and its legend below, `TILE_WIDTH` wide."""
    lines = -(-len(legend) // 2)
    tile = Image.new("RGB", (TILE_WIDTH, TITLE_HEIGHT + height + 4 + lines * LEGEND_LINE), PAPER)
    draw = ImageDraw.Draw(tile)
    draw.text((2, 3), title, INK, ImageFont.load_default(15))
    resized = cv2.resize(picture, (TILE_WIDTH, height), interpolation=cv2.INTER_AREA)
    tile.paste(Image.fromarray(resized), (0, TITLE_HEIGHT))
    font = ImageFont.load_default(11)
    for i, (colour, text) in enumerate(legend):
        x, y = i % 2 * (TILE_WIDTH // 2), TITLE_HEIGHT + height + 4 + i // 2 * LEGEND_LINE
        draw.rectangle((x + 2, y + 2, x + 14, y + 13), fill=colour, outline=INK)
        draw.text((x + 19, y + 1), text, INK, font)
    return tile
