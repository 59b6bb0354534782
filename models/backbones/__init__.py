"""The backbones a YAML may name, and the contract between them and everything else.

A backbone is an nn.Module with
    forward(image (B, 3, H, W)) -> list of NCHW maps, finest first;
    channels, strides: one entry per map;
    recomputed: classes of its blocks, or names of its methods, for activation checkpointing;
    never_pretrained: names of submodules no published file holds;
    convert_state_dict(state): published key layouts -> own keys;
    pretrained_tag, pretrained_file: ImageNet weights: timm's name and the name of the original file, or None;
    pretrained_home: where that file is published, of a backbone that timm does not have.
A new backbone is one file and one row of BACKBONES.
"""

import difflib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from models.backbones.hrnet import HRNetBackbone
from models.backbones.internimage import InternImageBackbone
from models.backbones.prompted_swin import PromptedSwin
from models.backbones.prompted_vit import PromptedViT
from models.backbones.swin import SwinBackbone
from models.backbones.vit import ViTBackbone
from models.blocks.prompting import Prompting


@dataclass(frozen=True)
class BackboneEntry:
    """One row of the table: class, default sizes, ImageNet weights."""

    cls: type[nn.Module]
    sizes: dict = field(default_factory=dict)
    pretrained_tag: str | None = None  # timm model name with its weight tag
    pretrained_file: str | None = None  # file name of the original release


def _swin(embed_dim: int, depths: tuple, num_heads: tuple, window_size: int, tag: str,
          file: str) -> BackboneEntry:
    sizes = {"embed_dim": embed_dim, "depths": depths, "num_heads": num_heads, "window_size": window_size}
    return BackboneEntry(SwinBackbone, sizes, tag, file)


def _hrnet(width: int, num_blocks: int, num_modules: tuple, stem_blocks: int, tag: str, file: str) -> BackboneEntry:
    sizes = {"width": width, "num_blocks": num_blocks, "num_modules": num_modules, "stem_blocks": stem_blocks}
    return BackboneEntry(HRNetBackbone, sizes, tag, file)


def _vit(embed_dim: int, depth: int, num_heads: int, tag: str, file: str) -> BackboneEntry:
    sizes = {"embed_dim": embed_dim, "depth": depth, "num_heads": num_heads}
    return BackboneEntry(ViTBackbone, sizes, tag, file)


def _internimage(embed_dim: int, depths: tuple, file: str, **others) -> BackboneEntry:
    groups = tuple(embed_dim * 2**level // 16 for level in range(4))  # of 16 channels
    return BackboneEntry(InternImageBackbone, {"embed_dim": embed_dim, "depths": depths, "groups": groups, **others},
                         None, file)


BACKBONES: dict[str, BackboneEntry] = {
    "swin": BackboneEntry(SwinBackbone),  # sizes from the YAML
    "swin_tiny": _swin(96, (2, 2, 6, 2), (3, 6, 12, 24), 7, "swin_tiny_patch4_window7_224.ms_in1k",
                       "swin_tiny_patch4_window7_224.pth"),
    "swin_small": _swin(96, (2, 2, 18, 2), (3, 6, 12, 24), 7, "swin_small_patch4_window7_224.ms_in1k",
                        "swin_small_patch4_window7_224.pth"),
    "swin_base": _swin(128, (2, 2, 18, 2), (4, 8, 16, 32), 12,
                       "swin_base_patch4_window12_384.ms_in22k_ft_in1k",
                       "swin_base_patch4_window12_384_22kto1k.pth"),
    "swin_large": _swin(192, (2, 2, 18, 2), (6, 12, 24, 48), 12,
                        "swin_large_patch4_window12_384.ms_in22k_ft_in1k",
                        "swin_large_patch4_window12_384_22kto1k.pth"),
    "hrnet": BackboneEntry(HRNetBackbone),  # sizes from the YAML
    # The "HRNet-18" of ATRC and DeMT, a quarter of the full W18's depth; OpenMMLab's name lacks the "v2".
    "hrnet_w18_small_v2": _hrnet(18, 2, (1, 3, 2), 2, "hrnet_w18_small_v2.ms_in1k",
                                 "hrnetv2_w18_small-b5a04e21.pth"),
    "hrnet_w18": _hrnet(18, 4, (1, 4, 3), 4, "hrnet_w18.ms_in1k", "hrnetv2_w18-00eb2006.pth"),
    "hrnet_w48": _hrnet(48, 4, (1, 4, 3), 4, "hrnet_w48.ms_in1k", "hrnetv2_w48-d2186c55.pth"),
    "vit": BackboneEntry(ViTBackbone),  # sizes from the YAML
    "vit_small": _vit(384, 12, 6, "vit_small_patch16_384.augreg_in21k_ft_in1k",
                      "S_16-i21k-300ep-lr_0.001-aug_light1-wd_0.03-do_0.0-sd_0.0"
                      "--imagenet2012-steps_20k-lr_0.03-res_384.npz"),
    "vit_base": _vit(768, 12, 12, "vit_base_patch16_384.augreg_in21k_ft_in1k",
                     "B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0"
                     "--imagenet2012-steps_20k-lr_0.01-res_384.npz"),
    "vit_large": _vit(1024, 24, 16, "vit_large_patch16_384.augreg_in21k_ft_in1k",
                      "L_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.1-sd_0.1"
                      "--imagenet2012-steps_20k-lr_0.01-res_384.npz"),
    "internimage": BackboneEntry(InternImageBackbone),  # sizes from the YAML
    "internimage_t": _internimage(64, (4, 4, 18, 4), "internimage_t_1k_224.pth", post_norm=False,
                                  drop_path_rate=0.2),
    "internimage_s": _internimage(80, (4, 4, 21, 4), "internimage_s_1k_224.pth", drop_path_rate=0.3),
    "internimage_b": _internimage(112, (4, 4, 21, 4), "internimage_b_1k_224.pth"),
    "internimage_l": _internimage(160, (5, 5, 22, 5), "internimage_l_22k_192to384.pth", offset_scale=2.0),
}
# Short names used by the configurations of InvPT and its successors.
BACKBONES |= {
    short: BACKBONES[name]
    for short, name in {
        "swinT": "swin_tiny", "swinS": "swin_small", "swinB": "swin_base", "swinL": "swin_large",
        "vitS": "vit_small", "vitB": "vit_base", "vitL": "vit_large",
        "intern_t": "internimage_t", "intern_s": "internimage_s", "intern_b": "internimage_b",
        "intern_l": "internimage_l",
    }.items()
}

# Variants that carry task prompts through their blocks and return one `PromptedMap` per level.
PROMPTED: dict[type[nn.Module], type[nn.Module]] = {ViTBackbone: PromptedViT, SwinBackbone: PromptedSwin}


def build_backbone(name: str, image_size: Sequence[int], drop_path_rate: float | None = None,
                   prompting: Prompting | None = None, **sizes) -> nn.Module:
    """Builds a backbone with random weights (pretrained ones: `utils.engine.checkpoint.load_pretrained`).

    Args:
        name: key of BACKBONES; `swin`, `hrnet`, `vit` and `internimage` have no default sizes.
        image_size: (height, width) of the training images; fixed for a ViT and with prompts, irrelevant otherwise.
        drop_path_rate: stochastic depth; None = the backbone's published default.
        prompting: asks for the variant with task prompts inside.
        sizes: any other constructor argument, e.g. embed_dim, depths, num_heads, window_size.
    Raises:
        ValueError: unknown name or argument, or a size that is missing or does not fit.
    """
    if name not in BACKBONES:
        raise ValueError(f"unknown backbone '{name}'{_nearest(name, BACKBONES)}; "
                         f"valid: {', '.join(BACKBONES)}")
    entry = BACKBONES[name]
    parameters = inspect.signature(entry.cls).parameters
    valid = [key for key in parameters if key != "image_size"]
    for key in sizes:
        if key not in valid:
            raise ValueError(f"backbone '{name}' has no argument '{key}'{_nearest(key, valid)}; "
                             f"valid: {', '.join(valid)}")
    arguments = entry.sizes | sizes
    if "image_size" in parameters:
        arguments["image_size"] = tuple(image_size)
    if drop_path_rate is not None:
        arguments["drop_path_rate"] = drop_path_rate
    needed = [key for key, value in parameters.items()
              if value.default is value.empty and key not in arguments]
    if needed:
        raise ValueError(f"backbone '{name}' has no default for {', '.join(needed)}: "
                         "give them in the configuration")
    if prompting is None:
        backbone = entry.cls(**arguments)
    else:
        backbone = _prompted_class(name)(prompting, **{**arguments, "image_size": tuple(image_size)})
    backbone.pretrained_tag, backbone.pretrained_file = entry.pretrained_tag, entry.pretrained_file
    return backbone


def _prompted_class(name: str) -> type[nn.Module]:
    if BACKBONES[name].cls not in PROMPTED:
        able = ", ".join(key for key, entry in BACKBONES.items() if entry.cls in PROMPTED)
        raise ValueError(f"backbone '{name}' cannot carry task prompts inside its blocks; those that can: {able}")
    return PROMPTED[BACKBONES[name].cls]


def default_options(name: str, wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Of a decoder's preferences those that this backbone knows: the others mean another kind of backbone."""
    known = inspect.signature(BACKBONES[name].cls).parameters if name in BACKBONES else ()
    return {key: value for key, value in wanted.items() if key in known}


def _nearest(word: str, choices) -> str:
    close = difflib.get_close_matches(word, list(choices), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""
