"""Training losses: one file per family, and the schemes that combine them over tasks."""

from losses.cross_entropy import BalancedCrossEntropyLoss, CrossEntropyLoss
from losses.edge import BalancedBCELoss
from losses.load_balancing import load_balancing_loss
from losses.regression import L1Loss, NormalsLoss
from losses.schemes import SCHEMES, MultiTaskLoss

__all__ = ["SCHEMES", "BalancedBCELoss", "BalancedCrossEntropyLoss", "CrossEntropyLoss", "L1Loss",
           "MultiTaskLoss", "NormalsLoss", "load_balancing_loss"]
