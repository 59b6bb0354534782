"""Checkpoints: published key layouts, damaged and foreign files, reports, atomic run checkpoints."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from models.backbones import BACKBONES
from models.build import build_backbone
from scripts import download_pretrained
from tests.shared import golden
from utils.engine import pretrained
from utils.engine.checkpoint import read_checkpoint
from utils.engine.pretrained import load_pretrained

SWIN = {"embed_dim": 8, "depths": (2, 1, 3, 2), "num_heads": (1, 2, 4, 8), "window_size": 4}
VIT = {"embed_dim": 24, "depth": 4, "num_heads": 3}
IMAGE = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def swin(**sizes):
    return build_backbone("swin", (64, 64), SWIN | sizes).eval()


def write_then_fail(state, path):
    Path(path).write_bytes(b"half a file")
    raise OSError("no space left on device")


@pytest.fixture(scope="module")
def classifier():
    """A timm Swin classifier, random in every parameter."""
    torch.manual_seed(0)
    model = timm.models.SwinTransformer(img_size=128, num_classes=5, always_partition=True, **SWIN).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def official_layout(model) -> dict:
    """timm's weights under the official keys: merging at the end of a stage, buffers stored."""
    state = {}
    for key, value in model.state_dict().items():
        parts = key.replace("head.fc.", "head.").split(".")
        if parts[0] == "layers" and parts[2] == "downsample":
            parts[1] = str(int(parts[1]) - 1)
        state[".".join(parts)] = value
    for stage, depth in enumerate(SWIN["depths"]):
        for index in range(depth):
            block = f"layers.{stage}.blocks.{index}"
            state[f"{block}.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.long)
            if index % 2:
                state[f"{block}.attn_mask"] = torch.zeros(4, 16, 16)
    return state


def mmseg_layout(model) -> dict:
    """Official layout renamed; merging channel 4c + r holds what was at pi(r) * C + c, pi = (0, 2, 1, 3)."""
    names = (("layers.", "stages."), ("patch_embed.proj", "patch_embed.projection"),
             (".attn.", ".attn.w_msa."), (".mlp.fc1.", ".ffn.layers.0.0."), (".mlp.fc2.", ".ffn.layers.1."))
    state = {}
    for key, value in official_layout(model).items():
        if "attn_mask" in key or key.startswith(("head", "norm.")):
            continue
        if ".downsample." in key:
            width = value.shape[-1] // 4
            order = [(0, 2, 1, 3)[channel % 4] * width + channel // 4 for channel in range(4 * width)]
            value = value[..., order]
        for old, new in names:
            if old != "layers." or key.startswith(old):
                key = key.replace(old, new, 1)
        state[key] = value
    return state


def prefixed(prefix: str, state: dict) -> dict:
    return {prefix + key: value for key, value in state.items()}


LAYOUTS = {
    "timm": lambda model: model.state_dict(),
    "official": official_layout,
    "mmseg": mmseg_layout,
}
WRAPPERS = {
    "bare": dict,
    "model": lambda state: {"model": state},
    "ddp": lambda state: {"model": prefixed("module.", state), "epoch": 3},
    "segmentor": lambda state: {
        "state_dict": prefixed("backbone.", state) | {"decode_head.conv.weight": torch.zeros(3)}},
    "ddp_backbone": lambda state: {"model": prefixed("module.backbone.", state)},
}


# ------------------------------------------------------------ pretrained backbones


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_every_layout_and_wrapper_gives_the_same_features(tmp_path, classifier, layout, wrapper, caplog):
    path = tmp_path / "weights.pth"
    torch.save(WRAPPERS[wrapper](LAYOUTS[layout](classifier)), path)
    backbone = swin()
    with caplog.at_level(logging.INFO):
        load_pretrained(backbone, path)
    image = torch.randn(2, 3, 128, 128)  # grids 32, 16, 8, 4: whole windows, so both padding orders agree
    tokens = backbone.patch_embed(image)
    for layer in backbone.layers:
        tokens = layer(tokens)
    torch.testing.assert_close(classifier.norm(tokens), classifier.forward_features(image))
    count = len(backbone.state_dict()) - 8
    unexpected = {
        (False, False): "4 (norm.*, head.*)", (False, True): "5 (norm.*, head.*, decode_head.*)",
        (True, False): "0", (True, True): "1 (decode_head.*)"}[layout == "mmseg", wrapper == "segmentor"]
    assert caplog.messages == [
        f"{path}: loaded {count} / missing 0 / unexpected {unexpected} / "
        "starting fresh 8 (norm0.*, norm1.*, norm2.*, norm3.*)"]


def test_output_norms_are_loaded_where_the_file_has_them(tmp_path, caplog):
    source = swin()
    torch.nn.init.normal_(source.norm2.weight)
    save_file(source.state_dict(), tmp_path / "full.safetensors")
    backbone = swin()
    with caplog.at_level(logging.INFO):
        load_pretrained(backbone, str(tmp_path / "full.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(source(IMAGE), backbone(IMAGE), strict=True))
    count = len(source.state_dict())
    assert caplog.messages[-1].endswith(f"full.safetensors: loaded {count} / missing 0 / unexpected 0")


def test_reference_file_of_a_whole_model_gives_its_backbone():
    folder = golden("mtmamba")
    sizes = json.loads((folder / "nyud_mtmamba.config.json").read_text())["backbone"]
    backbone = swin(**{key: sizes[key] for key in SWIN})
    load_pretrained(backbone, folder / "nyud_mtmamba.state.safetensors")
    reference = load_file(folder / "nyud_mtmamba.io.safetensors")
    for index, feature in enumerate(backbone(reference["image"])):
        torch.testing.assert_close(feature, reference[f"eval.feat.{index}"], rtol=0, atol=5e-5)


def test_missing_layer_is_named_and_can_be_allowed(tmp_path, classifier, caplog):
    state = classifier.state_dict()
    for key in [key for key in state if key.startswith("layers.2.blocks.1.mlp.")]:
        del state[key]
    torch.save(state, tmp_path / "holes.pth")
    with pytest.raises(ValueError, match=r"holes.pth does not fit this SwinBackbone: 4 missing in the file "
                                         r"\(layers.2.blocks.1.mlp.fc1.weight, .*, \.\.\.\)"):
        load_pretrained(swin(), tmp_path / "holes.pth")
    with caplog.at_level(logging.INFO):
        load_pretrained(swin(), tmp_path / "holes.pth", allow_missing=["layers.2.blocks.1.mlp"])
    assert "starting fresh 12 (layers.*, norm0.*" in caplog.text


def test_refused_file_leaves_the_backbone_untouched(tmp_path, classifier):
    state = classifier.state_dict()
    del state["layers.3.blocks.0.norm1.bias"]
    torch.save(state, tmp_path / "holes.pth")
    backbone = swin()
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    with pytest.raises(ValueError):
        load_pretrained(backbone, tmp_path / "holes.pth")
    assert all(torch.equal(before[key], value) for key, value in backbone.state_dict().items())


@pytest.mark.parametrize("sizes, message", [
    ({"embed_dim": 16, "num_heads": (2, 4, 8, 16)},
     r"of another shape \(patch_embed.proj.weight: file \(8, 3, 4, 4\), model \(16, 3, 4, 4\)"),
    ({"depths": (2, 1, 2, 2)}, r"13 unknown to the model \(layers.2.blocks.2"),
    ({"depths": (2, 1, 4, 2)}, r"13 missing in the file \(layers.2.blocks.3"),
])
def test_file_of_another_size_is_refused(tmp_path, classifier, sizes, message):
    torch.save(classifier.state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=message):
        load_pretrained(swin(**sizes), tmp_path / "w.pth")


def test_other_window_resizes_the_tables(tmp_path, classifier, caplog):
    torch.save(official_layout(classifier), tmp_path / "w.pth")
    backbone = swin(window_size=7)
    with caplog.at_level(logging.INFO):
        load_pretrained(backbone, tmp_path / "w.pth")
    assert "relative position tables resized to another window (bicubic): 8" in caplog.text
    old = classifier.layers[1].blocks[0].attn.relative_position_bias_table.detach()
    grid = torch.nn.functional.interpolate(old.T.reshape(1, 2, 7, 7), size=(13, 13), mode="bicubic")
    new = backbone.layers[1].blocks[0].attn.relative_position_bias_table
    torch.testing.assert_close(new, grid.reshape(2, 169).T)
    assert new[84].allclose(old[24])  # the centre stays the centre


def test_vit_position_embedding_follows_the_image_size(tmp_path, caplog):
    source = build_backbone("vit", (64, 64), VIT)
    torch.save({"model": source.state_dict() | {"head.weight": torch.zeros(2, 24)}}, tmp_path / "vit.pth")
    backbone = build_backbone("vit", (32, 96), VIT)
    with caplog.at_level(logging.INFO):
        load_pretrained(backbone, tmp_path / "vit.pth")
    assert "position embedding resized from 4x4 to 2x6" in caplog.text
    assert caplog.messages[-1].endswith(
        f"loaded {len(source.state_dict())} / missing 0 / unexpected 1 (head.*)")
    assert torch.equal(backbone.blocks[3].mlp.fc1.weight, source.blocks[3].mlp.fc1.weight)


def augreg_arrays(model) -> dict[str, np.ndarray]:
    """A ViT in the layout of the AugReg .npz files."""
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    arrays = {"cls": state["cls_token"],
              "embedding/kernel": state["patch_embed.proj.weight"].transpose(2, 3, 1, 0),
              "embedding/bias": state["patch_embed.proj.bias"],
              "Transformer/posembed_input/pos_embedding": state["pos_embed"],
              "Transformer/encoder_norm/scale": state["norm.weight"],
              "Transformer/encoder_norm/bias": state["norm.bias"]}
    width, heads = VIT["embed_dim"], VIT["num_heads"]
    for index in range(VIT["depth"]):
        ours, theirs = f"blocks.{index}", f"Transformer/encoderblock_{index}"
        for name, part in (("LayerNorm_0", "norm1"), ("LayerNorm_2", "norm2")):
            arrays[f"{theirs}/{name}/scale"] = state[f"{ours}.{part}.weight"]
            arrays[f"{theirs}/{name}/bias"] = state[f"{ours}.{part}.bias"]
        attention = f"{theirs}/MultiHeadDotProductAttention_1"
        for row, name in enumerate(("query", "key", "value")):
            rows = slice(row * width, (row + 1) * width)
            weight = state[f"{ours}.attn.qkv.weight"][rows]
            arrays[f"{attention}/{name}/kernel"] = weight.T.reshape(width, heads, width // heads)
            arrays[f"{attention}/{name}/bias"] = state[f"{ours}.attn.qkv.bias"][rows].reshape(heads, -1)
        arrays[f"{attention}/out/kernel"] = state[f"{ours}.attn.proj.weight"].T.reshape(heads, -1, width)
        arrays[f"{attention}/out/bias"] = state[f"{ours}.attn.proj.bias"]
        for layer in (0, 1):
            dense = f"{theirs}/MlpBlock_3/Dense_{layer}"
            arrays[f"{dense}/kernel"] = state[f"{ours}.mlp.fc{layer + 1}.weight"].T
            arrays[f"{dense}/bias"] = state[f"{ours}.mlp.fc{layer + 1}.bias"]
    return arrays


def test_augreg_npz_equals_the_timm_file(tmp_path):
    torch.manual_seed(1)
    source = build_backbone("vit", (64, 64), VIT)
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    np.savez(tmp_path / "vit.npz", **augreg_arrays(source))
    save_file(source.state_dict(), tmp_path / "vit.safetensors")
    for size in ((64, 64), (32, 96)):  # the second resizes the position embedding
        first, second = (build_backbone("vit", size, VIT) for _ in range(2))
        load_pretrained(first, tmp_path / "vit.npz")
        load_pretrained(second, tmp_path / "vit.safetensors")
        expected = second.state_dict()
        assert all(torch.equal(value, expected[key]) for key, value in first.state_dict().items())
    with pytest.raises(ValueError, match=r"12 unknown to the model \(blocks.3"):
        load_pretrained(build_backbone("vit", (64, 64), VIT | {"depth": 3, "taps": (1, 2, 3)}),
                        tmp_path / "vit.npz")
    with pytest.raises(ValueError, match="an .npz file holds AugReg ViT weights"):
        load_pretrained(swin(), tmp_path / "vit.npz")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    with pytest.raises(ValueError, match="not an AugReg ViT file"):
        load_pretrained(build_backbone("vit", (64, 64), VIT), tmp_path / "other.npz")


# ------------------------------------------------------------ where weights come from


def test_true_finds_the_original_file_in_the_folder(tmp_path, monkeypatch, classifier):
    monkeypatch.setattr(pretrained, "PRETRAINED_DIR", tmp_path)
    backbone = swin()
    backbone.pretrained_tag, backbone.pretrained_file = "swin_tiny_patch4_window7_224.ms_in1k", "original.pth"
    torch.save({"model": official_layout(classifier)}, tmp_path / "original.pth")
    load_pretrained(backbone, True)
    assert torch.equal(backbone.patch_embed.proj.weight, classifier.patch_embed.proj.weight)
    changed = classifier.state_dict() | {"patch_embed.proj.bias": torch.full((8,), 7.0)}
    save_file(changed, tmp_path / f"{backbone.pretrained_tag}.safetensors")
    load_pretrained(backbone, True)  # the timm file goes first
    assert (backbone.patch_embed.proj.bias == 7).all()


def test_weights_that_only_their_authors_publish_lie_in_the_folder_or_are_asked_for(tmp_path, monkeypatch, classifier):
    monkeypatch.setattr(pretrained, "PRETRAINED_DIR", tmp_path)
    backbone = swin()
    backbone.pretrained_file, backbone.pretrained_home = "original.pth", "the authors' page"
    with pytest.raises(FileNotFoundError, match="no original.pth in .*: fetch it from the authors' page, or set"):
        load_pretrained(backbone, True)
    torch.save({"model": official_layout(classifier)}, tmp_path / "original.pth")
    load_pretrained(backbone, True)
    assert torch.equal(backbone.patch_embed.proj.weight, classifier.patch_embed.proj.weight)


@pytest.mark.parametrize("source, error, message", [
    (True, ValueError, "this SwinBackbone has no ImageNet weights of its own"),
    ("swin_large_patch4", ValueError, "'swin_large_patch4' is neither a file nor a timm model with weights"),
    ("nowhere.pth", FileNotFoundError, "no checkpoint nowhere.pth; the folder holds"),
    ("missing_folder/a.pth", FileNotFoundError, "the folder missing_folder does not exist"),
])
def test_unusable_source_is_one_clear_sentence(source, error, message):
    with pytest.raises(error, match=message):
        load_pretrained(swin(), source)


def test_every_named_backbone_has_a_timm_tag_with_weights():
    tags = {entry.pretrained_tag for entry in BACKBONES.values() if entry.pretrained_tag}
    assert len(tags) == 23 and tags <= set(timm.list_pretrained())
    for entry in BACKBONES.values():
        record = entry.pretrained_file and entry.pretrained_tag and timm.get_pretrained_cfg(entry.pretrained_tag)
        if record and record.url:                                                       # timm knows the original file
            assert record.url.endswith("/" + entry.pretrained_file)


def test_download_script_fails_in_one_sentence_without_network(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    assert download_pretrained.main(["swin_tiny", "--out", str(tmp_path / "out")]) == 1
    said, wrong = capsys.readouterr()
    assert said == "" and len(wrong.splitlines()) == 1
    assert "could not download 'swin_tiny_patch4_window7_224.ms_in1k'" in wrong
    assert "swin_tiny_patch4_window7_224.ms_in1k.safetensors" in wrong
    assert not list(tmp_path.glob("out/*"))


def test_download_script_writes_a_file_that_loads(tmp_path, monkeypatch, classifier):
    monkeypatch.setattr(download_pretrained, "download_weights", lambda tag: classifier.state_dict())
    path = download_pretrained.download("swinT", tmp_path / "new")
    assert path == tmp_path / "new" / "swin_tiny_patch4_window7_224.ms_in1k.safetensors"
    load_pretrained(swin(), path)
    path.rename(path.with_name("swin_tiny_patch4_window7_224.pth"))                 # as its authors call it
    assert download_pretrained.download("swinT", tmp_path / "new").name == "swin_tiny_patch4_window7_224.pth"
    path.with_name("swin_tiny_patch4_window7_224.pth").rename(path)
    monkeypatch.setattr(download_pretrained, "save_file", write_then_fail)
    with pytest.raises(OSError, match="no space"):
        download_pretrained.download("swinS", tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == [path]


# ------------------------------------------------------------ damaged and foreign files


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".npz", ".legacy.pth"])
@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.95])
def test_truncated_file_is_named_with_its_size(tmp_path, suffix, keep):
    backbone = build_backbone("vit", (64, 64), VIT)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".npz":
        np.savez(path, **augreg_arrays(backbone))
    elif suffix == ".safetensors":
        save_file(backbone.state_dict(), path)
    else:
        torch.save(backbone.state_dict(), path, _use_new_zipfile_serialization="legacy" not in suffix)
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(len(content) * keep)])
    size = f"{path.stat().st_size:,}"
    with pytest.raises(ValueError, match=f"weights{suffix} cannot be read: truncated .* \\({size} bytes\\)"):
        load_pretrained(backbone, path)


class NotPlain:
    pass


@pytest.mark.parametrize("content, message", [
    ({"note": "hello"}, "is not a checkpoint: no weights under 'model' or 'state_dict' .it holds note"),
    ([1, 2], "is not a checkpoint: .* .it holds a list"),
    ({}, "is not a checkpoint: .* .it holds nothing"),
    ({"model": NotPlain()}, "holds Python objects besides tensors and is not read for safety"),
])
def test_foreign_content_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "file.pt")
    with pytest.raises(ValueError, match=message):
        read_checkpoint(tmp_path / "file.pt")


def test_text_file_is_not_a_checkpoint(tmp_path):
    (tmp_path / "page.pth").write_text("<html>quota exceeded</html>")
    with pytest.raises(ValueError, match=r"page.pth cannot be read: .* not a checkpoint \(27 bytes\)"):
        read_checkpoint(tmp_path / "page.pth")
