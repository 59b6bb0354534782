"""From names to a model: the tables of decoders and necks, and the check that the parts fit together."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from torch import nn

from models.backbones import build_backbone, default_options
from models.blocks.pyramid import SimplePyramid
from models.decoders.bim import BIMDecoder
from models.decoders.bridgenet import BridgeNetDecoder
from models.decoders.demt import DeMTDecoder
from models.decoders.fcn import FCNDecoder
from models.decoders.invpt import InvPTDecoder
from models.decoders.mlore import MLoREDecoder
from models.decoders.mtmamba import MTMambaDecoder
from models.decoders.mtmamba_plus import MTMambaPlusDecoder
from models.decoders.multi_scale import MultiScaleDecoder
from models.decoders.taskprompter import TaskPrompterDecoder
from models.model import Decoder, MultiTaskModel

DECODERS: dict[str, type[Decoder]] = {
    "bim": BIMDecoder,
    "bridgenet": BridgeNetDecoder,
    "demt": DeMTDecoder,
    "fcn": FCNDecoder,
    "invpt": InvPTDecoder,
    "mlore": MLoREDecoder,
    "mtmamba": MTMambaDecoder,
    "mtmamba_plus": MTMambaPlusDecoder,
    "mtmamba++": MTMambaPlusDecoder,  # the paper's spelling
    "multi_scale": MultiScaleDecoder,
    "taskprompter": TaskPrompterDecoder,
}


def build_model(name: str, backbone: str, tasks: Mapping[str, int], image_size: tuple[int, int], *,
                output_size: tuple[int, int] | None = None, neck: str = "none", head: str = "default",
                backbone_kwargs: Mapping[str, Any] | None = None, neck_kwargs: Mapping[str, Any] | None = None,
                model_kwargs: Mapping[str, Any] | None = None) -> MultiTaskModel:
    """Builds a model with fresh weights.

    `tasks` maps each task to its number of output channels, in the order of the task table (the order is part of
    the model). `image_size` is (height, width) of the input. Parts that do not fit raise a ValueError that says
    what the decoder needs and what the backbone gives.
    """
    decoder_class = _decoder_class(name)
    if head not in ("default", *decoder_class.head_names):
        raise ValueError(f"head '{head}' is not available for model '{name}'; leave `head` out for the decoder's own")
    options = dict(model_kwargs or {})
    if head != "default" and "head" in _options(decoder_class):  # a decoder with several heads
        options["head"] = head
    config = decoder_config(name, options)
    preferred = default_options(backbone, decoder_class.backbone_options)
    encoder, inner = _encoder(name, backbone, tasks, image_size, neck, config, {**preferred, **(backbone_kwargs or {})})
    if decoder_class.needs_image_size:
        inner["image_size"] = image_size
    neck_module = _pyramid(encoder, neck_kwargs or {}) if neck == "pyramid" else None
    maps = encoder if neck_module is None else neck_module
    try:
        decoder = decoder_class(dict(tasks), maps.channels, maps.strides, config, **inner)
    except ValueError as error:
        plain_vit = neck == "none" and not inner and encoder.strides == encoder.strides[:1] * 4
        hint = "; `neck: pyramid` makes the four maps" if plain_vit else ""
        raise ValueError(f"model '{name}' on backbone '{backbone}': {error}{hint}") from error
    multiple = decoder.input_multiple or max(maps.strides)
    if any(side % multiple for side in image_size):
        raise ValueError(f"image_size {tuple(image_size)} must be multiples of {multiple} for model '{name}' "
                         f"on backbone '{backbone}'")
    heads = {task: decoder.make_head(num_outputs) for task, num_outputs in tasks.items()}
    return MultiTaskModel(encoder, neck_module, decoder, heads, decoder.output_size or output_size)


def _encoder(name: str, backbone: str, tasks: Mapping[str, int], image_size: tuple[int, int], neck: str,
             config: Any, backbone_kwargs: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """The backbone, and what a decoder whose prompts run inside it must know besides its maps."""
    prompting = _decoder_class(name).prompting(len(tasks), config)
    if prompting is None:
        return build_backbone(backbone, image_size, **backbone_kwargs), {}
    if neck != "none":
        raise ValueError(f"model '{name}' works inside its backbone, there is no place for the neck '{neck}'; "
                         "leave `neck` out")
    try:
        encoder = build_backbone(backbone, image_size, prompting=prompting, **backbone_kwargs)
    except ValueError as error:
        raise ValueError(f"model '{name}': {error}") from error
    return encoder, {"num_heads": encoder.num_heads}


def _pyramid(encoder: nn.Module, options: Mapping[str, Any]) -> SimplePyramid:
    if options.keys() != {"embed_dim"}:
        raise ValueError("neck 'pyramid' takes neck_kwargs.embed_dim, the width of its finest map, and nothing else; "
                         f"got {dict(options)}")
    return SimplePyramid(encoder.channels, encoder.strides, **options)


def decoder_config(name: str, options: Mapping[str, Any]) -> Any:
    """The decoder's config dataclass from the experiment file's `model_kwargs`; unknown options are a ValueError."""
    config_class, known = _decoder_class(name).Config, _options(_decoder_class(name))
    for key in options:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            raise ValueError(f"model_kwargs.{key} is not an option of model '{name}'; "
                             + (f"did you mean '{near[0]}'?" if near else f"its options: {', '.join(known)}"))
    frozen = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    try:
        return config_class(**frozen)
    except (TypeError, ValueError) as error:
        raise ValueError(f"model_kwargs of model '{name}': {error}") from error


def _options(decoder_class: type[Decoder]) -> list[str]:
    return [field.name for field in dataclasses.fields(decoder_class.Config)]


def intermediate_weight(name: str) -> float:
    """Published factor of the losses of a model's preliminary predictions; published experiment files lack it."""
    return _decoder_class(name).intermediate_weight


def _decoder_class(name: str) -> type[Decoder]:
    if name.lower() in DECODERS:
        return DECODERS[name.lower()]
    near = difflib.get_close_matches(name.lower(), DECODERS, n=1)
    raise ValueError(f"unknown model '{name}'; " + (f"did you mean '{near[0]}'? " if near else "")
                     + f"available: {', '.join(DECODERS)}")
