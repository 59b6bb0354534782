"""Parameters of S6 scan routes with Mamba's initialisation.

Reference: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, section 3.6.
"""

import math

import torch
from torch import nn

from models.ops.ss2d import S6Weights

STEP_MIN, STEP_MAX, STEP_FLOOR = 1e-3, 1e-1, 1e-4  # initial step sizes are log-uniform between the first two


class S6(nn.Module):
    """Weights of `routes` scan routes of one width, stacked on a leading axis; `rank` is the step size's."""

    def __init__(self, width: int, rank: int, state: int = 16, routes: int = 1):
        super().__init__()
        self.x_proj = nn.Parameter(torch.empty(routes, rank + 2 * state, width))
        self.dt_proj_weight = nn.Parameter(torch.empty(routes, width, rank))
        self.dt_proj_bias = nn.Parameter(torch.empty(routes, width))
        self.A_log = nn.Parameter(torch.empty(routes, width, state))
        self.D = nn.Parameter(torch.empty(routes, width))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        width, rank = self.dt_proj_weight.shape[1:]
        nn.init.uniform_(self.x_proj, -width**-0.5, width**-0.5)
        nn.init.uniform_(self.dt_proj_weight, -rank**-0.5, rank**-0.5)
        log_step = torch.empty_like(self.dt_proj_bias).uniform_(math.log(STEP_MIN), math.log(STEP_MAX))
        step = log_step.exp().clamp(min=STEP_FLOOR)
        self.dt_proj_bias.copy_(step + torch.log(-torch.expm1(-step)))  # inverse of softplus
        self.A_log.copy_(torch.arange(1, self.A_log.shape[-1] + 1).log().expand_as(self.A_log))
        nn.init.ones_(self.D)

    @property
    def weights(self) -> S6Weights:
        return S6Weights(self.x_proj, self.dt_proj_weight, self.dt_proj_bias, self.A_log, self.D)
