"""The plain baselines and HRNet: any backbone and size, independent tasks, training, the gain between runs."""

import logging

import pytest
import timm
import torch
import torch.nn.functional as F

from models.backbones import hrnet
from models.build import build_backbone, build_model
from scripts.delta_m import main as delta_m
from tests.shared import ROOT
from utils.engine.build import build_split, model_from_config
from utils.engine.config import load_config
from utils.engine.pretrained import load_pretrained
from utils.engine.train import train

BASELINES = ("fcn", "multi_scale")
TASKS = {"semseg": 5, "depth": 1}
TINY_SWIN = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "window_size": 4}
TINY_VIT = {"embed_dim": 16, "depth": 4, "num_heads": 2}
TINY_HRNET = {"width": 4, "num_blocks": 1, "num_modules": (1, 1, 1), "stem_blocks": 1}
BACKBONES = {
    "swin": {"backbone": "swin", "backbone_kwargs": TINY_SWIN},
    "hrnet": {"backbone": "hrnet", "backbone_kwargs": TINY_HRNET},
    "vit": {"backbone": "vit", "backbone_kwargs": TINY_VIT},
    "vit_one_map": {"backbone": "vit", "backbone_kwargs": {**TINY_VIT, "taps": (4,)}},
    "vit_pyramid": {"backbone": "vit", "backbone_kwargs": TINY_VIT, "neck": "pyramid", "neck_kwargs": {"embed_dim": 8}},
}


def build(name, tasks=TASKS, size=(64, 96), backbone="swin", **options):
    torch.manual_seed(0)
    return build_model(name, tasks=tasks, image_size=size, model_kwargs=options, **BACKBONES[backbone])


# ------------------------------------------------------------ decoders


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("name", BASELINES)
def test_any_backbone_and_every_parameter_is_trained(name, backbone):
    model = build(name, backbone=backbone).train()
    out = model(torch.randn(2, 3, 64, 96)).final
    assert {task: tuple(x.shape) for task, x in out.items()} == {t: (2, n, 64, 96) for t, n in TASKS.items()}
    sum(x.square().mean() for x in out.values()).backward()
    assert [key for key, parameter in model.named_parameters() if parameter.grad is None] == []


@pytest.mark.parametrize("name", BASELINES)
@pytest.mark.parametrize("backbone", ["swin", "hrnet"])
@pytest.mark.parametrize("size", [(33, 47), (107, 140)])
def test_sizes_that_are_no_multiples_of_a_stride(name, backbone, size):
    model = build(name, size=size, backbone=backbone).eval()
    assert model(torch.randn(1, 3, *size)).final["semseg"].shape == (1, 5, *size)


@pytest.mark.parametrize("name", BASELINES)
def test_tasks_do_not_touch_each_other(name):
    both = build(name).eval()
    alone = build(name, tasks={"depth": 1}).eval()
    state = both.state_dict()
    alone.load_state_dict({key: state[key] for key in alone.state_dict()})
    image = torch.randn(1, 3, 64, 96)
    assert torch.equal(alone(image).final["depth"], both(image).final["depth"])


@pytest.mark.parametrize("name, options, message", [
    ("fcn", {"reduction": 0}, "model 'fcn': 'model_kwargs.reduction' must be a whole number of at least 1, got 0"),
    ("fcn", {"reduction": 500}, "'reduction' must be 1 to 120, the channels of the backbone's maps"),
    ("multi_scale", {"channels": 0}, "model_kwargs.channels' must be a whole number of at least 1"),
    ("multi_scale", {"chanels": 3}, "did you mean 'channels'"),
    ("fcn", {"tasks": {}}, "model 'fcn' .* needs one or more tasks, got none"),
])
def test_mistakes_are_named(name, options, message):
    with pytest.raises(ValueError, match=message):
        build(name, **options)


# ------------------------------------------------------------ HRNet


@pytest.mark.parametrize("size", [(64, 96), (33, 47), (8, 200)])
def test_hrnet_takes_any_size(size):
    backbone = build_backbone("hrnet", (32, 32), TINY_HRNET)
    maps = backbone(torch.randn(2, 3, *size))
    height, width = -(-size[0] // 4), -(-size[1] // 4)  # rounded up, here and at each halving
    for feat, channels in zip(maps, backbone.channels, strict=True):
        assert feat.shape == (2, channels, height, width)
        height, width = -(-height // 2), -(-width // 2)


def test_hrnet_is_timms_but_for_the_interpolation(monkeypatch):
    """With repeated pixels in place of bilinear interpolation the maps are those of timm's network."""
    torch.manual_seed(0)
    backbone = build_backbone("hrnet", (64, 96), TINY_HRNET).eval()
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        bilinear = backbone(image)
        monkeypatch.setattr(hrnet, "resize", lambda feat, size: F.interpolate(feat, size, mode="nearest"))
        repeated = backbone(image)
        for ours, theirs in zip(repeated, backbone.forward_features(image), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-5)
        assert (bilinear[0] - repeated[0]).abs().max() > 1e-3


def test_hrnet_starts_from_a_classifiers_weights(tmp_path, caplog):
    torch.manual_seed(0)
    classifier = timm.create_model("hrnet_w18_small_v2")
    torch.save(classifier.state_dict(), tmp_path / "classifier.pth")
    backbone = build_backbone("hrnet_w18_small_v2", (64, 64))
    with caplog.at_level(logging.INFO):
        load_pretrained(backbone, tmp_path / "classifier.pth")
    assert "missing 0 / unexpected" in caplog.text and "incre_modules.*" in caplog.text
    name = "stage4.1.fuse_layers.0.3.0.weight"
    assert torch.equal(backbone.state_dict()[name], classifier.state_dict()[name])


def test_hrnet_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"num_modules' must be a list of 3 values, got \(1, 1\)"):
        build_backbone("hrnet", (32, 32), {**TINY_HRNET, "num_modules": (1, 1)})


# ------------------------------------------------------------ shipped files, training


@pytest.mark.parametrize("name, parameters", [
    ("fcn_nyud_hrnet18", 4_515_556), ("fcn_pascal_hrnet18", 4_677_752), ("fcn_nyud_hrnet18_semseg", 4_026_384)])
def test_shipped_files_have_the_published_sizes(name, parameters):
    with torch.device("meta"):
        model = model_from_config(load_config(ROOT / "configs" / "baselines" / f"{name}.yml"))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_every_task_has_its_single_task_file():
    for data in ("nyud", "pascal"):
        for name in (f"{model}_{data}_{backbone}" for model in BASELINES for backbone in ("swin_tiny", "hrnet18")):
            multi = load_config(ROOT / "configs" / "baselines" / f"{name}.yml")
            for task in multi.tasks:
                single = load_config(ROOT / "configs" / "baselines" / f"{name}_{task}.yml")
                assert single.tasks == (task,) and single.version_name == f"{name}_{task}"
                for key in ("model", "backbone", "input_size", "optimizer_kwargs", "loss_kwargs", "max_iter"):
                    assert getattr(single, key) == getattr(multi, key)
                assert single.task_dictionary.edge_w == multi.task_dictionary.edge_w


def test_single_task_runs_crop_as_multi_task_runs_do(tiny):
    """Their crops are guided by the label of a task that they do not train, so the images are the same."""
    name = ROOT / "configs" / "baselines" / "fcn_nyud_swin_tiny"
    arguments = [*(a for a in tiny if not a.startswith("model_kwargs")), "image_size=[48, 64]"]
    multi, single = (build_split(load_config(f"{name}{end}.yml", arguments), "train") for end in ("", "_depth"))
    alone = build_split(load_config(f"{name}_depth.yml", [*arguments, "augmentation.always_guide_crop=false"]), "train")
    keys = [(index, seed) for index in range(3) for seed in range(8)]
    assert all(torch.equal(multi[key]["image"], single[key]["image"]) for key in keys)
    assert not all(torch.equal(multi[key]["image"], alone[key]["image"]) for key in keys)
    assert set(alone[0]) == {"image", "depth", "meta"}


def run(tiny, name, *more):
    config = load_config(ROOT / "configs" / "baselines" / f"{name}.yml",
                         [*(a for a in tiny if not a.startswith("model_kwargs")), *more])
    train(config, resume=False)
    return str(config.run_dir)


def test_the_gain_of_a_trained_run_over_trained_single_runs(tiny, capsys):
    two = ["task_dictionary.include_normals=false", "task_dictionary.include_edge=false"]
    multi = run(tiny, "fcn_nyud_swin_tiny", *two)
    single = [run(tiny, f"fcn_nyud_swin_tiny_{task}") for task in ("semseg", "depth")]
    assert delta_m([multi, "--single", *single]) == 0
    assert "mean of semseg " in capsys.readouterr().out


def test_a_multi_scale_baseline_trains_on_hrnet(tiny):
    small = ["backbone=hrnet", "backbone_kwargs={width: 4, num_blocks: 1, num_modules: [1, 1, 1], stem_blocks: 1}"]
    run([a for a in tiny if not a.startswith("backbone")], "multi_scale_pascal_hrnet18", *small, "max_iter=2")
