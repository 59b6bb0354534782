"""Any architecture of timm that gives feature maps: `backbone: timm:NAME`.

timm says of each model which maps it has, how wide they are and by what factor they shrink the image. Pyramids
(ConvNeXt, EfficientNet, ResNet, Swin V2, ...) give their four coarsest maps. Plain transformers (DINOv2, DINOv3, EVA,
SAM, CLIP, ...) give the tokens after four of their blocks as maps; class and register tokens are dropped.
Letters: B batch, C channels, H W image size, s stride of a map.
"""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from models.blocks.resize import resize
from utils.options import Options

# The two layouts in which EfficientNet is published hold the same tensors in the same order.
EFFICIENTNET_STEM = "_conv_stem.weight"
BLOCK_NAMES = ("Block", "neck", "Basic", "InvertedResidual", "Separable")  # in classes' names, by timm's habit
OWN_PREFIX = "net.model."  # of a plain transformer's parameters here
POSITION_TABLES = ("pos_embed", "rel_pos_h", "rel_pos_w")  # those that timm leaves at their size in some models
BUILD_ERRORS = (TypeError, RuntimeError, AssertionError, AttributeError, ValueError, IndexError, NotImplementedError)


@dataclass(frozen=True)
class TimmConfig(Options):
    """Options of the backbone.

    architecture: timm's name of the model; it follows `timm:` in the backbone's name.
    taps: which maps to take, counted from 1, finest first; of a plain transformer the blocks after which to read the
    tokens. Empty: the four coarsest maps of a pyramid, the four quarters of a transformer's depth.
    stride: pixels of the image per pixel of the (finest) map. Another one than the model's own resizes the image on
    the way in: with patches of 14 pixels the default 16 makes 28 x 36 patches of an image of 448 x 576, so that
    decoders find the grids they know. Empty: the model's own, or the next power of two where it is none.
    norm: read the taps of a plain transformer after its final norm (DINOv2's habit); false: raw.
    drop_path_rate: stochastic depth of the last block; empty: timm's default, which is 0.
    timm_mean_std: true feeds the network images normalised as its weights expect by timm's record, false always with
    ImageNet's mean and standard deviation.
    timm_args: further arguments of the model's constructor, e.g. {embed_dim: 96}.
    """

    architecture: str
    taps: tuple[int, ...] | None = None
    stride: int | None = None
    norm: bool = True
    drop_path_rate: float | None = None
    timm_mean_std: bool = True
    timm_args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        rising = self.taps is None or (self.taps and list(self.taps) == sorted(set(self.taps)) and self.taps[0] >= 1)
        self.require(rising, "taps", "numbers of at least 1 that rise, or empty")
        self.require(self.stride is None or self.stride >= 1, "stride", "a whole number of at least 1, or empty")
        self.require(self.drop_path_rate is None or 0 <= self.drop_path_rate < 1, "drop_path_rate",
                     "a rate in [0, 1), or empty")


class TimmBackbone(nn.Module):
    """A model of timm without its classifier; its parameters are `net.*`.

    Models whose weights belong to one grid (position embeddings, window masks) are built for `image_size`.
    """

    Config = TimmConfig
    never_pretrained = ()

    def __init__(self, config: TimmConfig, image_size: tuple[int, int]):
        super().__init__()
        self.architecture, self.image_size, self.options = config.architecture, tuple(image_size), config.timm_args
        if config.drop_path_rate is not None:
            self.options = {**self.options, "drop_path_rate": config.drop_path_rate}
        with torch.device("meta"):  # to see its maps, without memory or time
            probe = _create(self.architecture, self.options, features_only=True)
        record, reductions = probe.pretrained_cfg, [level["reduction"] for level in probe.feature_info.info]
        taps = _taps(config, reductions)
        own = reductions[taps[0]]
        self.finest = (config.stride or _power_of_two(own), own)  # stride in the given image, and in the network's
        self.fixed = record["fixed_input_size"]
        if self.fixed:
            self.options = {"img_size": self._inner_size(image_size), **self.options}
        norm = config.norm if isinstance(probe, FeatureGetterNet) and len(set(reductions)) == 1 else None
        with torch.device("meta"):
            self._try_out(_feature_net(self.architecture, self.options, taps, norm))
        self.net = _feature_net(self.architecture, self.options, taps, norm)
        info = self.net.feature_info
        self.channels = tuple(info.channels())
        self.strides = tuple(reduction * self.finest[0] // own for reduction in info.reduction())
        self.maps_nhwc = str(getattr(self.net, "output_fmt", "NCHW")).endswith("NHWC")
        self.recomputed = _block_classes(self.net)
        self._set_statistics(record if config.timm_mean_std else {})

    def _try_out(self, net: nn.Module) -> None:
        """ValueError where a net on the meta device does not take this image size."""
        image = torch.empty(2, 3, *self._inner_size(self.image_size), device="meta")
        try:
            net(image)
        except BUILD_ERRORS as error:
            raise ValueError("timm's '{}' does not take images of {}x{} (height x width): {}".format(
                self.architecture, *image.shape[-2:], str(error) or type(error).__name__)) from error

    def _inner_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(height, width) of the image inside the network."""
        stride, own = self.finest
        return tuple(math.ceil(side / stride) * own if stride != own else side for side in size)

    def _set_statistics(self, record: Mapping[str, Any]) -> None:
        """Factor and shift from ImageNet's mean and deviation, which images have, to those that timm records."""
        mean, std = (tuple(record.get(key, usual)) for key, usual in (("mean", IMAGENET_DEFAULT_MEAN),
                                                                      ("std", IMAGENET_DEFAULT_STD)))
        self.renormalise = (mean, std) != (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        given_mean, given_std, mean, std = (torch.tensor(values).view(3, 1, 1) for values in (
            IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, mean, std))
        self.register_buffer("factor", given_std / std, persistent=False)
        self.register_buffer("shift", (given_mean - mean) / std, persistent=False)

    def forward(self, image: Tensor) -> list[Tensor]:
        """Image (B, 3, H, W), normalised with ImageNet's statistics -> maps (B, C_i, ceil(H/s_i), ceil(W/s_i)),
        finest first."""
        size = tuple(image.shape[-2:])
        if self.fixed and size != self.image_size:
            raise ValueError("{} was built for images of {}x{} (height x width) but got {}x{}".format(
                self.architecture, *self.image_size, *size))
        if self.renormalise:
            image = image * self.factor + self.shift
        maps = self.net(resize(image, self._inner_size(size)))
        if self.maps_nhwc:
            maps = [feat.permute(0, 3, 1, 2) for feat in maps]  # (B, H, W, C) -> (B, C, H, W)
        grids = [tuple(-(-side // stride) for side in size) for stride in self.strides]
        return [resize(feat.contiguous(), grid) for feat, grid in zip(maps, grids, strict=True)]

    def convert_state_dict(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Published weights, or own ones of another image size -> own keys, prepared as timm does it (position tables
        fitted to this grid, ...)."""
        if all(key.startswith(OWN_PREFIX) for key in state):
            state = {key.removeprefix(OWN_PREFIX): value for key, value in state.items()}
        with torch.device("meta"):
            model = _create(self.architecture, self.options)
        whole = model.state_dict()
        state = _efficientnet_names(state, whole)
        prepare = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        if prepare is not None:
            state = prepare(dict(state), model)
        names = _published_names(self.state_dict(), whole)
        tops = {key.partition(".")[0] for key in names}
        # A layer that this architecture lacks, beside layers that it has, is reported under a key of ours.
        state = {names.get(key, f"net.{key}" if key.partition(".")[0] in tops and key not in whole else key): value
                 for key, value in state.items()}
        own = self.state_dict()
        return {key: _fitted(value, own[key].shape) if key in own and key.endswith(POSITION_TABLES) else value
                for key, value in state.items()}


def _create(name: str, options: Mapping[str, Any], **more: Any) -> nn.Module:
    """timm's model with random weights; what its constructor refuses is a ValueError."""
    try:
        return timm.create_model(name, pretrained=False, **options, **more)
    except BUILD_ERRORS as error:
        raise ValueError(f"timm cannot build '{name}' with {dict(options)} as a backbone: "
                         f"{str(error) or type(error).__name__}") from error


def _feature_net(name: str, options: Mapping[str, Any], taps: list[int], norm: bool | None) -> nn.Module:
    """The model that returns its maps; `norm` (of a plain transformer): whether they pass the final norm."""
    if norm is None:
        return _create(name, options, features_only=True, out_indices=taps)
    return FeatureGetterNet(_create(name, options), taps, norm=norm)


def _taps(config: TimmConfig, reductions: list[int]) -> list[int]:
    """Indices of the maps to take out of those with these reductions."""
    if config.taps is not None:
        config.require(config.taps[-1] <= len(reductions), "taps", f"numbers of at most {len(reductions)}, the maps "
                                                                   f"of '{config.architecture}'")
        return [tap - 1 for tap in config.taps]
    if len(set(reductions)) == 1:
        return sorted({max(1, len(reductions) * quarter // 4) - 1 for quarter in (1, 2, 3, 4)})
    last = {reduction: index for index, reduction in enumerate(reductions)}
    return sorted(last.values())[-4:]


def _power_of_two(stride: int) -> int:
    """The stride, or the next power of two."""
    return 1 << (stride - 1).bit_length()


def _block_classes(net: nn.Module) -> tuple[type[nn.Module], ...]:
    """Classes of the outermost blocks, for activation checkpointing."""
    found: dict[type[nn.Module], None] = {}

    def visit(module: nn.Module) -> None:
        if any(word in type(module).__name__ for word in BLOCK_NAMES):
            found[type(module)] = None
            return
        for child in module.children():
            visit(child)

    visit(net)
    return tuple(found)


def _published_names(own: Mapping[str, Any], published: Mapping[str, Any]) -> dict[str, str]:
    """Published key -> ours, of the layers that this backbone has. timm's wrappers prefix keys or join their first two
    words ("stages.0" becomes "stages_0")."""
    names = {}
    for key in published:
        first, _, rest = key.partition(".")
        second, _, others = rest.partition(".")
        for candidate in (f"net.model.{key}", f"net.{key}", f"net.{first}_{second}.{others}"):
            if candidate in own:
                names[key] = candidate
                break
    return names


def _fitted(table: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A position table resized to `shape`, if it is a grid (1, H, W, C) or a line (L, C) of another size."""
    if table.shape == shape or table.ndim != len(shape) or table.shape[-1] != shape[-1]:
        return table
    if table.ndim == 4:
        grid = table.movedim(-1, 1)  # (1, C, H, W)
        return F.interpolate(grid, shape[1:3], mode="bicubic", align_corners=False).movedim(1, -1)
    if table.ndim == 2:
        return F.interpolate(table.T[None], shape[0], mode="linear", align_corners=False)[0].T
    return table


def _efficientnet_names(state: Mapping[str, Tensor], published: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Weights in the layout of the package EfficientNet-PyTorch (Lite, too) under timm's keys, others as they are.

    Both list the same tensors in the same order; a file that does not is a ValueError.
    """
    if EFFICIENTNET_STEM not in state:
        return state
    same = len(state) == len(published) and all(
        mine.shape == theirs.shape and key.split(".")[-1] == other.split(".")[-1]
        for (key, mine), (other, theirs) in zip(state.items(), published.items(), strict=True))
    if not same:
        raise ValueError("the file holds another EfficientNet than the backbone: its tensors differ in number or shape")
    return dict(zip(published, state.values(), strict=True))
