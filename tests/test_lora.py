"""Adapters of low rank: nothing changes at the start, merged equals unmerged, files hold what is trained alone."""

import copy
import dataclasses
import re

import pytest
import torch

from models.build import build_model
from models.decoders import DECODERS
from models.lora.layers import TaskLora, merge_adapters
from models.lora.settings import LoraSettings
from tests.test_pairs import BACKBONES, SMALL, VIT
from tests.watched_run import experiment, stored
from utils.engine.build import model_from_config, trained_model
from utils.engine.checkpoint import save_checkpoint
from utils.engine.first_weights import begin
from utils.engine.init_from import init_from
from utils.engine.train import train

pytest.importorskip("peft", reason="peft is not installed")
VIT_DECODERS = ("invpt", "mlore", "taskdiffusion", "taskprompter")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A file with the weights of the tiny FCN, and one with others."""
    folder = tmp_path_factory.mktemp("bases")
    for seed, name in enumerate(("base", "other")):
        torch.manual_seed(seed)
        state = model_from_config(experiment(folder, folder)).state_dict()
        save_checkpoint(folder / f"{name}.pt", {"model": state, "step": 1})
    return folder


def adapted(folder, *overrides):
    """A model on the tiny FCN's weights, in float64, and its base."""
    config = experiment(folder, folder, f"lora.base={folder / 'base.pt'}", "lora.rank=3", *overrides)
    model = model_from_config(config)
    base = begin(model, config, resumed=False)
    return model.double().eval(), base


def moved(model):
    """With everything that is trained somewhere else, as after a training."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def outputs(model, image):
    return list(model(image).final.values())


def furthest(ours, theirs):
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


# ------------------------------------------------------------ layers and models


@pytest.mark.parametrize("decoder", DECODERS)
def test_every_decoder(decoder, tmp_path):
    """An adapter in every layer of backbone and decoder that can have one: the identity, gradients, merged.

    Freezing alone makes PyTorch choose other products, and an addition changes the memory layout of maps of one
    channel; the identity is bit for bit where both are alike.
    """
    torch.manual_seed(0)
    name, arguments = BACKBONES["vit" if decoder in VIT_DECODERS else "swin"]
    config = experiment(tmp_path, tmp_path, f"lora.base={tmp_path / 'base.pt'}", "lora.rank=2",
                        "lora.parts=[encoder, decoder]", "lora.layers=[all]")
    config = dataclasses.replace(config, image_size=(64, 64), model=decoder)
    model = build_model(decoder, name, {"semseg": 5, "normals": 3}, (64, 64), model_kwargs=SMALL.get(decoder),
                        **arguments)
    save_checkpoint(tmp_path / "base.pt", {"model": model.state_dict(), "step": 1})
    plain, image = copy.deepcopy(model).double().eval(), torch.randn(2, 3, 64, 64, dtype=torch.float64)
    begin(model, config, resumed=False)
    model = model.double().eval()
    layers = sum(hasattr(module, "lora_A") for module in model.modules())
    assert layers > (3 if decoder in ("fcn", "multi_scale") else 10)
    before = outputs(plain.requires_grad_(False), image)
    with torch.no_grad():
        assert all(map(torch.equal, before, model.requires_grad_(False)(image).final.values()))


@pytest.mark.parametrize("overrides", [
    [], ["lora.task_rank=2"], ["lora.parts=[encoder, decoder, heads]", "lora.layers=[all]"],
    ["model=multi_scale", "lora.task_rank=2", "lora.layers=[qkv, fc2]", "lora.trained=[norms, biases]"],
    ["model=bim", "lora.parts=[encoder, decoder]", "lora.layers=[in_proj, qkv]"]])
def test_merged_equals_unmerged(root, overrides):
    torch.manual_seed(0)
    model, _ = adapted(root, *overrides)
    image = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    before = outputs(model, image)
    out = moved(model)(image)
    sum(part.square().mean() for part in out.final.values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    whole = copy.deepcopy(model)
    merge_adapters(whole)
    after = outputs(model, image)
    assert furthest(after, before) > 0.1 and furthest(after, outputs(whole, image)) < 1e-12
    assert not any("lora_" in name or "parametrizations" in name for name in whole.state_dict())
    assert furthest(after, outputs(model, image)) == 0           # a copy that is merged leaves the original alone


def test_tasks_have_maps_of_their_own(root):
    """A task's own adapters change its maps and no other's; the common one changes all."""
    torch.manual_seed(0)
    model, _ = adapted(root, "lora.task_rank=2")
    image = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    with torch.no_grad():
        before = model.encoder(image)
        assert furthest(before["semseg"], before["depth"]) < 1e-12
        for module in model.modules():
            if isinstance(module, TaskLora):
                module.up.weight.unflatten(0, (2, -1))[1].normal_()
        after = model.encoder(image)
        assert furthest(after["semseg"], before["semseg"]) < 1e-12
        assert all((a - b).abs().max() > 0.01 for a, b in zip(after["depth"], before["depth"], strict=True))
    keys = [key for key in model.state_dict() if ".up." in key]
    assert len(keys) == 2 * 4 * 4 and all(".semseg." in key or ".depth." in key for key in keys)


def test_what_is_trained(root):
    model, base = adapted(root, "lora.trained=[norms, encoder.patch_embed]", "freeze=[heads.depth]",
                          "lora.parts=[encoder, decoder]")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, _ in model.named_parameters():
        kept = "norm" in name or name.startswith(("encoder.patch_embed", "heads.semseg")) or ".project." in name and (
            ".1." in name)                                       # batch norms
        assert (name in trained) == (kept or "lora_" in name), name
    assert {key for key in base.keys if "heads" in key} == {"heads.depth.weight", "heads.depth.bias"}
    assert "decoder.project.depth.1.running_mean" not in base.keys
    model, base = adapted(root, "lora.trained=[]", "lora.parts=[encoder, decoder]")
    model.train()
    assert not model.decoder.project["depth"][1].training and model.encoder.layers[0].training
    assert "decoder.project.depth.1.running_mean" in base.keys


def test_layers_that_no_file_gave_are_trained_whole(root):
    model, base = adapted(root, "lora.parts=[encoder, decoder, heads]", "task_dictionary.include_normals=true")
    fresh = {name: p.requires_grad for name, p in model.named_parameters() if ".normals." in name}
    assert len(fresh) > 3 and all(fresh.values()) and not any(".normals." in key for key in base.keys)
    assert not model.heads["depth"].weight.requires_grad


@pytest.mark.parametrize("overrides, message", [
    (["lora.layers=[qvk]"], "lora.layers: none of the layers of encoder that a file gave is called qvk; did you mean "
                            "'qkv'"),
    (["lora.parts=[encodr]"], "lora.parts: the model has no part 'encodr'.*did you mean 'encoder'"),
    (["lora.trained=[encoder.patch]"], "lora.trained: the model has no part 'encoder.patch'"),
    (["model=bim", "lora.task_rank=1"], "model 'bim' does not take maps of every task's own; 'fcn' and 'mul"),
    (["lora.task_rank=1", "lora.layers=[patch_embed.proj]"], "no adapted layer lies in encoder.layers.0.blocks.0"),
    (["lora.task_rank=1", "lora.rank=0"], "'lora.task_rank' must be 0 where lora.rank is 0, got 1"),
    (["freeze=[encoder]"], "freeze stops encoder whole, adapters too"),
    (["lora.base=''"], "lora adapts weights that exist: set pretrained, init_from or lora.base"),
])
def test_what_cannot_be_is_refused(root, overrides, message):
    with pytest.raises(ValueError, match=message):
        adapted(root, *overrides)


@pytest.mark.parametrize("parts, overrides, message", [
    ({"model": "demt"}, ["lora.parts=[decoder]"],                # its queries read q, k and v one by one
     r"\d of these layers are read by their owners without being called.*\(decoder\.\w+\.\w+\..*qkv, \.\.\.\)"),
    ({"backbone": "vit", "backbone_kwargs": VIT}, ["lora.task_rank=1"],
     "backbone 'vit' cannot give every task maps of its own; Swin can")])
def test_models_that_cannot_are_refused(tmp_path, parts, overrides, message):
    config = experiment(tmp_path, tmp_path, f"lora.base={tmp_path / 'base.pt'}", "lora.rank=1", *overrides)
    config = dataclasses.replace(config, **parts)
    save_checkpoint(tmp_path / "base.pt", {"model": model_from_config(config).state_dict(), "step": 1})
    with pytest.raises(ValueError, match=message):
        begin(model_from_config(config), config, resumed=False)


# ------------------------------------------------------------ runs


def lora_run(example_root, tmp_path, root, name, *overrides):
    return experiment(example_root, tmp_path, f"lora.base={root / 'base.pt'}", "lora.rank=2", "lora.task_rank=1",
                      "optimizer_kwargs.lr=1e-2", "scheduler_kwargs.power=0", "ema_decay=0.5", f"version_name={name}",
                      *overrides)


def test_a_run_saves_what_is_trained_and_goes_on_bit_for_bit(example_root, tmp_path, root, capsys):
    for updates in (2, 4):
        stopped = lora_run(example_root, tmp_path, root, "stopped", f"max_iter={updates}")
        train(stopped, resume=updates == 4)
    other = lora_run(example_root, tmp_path, root, "other", "max_iter=4")
    train(other, resume=False)
    said = capsys.readouterr().out
    assert "lora: rank 2 on 16 layers of encoder, rank 1 for each task" in said
    last = stored(other.run_dir / "last.pt")
    again = stored(stopped.run_dir / "last.pt")
    assert last["model"].keys() == again["model"].keys() and last["base"]["source"] == str(root / "base.pt")
    assert all(torch.equal(last[part][key], again[part][key]) for part in ("model", "ema") for key in last[part])
    base, model = stored(root / "base.pt")["model"], last["model"]
    assert {key for key in model if key in base and torch.equal(model[key], base[key])} == set()
    assert not any(".mlp.fc1.weight" in key or "base_layer" in key for key in model)
    trained, whole = (int(word.replace(",", "")) for word in re.search(
        r" ([\d,]+) parameters, ([\d,]+) of them trained", said).group(2, 1))
    assert trained == sum(model[key].numel() for key in model if "running_" not in key and "num_batches" not in key)
    assert trained < whole
    model, _ = trained_model(other, other.run_dir / "last.pt", torch.device("cpu"))      # the average, merged
    assert sum(parameter.numel() for parameter in model.parameters()) > whole - trained
    with pytest.raises(ValueError, match=r"last.pt cannot be resumed with lora.rank: 2 -> 3 \(the adapters"):
        train(lora_run(example_root, tmp_path, root, "other", "max_iter=5", "lora.rank=3"), resume=True)
    with pytest.raises(ValueError, match=r"last.pt holds adapters for the weights of .*base.pt \(sha256 \w{12}\), but "
                                         r".*other.pt holds others"):
        trained_model(dataclasses.replace(other, lora=dataclasses.replace(other.lora, base=str(root / "other.pt"))),
                      other.run_dir / "last.pt", torch.device("cpu"))
    with pytest.raises(ValueError, match="last.pt: it holds adapters for .*base.pt and no whole model"):
        init_from(model, other.run_dir / "last.pt")
    plain = dataclasses.replace(other, lora=LoraSettings())
    with pytest.raises(ValueError, match="last.pt holds adapters for .*base.pt and no whole model"):
        trained_model(plain, other.run_dir / "last.pt", torch.device("cpu"))
    with pytest.raises(ValueError, match="base.pt was trained without adapters"):
        trained_model(other, root / "base.pt", torch.device("cpu"))
