"""Any optimizer of PyTorch or timm: `optimizer: torch:RAdam`, `optimizer: timm:lion`."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from timm.optim import create_optimizer_v2

from utils.options import Options


@dataclass(frozen=True)
class NamedConfig(Options):
    """name: of the class in torch.optim, or timm's name; it follows the colon. arguments: what else it takes."""

    name: str
    lr: float = 1e-4
    weight_decay: float = 1e-5
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        self.require(0 < self.lr < math.inf, "lr", "positive and finite")
        self.require(self.weight_decay >= 0, "weight_decay", "at least 0")


class TorchOptimizer:
    """A class of torch.optim. A parameter that it does not take is a ValueError in PyTorch's words."""

    Config = NamedConfig

    @staticmethod
    def build(parameters: Iterable[Any], config: NamedConfig) -> Any:
        try:
            return getattr(torch.optim, config.name)(parameters, lr=config.lr, weight_decay=config.weight_decay,
                                                     **config.arguments)
        except TypeError as error:
            raise ValueError(f"optimizer 'torch:{config.name}': {error}") from error


class TimmOptimizer:
    """An optimizer of timm by its name there. A parameter that it does not take is a ValueError in timm's words."""

    Config = NamedConfig

    @staticmethod
    def build(parameters: Iterable[Any], config: NamedConfig) -> Any:
        try:
            return create_optimizer_v2(list(parameters), config.name, lr=config.lr, weight_decay=config.weight_decay,
                                       **config.arguments)
        except TypeError as error:
            raise ValueError(f"optimizer 'timm:{config.name}': {error}") from error
