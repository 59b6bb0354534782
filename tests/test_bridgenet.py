"""BridgeNet: reference numbers, full-size keys, released checkpoints, training, what fits and what does not."""

import json
import logging
import shutil
from functools import cache

import pytest
import torch
from safetensors.torch import load_file, save_file

from evaluation.evaluator import TaskContext
from models.build import build_model
from models.decoders.bridgenet import BridgeNetConfig
from models.released import describe, recognise
from models.released.bridgenet import BRIDGENET
from scripts.check_parity import main as check_parity
from scripts.convert_checkpoint import main as convert_checkpoint
from tests.shared import ROOT, assert_same_weights, golden
from tests.test_train import rows
from utils.engine.build import build_criterion, model_from_config, trained_model
from utils.engine.checkpoint import convert_released
from utils.engine.config import load_config
from utils.engine.tasks import TASKS
from utils.engine.train import train
from utils.meta import meta_device
from utils.options import parse

NYUD, PASCAL = (str(ROOT / "configs" / f"bridgenet_{name}.yml") for name in ("nyud", "pascal"))
OFFICIAL = {                                                        # of the manifest -> experiment file
    "nyud_vitB": "backbones/bridgenet_nyud_vit_base", "nyud_vitL": "backbones/bridgenet_nyud_vit_large",
    "nyud_internimageB": "backbones/bridgenet_nyud_internimage_b", "nyud_internimageL": "bridgenet_nyud",
    "pascal_vitB": "backbones/bridgenet_pascal_vit_base", "pascal_vitL": "bridgenet_pascal",
    "pascal_internimageB": "backbones/bridgenet_pascal_internimage_b",
    "pascal_internimageL": "backbones/bridgenet_pascal_internimage_l"}
INTERN = {"embed_dim": 8, "depths": (1, 1, 1, 1), "groups": (1, 1, 2, 2), "drop_path_rate": 0.0}
VIT = {"embed_dim": 16, "depth": 4, "num_heads": 2, "patch_size": 8}
SWIN = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "window_size": 4}
SMALL = {"embed_dim": 24, "PRED_OUT_NUM_CONSTANT": 8, "refine_depth": (1, 2, 1)}
TASKS_3 = {"semseg": 5, "depth": 1, "edge": 1}


def build(tasks=TASKS_3, size=(64, 96), backbone="internimage", sizes=INTERN, **options):
    torch.manual_seed(0)
    return build_model("BridgeNet", backbone, tasks, size, backbone_kwargs=sizes, model_kwargs={**SMALL, **options})


# ------------------------------------------------------------ reference numbers


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("case", ["nyud_vit", "pascal_intern"])
def test_everything_agrees_with_the_original(case, dtype, capsys):
    code = check_parity(["--golden", str(golden("bridgenet")), "--dtype", dtype, "--only", f"{case}/"])
    out = capsys.readouterr().out
    assert code == 0, "\n".join(line for line in out.splitlines() if "FAIL" in line)
    assert "5 passed, 0 failed, 1 not covered" in out and "scale_embed.0: no output depends on it" in out


FUSION = "multi_task_decoder.atten_fusion.depth.attn_fusion.fuse_attn.weight"


@pytest.mark.parametrize("part, key, change, group", [
    ("state", FUSION, 1e-2, "outputs"), ("state", FUSION, 1e-6, "gradient norms"), ("target", "target.depth", 1e-3,
     "losses"), ("train", "train.grad.image", 3e-6, "training"), ("io", "tpp.score.edge", 1e-3, "features")])
def test_one_changed_array_of_a_renamed_case_fails(tmp_path, capsys, part, key, change, group):
    for path in golden("bridgenet").glob("nyud_vit.*"):
        shutil.copyfile(path, tmp_path / path.name.replace("nyud_vit", "another"))
    path = tmp_path / f"another.{part}.safetensors"
    save_file({name: x * (1 + change) if name == key else x for name, x in load_file(path).items()}, path)
    assert check_parity(["--golden", str(tmp_path), "--only", f"another/{group}"]) == 1
    assert "0 passed, 1 failed" in capsys.readouterr().out


@cache
def manifest():
    return json.loads((golden("bridgenet") / "manifest_full.json").read_text())


@pytest.mark.parametrize("name", OFFICIAL)
def test_shipped_files_build_the_published_models_key_by_key(name):
    entry = manifest()[name]
    config = load_config(ROOT / "configs" / f"{OFFICIAL[name]}.yml")
    with meta_device():
        model = model_from_config(config)
        original = {key: torch.empty(shape) for key, shape in entry["keys"].items()}
    assert list(config.input_size) == entry["image_size"] and list(model.heads) == list(entry["tasks"])
    ours, dead = convert_released(original)
    assert {key: x.shape for key, x in ours.items()} == {key: x.shape for key, x in model.state_dict().items()}
    assert len(ours) + len(dead) == len(original) == entry["n_keys"]
    assert sum(original[key].numel() for key in dead) == entry["params_unused"]
    assert sum(p.numel() for p in model.parameters()) + entry["params_unused"] == entry["params_total"]


def test_boundary_loss_says_little():
    edge = TASKS.load("edge")
    assert edge.main_score({"loss": 0.1}).label == "boundary loss"
    label = torch.zeros(1, 1, 10, 10)
    label[..., :2] = 1                                                 # f = 0.2
    for pred, floor in ((label, 0.0347 + 0.263 * 0.2), (torch.zeros_like(label), 0.0347 + 0.624 * 0.2)):
        [meter] = edge.build_evaluators(TaskContext(1))
        meter.update(pred, label)
        assert meter.compute()["loss"] == pytest.approx(floor, abs=2e-4)


# ------------------------------------------------------------ released checkpoints


@pytest.fixture
def released(tmp_path):
    """Configuration of the small reference model, and its weights in a file as the original code writes it."""
    path, state = tmp_path / "checkpoint.pth.tar", load_file(golden("bridgenet") / "nyud_vit.state.safetensors")
    torch.save({"model": {f"module.{key}": value for key, value in state.items()}, "optimizer": {"state": {}},
                "scheduler": {"last_epoch": 1}, "epoch": 1, "iter_count": 1}, path)
    config = load_config(ROOT / "configs" / f"{OFFICIAL['nyud_vitB']}.yml", [
        "backbone=vit", "backbone_kwargs={embed_dim: 36, depth: 4, num_heads: 3}", "image_size=[64, 128]",
        "model_kwargs={embed_dim: 24, PRED_OUT_NUM_CONSTANT: 8, refine_depth: [3, 6, 3]}", "pretrained=false"])
    return config, path, state


def test_a_released_checkpoint_loads_as_it_is(released, tmp_path, caplog, capsys):
    config, path, state = released
    assert recognise(state) == "BridgeNet"
    with caplog.at_level(logging.INFO):
        model, _ = trained_model(config, path, torch.device("cpu"))
    dead = [key for key in state if BRIDGENET.is_dead(key)]
    assert f"missing 0 / unexpected 0 / ignored {len(dead)} without effect in the released BridgeNet" in caplog.text
    io = load_file(golden("bridgenet") / "nyud_vit.io.safetensors")
    with torch.no_grad():
        out = model.encoder(io["image"])
        torch.testing.assert_close(model.decoder(out).feats["edge"], io["feat.edge"], rtol=0, atol=1e-4)
    target = tmp_path / "ours.safetensors"
    assert convert_checkpoint([str(path), str(target)]) == 0 and "released BridgeNet" in capsys.readouterr().out
    assert_same_weights(trained_model(config, target, torch.device("cpu"))[0], model)


def test_a_released_file_says_its_backbone():
    state = load_file(golden("bridgenet") / "pascal_intern.state.safetensors")
    assert describe(state).endswith("; InternImage of 1 + 1 + 2 + 1 blocks and 8 channels")


def test_a_wrong_pairing_says_what_the_file_holds(released):
    config, path, state = released
    with pytest.raises(ValueError, match=r"holds the released BridgeNet \(tasks .*semseg 40; ViT of 4 blocks .* "
                                         r"asks for model invpt, backbone vit.*unknown to the"):
        trained_model(load_config(ROOT / "configs" / "invpt_nyud.yml", [
            "backbone=vit", "backbone_kwargs={embed_dim: 36, depth: 4, num_heads: 3}", "image_size=[64, 128]",
            "model=invpt", "model_kwargs={embed_dim: 24, PRED_OUT_NUM_CONSTANT: 8}"]), path, torch.device("cpu"))
    state.pop("multi_task_decoder.trfl.norm_mts.1.weight")
    state["multi_task_decoder.trfl.redu_chan.1.9.weight"] = torch.zeros(3)
    torch.save(state, path)
    with pytest.raises(ValueError, match=r"1 missing in the file \(decoder.aggregate.norms.1.weight\); 1 unknown"):
        trained_model(config, path, torch.device("cpu"))


# ------------------------------------------------------------ training


@pytest.mark.parametrize("file, backbone, sizes", [
    (NYUD, "internimage", "{embed_dim: 8, depths: [1, 1, 1, 1], groups: [1, 1, 2, 2], drop_path_rate: 0.0}"),
    (PASCAL, "vit", "{embed_dim: 16, depth: 4, num_heads: 2}")])
def test_a_small_one_trains_with_intermediate_supervision(tiny, file, backbone, sizes):
    config = load_config(file, [
        *tiny, f"backbone={backbone}", f"backbone_kwargs={sizes}", "max_iter=16", "val_interval=16",
        "model_kwargs={embed_dim: 24, PRED_OUT_NUM_CONSTANT: 8, refine_depth: [1, 1, 1]}"])
    results = train(config, resume=False)
    assert set(results) == set(config.tasks)
    first, *rest = rows(config.run_dir, "train")
    weights = config.loss_kwargs.loss_weights
    total = sum(weights[t] * (first[f"loss/{t}"] + 0.5 * first[f"loss/inter/{t}"]) for t in config.tasks)
    assert first["loss/total"] == pytest.approx(total, rel=1e-5)
    for key in ("loss/semseg", "loss/inter/semseg", "loss/normals"):
        assert sum(row[key] for row in rest[-3:]) / 3 < first[key]


@pytest.mark.parametrize("backbone, sizes, unused", [
    ("internimage", INTERN, []), ("vit", VIT, []), ("swin", SWIN, ["encoder.norm0.weight", "encoder.norm0.bias"])])
@pytest.mark.parametrize("refine_from", ["preliminary", "tpp"])
def test_every_parameter_is_trained(backbone, sizes, unused, refine_from):
    model = build(backbone=backbone, sizes=sizes, refine_from=refine_from).train()
    out = model(torch.randn(2, 3, 64, 96))
    sum(logits.square().mean() for logits in out.final.values()).backward()   # TPP is reached without its own losses
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == unused


def test_mixed_precision_trains(tiny):
    config = load_config(NYUD, [
        *tiny, "backbone=internimage", f"backbone_kwargs={json.dumps(INTERN)}", "precision=bf16", "max_iter=2",
        "model_kwargs={embed_dim: 24, PRED_OUT_NUM_CONSTANT: 8, refine_depth: [1, 1, 1]}"])
    assert train(config, resume=False)["depth"]["rmse"] > 0


# ------------------------------------------------------------ options and fit


@pytest.mark.parametrize("tasks", [{"depth": 1}, {"semseg": 3, "sal": 2, "edge": 1}])
@pytest.mark.parametrize("backbone, sizes, size", [
    ("internimage", INTERN, (96, 32)), ("vit", {**VIT, "depth": 5}, (48, 80)), ("swin", SWIN, (64, 96))])
def test_any_tasks_sizes_and_backbones(tasks, backbone, sizes, size):
    model = build(tasks, size, backbone, sizes).eval()
    out = model(torch.randn(1, 3, *size))
    for maps in (out.final, out.intermediate):
        assert {task: tuple(x.shape) for task, x in maps.items()} == {t: (1, n, *size) for t, n in tasks.items()}


def test_a_pyramid_neck_fits():
    model = build_model("bridgenet", "vit", TASKS_3, (64, 64), neck="pyramid", neck_kwargs={"embed_dim": 8},
                        backbone_kwargs=VIT | {"patch_size": 16}, model_kwargs=SMALL).eval()
    assert model(torch.randn(1, 3, 64, 64)).final["semseg"].shape == (1, 5, 64, 64)


@pytest.mark.parametrize("backbone, arguments, message", [
    ("vit_small", {"backbone_kwargs": {"taps": (6, 12)}}, r"needs four maps, .* strides \(16, 16\)"),
    ("vit_small", {"model_kwargs": {"refine_depths": 3}}, "did you mean 'refine_depth'"),
    ("vit_small", {"model_kwargs": {"mtt_resolution_downsample_rate": 4}}, r"\(64, 96\) must be multiples of 64"),
    ("internimage_t", {"image_size": (48, 64)}, r"\(48, 64\) must be multiples of 32")])
def test_parts_that_do_not_fit(backbone, arguments, message):
    size = arguments.pop("image_size", (64, 96))
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        build_model("BridgeNet", backbone, TASKS_3, size, **arguments)


@pytest.mark.parametrize("options, message", [
    ({"mtt_resolution_downsample_rate": 3}, "mtt_resolution_downsample_rate' must be one of 1, 2, 4 or empty, got 3"),
    ({"refine_depth": (3, 3)}, r"refine_depth' must be a list of 3 values or empty, got \(3, 3\)"),
    ({"refine_depth": 18}, "refine_depth' must be a list of 3"), ({"refine_depth": (3, 0, 3)}, "refine_depth' must be"),
    ({"dilations": ()}, "dilations' must be"), ({"squeeze_ratio": 0}, "squeeze_ratio' must be"),
    ({"attention_scale": "full"}, "attention_scale' must be one of width, head, got 'full'"),
    ({"refine_from": "ttp"}, "refine_from' must be one of preliminary, tpp .did you mean 'tpp'.., got 'ttp'"),
    ({"num_heads": 5}, r"num_heads' must be a divisor of .*\(512, 576, 288, 144\), got 5"),
    ({"drop_path_rate": 1.0}, "drop_path_rate' must be"), ({"embed_dim": 0}, "embed_dim' must be"),
    ({"PRED_OUT_NUM_CONSTANT": -1}, "PRED_OUT_NUM_CONSTANT' must be"), ({"mlp_ratio": 0}, "mlp_ratio' must be")])
def test_option_values_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        parse(BridgeNetConfig, options)


def test_defaults_are_the_published_models():
    for tasks, depth in ((TASKS_3, 18), ({**TASKS_3, "sal": 2, "human_parts": 7}, 12)):
        with meta_device():
            decoders = [build(tasks, backbone=name, sizes=sizes, refine_depth=None).decoder
                        for name, sizes in (("internimage", INTERN), ("vit", VIT))]
        assert [decoder.downsample for decoder in decoders] == [1, 2]
        assert [len(stage.refine) for stage in decoders[0].stages] == [depth] * 3
    blocks = [blocks["depth"] for blocks in decoders[0].stages[1].refine]
    assert [block.layers[3].dilation[0] for block in blocks] == [1, 2, 5] * 4
    assert [block.drop_path.drop_prob for block in blocks] == pytest.approx(torch.linspace(0, 0.15, 12).tolist())


def test_options_act():
    image = torch.randn(1, 3, 64, 96)
    plain = build().eval()
    for parameter in plain.decoder.parameters():              # the stages start almost at zero
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    want = plain(image)
    for options in ({"attention_scale": "head"}, {"refine_from": "tpp"}, {"dilations": (3, 1)}):
        other = build(**options).eval()
        other.load_state_dict(plain.state_dict())
        got = other(image)
        assert (got.final["depth"] - want.final["depth"]).abs().max() > 1e-5
        same = torch.equal(got.intermediate["depth"], want.intermediate["depth"])
        assert same == ("attention_scale" not in options)     # the other two act after the rough predictions


def test_the_published_weight_of_preliminary_losses_needs_no_key():
    small = ["backbone=vit", "backbone_kwargs={embed_dim: 16, depth: 4, num_heads: 2}"]
    for file, overrides, weight in ((NYUD, [], 0.5), (NYUD, ["loss_kwargs.intermediate_weight=0.2"], 0.2),
                                    (ROOT / "configs" / "invpt_nyud.yml", [], 1.0)):
        config = load_config(file, [*small, *overrides])
        with meta_device():
            model = model_from_config(config)
        assert build_criterion(config, model).intermediate_weight == weight
