"""MTMamba and MTMamba++ equal the original: whole models, blocks, sizes, recipes; and they train here."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from models.build import build_model
from models.decoders.coarse_to_fine import stage_rates
from models.decoders.mtmamba import CTMBlock, GatedSS2D, MTMambaConfig, PlainSS2D
from models.decoders.mtmamba_plus import MTMambaPlusConfig, SCTMBlock
from models.released.mtmamba import MTMAMBA
from scripts.check_parity import main
from scripts.parity.base import Folder, Options, scaled_error
from scripts.parity.mtmamba import checks
from tests.shared import ROOT, golden
from utils.engine.checkpoint import load_model, read_checkpoint
from utils.engine.config import load_config
from utils.engine.train import train

CASES = ("nyud_mtmamba", "pascal_mtmamba_plus", "cityscapes_mtmamba_plus")
MODELS = ("mtmamba", "mtmamba_plus")
DATASETS = ("nyud", "pascal", "cityscapes")
TINY_SWIN = {"embed_dim": 8, "depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2), "window_size": 4}
TINY_VIT = {"embed_dim": 16, "depth": 4, "num_heads": 2}


def tiny_model(name: str, backbone: str = "swin", size=(64, 96), **options):
    parts = {"swin": {"backbone_kwargs": TINY_SWIN},
             "vit": {"backbone_kwargs": TINY_VIT, "neck": "pyramid", "neck_kwargs": {"embed_dim": 8}}}
    return build_model(name, backbone, {"semseg": 4, "normals": 3}, size,
                       model_kwargs={"d_state": 2, **options}, **parts[backbone])


# ------------------------------------------------------------ numbers of the original


@pytest.fixture(scope="module")
def references():
    return {check.case: check for check in checks(Folder(golden("mtmamba")))}


def compare(check, dtype: torch.dtype) -> None:
    measures = list(check.run(Options(dtype)))
    assert measures and not [m for m in measures if m.uncovered or not m.passed]


@pytest.mark.parametrize("part", ["features", "outputs", "gradients"])
@pytest.mark.parametrize("case", CASES)
def test_models_equal_the_original_in_float64(references, case, part):
    compare(references[f"{case}/{part}"], torch.float64)


@pytest.mark.parametrize("part", ["inside", "training"])
@pytest.mark.parametrize("case", CASES)
def test_models_equal_the_original_in_float32(references, case, part):
    compare(references[f"{case}/{part}"], torch.float32)


@pytest.mark.parametrize("name", [f"{model}_{dataset}" for model in MODELS for dataset in DATASETS])
def test_published_configurations_have_the_published_size(references, name):
    """Every released parameter has its place; counts, GMACs and scan updates agree."""
    compare(references[f"manifest_full/{name}"], torch.float32)


@pytest.mark.parametrize("name", ["nyud_log", "nyud_weighted_sum", "pascal_log", "cityscapes_log"])
def test_losses_equal_the_original(references, name):
    compare(references[f"losses_{name}"], torch.float64)


@pytest.fixture
def copied(tmp_path) -> Path:
    """A copy of the smallest case under another name."""
    for path in golden("mtmamba").glob("cityscapes_mtmamba_plus.*"):
        shutil.copy(path, tmp_path / path.name.replace("cityscapes_mtmamba_plus", "other"))
    return tmp_path


@pytest.mark.parametrize("key, part", [
    ("block_stm.depth_1.1.op.dt_projs_bias", "outputs"), ("block_ctm.2.0.conv_share.1.weight", "inside"),
    ("final_expand.semseg.1.running_var", "outputs"), ("backbone.norm2.weight", "features")])
def test_a_slightly_wrong_weight_is_noticed(copied, capsys, key, part):
    state = load_file(copied / "other.state.safetensors")
    state[key].flatten()[0] *= 1.1
    save_file(state, copied / "other.state.safetensors")
    assert main(["--golden", str(copied), "--only", f"other/{part}"]) == 1
    assert re.search(rf"other/{part} .*FAIL", capsys.readouterr().out)


def test_a_point_that_does_not_exist_is_listed(copied, capsys):
    values = load_file(copied / "other.io.safetensors")
    save_file(values | {"eval.dec.0.depth.stm7": torch.zeros(1)}, copied / "other.io.safetensors")
    assert main(["--golden", str(copied), "--only", "other/inside", "--dtype", "float32"]) == 0
    assert "dec.0.depth.stm7: no such point" in capsys.readouterr().out


BLOCKS = {  # of one task
    "ss2d_stm_5x3": lambda channels: GatedSS2D(1, channels),
    "ss2d_stm_1x6_dtrank2": lambda channels: GatedSS2D(1, channels),
    "ss2d_fctm_3x5": lambda channels: PlainSS2D(1, channels, channels),
    "ss2d_fctm_4x6_rate3": lambda channels: PlainSS2D(1, 3 * channels, channels),
    "ss2d_sctm_4x7": lambda channels: GatedSS2D(1, channels, steered=True),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_mamba_blocks_equal_the_original(name):
    """Values and all gradients of the three blocks, in float64."""
    data = load_file(golden("selective_scan") / f"{name}.safetensors")
    block = BLOCKS[name](len(data["param.out_norm.weight"]) // 2).double()  # inner width is twice the block's

    def ours(prefix: str) -> dict[str, torch.Tensor]:
        """The block's tensors, named as if they were in a self-task block of a released file."""
        there, here = "block_1.semseg_0.op.", "decoder.stm.0.stm.semseg.0.ss2d."
        part = {there + key.removeprefix(prefix): x for key, x in data.items() if key.startswith(prefix)}
        return {key.removeprefix(here): value for key, value in MTMAMBA.convert(part, ["semseg"]).items()}

    block.load_state_dict(ours("param."))
    inputs = [data[f"in.{key}"].requires_grad_() for key in ("x", "x_cross") if f"in.{key}" in data]
    y = block(inputs[0][None], *inputs[1:])[0]
    assert scaled_error(y, data["out.y"]) < 1e-12
    (y * data["cot.y"]).sum().backward()
    for key, value in zip(("x", "x_cross"), inputs, strict=False):
        assert scaled_error(value.grad, data[f"grad.{key}"]) < 1e-11
    wanted = ours("grad.param.")
    assert wanted.keys() == dict(block.named_parameters()).keys()
    for key, parameter in block.named_parameters():
        assert scaled_error(parameter.grad, wanted[key]) < 1e-11, key


# ------------------------------------------------------------ released files


def test_released_names_are_recognised():
    for case in CASES:
        assert MTMAMBA.recognises(load_file(golden("mtmamba") / f"{case}.state.safetensors"))
    assert not MTMAMBA.recognises(tiny_model("mtmamba").state_dict())
    assert not MTMAMBA.recognises(["backbone.patch_embed.projection.weight", "heads.semseg.weight"])


def test_unknown_names_stay():
    key = "block_9.semseg_0.norm.weight"
    assert list(MTMAMBA.convert({key: torch.ones(1)}, ["semseg"])) == [key]


@pytest.mark.parametrize("name, lr, decay, steps", [
    ("mtmamba_nyud", 1e-4, 1e-5, 50000), ("mtmamba_pascal", 1e-4, 1e-5, 50000),
    ("mtmamba_cityscapes", 1e-4, 1e-6, 40000), ("mtmamba_plus_nyud", 2e-5, 1e-6, 40000),
    ("mtmamba_plus_pascal", 8e-5, 1e-6, 40000), ("mtmamba_plus_cityscapes", 1e-4, 1e-6, 40000)])
def test_recipes_are_the_published_ones(name, lr, decay, steps):
    config = load_config(ROOT / "configs" / f"{name}.yml")
    assert (config.version_name, config.model) == (name, name.rpartition("_")[0])
    optimizer, scheduler = config.optimizer_kwargs, config.scheduler_kwargs
    assert (config.optimizer, optimizer.lr, optimizer.weight_decay) == ("adamw", lr, decay)
    assert (config.max_iter, scheduler.power, scheduler.warmup_iters) == (steps, 0.9, 0)
    assert (config.trBatch, config.global_batch, config.loss_kwargs.loss_scope) == (1, 8, "image")
    assert config.backbone == "swin_large" and config.pretrained is True
    weighted = name == "mtmamba_plus_nyud"
    assert config.loss_kwargs.loss_scheme == ("weighted_sum" if weighted else "log")
    weights = {"semseg": 1, "depth": 1, "normals": 10, "edge": 50} if weighted else {}
    assert config.loss_kwargs.loss_weights == weights
    assert config.dataset.label_size == ((1024, 2048) if "cityscapes" in name else None)


# ------------------------------------------------------------ behaviour


def test_stochastic_depth_falls_from_the_first_branch_to_none():
    rates = [[0.2, 0.175, 0.15], [0.125, 0.1, 0.075], [0.05, 0.025, 0]]
    for got, want in zip(stage_rates(MTMambaConfig().drop_path_rate, MTMambaConfig().stm_depth), rates, strict=True):
        assert got == pytest.approx(want, abs=1e-7)
    model = tiny_model("mtmamba_plus")
    stage = model.decoder.stm[0].stm
    assert [block.drop_path.drop_prob for block in stage] == pytest.approx([0.2, 0.175])
    assert model.decoder.ctm[1].drop_path.drop_prob == pytest.approx(0.075)


@pytest.mark.parametrize("block, config", [(CTMBlock, MTMambaConfig(d_state=2)),
                                           (SCTMBlock, MTMambaPlusConfig(d_state=2))])
def test_a_dropped_branch_is_dropped_for_one_sample_of_one_task(block, config):
    torch.manual_seed(0)
    block = block(["a", "b"], 8, 0.5, config).train()
    feats = torch.randn(2, 16, 2, 3, 8)
    dropped = (block(feats) == feats).flatten(2).all(2)  # (T, B)
    assert all(0 < mask.sum() < 16 for mask in dropped)
    assert not torch.equal(*dropped)


def test_the_gate_chooses_between_the_shared_and_the_own_branch():
    """An open gate leaves no trace of the task's own scan, a closed one none of the shared scan."""
    torch.manual_seed(0)
    block = CTMBlock(["a", "b"], 8, 0.0, MTMambaConfig(d_state=2)).eval()
    feats = torch.randn(2, 2, 3, 5, 8)
    nn.init.constant_(block.norm.weight[:8], 0)
    nn.init.constant_(block.norm.bias[:8], 1)
    for sign, silent, heard in ((1, block.ss2d, block.shared), (-1, block.shared, block.ss2d)):
        nn.init.constant_(block.gate.weight, sign * 1e3)
        before = block(feats)[0]
        for branch, matters in ((silent, False), (heard, True)):
            with torch.no_grad():
                branch.core.norm.bias.add_(1)
            assert torch.equal(block(feats)[0], before) != matters


@pytest.mark.parametrize("model", MODELS)
def test_tasks_meet_in_the_cross_task_block_only(model):
    decoder = tiny_model(model).eval().decoder
    feats = torch.randn(2, 1, 2, 3, 64, requires_grad=True)
    refined = decoder.stm[0](feats, torch.randn(1, 4, 6, 32))
    alone, = torch.autograd.grad(refined[0].square().sum(), feats, retain_graph=True)
    assert alone[0].any() and not alone[1].any()
    together, = torch.autograd.grad(decoder.ctm[0](refined)[0].square().sum(), feats)
    assert all(grad.any() for grad in together)


@pytest.mark.parametrize("backbone", ["swin", "vit"])
@pytest.mark.parametrize("model", [*MODELS, "MTMamba++"])
def test_any_backbone_serves_and_every_parameter_learns(model, backbone):
    model = tiny_model(model, backbone, stm_depth=1)
    out = model(torch.randn(2, 3, 64, 96)).final
    assert {task: value.shape for task, value in out.items()} == {
        "semseg": (2, 4, 64, 96), "normals": (2, 3, 64, 96)}
    sum(value.square().mean() for value in out.values()).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]


def test_heads_start_as_published():
    head = tiny_model("mtmamba_plus").heads["semseg"]
    assert head.conv.weight.shape == (96, 8, 3, 3)
    assert head.conv.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert tiny_model("mtmamba").heads["semseg"].expand.proj.bias is None


@pytest.mark.parametrize("model", ["bim", "mtmamba", "mtmamba_plus"])
def test_icnr_starts_the_pixels_of_a_block_alike_and_nothing_else_otherwise(model):
    starts = {}
    for init in ("plain", "icnr"):
        torch.manual_seed(0)
        starts[init] = tiny_model(model, upsample_init=init)
    plain, icnr = (built.state_dict() for built in starts.values())
    expands = {key for key in plain if re.search(r"\bexpand\.(\w+\.)?proj\.weight$", key)}
    assert len(expands) == 2 * (3 if model == "mtmamba_plus" else 4)  # of two tasks: three stages, and heads
    for key in plain:
        if key not in expands:
            assert torch.equal(plain[key], icnr[key]), key
            continue
        pixels = 16 if key.startswith("heads") else 4
        weights, drawn = (state[key].unflatten(0, (pixels, -1)) for state in (icnr, plain))
        assert torch.equal(weights, drawn[:1].expand_as(drawn)) and not torch.equal(weights, drawn), key
    if model != "mtmamba_plus":
        out = starts["icnr"].eval()(torch.randn(1, 3, 64, 96)).final["semseg"].unfold(2, 4, 4).unfold(3, 4, 4)
        assert torch.equal(out, out[..., :1, :1].expand_as(out))


@pytest.mark.parametrize("options, message", [
    ({"stm_depth": 0}, "model 'mtmamba.plus': 'model_kwargs.stm_depth' must be a whole number of at least 1, got 0"),
    ({"stm_depth": 1.5}, "stm_depth' must be a whole number, got 1.5"),
    ({"stm_depth": "two"}, "stm_depth' must be a whole number, got 'two'"),
    ({"d_state": True}, "d_state' must be a whole number, got True"),
    ({"drop_path_rate": 1.0}, r"drop_path_rate' must be a rate in \[0, 1\), got 1.0"),
    ({"head_channels": 0}, "head_channels' must be a whole number of at least 1, got 0"),
    ({"d_stat": 4}, "did you mean 'd_state'")])
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_model("mtmamba_plus", **options)


@pytest.mark.parametrize("model", MODELS)
def test_a_backbone_of_one_stride_is_refused_with_a_hint(model):
    with pytest.raises(ValueError, match=rf"model '{model}' .*: the decoder needs four maps .*neck: pyramid"):
        build_model(model, "vit", {"semseg": 4}, (64, 96), backbone_kwargs=TINY_VIT)


@pytest.mark.parametrize("dataset", ["nyud", "pascal", "cityscapes"])
@pytest.mark.parametrize("model", MODELS)
def test_it_trains_on_the_example_data(tiny, model, dataset):
    arguments = [a for a in tiny if not a.startswith("model_kwargs")]
    arguments += ["label_size=[64, 96]"] if dataset == "cityscapes" else []
    config = load_config(ROOT / "configs" / f"{model}_{dataset}.yml",
                         [*arguments, "model_kwargs={stm_depth: 1, d_state: 2}", "val_interval=6"])
    results = train(config, resume=False)
    assert set(results) == set(config.tasks)
    lines = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss/total"] for line in lines if line["kind"] == "train"]
    assert len(losses) == 6 and all(abs(loss) < 1e4 for loss in losses)
    assert (config.run_dir / "best.pt").is_file()


def test_a_released_file_loads_by_name_and_a_wrong_pairing_says_what_it_holds(tmp_path):
    """A file as the authors' training saves it: {"model": ...} with `module.` before every key."""
    path, folder = tmp_path / "mtmamba_nyud.pth.tar", golden("mtmamba")
    state = load_file(folder / "nyud_mtmamba.state.safetensors")
    torch.save({"model": {f"module.{key}": value for key, value in state.items()}}, path)
    sizes = json.loads((folder / "nyud_mtmamba.config.json").read_text())
    names = ("embed_dim", "depths", "num_heads", "window_size")

    def build(tasks: dict) -> torch.nn.Module:
        return build_model("mtmamba", "swin", tasks, sizes["image_size"],
                           backbone_kwargs={name: sizes["backbone"][name] for name in names},
                           model_kwargs={"d_state": sizes["decoder"]["d_state"]})

    load_model(build(sizes["num_output"]), read_checkpoint(path)["model"], path)
    with pytest.raises(ValueError, match=r"holds the released MTMamba \(tasks .*semseg 40"):
        load_model(build({"semseg": 21, "sal": 2}), read_checkpoint(path)["model"], path)
