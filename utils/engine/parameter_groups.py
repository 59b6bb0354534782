"""Which parameters are trained, how fast, and with which weight decay.

A part of the model is named by a prefix of its parameters' names: `encoder`, `neck`, `decoder`, `heads`, `heads.depth`,
`encoder.layers.0`. By default all parameters are one group with one learning rate and weight decay on everything, norms
and biases included, as in the published recipes.
"""

import re
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from utils.engine.config import Config
from utils.options import nearest

# Stage and block in a parameter's name: blocks.3, layers.1.blocks.0, stages_1.blocks.0, layer1.0
BLOCK = re.compile(r"(?:^|\.)(?:blocks|layers|stages|levels|layer|stage)[._]?(\d+)(?:\.(?:blocks\.)?(\d+))?(?=\.)")
# Beside norms, biases and everything of one dimension: position tables, tokens, and Mamba's A and D.
WITHOUT_DECAY = ("pos_embed", "cls_token", "reg_token", "relative_position_bias_table", "rel_pos_h", "rel_pos_w",
                 "A_log", "D", "bias", "_bias")


def freeze(model: nn.Module, parts: Sequence[str]) -> None:
    """No gradients for these parts, which stay in eval mode: neither running statistics nor stochastic depth.

    ValueError: a part that the model does not have, or nothing left to train.
    """
    require_parts(model, parts, "freeze")
    for name, parameter in model.named_parameters():
        if holding_part(name, parts) is not None:
            parameter.requires_grad_(False)
    for name, module in model.named_modules():
        if name in parts:
            stay_in_eval(module)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"freeze: {', '.join(parts)} leaves nothing to train")


def parameter_groups(config: Config, model: nn.Module) -> list[dict[str, Any]]:
    """Groups for an optimizer; `lr_scale`, where it is not 1, is a factor of the learning rate.

    lr_scale: factors of parts, that of the longest prefix. layer_decay d: the blocks of the backbone, counted from the
    last, have d, d^2, ... and its embeddings one more; what follows the blocks has 1 (Bao et al., "BEiT", ICLR 2022).
    weight_decay_on: weights, not norms, biases, position tables, tokens or the A and D of scans.
    """
    require_parts(model, config.lr_scale, "lr_scale")
    exempt = _without_decay(model) if config.weight_decay_on == "weights" else set()
    depths = _depths(model) if config.layer_decay != 1 else {}
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = holding_part(name, config.lr_scale)
            scale = (1.0 if part is None else config.lr_scale[part]) * config.layer_decay ** depths.get(name, 0)
            group = groups.setdefault((scale, name in exempt), {"params": []})
            group["params"].append(parameter)
            group |= {"lr_scale": scale} if scale != 1 else {}
            group |= {"weight_decay": 0.0} if name in exempt else {}
    return list(groups.values())


def stay_in_eval(module: nn.Module) -> None:
    """From now on `train()` leaves it, and what is in it, in eval mode."""
    module.train = types.MethodType(_eval_only, module)
    module.eval()


def is_norm(module: nn.Module) -> bool:
    """Whether it is a normalisation of any kind, by the name of its class."""
    return "Norm" in type(module).__name__


def _eval_only(self: nn.Module, mode: bool = True) -> nn.Module:
    return type(self).train(self, False)


def holding_part(name: str, parts: Iterable[str]) -> str | None:
    """The longest of these parts that holds the parameter, or None."""
    holding = [part for part in parts if f"{name}.".startswith(f"{part}.")]
    return max(holding, key=len, default=None)


def require_parts(model: nn.Module, parts: Iterable[str], key: str) -> None:
    """ValueError, which names the key of the experiment, for a part that holds no parameter."""
    names = [name for name, _ in model.named_parameters()]
    known = dict.fromkeys(name.rsplit(".", depth)[0] for name in names for depth in range(name.count(".") + 1))
    for part in parts:
        if part not in known:
            raise ValueError(f"{key}: the model has no part '{part}' with parameters; {nearest(part, known)}")


def _without_decay(model: nn.Module) -> set[str]:
    norms = {name for name, module in model.named_modules() if is_norm(module)}
    return {name for name, parameter in model.named_parameters()
            if parameter.ndim <= 1 or name.rpartition(".")[0] in norms
            or name.rpartition(".")[2] in WITHOUT_DECAY or name.endswith(WITHOUT_DECAY[-1])}


def _depths(model: nn.Module) -> Mapping[str, int]:
    """Parameters of the backbone -> how many blocks lie between them and the decoder, their own included."""
    names = [name for name, _ in model.named_parameters() if name.startswith("encoder.")]
    blocks = {name: (int(found[1]), int(found[2] or 0)) for name in names if (found := BLOCK.search(name))}
    if not blocks:
        raise ValueError("layer_decay: the backbone's parameters name no blocks; set it to 1, and lr_scale for parts")
    order = {block: number for number, block in enumerate(sorted(set(blocks.values()), reverse=True), start=1)}
    first = min(names.index(name) for name in blocks)
    embeddings = dict.fromkeys(names[:first], len(order) + 1)
    return {**{name: order[block] for name, block in blocks.items()},
            **{name: depth for name, depth in embeddings.items() if name not in blocks}}
