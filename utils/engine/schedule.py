"""Optimiser and learning rate, from the experiment file's keys."""

import torch
from torch import nn

from utils.engine.config import Config, SchedulerKwargs


def build_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """Adam (L2 in the gradient), AdamW (decoupled) or SGD; one group, weight decay on every parameter (lineage)."""
    k = config.optimizer_kwargs
    parameters = [p for p in model.parameters() if p.requires_grad]
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, k.lr, k.momentum, weight_decay=k.weight_decay, nesterov=k.nesterov)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    return kind(parameters, k.lr, k.betas, k.eps, k.weight_decay, fused=True)


def learning_rate(step: int, max_iter: int, lr: float, k: SchedulerKwargs) -> float:
    """The rate of update `step` (counted from 0): polynomial decay per update, after an optional linear warm-up."""
    decayed = k.min_lr + (lr - k.min_lr) * (1 - step / max_iter) ** k.power
    return decayed * min(1.0, (step + 1) / k.warmup_iters) if k.warmup_iters else decayed
