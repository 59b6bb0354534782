"""The files of a run: which checkpoints there are and when, what they hold, and what can be read from them."""

import dataclasses
import json
import subprocess

import pytest
import torch

from tests.shared import ROOT
from tests.watched_run import experiment, rows, stored
from utils.engine.config import config_from_dict, load_config
from utils.engine.predict import infer
from utils.engine.train import train


def test_checkpoints_appear_when_they_are_due(example_root, tmp_path):
    """Every `checkpoint_interval` one that stays, last.pt and the one before it; nothing half-written is left."""
    config = experiment(example_root, tmp_path, "max_iter=5", "val_interval=3", "checkpoint_interval=2",
                        "ema_decay=0.5", "global_batch=4")
    results = train(config, resume=False)
    assert {path.name for path in config.run_dir.iterdir()} == {
        "config.yaml", "log.txt", "metrics.jsonl", "results", "checkpoints.json", "run.lock", "best.pt", "last.pt",
        "previous.pt", "step_2.pt", "step_4.pt"}
    assert sorted(path.name for path in (config.run_dir / "results").iterdir()) == ["step_3.json", "step_5.json"]
    steps = {name: stored(config.run_dir / name) for name in ("step_2.pt", "step_4.pt", "last.pt")}
    assert [(state["step"], state["epoch"]) for state in steps.values()] == [(2, 0), (4, 1), (5, 1)]   # 3 an epoch
    assert steps["step_2.pt"]["metrics"] is None and steps["last.pt"]["metrics"] == results
    assert steps["step_4.pt"]["metrics"] == json.loads(
        (config.run_dir / "results" / "step_3.json").read_text())["scores"]
    assert [row["step"] for row in rows(config, "eval")] == [3, 5]


def test_last_follows_every_saved_step(example_root, tmp_path, monkeypatch):
    """A run that breaks down after a `checkpoint_interval` goes on from there."""
    config = experiment(example_root, tmp_path, "val_interval=4", "checkpoint_interval=3")
    from torch.optim import AdamW
    updates, original = [], AdamW.step

    def failing(self, *arguments, **options):
        updates.append(1)
        if len(updates) == 4:
            raise OSError("the power went out")
        return original(self, *arguments, **options)

    monkeypatch.setattr(AdamW, "step", failing)
    with pytest.raises(OSError, match="the power went out"):
        train(config, resume=False)
    assert stored(config.run_dir / "last.pt")["step"] == 3
    train(config, resume=True)
    assert stored(config.run_dir / "last.pt")["step"] == 4


def test_a_checkpoint_tells_what_it_is(example_root, tmp_path):
    """Its configuration, as given; the commit of the code; the optimiser's state of every weight."""
    config = experiment(example_root, tmp_path, "max_iter=1", "optimizer_kwargs.betas=[0.8, 0.9]")
    train(config, resume=False)
    last = stored(config.run_dir / "last.pt")
    assert config_from_dict(last["config"], "last.pt") == config == load_config(config.run_dir / "config.yaml")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert last["git"] == (head.stdout.strip() or None)
    assert len(last["optimizer"]["state"]) == len(last["optimizer"]["param_groups"][0]["params"])
    assert last["optimizer"]["param_groups"][0]["betas"] == (0.8, 0.9)
    assert len(last["rng"]) == 1


def test_the_average_is_what_infer_scores(example_root, tmp_path):
    """Where a file has one; the bare weights give other scores; either may be all that a file holds."""
    config = experiment(example_root, tmp_path, "max_iter=3", "ema_decay=0.8", "optimizer_kwargs.lr=3e-2",
                        "val_interval=3", "boundary_infer=off")
    results = train(config, resume=False)
    last = stored(config.run_dir / "last.pt")
    average = {key.removeprefix("module."): value for key, value in last["ema"].items() if key != "n_averaged"}
    files = {"whole.pt": last, "weights.pt": {"model": last["model"]}, "average.pt": {"model": average},
             "bare.pt": average, "parallel.pt": {"state_dict": {f"module.{k}": v for k, v in average.items()}}}
    scores = {}
    for name, content in files.items():
        torch.save(content, tmp_path / name)
        scores[name] = infer(config, tmp_path / name, tmp_path / "out")
    weights = scores.pop("weights.pt")
    for name, found in scores.items():
        for task in results:
            assert found[task] == pytest.approx(results[task], rel=1e-6, nan_ok=True), name
    assert weights["depth"]["rmse"] != pytest.approx(results["depth"]["rmse"], rel=1e-3)
    with pytest.raises(ValueError, match=r"whole\.pt holds model fcn.* asks for"):
        infer(dataclasses.replace(config, backbone_kwargs={**config.backbone_kwargs, "embed_dim": 16}),
              tmp_path / "whole.pt", tmp_path / "out")


def test_not_a_number_is_null_in_the_logs(example_root, tmp_path):
    """A class that no image shows has no score; every line is JSON as others read it."""
    config = experiment(example_root, tmp_path, "max_iter=1", "task_dictionary={include_semseg: true}",
                        "precision=fp16", "loss_kwargs.loss_weights={semseg: 1e9}")
    with pytest.raises(FloatingPointError, match="not one of 1 updates was made"):
        train(config, resume=False)

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    lines = (config.run_dir / "metrics.jsonl").read_text().splitlines()
    [row, _] = [json.loads(line, parse_constant=refuse) for line in lines]
    assert row["grad_norm"] is None and row["loss/semseg"] > 0             # it overflowed in float16
    json.loads((config.run_dir / "results" / "step_1.json").read_text(), parse_constant=refuse)


def test_the_log_names_the_run_and_every_step(example_root, tmp_path):
    config = experiment(example_root, tmp_path, "max_iter=2", "global_batch=4")
    train(config, resume=False)
    log = (config.run_dir / "log.txt").read_text()
    assert "2 updates of 4 images (trBatch 2 x 1 process(es) x 2 accumulation) on cpu, fp32" in log
    assert "tasks semseg, depth" in log and "step 1/2  loss" in log and "step 2/2  loss" in log
    assert "evaluation at step 2" in log
    for row in rows(config, "train"):
        assert f"lr {row['lr']:.2e}  grad {row['grad_norm']:.3g}" in log
        assert row["images_per_s"] > 0
