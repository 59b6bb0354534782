"""TaskPrompter: reference numbers, full-size keys, released checkpoints, training, what fits and what does not."""

import dataclasses
import json
import logging
import re
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from data.transforms import build_transform
from models.backbones import BACKBONES, BackboneEntry
from models.build import build_backbone, build_model
from models.decoders.taskprompter import TaskPrompterConfig
from scripts.check_parity import main as check_parity
from scripts.parity.compare import BUFFERS
from tests.shared import ROOT, assert_same_weights, golden
from tests.test_train import rows
from utils.engine.build import model_from_config, trained_model
from utils.engine.checkpoint import convert_released
from utils.engine.config import load_config
from utils.engine.cost import count
from utils.engine.pretrained import load_pretrained
from utils.engine.tasks import label_rules
from utils.engine.train import train
from utils.options import ConfigError, parse

CONFIGS = ROOT / "configs"
NYUD, PASCAL = (str(CONFIGS / f"taskprompter_{name}.yml") for name in ("nyud", "pascal"))
VIT = {"embed_dim": 16, "depth": 4, "num_heads": 2, "patch_size": 8}
SWIN = {"embed_dim": 8, "depths": (1, 2, 1, 2), "num_heads": (1, 1, 2, 2), "window_size": 3, "patch_size": 2}
WIDTHS = {"embed_dim": 12, "final_embed_dim": 12, "level_embed_dim": 12, "chan_embed_dim": 16}
TASKS = {"semseg": 5, "depth": 1, "edge": 1}
SMALL_VIT = ["backbone=vit", f"backbone_kwargs={json.dumps(VIT)}"]
SMALL_SWIN = ["backbone=swin", f"backbone_kwargs={json.dumps({**SWIN, 'patch_size': 4})}", "optimizer_kwargs.lr=4e-3"]
OPTIONS = {"plain": {"chan_nheads": 4}, "reweighted": {"use_ctr": True},
           "swin": {"head": "deconv"}}
SMALL = {name: [*(SMALL_SWIN if name == "swin" else SMALL_VIT), f"model_kwargs={json.dumps({**WIDTHS, **options})}"]
         for name, options in OPTIONS.items()}



def build(kind="vit", tasks=TASKS, size=(64, 96), sizes=None, **options):
    torch.manual_seed(0)
    return build_model("TaskPrompter", kind, tasks, size, model_kwargs={**WIDTHS, **options},
                       backbone_kwargs={**{"vit": VIT, "swin": SWIN}[kind], **(sizes or {})})


# ------------------------------------------------------------ reference numbers


def test_models_agree_with_the_original_in_float32(capsys):
    code = check_parity(["--golden", str(golden("taskprompter")), "--dtype", "float32", "--only", "tiny"])
    assert code == 0 and "16 passed, 0 failed" in capsys.readouterr().out


def test_everything_agrees_with_the_original(capsys):
    code = check_parity(["--golden", str(golden("taskprompter"))])
    out = capsys.readouterr().out
    assert code == 0, "\n".join(line for line in out.splitlines() if "FAIL" in line)
    for case in ("nyud_vit_tiny", "pascal_vit_tiny", "nyud_swin_tiny", "pascal_swin_tiny"):
        assert len(re.findall(rf"{case}/.* pass ", out)) == 4
    for data_set in ("nyud", "pascal"):
        assert len(re.findall(rf"losses_metrics/{data_set} .* pass ", out)) == 4
    assert len(re.findall("manifest_full/.* pass ", out)) == 4 and re.search("single_image .* pass ", out)
    assert "no check reads these files" not in out


@pytest.mark.parametrize("case, part, key, failing", [
    ("nyud_vit_tiny", "state", "backbone.blocks.1.attn.token_trans.weight", 4),
    ("nyud_swin_tiny", "state", "backbone.layers.1.downsample.process_chan_attn.weight", 4),
    ("pascal_swin_tiny", "io", "eval.mid.layer1.spatial_attn", 1),
    ("pascal_vit_tiny", "io", "eval.mid.block1.raw_channel_attn", 1)])
def test_one_changed_array_of_a_renamed_case_fails(tmp_path, capsys, case, part, key, failing):
    for path in golden("taskprompter").glob(f"{case}.*"):
        shutil.copyfile(path, tmp_path / path.name.replace(case, "another"))
    path = tmp_path / f"another.{part}.safetensors"
    save_file({name: x * (1 + 3e-6) if name == key else x for name, x in load_file(path).items()}, path)
    assert check_parity(["--golden", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert f"{4 - failing} passed, {failing} failed" in out, out


def manifest() -> dict:
    return json.loads((golden("taskprompter") / "manifest_full.json").read_text())


@pytest.mark.parametrize("path, name", [
    ("taskprompter_nyud", "nyud_vitLp16"), ("taskprompter_pascal", "pascal_vitLp16"),
    ("backbones/taskprompter_pascal_vit_base", "pascal_vitBp16")])
def test_shipped_files_build_the_published_sizes(path, name):
    entry, config = manifest()[f"{name}_taskprompter"], load_config(CONFIGS / f"{path}.yml")
    with torch.device("meta"):
        model = model_from_config(config)
        original = {key: torch.empty(shape) for key, shape in entry["state_dict"].items()}
    ours, dead = convert_released(original)
    assert list(config.input_size) == entry["image_size"]
    assert list(model.heads) == entry["tasks"]
    assert {key: x.shape for key, x in ours.items()} == {key: x.shape for key, x in model.state_dict().items()}
    lost = sum(original[key].numel() for key in dead if not key.endswith(BUFFERS))
    assert sum(p.numel() for p in model.parameters()) + lost == entry["total_parameters"]


def test_costs_are_at_most_those_published():
    cost = float(dict(count(load_config(NYUD)))["GMACs, total"])
    assert cost == pytest.approx(839.7, abs=0.1)


# ------------------------------------------------------------ released checkpoints

TO_ORIGINAL = [
    (r"^encoder\.prompting\.(\d+)\.to_map\.", r"backbone.blocks.\1.attn.token_trans."),
    (r"^encoder\.prompting\.(\d+)\.to_prompts\.", r"backbone.blocks.\1.attn.token_trans1."),
    (r"^encoder\.prompting\.(\d)\.(\d)\.to_chan\.", r"backbone.layers.\1.blocks.\2.token_trans."),
    (r"^encoder\.prompting\.(\d)\.(\d)\.query\.", r"backbone.layers.\1.blocks.\2.chan_q."),
    (r"^encoder\.prompting\.(\d)\.(\d)\.key_value\.", r"backbone.layers.\1.blocks.\2.chan_kv."),
    (r"^encoder\.prompting\.(\d)\.(\d)\.update\.0\.", r"backbone.layers.\1.blocks.\2.chan_proj."),
    (r"^encoder\.prompting\.(\d)\.(\d)\.update\.1\.", r"backbone.layers.\1.blocks.\2.token_trans1."),
    (r"^encoder\.merging\.(\d)\.prompts\.", r"backbone.layers.\1.downsample.task_prompts_up."),
    (r"^encoder\.merging\.(\d)\.channel\.", r"backbone.layers.\1.downsample.process_chan_attn."),
    (r"^encoder\.merging\.(\d)\.spatial\.", r"backbone.layers.\1.downsample.spa_attn_ds."),
    (r"^encoder\.layers\.(\d)\.downsample\.", lambda m: f"backbone.layers.{int(m[1]) - 1}.downsample."),
    (r"^encoder\.", "backbone."), (r"^decoder\.merge\.", "backbone.multi_scale_fuse."),
    (r"^decoder\.levels\.(\d)\.(\w+)\.spatial\.", r"backbone.fea_decode_spa.\1.\2.0."),
    (r"^decoder\.levels\.(\d)\.(\w+)\.channel\.", r"backbone.fea_decode_chan.\1.\2.0."),
    (r"^decoder\.levels\.(\d)\.(\w+)\.fuse\.", r"backbone.fea_fuse.\1.\2."),
    (r"^decoder\.reweighting\.(\d)\.gates\.(\w+)\.", r"backbone.ctr_attn_conv.\1.\2."),
    (r"^heads\.(\w+)\.conv\.", r"heads.\1.mt_proj.0."), (r"^heads\.(\w+)\.norm\.", r"heads.\1.mt_proj.1."),
    (r"^heads\.(\w+)\.refine\.", r"heads.\1.mt_proj.3."), (r"^heads\.(\w+)\.refine_norm\.", r"heads.\1.mt_proj.4."),
    (r"^heads\.(\w+)\.proj\.", r"heads.\1.linear_pred."),
]
DEAD = {"vit": ["backbone.blocks.3.attn.token_trans1.weight"],
        "swin": ["backbone.layers.1.blocks.1.attn_mask"]}


def original_key(key: str) -> str:
    return next(re.sub(old, new, key) for old, new in TO_ORIGINAL if re.match(old, key))


@pytest.mark.parametrize("kind, name", [("vit", "reweighted"), ("swin", "swin")])
def test_a_released_checkpoint_loads_as_it_is(tiny, tmp_path, caplog, kind, name):
    config = load_config(PASCAL, [*tiny, *SMALL[name]])
    torch.manual_seed(0)
    model = model_from_config(config).eval()
    state = {f"module.{original_key(key)}": value for key, value in model.state_dict().items()}
    path = tmp_path / "checkpoint.pth.tar"
    torch.save({"model": {**state, **{f"module.{key}": torch.zeros(3) for key in DEAD[kind]}}}, path)
    with caplog.at_level(logging.INFO):
        loaded, _ = trained_model(config, path, torch.device("cpu"))
    assert f"missing 0 / unexpected 0 / ignored {len(DEAD[kind])} without effect in the released TaskPr" in caplog.text
    assert all(key in caplog.text for key in DEAD[kind])
    assert_same_weights(loaded, model)


# ------------------------------------------------------------ training


@pytest.mark.parametrize("config_file, name", [(NYUD, "plain"), (PASCAL, "reweighted"), (NYUD, "swin")])
def test_a_small_one_trains(tiny, config_file, name):
    config = load_config(config_file, [*tiny, *SMALL[name], "max_iter=12", "val_interval=12"])
    results = train(config, resume=False)
    assert set(results) == set(config.tasks)
    first, *rest = rows(config.run_dir, "train")
    for key in ("loss/semseg", "loss/normals"):
        assert sum(row[key] for row in rest[-3:]) / 3 < first[key]


def test_mixed_precision_trains(tiny):
    config = load_config(NYUD, [*tiny, *SMALL["plain"], "precision=bf16", "max_iter=2"])
    assert train(config, resume=False)["depth"]["rmse"] > 0


@pytest.mark.parametrize("kind, options", [
    ("vit", {"use_ctr": True}), ("vit", {"prompt_update": "attention", "chan_nheads": 4}),
    ("swin", {"chan_nheads": 4}), ("swin", {"img_ds_ratio": 0.5, "head": "deconv"})])
def test_every_parameter_is_trained(kind, options):
    model = build(kind, size=(64, 128), **options).train()
    out = model(torch.randn(2, 3, 64, 128))
    sum(logits.square().mean() for logits in out.final.values()).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("kind", ["vit", "swin"])
def test_pretrained_weights_of_the_plain_backbone_load(kind, tmp_path, caplog):
    model = build(kind, size=(64, 64))
    plain = build_backbone(kind, (64, 64), {"vit": VIT, "swin": SWIN}[kind]).state_dict()
    classifier = {re.sub(r"^norm3\.", "norm.", key): torch.randn_like(x) if x.is_floating_point() else x
                  for key, x in plain.items() if not re.match(r"norm[0-2]\.", key)}
    save_file(classifier, tmp_path / "backbone.safetensors")
    with caplog.at_level(logging.INFO):
        load_pretrained(model.encoder, tmp_path / "backbone.safetensors")
    own = model.encoder.state_dict()
    fitting = [key for key in classifier if key != "cls_token" and own[key].shape == classifier[key].shape]
    assert all(torch.equal(own[key], classifier[key]) for key in fitting) and "norm.weight" in fitting
    assert len(classifier) - len(fitting) <= (1 if kind == "vit" else 3)   # tables of the clipped windows
    assert "starting fresh" in caplog.text and "task_prompts" in caplog.text


# ------------------------------------------------------------ options and fit


@pytest.mark.parametrize("kind, tasks, size, options", [
    ("vit", {"depth": 1}, (64, 96), {"chan_nheads": 16}),
    ("vit", {"semseg": 3, "sal": 2, "edge": 1}, (32, 48), {"head": "deconv"}),
    ("swin", {"normals": 3, "edge": 1}, (32, 96), {"chan_nheads": 4}),
    ("swin", {"semseg": 3}, (64, 64), {"img_ds_ratio": 0.75})])
def test_any_tasks_and_sizes(kind, tasks, size, options):
    model = build(kind, tasks, size, **options).eval()
    out = model(torch.randn(1, 3, *size)).final
    assert {task: tuple(x.shape) for task, x in out.items()} == {task: (1, n, *size) for task, n in tasks.items()}
    with pytest.raises(ValueError, match="was built for images of"):
        model(torch.randn(1, 3, size[0], size[1] + 16))


@pytest.mark.parametrize("backbone", ["vit_small", "vit_large", "swin_tiny"])
def test_every_named_vit_and_swin_fits(backbone):
    with torch.device("meta"):
        model = build_model("TaskPrompter", backbone, TASKS, (448, 576))
        assert model(torch.empty(1, 3, 448, 576)).final["semseg"].shape == (1, 5, 448, 576)


def test_a_backbone_without_a_prompted_variant_is_refused(monkeypatch):
    other = type("Other", (torch.nn.Module,), {"Config": dataclasses.make_dataclass("OtherConfig", [])})
    monkeypatch.setitem(BACKBONES, "other", BackboneEntry(other))
    with pytest.raises(ValueError, match="'TaskPrompter' .*: backbone 'other' cannot carry task prompts.*vit_large"):
        build_model("TaskPrompter", "other", TASKS, (64, 96))


@pytest.mark.parametrize("kind, arguments, message", [
    ("vit", {"chan_nheads": 9}, "a token grid of 8x12 cannot be cut into the 3x3 windows of chan_nheads 9"),
    ("vit", {"img_ds_ratio": 0.5}, "img_ds_ratio 0.5 is for a Swin"),
    ("swin", {"use_ctr": True}, "use_ctr needs a ViT"),
    ("swin", {"chan_nheads": 16}, r"image_size \(64, 96\) times img_ds_ratio 1.0 must be multiples of 64"),
    ("swin", {"img_ds_ratio": 0.3}, "must be multiples of 16"),
    ("swin", {"chan_nheads": 4, "chan_embed_dim": 9}, "a picture of 3x3, cannot be cut into the 2x2 windows"),
    ("swin", {"sizes": {"pad_before_roll": False}}, "leave backbone_kwargs.pad_before_roll true"),
    ("vit", {"sizes": {"class_token": False}}, "leave backbone_kwargs.class_token out"),
    ("vit", {"head": "mlp"}, "model_kwargs.head' must be one of conv, deconv, got 'mlp'"),
    ("vit", {"tasks": {}}, "needs one or more tasks, got none"),
    ("vit", {"chan_head": 1}, "did you mean 'chan_nheads'")])
def test_parts_that_do_not_fit(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        build(kind, **arguments)


def test_a_neck_is_refused():
    with pytest.raises(ValueError, match="works inside its backbone, there is no place for the neck 'pyramid'"):
        build_model("TaskPrompter", "vit", TASKS, (64, 96), backbone_kwargs=VIT, neck="pyramid",
                    neck_kwargs={"embed_dim": 8})


@pytest.mark.parametrize("options, message", [
    ({"prompt_len": 2}, "prompt_len' must be 1, .* got 2"), ({"embed_dim": 0}, "embed_dim' must be a whole number of"),
    ({"chan_nheads": 8}, "chan_nheads' must be a square number, got 8"), ({"head": "mlp"}, "one of conv, deconv"),
    ({"img_ds_ratio": 0}, "img_ds_ratio' must be a pos"), ({"prompt_update": "softmax"}, "one of linear, attention"),
    ({"dd_label_map_size": [512]}, "must be a list of 2 values or empty"),
    ({"dd_label_map_size": [0, 512]}, r"must be a height and a width of at least 1, got \[0, 512\]")])
def test_option_values_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        parse(TaskPrompterConfig, options)


def test_the_papers_prompt_update_differs():
    image = torch.randn(1, 3, 64, 96)
    linear, attention = build().eval(), build(prompt_update="attention").eval()
    missing = attention.load_state_dict(linear.state_dict(), strict=False).missing_keys
    assert {key.rpartition(".")[0] for key in missing} == {f"encoder.prompting.{i}.attended" for i in range(3)}
    want, got = linear(image).final["depth"], attention(image).final["depth"]
    assert not torch.allclose(got, want, rtol=0, atol=1e-7)


def test_labels_take_the_size_that_the_file_asks_for():
    config = load_config(CONFIGS / "taskprompter_cityscapes3d.yml")
    assert config.output_size == parse(TaskPrompterConfig, config.model_kwargs).label_size == (512, 1024)
    assert config.model_kwargs["head"] == "deconv" and config.grad_clip_param.max_norm == 10
    transform = build_transform((16, 32), (8, 16), True, label_rules(["semseg"]))
    sample = {"image": np.zeros((20, 40, 3), np.uint8), "semseg": np.zeros((20, 40, 1), np.float32)}
    out = transform(sample, None)
    assert out["image"].shape == (3, 16, 32) and out["semseg"].shape == (1, 8, 16)
    model = build("swin", {"semseg": 3}, (32, 64), dd_label_map_size=(16, 32))
    assert model(torch.zeros(2, 3, 32, 64)).final["semseg"].shape == (2, 3, 16, 32)


@pytest.mark.parametrize("size, message", [
    ("[64, 96]", r"labels of \[64, 96\], which must be the image size \[448, 576\]"),
    ("64", "dd_label_map_size' must be a list of 2 values or empty, got 64")])
def test_a_label_size_that_labels_cannot_take_is_refused(size, message):
    with pytest.raises(ConfigError, match=message):
        load_config(NYUD, [f"model_kwargs.dd_label_map_size={size}"])
    assert load_config(NYUD, ["model_kwargs.dd_label_map_size=[448, 576]"]).output_size == (448, 576)
