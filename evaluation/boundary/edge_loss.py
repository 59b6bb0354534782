"""The "boundary loss" of InvPT and its successors, an indicator during training; the real score is odsF."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor

from evaluation.evaluator import Score, TaskContext
from evaluation.meter import Meter, ratio
from losses.edge import BalancedBCELoss


class EdgeLossMeter(Meter):
    """`loss`: balanced BCE of the sigmoid *output* taken as if it were a logit, mean over all valid pixels.

    The double sigmoid is InvPT's and its successors' convention, kept so that validation curves compare; the value is
    no likelihood. BridgeNet reports it as "Boundary Loss" in place of odsF, but it says little: with w = 0.95 and a
    share f of edge pixels a perfect prediction scores 0.0347 + 0.263 f and one without any edge 0.0347 + 0.624 f,
    so most of a typical 0.04 is constant, and f alone makes the values of two data sets differ.
    pred (B, 1, H, W) edge probability, target (B, 1, H, W) in [0, 1] with void = ignore_index.
    """

    scores: ClassVar = (Score("loss", "boundary loss", False, decimals=4),)
    of_image: ClassVar = scores[0]
    SUMS: ClassVar = {"sum_loss": ()}
    COUNTS: ClassVar = {"num_valid": ()}

    def __init__(self, pos_weight: float | None = 0.95, ignore_index: int = 255):
        self.loss = BalancedBCELoss(pos_weight, ignore_index)
        super().__init__(ignore_index)

    @classmethod
    def for_task(cls, context: TaskContext) -> "EdgeLossMeter":
        return cls(context.edge_w, context.ignore_index)

    def update(self, pred: Tensor, target: Tensor, meta: Sequence[Mapping] = ()) -> None:
        num_valid = (target != self.ignore).sum()
        self.add(sum_loss=self.loss(pred.double(), target) * num_valid, num_valid=num_valid)

    def compute(self) -> dict[str, float]:
        return {"loss": ratio(self.state["sum_loss"].item(), self.state["num_valid"].item())}
