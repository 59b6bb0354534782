"""What an evaluation leaves behind of every image: its own score in each task, and small pictures of it.

In the folder of the evaluation: images.json (`{"scores": {task: {...}}, "keys": {task: [[[r, g, b], words]]}, "images":
[{"name", "scores"}]}`) and thumbnails/<task>/<name>.jpg, thumbnails/<task>_label/<name>.jpg,
thumbnails/input/<name>.jpg. Pictures stay of the images that the page shows and of `KEPT` others, so a
large set takes no more room than a small one.
"""

import json
import math
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from data.transforms import MEAN, STD
from evaluation.evaluator import Evaluator, Score, TaskContext
from utils import distributed
from utils.batches import to_device
from utils.engine.panel import coloured_as, to_array
from utils.engine.tasks import TASKS
from utils.engine.views import Legend

SIDE, QUALITY = 240, 80             # of a thumbnail: its longer side in pixels, and how well JPEG keeps it
INDEX, PICTURES, INPUT, LABEL = "images.json", "thumbnails", "input", "_label"
EACH = 3                            # best, median and worst images that a page shows of each task
KEPT = 700                          # images whose pictures stay for comparisons: of every run of a data set the same
THREADS = 4


@dataclass(frozen=True)
class ImageScores:
    """The scores of single images in the tasks that have one; NaN where no pixel of an image was valid."""

    scores: dict[str, Score]
    names: list[str]
    values: dict[str, np.ndarray]           # task -> (images,)
    keys: dict[str, Legend]                 # what the colours of the pictures mean, of every task


class Review:
    """Sees every batch of an evaluation (`evaluate(on_batch=...)`); every process its own images."""

    def __init__(self, contexts: Mapping[str, TaskContext], folder: Path) -> None:
        self.contexts, self.folder, self.start = contexts, folder, time.perf_counter()
        self.judges = {task: kind for task in contexts for kind in TASKS.load(task).evaluators
                       if kind.of_image is not None}
        self.rows: list[tuple[str, dict[str, float]]] = []

    def __call__(self, batch: Mapping, predictions: Mapping[str, Any]) -> None:
        for i, meta in enumerate(batch["meta"]):
            scores = {task: self._score(task, kind, predictions[task][i:i + 1], batch[task][i:i + 1], meta)
                      for task, kind in self.judges.items()}
            self.rows.append((meta["name"], scores))
        maps = {task: _on_cpu(predictions[task]) for task in self.contexts}
        maps |= {f"{task}{LABEL}": batch[task] for task in self.contexts}
        with ThreadPoolExecutor(THREADS) as pool:                      # colours and JPEG leave the interpreter alone
            for _ in pool.map(lambda i: self._show(batch["image"][i], {k: v[i] for k, v in maps.items()},
                                                   batch["meta"][i]), range(len(batch["meta"]))):
                pass                                                   # raises what a thread has raised

    def _show(self, image: Tensor, maps: Mapping[str, Any], meta: Mapping) -> None:
        """Writes the pictures of one image: (3, H, W), and its predictions and labels."""
        rgb = (np.clip(image.permute(1, 2, 0).numpy() * STD + MEAN, 0, 1) * 255).astype(np.uint8)      # (H, W, 3)
        self._save(INPUT, rgb, rgb, meta)
        contexts = {task: coloured_as(to_array(maps[f"{task}{LABEL}"]), task, self.contexts[task])
                    for task in self.contexts}
        for kind, prediction in maps.items():
            task = kind.removesuffix(LABEL)
            picture = TASKS.load(task).view.picture(to_array(prediction), contexts[task], rgb)
            self._save(kind, picture, rgb, meta)

    def _score(self, task: str, kind: type[Evaluator], prediction: Any, label: Any, meta: Mapping) -> float:
        judge = kind.for_task(self.contexts[task])
        device = prediction.device if isinstance(prediction, Tensor) else torch.device("cpu")
        judge.update(prediction, to_device(label, device), [meta])
        return judge.compute()[kind.of_image.key] if judge.valid_pixels != 0 else math.nan

    def _save(self, kind: str, picture: np.ndarray, frame: np.ndarray, meta: Mapping) -> None:
        inside = _without_padding(picture, frame.shape[:2], meta["size"])
        scale = SIDE / max(inside.shape[:2])
        size = [max(1, round(side * scale)) for side in inside.shape[1::-1]]
        small = cv2.resize(inside, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST)
        path = thumbnail(self.folder, kind, meta["name"])
        path.parent.mkdir(parents=True, exist_ok=True)
        if not cv2.imwrite(str(path), cv2.cvtColor(small, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, QUALITY]):
            raise OSError(f"could not write {path}: is the disk full or the folder read-only?")

    def finish(self) -> tuple[ImageScores, float]:
        """The scores of all processes' images, by name, and the seconds that the evaluation took; every process calls
        it. Rank 0 writes images.json."""
        rows = sorted((row for part in distributed.gather_objects(self.rows) for row in part), key=lambda row: row[0])
        seconds = time.perf_counter() - self.start
        found = ImageScores({task: kind.of_image for task, kind in self.judges.items()}, [name for name, _ in rows],
                            {task: np.array([scores[task] for _, scores in rows]) for task in self.judges},
                            {task: TASKS.load(task).view.key(context) for task, context in self.contexts.items()})
        if distributed.is_main():
            save_image_scores(self.folder / INDEX, found)
            kinds = [INPUT, *(f"{task}{ending}" for task in self.contexts for ending in ("", LABEL))]
            for name in set(found.names) - kept_images(found, tuple(self.contexts)):
                for kind in kinds:
                    thumbnail(self.folder, kind, name).unlink(missing_ok=True)
        return found, seconds


def thumbnail(folder: Path, kind: str, name: str) -> Path:
    """Where a small picture lies. kind: "input", a task, or a task and "_label"."""
    return folder / PICTURES / kind / f"{name}.jpg"


def kept_images(found: ImageScores, tasks: Sequence[str]) -> set[str]:
    """The names of the images whose pictures stay."""
    others = sorted(found.names, key=lambda name: zlib.crc32(name.encode()))[:KEPT]
    return {*others, *(found.names[i] for task in tasks for _, indices in shown_images(found, task) for i in indices)}


def save_image_scores(path: Path, found: ImageScores) -> None:
    """NaN becomes null."""
    images = [{"name": name, "scores": {task: None if math.isnan(values[i]) else float(values[i])
                                        for task, values in found.values.items()}}
              for i, name in enumerate(found.names)]
    about = {task: asdict(score) for task, score in found.scores.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = {"scores": about, "keys": found.keys, "images": images}
    path.write_text(json.dumps(whole, indent=0) + "\n", encoding="ascii")


def load_image_scores(path: Path) -> ImageScores:
    """What `save_image_scores` wrote; null becomes NaN. Files of versions without keys have none."""
    try:
        content = json.loads(path.read_text(encoding="ascii"))
        scores = {task: Score(**about) for task, about in content["scores"].items()}
        values = {task: np.array([image["scores"][task] for image in content["images"]], float) for task in scores}
        keys = {task: [(tuple(colour), words) for colour, words in key]
                for task, key in content.get("keys", {}).items()}
        return ImageScores(scores, [image["name"] for image in content["images"]], values, keys)
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} holds no scores of images by this program ({type(error).__name__})") from error


def shown_images(found: ImageScores, task: str) -> list[tuple[str, list[int]]]:
    """(rank, indices) of the images that a page shows of a task; the first ones where single images have no score."""
    if (score := found.scores.get(task)) is None:
        return [("first", list(range(min(EACH, len(found.names)))))]
    return list(chosen_images(found.values[task], score.higher_is_better, EACH))


def chosen_images(values: np.ndarray, higher_is_better: bool, number: int) -> Iterator[tuple[str, list[int]]]:
    """("best" | "median" | "worst", indices of that many images); no image twice, none without a score."""
    order = np.argsort(-values if higher_is_better else values, kind="stable")
    order = order[np.isfinite(values[order])]
    number = min(number, -(-len(order) // 3))
    middle = max(number, (len(order) - number) // 2)
    worst = order[max(len(order) - number, middle + number):][::-1]
    for name, part in (("best", order[:number]), ("median", order[middle:middle + number]), ("worst", worst)):
        if len(part):
            yield name, part.tolist()


def _on_cpu(of_batch: Any) -> Any:
    return of_batch.cpu() if isinstance(of_batch, Tensor) else of_batch


def _without_padding(picture: np.ndarray, frame: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """The part of a padded picture that shows the image; the picture may be larger or smaller than the frame."""
    scale = np.divide(picture.shape[:2], frame)
    top_left = np.floor((np.subtract(frame, size) // 2) * scale).astype(int)
    height, width = np.maximum(np.round(np.multiply(size, scale)), 1).astype(int)
    return picture[top_left[0]:top_left[0] + height, top_left[1]:top_left[1] + width]
