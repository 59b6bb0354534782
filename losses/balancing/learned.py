"""Schemes whose weights of the tasks follow from the losses: learned, or computed from their course.

They cost nothing beside a plain sum: one backward pass, a few numbers per task. Axis: T tasks.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from losses.balancing.base import Balancing, NoOptions
from losses.balancing.fixed import LOG_EPS
from utils import distributed
from utils.options import Options


class Uncertainty(Balancing):
    """sum_t w_t (exp(-s_t) L_t + s_t) / 2 with learned s_t, the logarithm of the task's variance, from 0.

    Reference: Kendall et al., "Multi-Task Learning Using Uncertainty to Weigh Losses", CVPR 2018.
    """

    Config = NoOptions

    def __init__(self, tasks: Sequence[str], weights: Mapping[str, float], config: Options):
        super().__init__(tasks, weights, config)
        self.log_variance = nn.Parameter(torch.zeros(len(self.tasks)))

    def combine(self, losses: Mapping[str, Tensor], shares: Mapping[str, Tensor | float]) -> Tensor:
        log_variance = dict(zip(self.tasks, self.log_variance, strict=True))
        return 0.5 * super().combine({task: (-log_variance[task]).exp() * loss + log_variance[task]
                                      for task, loss in losses.items()}, shares)


class FollowsLosses(Balancing):
    """Base of schemes that look at the losses (T,) of every pass, the mean over processes, behind it.

    The loss of a task without any label in the pass is 0, and says nothing.
    """

    def backward(self, losses: Mapping[str, Tensor], scaled: Callable[[Tensor], Tensor],
                 shared: Sequence[nn.Parameter], others: Sequence[nn.Parameter]) -> None:
        super().backward(losses, scaled, shared, others)
        with torch.no_grad():
            values = torch.stack([losses[task].detach().float() for task in self.tasks])
            self.follow(distributed.mean_over_ranks(values))

    def follow(self, losses: Tensor) -> None:
        """Updates buffers in place."""
        raise NotImplementedError(f"{type(self).__name__}.follow")


@dataclass(frozen=True)
class DWAConfig(Options):
    """interval: passes whose mean loss is one point of a task's course (the paper: an epoch)."""

    temperature: float = 2.0
    interval: int = 100

    def __post_init__(self):
        self.require(0 < self.temperature < math.inf, "temperature", "a number above 0")
        self.require(self.interval >= 1, "interval", "a number of at least 1")


class DynamicWeightAverage(FollowsLosses):
    """sum_t w_t lambda_t L_t;  lambda = T softmax(r / temperature),  r_t = L_t(k - 1) / L_t(k - 2), 1 for k < 3.

    L_t(k) is the mean loss over the k-th interval: a task whose loss falls slowly is given more weight.
    Reference: Liu et al., "End-to-End Multi-Task Learning with Attention", CVPR 2019, section 3.3.
    """

    Config = DWAConfig

    def __init__(self, tasks: Sequence[str], weights: Mapping[str, float], config: DWAConfig):
        super().__init__(tasks, weights, config)
        for name in ("sums", "counts", "last"):
            self.register_buffer(name, torch.zeros(len(self.tasks)))
        self.register_buffer("ratios", torch.ones(len(self.tasks)))
        self.register_buffer("passes", torch.zeros(()))

    def combine(self, losses: Mapping[str, Tensor], shares: Mapping[str, Tensor | float]) -> Tensor:
        factors = len(self.tasks) * F.softmax(self.ratios / self.config.temperature, dim=0)
        factors = dict(zip(self.tasks, factors, strict=True))
        return torch.stack([self.weights[task] * shares[task] * factors[task] * loss
                            for task, loss in losses.items()]).sum()

    def follow(self, losses: Tensor) -> None:
        self.sums += losses
        self.counts += losses > 0
        self.passes += 1
        ends = self.passes >= self.config.interval  # all on the device: updates can be recorded
        mean = self.sums / self.counts.clamp(min=1)
        known = ends & (self.counts > 0)
        self.ratios.copy_(torch.where(known & (self.last > 0), mean / self.last.clamp(min=LOG_EPS), self.ratios))
        self.last.copy_(torch.where(known, mean, self.last))
        for buffer in (self.sums, self.counts, self.passes):
            buffer *= ~ends


@dataclass(frozen=True)
class FAMOConfig(Options):
    """lr, weight_decay: of the Adam that moves the logits."""

    lr: float = 0.025
    weight_decay: float = 1e-3

    def __post_init__(self):
        self.require(self.lr >= 0 and self.weight_decay >= 0, "lr", "like weight_decay a number of at least 0")


class FAMO(FollowsLosses):
    """c sum_t z_t log(L_t + 1e-8);  z = softmax(logits),  1 / c = sum_t z_t / (L_t + 1e-8), a constant for gradients.

    Adam moves the logits along the change of log L_t: a task that falls more slowly is given more weight. The paper
    computes the losses of the same mini-batch again behind the update; here the next mini-batch's losses stand for
    them, which saves that forward pass. `loss_weights` have no effect: weights within a logarithm fall out.
    Reference: Liu et al., "FAMO: Fast Adaptive Multitask Optimization", NeurIPS 2023, algorithm 1.
    """

    Config = FAMOConfig
    BETAS, ADAM_EPS = (0.9, 0.999), 1e-8

    def __init__(self, tasks: Sequence[str], weights: Mapping[str, float], config: FAMOConfig):
        super().__init__(tasks, weights, config)
        for name in ("logits", "mean", "square", "before"):
            self.register_buffer(name, torch.zeros(len(self.tasks)))
        self.register_buffer("passes", torch.zeros(()))

    def combine(self, losses: Mapping[str, Tensor], shares: Mapping[str, Tensor | float]) -> Tensor:
        z = dict(zip(self.tasks, F.softmax(self.logits, dim=0), strict=True))
        weights = torch.stack([z[task] * shares[task] for task in losses])
        values = torch.stack(list(losses.values())) + LOG_EPS
        scale = (weights / values.detach()).sum().clamp(min=LOG_EPS)
        return (weights / scale * values.log()).sum()

    def follow(self, losses: Tensor) -> None:
        known, values = losses > 0, (losses + LOG_EPS).log()
        change = (self.before - values) * (known & (self.before != 0))  # nothing is known in a task's first pass
        shares = F.softmax(self.logits, dim=0)
        gradient = shares * (change - (shares * change).sum()) + self.config.weight_decay * self.logits
        self._adam(gradient, steps=self.passes)
        self.before.copy_(torch.where(known, values, self.before))
        self.passes += 1

    def _adam(self, gradient: Tensor, steps: Tensor) -> None:
        """One step, counted from 1; step 0, that of the first pass, moves nothing."""
        first, second = self.BETAS
        moves = (steps > 0).to(gradient)
        self.mean.lerp_(gradient * moves, 1 - first)
        self.square.lerp_(gradient * gradient * moves, 1 - second)
        count = steps.clamp(min=1)
        mean, square = self.mean / (1 - first ** count), self.square / (1 - second ** count)
        self.logits -= moves * self.config.lr * mean / (square.sqrt() + self.ADAM_EPS)
