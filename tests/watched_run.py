"""Tiny runs whose numbers can be worked out by hand: a small network, no augmentation, and a look at what it was given.

Nothing here asks the engine how it works. What a run reads is recognised by its pixels, labels are read from the files
again, and the network is copied at its first pass.
"""

import copy
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor, nn

from models.model import MultiTaskModel
from utils.engine import evaluate
from utils.engine.config import Config, load_config

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)

# Nothing is drawn at random but weights and the order of the images.
EXPERIMENT = {
    "model": "fcn", "backbone": "swin", "pretrained": False, "train_db_name": "NYUD", "val_db_name": "NYUD",
    "backbone_kwargs": {"embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 4,
                        "drop_path_rate": 0.0},
    "task_dictionary": {"include_semseg": True, "include_depth": True, "edge_w": 0.9},
    "image_size": [64, 96], "trBatch": 2, "valBatch": 2, "nworkers": 0, "max_iter": 4, "val_interval": 4,
    "log_interval": 1, "device": "cpu", "tensorboard": False, "progress": False, "report": False,
    "augmentation": {"scale_range": [1.0, 1.0], "flip_prob": 0.0, "photometric": False},
}


def experiment(root: Path, out_dir: Path, *overrides: str) -> Config:
    """The experiment above on the data below `root`, written into `out_dir`, with `key=value` arguments."""
    path = out_dir / "watched.yml"
    out_dir.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(EXPERIMENT), encoding="ascii")
    return load_config(path, [f"db_root={root}", f"out_dir={out_dir}", *overrides])


def stored(path: Path) -> dict:
    """A checkpoint as PyTorch reads it."""
    return torch.load(path, weights_only=True)


def rows(config: Config, kind: str) -> list[dict]:
    """The lines of metrics.jsonl of one kind, "train" or "eval"."""
    lines = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def names(root: Path, split: str) -> list[str]:
    return (root / "NYUDv2" / "gt_sets" / f"{split}.txt").read_text().split()


def read_sample(root: Path, name: str) -> dict[str, Tensor]:
    """Image and labels of one image of NYUD, read here and not by the loader: C x H x W, void 255."""
    def pixels(folder: str) -> Tensor:
        found = np.array(Image.open(root / "NYUDv2" / folder / f"{name}.png"))
        return torch.from_numpy(found.astype(np.float32)).reshape(*found.shape[:2], -1).permute(2, 0, 1)

    semseg, depth = pixels("segmentation"), torch.from_numpy(np.load(root / "NYUDv2" / "depth" / f"{name}.npy"))
    depth = depth.float().reshape(1, *semseg.shape[1:])
    return {"image": (pixels("images") / 255 - MEAN) / STD, "semseg": torch.where(semseg == 0, 255, semseg - 1),
            "depth": torch.where(depth == 0, 255, depth), "normals": 2 * pixels("normals") / 255 - 1,
            "edge": pixels("edge") / 255}


def read_batch(root: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """Samples stacked to (B, C, H, W)."""
    samples = [read_sample(root, name) for name in names]
    return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}


@dataclass
class Watched:
    """What the networks of a run saw. `start` is the trained one, before its first pass."""

    start: nn.Module | None = None
    passes: list[list[str]] = field(default_factory=list)         # names of the images of every training pass
    inputs: list[Tensor] = field(default_factory=list)            # and the images as they arrived
    evaluated: list[list[str]] = field(default_factory=list)      # names of the images of every pass in eval mode


@contextmanager
def watch(root: Path) -> Iterator[Watched]:
    """Looks at every pass of every model while the context is open."""
    seen, known = Watched(), {}
    for split in ("train", "val"):
        for name in names(root, split):
            known[np.array(Image.open(root / "NYUDv2" / "images" / f"{name}.png")).tobytes()] = name

    def recognise(image: Tensor) -> str:
        pixels = ((image.float() * STD + MEAN) * 255).round().permute(1, 2, 0).to(torch.uint8)
        return known.get(pixels.numpy().tobytes(), "?")

    def look(module: nn.Module, arguments: tuple) -> None:
        if not isinstance(module, MultiTaskModel):
            return
        found = [recognise(image) for image in arguments[0]]
        if not module.training:
            seen.evaluated.append(found)
            return
        if seen.start is None:
            seen.start = copy.deepcopy(module)
        seen.passes.append(found)
        seen.inputs.append(arguments[0].clone())

    handle = torch.nn.modules.module.register_module_forward_pre_hook(look)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def answers(answer: Callable[[Tensor], dict[str, Tensor]]) -> Iterator[None]:
    """While the context is open every model answers with `answer(rgb)`, rgb (B, 3, H, W) from 0 to 1.

    The answer is cut down to the model's tasks.
    """
    def replace(module: nn.Module, arguments: tuple, out):
        if not isinstance(module, MultiTaskModel):
            return None
        found = answer(arguments[0].float() * STD + MEAN)
        return out._replace(final={task: found[task] for task in out.final})

    handle = torch.nn.modules.module.register_module_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def voc(index: int) -> list[int]:
    """Colour `index` of PASCAL VOC's palette, RGB: bits 0, 3, 6 of the index are red's highest ones, and so on."""
    return [sum((index >> (3 * i + channel) & 1) << (7 - i) for i in range(3)) for channel in range(3)]


def script_scores(monkeypatch: pytest.MonkeyPatch, values: Sequence[float]) -> None:
    """Evaluations give these mIoU one after the other, whatever the network; use it with semseg as the only task."""
    original, left = evaluate.evaluate, iter(values)

    def scripted(*arguments, **options) -> dict:
        results = original(*arguments, **options)
        return {task: {**scores, "mIoU": next(left)} for task, scores in results.items()}

    for name, other in list(sys.modules.items()):                 # wherever the engine has imported it to
        if name.startswith("utils.engine") and getattr(other, "evaluate", None) is original:
            monkeypatch.setattr(other, "evaluate", scripted)
