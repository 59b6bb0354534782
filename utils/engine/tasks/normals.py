"""Surface normals: unit vectors."""

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor

from data.labels import NormalsLabel
from evaluation.evaluator import TaskContext
from evaluation.normals import NormalsMeter
from losses.regression import NormalsLoss
from utils.engine.tasks.task import Average, Task
from utils.engine.views import VECTORS


def _loss(context: TaskContext) -> NormalsLoss:
    return NormalsLoss(context.ignore_index)


def _unit(vectors: Tensor) -> Tensor:
    return F.normalize(vectors, dim=1, eps=1e-12)              # (B, 3, H, W)


def _decode(logits: Tensor, meta: Sequence[Mapping]) -> Tensor:
    return _unit(logits)


NORMALS = Task(
    num_channels=3,
    label=NormalsLabel(),
    loss=_loss,
    decode=_decode,
    evaluators=(NormalsMeter,),
    view=VECTORS,
    average=Average(values=_unit, raw=_unit),
)
