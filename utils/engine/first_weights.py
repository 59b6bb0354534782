"""What a run begins with: published or trained weights, adapters on them, and what stays as it is.

With adapters (`lora`) a checkpoint holds what is trained alone; the rest, its base, comes again from where it came
from, and a sum tells whether it is the same.
"""

import hashlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from models.blocks.stacked import split_by_task
from models.lora.layers import adaptable, add_adapters, add_task_adapters, called_layers
from models.model import MultiTaskModel
from utils import distributed
from utils.engine.config import Config
from utils.engine.init_from import init_from
from utils.engine.parameter_groups import freeze, holding_part, is_norm, require_parts, stay_in_eval
from utils.engine.pretrained import load_pretrained
from utils.options import nearest

KINDS = ("norms", "biases")         # in `lora.trained`, beside names of parts

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Base:
    """What checkpoints of a model with adapters leave out: tensors that a file gave and that are not trained."""

    keys: frozenset[str]            # of the state dict
    sha256: str
    source: str                     # in words

    def left_out(self, state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
        """A state dict without it; `prefix`: of its keys there."""
        return {key: value for key, value in state.items() if key.removeprefix(prefix) not in self.keys}

    def about(self) -> dict[str, str]:
        """What a checkpoint says of it."""
        return {"sha256": self.sha256, "source": self.source}

    def completed(self, checkpoint: Mapping[str, Any], model: nn.Module, path: Path) -> dict[str, Any]:
        """A checkpoint together with it, taken from a model that has it; a ValueError where it is of another base."""
        held = checkpoint.get("base")
        if held is None:
            raise ValueError(f"{path} was trained without adapters; leave `lora` out, or start from it with lora.base")
        if held["sha256"] != self.sha256:
            raise ValueError(f"{path} holds adapters for the weights of {held['source']} (sha256 "
                             f"{held['sha256'][:12]}), but {self.source} holds others (sha256 {self.sha256[:12]}); "
                             "name the right file with lora.base=FILE")
        own = {key: value for key, value in model.state_dict().items() if key in self.keys}
        whole = {**checkpoint, "model": {**own, **checkpoint["model"]}}
        if checkpoint.get("ema"):
            whole["ema"] = {**{f"module.{key}": value for key, value in own.items()}, **checkpoint["ema"]}
        return whole


def begin(model: MultiTaskModel, config: Config, resumed: bool) -> Base | None:
    """First weights, adapters, frozen parts, in place. `resumed`: all weights that no base gives will be replaced."""
    if not config.lora.rank:
        if not resumed:
            first_weights(model, config)
        freeze(model, config.freeze)
        return None
    given = first_weights(model, config)
    filled = [parameter for name, parameter in model.named_parameters()
              if all(key in given for key in _keys(model, [name]))]
    _adapt(model, config, {id(parameter) for parameter in filled})
    freeze(model, config.freeze)
    base = _base(model, {id(parameter) for parameter in filled}, _source(config))
    logger.info("adapters on %s: %s tensors stay as they are (sha256 %s); checkpoints hold the rest", base.source,
                len(base.keys), base.sha256[:12])
    return base


def require_whole(checkpoint: Mapping[str, Any], path: Path) -> None:
    """ValueError for a checkpoint with adapters where the experiment asks for none."""
    if checkpoint.get("base"):
        raise ValueError(f"{path} holds adapters for {checkpoint['base']['source']} and no whole model; use it with "
                         "the `lora` of its own experiment")


def first_weights(model: MultiTaskModel, config: Config) -> set[str]:
    """Fills in those of `init_from`, and where they do not fill the backbone those of `pretrained` below them.

    Returns the keys of the state dict that a file gave.
    """
    path, given = config.lora.base or config.init_from, set()
    if path:
        given = init_from(model, Path(path).expanduser())
    if config.pretrained and not all(key in given for key in model.state_dict() if key.startswith("encoder.")):
        with distributed.main_first():                     # one download, which the others then find
            given |= {f"encoder.{key}" for key in load_pretrained(model.encoder, config.pretrained,
                                                                  allow_missing=config.pretrained_allow_missing)}
        if path:
            init_from(model, Path(path).expanduser())
    if not given and distributed.is_main():
        logger.warning("pretrained is false: the backbone starts from random weights")
    return given


def _source(config: Config) -> str:
    parts = [str(path) for path in (config.lora.base or config.init_from,) if path]
    return ", ".join(parts or [f"{config.backbone} pretrained: {config.pretrained}"])


def _keys(model: nn.Module, names: Iterable[str]) -> list[str]:
    """The keys that these parameters and buffers have in the state dict."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return list(split_by_task(model, {name: tensors[name] for name in names}))


# ------------------------------------------------------------ adapters


def _adapt(model: MultiTaskModel, config: Config, filled: set[int]) -> None:
    """Freezes what a file gave of the adapted parts, and puts adapters into its layers."""
    settings = config.lora
    require_parts(model, settings.parts, "lora.parts")
    named = [part for part in settings.trained if part not in KINDS]
    require_parts(model, named, "lora.trained")
    names = _targets(model, config, (*config.freeze, *named), filled)
    kinds = {id(parameter): _kind(model, name) for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        kept = holding_part(name, named) is not None or kinds[id(parameter)] in settings.trained
        if holding_part(name, settings.parts) is not None and id(parameter) in filled and not kept:
            parameter.requires_grad_(False)
    add_adapters(model, names, settings)
    if settings.task_rank:
        _fan_out(model, names, config)
    for module in model.modules():                          # their statistics belong to weights that stay
        if isinstance(module, _BatchNorm) and module.affine and id(module.weight) in filled and not (
                module.weight.requires_grad):
            stay_in_eval(module)
    logger.info("lora: rank %d on %d layers of %s%s", settings.rank, len(names), ", ".join(settings.parts),
                f", rank {settings.task_rank} for each task" if settings.task_rank else "")


def _kind(model: nn.Module, name: str) -> str:
    owner, _, last = name.rpartition(".")
    if is_norm(model.get_submodule(owner)):
        return "norms"
    return "biases" if last == "bias" or last.endswith("_bias") else "weights"


def _targets(model: nn.Module, config: Config, without: Iterable[str], filled: set[int]) -> list[str]:
    """Names of the layers that get adapters; what no file gave is trained as it is. `without`: parts that get none."""
    settings, called = config.lora, called_layers(model, config.input_size)
    inside = {name: layer for name, layer in model.named_modules()
              if adaptable(layer) and holding_part(name, settings.parts) is not None
              and holding_part(name, without) is None and layer.weight.requires_grad and id(layer.weight) in filled}
    if "all" in settings.layers:
        return [name for name in inside if name in called]
    found = [name for name in inside if any(f".{name}".endswith(f".{end}") for end in settings.layers)]
    if silent := [name for name in found if name not in called]:
        raise ValueError(f"lora.layers: {len(silent)} of these layers are read by their owners without being called, "
                         f"so that adapters would not act ({silent[0]}{', ...' if len(silent) > 1 else ''}); name "
                         "others")
    if not found:
        words = dict.fromkeys(name.rpartition(".")[2] for name in inside)
        raise ValueError(f"lora.layers: none of the layers of {', '.join(settings.parts)} that a file gave is called "
                         f"{' or '.join(settings.layers)}; {nearest(settings.layers[0], words)}")
    return found


def _fan_out(model: MultiTaskModel, names: list[str], config: Config) -> None:
    if not hasattr(model.encoder, "fan_out"):
        raise ValueError(f"lora.task_rank: backbone '{config.backbone}' cannot give every task maps of its own; Swin "
                         "can")
    if not model.decoder.takes_task_maps:
        raise ValueError(f"lora.task_rank: model '{config.model}' does not take maps of every task's own; 'fcn' and "
                         "'multi_scale' do")
    blocks = [f"encoder.{name}" for name in model.encoder.fan_out(tuple(model.heads))]
    last = [name for name in names if holding_part(name, blocks) is not None]
    if not last:
        raise ValueError(f"lora.task_rank: no adapted layer lies in {', '.join(blocks)}, the last blocks of the "
                         "stages; name some in lora.layers")
    add_task_adapters(model, last, tuple(model.heads), config.lora)


def _base(model: nn.Module, filled: set[int], source: str) -> Base:
    names = [name for name, parameter in model.named_parameters()
             if id(parameter) in filled and not parameter.requires_grad]
    norms = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)
             and f"{name}.weight" in names]
    names += [f"{name}.{key}" for name in norms for key, _ in model.get_submodule(name).named_buffers()]
    keys = frozenset(_keys(model, names))
    return Base(keys, _sum(model.state_dict(), keys), source)


def _sum(state: Mapping[str, Tensor], keys: Iterable[str]) -> str:
    sha256 = hashlib.sha256()
    for key in sorted(keys):
        value = state[key].detach().cpu().contiguous()
        sha256.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode("ascii"))
        sha256.update(value.flatten().view(torch.uint8).numpy())
    return sha256.hexdigest()
