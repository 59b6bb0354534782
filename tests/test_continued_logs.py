"""metrics.jsonl and TensorBoard of a run that was interrupted: every step once, as if it had not been."""

import json
import math

import pytest

from tests.watched_run import experiment, rows, script_scores, stored
from utils.engine.train import train
from utils.logging import RunWriter


def written(folder) -> list[tuple[str, int]]:
    return [(row["kind"], row["step"]) for row in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())]


def on_board(folder, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(folder / "tb"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


@pytest.mark.parametrize("evaluated, kept", [(True, ["train", "eval"]), (False, ["train"])])
def test_later_steps_are_dropped_and_told_again_once(tmp_path, evaluated, kept):
    first = RunWriter(tmp_path, tensorboard=True)
    for step in (1, 2, 3):
        first.scalars("train", step, {"loss": float(step)})
        first.scalars("eval", step, {"mIoU": 10.0 * step})
    first.close()
    with open(tmp_path / "metrics.jsonl", "a", encoding="ascii") as file:
        file.write('{"kind": "train", "st')                 # the process died here
    second = RunWriter(tmp_path, True, step=2, evaluated=evaluated)
    assert written(tmp_path) == [("train", 1), ("eval", 1), *[(kind, 2) for kind in kept]]
    if not evaluated:
        second.scalars("eval", 2, {"mIoU": 20.0})
    second.scalars("train", 3, {"loss": 3.5})
    second.close()
    assert [step for _, step in written(tmp_path)] == [1, 1, 2, 2, 3]
    assert on_board(tmp_path, "train/loss") == [(1, 1.0), (2, 2.0), (3, 3.5)]
    assert on_board(tmp_path, "eval/mIoU") == [(1, 10.0), (2, 20.0)]


def test_a_broken_line_between_others_is_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\nnonsense\n[]\n{"kind": "train", "step": 2}\n')
    RunWriter(tmp_path, False, step=2).close()
    assert written(tmp_path) == [("train", 1), ("train", 2)]


def test_means_over_an_interruption_are_those_of_an_uninterrupted_run(example_root, tmp_path):
    """Interrupted between two log lines: the next one is still the mean over all of its updates."""
    common = ["log_interval=4", "max_iter=4", "val_interval=4"]
    whole = experiment(example_root, tmp_path / "whole", *common, "checkpoint_interval=2")
    half = experiment(example_root, tmp_path / "half", *common)
    train(whole, resume=False)
    half.run_dir.mkdir(parents=True)
    (half.run_dir / "last.pt").write_bytes((whole.run_dir / "step_2.pt").read_bytes())
    train(half, resume=True)
    [a], [b] = rows(whole, "train"), rows(half, "train")
    assert {k: v for k, v in a.items() if k != "images_per_s"} == {k: v for k, v in b.items() if k != "images_per_s"}


def test_a_score_that_is_not_a_number_leaves_the_best_alone(example_root, tmp_path, monkeypatch):
    """Also over an interruption, and an evaluation that is due is made up for."""
    only = "task_dictionary={include_semseg: true}"
    script_scores(monkeypatch, [0.5, math.nan, 0.4, 0.6])
    config = experiment(example_root, tmp_path, only, "val_interval=1", "max_iter=2")
    train(config, resume=False)
    assert stored(config.run_dir / "best.pt")["step"] == 1 and stored(config.run_dir / "last.pt")["best"] < 0
    train(experiment(example_root, tmp_path, only, "val_interval=1", "max_iter=3"), resume=True)
    assert stored(config.run_dir / "best.pt")["step"] == 1
    train(experiment(example_root, tmp_path, only, "val_interval=1", "max_iter=4"), resume=True)
    assert stored(config.run_dir / "best.pt")["step"] == 4


def test_a_best_that_is_gone_is_chosen_anew(example_root, tmp_path, monkeypatch):
    only = "task_dictionary={include_semseg: true}"
    script_scores(monkeypatch, [0.5, 0.4])
    config = experiment(example_root, tmp_path, only, "val_interval=1", "max_iter=1")
    train(config, resume=False)
    (config.run_dir / "best.pt").unlink()
    train(experiment(example_root, tmp_path, only, "val_interval=1", "max_iter=2"), resume=True)
    assert stored(config.run_dir / "best.pt")["step"] == 2 and "is gone" in (config.run_dir / "log.txt").read_text()


def test_best_alone_is_enough_to_go_on(example_root, tmp_path):
    """A folder in which last.pt is missing is continued, not begun anew; without --resume it is left alone."""
    config = experiment(example_root, tmp_path, "max_iter=1")
    train(config, resume=False)
    (config.run_dir / "last.pt").unlink()
    with pytest.raises(ValueError, match="already holds a run"):
        train(config, resume=False)
    train(experiment(example_root, tmp_path, "max_iter=2"), resume=True)
    assert [row["step"] for row in rows(config, "train")] == [1, 2]
