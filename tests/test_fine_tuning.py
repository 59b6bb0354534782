"""Starting from a trained model, training parts of one, learning rates per part, schedules, optimizers by name."""

import copy
import math

import pytest
import torch
from torch import nn

from models.build import build_model
from tests.test_pairs import SMALL, SWIN, VIT
from tests.test_timm import TINY_VIT
from tests.watched_run import experiment, rows, stored
from utils.engine.averages import MovingAverage
from utils.engine.checkpoint import save_checkpoint
from utils.engine.init_from import init_from
from utils.engine.optimizers import OPTIMIZERS
from utils.engine.parameter_groups import freeze, parameter_groups
from utils.engine.run import build_optimizer
from utils.engine.schedules import SCHEDULES
from utils.engine.train import train
from utils.options import parse


def model_of(tasks=("semseg", "depth"), classes=5, decoder="fcn", backbone="swin", size=(64, 64), **arguments):
    torch.manual_seed(len(tasks) + classes)
    outputs = {task: classes if task == "semseg" else 1 for task in tasks}
    arguments = {"backbone_kwargs": {"swin": SWIN, "vit": VIT}.get(backbone, {}), **arguments}
    return build_model(decoder, backbone, outputs, size, model_kwargs=SMALL.get(decoder), **arguments)


def settings(tmp_path, *overrides):
    return experiment(tmp_path / "no_data", tmp_path, *overrides)


# ------------------------------------------------------------ init_from


@pytest.fixture
def trained(tmp_path):
    """A file of a BIM for semseg and depth, and its model."""
    model = model_of(decoder="bim")
    save_checkpoint(tmp_path / "old.pt", {"model": model.state_dict(), "step": 3})
    return tmp_path / "old.pt", model


@pytest.mark.parametrize("change, fresh", [
    ({}, set()),
    ({"classes": 7}, {"heads.semseg"}),
    ({"tasks": ("semseg", "depth", "edge")}, {"heads.edge", "decoder.stages"}),
    ({"tasks": ("depth",)}, set()),
    ({"decoder": "fcn"}, {"heads.semseg", "heads.depth", "decoder.project"}),
])
def test_what_fits_is_taken_and_the_rest_is_listed(trained, change, fresh, caplog):
    path, old = trained
    new = model_of(**{"decoder": "bim", **change})
    before = copy.deepcopy(new.state_dict())
    with caplog.at_level("INFO"):
        assert init_from(new, path)
    held, parts = old.state_dict(), set()
    for key, value in new.state_dict().items():
        if key in held and held[key].shape == value.shape:
            assert torch.equal(value, held[key]), key
        else:
            assert torch.equal(value, before[key]), key
            parts.add(".".join(key.split(".")[:2]))
    assert parts == fresh and all(f"{part}.*" in caplog.text for part in parts)
    assert ("starting fresh: nothing" in caplog.text) == (not fresh)


def test_tasks_keep_their_own_weights_inside_a_decoder(trained):
    path, old = trained
    new = model_of(("depth", "edge"), decoder="bim")
    init_from(new, path)
    held, found = {key: value for key, value in old.state_dict().items() if ".depth." in key}, new.state_dict()
    assert len(held) > 10 and all(torch.equal(found[key], value) for key, value in held.items())


@pytest.mark.parametrize("backbone, arguments", [
    ("vit", {}), ("timm:vit_small_patch14_reg4_dinov2", {"backbone_kwargs": {"timm_args": TINY_VIT}})])
def test_another_image_size_fits_its_position_table(tmp_path, backbone, arguments, caplog):
    old, new = (model_of(backbone=backbone, size=size, **arguments) for size in ((64, 64), (96, 128)))
    save_checkpoint(tmp_path / "old.pt", {"model": old.state_dict(), "step": 3})
    with caplog.at_level("INFO"):
        assert init_from(new, tmp_path / "old.pt")
    assert "starting fresh: nothing" in caplog.text
    with torch.no_grad():
        assert new.eval()(torch.randn(1, 3, 96, 128)).final["depth"].isfinite().all()


def test_a_moving_average_is_preferred_and_foreign_files_are_refused(tmp_path):
    model = model_of()
    ema = MovingAverage(model, 0.5)
    with torch.no_grad():
        model.heads["depth"].bias.add_(1)
    save_checkpoint(tmp_path / "old.pt", {"model": model.state_dict(), "ema": ema.state_dict(), "step": 1})
    new = model_of()
    assert init_from(new, tmp_path / "old.pt")
    assert torch.equal(new.heads["depth"].bias, ema.module.heads["depth"].bias)
    torch.save({"model": {"a.b": torch.zeros(2)}}, tmp_path / "foreign.pt")
    with pytest.raises(ValueError, match="init_from .*foreign.pt: no tensor has the name and shape"):
        init_from(model_of(), tmp_path / "foreign.pt")


def test_a_run_starts_from_it(example_root, tmp_path, capsys):
    first = experiment(example_root, tmp_path, "max_iter=1", "version_name=first")
    train(first, resume=False)
    second = experiment(example_root, tmp_path, "max_iter=1", "version_name=second", "freeze=[encoder]",
                        f"init_from={first.run_dir / 'last.pt'}", "task_dictionary.include_normals=true")
    train(second, resume=False)
    said = capsys.readouterr().out
    old, new = (stored(config.run_dir / "last.pt")["model"] for config in (first, second))
    assert all(torch.equal(old[key], new[key]) for key in new if key.startswith("encoder."))
    assert any(not torch.equal(old[key], new[key]) for key in old if key.startswith("decoder."))
    assert "89 of the model's 97 tensors start from it" in said and "starting fresh: decoder.p" in said


# ------------------------------------------------------------ parts


def test_frozen_parts_keep_weights_and_statistics():
    model = model_of(backbone="hrnet", backbone_kwargs={"width": 8, "num_blocks": 1, "num_modules": (1, 1, 1),
                                                        "stem_blocks": 1})
    freeze(model, ["encoder", "heads.depth"])
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all(name.startswith(("decoder.", "heads.semseg.")) for name in trained)
    model.train()
    copied = MovingAverage(model, 0.5).module
    for one in (model, copied):
        one.train()
        assert one.decoder.training and not any(module.training for module in one.encoder.modules())
    before = copy.deepcopy(model.encoder.state_dict())
    model(torch.randn(2, 3, 64, 64)).final["semseg"].sum().backward()
    assert all(torch.equal(value, before[key]) for key, value in model.encoder.state_dict().items())


@pytest.mark.parametrize("parts, message", [
    (["encodr"], "freeze: the model has no part 'encodr' with parameters; did you mean 'encoder'"),
    (["encoder", "decoder", "heads"], "freeze: encoder, decoder, heads leaves nothing to train")])
def test_parts_that_cannot_be_frozen_are_named(parts, message):
    with pytest.raises(ValueError, match=message):
        freeze(model_of(), parts)


def groups_of(model, config):
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = parameter_groups(config, model)
    assert sorted(names[p] for group in groups for p in group["params"]) == sorted(names.values())
    return {names[p]: group for group in groups for p in group["params"]}


def test_by_default_there_is_one_group_with_everything(tmp_path):
    [group] = parameter_groups(settings(tmp_path), model_of())
    assert set(group) == {"params"}


def test_learning_rates_of_parts(tmp_path):
    found = groups_of(model_of(), settings(tmp_path, "lr_scale={encoder: 0.1, encoder.layers.3: 0.5, heads.depth: 2}"))
    for name, group in found.items():
        expected = 1 if name.startswith(("decoder", "heads.semseg")) else 2 if name.startswith("heads") else (
            0.5 if name.startswith("encoder.layers.3.") else 0.1)
        assert group.get("lr_scale", 1) == expected, name
    with pytest.raises(ValueError, match="lr_scale: the model has no part 'neck' with parameters"):
        groups_of(model_of(), settings(tmp_path, "lr_scale={neck: 0.1}"))
    with pytest.raises(ValueError, match="'lr_scale' must hold positive finite factors"):
        settings(tmp_path, "lr_scale={encoder: 0}")


@pytest.mark.parametrize("backbone, expected", [
    ("swin", {"encoder.patch_embed.proj.weight": 5, "encoder.layers.0.blocks.0.mlp.fc1.weight": 4,
              "encoder.layers.1.downsample.norm.weight": 3, "encoder.layers.3.blocks.0.norm1.bias": 1,
              "encoder.norm0.weight": 0, "heads.depth.weight": 0}),
    ("vit", {"encoder.pos_embed": 5, "encoder.blocks.0.attn.qkv.weight": 4, "encoder.blocks.3.norm2.bias": 1,
             "encoder.norm.weight": 0}),
    ("timm:test_resnet", {"encoder.net.conv1.0.weight": 5, "encoder.net.layer1.0.conv1.weight": 4,
                          "encoder.net.layer4.0.conv1.weight": 1}),
    ("timm:test_convnext", {"encoder.net.stem_0.weight": 10, "encoder.net.stages_0.blocks.0.gamma": 9}),
])
def test_learning_rates_fall_with_the_depth_of_the_backbone(tmp_path, backbone, expected):
    found = groups_of(model_of(backbone=backbone), settings(tmp_path, "layer_decay=0.5"))
    for name, depth in expected.items():
        assert found[name].get("lr_scale", 1) == 0.5**depth, name


def test_weight_decay_of_weights_only(tmp_path):
    model = model_of(decoder="bim", backbone="vit", neck="pyramid", neck_kwargs={"embed_dim": 8})
    found = groups_of(model, settings(tmp_path, "weight_decay_on=weights"))
    without = {name for name, group in found.items() if group.get("weight_decay") == 0}
    for name, parameter in model.named_parameters():
        plain = parameter.ndim >= 2 and not name.endswith(("pos_embed", "cls_token", ".A_log", ".D", "dt_proj_bias"))
        assert (name not in without) == plain, name


def test_updates_follow_the_groups(example_root, tmp_path):
    config = experiment(example_root, tmp_path, "max_iter=1", "optimizer=sgd", "optimizer_kwargs=null",
                        "optimizer_kwargs.lr=1e-3", "optimizer_kwargs.weight_decay=0", "lr_scale={decoder: 0.5}")
    plain = experiment(example_root, tmp_path, "max_iter=1", "optimizer=sgd", "optimizer_kwargs=null",
                       "optimizer_kwargs.lr=1e-3", "optimizer_kwargs.weight_decay=0", "version_name=plain")
    start = experiment(example_root, tmp_path, "max_iter=1", "optimizer_kwargs.lr=1e-30", "version_name=start",
                       "optimizer_kwargs.weight_decay=0")
    for one in (config, plain, start):
        train(one, resume=False)
    half, whole, before = (stored(one.run_dir / "last.pt")["model"] for one in (config, plain, start))
    for key, factor in (("decoder.project.depth.0.weight", 0.5), ("heads.depth.weight", 1.0)):
        torch.testing.assert_close(half[key] - before[key], factor * (whole[key] - before[key]), rtol=1e-3, atol=1e-8)
    with pytest.raises(ValueError, match=r"lr_scale.*ordered by these groups"):
        train(experiment(example_root, tmp_path, "max_iter=2", "optimizer=sgd", "optimizer_kwargs=null",
                         "lr_scale={decoder: 0.25}"), resume=True)
    assert rows(config, "train")[-1]["lr"] == pytest.approx(1e-3)


# ------------------------------------------------------------ schedules, optimizers


@pytest.mark.parametrize("name, options, expected", [
    ("cosine", {}, [1, (1 + math.cos(math.pi / 4)) / 2, 0.5, (1 - math.cos(math.pi / 4)) / 2]),
    ("cosine", {"warmup_iters": 2, "min_lr": 0.1}, [0.5, 1, 1, 0.55]),
    ("step", {"milestones": [1, 3], "gamma": 0.5}, [1, 0.5, 0.5, 0.25]),
    ("step", {"milestones": [2], "warmup_iters": 2}, [0.5, 1, 0.1, 0.1]),
])
def test_schedules_by_hand(name, options, expected):
    config = parse(SCHEDULES.options(name), options)
    config.check(4)
    schedule = SCHEDULES.load(name)(config, 1.0, 4)
    assert [schedule(step) for step in range(4)] == pytest.approx(expected)


@pytest.mark.parametrize("arguments, message", [
    (["scheduler=step"], "'scheduler_kwargs.milestones' must be one or more updates"),
    (["scheduler=step", "scheduler_kwargs={milestones: [4]}"], r"milestones' must be below max_iter \(4\), got \(4,\)"),
    (["scheduler=step", "scheduler_kwargs={milestones: [2, 1]}"], "numbers of at least 1 that rise"),
    (["scheduler=cosine", "scheduler_kwargs={warmup_iters: 4}"], r"must be below max_iter \(4\)"),
    (["optimizer=torch:RAdm"], "torch has no optimizer 'RAdm' for this; did you mean 'RAdam'"),
    (["optimizer=timm:lyon"], "timm has no optimizer 'lyon' for this; did you mean 'lion'"),
    (["optimizer=torch:LBFGS"], "torch has no optimizer 'LBFGS' for this"),
    (["optimizer=torch:RAdam", "optimizer_kwargs={betas: [0.9, 0.99]}"], "unknown key 'optimizer_kwargs.betas'"),
])
def test_mistakes_are_told_at_once(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        settings(tmp_path, *arguments)


@pytest.mark.parametrize("name, cls", [("torch:RAdam", "RAdam"), ("torch:NAdam", "NAdam"), ("timm:lion", "Lion"),
                                       ("timm:lamb", "Lamb"), ("timm:adafactor", "Adafactor")])
def test_optimizers_by_their_library_s_name(tmp_path, name, cls):
    model = model_of()
    config = settings(tmp_path, f"optimizer={name}", "optimizer_kwargs={lr: 1e-3, weight_decay: 0.1}",
                      "weight_decay_on=weights", "lr_scale={encoder: 0.5}")
    optimizer = build_optimizer(config, model, nn.Identity())
    assert type(optimizer).__name__ == cls and {group["lr"] for group in optimizer.param_groups} == {1e-3}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.1}
    assert {group.get("lr_scale", 1) for group in optimizer.param_groups} == {0.5, 1}
    before = model.heads["depth"].weight.detach().clone()
    model(torch.randn(2, 3, 64, 64)).final["depth"].square().sum().backward()
    optimizer.step()
    assert not torch.equal(before, model.heads["depth"].weight)


def test_an_argument_that_an_optimizer_lacks_is_named(tmp_path):
    config = settings(tmp_path, "optimizer=torch:RAdam", "optimizer_kwargs.arguments={beta: 1}")
    with pytest.raises(ValueError, match="optimizer 'torch:RAdam': .*'beta'"):
        build_optimizer(config, model_of(), nn.Identity())
    assert OPTIMIZERS.options("timm:lion")(name="lion").lr == 1e-4
