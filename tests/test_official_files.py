"""Experiment files of the original programs: they run unchanged, and mean what they mean there."""

import copy
import dataclasses
import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml

import main
from models.decoders import DECODERS
from models.released import tasks_in
from tests.shared import ROOT, golden
from utils.engine.build import model_from_config
from utils.engine.checkpoint import convert_released
from utils.engine.config import Config, config_from_dict, load_config, save_config
from utils.engine.official_files import ORIGINALS, translate
from utils.meta import meta_device
from utils.options import ConfigError, parse

BUFFERS = ("running_mean", "running_var", "num_batches_tracked", "attn_mask", "relative_position_index")
MLORE_PASCAL_L = {"backbone": "MLoRE_vitL", "final_embed_dim": 452, "rank_list": list(range(16, 129, 8)),
                  "spe_rank": 72, "pre_softmax": False, "task_dictionary": {"edge_w": 0.925},
                  "loss_kwargs": {"loss_weights": {"load_balancing": 3e-4}}}
MLORE_PASCAL_B = {"backbone": "MLoRE_vitB", "final_embed_dim": 640, "rank_list": list(range(16, 129, 8)),
                  "spe_rank": 64, "pre_softmax": False}
PASCAL_TASKS = {"train_db_name": "PASCALContext", "val_db_name": "PASCALContext", "trBatch": 4, "max_iter": 40000,
                "REFINE_DEPTH": [12] * 3, "DILATED_RATIO": [[1, 2, 5] * 4] * 3, "SQUEEZE_RATIO": [[2] * 12] * 3,
                "task_dictionary": {"include_depth": None, "include_human_parts": True, "include_sal": True},
                "loss_kwargs": {"loss_weights": {"human_parts": 2.0, "sal": 5.0, "edge": 50.0, "depth": None}}}

# Official file -> ours for the same experiment, and the entry of its system's manifest.
IN_FOLDER = {
    "invpt__nyud_vitLp16": ("invpt_nyud", "nyud_vitLp16"),
    "invpt__pascal_vitLp16": ("invpt_pascal", "pascal_vitLp16"),
    "taskprompter__nyud_vitLp16_taskprompter": ("taskprompter_nyud", "nyud_vitLp16_taskprompter"),
    "taskprompter__pascal_vitLp16_taskprompter": ("taskprompter_pascal", "pascal_vitLp16_taskprompter"),
    "taskprompter__cs_swinB_taskprompter": ("taskprompter_cityscapes3d", "cs_swinB_taskprompter"),
    "mlore__nyud_vitLp16_MLoRE": ("mlore_nyud", "nyud_vitLp16_MLoRE"),
    "mlore__nyud_vitLp16_MLoRE_repara": ("mlore_nyud", "nyud_vitLp16_MLoRE"),
    "mlore__pascal_vitSp16_MLoRE": ("backbones/mlore_pascal_vit_small", "pascal_vitSp16_MLoRE"),
    "bridgenet__nyud_internimageB_bridgenet": ("backbones/bridgenet_nyud_internimage_b", "nyud_internimageB"),
    "bridgenet__nyud_internimageL_bridgenet": ("bridgenet_nyud", "nyud_internimageL"),
    "bridgenet__nyud_vitB_bridgenet": ("backbones/bridgenet_nyud_vit_base", "nyud_vitB"),
    "bridgenet__nyud_vitL_bridgenet": ("backbones/bridgenet_nyud_vit_large", "nyud_vitL"),
    "taskdiffusion__nyud_vitLp16": ("taskdiffusion_nyud", "nyud_vitLp16"),
    "taskdiffusion__nyud_vitLp16_MLoRE": ("taskdiffusion_mlore_nyud", "nyud_vitLp16_MLoRE"),
    **{f"mtmamba__{name}": (name, name) for name in (
        "mtmamba_nyud", "mtmamba_pascal", "mtmamba_cityscapes", "mtmamba_plus_nyud", "mtmamba_plus_pascal",
        "mtmamba_plus_cityscapes")},
}

# Files of those repositories that are not in the folder, as changes of one that is.
OTHERS = {
    "taskprompter__pascal_vitBp16_taskprompter": ("taskprompter__pascal_vitLp16_taskprompter", {
        "backbone": "TaskPrompter_vitB", "embed_dim": 780, "final_embed_dim": 1024, "chan_nheads": 16}),
    "mlore__pascal_vitLp16_MLoRE": ("mlore__pascal_vitSp16_MLoRE", MLORE_PASCAL_L),
    "mlore__pascal_vitLp16_MLoRE_repara": ("mlore__pascal_vitSp16_MLoRE", {
        **MLORE_PASCAL_L, "backbone": "MLoRE_vitL_repara"}),
    "mlore__pascal_vitBp16_MLoRE": ("mlore__pascal_vitSp16_MLoRE", MLORE_PASCAL_B),
    "mlore__pascal_vitBp16_MLoRE_repara": ("mlore__pascal_vitSp16_MLoRE", {
        **MLORE_PASCAL_B, "backbone": "MLoRE_vitB_repara"}),
    "bridgenet__pascal_vitB_bridgenet": ("bridgenet__nyud_vitB_bridgenet", PASCAL_TASKS),
    "bridgenet__pascal_vitL_bridgenet": ("bridgenet__nyud_vitL_bridgenet", {
        **PASCAL_TASKS, "optimizer_kwargs": {"weight_decay": 1e-6}}),
    "bridgenet__pascal_internimageB_bridgenet": ("bridgenet__nyud_internimageB_bridgenet", PASCAL_TASKS),
    "bridgenet__pascal_internimageL_bridgenet": ("bridgenet__nyud_internimageL_bridgenet", PASCAL_TASKS),
}
COUNTERPARTS = IN_FOLDER | {
    "taskprompter__pascal_vitBp16_taskprompter": ("backbones/taskprompter_pascal_vit_base",
                                                  "pascal_vitBp16_taskprompter"),
    "mlore__pascal_vitLp16_MLoRE": ("mlore_pascal", "pascal_vitLp16_MLoRE"),
    "mlore__pascal_vitLp16_MLoRE_repara": ("mlore_pascal", "pascal_vitLp16_MLoRE"),
    "mlore__pascal_vitBp16_MLoRE": ("backbones/mlore_pascal_vit_base", "pascal_vitBp16_MLoRE"),
    "mlore__pascal_vitBp16_MLoRE_repara": ("backbones/mlore_pascal_vit_base", "pascal_vitBp16_MLoRE"),
    "bridgenet__pascal_vitB_bridgenet": ("backbones/bridgenet_pascal_vit_base", "pascal_vitB"),
    "bridgenet__pascal_vitL_bridgenet": ("bridgenet_pascal", "pascal_vitL"),
    "bridgenet__pascal_internimageB_bridgenet": ("backbones/bridgenet_pascal_internimage_b", "pascal_internimageB"),
    "bridgenet__pascal_internimageL_bridgenet": ("backbones/bridgenet_pascal_internimage_l", "pascal_internimageL"),
}


def changed(values: dict, changes: dict) -> dict:
    """`values` with `changes`, groups merged; None removes a key."""
    out = {**values, **{k: changed(values.get(k, {}), v) if isinstance(v, dict) else v for k, v in changes.items()}}
    return {key: value for key, value in out.items() if value is not None}


def content(name: str) -> dict:
    """Keys and values of an official file."""
    if name in OTHERS:
        base, changes = OTHERS[name]
        return changed(content(base), changes)
    return json.loads((golden("official_configs") / f"{name}.json").read_text())["content"]


def written(tmp_path: Path, name: str, **changes) -> Path:
    """An official file on disk, under its own name."""
    path = tmp_path / f"{name.partition('__')[2]}.yml"
    path.write_text(yaml.safe_dump(changed(content(name), changes), sort_keys=False), encoding="ascii")
    return path


def official(tmp_path: Path, name: str, *overrides: str) -> Config:
    """An official file, loaded."""
    return load_config(written(tmp_path, name), overrides)


# ------------------------------------------------------------ they run


def test_every_file_of_the_folder_is_listed_here():
    found = {path.stem for path in golden("official_configs").glob("*.json")}
    assert found == IN_FOLDER.keys() and len(COUNTERPARTS) == 29


@cache
def manifest(system: str) -> dict:
    """Names -> entries. That of the 3-D model lacks the head of the detection, which another file has."""
    entries = json.loads((golden(system) / "manifest_full.json").read_text())
    if "cs_swinB_taskprompter" in entries:
        entry = entries["cs_swinB_taskprompter"]
        head = json.loads((golden("cityscapes3d") / "manifest_head.json").read_text())
        entry["state_dict"] |= {f"heads.3ddet.{key}": shape for key, shape in head["keys"].items()}
        entry["total_parameters"] += head["parameters"]
    return entries


def weights(state: dict) -> int:
    return sum(value.numel() for key, value in state.items() if not key.endswith(BUFFERS))


@pytest.mark.parametrize("name", COUNTERPARTS)
def test_an_official_file_builds_the_published_model(tmp_path, name):
    entry = manifest(name.partition("__")[0])[COUNTERPARTS[name][1]]
    config = official(tmp_path, name)
    with meta_device():
        model = model_from_config(config)
        original = {key: torch.empty(shape) for key, shape in (entry.get("keys") or entry["state_dict"]).items()}
    total = next(entry[key] for key in ("params_total", "total_params", "total_parameters") if key in entry)
    assert weights(original) == total
    assert list(model.heads) == [task for task in config.tasks if task in tasks_in(original)]
    ours, dead = convert_released(original)                 # without the layers that no output depends on
    assert {key: x.shape for key, x in ours.items()} == {key: x.shape for key, x in model.state_dict().items()}
    assert sum(parameter.numel() for parameter in model.parameters()) == weights(ours)
    no_class_token = name.startswith(("mlore", "taskdiffusion"))    # for which their position embedding has a row
    row = entry["config"]["embed_dim"] if no_class_token else 0
    assert weights(ours) + weights({key: original[key] for key in dead}) + row == total


def test_the_three_dimensional_task_reads_its_data_as_published(tmp_path):
    path = written(tmp_path, "taskprompter__cs_swinB_taskprompter")
    config = load_config(path)
    assert (config.tasks, config.input_size) == (("semseg", "depth", "det3d"), (1024, 2048))
    assert str(config.train_db_name) == "Cityscapes3DTaskPrompter" and config.det3d_kwargs.direction_offset == 0
    assert config.loss_kwargs.loss_weights == {"semseg": 100, "depth": 1, "det3d": 1}
    assert load_config(path, ["task_dictionary.include_3ddet=false"]).tasks == ("semseg", "depth")


def test_arguments_and_layers_go_before_an_official_file(tmp_path, caplog):
    path = written(tmp_path, "bridgenet__nyud_vitB_bridgenet")
    with caplog.at_level("INFO"):
        config = load_config(path)
    assert config.pretrained is True and config.seed == 42
    assert "a file of an original program; added what that does without being told: pretrained=true" in caplog.text
    (tmp_path / "mine.yml").write_text(f"_base_: {path.name}\nversion_name: mine\nREFINE_DEPTH: [18, 18, 18]\nseed: 3")
    config = load_config(tmp_path / "mine.yml", ["pretrained=false", "model_kwargs.embed_dim=64", "backbone=vitS"])
    assert (config.pretrained, config.seed, config.version_name, config.backbone) == (False, 3, "mine", "vit_small")
    assert translate(content("bridgenet__nyud_vitB_bridgenet") | {"model_kwargs": {"embed_dim": 64}}, "")[
        "model_kwargs"]["embed_dim"] == 64


# ------------------------------------------------------------ they mean the same as ours

# Keys in which ours differ. All say what an update holds (`global_batch`), which the originals leave to the number of
# processes; an official run is in the folder that its file names.
EVERYWHERE = {"global_batch", "version_name", "out_dir"}
DIFFERENCES = {
    # per process and of one image per process: the same loss, for any number of processes
    **{f"mtmamba__{name}": {"loss_kwargs.loss_scope"} for name in (
        "mtmamba_nyud", "mtmamba_pascal", "mtmamba_cityscapes", "mtmamba_plus_cityscapes")},
    # and more epochs than are reached in both
    **{f"mtmamba__mtmamba_plus_{name}": {"loss_kwargs.loss_scope", "epochs"} for name in ("nyud", "pascal")},
}


def flat(group: dict, prefix: str = "") -> dict:
    out = {}
    for key, value in group.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def resolved(config: Config) -> dict:
    """Dotted key -> value, with the decoder's defaults, and 1 for the weight of a loss without one."""
    values = config.to_dict()
    values["model_kwargs"] = dataclasses.asdict(parse(DECODERS.options(config.model), config.model_kwargs))
    values["model"] = config.model.lower()
    given = values["loss_kwargs"].pop("loss_weights") or {}
    return flat(values) | {f"weight of {task}": given.get(task, 1) for task in config.tasks}


@pytest.mark.parametrize("name", COUNTERPARTS)
def test_ours_for_the_same_experiment_differs_as_listed(tmp_path, name):
    theirs = resolved(official(tmp_path, name))
    ours = resolved(load_config(ROOT / "configs" / f"{COUNTERPARTS[name][0]}.yml"))
    different = {key for key in theirs | ours if theirs.get(key) != ours.get(key)}
    assert different - EVERYWHERE == DIFFERENCES.get(name, set())


# ------------------------------------------------------------ spellings

MINIMAL = {"model": "bim", "backbone": "swin_tiny", "train_db_name": "NYUD", "val_db_name": "NYUD",
           "task_dictionary": {"include_depth": True, "include_semseg": True}}
SHARED = {"model": "TransformerNet", "backbone": "vitL"}
STAGES = {"model": "BridgeNet", "REFINE_DEPTH": [3, 3]}


@pytest.mark.parametrize("given, key, want", [
    ({"backbone": "vitS"}, "backbone", "vit_small"), ({"backbone": "swinB"}, "backbone", "swin_base"),
    ({"backbone": "intern_l"}, "backbone", "internimage_l"), ({"backbone": "vit_base"}, "backbone", "vit_base"),
    ({"model": "MLoRE", "backbone": "MLoRE_vitL_repara"}, "model_kwargs", {"fold": True}),
    ({"model": "TaskPrompter", "backbone": "TaskPrompter_swinB"}, "backbone", "swin_base"),
    ({**SHARED, "mtt_resolution_downsample_rate": 2}, "model", "InvPT"),
    ({**SHARED, "PRED_OUT_NUM_CONSTANT": 64, "REFINE_DEPTH": [3, 3, 3]}, "model", "BridgeNet"),
    ({**SHARED, "backbone": "intern_b", "embed_dim": 512}, "model", "BridgeNet"),
    ({**SHARED, "use_ctr": True}, "model", "TaskPrompter"), ({**SHARED, "topk": 9}, "model", "MLoRE"),
    ({**SHARED, "model_kwargs": {"topk": 9}}, "model", "MLoRE"),
    ({**SHARED, "backbone": "TaskPrompter_vitL"}, "model", "TaskPrompter"),
    ({**STAGES, "DILATED_RATIO": [[1, 2, 1], [1, 2, 1]]}, "model_kwargs", {"refine_depth": [3, 3],
                                                                          "dilations": [1, 2]}),
    ({**STAGES, "SQUEEZE_RATIO": [[4] * 3] * 2}, "model_kwargs", {"refine_depth": [3, 3], "squeeze_ratio": 4}),
    ({"model": "TaskPrompter", "head": "deconv", "fea_ds_ratio": 1, "ignore_invalid_area_depth": True},
     "model_kwargs", {"head": "deconv"}),
    ({"model": "MLoRE", "head": "conv", "topk": 3, "with_feat": False}, "model_kwargs", {"topk": 3}),
    ({"loss_kwargs": {"loss_scheme": "none"}}, "loss_kwargs", {"loss_scheme": "weighted_sum"}),
    ({"optimizer": "adamW"}, "optimizer", "adamw"),
    ({"optimizer_kwargs": {"betas": {"a": 0.9, "b": 0.99}}}, "optimizer_kwargs", {"betas": [0.9, 0.99]}),
    ({"out_dir": "../runs//"}, "out_dir", "../runs"), ({"version_name": "x/y/"}, "version_name", "x/y"),
])
def test_a_foreign_spelling_becomes_ours(given, key, want):
    values = {**MINIMAL, **given}
    before = copy.deepcopy(values)
    translated = translate(values, "exp.yml")
    assert translated[key] == want and values == before
    assert translate(translated, "exp.yml") == translated
    assert "pretrained" not in translated                   # such a file is incomplete: none of an original program


@pytest.mark.parametrize("given, message", [
    (SHARED, "is InvPT, TaskPrompter, MLoRE or BridgeNet.*none of theirs is there; name the decoder"),
    ({**SHARED, "topk": 9, "use_ctr": True}, "those of MLoRE and TaskPrompter are there"),
    ({"backbone": "MLoRE_vitL"}, "backbone 'MLoRE_vitL' belongs to MLoRE, but the model is 'bim'; write .*vit_large"),
    ({**STAGES, "DILATED_RATIO": [[1, 2, 5], [1, 2]]}, r"'DILATED_RATIO' must hold one number per block, \[3, 3\]"),
    ({**STAGES, "DILATED_RATIO": [[1, 2, 5], [1, 2, 1]]}, "'DILATED_RATIO' must be one repeated pattern for all"),
    ({**STAGES, "SQUEEZE_RATIO": [[2, 4, 2]] * 2}, "'SQUEEZE_RATIO' must be one number for all stages"),
    ({**STAGES, "SQUEEZE_RATIO": 2}, "'SQUEEZE_RATIO' must hold one list of numbers per stage, got 2"),
    ({"head": "mlp"}, "head 'mlp' is not available for model 'bim'.*leave `head` out"),
    ({"model": "MLoRE", "head": "deconv"}, "head 'deconv' is not available for model 'MLoRE'"),
    ({"model": "MLoRE", "with_feat": True}, "'with_feat' must be false"),
    ({"model": "TaskPrompter", "ignore_invalid_area_depth": False}, "'ignore_invalid_area_depth' must be true"),
    ({"model": "InvPT", "embed_dimm": 3}, "unknown key 'embed_dimm'; did you mean 'embed_dim'"),
    ({"model": "BridgeNet", "REFINE_DEPHT": [3]}, "unknown key 'REFINE_DEPHT'; did you mean 'REFINE_DEPTH'"),
])
def test_what_cannot_be_expressed_is_refused(given, message):
    with pytest.raises(ConfigError, match=f"^exp.yml: .*{message}"):
        translate({**MINIMAL, **given}, "exp.yml")


@pytest.mark.parametrize("wrong", [
    {"loss_kwargs": 3}, {"task_dictionary": [1]}, {"optimizer": 5}, {"optimizer_kwargs": "x"}, {"model": None},
    {"model": "InvPT", "embed_dim": 3, "model_kwargs": 3}, {"out_dir": [3]}, {"max_itr": 3}])
def test_what_is_merely_wrong_is_left_to_the_parser(tmp_path, wrong):
    path = tmp_path / "exp.yml"
    path.write_text(yaml.safe_dump({**MINIMAL, **wrong}), encoding="ascii")
    with pytest.raises(ValueError, match=rf"exp\.yml: .*'{list(wrong)[-1]}'"):
        load_config(path)


def test_no_key_of_ours_is_taken_for_a_misspelt_foreign_one():
    for name in ORIGINALS:
        values = {**dict.fromkeys(field.name for field in dataclasses.fields(Config)), **MINIMAL, "model": name}
        translate(values, "exp.yml")


def test_a_head_that_the_program_does_not_read_means_nothing(tmp_path):
    assert load_config(written(tmp_path, "mtmamba__mtmamba_nyud", head="mlp")).model == "mtmamba"


def test_optimizers_start_from_torchs_defaults(tmp_path):
    path = written(tmp_path, "invpt__nyud_vitLp16", optimizer="sgd", optimizer_kwargs={"weight_decay": None})
    assert load_config(path).optimizer_kwargs.momentum == 0 == load_config(path).optimizer_kwargs.weight_decay


# ------------------------------------------------------------ ours


@pytest.mark.parametrize("name", ["bim_nyud", "bridgenet_pascal", "taskprompter_cityscapes3d", "mlore_nyud",
                                  "backbones/demt_nyud_hrnet18", "example/bim_nyud"])
def test_a_file_of_ours_passes_untouched(tmp_path, name):
    path = ROOT / "configs" / f"{name}.yml"
    config = load_config(path)
    save_config(config, tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    values = {key: value for key, value in config.to_dict().items() if key not in ("head", "optimizer_kwargs")}
    assert translate(values, "config.yaml") == values


def test_the_configuration_in_an_older_checkpoint_reads_as_it_was_meant():
    """As stored by versions that had `head`, short names of backbones, and one group of options for all optimizers."""
    stored = load_config(ROOT / "configs" / "taskprompter_cityscapes3d.yml").to_dict() | {
        "model": "TransformerNet", "backbone": "swinB", "head": "deconv", "backbone_kwargs": {}, "pretrained": False,
        "model_kwargs": {"prompt_len": 1, "chan_nheads": 1, "fea_ds_ratio": 1, "ignore_invalid_area_depth": True}}
    union = {"lr": 1e-3, "weight_decay": 0.0, "betas": [0.8, 0.9], "eps": 1e-8, "momentum": 0.9, "nesterov": False}
    for optimizer, dropped in (("adam", {"momentum", "nesterov"}), ("sgd", {"betas", "eps"})):
        values = translate(stored | {"optimizer": optimizer, "optimizer_kwargs": union}, "best.pt")
        assert union.keys() - values["optimizer_kwargs"].keys() == dropped
        config = config_from_dict(stored | {"optimizer": optimizer, "optimizer_kwargs": union}, "best.pt")
        assert (config.model, config.backbone, config.pretrained) == ("taskprompter", "swin_base", False)
        assert values["model_kwargs"] == {"prompt_len": 1, "chan_nheads": 1, "head": "deconv"}
        assert values["backbone_kwargs"] == {} and config.seed == stored["seed"]     # nothing is added to it


def test_the_adapter_costs_nothing_to_import():
    code = "import sys, utils.engine.official_files; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# ------------------------------------------------------------ command lines


@pytest.mark.parametrize("line", [
    "--config_exp F --run_mode train", "--config_exp F --run_mode infer --trained_model C",
    "--run_mode train --config_exp F --seed 5",
    "--config_exp F --run_mode train --dataset_log nyud", "--local_rank=0 --config_exp F --run_mode train",
    "--local-rank=1 --config_exp F --run_mode train", "--local_rank 1 --config_exp F --run_mode train seed=5"])
def test_the_command_lines_of_the_originals_are_accepted(monkeypatch, tmp_path, line):
    path = tmp_path / "exp.yml"
    path.write_text(yaml.safe_dump(MINIMAL), encoding="ascii")
    monkeypatch.setattr("sys.argv", ["main.py", *line.replace(" F", f" {path}").split()])
    arguments = main.parse_arguments(None, None)
    assert load_config(arguments.config_exp, arguments.overrides).seed == (5 if "seed" in line else 0)
