"""The experiment files: layers, types, mistakes, every shipped file."""

import dataclasses
from pathlib import Path

import pytest
import yaml

from models.build import build_model
from tests.shared import ROOT
from utils.engine.build import task_contexts
from utils.engine.config import config_from_dict, load_config, save_config
from utils.options import ConfigError

SHIPPED = sorted(p for p in (ROOT / "configs").rglob("*.yml")
                 if not {"_base_", "suites"} & {*p.parts} and p.stem != "bim_small")

MINIMAL = {"model": "bim", "backbone": "swin_tiny", "train_db_name": "NYUD", "val_db_name": "NYUD",
           "task_dictionary": {"include_depth": True, "include_semseg": True}}


def write(path: Path, values: dict) -> Path:
    path.write_text(yaml.safe_dump(values), encoding="ascii")
    return path


def test_layers_win_in_order(tmp_path, monkeypatch):
    monkeypatch.delenv("DB_ROOT", raising=False)
    base = {**MINIMAL, "max_iter": 10, "val_interval": 5, "optimizer_kwargs": {"lr": 1, "eps": 1e-3}}
    write(tmp_path / "base.yml", base)
    path = write(tmp_path / "exp.yml", {"_base_": "base.yml", "max_iter": 20, "optimizer_kwargs": {"lr": "2e-4"}})
    config = load_config(path, ["max_iter=30", "optimizer_kwargs.weight_decay=0"])
    assert (config.max_iter, config.val_interval, config.version_name) == (30, 5, "exp")
    assert config.optimizer_kwargs == dataclasses.replace(config.optimizer_kwargs, lr=2e-4, eps=1e-3, weight_decay=0.0)


def test_data_root_order(tmp_path, monkeypatch):
    monkeypatch.delenv("DB_ROOT", raising=False)
    path = write(tmp_path / "exp.yml", MINIMAL)
    assert load_config(path).db_root == str(ROOT / "datasets")              # configs/mypath.py
    write(path, {**MINIMAL, "db_root": "from_file"})
    assert load_config(path).db_root == "from_file"
    monkeypatch.setenv("DB_ROOT", "from_env")
    assert load_config(path).db_root == "from_env"
    assert load_config(path, ["db_root=from_argument"]).db_root == "from_argument"


def test_task_order_is_the_tables(tmp_path):
    config = load_config(write(tmp_path / "exp.yml", MINIMAL))
    assert config.tasks == ("semseg", "depth")
    assert config.input_size == (448, 576)
    assert task_contexts(config)["semseg"].num_channels == 40


def test_resolved_configuration_reads_back(tmp_path):
    config = load_config(ROOT / "configs" / "bim_nyud.yml", ["trBatch=3", "global_batch=0", "image_size=[64,96]"])
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert config_from_dict(config.to_dict(), "checkpoint") == config


@pytest.mark.parametrize(("change", "message"), [
    ({"max_itr": 5}, r"exp\.yml: unknown key 'max_itr'; did you mean 'max_iter'\?"),
    ({"optimizer_kwargs": {"lrr": 1}},
     r"exp\.yml: unknown key 'optimizer_kwargs\.lrr' of optimizer 'adamw'; did you mean 'lr'\?"),
    ({"max_iter": "many"}, r"'max_iter' must be a whole number, got 'many'"),
    ({"trBatch": 2.5}, r"'trBatch' must be a whole number, got 2\.5"),
    ({"trBatch": 0}, r"'trBatch' must be at least 1, got 0"),
    ({"tensorboard": 1}, r"'tensorboard' must be true or false, got 1"),
    ({"optimizer": "adamww"},
     r"'optimizer': unknown optimizer 'adamww'; did you mean 'adamw'\? known: adam, adamw, sgd"),
    ({"task_dictionary": {"include_detph": True}}, r"'task_dictionary\.include_detph'; did you mean 'include_depth'"),
    ({"task_dictionary": {"include_sal": True}}, r"NYUD has no labels for sal; its tasks: semseg, depth, normals"),
    ({"task_dictionary": {}}, r"no task is on"),
    ({"train_db_name": "NUYD"}, r"'train_db_name': unknown data set 'NUYD'; did you mean 'NYUD'\?"),
    ({"image_size": [448]}, r"'image_size' must be a list of 2 values or empty, got \[448\]"),
    ({"loss_kwargs": {"loss_weights": {"semseg": 1}}}, r"loss_weights lacks depth"),
    ({"loss_kwargs": {"loss_weights": {"semseg": 1, "dept": 1}}}, r"unknown task\(s\) dept"),
    ({"scheduler_kwargs": {"warmup_iters": 10}, "max_iter": 10},
     r"'scheduler_kwargs\.warmup_iters' must be below max_iter \(10\), got 10"),
    ({"backbone": None}, r"the key 'backbone' is required"),
])
def test_a_mistake_is_named(tmp_path, change, message):
    path = write(tmp_path / "exp.yml", {**MINIMAL, **change})
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_a_mistake_names_the_layer_it_came_from(tmp_path):
    write(tmp_path / "base.yml", {**MINIMAL, "trBatch": "two"})
    path = write(tmp_path / "exp.yml", {"_base_": "base.yml"})
    with pytest.raises(ConfigError, match=r"base\.yml: 'trBatch'"):
        load_config(path)
    with pytest.raises(ConfigError, match="the command line: 'valBatch'"):
        load_config(path, ["trBatch=1", "valBatch=x"])
    with pytest.raises(ConfigError, match="not of the form key=value"):
        load_config(path, ["trBatch"])


@pytest.mark.parametrize(("override", "valid"), [
    ("model_kwargs.drop_path_rate=-0.5", "a rate in [0, 1)"), ("model_kwargs.drop_path_rate=1", "a rate in [0, 1)"),
    ("model_kwargs.d_state=0", "a whole number of at least 1"),
    ("optimizer_kwargs.betas=[-0.1, 0.9]", "two numbers in"), ("optimizer_kwargs.betas=[0.9, 1]", "two numbers in"),
    ("optimizer_kwargs.eps=0", "positive"),
    ("optimizer_kwargs.weight_decay=-1", "at least 0"), ("scheduler_kwargs.power=-1", "at least 0"),
    ("scheduler_kwargs.min_lr=-1", "at least 0"),
    ("optimizer_kwargs.eps=.nan", "a number"), ("augmentation.flip_prob=1.5", "a probability"),
    ("task_dictionary.edge_w=1.5", "a weight in [0, 1]")])
def test_an_option_out_of_range_is_refused_with_what_is_valid(override, valid):
    key, _, value = override.partition("=")
    with pytest.raises(ConfigError) as refusal:
        load_config(ROOT / "configs" / "bim_nyud.yml", [override])
    assert f"the command line: '{key}' must be {valid}" in str(refusal.value)


@pytest.mark.parametrize(("override", "valid"), [
    ("lr=0", "positive and finite"), ("lr=.inf", "positive and finite"), ("weight_decay=-1", "at least 0"),
    ("momentum=-0.5", "a number in [0, 1)"), ("momentum=1", "a number in [0, 1)"), ("nesterov=true", "false where")])
def test_options_of_plain_gradient_descent(override, valid):
    base = ["optimizer=sgd", "optimizer_kwargs={momentum: 0}", f"optimizer_kwargs.{override}"]
    with pytest.raises(ConfigError) as refusal:
        load_config(ROOT / "configs" / "bim_nyud.yml", base)
    key, _, _ = override.partition("=")
    assert f"'optimizer_kwargs.{key}' must be {valid}" in str(refusal.value)
    assert load_config(ROOT / "configs" / "bim_nyud.yml", base[:2]).optimizer_kwargs.momentum == 0


@pytest.mark.parametrize("bases", [3, None, {"a": 1}, [1], True, [None]])
def test_base_files_are_given_by_name(tmp_path, bases):
    path = write(tmp_path / "exp.yml", {"_base_": bases})
    with pytest.raises(ConfigError, match=r"exp\.yml: '_base_' must be the name of a file or a list of such names"):
        load_config(path)


@pytest.mark.parametrize("name", [["bim"], {"bim": 1}, 3, None, True])
def test_an_entry_of_a_table_is_given_by_name(tmp_path, name):
    path = write(tmp_path / "exp.yml", {**MINIMAL, "optimizer": name})
    with pytest.raises(ConfigError, match=r"'optimizer': optimizer is given by its name, not by .*; known: adam"):
        load_config(path)


def test_broken_files(tmp_path):
    (tmp_path / "a.yml").write_text("key: [1,", encoding="ascii")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(tmp_path / "a.yml")
    write(tmp_path / "loop.yml", {"_base_": "loop.yml"})
    with pytest.raises(ConfigError, match="include it again"):
        load_config(tmp_path / "loop.yml")
    with pytest.raises(FileNotFoundError, match=r"did you mean loop\.yml"):
        load_config(tmp_path / "lop.yml")


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_every_shipped_file_builds(path):
    """Parses, and its decoder builds on a tiny backbone of the same kind."""
    config = load_config(path)
    tiny = {"swin": {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "window_size": 4},
            "vit": {"embed_dim": 16, "depth": 4, "num_heads": 2},
            "internimage": {"embed_dim": 8, "depths": (1, 1, 1, 1), "groups": (1, 1, 2, 2)}}
    kind = next((kind for kind in tiny if config.backbone.startswith(kind)), "swin")
    neck_kwargs = {"embed_dim": 8} if config.neck == "pyramid" else {}
    scans = {"d_state": 2}
    narrow = {"demt": {"dim": 8}, "fcn": {}, "multi_scale": {"channels": 8},
              "bim": scans, "mtmamba": scans, "mtmamba_plus": scans,
              "invpt": {"embed_dim": 8, "PRED_OUT_NUM_CONSTANT": 8},
              **dict.fromkeys(("mlore", "taskdiffusion"), {"final_embed_dim": 8, "rank_list": (1, 2), "topk": 1}),
              "taskprompter": {"embed_dim": 8, "level_embed_dim": 8, "final_embed_dim": 8, "img_ds_ratio": 1},
              "bridgenet": {"embed_dim": 8, "PRED_OUT_NUM_CONSTANT": 8, "refine_depth": (1, 1, 1)}}
    outputs = {task: config.dataset.tasks[task] for task in config.tasks}
    model = build_model(config.model, kind, outputs, (64, 128), neck=config.neck,
                        backbone_kwargs=tiny[kind], neck_kwargs=neck_kwargs,
                        model_kwargs={**config.model_kwargs, **narrow[config.model.lower()]})
    assert list(model.heads) == list(config.tasks)
