"""Every key of an experiment has a rule for a run that goes on with another value, and the rules hold."""

import dataclasses

import pytest

from tests.shared import ROOT
from tests.watched_run import experiment, rows, stored
from utils.engine.config import Config
from utils.engine.resume import RULES, changed_keys, rule_of, table_of_rules
from utils.engine.train import train


def test_every_key_has_a_rule_and_every_rule_a_key():
    keys = {field.name for field in dataclasses.fields(Config)}
    assert [key for key in keys if rule_of(key).kind not in ("applied", "harmless", "refused")] == []
    assert {key.partition(".")[0] for key in RULES} == keys
    assert rule_of("optimizer_kwargs.betas").kind == "applied" and rule_of("loss_kwargs.loss_scheme").kind == "refused"


def test_the_table_in_the_documents_is_that_of_the_code():
    text = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    shown = text.partition("<!-- rules -->\n")[2].partition("\n<!-- /rules -->")[0]
    assert shown == table_of_rules(), f"put this between the two marks:\n{table_of_rules()}"


def test_changes_are_named_down_to_the_innermost_key():
    assert changed_keys({"a": {"b": 1, "c": [2]}, "d": 3}, {"a": {"b": 1, "c": [1]}, "e": 4}) == {
        "a.c": ([1], [2]), "d": (None, 3), "e": (4, None)}


@pytest.mark.parametrize("now, message", [
    ("seed=1", r"seed: 0 -> 1 \(the order of the images depends on it\)"),
    ("optimizer=sgd", r"optimizer: 'adamw' -> 'sgd' \(the state in the file"),
    ("trBatch=3", r"the checkpoint's global batch 2 is not a multiple of trBatch 3"),
    ("global_batch=4", "trained with 2 images per update, global_batch asks for 4"),
])
def test_refused(example_root, tmp_path, now, message):
    config = experiment(example_root, tmp_path, "max_iter=1")
    train(config, resume=False)
    before = (config.run_dir / "last.pt").read_bytes()
    with pytest.raises(ValueError, match=message):
        train(experiment(example_root, tmp_path, "max_iter=2", now), resume=True)
    assert (config.run_dir / "last.pt").read_bytes() == before


def test_options_of_the_optimizer_are_those_of_the_experiment(example_root, tmp_path):
    train(experiment(example_root, tmp_path, "max_iter=1"), resume=False)
    config = experiment(example_root, tmp_path, "max_iter=2", "optimizer_kwargs.betas=[0.5, 0.6]",
                        "optimizer_kwargs.weight_decay=0.25", "optimizer_kwargs.lr=1e-3")
    train(config, resume=True)
    [group] = stored(config.run_dir / "last.pt")["optimizer"]["param_groups"]
    assert group["betas"] == (0.5, 0.6) and group["weight_decay"] == 0.25
    assert rows(config, "train")[-1]["lr"] == pytest.approx(1e-3 * 0.5**0.9)
    assert "optimizer_kwargs.weight_decay: 1e-05 -> 0.25 (applied)" in (config.run_dir / "log.txt").read_text()


def test_smaller_batches_keep_the_images_of_an_update(example_root, tmp_path):
    """Half the images per pass: twice the passes."""
    config = experiment(example_root, tmp_path, "max_iter=1")
    train(config, resume=False)
    train(experiment(example_root, tmp_path, "max_iter=2", "trBatch=1"), resume=True)
    assert "2 updates of 2 images (trBatch 1 x 1 process(es) x 2 accumulation)" in (
        config.run_dir / "log.txt").read_text()


def test_a_file_that_lacks_something_is_refused_by_name(example_root, tmp_path):
    import torch
    config = experiment(example_root, tmp_path, "max_iter=1")
    train(config, resume=False)
    last = stored(config.run_dir / "last.pt")
    for path in config.run_dir.glob("*"):
        path.unlink() if path.is_file() else None
    torch.save({key: last[key] for key in last if key not in ("optimizer", "rng")}, config.run_dir / "last.pt")
    with pytest.raises(ValueError, match=r"last\.pt holds no optimizer, rng: a run cannot go on from it"):
        train(config, resume=True)


def test_fp32_goes_on_as_fp16_with_a_fresh_scale(example_root, tmp_path):
    train(experiment(example_root, tmp_path, "max_iter=1"), resume=False)
    config = experiment(example_root, tmp_path, "max_iter=2", "precision=fp16")
    train(config, resume=True)
    assert stored(config.run_dir / "last.pt")["scaler"]["scale"] > 0
