"""Backbones: shapes at awkward sizes, agreement with reference numbers, builder errors, the ViT pyramid."""

import json

import pytest
import timm
import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import load_file

from models.backbones import BACKBONES
from models.backbones.swin import SwinBlock
from models.backbones.vit import resize_position_embedding
from models.build import build_backbone
from models.necks.pyramid import PyramidConfig, SimplePyramid
from tests.shared import golden

TINY_SWIN = {"embed_dim": 8, "depths": (2, 1, 3, 2), "num_heads": (1, 2, 4, 8), "window_size": 4}
TINY_VIT = {"embed_dim": 24, "depth": 4, "num_heads": 3}
SWIN_CASES = ("nyud_mtmamba", "pascal_mtmamba_plus", "cityscapes_mtmamba_plus")
VIT_CASES = ("nyud_tiny", "pascal_tiny")


def load_swin_case(case: str, dtype: torch.dtype, **kwargs):
    """Reference weights in a Swin backbone, and the reference tensors."""
    folder = golden("mtmamba")
    sizes = json.loads((folder / f"{case}.config.json").read_text())["backbone"]
    state = load_file(folder / f"{case}.state.safetensors")
    names = ("embed_dim", "depths", "num_heads", "window_size")
    backbone = build_backbone("swin", (32, 32), {**{name: sizes[name] for name in names}, **kwargs})
    prefix = "backbone."
    state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    backbone.load_state_dict(backbone.convert_state_dict(state))  # strict: the file has the norms
    return backbone.to(dtype).eval(), load_file(folder / f"{case}.io.safetensors")


# ------------------------------------------------------------ numbers


@pytest.mark.parametrize("case", SWIN_CASES)
@pytest.mark.parametrize("dtype, prefix, tolerance", [
    (torch.float64, "eval64", 1e-9), (torch.float32, "eval", 5e-5)])
def test_swin_features_equal_the_reference(case, dtype, prefix, tolerance):
    backbone, reference = load_swin_case(case, dtype)
    with torch.no_grad():
        maps = backbone(reference["image"].to(dtype))
    for index, feature in enumerate(maps):
        torch.testing.assert_close(feature, reference[f"{prefix}.feat.{index}"], rtol=0, atol=tolerance)


@pytest.mark.parametrize("case", SWIN_CASES)
def test_swin_tokens_inside_equal_the_reference(case):
    backbone, reference = load_swin_case(case, torch.float32)
    seen = {}

    def record(name):
        return lambda module, args, output: seen.__setitem__(name, rearrange(output, "b h w c -> b (h w) c"))

    backbone.patch_embed.register_forward_hook(record("patch_embed"))
    for stage, layer in enumerate(backbone.layers):
        if stage:  # the reference counts the merging to the stage before
            layer.downsample.register_forward_hook(record(f"stages.{stage - 1}.downsample"))
        for index, block in enumerate(layer.blocks):
            block.register_forward_hook(record(f"stages.{stage}.blocks.{index}"))
    with torch.no_grad():
        backbone(reference["image"])
    names = {key.removeprefix("eval.bb.") for key in reference if key.startswith("eval.bb.")}
    assert names == set(seen)
    for name in names:
        torch.testing.assert_close(seen[name], reference[f"eval.bb.{name}"], rtol=0, atol=5e-5)


@pytest.mark.parametrize("shift", [0, 2])
def test_attention_without_scores_is_timms(shift):
    """What runs on a GPU, with gradients of everything; windows that are padded, images of one batch."""
    torch.manual_seed(0)
    block = SwinBlock(16, (4, 4), num_heads=4, window_size=4, shift_size=shift, always_partition=True,
                      dynamic_mask=True).double()
    padded = torch.zeros(1, 8, 8, 16, dtype=torch.float64)  # four windows
    mask = block.shift_mask(2, 2, padded)
    assert (mask is None and not shift) or torch.equal(mask, block.get_attn_mask(padded))
    windows = torch.randn(8, 16, 16, dtype=torch.float64, requires_grad=True)
    grad, leaves = torch.randn_like(windows), [windows, *block.attn.parameters()]
    results = [[out, *torch.autograd.grad(out, leaves, grad)]
               for out in (block.attn(windows, mask), block.attn.fused(windows, mask))]
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


def test_rolling_first_is_a_different_network():
    backbone, reference = load_swin_case("nyud_mtmamba", torch.float64, pad_before_roll=False)
    with torch.no_grad():
        maps = backbone(reference["image"].double())
    errors = [(feature - reference[f"eval64.feat.{index}"]).abs().max() for index, feature in enumerate(maps)]
    assert max(errors) > 1.0


def test_rolling_first_is_timm():
    torch.manual_seed(0)
    model = timm.models.SwinTransformer(img_size=(52, 92), num_classes=0, always_partition=True, embed_dim=8,
                                        depths=(2, 1, 3, 2), num_heads=(1, 2, 4, 8), window_size=4,
                                        strict_img_size=False).eval()
    backbone = build_backbone("swin", (52, 92), TINY_SWIN | {"pad_before_roll": False}).eval()
    backbone.load_state_dict(model.state_dict(), strict=False)
    image = torch.randn(2, 3, 52, 92)
    tokens = backbone.layers[0](backbone.patch_embed(image))
    torch.testing.assert_close(tokens, model.layers[0](model.patch_embed(image)))
    tokens = backbone.patch_embed(image)
    for layer in backbone.layers:
        tokens = layer(tokens)
    torch.testing.assert_close(model.norm(tokens), model.forward_features(image))


@pytest.mark.parametrize("case", VIT_CASES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-6), (torch.float32, 5e-5)])
def test_vit_taps_equal_the_reference(case, dtype, tolerance):
    folder = golden("invpt")
    config = json.loads((folder / f"{case}.config.json").read_text())
    sizes = config["backbone"]
    options = {name: sizes[name] for name in ("embed_dim", "depth", "num_heads", "patch_size")}
    backbone = build_backbone("vit", config["image_size"], options | {"taps": sizes["tap_after_blocks"]}).eval()
    state = load_file(folder / f"{case}.state.safetensors")
    prefix = "backbone."
    state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    backbone.load_state_dict(backbone.convert_state_dict(state))
    reference = load_file(folder / f"{case}.io.safetensors")
    with torch.no_grad():
        maps = backbone.to(dtype)(reference["image"].to(dtype))
    for index, feature in enumerate(maps):
        tokens = rearrange(feature, "b c h w -> b (h w) c")
        expected = reference[f"eval.mid.backbone.tap{index}"].to(dtype)
        torch.testing.assert_close(tokens, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("name, image_size, count", [
    ("swin_large", (448, 576), 195_201_204),  # with the four output norms
    ("vit_large", (448, 576), 304_133_120), ("vit_large", (512, 512), 304_149_504)])
def test_full_size_parameter_counts(name, image_size, count):
    with torch.device("meta"):
        backbone = build_backbone(name, image_size)
    assert sum(parameter.numel() for parameter in backbone.parameters()) == count


# ------------------------------------------------------------ shapes


@pytest.mark.parametrize("name", [name for name, entry in BACKBONES.items() if entry.defaults])
def test_every_named_backbone_gives_the_maps_it_announces(name):
    with torch.device("meta"):  # shapes without memory or time
        backbone = build_backbone(name, (448, 576))
        maps = backbone(torch.empty(2, 3, 448, 576))
    assert len(maps) == len(backbone.channels) == len(backbone.strides) == 4
    for feature, channels, stride in zip(maps, backbone.channels, backbone.strides, strict=True):
        assert feature.shape == (2, channels, 448 // stride, 576 // stride)


@pytest.mark.parametrize("size", [(32, 32), (64, 96), (33, 47), (107, 140), (8, 200)])
@pytest.mark.parametrize("window_size", [3, 4, 12])  # 12 is larger than most of these maps
@pytest.mark.parametrize("pad_before_roll", [True, False])
def test_swin_takes_any_size(size, window_size, pad_before_roll):
    backbone = build_backbone("swin", (32, 32), TINY_SWIN | {"window_size": window_size,
                                                             "pad_before_roll": pad_before_roll})
    maps = backbone(torch.randn(1, 3, *size))
    height, width = -(-size[0] // 4), -(-size[1] // 4)  # rounded up, here and at each merging
    for feature, channels in zip(maps, backbone.channels, strict=True):
        assert feature.shape == (1, channels, height, width) and feature.isfinite().all()
        height, width = -(-height // 2), -(-width // 2)
    sum(feature.square().mean() for feature in maps).backward()
    assert all(parameter.grad is not None for parameter in backbone.parameters())


def test_window_and_shift_survive_small_maps():
    backbone = build_backbone("swin", (32, 32), TINY_SWIN | {"window_size": 12})
    for layer in backbone.layers:
        for index, block in enumerate(layer.blocks):
            assert block.window_size == (12, 12)
            assert tuple(block.shift_size) == ((6, 6) if index % 2 else (0, 0))


def test_swin_samples_do_not_mix():
    backbone = build_backbone("swin", (32, 32), TINY_SWIN).eval()
    images = torch.randn(2, 3, 40, 72)
    with torch.no_grad():
        for both, alone in zip(backbone(images), backbone(images[1:]), strict=True):
            torch.testing.assert_close(both[1:], alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name, sizes, default", [("swin", TINY_SWIN, 0.1), ("vit", TINY_VIT, 0.15)])
def test_drop_path_rises_linearly_over_all_blocks(name, sizes, default):
    for rate in (None, 0.3):
        backbone = build_backbone(name, (32, 32), sizes if rate is None else sizes | {"drop_path_rate": rate})
        blocks = [module for module in backbone.modules() if hasattr(module, "drop_path1")]
        rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in blocks]
        expected = torch.linspace(0, default if rate is None else rate, len(rates)).tolist()
        assert rates == pytest.approx(expected)


@pytest.mark.parametrize("taps", [None, (2, 3), (1, 4)])
def test_vit_maps(taps):
    backbone = build_backbone("vit", (32, 64), TINY_VIT | {"taps": taps})
    maps = backbone(torch.randn(2, 3, 32, 64))
    assert [tuple(feature.shape) for feature in maps] == [(2, 24, 2, 4)] * (len(taps) if taps else 4)
    assert backbone.strides == (16,) * len(maps) and backbone.channels == (24,) * len(maps)


def test_vit_taps_are_timm_intermediates():
    backbone = build_backbone("vit", (32, 64), TINY_VIT).eval()
    image = torch.randn(2, 3, 32, 64)
    raw = backbone.forward_intermediates(image, norm=False, intermediates_only=True)
    normed = backbone.forward_intermediates(image, norm=True, intermediates_only=True)
    for feature, expected in zip(backbone(image), [*raw[:3], normed[3]], strict=True):
        torch.testing.assert_close(feature, expected)


# ------------------------------------------------------------ position embedding, pyramid


def test_position_embedding_is_resized_without_antialiasing():
    embedding = torch.randn(1, 1 + 24 * 24, 5)
    resized = resize_position_embedding(embedding, (28, 36))
    assert torch.equal(resized[:, 0], embedding[:, 0])  # class entry untouched
    grid = embedding[0, 1:].T.reshape(1, 5, 24, 24)
    expected = F.interpolate(grid, size=(28, 36), mode="bicubic")
    assert torch.equal(resized[0, 1:].T.reshape(1, 5, 28, 36), expected)


@pytest.mark.parametrize("count, grid, changes", [
    (16, (4, 4), False), (15, (3, 5), False), (16, (2, 8), True), (4, (2, 8), True)])
def test_position_embedding_knows_its_own_grid(count, grid, changes):
    embedding = torch.randn(1, 1 + count, 5)
    resized = resize_position_embedding(embedding, grid)
    assert resized.shape == (1, 1 + grid[0] * grid[1], 5)
    assert (resized is embedding) is not changes


def test_position_embedding_of_another_oblong_grid_is_refused():
    with pytest.raises(ValueError, match="15 patches is not a square grid and not the 4x4 grid"):
        resize_position_embedding(torch.randn(1, 16, 5), (4, 4))


def test_pyramid_gives_swin_like_maps_from_a_vit():
    backbone = build_backbone("vit", (64, 96), TINY_VIT)
    neck = SimplePyramid((24, 24, 24, 24), (16, 16, 16, 16), PyramidConfig(embed_dim=6))
    maps = neck(backbone(torch.randn(2, 3, 64, 96)))
    assert neck.channels == (6, 12, 24, 48)
    for feature, channels, stride in zip(maps, neck.channels, neck.strides, strict=True):
        assert feature.shape == (2, channels, 64 // stride, 96 // stride)
    sum((feature * torch.randn_like(feature)).sum() for feature in maps).backward()
    unused = [key for key, parameter in (*neck.named_parameters(), *backbone.named_parameters())
              if parameter.grad is None or not parameter.grad.any()]
    assert unused == []


# ------------------------------------------------------------ errors


@pytest.mark.parametrize("name, sizes, message", [
    ("swin_larg", {}, "unknown backbone 'swin_larg'; did you mean 'swin_large'. known: swin, "),
    ("swin", {}, "backbone 'swin': the key 'backbone_kwargs.embed_dim' is required"),
    ("swin_tiny", {"window": 4}, "unknown key 'backbone_kwargs.window'; did you mean 'window_size'"),
    ("swin", TINY_SWIN | {"depths": (2, 2)}, r"'backbone_kwargs.depths' must be a list of 4 values, got \(2, 2\)"),
    ("swin", TINY_SWIN | {"depths": (2, 2, 0, 2)}, "depths' must be numbers of at least 1"),
    ("swin", TINY_SWIN | {"num_heads": (3, 2, 4, 8)}, r"num_heads' must be divisors of .* \(8, 16, 32, 64\), got \[3"),
    ("swin", TINY_SWIN | {"window_size": (4, 4)}, "window_size' must be a whole number or a list of 4 values"),
    ("vit", TINY_VIT | {"num_heads": 5}, "num_heads' must be a divisor of embed_dim, 24, got 5"),
    ("vit", TINY_VIT | {"taps": (2, 5)}, r"taps' must be numbers that rise within 1 to 4, .* got \[2, 5\]"),
    ("vit", TINY_VIT | {"depth": 2}, r"taps' must be numbers that rise within 1 to 2, .* got None"),
    ("vit", TINY_VIT | {"class_token": "no"}, "class_token' must be true or false or empty"),
    ("vit", TINY_VIT | {"drop_path_rate": 1}, r"drop_path_rate' must be a rate in \[0, 1\)"),
    ("hrnet", {"width": 8, "num_blocks": 1, "num_modules": (1, 0, 1), "stem_blocks": 1}, "num_modules' must be numb"),
])
def test_builder_errors_name_the_value(name, sizes, message):
    with pytest.raises(ValueError, match=message):
        build_backbone(name, (32, 32), sizes)


def test_vit_refuses_other_image_sizes():
    with pytest.raises(ValueError, match="multiples of 16 but got 32x40"):
        build_backbone("vit", (32, 40), TINY_VIT)
    with pytest.raises(ValueError, match=r"built for images of 32x64 .* but got 64x32"):
        build_backbone("vit", (32, 64), TINY_VIT)(torch.zeros(1, 3, 64, 32))
