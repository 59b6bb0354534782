"""MLoRE: reference numbers, folding and its twins, released checkpoints, training, what fits and what does not."""

import copy
import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from models.blocks.mlore import LowRankExperts, OwnExperts, UpsampledConv
from models.build import build_backbone, build_model
from models.decoders.mlore import MLoREConfig
from scripts.bench_mlore import differences, measure
from scripts.check_parity import main as check_parity
from tests.shared import ROOT, assert_same_weights, golden
from tests.test_train import rows
from utils.engine.build import model_from_config, trained_model
from utils.engine.checkpoint import convert_released
from utils.engine.config import load_config
from utils.engine.predict import infer
from utils.engine.train import train
from utils.options import parse

NYUD, PASCAL = (str(ROOT / "configs" / f"mlore_{name}.yml") for name in ("nyud", "pascal"))
NARROW = {"final_embed_dim": 12, "rank_list": (1, 2, 3, 5), "topk": 2, "spe_rank": 2}
VIT = {"embed_dim": 16, "depth": 4, "num_heads": 2, "patch_size": 8}
SMALL = ["backbone=vit", "backbone_kwargs={embed_dim: 16, depth: 4, num_heads: 2, patch_size: 8}",
         "model_kwargs={final_embed_dim: 12, rank_list: [1, 2, 3, 5], topk: 2, spe_rank: 2}"]
TASKS = {"semseg": 5, "depth": 1, "edge": 1}
CPU = torch.device("cpu")


def build(tasks=TASKS, size=(32, 48), vit=VIT, **options):
    """A small model in eval mode whose norms are not the identity."""
    torch.manual_seed(0)
    model = build_model("MLoRE", "vit", tasks, size, backbone_kwargs=vit, model_kwargs={**NARROW, **options})
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for values in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                nn.init.uniform_(values, 0.5, 1.5)
    return model.eval()


# ------------------------------------------------------------ reference numbers


@pytest.mark.parametrize("dtype, only, count", [
    ("float64", "_small/", 18), ("float64", "_e15_", 5), ("float32", "nyud_small/training", 3),
    ("float64", "pascal_vitSp16", 1)])
def test_everything_agrees_with_the_original(dtype, only, count, capsys):
    code = check_parity(["--golden", str(golden("mlore")), "--dtype", dtype, "--only", only])
    out = capsys.readouterr().out
    assert code == 0, "\n".join(line for line in out.splitlines() if "FAIL" in line)
    assert f"{count} passed, 0 failed, 0 not covered" in out


BLOCK = "backbone.MLoRE_2.1."


@pytest.mark.parametrize("part, key, only, failing", [
    ("state", BLOCK + "lora_list_1.3.M.bias", "outputs of", 1), ("state", "backbone.pos_embed", "outputs of", 1),
    ("state", BLOCK + "router_1.edge.0.ln_sp.weight", "outputs of float64", 1),
    ("io", "eval.mid.MLoRE_1.3.depth.gate", "features", 1), ("io", "train64.cv", "training of float64", 1),
    ("reparam", "folded_kernel.backbone.MLoRE_1.0.lora_list_1.0.weight", "folding", 1)])
def test_one_changed_array_of_a_renamed_case_fails(tmp_path, capsys, part, key, only, failing):
    for path in golden("mlore").glob("nyud_small.*"):
        shutil.copyfile(path, tmp_path / path.name.replace("nyud_small", "another"))
    path = tmp_path / f"another.{part}.safetensors"
    save_file({name: x * (1 + 1e-4) if name == key else x for name, x in load_file(path).items()}, path)
    assert check_parity(["--golden", str(tmp_path), "--only", f"another/{only}"]) == 1
    assert f"0 passed, {failing} failed" in capsys.readouterr().out


@pytest.mark.parametrize("path, entry", [
    ("mlore_nyud", "nyud_vitLp16"), ("mlore_pascal", "pascal_vitLp16"),
    ("backbones/mlore_pascal_vit_base", "pascal_vitBp16"), ("backbones/mlore_pascal_vit_small", "pascal_vitSp16")])
def test_shipped_files_build_the_published_models(path, entry):
    entry = json.loads((golden("mlore") / "manifest_full.json").read_text())[f"{entry}_MLoRE"]
    config, published = load_config(ROOT / "configs" / f"{path}.yml"), entry["config"]
    with torch.device("meta"):
        model = model_from_config(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    released, _ = convert_released({k: torch.empty(s, device="meta") for k, s in entry["state_dict"].items()})
    assert {k: x.shape for k, x in released.items()} == {k: x.shape for k, x in model.state_dict().items()}
    row = published["embed_dim"]                                        # of a class token that is not there
    assert count + row + entry["params_never_used_in_forward"] == entry["total_params"]
    assert list(config.input_size) == published["img_size"]
    assert model.encoder.taps == (*published["select_list"], published["depth"])
    assert model.decoder.first[0].router.mask_first == published["pre_softmax"]
    # What a file of the original without a list of ranks gets.
    assert list(MLoREConfig(published["final_embed_dim"]).ranks) == published["rank_list"]


# ------------------------------------------------------------ fast forms and their plain twins


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float = 1e-12) -> bool:
    return torch.allclose(got, want, rtol=0, atol=tolerance * max(want.abs().max().item(), 1e-3))


def gradients(run, module: nn.Module, *inputs: torch.Tensor) -> list[torch.Tensor]:
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = run(*inputs)
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(out.shape, generator=generator, dtype=out.dtype)
    return [out, *torch.autograd.grad((out * weight).sum(), [*inputs, *module.parameters()])]


def test_fused_experts_are_the_sum_of_single_ones():
    experts = LowRankExperts(6, (1, 4, 2)).double()
    nn.init.normal_(experts.up_bias)
    nn.init.normal_(experts.down.bias)
    feat, gates = torch.randn(3, 6, 4, 5).double(), torch.randn(3, 3).double()
    forms = (gradients(run, experts, feat, gates) for run in (experts, experts.plain))
    pairs = zip(*forms, strict=True)
    assert all(close(got, want) for got, want in pairs)
    kernels, biases = experts.kernels()
    for i, (kernel, bias) in enumerate(zip(kernels, biases, strict=True)):
        alone = torch.eye(3).double()[i].expand(3, 3)
        assert close(torch.nn.functional.conv2d(feat, kernel, bias, padding=1), experts(feat, alone))


def test_experts_start_as_published():
    experts, own = LowRankExperts(64, (4, 100)), OwnExperts(3, 64, 4)
    assert not experts.up_bias.any() and not experts.down.bias.any()
    assert own.up_bias.abs().min() > 0 and own.down.bias.any()
    assert 0.45 < own.up.abs().max() <= 0.5 and 0.95 < own.down.weight.abs().max() * (64 * 9) ** 0.5 <= 1
    small, large = experts.up.split((4, 100), dim=1)                    # bound 1 / sqrt(rank)
    assert 0.4 < small.abs().max() <= 0.5 and 0.09 < large.abs().max() <= 0.1


def test_own_experts_are_convolutions_scaled_by_their_factors():
    experts = OwnExperts(3, 6, 2).double()
    feat, factor = torch.randn(2, 18, 4, 5).double(), torch.randn(2, 3).double()
    maps = experts(feat, factor).chunk(3, dim=1)
    for index, (kernel, bias) in enumerate(zip(*experts.kernels(), strict=True)):
        want = torch.nn.functional.conv2d(feat.chunk(3, dim=1)[index], kernel, bias, padding=1)
        assert close(maps[index], want * factor[:, index, None, None, None])


@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize("size", [(1, 1), (3, 5), (4, 2)])
def test_convolution_on_the_small_grid(scale, size):
    conv = UpsampledConv(3, 4, scale).double()
    feat = torch.randn(2, 3, *size).double()
    pairs = zip(gradients(conv, conv, feat), gradients(conv.plain, conv, feat), strict=True)
    assert all(close(got, want) for got, want in pairs)


@pytest.mark.parametrize("pre_softmax", [True, False])
def test_folded_equals_unfolded(pre_softmax):
    model = build(pre_softmax=pre_softmax).double()
    image = torch.randn(3, 3, 32, 48).double()
    keys = set(model.state_dict())
    with torch.no_grad():
        want = model(image)
        got = model.prepare_for_inference()(image)
    assert all(module.folded is not None for module in (*model.decoder.first, *model.decoder.second))
    assert all(close(got.final[task], want.final[task], 1e-10) for task in TASKS)
    assert close(got.extra["load_balancing"], want.extra["load_balancing"], 1e-10)
    assert set(model.state_dict()) == keys


def test_every_published_width_folds():
    """That of ViT-S with numbers; those of ViT-B and ViT-L by shape."""
    model = build({"depth": 1, "edge": 1}, vit={**VIT, "taps": (4,)}, final_embed_dim=192, rank_list=(), topk=9,
                  spe_rank=32).double()
    image = torch.randn(1, 3, 32, 48).double()
    with torch.no_grad():
        want = model(image).final
        got = model.prepare_for_inference()(image).final
        assert all(close(got[task], want[task], 1e-10) for task in want)
    for name in ("backbones/mlore_nyud_vit_base", "mlore_nyud"):
        config = load_config(ROOT / "configs" / f"{name}.yml")
        with torch.device("meta"):
            model = model_from_config(config).prepare_for_inference()
            assert model(torch.empty(2, 3, 448, 576)).final["semseg"].shape == (2, 40, 448, 576)


def test_folding_does_not_outlive_its_weights():
    model, other, image = build(), build(), torch.randn(1, 3, 32, 48)
    for values in other.decoder.parameters():
        nn.init.normal_(values, std=0.3)
    model.prepare_for_inference()
    with torch.no_grad():
        first = model(image).final["depth"]
        model.load_state_dict(other.state_dict())
        assert close(model(image).final["depth"], other(image).final["depth"], 1e-6)
        assert not close(model(image).final["depth"], first, 1e-2)
    copied = copy.deepcopy(model.prepare_for_inference())
    model.train()
    assert model.decoder.first[0].folded is None and copied.decoder.first[0].folded is not None
    with pytest.raises(AssertionError, match="call eval"):
        model.decoder.reparameterise()


def test_folding_can_be_declined():
    model = build(fold=False).prepare_for_inference()
    assert model.decoder.first[0].folded is None


def test_folding_in_mixed_precision():
    model, image = build(), torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        want = model(image).final
        with torch.autocast("cpu", torch.bfloat16):
            got = model.prepare_for_inference()(image).final
    assert all(close(got[task].float(), want[task], 0.1) for task in TASKS)


def test_the_forms_that_are_timed_agree(tiny):
    config = load_config(NYUD, [*tiny, *SMALL, "backbone_kwargs.taps=[4]"])
    assert max(differences(config).values()) < 1e-12
    assert all(wall > 0 for wall, _ in measure(config, repeats=1).values())
    with pytest.raises(ValueError, match="'bim' is not an MLoRE"):
        measure(load_config(str(ROOT / "configs" / "bim_nyud.yml"), tiny), repeats=1)


# ------------------------------------------------------------ gates


def test_gates():
    image = torch.randn(4, 3, 32, 48)
    for pre_softmax in (True, False):
        module = build(pre_softmax=pre_softmax).decoder.first[0]
        feat = torch.randn(4, 3 * 12, 4, 6)
        gate, factor = module.router(feat)
        assert factor.shape == (3, 4, 1) and ((gate > 0).sum(dim=2) == NARROW["topk"]).all()
        assert torch.allclose(gate.sum(dim=2), torch.ones(3, 4)) == pre_softmax and gate.sum(dim=2).max() < 1 + 1e-6
        assert torch.equal(module.router(feat)[0], gate)          # nothing is random in eval mode
        noisy = module.router.train()(feat)[0]
        assert not torch.allclose(noisy, gate)
    assert build()(image).extra["load_balancing"].shape == ()


def test_the_common_path_sends_no_gradient_back():
    module = build().decoder.first[0]
    for part in (module.experts, module.own_expert):
        for values in part.parameters():
            nn.init.zeros_(values)
    feat = torch.randn(2, 3 * 12, 4, 6, requires_grad=True)
    module(feat)[0].square().sum().backward()
    assert module.generic.weight.grad.any() and not feat.grad.any()


# ------------------------------------------------------------ released checkpoints

TO_ORIGINAL = [
    (r"^encoder\.", "backbone."), (r"^decoder\.tap_proj\.", "backbone.fea_fuse."),
    (r"^decoder\.mix\.", "backbone.task_mask."), (r"^decoder\.first\.", "decoder.MLoRE_1."),
    (r"^decoder\.second\.", "decoder.MLoRE_2."), (r"^decoder\.(MLoRE_.\.\d)\.", r"backbone.\1."),
    (r"\.proj_in\.", ".conv1."), (r"\.proj_out\.", ".conv3."), (r"\.generic\.", ".share_conv."),
    (r"\.mixture_norm\.", ".bn_all."), (r"(MLoRE_.\.\d)\.norm\.", r"\1.bn."), (r"\.own_expert\.", ".conv2."),
    (r"\.router\.(\w+)\.logits\.", r".router_1.\1.1."), (r"\.router\.(\w+)\.", r".router_1.\1.0."),
    (r"\.pixel_in\.", ".conv1."), (r"\.pixel_norm\.", ".ln."), (r"\.pixel_out\.", ".conv3."),
    (r"\.pool\.", ".convsp."), (r"\.pool_norm\.", ".ln_sp."), (r"\.pool_out\.", ".conv2."),
    (r"^heads\.(\w+)\.conv\.", r"heads.\1.mt_proj.0."), (r"^heads\.(\w+)\.norm\.", r"heads.\1.mt_proj.1."),
    (r"^heads\.(\w+)\.proj\.", r"heads.\1.linear_pred."),
]
PAIR = {"down.weight": "W.weight", "down.bias": "W.bias", "up": "M.weight", "up_bias": "M.bias"}
DEAD = ["aux_heads.edge.linear_pred.bias", "backbone.q_fuse.edge.weight", "backbone.classify_route_1.bias",
        "backbone.MLoRE_1.0.lora_list_1.0.virt_conv.weight"]


def as_released(model, path):
    """Writes a model's weights as the original code would, with `module.` in front and an optimiser beside them."""
    original, ranks = {key: torch.randn(3) for key in DEAD}, model.decoder.first[0].experts.ranks
    for key, value in model.state_dict().items():
        name = key
        for old, new in TO_ORIGINAL:
            name = re.sub(old, new, name)
        tail = next((tail for tail in PAIR if ("expert" in key) and key.endswith(f".{tail}")), None)
        if tail is not None:
            sizes = ([1] * len(ranks) if tail == "up_bias" else list(ranks)) if ".experts." in key else [len(value)]
            parts = value.split(sizes, dim=1) if tail == "up" and ".experts." in key else (
                [value] if tail == "up" else value.split(sizes))
            for index, part in enumerate(parts):
                shaped = part[:, :, None, None] if tail == "up" else part[0] if tail == "up_bias" else part
                place = name.replace(".experts.", f".lora_list_1.{index}.").removesuffix(tail) + PAIR[tail]
                original[place] = shaped.clone()
        elif key == "encoder.pos_embed":
            original[name] = torch.cat((torch.randn_like(value[:, :1]), value), dim=1)
        else:
            is_conv = "router" in key and value.ndim == 2 and ".pool." not in key
            original[name] = value[:, :, None, None] if is_conv else value
    torch.save({"model": {f"module.{key}": value for key, value in original.items()},
                "optimizer": torch.optim.Adam(model.parameters()).state_dict(), "epoch": 75, "iter_count": 39999}, path)
    return path


def test_a_released_checkpoint_loads_and_is_folded(tiny, tmp_path, caplog):
    config = load_config(PASCAL, [*tiny, *SMALL])
    torch.manual_seed(0)
    model = model_from_config(config).eval()
    path = as_released(model, tmp_path / "checkpoint.pth.tar")
    with caplog.at_level("INFO"):
        loaded, _ = trained_model(config, path, CPU)
    assert f"loaded {len(model.state_dict())} / missing 0 / unexpected 0 / ignored 4 without effect" in caplog.text
    assert_same_weights(loaded, model)
    assert loaded.decoder.second[3].folded is not None
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert all(close(loaded(image).final[task], want, 1e-5) for task, want in model(image).final.items())


def test_a_wrong_pairing_says_what_the_file_holds(tiny, tmp_path):
    path = as_released(model_from_config(load_config(NYUD, [*tiny, *SMALL])), tmp_path / "checkpoint.pth.tar")
    with pytest.raises(ValueError, match=r"holds the released MLoRE \(tasks .*; ViT of 4 blocks and 16 channels"):
        trained_model(load_config(PASCAL, [*tiny, *SMALL]), path, CPU)


def test_pretrained_weights_lose_their_class_token():
    donor = build_backbone("vit", (32, 32), VIT)
    backbone = build_backbone("vit", (32, 48), VIT | {"class_token": False})
    state = backbone.convert_state_dict(donor.state_dict())
    assert set(state) == set(backbone.state_dict()) and backbone.pos_embed.shape == (1, 24, 16)
    backbone.load_state_dict(state)
    whole = build_backbone("vit", (32, 48), VIT).convert_state_dict(donor.state_dict())
    assert torch.equal(state["pos_embed"], whole["pos_embed"][:, 1:])
    assert torch.equal(backbone.convert_state_dict(backbone.state_dict())["pos_embed"], state["pos_embed"])
    assert backbone(torch.randn(1, 3, 32, 48))[0].shape == (1, 16, 4, 6)


# ------------------------------------------------------------ training


@pytest.mark.parametrize("config_file, pre_softmax", [(NYUD, True), (PASCAL, False)])
def test_a_small_one_trains_and_is_evaluated_folded(tiny, config_file, pre_softmax):
    config = load_config(config_file, [*tiny, *SMALL, f"model_kwargs.pre_softmax={pre_softmax}", "boundary_infer=off",
                                       "backbone_kwargs.taps=[2, 4]", "max_iter=20", "val_interval=20"])
    results = train(config, resume=False)
    first, *rest = rows(config.run_dir, "train")
    weights = config.loss_kwargs.loss_weights
    total = sum(weights[task] * first[f"loss/{task}"] for task in config.tasks) + first["loss/load_balancing"]
    assert first["loss/total"] == pytest.approx(total, rel=1e-5) and first["loss/load_balancing"] > 0
    for key in ("loss/semseg", "loss/normals"):
        assert sum(row[key] for row in rest[-3:]) / 3 < first[key]
    folded = infer(config, config.run_dir / "last.pt", config.run_dir / "infer")
    for task, scores in results.items():
        assert folded[task] == pytest.approx(scores, rel=1e-3)


def test_every_parameter_is_trained():
    model = build().train()
    out = model(torch.randn(2, 3, 32, 48))
    (sum(logits.square().mean() for logits in out.final.values()) + out.extra["load_balancing"]).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


# ------------------------------------------------------------ options and fit


@pytest.mark.parametrize("tasks", [{"depth": 1}, {"semseg": 3, "sal": 2}])
@pytest.mark.parametrize("taps", [(4,), (1, 2, 4)])
def test_any_tasks_and_taps(tasks, taps):
    model = build(tasks, (16, 40), {**VIT, "taps": taps})
    out = model.prepare_for_inference()(torch.randn(1, 3, 16, 40)).final
    assert {task: tuple(x.shape) for task, x in out.items()} == {t: (1, n, 16, 40) for t, n in tasks.items()}


@pytest.mark.parametrize("backbone, arguments, message", [
    ("swin_tiny", {}, r"backbone 'swin_tiny': .* needs maps of one stride.*strides \(4, 8, 16, 32\)"),
    ("vit_small", {"neck": "pyramid", "neck_kwargs": {"embed_dim": 8}}, r"needs maps of one stride.*\(4, 8,"),
    ("vit_small", {"model_kwargs": {"top_k": 3}}, "did you mean 'topk'"),
])
def test_parts_that_do_not_fit(backbone, arguments, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        build_model("MLoRE", backbone, TASKS, (64, 128), **arguments)


@pytest.mark.parametrize("options, message", [
    ({"final_embed_dim": 30}, "final_embed_dim' must be a multiple of 4, got 30"),
    ({"topk": 16}, "topk' must be 1 to 15, the number of experts in rank_list, got 16"),
    ({"topk": 0}, "topk' must be 1 to 15"), ({"spe_rank": 0}, "spe_rank' must be a whole number of at least 1"),
    ({"rank_list": (4,)}, "rank_list' must be two or more ranks of at least 1"), ({"rank_list": 4}, "must be a list"),
    ({"rank_list": (0, 4)}, "ranks of at least 1"),
    ({"load_balancing_weight": -1}, "load_balancing_weight' must be a number of at least 0")])
def test_option_values_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        parse(MLoREConfig, options)
