"""Images without some of their labels: what is read, what a loss is the mean of, and what a score counts."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from data.base import MultiTaskDataset
from data.labels import VOID, LabelRules
from data.loader import TrainBatchSampler, build_train_loader
from data.partial import PartialLabels, choose_labels
from data.transforms import build_transform
from losses.balancing import build_balancing
from losses.multi_task import MultiTaskLoss
from losses.regression import L1Loss
from tests.conftest import TINY
from tests.processes import run_main
from tests.shared import ROOT
from utils.engine.build import build_split, evaluation_contexts, trained_model
from utils.engine.config import load_config
from utils.engine.predict import infer
from utils.engine.tasks import TASKS, label_rules
from utils.engine.train import train
from utils.options import ConfigError

SIZE, NUMBER = (60, 90), 20
LABELS = ("semseg", "depth", "edge")
USED = NUMBER - 2                                          # training images with any label
ALLOW = PartialLabels("allow")
DESCRIPTION = """
image_size: [64, 96]
splits: {train: "images/train/*", val: "images/val/*"}
tasks:
  semseg: {classes: [a, b, c]}
  depth: {unit: mm}
  edge: {}
"""
ON = "{include_semseg: true, include_depth: true, include_edge: true}"


def picture(kind: str, rng: np.random.Generator) -> np.ndarray:
    return {"images": lambda: rng.integers(0, 256, (*SIZE, 3)).astype(np.uint8),
            "semseg": lambda: rng.choice([0, 1, 2, 255], SIZE).astype(np.uint8),
            "depth": lambda: rng.integers(500, 9000, SIZE).astype(np.uint16),
            "edge": lambda: rng.choice([0] * 9 + [255], SIZE).astype(np.uint8)}[kind]()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """20 training and 10 test images of three tasks, 40 % of whose labels are missing; one image has none."""
    root, rng = tmp_path_factory.mktemp("partial") / "own", np.random.default_rng(0)
    for split, number in (("train", NUMBER), ("val", NUMBER // 2)):
        missing = rng.permutation(3 * number)[:round(0.4 * 3 * number)]
        lost = {(i // 3, LABELS[i % 3]) for i in missing}
        lost |= {(0, task) for task in LABELS if split == "train"}
        for i, kind in itertools.product(range(number), ("images", *LABELS)):
            if (i, kind) not in lost:
                path = root / kind / split / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture(kind, rng)).save(path)
    (root / "dataset.yml").write_text(DESCRIPTION)
    return root


def experiment(folder: Path, *more: str):
    return load_config(ROOT / "configs" / "_base_" / "bim.yml", arguments(folder, *more))


def arguments(folder: Path, *more: str) -> list[str]:
    return [*TINY, f"train_db_name={{folder: {folder}}}", f"task_dictionary={ON}", f"out_dir={folder.parent / 'runs'}",
            "partial_labels.missing=allow", "model_kwargs.drop_path_rate=0", "backbone_kwargs.drop_path_rate=0",
            "max_iter=4", "val_interval=4", *more]


def dataset(folder: Path, partial: PartialLabels = ALLOW, transform=None, tasks=LABELS) -> MultiTaskDataset:
    return MultiTaskDataset(experiment(folder).dataset, "", "train", label_rules(tasks), transform, None, partial)


# Reading -------------------------------------------------------------------------------------------------------------

def test_what_is_missing_is_refused_unless_allowed(folder):
    with pytest.raises(FileNotFoundError, match=r"2\d file.s. of split 'train' \(20 images\) missing .* "
                                                r"partial_labels\.missing=allow trains and scores with the labels"):
        dataset(folder, partial=PartialLabels())
    data = dataset(folder)
    assert "train/0" not in data.ids and len(data) == USED             # it has no label at all
    for row, name in enumerate(data.ids):
        there = [(folder / task / f"{name}.png").is_file() for task in data.labels]
        assert data.present[row].tolist() == there
        sample = data.load(name)
        assert [sample[task] is not None for task in data.labels] == there
    assert data.labelled("depth") == [name for name in data.ids if (folder / "depth" / f"{name}.png").is_file()]


@pytest.mark.parametrize("training", [True, False])
def test_a_missing_label_supervises_nothing(folder, training):
    data = dataset(folder, transform=build_transform((64, 96), None, training, label_rules(LABELS)))
    for index, row in enumerate(data.present):
        sample = data[(index, 3)]
        for task, has in zip(LABELS, row, strict=True):
            assert sample[task].shape == (1, 64, 96) and bool((sample[task] != VOID).any()) == has


def test_images_without_the_label_that_guides_crops_are_cropped_once(folder):
    labels = label_rules(("semseg", "depth"))
    transform = build_transform((16, 24), None, True, labels)
    data = dataset(folder, transform=transform, tasks=("semseg", "depth"))
    assert all(data[(index, 1)]["image"].shape == (3, 16, 24) for index in range(len(data)))


def test_a_label_that_is_no_map_says_so():
    class Boxes(LabelRules):
        fit = resize = crop = flip = pad = to_tensor = None
    with pytest.raises(ValueError, match="labels of kind Boxes cannot be missing"):
        Boxes().absent((2, 2))


# Subsets -------------------------------------------------------------------------------------------------------------

def test_one_or_some_labels_per_image():
    present, ids = np.ones((400, 4), bool), [f"{i:04d}" for i in range(400)]
    one, some = (choose_labels(present, ids, PartialLabels(subset=rule)) for rule in ("one", "random"))
    assert (one.sum(axis=1) == 1).all() and set(some.sum(axis=1).tolist()) == {1, 2, 3}
    assert (np.abs(one.mean(axis=0) - 0.25) < 0.08).all() and (np.abs(some.mean(axis=0) - 0.5) < 0.08).all()
    turned = choose_labels(present, ids[::-1], PartialLabels(subset="one"))
    np.testing.assert_array_equal(turned[::-1], one)                   # by id, whatever the order of the list
    assert (choose_labels(present, ids, PartialLabels(subset="one", seed=1)) != one).any()
    half = present.copy()
    half[:, :2] = False
    assert not choose_labels(half, ids, PartialLabels(subset="one"))[:, :2].any()
    alone = np.eye(4, dtype=bool)
    np.testing.assert_array_equal(choose_labels(alone, ids[:4], PartialLabels(subset="random")), alone)


def test_subsets_are_for_training_and_hide_labels_from_crops(folder):
    config = experiment(folder, "partial_labels.subset=one")
    assert (build_split(config, "train").present.sum(axis=1) == 1).all()
    assert build_split(config, "val").present.sum() == 18              # 40 % of 30 are missing
    with pytest.raises(ConfigError, match="augmentation.always_guide_crop reads a label that partial_labels may hide"):
        experiment(folder, "augmentation.always_guide_crop=true")


def test_a_task_without_any_label_is_refused(folder, tmp_path):
    (tmp_path / "own").mkdir()
    for path in folder.iterdir():
        if path.name != "depth":
            (tmp_path / "own" / path.name).symlink_to(path)
    with pytest.raises(ValueError, match="no training image of own has a label for depth; take the task out of"):
        build_split(experiment(tmp_path / "own"), "train")


# Losses --------------------------------------------------------------------------------------------------------------

PRESENT = np.random.default_rng(5).random((24, 3)) < 0.5


def shares(world: int, accumulate: int, scope: str) -> list[np.ndarray]:
    """Of the first three updates of 8 images, (passes, ranks, images, tasks)."""
    batch = 8 // world // accumulate
    samplers = [TrainBatchSampler(24, batch, rank, world, 0, accumulate, present=PRESENT, scope=scope)
                for rank in range(world)]
    first = [np.stack(list(itertools.islice(sampler.shares(), 3 * accumulate))) for sampler in samplers]
    passes = np.stack(first, axis=1)
    return list(passes.reshape(3, accumulate, world, batch, 3))


@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (2, 1), (4, 2), (1, 4), (8, 1)])
def test_a_mean_over_all_images_is_one_over_those_with_a_label(world, accumulate):
    order = np.random.default_rng((0, 0)).permutation(24).reshape(3, 8)
    for update, images in zip(shares(world, accumulate, "image"), order, strict=True):
        has = PRESENT[images].reshape(accumulate, -1, world, 3).transpose(0, 2, 1, 3)
        np.testing.assert_array_equal(update > 0, has)
        np.testing.assert_allclose(update.mean(axis=(0, 1, 2)), has.any(axis=(0, 1, 2)), rtol=1e-6)
        assert all(len(set(update[..., task][has[..., task]].tolist())) <= 1 for task in range(3))


@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (2, 1), (4, 2), (8, 1)])
def test_a_mean_over_processes_is_one_over_those_with_a_label(world, accumulate):
    for update in shares(world, accumulate, "process"):
        assert (update == update[:, :, :1]).all()                      # the same for all images of a batch
        np.testing.assert_allclose(update.mean(axis=(0, 1, 2)), update.any(axis=(0, 1, 2)), rtol=1e-6)


def test_shares_are_one_where_nothing_is_missing(folder):
    sampler = TrainBatchSampler(24, 2, 1, 2, accumulate=2, present=np.ones((24, 3), bool))
    complete = list(itertools.islice(sampler.shares(), 7))
    assert len(complete) == 7 and all((share == 1).all() and share.shape == (2, 3) for share in complete)


def test_batches_carry_their_shares(folder):
    data = dataset(folder, transform=build_transform((64, 96), None, True, label_rules(LABELS)))
    for batch in itertools.islice(build_train_loader(data, 3, seed=1), 4):
        for task in LABELS:
            has = (batch[task] != VOID).flatten(1).any(dim=1)
            assert torch.equal(batch["shares"][task] > 0, has)
            assert batch["shares"][task][has].tolist() == pytest.approx([3 / max(has.sum().item(), 1)] * int(has.sum()))


@pytest.mark.parametrize("scheme", ["weighted_sum", "log"])
def test_losses_are_means_over_the_images_that_have_the_label(scheme):
    loss = MultiTaskLoss({"depth": L1Loss(), "flow": L1Loss()}, build_balancing(
        scheme, ("depth", "flow"), {"depth": 2.0, "flow": 3.0}), scope="image")
    rng = torch.Generator().manual_seed(0)
    logits = {task: torch.rand(3, 1, 4, 4, generator=rng, requires_grad=True) for task in ("depth", "flow")}
    labels = {task: torch.rand(3, 1, 4, 4, generator=rng) for task in logits}
    labels["depth"][1] = VOID
    labels["flow"][:] = VOID                               # no image has it: the loss is 0, and so is its gradient
    got = loss(logits, labels, shares={"depth": torch.tensor([1.5, 0, 1.5]), "flow": torch.zeros(3)})
    each = [(logits["depth"][i] - labels["depth"][i]).abs().mean() for i in (0, 2)]
    assert got["depth"].item() == pytest.approx(sum(e.item() for e in each) / 2)
    assert got["flow"].item() == 0
    terms = [e if scheme == "weighted_sum" else torch.log(e + 1e-8) for e in each]
    assert got["total"].item() == pytest.approx(2 * sum(t.item() for t in terms) / 2)
    got["total"].backward()
    assert (logits["flow"].grad == 0).all() and (logits["depth"].grad[1] == 0).all()
    assert (logits["depth"].grad[0] != 0).all()


# Training ------------------------------------------------------------------------------------------------------------

def losses_of(folder: Path, name: str) -> list[dict]:
    lines = (folder.parent / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == "train"]


def test_one_and_two_processes_learn_the_same(folder):
    """Images of one update that one process has are shared by two; some updates leave a process without any label.

    With one image in each process its loss is that of its process, too.
    """
    train(experiment(folder, "version_name=one", "trBatch=2"), resume=False)
    command = ["--run_mode", "train", "--config_exp", str(ROOT / "configs" / "_base_" / "bim.yml")]
    one = losses_of(folder, "one")
    for scope in ("image", "process"):
        more = (f"version_name={scope}", "trBatch=1", f"loss_kwargs.loss_scope={scope}")
        run_main([*command, *arguments(folder, *more)], processes=2)
        two = losses_of(folder, scope)
        assert len(one) == len(two) == 4
        for a, b in zip(one, two, strict=True):
            for key in ("loss/total", "loss/semseg", "loss/depth", "loss/edge"):
                assert a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-7), (scope, key)
    sampler = TrainBatchSampler(USED, 1, 0, 2, present=dataset(folder).present, scope="image")
    assert any((share == 0).any() for share in itertools.islice(sampler.shares(), 4))


def test_scores_are_those_of_the_labelled_pixels(folder):
    """By hand, from the files and the network's outputs."""
    config = experiment(folder, "version_name=scores", "loss_kwargs.loss_scope=process", "boundary_kwargs.workers=0")
    train(config, resume=False)
    checkpoint = config.run_dir / "last.pt"
    scores = infer(config, checkpoint, folder.parent / "out")
    model, _ = trained_model(config, checkpoint, torch.device("cpu"))
    data = build_split(config, "val")
    counts, squared, loss, pixels = np.zeros((3, 3)), [], [], 0        # intersection and union; depth; edge
    for index, name in enumerate(data.ids):
        with torch.inference_mode():
            logits = model(data[index]["image"][None]).final
        out = {task: F.interpolate(logits[task].float(), (64, 96), mode="bilinear")[0, :, 2:62, 3:93]
               for task in config.tasks}
        files = {task: folder / task / f"{name}.png" for task in config.tasks}
        if files["semseg"].is_file():
            label, guess = np.asarray(Image.open(files["semseg"])), out["semseg"].argmax(0).numpy()
            pixels += (label != 255).sum()
            for c in range(3):
                both = ((label == c) & (guess == c)).sum()
                counts[c, :2] += both, (((label == c) | (guess == c)) & (label != 255)).sum()
        if files["depth"].is_file():
            squared.append((out["depth"][0].clamp_min(0).numpy() - np.asarray(Image.open(files["depth"])) / 1000) ** 2)
        if files["edge"].is_file():
            y, q = np.asarray(Image.open(files["edge"])) / 255, torch.sigmoid(torch.sigmoid(out["edge"][0])).numpy()
            loss.append(-(0.95 * y * np.log(q) + 0.05 * (1 - y) * np.log(1 - q)))
    assert scores["semseg"]["mIoU"] == pytest.approx((counts[:, 0] / counts[:, 1]).mean(), rel=1e-6)
    assert scores["semseg"]["valid_pixels"] == pixels
    assert scores["depth"]["rmse"] == pytest.approx(np.mean(squared) ** 0.5, rel=1e-5)
    assert scores["edge"]["loss"] == pytest.approx(np.mean(loss), rel=1e-5)
    assert 0 < len(loss) < len(data) and scores["edge"]["images"] == len(loss)
    context = evaluation_contexts(config, data, "exact")["edge"]
    assert not context.split.complete and list(context.split.ids) == data.labelled("edge")
    covered = TASKS.load("edge").build_evaluators(context)[0].source.covered
    assert covered == f"the {len(loss)} images of val with labels"
