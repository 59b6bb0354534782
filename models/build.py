"""From names and options to a model, and the check that its parts fit together."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from models.backbones import BACKBONES, PROMPTED
from models.decoder import BuildContext
from models.decoders import DECODERS
from models.heads import FeatureLevels, HeadMaker
from models.model import MultiTaskModel
from models.necks import NECKS
from utils.options import Options, parse
from utils.table import Table


def build_model(model: str, backbone: str, tasks: Mapping[str, int], image_size: tuple[int, int], *,
                label_size: tuple[int, int] | None = None, neck: str = "none",
                heads: Mapping[str, HeadMaker] | None = None,
                model_kwargs: Mapping[str, Any] | Options | None = None,
                backbone_kwargs: Mapping[str, Any] | Options | None = None,
                neck_kwargs: Mapping[str, Any] | Options | None = None) -> MultiTaskModel:
    """Builds a model with fresh weights.

    `model`, `backbone` and `neck` are names of DECODERS, BACKBONES and NECKS; the options of each are a plain mapping
    or have been parsed already. `tasks` maps each task to its number of output channels, in the order of the task
    table (the order is part of the model); `heads` has what makes the heads of those that are no maps. `image_size` is
    (height, width) of the input, `label_size` that of the predictions: by default that of the image, and the decoder's
    options may ask for another. Parts that do not fit raise a ValueError that says what the decoder needs and what the
    backbone gives.
    """
    makers = heads or {}
    decoder_class, config = DECODERS.load(model), _options(DECODERS, model, model_kwargs, "model_kwargs.")
    neck_class, neck_config = NECKS.load(neck), _options(NECKS, neck, neck_kwargs, "neck_kwargs.")
    backbone_config = _options(BACKBONES, backbone, backbone_kwargs, "backbone_kwargs.")
    wanted = decoder_class.backbone_options(tasks, config)
    try:
        if "prompting" in wanted and NECKS.find(neck) != "none":
            raise ValueError(f"it works inside its backbone, there is no place for the neck '{neck}'; leave `neck` out")
        encoder = build_backbone(backbone, image_size, backbone_config, wanted)
        between = neck_class(encoder.channels, encoder.strides, neck_config)
        num_heads = encoder.num_heads if "prompting" in wanted else ()
        decoder = decoder_class(
            BuildContext(dict(tasks), between.channels, between.strides, tuple(image_size), num_heads,
                         frozenset(makers)), config)
    except ValueError as error:
        raise ValueError(f"model '{model}' on backbone '{backbone}': {error}") from error
    multiple = decoder.input_multiple or max(between.strides)
    if any(side % multiple for side in image_size):
        raise ValueError(f"image_size {tuple(image_size)} must be multiples of {multiple} for model '{model}' "
                         f"on backbone '{backbone}'")
    if decoder.unread_maps:
        _freeze_unread(nn.Sequential(encoder, between), image_size, decoder.unread_maps)
    levels = _feature_levels(nn.Sequential(encoder, between, decoder), image_size) if makers else {}
    made = {task: makers[task](levels[task], num_outputs) if task in makers else decoder.make_head(num_outputs)
            for task, num_outputs in tasks.items()}
    return MultiTaskModel(encoder, between, decoder, made, config.label_size or label_size)


def build_backbone(name: str, image_size: tuple[int, int], options: Mapping[str, Any] | Options | None = None,
                   wanted: Mapping[str, Any] | None = None) -> nn.Module:
    """Builds a backbone with random weights (pretrained ones: `utils.engine.pretrained.load_pretrained`).

    `options` stand above the sizes of the name's row in BACKBONES. `wanted` is what a decoder would like
    (`Decoder.backbone_options`): it fills options that are None, and its entry `prompting` asks for the variant with
    task prompts inside. The result also knows where its ImageNet weights are: `pretrained_tag`, `pretrained_file` and
    `pretrained_package`, as in its row. ValueError: an unknown name or option, a value that is missing or does not fit.
    """
    config, wanted = _options(BACKBONES, name, options, "backbone_kwargs."), wanted or {}
    unset = {field.name for field in dataclasses.fields(config) if getattr(config, field.name) is None}
    config = dataclasses.replace(config, **{key: value for key, value in wanted.items() if key in unset})
    entry, size = BACKBONES[BACKBONES.find(name)], tuple(image_size)
    if "prompting" not in wanted:
        backbone = BACKBONES.load(name)(config, size)
    elif entry.target in PROMPTED:
        backbone = PROMPTED.load(entry.target)(config, size, wanted["prompting"])
    else:
        able = ", ".join(key for key, other in BACKBONES.items() if other.target in PROMPTED)
        raise ValueError(f"backbone '{name}' cannot carry task prompts inside its blocks; those that can: {able}")
    for name in ("pretrained_tag", "pretrained_file", "pretrained_package"):
        setattr(backbone, name, getattr(entry, name))
    return backbone


@torch.no_grad()
def _feature_levels(parts: nn.Sequential, image_size: tuple[int, int]) -> dict[str, FeatureLevels]:
    """What backbone, neck and decoder give for every task. A pass on the meta device finds out."""
    state = {name: value.to("meta") for name, value in (*parts.named_parameters(), *parts.named_buffers())}
    parts.eval()
    feats = functional_call(parts, state, torch.empty(1, 3, *image_size, device="meta")).feats
    parts.train()
    levels = {task: feat if isinstance(feat, list) else [feat] for task, feat in feats.items()}
    return {task: FeatureLevels(tuple(feat.shape[1] for feat in maps),
                                tuple(image_size[1] / feat.shape[-1] for feat in maps), image_size[1])
            for task, maps in levels.items()}


@torch.inference_mode(False)
@torch.enable_grad()
def _freeze_unread(maker: nn.Module, image_size: tuple[int, int], unread: Sequence[int]) -> None:
    """Freezes the layers of backbone and neck on which no map depends but those of which the decoder makes nothing.

    They would wait for a gradient in vain, and several processes for each other. A pass on the meta device finds them.
    """
    parameters = dict(maker.named_parameters())
    shapes = {name: torch.empty_like(value, device="meta", requires_grad=name in parameters)
              for name, value in (*parameters.items(), *maker.named_buffers())}
    maps = functional_call(maker, shapes, torch.empty(2, 3, *image_size, device="meta"))
    read = sum(feat.sum() for index, feat in enumerate(maps) if index not in unread)
    gradients = torch.autograd.grad(read, [shapes[name] for name in parameters], allow_unused=True)
    for parameter, gradient in zip(parameters.values(), gradients, strict=True):
        parameter.requires_grad_(gradient is not None)


def _options(table: Table, name: str, given: Mapping[str, Any] | Options | None, prefix: str) -> Any:
    """The options of an entry, checked; `given` itself where it has been parsed already."""
    if given is not None and not isinstance(given, Mapping):
        return given
    values = {**table.defaults(name), **(given or {})}
    return parse(table.options(name), values, prefix, lambda key: f"{table.kind} '{name}'")
