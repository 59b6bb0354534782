"""Schemes that balance the tasks' gradients of the backbone; the parameters behind it get the gradient of the sum.

Each task costs a backward pass of its own, and the backbone's gradient once more in memory. DDP takes no part: the
gradients are averaged over processes here, because what is made of them is no mean of what each process would make.
With accumulation every mini-batch is balanced for itself.

Axes: T tasks, P numbers of the backbone. G: the tasks' gradients (T, P).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from losses.balancing.base import INTER, Balancing, NoOptions
from losses.balancing.fixed import LOG_EPS
from utils import distributed
from utils.options import Options


class GradientBalancing(Balancing):
    """Base of these schemes: the losses are a weighted sum, and `direct` says what becomes of their gradients."""

    Config = NoOptions
    needs_gradients = True

    def direct(self, gradients: Tensor, losses: Tensor) -> Tensor:
        """Gradients G (T, P) and losses (T,) of the tasks, both means over processes -> the backbone's gradient (P,).

        All that is computed must be the same on every process.
        """
        raise NotImplementedError(f"{type(self).__name__}.direct")

    def backward(self, losses: Mapping[str, Tensor], scaled: Callable[[Tensor], Tensor],
                 shared: Sequence[nn.Parameter], others: Sequence[nn.Parameter]) -> None:
        objectives = self._objectives(losses)
        own = [torch.zeros_like(parameter) for parameter in others]
        rows = []
        for name, objective in objectives.items():
            found = torch.autograd.grad(scaled(objective), [*shared, *others], allow_unused=True,
                                        retain_graph=name != list(objectives)[-1])
            rows.append(_flat(found[:len(shared)], shared))
            for total, part in zip(own, found[len(shared):], strict=True):
                if part is not None:
                    total += part
        gradients = distributed.mean_over_ranks(torch.stack(rows))
        balanced, rest = gradients[:len(self.tasks)], gradients[len(self.tasks):]
        with torch.no_grad():
            values = torch.stack([losses[task].detach().float() for task in self.tasks])
            direction = self.direct(balanced, distributed.mean_over_ranks(values)) + rest.sum(dim=0)
        _add(direction, shared)
        _add(distributed.mean_over_ranks(_flat(own, others)), others)

    def _objectives(self, losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What each task minimises, preliminary predictions included; last, if any, the decoder's own terms.

        The losses hold the tasks' shares already.
        """
        parts = {}
        for task in self.tasks:
            parts[task] = self.combine({task: losses[task]}, {task: 1.0})
            if INTER + task in losses:
                preliminary = self.combine({task: losses[INTER + task]}, {task: 1.0})
                parts[task] = parts[task] + self.intermediate_weight * preliminary
        terms = [loss for name, loss in losses.items()
                 if name != "total" and name.removeprefix(INTER) not in self.tasks and loss.requires_grad]
        return parts | ({"terms of the decoder": torch.stack(terms).sum()} if terms else {})


def _flat(gradients: Sequence[Tensor | None], parameters: Sequence[nn.Parameter]) -> Tensor:
    """One vector, float32; zeros where a task does not depend on a parameter."""
    return torch.cat([torch.zeros(parameter.numel(), device=parameter.device) if grad is None
                      else grad.flatten().float() for grad, parameter in zip(gradients, parameters, strict=True)])


def _add(vector: Tensor, parameters: Sequence[nn.Parameter]) -> None:
    """Adds a flat vector to the parameters' `.grad`."""
    sizes = [parameter.numel() for parameter in parameters]
    for parameter, part in zip(parameters, vector.split(sizes), strict=True):
        grad = part.view_as(parameter).to(parameter.dtype)
        parameter.grad = grad.clone() if parameter.grad is None else parameter.grad + grad


@dataclass(frozen=True)
class GradNormConfig(Options):
    """alpha: how strongly tasks that lag behind are pulled up; lr: of the weights."""

    alpha: float = 1.5
    lr: float = 0.025

    def __post_init__(self):
        self.require(0 <= self.alpha < math.inf and 0 < self.lr < math.inf, "alpha",
                     "a number of at least 0, and lr one above 0")


class GradNorm(GradientBalancing):
    """sum_t v_t g_t, where v (mean 1) moves so that v_t |g_t| nears the mean norm times r_t^alpha.

    r_t is the task's loss over its first one, divided by the mean of these ratios. v descends
    sum_t |v_t |g_t| - target_t|, whose gradient is taken relative to the mean norm, and is then scaled to mean 1.
    Reference: Chen et al., "GradNorm: Gradient Normalization for Adaptive Loss Balancing", ICML 2018, algorithm 1.
    """

    Config = GradNormConfig

    def __init__(self, tasks: Sequence[str], weights: Mapping[str, float], config: GradNormConfig):
        super().__init__(tasks, weights, config)
        self.register_buffer("shares", torch.ones(len(self.tasks)))
        self.register_buffer("first_losses", torch.zeros(len(self.tasks)))

    def direct(self, gradients: Tensor, losses: Tensor) -> Tensor:
        self.first_losses.copy_(torch.where(self.first_losses > 0, self.first_losses, losses))
        ratios = losses / self.first_losses
        norms = gradients.norm(dim=1)
        weighted = self.shares * norms
        target = weighted.mean() * (ratios / ratios.mean()) ** self.config.alpha
        slope = (weighted - target).sign() * norms / weighted.mean().clamp(min=1e-12)
        direction = self.shares @ gradients  # with the weights of before, as in the paper
        moved = (self.shares - self.config.lr * slope).clamp(min=1e-6)
        self.shares.copy_(moved / moved.mean())
        return direction


@dataclass(frozen=True)
class DualBalancingConfig(Options):
    """beta, sigma: the moving average of step k keeps beta / k^sigma of the old; beta = 0 keeps none, and no memory."""

    beta: float = 0.9
    sigma: float = 0.5

    def __post_init__(self):
        self.require(0 <= self.beta < 1, "beta", "a number in [0, 1)")
        self.require(0 <= self.sigma < math.inf, "sigma", "a number of at least 0")


class DualBalancing(GradientBalancing):
    """DB-MTL: logarithms of the losses, and moving averages of their gradients scaled to the largest one's norm.

    With beta > 0 the averages, a gradient of the backbone per task, are part of checkpoints.
    Reference: Lin et al., "Dual-Balancing for Multi-Task Learning", 2023, algorithm 1.
    """

    Config = DualBalancingConfig

    def __init__(self, tasks: Sequence[str], weights: Mapping[str, float], config: DualBalancingConfig):
        super().__init__(tasks, weights, config)
        self.register_buffer("steps", torch.zeros(()))

    def prepare(self, shared: Sequence[nn.Parameter]) -> None:
        if self.config.beta:
            self.register_buffer("averages", torch.zeros(len(self.tasks), sum(p.numel() for p in shared)))

    def combine(self, losses: Mapping[str, Tensor], shares: Mapping[str, Tensor | float]) -> Tensor:
        return super().combine({task: torch.log(loss + LOG_EPS) for task, loss in losses.items()}, shares)

    def direct(self, gradients: Tensor, losses: Tensor) -> Tensor:
        self.steps += 1
        if self.config.beta:
            kept = self.config.beta / self.steps ** self.config.sigma
            gradients = self.averages.mul_(kept).add_((1 - kept) * gradients)
        norms = gradients.norm(dim=1, keepdim=True)
        return (norms.max() * gradients / norms.clamp(min=1e-12)).sum(dim=0)
