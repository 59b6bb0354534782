"""Every decoder on every kind of backbone: it trains and predicts, or one sentence says why it does not."""

import pytest
import torch

from models.build import build_model
from models.decoders import DECODERS
from models.necks.pyramid import PyramidConfig, SimplePyramid

SWIN = {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8), "window_size": 4}
VIT = {"embed_dim": 16, "depth": 4, "num_heads": 2}
HRNET = {"width": 8, "num_blocks": 1, "num_modules": (1, 1, 1), "stem_blocks": 1}
INTERN = {"embed_dim": 16, "depths": (1, 1, 1, 1), "groups": (1, 2, 4, 8)}
PYRAMID = {"neck": "pyramid", "neck_kwargs": {"embed_dim": 8}}

BACKBONES = {
    "swin": ("swin", {"backbone_kwargs": SWIN}), "vit": ("vit", {"backbone_kwargs": VIT}),
    "vit, pyramid": ("vit", {"backbone_kwargs": VIT, **PYRAMID}), "hrnet": ("hrnet", {"backbone_kwargs": HRNET}),
    "internimage": ("internimage", {"backbone_kwargs": INTERN}),
}
SMALL = {
    "bim": {"msst_depth": 1}, "bridgenet": {"embed_dim": 16, "PRED_OUT_NUM_CONSTANT": 16, "refine_depth": (1, 1, 1)},
    "demt": {"dim": 8}, "invpt": {"embed_dim": 16, "PRED_OUT_NUM_CONSTANT": 16},
    "mlore": {"final_embed_dim": 8, "rank_list": (2, 4), "topk": 1, "spe_rank": 2}, "mtmamba": {"stm_depth": 1},
    "mtmamba_plus": {"stm_depth": 1}, "multi_scale": {"channels": 8},
    "taskdiffusion": {"final_embed_dim": 8},
    "taskprompter": {"embed_dim": 8, "final_embed_dim": 8, "level_embed_dim": 8, "chan_embed_dim": 4},
}

NEEDS_PYRAMID = {"vit": "strides 4, 8, 16, 32 and widths e, 2e, 4e, 8e; got .*`neck: pyramid` .*makes them out of oth"}
NEEDS_VIT = {name: "needs .*maps of one stride.* as a plain ViT gives; got .*`neck: one_stride` .*makes them out of oth"
             for name in BACKBONES if name != "vit"}
REFUSED = {
    **dict.fromkeys(("bim", "mtmamba", "mtmamba_plus"), NEEDS_PYRAMID),
    **dict.fromkeys(("invpt", "mlore", "taskdiffusion"), NEEDS_VIT),
    "taskprompter": {"vit, pyramid": "no place for the neck 'pyramid'; leave `neck` out",
                     "hrnet": "'hrnet' cannot carry task prompts", "internimage": "cannot carry task prompts"},
}


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("decoder", DECODERS)
def test_pair(decoder, backbone):
    torch.manual_seed(0)
    name, arguments = BACKBONES[backbone]

    def build():
        return build_model(decoder, name, {"semseg": 5, "depth": 1}, (64, 64), model_kwargs=SMALL.get(decoder),
                           **arguments)

    if reason := REFUSED.get(decoder, {}).get(backbone):
        with pytest.raises(ValueError, match=reason) as caught:
            build()
        assert str(caught.value).startswith(f"model '{decoder}'") and "\n" not in str(caught.value)
        return
    model = build()
    out = model(torch.randn(2, 3, 64, 64), {task: torch.ones(2, 1, 64, 64) for task in model.heads})
    sum(part.float().mean() for group in out for part in group.values()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    with torch.no_grad():
        final = model.prepare_for_inference()(torch.randn(1, 3, 64, 64)).final
    assert {task: logits.shape for task, logits in final.items()} == {"semseg": (1, 5, 64, 64), "depth": (1, 1, 64, 64)}


@pytest.mark.parametrize("backbone, arguments, message", [
    ("vit", {"backbone_kwargs": {**VIT, "patch_size": 12}, **PYRAMID}, r"powers of two; got strides \(12, 12, 12, 12"),
    ("swin", {"backbone_kwargs": SWIN, "neck": "one_stride", "neck_kwargs": {"embed_dim": 8, "stride": 12}},
     r"powers of two; got strides \(4, 8, 16, 32, 12\)"),
    ("vit", {"backbone_kwargs": VIT, "neck": "pyramid"}, "the key 'neck_kwargs.embed_dim' is required"),
    ("vit", {"backbone_kwargs": VIT, "neck": "pyramid", "neck_kwargs": {"embed_dim": 8, "widths": 4}},
     "unknown key 'neck_kwargs.widths'"),
    ("vit", {"backbone_kwargs": VIT, "neck": "pyramid", "neck_kwargs": {"embed_dim": 0}},
     "number of at least 1, got 0"),
    ("vit", {"backbone_kwargs": VIT, "neck": "pyramids"}, "did you mean 'pyramid'")])
def test_a_neck_that_does_not_fit_is_refused(backbone, arguments, message):
    with pytest.raises(ValueError, match=f"neck .*{message}"):
        build_model("fcn", backbone, {"depth": 1}, (96, 96), **arguments)


@pytest.mark.parametrize("neck, strides", [("pyramid", (4, 8, 16, 32)), ("one_stride", (16, 16, 16, 16))])
@pytest.mark.parametrize("backbone, arguments", [
    ("vit", {**VIT, "patch_size": 8}), ("vit", {**VIT, "patch_size": 32}), ("swin", SWIN),
    ("swin", {**SWIN, "patch_size": 2})])
def test_a_neck_makes_its_strides_of_any(neck, strides, backbone, arguments):
    model = build_model("fcn", backbone, {"depth": 1}, (64, 128), backbone_kwargs=arguments, neck=neck,
                        neck_kwargs={"embed_dim": 8})
    maps = model.neck(model.encoder(torch.zeros(1, 3, 64, 128)))
    widths = (8, 16, 32, 64) if neck == "pyramid" else (8, 8, 8, 8)
    assert model.neck.strides == strides and model.neck.channels == widths
    assert [feat.shape for feat in maps] == [(1, width, 64 // stride, 128 // stride)
                                             for width, stride in zip(widths, strides, strict=True)]


def test_levels_are_made_of_the_nearest_maps():
    neck = SimplePyramid((5, 6), (8, 32), PyramidConfig(embed_dim=4))
    maps = neck([torch.zeros(1, 5, 8, 16), torch.zeros(1, 6, 2, 4)])
    assert [feat.shape[1:] for feat in maps] == [(4, 16, 32), (8, 8, 16), (16, 4, 8), (32, 2, 4)]
    assert list(neck.sources) == [0, 0, 0, 1]       # stride 16 lies between: of two equally near the finer


def test_layers_of_maps_that_nothing_is_made_of_are_frozen():
    """BridgeNet reads no finest map: Swin's norm of it would never get a gradient."""
    model = build_model("bridgenet", "swin", {"depth": 1}, (64, 64), model_kwargs=SMALL["bridgenet"],
                        backbone_kwargs=SWIN)
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert frozen == ["encoder.norm0.weight", "encoder.norm0.bias"]
    with torch.no_grad():
        model = build_model("invpt", "swin", {"depth": 1}, (64, 64), model_kwargs=SMALL["invpt"], backbone_kwargs=SWIN,
                            neck="one_stride", neck_kwargs={"embed_dim": 8})
    frozen = {name.rpartition(".")[0] for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"encoder.norm2", "neck.levels.2.0", "neck.levels.2.1"}
