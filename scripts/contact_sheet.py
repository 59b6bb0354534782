"""A picture of random samples with all their labels laid over them, so that a person sees whether they fit."""

import random
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from data.base import MultiTaskDataset
from data.labels import VOID
from evaluation.evaluator import TaskContext
from utils.engine.tasks import tasks_named
from utils.engine.views import save_rgb

TILE = 240           # width of a picture


def contact_sheet(datasets: Sequence[MultiTaskDataset], path: Path, rows: int) -> int:
    """Writes at most `rows` samples of each data set, one a row: the image, then it under each label.

    Samples that cannot be read are left out. Returns how many were drawn.
    """
    lines = []
    for dataset in datasets:
        names = random.Random(0).sample(dataset.ids, min(len(dataset.ids), 4 * rows))
        drawn = []
        for name in names:
            try:
                drawn.append(_row(dataset, dataset.load(name)))
            except (ValueError, OSError):              # the report names it
                continue
            if len(drawn) == rows:
                break
        lines += drawn
    if lines:
        width = max(line.shape[1] for line in lines)
        save_rgb(path, np.concatenate([np.pad(line, ((0, 4), (0, width - line.shape[1]), (0, 0)), constant_values=255)
                                       for line in lines]))
    return len(lines)


def _row(dataset: MultiTaskDataset, sample: dict) -> np.ndarray:
    rgb = sample["image"]
    tiles = [_tile(rgb, sample["meta"]["name"])]
    for task, row in tasks_named(dataset.labels).items():
        spec = dataset.spec.labels[task]
        context = TaskContext(spec.channels, VOID, 0.95, spec.classes, spec.valid_range, spec.colours)
        label = dataset.labels[task].mark_void(sample[task])
        picture = row.view.picture(label, context, rgb)
        if not dataset.labels[task].is_map:                # it is drawn on the image
            tiles.append(_tile(picture, task))
            continue
        void = np.all(np.asarray(label) == VOID, axis=-1, keepdims=True)
        mixed = np.where(void, rgb, (0.35 * rgb + 0.65 * picture).astype(np.uint8))      # void: the image itself
        tiles.append(_tile(mixed, task))
    return np.concatenate(tiles, axis=1)


def _tile(picture: np.ndarray, title: str) -> np.ndarray:
    height = max(1, round(TILE * picture.shape[0] / picture.shape[1]))
    tile = cv2.resize(picture, (TILE, height), interpolation=cv2.INTER_AREA)
    tile = np.pad(tile, ((18, 0), (0, 4), (0, 0)), constant_values=255)
    cv2.putText(tile, title[-34:], (2, 13), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (30, 30, 30), 1, cv2.LINE_AA)
    return tile
