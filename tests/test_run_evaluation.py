"""Evaluations of a run: the right weights in the right mode, scores by hand, the choice of best.pt, pictures."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from models.model import MultiTaskModel
from tests.watched_run import (
    answers,
    experiment,
    names,
    read_batch,
    read_sample,
    rows,
    script_scores,
    stored,
    voc,
    watch,
)
from utils.engine.build import build_split, model_from_config
from utils.engine.predict import infer
from utils.engine.train import train

ALL_FOUR = ["task_dictionary.include_normals=true", "task_dictionary.include_edge=true"]
DROPPING = "backbone_kwargs.drop_path_rate=0.5"
SEMSEG = "task_dictionary={include_semseg: true}"


def scores_by_hand(model: nn.Module, root: Path) -> dict[str, float]:
    """Primary scores of NYUD's four tasks on the test split: pixels of all images pooled, images one by one."""
    confusion = np.zeros((40, 40), np.int64)
    squares, degrees, likelihoods = [], [], []
    for name in names(root, "val"):
        batch = read_batch(root, [name])
        with torch.no_grad():
            out = {task: y.double() for task, y in model(batch["image"]).final.items()}
        truth, guess = batch["semseg"].flatten().long(), out["semseg"].argmax(1).flatten()
        np.add.at(confusion, (truth[truth != 255].numpy(), guess[truth != 255].numpy()), 1)
        known = batch["depth"] != 255
        squares.append((out["depth"].clamp(min=0) - batch["depth"])[known].square())
        true_normal, normal = batch["normals"].double(), out["normals"]
        cosine = (true_normal * normal).sum(1) / (true_normal.norm(dim=1) * normal.norm(dim=1))
        degrees.append(cosine.clamp(-1, 1).arccos().flatten() * 180 / math.pi)
        edge, chance = batch["edge"].double(), out["edge"].sigmoid().sigmoid()         # twice, as published
        likelihoods.append(-(0.9 * edge * chance.log() + 0.1 * (1 - edge) * (1 - chance).log()).flatten())
    union = confusion.sum(0) + confusion.sum(1) - np.diag(confusion)
    return {"semseg": float((np.diag(confusion) / np.maximum(union, 1)).mean()),
            "depth": torch.cat(squares).mean().sqrt().item(), "normals": torch.cat(degrees).mean().item(),
            "edge": torch.cat(likelihoods).mean().item()}


def primary(results: dict) -> dict[str, float]:
    keys = {"semseg": "mIoU", "depth": "rmse", "normals": "mean", "edge": "loss"}
    return {task: scores[keys[task]] for task, scores in results.items()}


@pytest.mark.parametrize("decay, part", [(0.7, "ema"), (0.0, "model")])
def test_scores_are_those_of_the_average_in_eval_mode(example_root, tmp_path, decay, part):
    """With stochastic depth and batch norm, which training mode would show in every digit."""
    config = experiment(example_root, tmp_path, *ALL_FOUR, DROPPING, f"ema_decay={decay}", "max_iter=3",
                        "val_interval=3", "optimizer_kwargs.lr=1e-2")
    with watch(example_root) as seen:
        results = train(config, resume=False)
    last = stored(config.run_dir / "last.pt")
    model = seen.start
    model.load_state_dict({key.removeprefix("module."): value for key, value in last[part].items()
                           if key != "n_averaged"})
    by_hand = scores_by_hand(model.eval(), example_root)
    assert primary(results) == pytest.approx(by_hand, rel=1e-5)
    if part == "ema":
        model.load_state_dict(last["model"])
        assert primary(results) != pytest.approx(scores_by_hand(model.eval(), example_root), rel=1e-3)
    assert len(seen.passes) == 3 and all(len(images) == 2 for images in seen.passes)    # no evaluation in training mode
    [row] = rows(config, "eval")
    written = json.loads((config.run_dir / "results" / "step_3.json").read_text())
    assert last["metrics"] == results and written["step"] == 3
    for task, scores in results.items():
        assert {k: row[f"{task}/{k}"] for k in scores} == pytest.approx(scores, rel=1e-9, nan_ok=True)
        assert written["scores"][task]["valid_pixels"] == scores["valid_pixels"] > 0
    again = infer(config, config.run_dir / "last.pt", tmp_path / "infer")
    assert primary(again) == pytest.approx(by_hand, rel=1e-5)


def test_scores_are_taken_in_the_precision_of_the_run(example_root, tmp_path):
    config = experiment(example_root, tmp_path, *ALL_FOUR, "precision=bf16", "valBatch=1", "boundary_infer=off")
    torch.manual_seed(0)
    model = model_from_config(config).eval()
    torch.save({"model": model.state_dict()}, tmp_path / "any.pt")
    results = primary(infer(config, tmp_path / "any.pt", tmp_path / "out"))
    with torch.autocast("cpu", torch.bfloat16):
        assert results == pytest.approx(scores_by_hand(model, example_root), rel=1e-6)
    assert results["depth"] != pytest.approx(scores_by_hand(model, example_root)["depth"], rel=1e-6)


def test_training_goes_on_in_training_mode_after_an_evaluation(example_root, tmp_path):
    """The same weights and batch statistics, whether they were scored on the way or not."""
    ends = []
    for folder, interval in (("a", 1), ("b", 4)):
        config = experiment(example_root, tmp_path / folder, f"val_interval={interval}")
        train(config, resume=False)
        ends.append(stored(config.run_dir / "last.pt")["model"])
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


@pytest.mark.parametrize("batch", [1, 3])
def test_known_predictions_have_known_scores(example_root, tmp_path, batch):
    """One class and one distance everywhere; in a frame with padding, and with any batch size."""
    config = experiment(example_root, tmp_path, "image_size=[96, 128]", f"valBatch={batch}", *ALL_FOUR,
                        "boundary_infer=off")
    torch.save({"model": model_from_config(config).state_dict()}, tmp_path / "any.pt")

    def answer(rgb: torch.Tensor) -> dict[str, torch.Tensor]:
        floor = torch.zeros(len(rgb), 40, *rgb.shape[2:])
        floor[:, 1] = 1
        return {"semseg": floor, "depth": torch.full_like(rgb[:, :1], 2.0), "normals": 2 * rgb - 1,
                "edge": torch.logit(rgb[:, :1], eps=1e-6)}

    with answers(answer):
        results = infer(config, tmp_path / "any.pt", tmp_path / "out")
    samples = {name: read_sample(example_root, name) for name in names(example_root, "val")}
    depth = torch.cat([s["depth"].flatten() for s in samples.values()]).double()
    depth = depth[depth != 255]
    assert results["depth"]["rmse"] == pytest.approx((depth - 2).square().mean().sqrt().item(), rel=1e-6)
    assert results["depth"]["valid_pixels"] == len(depth)
    semseg = torch.cat([s["semseg"].flatten() for s in samples.values()])
    share = ((semseg == 1).sum() / (semseg != 255).sum()).item()
    assert results["semseg"]["mIoU"] == pytest.approx(share / 40, rel=1e-6)
    assert results["semseg"]["pixel_accuracy"] == pytest.approx(share, rel=1e-6)
    for name in samples:                                              # boundary maps: the red channel, original size
        red = np.array(Image.open(example_root / "NYUDv2" / "images" / f"{name}.png"))[..., 0]
        found = np.array(Image.open(tmp_path / "out" / "edge" / f"{name}.png"))
        assert found.shape == (64, 96) and np.abs(found.astype(int) - red).max() <= 1
    assert len(list((tmp_path / "out" / "edge").iterdir())) == len(samples)
    assert primary(json.loads((tmp_path / "out" / "results.json").read_text())["scores"]) == primary(results)


# ------------------------------------------------------------ which checkpoint is the best


@pytest.mark.parametrize("scores, best_at", [([0.2, 0.5, 0.3, 0.4], 2), ([0.5, 0.4, 0.3, 0.2], 1),
                                             ([0.1, 0.2, 0.3, 0.4], 4), ([0.3, 0.3, 0.3, 0.3], 1)])
def test_best_is_the_first_with_the_highest_score(example_root, tmp_path, monkeypatch, scores, best_at):
    script_scores(monkeypatch, scores)
    config = experiment(example_root, tmp_path, SEMSEG, "val_interval=1")
    assert train(config, resume=False)["semseg"]["mIoU"] == scores[-1]
    best, last = stored(config.run_dir / "best.pt"), stored(config.run_dir / "last.pt")
    assert best["step"] == best_at and best["metrics"]["semseg"]["mIoU"] == max(scores)
    assert last["step"] == 4 and last["best"] == pytest.approx(math.log(max(scores)))


def test_a_score_that_is_not_a_number_is_never_the_best(example_root, tmp_path, monkeypatch):
    script_scores(monkeypatch, [0.2, math.nan, 0.3, 0.25])
    config = experiment(example_root, tmp_path, SEMSEG, "val_interval=1")
    train(config, resume=False)
    assert stored(config.run_dir / "best.pt")["step"] == 3


def test_the_untrained_model_is_scored_but_never_kept(example_root, tmp_path, monkeypatch):
    script_scores(monkeypatch, [0.9, 0.2, 0.1])
    config = experiment(example_root, tmp_path, SEMSEG, "val_interval=2", "eval_at_start=true")
    train(config, resume=False)
    assert stored(config.run_dir / "best.pt")["step"] == 2
    assert [row["semseg/mIoU"] for row in rows(config, "eval")] == [0.9, 0.2, 0.1]


def test_lower_is_better_where_the_task_says_so(example_root, tmp_path):
    """Depth alone: best.pt has the smallest error of the run."""
    config = experiment(example_root, tmp_path, "task_dictionary={include_depth: true}", "val_interval=1",
                        "max_iter=6", "optimizer=sgd", "optimizer_kwargs={lr: 0.2, momentum: 0.9}")
    train(config, resume=False)
    errors = [row["depth/rmse"] for row in rows(config, "eval")]
    assert stored(config.run_dir / "best.pt")["step"] == 1 + errors.index(min(errors))
    assert errors.index(max(errors)) != errors.index(min(errors))


# ------------------------------------------------------------ pictures


def test_the_panel_shows_image_predictions_and_labels_in_their_colours(example_root, tmp_path, monkeypatch):
    """Upper row: image and predictions; lower row: image and labels."""
    from torch.utils.tensorboard import SummaryWriter
    shown = []
    monkeypatch.setattr(SummaryWriter, "add_image",
                        lambda self, tag, picture, step, dataformats: shown.append((step, picture)))
    config = experiment(example_root, tmp_path, "tensorboard=true", "max_iter=2", "val_interval=1")

    def answer(rgb: torch.Tensor) -> dict[str, torch.Tensor]:
        door = torch.zeros(len(rgb), 40, *rgb.shape[2:])
        door[:, 7] = 1
        return {"semseg": door.requires_grad_(), "depth": torch.full_like(rgb[:, :1], 2.0).requires_grad_()}

    with answers(answer):
        train(config, resume=False)
    assert [step for step, _ in shown] == [1, 2]
    first = names(example_root, "val")[0]
    rgb = np.array(Image.open(example_root / "NYUDv2" / "images" / f"{first}.png"))
    label = np.array(Image.open(example_root / "NYUDv2" / "segmentation" / f"{first}.png"))
    panel = shown[0][1].astype(int)
    assert panel.shape == (2 * 64, 3 * 96, 3)
    for row in (panel[:64], panel[64:]):
        assert np.abs(row[:, :96] - rgb).max() <= 1
    assert (panel[:64, 96:192] == voc(8)).all()                       # NYUD has no background: class 7 has colour 8
    colours = np.array([[255, 255, 255], *(voc(i) for i in range(1, 41))])
    assert (panel[64:, 96:192] == colours[label]).all()


def test_the_test_split_is_named_by_its_own_key(example_root, tmp_path):
    """Training images on one side, test images on the other; none is in both."""
    config = experiment(example_root, tmp_path)
    assert build_split(config, "train").ids == names(example_root, "train")
    assert build_split(config, "val").ids == names(example_root, "val")
    other = experiment(example_root, tmp_path, "val_db_name=PASCALContext", "task_dictionary={include_normals: true}")
    assert build_split(other, "train").folder.name == "NYUDv2"
    assert build_split(other, "val").folder.name == "PASCALContext"
    train(other, resume=False)
    infer(other, other.run_dir / "last.pt", tmp_path / "infer")
    assert json.loads((tmp_path / "infer" / "results.json").read_text())["dataset"] == "PASCALContext"


def test_evaluate_leaves_the_mode_of_every_layer_as_it_was(example_root, tmp_path):
    """A frozen batch norm stays frozen."""
    from data.loader import build_eval_loader
    from utils.engine.build import task_contexts
    from utils.engine.evaluate import build_evaluators, evaluate
    config = experiment(example_root, tmp_path)
    model: MultiTaskModel = model_from_config(config)
    loader = build_eval_loader(build_split(config, "val"), 2)
    for training in (True, False):
        model.train(training)
        evaluate(model, loader, build_evaluators(task_contexts(config)), config, torch.device("cpu"))
        assert all(module.training == training for module in model.modules())


def test_each_split_is_that_of_its_own_data_set(example_root, tmp_path):
    """Trained on one data set, scored on another."""
    tasks = "task_dictionary={include_normals: true, include_edge: true}"
    for train_db, val_db in (("NYUD", "PASCALContext"), ("PASCALContext", "NYUD"), ("NYUD", "NYUD")):
        config = experiment(example_root, tmp_path, tasks, f"train_db_name={train_db}", f"val_db_name={val_db}")
        opened = {split: build_split(config, split) for split in ("train", "val")}
        assert {split: dataset.spec.name for split, dataset in opened.items()} == {"train": train_db, "val": val_db}
        assert {split: dataset.split for split, dataset in opened.items()} == {"train": "train", "val": "val"}
