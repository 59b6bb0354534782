"""Every combination of keys that cannot be trained is refused, by name and with the value, before anything is built."""

from pathlib import Path

import pytest
import yaml

from utils.engine.config import load_config
from utils.options import ConfigError

SOUND = {"model": "taskprompter", "backbone": "swin_tiny", "train_db_name": "NYUD", "val_db_name": "NYUD",
         "db_root": "data", "image_size": [64, 96], "task_dictionary": {"include_semseg": True, "include_depth": True}}


def refusal(tmp_path: Path, *overrides: str, **changes: object) -> str:
    """What the loader says about these changes, on one line and with the file's name."""
    path = tmp_path / "exp.yml"
    path.write_text(yaml.safe_dump({**SOUND, **changes}), encoding="ascii")
    with pytest.raises(ConfigError) as stop:
        load_config(path, overrides)
    message = str(stop.value)
    assert "\n" not in message and ("exp.yml" in message or "command line" in message)
    return message


@pytest.mark.parametrize("key, value", [
    *((key, value) for key in ("trBatch", "valBatch", "max_iter", "epochs", "val_interval", "log_interval")
      for value in (0, -1)),
    ("nworkers", -1), ("global_batch", -2), ("checkpoint_interval", -1), ("seed", -1),
    ("optimizer_kwargs.lr", 0.0), ("optimizer_kwargs.lr", -0.1), ("ema_decay", 1.0), ("ema_decay", -0.5),
    ("boundary_kwargs.workers", -1), ("boundary_kwargs.max_dist", 0.0), ("boundary_kwargs.max_dist", 1.0),
    ("scheduler_kwargs.warmup_iters", 40000), ("scheduler_kwargs.warmup_iters", 50000),
    ("augmentation.scale_range", [0.0, 1.0]), ("augmentation.scale_range", [2.0, 1.0]),
    ("model_kwargs.dd_label_map_size", [32, 48]), ("model_kwargs.dd_label_map_size", 64),
    ("model_kwargs.dd_label_map_size", [64]),
])
def test_a_number_out_of_range_is_named_with_its_value(tmp_path, key, value):
    message = refusal(tmp_path, f"{key}={value}")
    assert key.split(".")[0] in message and str(value) in message


@pytest.mark.parametrize("key, value", [
    ("trBatch", 1), ("log_interval", 1), ("nworkers", 0), ("global_batch", 0), ("checkpoint_interval", 0), ("seed", 0),
    ("optimizer_kwargs.lr", 1e-9), ("ema_decay", 0.0), ("ema_decay", 0.9999), ("boundary_kwargs.workers", 0),
    ("boundary_kwargs.max_dist", 0.5), ("scheduler_kwargs.warmup_iters", 39999),
    ("augmentation.scale_range", [1.0, 1.0]), ("model_kwargs.dd_label_map_size", [64, 96]),
])
def test_the_limits_themselves_are_allowed(tmp_path, key, value):
    path = tmp_path / "exp.yml"
    path.write_text(yaml.safe_dump(SOUND), encoding="ascii")
    found = load_config(path, [f"{key}={value}"])
    for part in key.split("."):
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    assert (list(found) if isinstance(value, list) else found) == value


@pytest.mark.parametrize("changes, words", [
    ({"val_db_name": "PASCAL"}, ["val_db_name", "'PASCAL'", "PASCALContext"]),
    ({"val_db_name": "Cityscapes", "task_dictionary": {"include_normals": True}}, ["Cityscapes", "normals"]),
    ({"val_db_name": "PASCALContext"}, ["semseg of PASCALContext", "NYUD", "21 outputs against 40"]),
    ({"train_db_name": "PASCALContext", "val_db_name": "NYUD"}, ["PASCALContext", "no labels", "depth"]),
    ({"task_dictionary": {"edge_w": 0.5}}, ["no task is on", "include_"]),
    ({"task_dictionary": {"include_edge": True, "edge_w": True}}, ["edge_w' must be a number, got True"]),
    ({"loss_kwargs": {"loss_weights": {"semseg": 1.0}}}, ["loss_kwargs.loss_weights", "depth"]),
    ({"loss_kwargs": {"loss_weights": {"semseg": 1, "depth": 1, "colour": 1}}}, ["loss_kwargs.loss_weights", "colour"]),
    ({"single_task_scores": {"semsegg": 0.4}}, ["single_task_scores", "semsegg", "semseg"]),
    ({"single_task_scores": {"depht/rmse": 0.4}}, ["single_task_scores", "depht", "'depth'"]),
    ({"loss_kwargs": {"loss_scheme": "sum"}}, ["loss_kwargs.loss_scheme", "weighted_sum", "log", "'sum'"]),
    ({"loss_kwargs": {"loss_scope": "batch"}}, ["loss_kwargs.loss_scope", "process", "image", "'batch'"]),
    ({"label_size": [64, 64]}, ["label_size", "[64, 64]", "have no size of their own"]),
    ({"train_db_name": "Cityscapes", "val_db_name": "Cityscapes", "label_size": [0, 64]}, ["label_size", "at least 1"]),
    ({"scheduler": "staircase"}, ["scheduler", "poly", "'staircase'"]),
    ({"precision": "fp8"}, ["precision", "bf16", "fp16", "'fp8'"]),
])
def test_names_that_do_not_go_together_are_told_with_what_would(tmp_path, changes, words):
    message = refusal(tmp_path, **changes)
    assert all(word in message for word in words), message


def test_a_weight_may_be_given_for_a_task_that_is_off(tmp_path):
    """One list of weights then serves the experiments of a whole family."""
    path = tmp_path / "exp.yml"
    weights = {"semseg": 1, "depth": 2, "edge": 50, "sal": 5}
    path.write_text(yaml.safe_dump({**SOUND, "loss_kwargs": {"loss_weights": weights}}), encoding="ascii")
    assert load_config(path).loss_kwargs.loss_weights == weights


def test_later_layers_win_key_by_key(tmp_path, monkeypatch):
    """Two _base_ files, the file, arguments; a group is merged, not replaced; `a=b=c` is cut at the first sign."""
    def write(name: str, **values: object) -> Path:
        (tmp_path / name).write_text(yaml.safe_dump(values), encoding="ascii")
        return tmp_path / name

    monkeypatch.setenv("DB_ROOT", "from_environment")
    write("one.yml", **SOUND, max_iter=1, val_interval=1, log_interval=1, seed=1, out_dir="one",
          optimizer_kwargs={"lr": 1, "eps": 1, "betas": [0.1, 0.2]})
    write("two.yml", max_iter=2, val_interval=2, log_interval=2, optimizer_kwargs={"lr": 2, "eps": 2})
    path = write("exp.yml", _base_=["one.yml", "two.yml"], max_iter=3, val_interval=3, optimizer_kwargs={"lr": 3})
    config = load_config(path, ["max_iter=4", "max_iter=5", "optimizer_kwargs.weight_decay=0.5", "out_dir=a=b"])
    assert (config.max_iter, config.val_interval, config.log_interval, config.seed) == (5, 3, 2, 1)
    options = config.optimizer_kwargs
    assert (options.lr, options.eps, options.betas, options.weight_decay) == (3.0, 2.0, (0.1, 0.2), 0.5)
    assert config.out_dir == "a=b" and config.run_dir == Path("a=b") / "exp"
    assert config.db_root == "from_environment"                    # over the file's, under the argument's
    assert load_config(path, ["db_root=argument"]).db_root == "argument"
    monkeypatch.setenv("DB_ROOT", "")                              # set but empty: as if it were not set
    assert load_config(path).db_root == "data"


def test_options_at_the_top_level_join_the_groups_ones(tmp_path):
    """Files of InvPT and its successors write decoder options at the top; the group wins where both are there."""
    path = tmp_path / "exp.yml"
    changes = {"model": "MLoRE", "backbone": "vit_small", "final_embed_dim": 192, "topk": 2,
               "model_kwargs": {"topk": 3}}
    path.write_text(yaml.safe_dump({**SOUND, **changes}), encoding="ascii")
    assert load_config(path).model_kwargs == {"final_embed_dim": 192, "topk": 3}
    assert load_config(path, ["spe_rank=16"]).model_kwargs["spe_rank"] == 16
