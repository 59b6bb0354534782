"""Boundaries: the probability that a pixel lies on one.

The score is odsF where an evaluation asks for it (`boundary_infer`, `boundary_eval`), which takes a while; the
boundary loss always.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from data.labels import EdgeLabel
from evaluation.boundary.edge_loss import EdgeLossMeter
from evaluation.boundary.edge_maps import save_edge_maps
from evaluation.boundary.evaluator import BoundaryEvaluator
from evaluation.evaluator import TaskContext
from losses.edge import BalancedBCELoss
from utils.engine.tasks.task import Average, Task
from utils.engine.views import PROBABILITY


def _loss(context: TaskContext) -> BalancedBCELoss:
    return BalancedBCELoss(context.edge_w, context.ignore_index)


def _decode(logits: Tensor, meta: Sequence[Mapping]) -> Tensor:
    return logits.sigmoid()


def _logit(probability: Tensor) -> Tensor:
    return torch.logit(probability, eps=1e-7)                  # finite, so that it can be resized


EDGE = Task(
    num_channels=1,
    label=EdgeLabel(),
    loss=_loss,
    decode=_decode,
    evaluators=(BoundaryEvaluator, EdgeLossMeter),
    view=PROBABILITY,
    average=Average(values=torch.sigmoid, raw=_logit),
    export=save_edge_maps,
)
