"""PyTorch's optimizers. An entry has `Config`, its options (all have a learning rate `lr`), and `build`.

`in_parts = True`: its steps may be made on parts of parameters that lie on several processes (`parallel: fsdp`).
All are fused: one kernel for all parameters, which takes the learning rate and whether to step at all from the device.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from utils.options import Options

Parameters = Iterable[Any]      # parameters or groups of them, as `torch.optim` takes both


@dataclass(frozen=True)
class AdamConfig(Options):
    """betas, eps: as in the paper (Kingma and Ba, ICLR 2015)."""

    lr: float = 1e-4
    weight_decay: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self):
        self.require(0 < self.lr < math.inf, "lr", "positive and finite")
        self.require(self.weight_decay >= 0, "weight_decay", "at least 0")
        self.require(all(0 <= beta < 1 for beta in self.betas), "betas", "two numbers in [0, 1)")
        self.require(self.eps > 0, "eps", "positive")


@dataclass(frozen=True)
class SGDConfig(Options):
    """momentum 0: plain gradient descent."""

    lr: float = 1e-4
    weight_decay: float = 1e-5
    momentum: float = 0.9
    nesterov: bool = False

    def __post_init__(self):
        self.require(0 < self.lr < math.inf, "lr", "positive and finite")
        self.require(self.weight_decay >= 0, "weight_decay", "at least 0")
        self.require(0 <= self.momentum < 1, "momentum", "a number in [0, 1)")
        self.require(not self.nesterov or self.momentum > 0, "nesterov", "false where momentum is 0")


class Adam:
    """Weight decay is added to the gradient (L2)."""

    Config = AdamConfig
    in_parts = True

    @staticmethod
    def build(parameters: Parameters, config: AdamConfig) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, config.lr, config.betas, config.eps, config.weight_decay, fused=True)


class AdamW:
    """Weight decay apart from the gradient (Loshchilov and Hutter, ICLR 2019)."""

    Config = AdamConfig
    in_parts = True

    @staticmethod
    def build(parameters: Parameters, config: AdamConfig) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, config.lr, config.betas, config.eps, config.weight_decay, fused=True)


class SGD:
    """Stochastic gradient descent with momentum."""

    Config = SGDConfig

    @staticmethod
    def build(parameters: Parameters, config: SGDConfig) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(parameters, config.lr, config.momentum, weight_decay=config.weight_decay,
                                    nesterov=config.nesterov, fused=True)
        if config.momentum:                # PyTorch leaves it unset until a step, also where the first one is skipped
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return optimizer
