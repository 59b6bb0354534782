"""InvPT: reference numbers, full-size keys, released checkpoints, training, what fits and what does not."""

import json
import logging
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from models.build import build_model
from models.decoders.invpt import InvPTConfig
from models.released import recognise
from scripts.check_parity import main as check_parity
from scripts.convert_checkpoint import main as convert_checkpoint
from tests.shared import ROOT, assert_same_weights, golden
from tests.test_train import rows
from utils.engine.build import model_from_config, trained_model
from utils.engine.checkpoint import read_checkpoint
from utils.engine.config import load_config
from utils.engine.train import train
from utils.options import parse

NYUD, PASCAL = (str(ROOT / "configs" / f"invpt_{name}.yml") for name in ("nyud", "pascal"))
BIM = str(ROOT / "configs" / "bim_nyud.yml")
SMALL = ["backbone=vit", "backbone_kwargs={embed_dim: 16, depth: 4, num_heads: 2, patch_size: 8}",
         "model_kwargs={embed_dim: 24, PRED_OUT_NUM_CONSTANT: 8}"]
VIT = {"embed_dim": 16, "depth": 4, "num_heads": 2, "patch_size": 8}
WIDTHS = {"embed_dim": 24, "PRED_OUT_NUM_CONSTANT": 8}
TASKS = {"semseg": 5, "depth": 1, "edge": 1}


def build(tasks=TASKS, size=(64, 96), vit=VIT, **options):
    torch.manual_seed(0)
    return build_model("InvPT", "vit", tasks, size, backbone_kwargs=vit, model_kwargs={**WIDTHS, **options})


# ------------------------------------------------------------ reference numbers


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_everything_agrees_with_the_original(dtype, capsys):
    code = check_parity(["--golden", str(golden("invpt")), "--dtype", dtype])
    out = capsys.readouterr().out
    assert code == 0, "\n".join(line for line in out.splitlines() if "FAIL" in line)
    for case in ("nyud_tiny", "pascal_tiny"):
        assert len(re.findall(rf"{case}/.* pass ", out)) == 5
    for data_set in ("nyud", "pascal"):
        assert len(re.findall(rf"losses_metrics/{data_set} .* pass ", out)) == 4
    assert len(re.findall("manifest_full/.* pass ", out)) == 2 and re.search("single_image .* pass ", out)


def damaged(tmp_path, part: str, key: str, change):
    """A renamed copy of one case, with one array of its state or io file changed."""
    for path in golden("invpt").glob("nyud_tiny.*"):
        shutil.copyfile(path, tmp_path / path.name.replace("nyud_tiny", "another"))
    path = tmp_path / f"another.{part}.safetensors"
    save_file({name: change(x) if name == key else x for name, x in load_file(path).items()}, path)
    return tmp_path


ATTENTION = "multi_task_decoder.invpt.invpt_stages.1.blocks.0.attn."


@pytest.mark.parametrize("part, key, failing", [
    ("state", ATTENTION + "fuse_attn.weight", 4), ("state", "multi_task_decoder.invpt.norm_mts.2.bias", 4),
    ("io", "eval.inter.depth", 1), ("io", "eval.mid.stage1.attn_message", 1), ("io", "train.grad.image", 1),
    ("io", "image", 5), ("io", "eval.mid.decoder.skip2", 0)])
def test_one_changed_array_of_a_renamed_case_fails(tmp_path, capsys, part, key, failing):
    folder = damaged(tmp_path, part, key, lambda x: x * (1 + 3e-6))
    code = check_parity(["--golden", str(folder)])
    out = capsys.readouterr().out
    assert code == (failing > 0) and f"{5 - failing} passed, {failing} failed" in out, out


@pytest.mark.parametrize("name", ["invpt_nyud", "invpt_pascal"])
@pytest.mark.parametrize("size", ["vitLp16", "vitBp16"])
def test_shipped_files_build_the_published_sizes(name, size):
    folder = golden("invpt")
    data_set, tables = name.removeprefix("invpt_"), ("manifest_full", "unofficial_vitb_size")
    entries = {k: v for table in tables for k, v in json.loads((folder / f"{table}.json").read_text()).items()}
    [entry] = [v for k, v in entries.items() if k.endswith(f"{data_set}_{size}")]
    path = f"{name}.yml" if size == "vitLp16" else f"backbones/{name}_vit_base.yml"
    config = load_config(ROOT / "configs" / path)
    with torch.device("meta"):
        model = model_from_config(config)
    assert list(config.input_size) == entry["image_size"] and list(model.heads) == entry["tasks"]
    width, (coarse, _, fine), tasks = model.encoder.channels[0], (576, 288, 144), len(model.heads)
    dead = [9 * width * coarse + coarse, tasks * (coarse**2 + coarse), 2 * tasks * fine, 8 + 2]  # as listed in DEAD
    assert sum(p.numel() for p in model.parameters()) + sum(dead) == entry["total_parameters"]


# ------------------------------------------------------------ released checkpoints

PREFIX = "multi_task_decoder."
STAGE = PREFIX + "invpt.invpt_stages."
TO_ORIGINAL = [
    (r"^encoder\.", "backbone."), (r"^heads\.(\w+)\.", r"heads.\1.linear_pred."),
    (r"^decoder\.preliminary\.(\w+)\.(.)\.0\.", PREFIX + r"preliminary_decoder.\1.\2.conv."),
    (r"^decoder\.preliminary\.(\w+)\.(.)\.1\.", PREFIX + r"preliminary_decoder.\1.\2.bn1."),
    (r"^decoder\.intermediate\.", PREFIX + "intermediate_head."),
    (r"^decoder\.mix\.(\w+)\.", PREFIX + r"invpt.mix_proj.\1.0."),
    (r"^decoder\.skip_fine\.", PREFIX + "scale_embed.0."), (r"^decoder\.skip_middle\.", PREFIX + "scale_embed.1."),
    (r"^decoder\.stages\.(.)\.up\.(\w+)\.1\.0\.", STAGE + r"\1.patch_embed.<\2>.proj.1."),
    (r"^decoder\.stages\.(.)\.up\.(\w+)\.1\.1\.", STAGE + r"\1.patch_embed.<\2>.proj.2."),
    (r"^decoder\.stages\.(.)\.up\.(\w+)\.2\.0\.", STAGE + r"\1.patch_embed.<\2>.proj.4."),
    (r"^decoder\.stages\.(.)\.up\.(\w+)\.2\.1\.", STAGE + r"\1.patch_embed.<\2>.proj.5."),
    (r"^decoder\.stages\.(.)\.attention\.query\.(\w+)\.0\.", STAGE + r"\1.blocks.0.attn.conv_proj_q.<\2>.conv."),
    (r"^decoder\.stages\.(.)\.attention\.query\.(\w+)\.1\.", STAGE + r"\1.blocks.0.attn.conv_proj_q.<\2>.bn."),
    (r"^decoder\.stages\.(.)\.attention\.to_(.)\.", STAGE + r"\1.blocks.0.attn.proj_\2."),
    (r"^decoder\.stages\.(.)\.attention\.proj\.", STAGE + r"\1.blocks.0.attn.proj."),
    (r"^decoder\.stages\.(.)\.attention\.fuse\.", STAGE + r"\1.blocks.0.attn.fuse_attn."),
    (r"^decoder\.stages\.(.)\.(norm1|norm2|mlp)\.", STAGE + r"\1.blocks.0.\2."),
    (r"^decoder\.aggregate\.norms\.", PREFIX + "invpt.norm_mts."),
    (r"^decoder\.aggregate\.reduce\.0\.(\w+)\.", PREFIX + r"invpt.redu_chan.1.<\1>."),
    (r"^decoder\.aggregate\.reduce\.1\.(\w+)\.", PREFIX + r"invpt.redu_chan.2.<\1>."),
    (r"^decoder\.project\.", PREFIX + "invpt.mt_proj."),
]
DEAD = [PREFIX + "scale_embed.2.weight", PREFIX + "invpt.norm_mt.bias", PREFIX + "invpt.redu_chan.0.1.weight",
        STAGE + "0.blocks.0.attn.fuse_attn.bias"]


def as_released(model, path):
    """Writes a model's weights as the original code would: its keys, `module.` in front, an optimiser beside them."""
    tasks, original = list(model.heads), {key: torch.randn(3) for key in DEAD}
    for key, value in model.state_dict().items():
        [name] = [re.sub(old, new, key) for old, new in TO_ORIGINAL if re.match(old, key)]
        original[re.sub(r"<(\w+)>", lambda m: str(tasks.index(m[1])), name)] = value
    optimizer = torch.optim.Adam(model.parameters()).state_dict()
    torch.save({"model": {f"module.{key}": value for key, value in original.items()}, "optimizer": optimizer,
                "scheduler": {"last_epoch": 39999, "base_lrs": [2e-5]}, "epoch": 75, "iter_count": 39999}, path)
    return path


@pytest.fixture
def released(tiny, tmp_path):
    """Configuration, model and released file of a small NYUD model."""
    config = load_config(NYUD, [*tiny, *SMALL])
    torch.manual_seed(0)
    model = model_from_config(config).eval()
    return config, model, as_released(model, tmp_path / "checkpoint.pth.tar")


def test_a_released_checkpoint_loads_as_it_is(released, caplog):
    config, model, path = released
    with caplog.at_level(logging.INFO):
        loaded, _ = trained_model(config, path, torch.device("cpu"))
    assert f"loaded {len(model.state_dict())} / missing 0 / unexpected 0 / ignored 4 without effect" in caplog.text
    assert all(key in caplog.text for key in DEAD)
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for task, want in model(image).final.items():
            assert torch.equal(loaded(image).final[task], want)


def test_the_converted_file_holds_the_same_model(released, tmp_path, capsys):
    config, model, path = released
    target = tmp_path / "ours.safetensors"
    assert convert_checkpoint([str(path), str(target)]) == 0
    assert "released InvPT" in capsys.readouterr().out
    assert_same_weights(trained_model(config, target, torch.device("cpu"))[0], model)


def test_only_released_files_are_converted(released, tmp_path, capsys):
    config, model, path = released
    ours = tmp_path / "ours.pt"
    torch.save({"model": model.state_dict()}, ours)
    assert recognise(read_checkpoint(ours)["model"]) is None
    for arguments, words in (([ours, tmp_path / "a.safetensors"], "not a released checkpoint of a known kind (InvPT"),
                             ([path, tmp_path / "a.pt"], "must end in .safetensors"),
                             ([tmp_path / "none.pth", tmp_path / "a.safetensors"], "no checkpoint")):
        assert convert_checkpoint([str(x) for x in arguments]) == 1
        assert words in capsys.readouterr().err
    assert not (tmp_path / "a.safetensors").exists()


def test_a_wrong_pairing_says_what_the_file_holds(released, tiny):
    _, _, path = released
    held = (r"holds the released InvPT \(tasks semseg 40, depth 1, normals 3, edge 1; ViT of 4 blocks and 16 "
            r"channels for 96 patches\) but the configuration asks for model {}.*unknown to the model")
    for file, model, overrides in ((PASCAL, "invpt, backbone vit, tasks semseg human_parts sal", SMALL),
                                   (BIM, "bim, backbone swin", [])):
        with pytest.raises(ValueError, match=held.format(model)):
            trained_model(load_config(file, [*tiny, *overrides]), path, torch.device("cpu"))
    wider = [*tiny, *SMALL, "image_size=[64, 128]"]
    with pytest.raises(ValueError, match=r"1 of another shape \(encoder.pos_embed: file \(1, 97, 16\), model"):
        trained_model(load_config(NYUD, wider), path, torch.device("cpu"))


def test_a_damaged_released_state_is_refused(released, tmp_path):
    config, _, path = released
    content = torch.load(path, weights_only=True)
    content["model"].pop("module.multi_task_decoder.invpt.norm_mts.1.weight")
    content["model"]["module.multi_task_decoder.invpt.redu_chan.1.9.weight"] = torch.zeros(3)
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"1 missing in the file \(decoder.aggregate.norms.1.weight\); 1 unknown"):
        trained_model(config, path, torch.device("cpu"))


# ------------------------------------------------------------ training


@pytest.mark.parametrize("config_file", [NYUD, PASCAL])
def test_a_small_one_trains_with_intermediate_supervision(tiny, config_file):
    config = load_config(config_file, [*tiny, *SMALL, "max_iter=18", "val_interval=18"])
    results = train(config, resume=False)
    assert set(results) == set(config.tasks)
    first, *rest = rows(config.run_dir, "train")
    weights = config.loss_kwargs.loss_weights
    total = sum(weights[t] * (first[f"loss/{t}"] + first[f"loss/inter/{t}"]) for t in config.tasks)
    assert first["loss/total"] == pytest.approx(total, rel=1e-5)
    for key in ("loss/semseg", "loss/inter/semseg", "loss/normals"):
        assert sum(row[key] for row in rest[-3:]) / 3 < first[key]


def test_mixed_precision_trains(tiny):
    config = load_config(NYUD, [*tiny, *SMALL, "precision=bf16", "max_iter=2"])
    assert train(config, resume=False)["depth"]["rmse"] > 0


def test_every_parameter_is_trained():
    model = build().train()
    out = model(torch.randn(2, 3, 64, 96))
    sum(logits.square().mean() for maps in (out.final, out.intermediate) for logits in maps.values()).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_preliminary_predictions_keep_their_gradient():
    model = build().train()
    model(torch.randn(2, 3, 64, 96)).final["depth"].mean().backward()
    assert all(head.weight.grad.any() for head in model.decoder.intermediate.values())     # of every task


# ------------------------------------------------------------ options and fit


@pytest.mark.parametrize("tasks", [{"depth": 1}, {"semseg": 3, "sal": 2, "edge": 1}])
@pytest.mark.parametrize("size, patch", [((64, 128), 16), ((48, 32), 4)])
def test_any_tasks_and_sizes(tasks, size, patch):
    model = build(tasks, size, {**VIT, "patch_size": patch, "embed_dim": 18, "depth": 5}).eval()
    out = model(torch.randn(1, 3, *size))
    for maps in (out.final, out.intermediate):
        assert {task: tuple(x.shape) for task, x in maps.items()} == {t: (1, n, *size) for t, n in tasks.items()}


@pytest.mark.parametrize("backbone", ["vit_small", "vit_base", "vit_large"])
def test_every_named_vit_fits(backbone):
    with torch.device("meta"):
        model = build_model("InvPT", backbone, TASKS, (448, 576))
        assert model(torch.empty(1, 3, 448, 576)).final["semseg"].shape == (1, 5, 448, 576)


@pytest.mark.parametrize("backbone, arguments, message", [
    ("swin_tiny", {}, r"backbone 'swin_tiny': .* needs four maps of one stride .*strides \(4, 8, 16, 32\)"),
    ("vit_small", {"neck": "pyramid", "neck_kwargs": {"embed_dim": 8}}, r"needs four maps of one stride .*\(4, 8,"),
    ("vit_small", {"backbone_kwargs": {"taps": (6, 12)}}, r"needs four maps .* strides \(16, 16\); `neck: one_stride`"),
    ("vit_small", {"model_kwargs": {"embed_dims": 3}}, "did you mean 'embed_dim'"),
])
def test_parts_that_do_not_fit(backbone, arguments, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message):
        build_model("InvPT", backbone, TASKS, (64, 128), **arguments)


def test_image_sizes_between_the_grids_are_refused():
    with torch.device("meta"), pytest.raises(ValueError, match=r"\(64, 96\) must be multiples of 64 for model 'InvPT'"):
        build_model("InvPT", "vit_small", TASKS, (64, 96))


@pytest.mark.parametrize("options, message", [
    ({"mtt_resolution_downsample_rate": 1}, "mtt_resolution_downsample_rate' must be 2, .*, got 1"),
    ({"attention_scale": "full"}, "attention_scale' must be one of width, head, got 'full'"),
    ({"num_heads": 5}, r"num_heads' must be a divisor of .*\(576, 288, 144\), got 5"),
    ({"drop_path_rate": 1.0}, "drop_path_rate' must be"), ({"embed_dim": 0}, "embed_dim' must be"),
    ({"PRED_OUT_NUM_CONSTANT": -1}, "PRED_OUT_NUM_CONSTANT' must be"), ({"mlp_ratio": 0}, "mlp_ratio' must be")])
def test_option_values_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        parse(InvPTConfig, options)


def test_options_act():
    image = torch.randn(2, 3, 64, 96)
    plain, scaled, dropping = build().eval(), build(attention_scale="head").eval(), build(drop_path_rate=0.9)
    scaled.load_state_dict(plain.state_dict())
    dropping.load_state_dict(plain.state_dict())
    want = plain(image).final["depth"]
    assert not torch.allclose(scaled(image).final["depth"], want, rtol=0, atol=1e-7)
    assert torch.equal(dropping.eval()(image).final["depth"], want)
    assert [stage.drop_path.drop_prob for stage in dropping.decoder.stages] == [0.0, 0.45, 0.9]
    dropping.train()
    for module in dropping.modules():                      # nothing else is random or depends on the batch
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    dropping.encoder.eval()
    torch.manual_seed(1)
    assert not torch.allclose(dropping(image).final["depth"], want, rtol=0, atol=1e-7)
