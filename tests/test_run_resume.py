"""A run that is interrupted and continued, and a run that must not start: what is kept, what is refused."""

import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch

from models.model import MultiTaskModel
from tests.watched_run import experiment, names, rows, script_scores, stored, watch
from utils.engine.config import Config
from utils.engine.train import train
from utils.exits import ToBeContinued

SEMSEG = "task_dictionary={include_semseg: true}"


def continued_from(whole: Config, step: int, half: Config) -> None:
    """Gives `half` the folder of `whole` as it was after this step."""
    half.run_dir.mkdir(parents=True)
    shutil.copy(whole.run_dir / f"step_{step}.pt", half.run_dir / "last.pt")


# ------------------------------------------------------------ continuing


@pytest.mark.parametrize("overrides", [
    ["optimizer=sgd", "optimizer_kwargs={lr: 1e-2, momentum: 0.9}", "ema_decay=0.5"],
    ["optimizer=adam", "precision=fp16", "backbone_kwargs.drop_path_rate=0.5"],
], ids=["sgd", "fp16"])
def test_the_second_half_is_that_of_an_uninterrupted_run(example_root, tmp_path, overrides):
    """Images, rates, losses and everything that is saved; the interruption is in the middle of an epoch."""
    common = [*overrides, "global_batch=4", "max_iter=5", "val_interval=5", "checkpoint_interval=2"]
    whole = experiment(example_root, tmp_path / "whole", *common)
    half = experiment(example_root, tmp_path / "half", *common)
    with watch(example_root) as first:
        train(whole, resume=False)
    continued_from(whole, 2, half)
    with watch(example_root) as second:
        train(half, resume=True)
    assert second.passes == first.passes[4:] and len(second.passes) == 6
    for a, b in zip(rows(whole, "train")[2:], rows(half, "train"), strict=True):
        assert {k: v for k, v in a.items() if k != "images_per_s"} == {
            k: v for k, v in b.items() if k != "images_per_s"}
    a, b = stored(whole.run_dir / "last.pt"), stored(half.run_dir / "last.pt")
    assert a.keys() == b.keys()
    parts = a.keys() - {"config", "git"}                                   # the configurations differ in out_dir
    torch.testing.assert_close({part: a[part] for part in parts}, {part: b[part] for part in parts}, rtol=0, atol=0,
                               equal_nan=True)


@pytest.mark.parametrize("later, best_at", [([0.3, 0.4], 2), ([0.3, 0.6], 4)])
def test_the_best_score_outlives_an_interruption(example_root, tmp_path, monkeypatch, later, best_at):
    script_scores(monkeypatch, [0.1, 0.5, *later])
    config = experiment(example_root, tmp_path, SEMSEG, "val_interval=1", "max_iter=2")
    train(config, resume=False)
    train(experiment(example_root, tmp_path, SEMSEG, "val_interval=1", "max_iter=4"), resume=True)
    best = stored(config.run_dir / "best.pt")
    assert best["step"] == best_at and best["metrics"]["semseg"]["mIoU"] == max(0.5, *later)
    assert [row["step"] for row in rows(config, "eval")] == [1, 2, 3, 4]     # one file for both halves


def test_continuing_a_finished_run_changes_nothing(example_root, tmp_path):
    config = experiment(example_root, tmp_path, "max_iter=2")
    results = train(config, resume=False)
    before = (config.run_dir / "last.pt").read_bytes()
    with watch(example_root) as seen:
        assert train(config, resume=True) == results
    assert not seen.passes and not seen.evaluated and (config.run_dir / "last.pt").read_bytes() == before


def test_the_untrained_model_is_scored_once(example_root, tmp_path):
    config = experiment(example_root, tmp_path, "eval_at_start=true", "max_iter=1")
    train(config, resume=False)
    train(experiment(example_root, tmp_path, "eval_at_start=true", "max_iter=2"), resume=True)
    assert [row["step"] for row in rows(config, "eval")] == [0, 1, 2]


def test_resume_without_a_checkpoint_starts_afresh(example_root, tmp_path):
    config = experiment(example_root, tmp_path, "max_iter=1")
    train(config, resume=True)
    assert stored(config.run_dir / "last.pt")["step"] == 1
    assert "nothing to resume" in (config.run_dir / "log.txt").read_text()


def test_changed_keys_are_told_and_the_new_ones_hold(example_root, tmp_path, capsys):
    config = experiment(example_root, tmp_path, "max_iter=1", "optimizer_kwargs.lr=1e-3")
    train(config, resume=False)
    capsys.readouterr()
    train(experiment(example_root, tmp_path, "max_iter=2", "optimizer_kwargs.lr=1e-2"), resume=True)
    [told] = [line for line in capsys.readouterr().out.splitlines() if "another configuration" in line]
    assert "max_iter: 1 -> 2" in told and "optimizer_kwargs" in told and "val_interval" not in told
    assert rows(config, "train")[-1]["lr"] == pytest.approx(1e-2 * 0.5**0.9)
    assert "lr: 0.01" in (config.run_dir / "config.yaml").read_text()


@pytest.mark.parametrize("now, message", [
    (["ema_decay=0.5"], "last.pt was trained without a moving average; ema_decay is 0.5"),
    (["task_dictionary={include_normals: true}"], "normals"),
    (["model=multi_scale", "model_kwargs.channels=8"], "model fcn.* asks for model multi_scale"),
])
def test_a_checkpoint_that_does_not_fit_is_refused_and_kept(example_root, tmp_path, now, message):
    config = experiment(example_root, tmp_path, "max_iter=1")
    train(config, resume=False)

    def content() -> dict[Path, bytes]:
        return {p: p.read_bytes() for p in config.run_dir.rglob("*") if p.is_file() and p.name != "log.txt"}

    before = content()
    with pytest.raises(ValueError, match=message):
        train(experiment(example_root, tmp_path, "max_iter=2", *now), resume=True)
    assert content() == before


def test_a_second_run_in_the_same_folder_is_refused(example_root, tmp_path):
    config = experiment(example_root, tmp_path, "max_iter=1")
    train(config, resume=False)
    before = (config.run_dir / "last.pt").read_bytes()
    with pytest.raises(ValueError, match=r"already holds a run \(last\.pt\); continue it with --resume"):
        train(config, resume=False)
    assert (config.run_dir / "last.pt").read_bytes() == before
    assert [row["step"] for row in rows(config, "train")] == [1]


# ------------------------------------------------------------ interrupting


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_update_is_finished_and_saved(example_root, tmp_path, how):
    """In this process, during the second of four updates, where an evaluation is due, which has to wait."""
    config = experiment(example_root, tmp_path, "val_interval=2")
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    passes = []

    def interrupt(module: torch.nn.Module, arguments: tuple) -> None:
        if isinstance(module, MultiTaskModel) and module.training:
            passes.append(1)
            if len(passes) == 2:
                os.kill(os.getpid(), how)

    handle = torch.nn.modules.module.register_module_forward_pre_hook(interrupt)
    try:
        with pytest.raises(ToBeContinued):
            train(config, resume=False)
    finally:
        handle.remove()
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert stored(config.run_dir / "last.pt")["step"] == 2 and not rows(config, "eval")
    assert "continue with --resume" in (config.run_dir / "log.txt").read_text()
    train(config, resume=True)
    whole = experiment(example_root, tmp_path / "whole", "val_interval=4")
    train(whole, resume=False)
    a, b = stored(config.run_dir / "last.pt"), stored(whole.run_dir / "last.pt")
    assert all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"])


# ------------------------------------------------------------ not starting


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("folder, suffix", [("images", "png"), ("segmentation", "png"), ("depth", "npy")])
def test_a_missing_file_is_named_before_anything_is_read_or_written(example_root, tmp_path, split, folder, suffix):
    shutil.copytree(example_root / "NYUDv2", tmp_path / "data" / "NYUDv2")
    gone = f"{folder}/{names(example_root, split)[-1]}.{suffix}"
    (tmp_path / "data" / "NYUDv2" / gone).unlink()
    config = experiment(tmp_path / "data", tmp_path / "out")
    with watch(example_root) as seen, pytest.raises(FileNotFoundError, match=re.escape(gone)):
        train(config, resume=False)
    assert not seen.passes and not seen.evaluated and not config.run_dir.exists()


def test_files_of_other_tasks_are_not_needed(example_root, tmp_path):
    shutil.copytree(example_root / "NYUDv2", tmp_path / "data" / "NYUDv2")
    for folder in ("normals", "edge"):
        shutil.rmtree(tmp_path / "data" / "NYUDv2" / folder)
    assert train(experiment(tmp_path / "data", tmp_path / "out", "max_iter=1"), resume=False)["depth"]["rmse"] > 0


@pytest.mark.parametrize("overrides, message", [
    (["global_batch=5"], "global_batch 5 is not a multiple of trBatch 2"),
    (["trBatch=13"], "12 training images do not fill one update of 13"),
    (["global_batch=14"], "12 training images do not fill one update of 14"),
])
def test_batches_and_frames_that_do_not_fit(example_root, tmp_path: Path, overrides, message):
    config = experiment(example_root, tmp_path, *overrides, "max_iter=1")
    with pytest.raises(ValueError, match=message):
        train(config, resume=False)
    assert not list(config.run_dir.glob("*.pt"))
