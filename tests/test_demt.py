"""DeMT: reference numbers, full-size keys, released checkpoints, sampling, attention, training, mistakes."""

import json
import logging
import re
import shutil
import sys
import types

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.build import build_model
from models.decoders.demt import MIXER_ORDERS, DeformableConv, window_coordinates
from scripts.check_parity import main as check_parity
from scripts.convert_checkpoint import main as convert_checkpoint
from tests.shared import ROOT, assert_same_weights, golden
from tests.test_train import rows
from utils.engine.build import model_from_config, trained_model
from utils.engine.checkpoint import convert_released, read_checkpoint
from utils.engine.config import load_config
from utils.engine.train import train

NYUD, PASCAL = (str(ROOT / "configs" / f"demt_{name}.yml") for name in ("nyud", "pascal"))
HRNET = {"width": 4, "num_blocks": 1, "num_modules": (1, 1, 1), "stem_blocks": 1}
SWIN = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "window_size": 4}
SMALL = ["backbone=hrnet", "backbone_kwargs={width: 4, num_blocks: 1, num_modules: [1, 1, 1], stem_blocks: 1}",
         "model_kwargs={dim: 16}"]
TASKS = {"semseg": 5, "depth": 1, "edge": 1}


def build(tasks=TASKS, size=(64, 96), backbone="swin", **options):
    torch.manual_seed(0)
    kwargs = {"swin": SWIN, "hrnet": HRNET, "vit": {"embed_dim": 16, "depth": 4, "num_heads": 2}}[backbone]
    return build_model("DeMT", backbone, tasks, size, backbone_kwargs=kwargs, model_kwargs={"dim": 16, **options})


def without(arguments, *beginnings):
    return [a for a in arguments if not a.startswith(beginnings)]


# ------------------------------------------------------------ reference numbers


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_everything_agrees_with_the_original(dtype, capsys):
    code = check_parity(["--golden", str(golden("demt")), "--dtype", dtype])
    out = capsys.readouterr().out
    assert code == 0, "\n".join(line for line in out.splitlines() if "FAIL" in line)
    for case, groups in {"nyud_swin": 5, "pascal_hrnet": 4, "nyud_swin_spatialfirst": 4, "nyud_fcn_mtl_hrnet": 3,
                         "nyud_fcn_stl_normals_swin": 3}.items():
        assert len(re.findall(rf"demt: {case}/.* pass ", out)) == groups
    assert len(re.findall("manifest_full/.* pass ", out)) == 14 and len(re.findall("metrics/.* pass ", out)) == 8
    assert "0 not covered" in out


def damaged(tmp_path, case, part, key, change):
    """A renamed copy of one case, with one array of its state or io file changed."""
    for path in golden("demt").glob(f"{case}.*"):
        shutil.copyfile(path, tmp_path / path.name.replace(case, "another"))
    path = tmp_path / f"another.{part}.safetensors"
    save_file({name: change(x) if name == key else x for name, x in load_file(path).items()}, path)
    return tmp_path


@pytest.mark.parametrize("case, part, key, failing", [
    ("nyud_swin_spatialfirst", "state", "head.defor_mixers.1.blocks.0.0.fn.0.get_offset.opt.weight", 4),
    ("nyud_swin_spatialfirst", "state", "head.task_querys.2.in_proj_bias", 4),
    ("nyud_swin_spatialfirst", "io", "eval_single.depth", 1), ("nyud_swin_spatialfirst", "io", "eval.mid.mixer0", 1),
    ("pascal_hrnet", "state", "backbone.stage4.0.fuse_layers.0.3.1.weight", 4),
    ("pascal_hrnet", "io", "train.grad.image", 1),
    ("nyud_fcn_stl_normals_swin", "state", "head.bottleneck.normals.bn.weight", 3)])
def test_one_changed_array_of_a_renamed_case_fails(tmp_path, capsys, case, part, key, failing):
    folder = damaged(tmp_path, case, part, key, lambda x: x * 1.01)
    code = check_parity(["--golden", str(folder)])
    out = capsys.readouterr().out
    assert code == 1 and f"{failing} failed" in out, out


@pytest.mark.parametrize("name, entry", [
    ("demt_nyud", "nyud_swin_t"), ("backbones/demt_nyud_swin_small", "nyud_swin_s"),
    ("backbones/demt_nyud_swin_base", "nyud_swin_b"), ("backbones/demt_nyud_hrnet18", "nyud_hrnet18_dim128"),
    ("demt_pascal", "pascal_swin_t"), ("backbones/demt_pascal_swin_small", "pascal_swin_s"),
    ("backbones/demt_pascal_swin_base", "pascal_swin_b"), ("backbones/demt_pascal_hrnet18", "pascal_hrnet18_dim128")])
def test_shipped_files_build_the_published_sizes(name, entry):
    entry = json.loads((golden("demt") / "manifest_full.json").read_text())[entry]
    config = load_config(ROOT / "configs" / f"{name}.yml")
    with torch.device("meta"):
        model = model_from_config(config)
    assert list(config.input_size) == entry["input_hw"] and list(model.heads) == list(entry["tasks"])
    assert sum(p.numel() for p in model.parameters()) == entry["parameters"]


# ------------------------------------------------------------ released checkpoints

STEPS = {  # of a mixer's block, in the two published layouts
    "channel_first": {"channel.0": "0", "channel.2": "2", "deform": "3.fn.0", "norm": "3.fn.2"},
    "spatial_first": {"channel.0": "1", "channel.2": "3", "deform": "0.fn.0", "norm": "0.fn.2"}}
TO_ORIGINAL = [
    (r"^encoder\.", "backbone."), (r"^heads\.", "head.final_logits."), (r"^decoder\.fuse\.", "head.linear1."),
    (r"^decoder\.mixers\.(\w+)\.(\d)\.", r"head.defor_mixers.<\1>.blocks.\2."),
    (r"^decoder\.interaction\.attention\.qkv\.", "head.task_fusion.in_proj_"),
    (r"^decoder\.interaction\.attention\.proj\.", "head.task_fusion.out_proj."),
    (r"^decoder\.interaction\.out\.", "head.smlp."),
    (r"^decoder\.queries\.(\w+)\.attention\.qkv\.", r"head.task_querys.<\1>.in_proj_"),
    (r"^decoder\.queries\.(\w+)\.attention\.proj\.", r"head.task_querys.<\1>.out_proj."),
    (r"^decoder\.queries\.(\w+)\.out\.", r"head.smlp2.<\1>."),
    (r"^decoder\.project\.(\w+)\.0\.", r"head.bottleneck.\1.conv."),
    (r"^decoder\.project\.(\w+)\.1\.", r"head.bottleneck.\1.bn."),
]


def as_released(model, path, order):
    """Writes a model's weights as the original code would: its keys, in a Lightning file with a callback's class."""
    tasks, original = list(model.heads), {}
    for key, value in model.state_dict().items():
        if key == "decoder._extra_state":
            continue
        [name] = [re.sub(old, new, key) for old, new in TO_ORIGINAL if re.match(old, key)]
        name = re.sub(r"<(\w+)>", lambda m: str(tasks.index(m[1])), name)
        if match := re.match(r"(head\.defor_mixers\.\d\.blocks\.\d\.)(channel\.[02]|deform|norm)\.(.*)", name):
            rest = re.sub("^conv\\.", "", match[3]).replace("reduce.", "get_offset.p_conv.")
            name = f"{match[1]}{STEPS[order][match[2]]}.{rest.replace('spread.', 'get_offset.opt.')}"
            if match[2] == "deform":
                original[f"{match[1]}{STEPS[order]['deform']}.offset"] = torch.zeros(1, 32, 1, 1)
        original[name] = value
    callback = type("ModelCheckpoint", (), {})
    callback.__module__ = "pytorch_lightning.callbacks.model_checkpoint"
    modules = {name: types.ModuleType(name) for name in ("pytorch_lightning", "pytorch_lightning.callbacks",
                                                         callback.__module__)}
    modules[callback.__module__].ModelCheckpoint = callback
    sys.modules.update(modules)
    torch.save({"epoch": 3, "global_step": 40000, "pytorch-lightning_version": "1.1.8", "lr_schedulers": [],
                "callbacks": {callback: {"monitor": None, "best_model_path": ""}}, "state_dict": original}, path)
    for name in modules:
        del sys.modules[name]
    return path


@pytest.fixture(params=MIXER_ORDERS)
def released(request, tiny, tmp_path):
    """Order, arguments, model and released file of a small NYUD model."""
    arguments = [*without(tiny, "backbone", "model_kwargs"), *SMALL]
    torch.manual_seed(0)
    model = model_from_config(load_config(NYUD, [*arguments, f"model_kwargs.mixer_order={request.param}"])).eval()
    return request.param, arguments, model, as_released(model, tmp_path / "last.ckpt", request.param)


def test_a_released_checkpoint_loads_and_tells_its_order(released, caplog):
    order, arguments, model, path = released
    with caplog.at_level(logging.INFO):
        loaded, _ = trained_model(load_config(NYUD, arguments), path, torch.device("cpu"))
    assert loaded.decoder.mixer_order == order
    assert "missing 0 / unexpected 0 / ignored 4 without effect in the released DeMT (tasks semseg 40, depth 1," \
        in caplog.text
    image = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        for task, want in model(image).final.items():
            assert torch.equal(loaded(image).final[task], want)


def test_another_order_is_refused(released):
    order, arguments, _, path = released
    other = MIXER_ORDERS[MIXER_ORDERS.index(order) - 1]
    config = load_config(NYUD, [*arguments, f"model_kwargs.mixer_order={other}"])
    with pytest.raises(ValueError, match=f"mixer_order {other} does not suit these weights: their mixers are {order}"):
        trained_model(config, path, torch.device("cpu"))


def test_the_converted_file_holds_the_same_model(released, tmp_path, capsys):
    order, arguments, model, path = released
    target = tmp_path / "ours.safetensors"
    assert convert_checkpoint([str(path), str(target)]) == 0
    assert "released DeMT" in capsys.readouterr().out
    loaded, _ = trained_model(load_config(NYUD, arguments), target, torch.device("cpu"))
    assert loaded.decoder.mixer_order == order
    assert_same_weights(loaded, model)


def test_a_baselines_file_is_no_demt(released, tmp_path):
    _, arguments, _, path = released
    state = read_checkpoint(path)["model"]
    baseline = {key: x for key, x in state.items() if key.startswith(("backbone.", "head.bottleneck.", "head.final"))}
    ours, dead = convert_released(baseline)
    assert not dead and "decoder.project.edge.0.weight" in ours and "decoder._extra_state" not in ours
    torch.save({"state_dict": baseline}, tmp_path / "fcn.ckpt")
    with pytest.raises(ValueError, match="holds the released FCN .tasks semseg 40.* asks for model demt"):
        trained_model(load_config(NYUD, arguments), tmp_path / "fcn.ckpt", torch.device("cpu"))


# ------------------------------------------------------------ sampling, attention


def test_every_channel_is_read_at_its_own_place():
    conv = DeformableConv(2).double()
    for layer in (conv.reduce, conv.spread):
        torch.nn.init.zeros_(layer.weight)
    conv.spread.bias.data = torch.tensor([0.0, 1.0, -0.5, 0.0]).double()    # dy, dx of channel 0, then of channel 1
    conv.conv.weight.data = torch.eye(2).double().reshape(2, 2, 1, 1)
    conv.conv.bias.data.zero_()
    feat = torch.arange(24.0).reshape(1, 2, 3, 4).double()
    out = conv(feat)
    assert out[0, 0].tolist() == [[1, 2, 3, 0], [5, 6, 7, 0], [9, 10, 11, 0]]                     # zero outside
    assert out[0, 1].tolist() == [[6, 6.5, 7, 7.5], [14, 15, 16, 17], [18, 19, 20, 21]]           # half a row up


def test_coordinates_are_those_of_the_window():
    coordinates = window_coordinates(torch.zeros(1, 1, 4, 5))[0]
    assert coordinates.shape == (18, 4, 5)
    assert coordinates[:, 2, 1].tolist() == [2, 2, 2, 3, 3, 3, 4, 4, 4, 1, 2, 3, 1, 2, 3, 1, 2, 3]


def test_bfloat16_does_not_round_the_coordinates():
    conv = DeformableConv(4)
    feat = torch.randn(1, 4, 6, 40)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(conv(feat), conv(feat.float()))


def test_an_image_is_independent_of_its_batch_unless_asked():
    image = torch.randn(3, 3, 64, 96)
    with torch.no_grad():
        for attention, same in (("per_sample", True), ("batch", False)):
            model = build(attention=attention).eval()
            together, alone = model(image).final, model(image[1:2]).final
            assert all(torch.allclose(together[t][1:2], alone[t], atol=1e-5) == same for t in TASKS)


@pytest.mark.parametrize("depth, backbone", [(1, "swin"), (2, "hrnet"), (1, "vit")])
@pytest.mark.parametrize("attention", ["per_sample", "batch"])
def test_every_parameter_is_trained_on_any_backbone(depth, backbone, attention):
    model = build(backbone=backbone, mixer_depth=depth, attention=attention).train()
    sum(x.square().mean() for x in model(torch.randn(2, 3, 64, 96)).final.values()).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("tasks", [{"depth": 1}, {"semseg": 3, "sal": 2, "edge": 1}])
@pytest.mark.parametrize("order", MIXER_ORDERS)
def test_any_tasks_and_sizes(tasks, order):
    model = build(tasks, (33, 47), mixer_order=order).eval()
    out = model(torch.randn(1, 3, 33, 47)).final
    assert {task: tuple(x.shape) for task, x in out.items()} == {t: (1, n, 33, 47) for t, n in tasks.items()}


# ------------------------------------------------------------ training, mistakes


@pytest.mark.parametrize("config_file", [NYUD, PASCAL])
def test_a_small_one_trains_and_resumes(tiny, config_file):
    arguments = [*without(tiny, "backbone", "model_kwargs"), *SMALL, "max_iter=12", "val_interval=6",
                 "model_kwargs.mixer_order=spatial_first", "ema_decay=0.9"]
    config = load_config(config_file, arguments)
    assert set(train(config, resume=False)) == set(config.tasks)
    first, *rest = rows(config.run_dir, "train")
    assert sum(row["loss/total"] for row in rest[-3:]) / 3 < first["loss/total"]
    loaded, _ = trained_model(load_config(config_file, without(arguments, "model_kwargs.mixer")),
                           config.run_dir / "last.pt", torch.device("cpu"))
    assert loaded.decoder.mixer_order == "spatial_first"
    longer = load_config(config_file, [*arguments, "max_iter=14", "val_interval=14"])
    train(longer, resume=True)
    assert rows(config.run_dir, "train")[-1]["step"] == 14


def test_mixed_precision_trains(tiny):
    config = load_config(NYUD, [*without(tiny, "backbone", "model_kwargs"), *SMALL, "precision=bf16", "max_iter=2"])
    assert train(config, resume=False)["depth"]["rmse"] > 0


@pytest.mark.parametrize("options, message", [
    ({"dim": 18}, "model 'DeMT': 'model_kwargs.num_heads' must be a divisor of dim = 18, got 4"),
    ({"mixer_order": "first"}, "mixer_order' must be one of auto, channel_first, spatial_first, got 'first'"),
    ({"attention": "pixel"}, "attention' must be one of per_sample, batch, got 'pixel'"),
    ({"mixer_depth": 0}, "mixer_depth' must be a whole number of at least 1, got 0"),
    ({"depth": 2}, "did you mean 'mixer_depth'"), ({"tasks": {}}, "needs one or more tasks, got none")])
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)
