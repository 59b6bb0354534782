"""From names to a model: the tables of decoders and necks, and the check that the parts fit together."""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from torch import nn

from models.backbones import build_backbone
from models.blocks.pyramid import SimplePyramid
from models.decoders.bim import BIMDecoder
from models.decoders.mtmamba import MTMambaDecoder
from models.decoders.mtmamba_plus import MTMambaPlusDecoder
from models.model import MultiTaskModel

DECODERS: dict[str, type[nn.Module]] = {
    "bim": BIMDecoder,
    "mtmamba": MTMambaDecoder,
    "mtmamba_plus": MTMambaPlusDecoder,
    "mtmamba++": MTMambaPlusDecoder,  # the paper's spelling
}

# Names which experiment files of the lineage use; their decoders are not in this version.
NOT_YET = ("TransformerNet", "InvPT", "TaskPrompter", "MLoRE", "BridgeNet", "DeMT")


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
    if head != "default":
        raise ValueError(f"head '{head}' is not available for model '{name}'; leave `head` out for the decoder's own")
    encoder = build_backbone(backbone, image_size, **(backbone_kwargs or {}))
    neck_module, channels, strides = None, encoder.channels, encoder.strides
    if neck == "pyramid":
        neck_module = SimplePyramid(channels, **(neck_kwargs or {}))
        channels, strides = neck_module.channels, neck_module.strides
    try:
        decoder = decoder_class(tuple(tasks), channels, strides, decoder_config(name, model_kwargs or {}))
    except ValueError as error:
        hint = "; `neck: pyramid` makes the four maps" if neck == "none" and len(set(encoder.strides)) == 1 else ""
        raise ValueError(f"model '{name}' on backbone '{backbone}': {error}{hint}") from error
    if any(side % max(strides) for side in image_size):
        raise ValueError(f"image_size {tuple(image_size)} must be multiples of {max(strides)}, the coarsest stride")
    heads = {task: decoder.make_head(num_outputs) for task, num_outputs in tasks.items()}
    return MultiTaskModel(encoder, neck_module, decoder, heads, output_size)


def decoder_config(name: str, options: Mapping[str, Any]) -> Any:
    """The decoder's config dataclass from the experiment file's `model_kwargs`; unknown options are a ValueError."""
    config_class = _decoder_class(name).Config
    known = [f.name for f in dataclasses.fields(config_class)]
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


def _decoder_class(name: str) -> type[nn.Module]:
    if name.lower() in DECODERS:
        return DECODERS[name.lower()]
    if name.lower() in (n.lower() for n in NOT_YET):
        raise ValueError(f"model '{name}' is not yet available; available: {', '.join(DECODERS)}")
    near = difflib.get_close_matches(name, [*DECODERS, *NOT_YET], n=1)
    raise ValueError(f"unknown model '{name}'; " + (f"did you mean '{near[0]}'? " if near else "")
                     + f"available: {', '.join(DECODERS)}")
