"""Schemes that remember nothing.

The weighted sum needs weights tuned by hand. The sum of logarithms (MTMamba, Lin et al., ECCV 2024) has the gradient
sum_t w_t grad(L_t) / L_t  and is free of the losses' scales, but it is not linear: the log of a batch's loss is not
the mean of the logs of its images. The geometric mean (GLS: Chennupati et al., MultiNet++, CVPR workshops 2019) is free
of the scales, too; its gradient is that of the logarithms times the mean itself.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from losses.balancing.base import Balancing, NoOptions

LOG_EPS = 1e-8


class WeightedSum(Balancing):
    """sum_t w_t L_t."""

    Config = NoOptions


class LogSum(Balancing):
    """sum_t w_t ln(L_t + 1e-8)."""

    Config = NoOptions

    def combine(self, losses: Mapping[str, Tensor], shares: Mapping[str, Tensor | float]) -> Tensor:
        return super().combine({task: torch.log(loss + LOG_EPS) for task, loss in losses.items()}, shares)


class GeometricMean(Balancing):
    """prod_t (L_t + 1e-8)^(w_t / sum_s w_s), over the tasks that are combined and have a label."""

    Config = NoOptions

    def combine(self, losses: Mapping[str, Tensor], shares: Mapping[str, Tensor | float]) -> Tensor:
        logs = torch.stack([torch.log(loss + LOG_EPS) for loss in losses.values()])
        weights = torch.stack([self.weights[task] * shares[task] * torch.ones_like(loss)
                               for task, loss in losses.items()])
        return torch.exp((weights * logs).sum() / weights.sum().clamp(min=LOG_EPS))
