"""What every decoder of a suite says of one picture, side by side: a row per decoder, a column per task.

It is made from the weights of a run, which records do not hold, and so where the suite has run.
"""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from models import load_model
from scripts.fair.suite import Cell
from utils.durable import atomic_path
from utils.engine.config import Config
from utils.engine.picture import as_rgb

STRIP = "strip.jpg"
WIDTH, TITLE, GAP = 150, 18, 4          # of a tile and the line above it, pixels


def draw_strip(cells: Sequence[tuple[Cell, Config]], picture: Path, device: str, path: Path) -> int:
    """Writes the strip of the rows of which a seed is trained, the first such, and returns how many there are.

    Networks of one task are left out. FileNotFoundError where no row is trained.
    """
    image, rows = as_rgb(picture), {}
    for cell, config in cells:
        weights = config.run_dir / "last.pt"
        if cell.task or cell.row in rows or not weights.is_file():
            continue
        found = load_model(weights, device).predict(image)
        name = cell.row if len(cell.suite.suite.backbones) > 1 else cell.decoder
        rows[cell.row] = _row(name, {"picture": image, **{task: result.colour() for task, result in found.items()}})
    if not rows:
        raise FileNotFoundError(f"no cell of the suite has weights, such as {cells[0][1].run_dir / 'last.pt'}: run the "
                                "suite first, with the same --work")
    width = max(row.width for row in rows.values())
    sheet = Image.new("RGB", (width, sum(row.height for row in rows.values())), "white")
    top = 0
    for row in rows.values():
        sheet.paste(row, (0, top))
        top += row.height
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="JPEG", quality=85)
    return len(rows)


def _row(name: str, pictures: dict[str, np.ndarray]) -> Image.Image:
    """Pictures (H, W, 3) uint8 of one size under their names."""
    height, width = next(iter(pictures.values())).shape[:2]
    tile = WIDTH, max(1, round(WIDTH * height / width))
    row = Image.new("RGB", (len(pictures) * (WIDTH + GAP), TITLE + tile[1] + GAP), "white")
    font = ImageFont.load_default(11)
    for column, (title, picture) in enumerate(pictures.items()):
        left, line = column * (WIDTH + GAP), Image.new("RGB", (WIDTH, TITLE), "white")
        ImageDraw.Draw(line).text((2, 3), title if column else name, "black", font)
        row.paste(line, (left, 0))
        row.paste(Image.fromarray(cv2.resize(picture, tile, interpolation=cv2.INTER_AREA)), (left, TITLE))
    return row
