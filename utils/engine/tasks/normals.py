"""Surface normals: unit vectors."""

import torch.nn.functional as F

from data.labels import NormalsLabel
from evaluation.normals import NormalsMeter
from losses.regression import NormalsLoss
from utils.engine.tasks.task import Task
from utils.engine.views import VECTORS

NORMALS = Task(
    num_channels=3,
    label=NormalsLabel(),
    loss=lambda context: NormalsLoss(context.ignore_index),
    decode=lambda logits: F.normalize(logits, dim=1, eps=1e-12),
    evaluators=(NormalsMeter,),
    view=VECTORS,
)
