"""The usual training pipeline of this field, written plainly: every map float32 from the file on, one NumPy or OpenCV
operation after the other on whole arrays (the steps: InvPT and its successors), in PyTorch's loader. It is what
`bench_data.py` compares ours with; nothing trains with it.
"""

import random
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, default_collate

from data.loader import TrainBatchSampler

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FILL = {"image": 0, "semseg": 255, "depth": 0, "normals": 0, "edge": 255}      # of the border


def load(folder: Path, name: str) -> dict:
    """Image and the four labels of an id of NYUDv2, H x W x C float32."""
    sample = {
        "image": np.array(Image.open(folder / "images" / f"{name}.png").convert("RGB")).astype(np.float32),
        "semseg": np.array(Image.open(folder / "segmentation" / f"{name}.png")).astype(np.float32)[..., None],
        "depth": np.load(folder / "depth" / f"{name}.npy").astype(np.float32)[..., None],
        "normals": np.array(Image.open(folder / "normals" / f"{name}.png").convert("RGB")).astype(np.float32),
        "edge": np.array(Image.open(folder / "edge" / f"{name}.png")).astype(np.float32)[..., None],
    }
    classes = sample["semseg"] - 1
    classes[classes == -1] = 255
    sample["semseg"] = classes
    sample["normals"] = 2.0 * sample["normals"] / 255.0 - 1.0
    sample["edge"] = sample["edge"] / 255.0
    return sample


def scale(sample: dict) -> dict:
    """One factor for all maps; depth is divided by it."""
    factor = random.uniform(0.5, 2.0)
    height, width = sample["image"].shape[:2]
    size = int(width * factor), int(height * factor)
    for key, value in sample.items():
        kind = cv2.INTER_LINEAR if key == "image" else cv2.INTER_NEAREST
        sample[key] = cv2.resize(value, size, interpolation=kind).reshape(size[1], size[0], value.shape[2])
    sample["depth"] = sample["depth"] / factor
    return sample


def crop(sample: dict, size: tuple[int, int]) -> dict:
    """A window in which no class covers three quarters, if ten draws find one."""
    height, width = sample["image"].shape[:2]
    for _ in range(11):
        top, left = (random.randint(0, max(n - m, 0)) for n, m in zip((height, width), size, strict=True))
        labels, counts = np.unique(sample["semseg"][top:top + size[0], left:left + size[1]], return_counts=True)
        counts = counts[labels != 255]
        if len(counts) > 1 and np.max(counts) / np.sum(counts) < 0.75:
            break
    return {key: value[top:top + size[0], left:left + size[1]] for key, value in sample.items()}


def flip(sample: dict) -> dict:
    """Left to right, with the x of normals."""
    if random.random() < 0.5:
        sample = {key: np.fliplr(value).copy() for key, value in sample.items()}
        sample["normals"][..., 0] *= -1
    return sample


def _convert(image: np.ndarray, alpha: float = 1, beta: float = 0) -> np.ndarray:
    return np.clip(image.astype(np.float32) * alpha + beta, 0, 255).astype(np.uint8)


def photometric(sample: dict) -> dict:
    """Brightness, contrast, saturation, hue in 8 bits."""
    image = sample["image"].astype(np.uint8)
    if random.random() < 0.5:
        image = _convert(image, beta=random.uniform(-32, 32))
    first = random.random() < 0.5
    if first and random.random() < 0.5:
        image = _convert(image, alpha=random.uniform(0.5, 1.5))
    if random.random() < 0.5:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[:, :, 1] = _convert(hsv[:, :, 1], alpha=random.uniform(0.5, 1.5))
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if random.random() < 0.5:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[:, :, 0] = (hsv[:, :, 0].astype(int) + random.randint(-18, 17)) % 180
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if not first and random.random() < 0.5:
        image = _convert(image, alpha=random.uniform(0.5, 1.5))
    return sample | {"image": image.astype(np.float32)}


def finish(sample: dict, size: tuple[int, int]) -> dict:
    """Normalised, padded, void marked, as tensors."""
    sample["image"] = (sample["image"] / 255.0 - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    height, width = sample["image"].shape[:2]
    down, right = max(size[0] - height, 0), max(size[1] - width, 0)
    border = ((down // 2, down - down // 2), (right // 2, right - right // 2), (0, 0))
    sample = {key: np.pad(value, border, constant_values=FILL[key]) for key, value in sample.items()}
    length, depth = np.linalg.norm(sample["normals"], axis=2), sample["depth"]
    sample["normals"][length == 0] = 255
    depth[depth == 0] = 255
    return {key: torch.from_numpy(value.transpose(2, 0, 1).copy()).float() for key, value in sample.items()}


class PlainNYUD:
    """A data set of the training split: `dataset[(index, seed)]`, as ours."""

    def __init__(self, folder: Path, size: tuple[int, int]):
        self.folder, self.size = folder, size
        self.ids = (folder / "gt_sets" / "train.txt").read_text(encoding="utf-8").split()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        index, seed = key
        random.seed(seed)
        sample = load(self.folder, self.ids[index])
        sample = finish(photometric(flip(crop(scale(sample), self.size))), self.size)
        return sample | {"meta": {"name": self.ids[index]}}


def collate(samples: list[dict]) -> dict:
    """Maps stacked, "meta" a list."""
    return {key: [sample[key] for sample in samples] if key == "meta" else
            default_collate([sample[key] for sample in samples]) for key in samples[0]}


def plain_loader(dataset: PlainNYUD, batch_size: int, num_workers: int) -> DataLoader:
    """PyTorch's own loader, endless, in which each worker computes on one thread."""
    return DataLoader(dataset, batch_sampler=TrainBatchSampler(len(dataset), batch_size), num_workers=num_workers,
                      collate_fn=collate, worker_init_fn=_one_thread, pin_memory=torch.cuda.is_available())


def _one_thread(worker: int) -> None:
    cv2.setNumThreads(0)
