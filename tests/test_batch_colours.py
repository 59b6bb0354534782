"""Colours changed where the network runs are those that a worker would have changed, drawn for each image."""

import itertools
import random
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from data.base import MultiTaskDataset
from data.batch_colours import changed, with_colours
from data.datasets import DATASETS
from data.loader import TrainLoader, build_train_loader
from data.photometric import CHANGES, ColoursToCome, PhotometricDistortion, draw_changes
from data.transforms import build_transform
from tests.watched_run import STD, experiment, watch
from utils.engine.build import build_split
from utils.engine.tasks import label_rules
from utils.engine.train import train
from utils.options import ConfigError

RNG = np.random.default_rng(0)
NAN = float("nan")
TASKS = ("semseg", "depth", "normals", "edge")
ON = "augmentation={scale_range: [1.0, 1.0], flip_prob: 0.5, photometric: true, photometric_on_device: true}"
OFF = ON.replace("photometric_on_device: true", "photometric_on_device: false")


def pictures(number: int) -> np.ndarray:
    """Every kind of pixel: random ones, the extremes, and greys; (number, 24, 32, 3) uint8."""
    images = RNG.integers(0, 256, (number, 24, 32, 3), np.uint8)
    images[:, :4] = RNG.choice(np.array([0, 1, 254, 255], np.uint8), (number, 4, 32, 3))
    images[:, 4:8] = images[:, 4:8, :, :1]
    return images


def batch_of(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def nearly(found: Tensor, wanted: Tensor, scale: Tensor | float = 1.0, share: float = 1e-3) -> None:
    """The same grey levels but for a share, which is off by what one level becomes in the changes after it."""
    off = (found - wanted).abs() * scale
    assert (off > 0.5).float().mean() < share and off.max() < 8, ((off > 0.5).float().mean(), off.max())


def same_batch(left: dict, plain: dict, share: float) -> None:
    """`left` with its colours changed is the batch that the workers change."""
    found = with_colours(left)
    assert "colours" in left and left["image"].dtype == torch.uint8 and found.keys() == plain.keys()
    assert found["image"].stride() == plain["image"].stride() and found["image"].dtype == torch.float32
    nearly(found["image"], plain["image"], 255 * STD, share)
    assert ((plain["image"] != 0) | (found["image"] == 0)).all()                 # the border is exactly that
    for key in plain.keys() - {"image", "meta", "shares"}:
        assert torch.equal(found[key], plain[key])
    assert found["meta"] == plain["meta"]


@pytest.mark.parametrize("kind", range(len(CHANGES)))
def test_each_change_alone(kind):
    images, values = pictures(6), [-32, -0.5, 0.5, 1.5, 17, 1.0]
    changes = torch.full((6, len(CHANGES)), NAN)
    changes[:, kind] = torch.tensor(values)
    values = [int(value) for value in values] if CHANGES[kind].__name__ == "hue" else values
    changes[:, kind] = torch.tensor(values)
    wanted = np.stack([CHANGES[kind](image, value) for image, value in zip(images, values, strict=True)])
    found = changed(batch_of(images), changes)
    if CHANGES[kind].__name__ in ("brightness", "contrast"):
        assert torch.equal(found, batch_of(wanted).float())
    nearly(found, batch_of(wanted).float())
    assert found.equal(found.round()) and found.min() >= 0 and found.max() <= 255


def test_nothing_drawn_changes_nothing():
    images = pictures(2)
    assert torch.equal(changed(batch_of(images), torch.full((2, 5), NAN)), batch_of(images).float())


def test_all_changes_of_a_batch_one_by_one():
    """Each image has its own; that of a neighbour touches none."""
    images, seeds = pictures(64), range(64)
    left = [ColoursToCome()({"image": image}, random.Random(seed)) for image, seed in zip(images, seeds, strict=True)]
    wanted = [PhotometricDistortion()({"image": image}, random.Random(seed))["image"]
              for image, seed in zip(images, seeds, strict=True)]
    changes = torch.stack([torch.from_numpy(sample["colours"]) for sample in left])
    assert changes[:, 5:].tolist() == [[24, 32]] * 64
    assert torch.isnan(changes[:, [1, 4]]).any(dim=1).all()                      # contrast comes once at most
    together = changed(batch_of(images), changes[:, :5])
    nearly(together, batch_of(np.stack(wanted)).float())
    alone = torch.cat([changed(batch_of(images[i:i + 1]), changes[i:i + 1, :5]) for i in seeds])
    assert torch.equal(together, alone)


def test_both_ways_use_up_the_same_random_numbers():
    for seed in range(20):
        one, other, third = (random.Random(seed) for _ in range(3))
        ColoursToCome()({"image": np.zeros((2, 2, 3), np.uint8)}, one)
        PhotometricDistortion()({"image": np.zeros((2, 2, 3), np.uint8)}, other)
        draw_changes(third)
        assert one.getstate() == other.getstate() == third.getstate()


def test_conversion_of_every_colour_of_a_grid():
    """There and back again, with every hue: OpenCV's own 8 bits."""
    levels = np.arange(0, 256, 5, np.uint8)
    grid = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 64, 3)     # rows that fill registers
    for turn in (0, 1, -7, 90):
        wanted = cv2.cvtColor(grid[0], cv2.COLOR_RGB2HSV).astype(int)
        wanted[..., 0] = (wanted[..., 0] + turn) % 180
        wanted = cv2.cvtColor(wanted.astype(np.uint8), cv2.COLOR_HSV2RGB)
        found = changed(batch_of(grid), torch.tensor([[NAN, NAN, NAN, turn, NAN]]))
        assert (found - batch_of(wanted[None]).float()).abs().max() <= 1
        assert (found != batch_of(wanted[None])).float().mean() < 1e-3


# Batches -------------------------------------------------------------------------------------------------------------

def loader(root: Path, on_device: bool, *arguments, size: tuple[int, int] = (64, 96),
           scale_range: tuple[float, float] = (0.5, 2.0), **options) -> TrainLoader:
    spec, labels = DATASETS.load("NYUD"), label_rules(TASKS)
    transform = build_transform(size, None, True, labels, scale_range=scale_range, photometric_on_device=on_device)
    return build_train_loader(MultiTaskDataset(spec, root, "train", labels, transform), *arguments, **options)


@pytest.mark.parametrize(("size", "scale_range", "share"), [
    ((64, 96), (1.0, 1.0), 1e-3), ((83, 131), (1.0, 1.0), 1e-3),
    ((37, 201), (0.5, 2.0), 0.1)])          # cut and framed at once; the ends of short rows, where OpenCV rounds
def test_batches_are_those_of_the_workers(example_root, size, scale_range, share):
    pair = [itertools.islice(loader(example_root, on_device, 4, seed=3, size=size, scale_range=scale_range), 6)
            for on_device in (True, False)]
    for left, plain in zip(*pair, strict=True):
        same_batch(left, plain, share)


def drawn(batches: TrainLoader, number: int) -> list[Tensor]:
    return [batch["colours"] for batch in itertools.islice(batches, number)]


def test_draws_depend_on_seed_epoch_and_image_alone(example_root):
    whole = drawn(loader(example_root, True, 4, seed=3), 6)       # 12 images: two epochs
    assert len({row.numpy().tobytes() for row in torch.cat(whole)[:, :5]}) > 18
    for again in (drawn(loader(example_root, True, 4, num_workers=1, seed=3), 6),
                  drawn(loader(example_root, True, 4, seed=3, start_update=2), 4)):
        assert all(map(torch.equal, map(Tensor.nan_to_num, again), map(Tensor.nan_to_num, whole[-len(again):])))
    ranks = [drawn(loader(example_root, True, 2, rank=rank, world_size=2, seed=3), 6) for rank in range(2)]
    for of_all, *parts in zip(whole, *ranks, strict=True):
        assert torch.equal(torch.stack(parts, dim=1).flatten(0, 1).nan_to_num(), of_all.nan_to_num())


# Runs ----------------------------------------------------------------------------------------------------------------

def test_a_run_sees_the_same_pictures_and_goes_on_with_them(example_root, tmp_path):
    """Without and with it, with workers, and resumed; images of the test split are as they are."""
    runs = []
    for name, *more in (("off", OFF), ("on", ON), ("workers", ON, "nworkers=1")):
        with watch(example_root) as seen:
            train(experiment(example_root, tmp_path / name, *more, "val_interval=2"), resume=False)
        assert len(seen.evaluated) == 6 and "?" not in itertools.chain(*seen.evaluated)
        runs.append(seen.inputs)
    off, on, workers = runs
    for a, b, c in zip(off, on, workers, strict=True):
        nearly(a, b, 255 * STD)
        assert torch.equal(b, c) and b.dtype == torch.float32
    with watch(example_root) as resumed:
        train(experiment(example_root, tmp_path / "halves", OFF, "max_iter=2", "val_interval=2"), resume=False)
        train(experiment(example_root, tmp_path / "halves", ON, "val_interval=2"), resume=True)
    assert all(map(torch.equal, resumed.inputs, [*off[:2], *on[2:]]))
    [log] = (tmp_path / "halves").rglob("log.txt")
    assert "augmentation.photometric_on_device: False -> True" in log.read_text()


def test_what_is_not_changed_cannot_be_left_to_the_device(example_root, tmp_path):
    with pytest.raises(ConfigError, match=r"augmentation\.photometric_on_device.*false where photometric is"):
        experiment(example_root, tmp_path, "augmentation={photometric: false, photometric_on_device: true}")
    plain = build_split(experiment(example_root, tmp_path, ON), "val")[0]
    assert plain["image"].dtype == torch.float32 and "colours" not in plain
