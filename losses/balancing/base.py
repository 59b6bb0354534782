"""The contract of a loss balancing scheme."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from utils.options import Options

INTER = "inter/"        # prefix of the loss of a task's preliminary prediction


@dataclass(frozen=True)
class NoOptions(Options):
    """Of a scheme that has none."""


class Balancing(nn.Module):
    """Turns the losses of a training step into gradients.

    A module, so that learned weights are its parameters (the optimizer updates them with the model's; their gradients
    are averaged over processes) and what it remembers are buffers: both are saved and resumed with the run. What it
    computes from losses must be the same on every process: average over them with `utils.distributed`.

    `Config` is the dataclass of its options, the keys of `loss_kwargs.scheme_kwargs` in an experiment file.
    `reads_values` is true where the host decides something from a loss or a gradient (`.item()`, an `if`): such updates
    are not recorded as CUDA graphs. `needs_gradients` is true where it works on the gradients of single tasks, which no
    process has of a model that is spread in parts.
    """

    Config: ClassVar[type[Options]] = NoOptions
    reads_values: ClassVar[bool] = False
    needs_gradients: ClassVar[bool] = False
    intermediate_weight: float = 1.0  # of the preliminary predictions' losses; `MultiTaskLoss` sets it

    def __init__(self, tasks: Sequence[str], weights: Mapping[str, float], config: Options):
        super().__init__()
        self.tasks, self.weights, self.config = tuple(tasks), dict(weights), config

    def prepare(self, shared: Sequence[nn.Parameter]) -> None:
        """Called once, before training, with the parameters of the backbone, which all tasks share."""

    def combine(self, losses: Mapping[str, Tensor], shares: Mapping[str, Tensor | float]) -> Tensor:
        """The losses of some tasks, each 0-dim, as one number: of a mini-batch, or of one image (`loss_scope`).

        shares: how much each task counts in this number: 1 where every image has every label, 0 where this one has no
        label of the task, and more than 1 where others lack theirs. A task's whole term is multiplied by its share.
        By default sum_t w_t L_t.
        """
        return torch.stack([self.weights[task] * shares[task] * loss for task, loss in losses.items()]).sum()

    def backward(self, losses: Mapping[str, Tensor], scaled: Callable[[Tensor], Tensor],
                 shared: Sequence[nn.Parameter], others: Sequence[nn.Parameter]) -> None:
        """Adds this pass's gradients to `.grad`.

        losses: all that `MultiTaskLoss` returned, with "total". scaled(loss): the loss times the factors of
        accumulation and of mixed precision. shared: the parameters of the backbone, others: the model's remaining ones.
        By default the gradient of the total, which DDP averages over processes; `gradients.GradientBalancing` is the
        base of schemes that work on the gradients of single tasks.
        """
        scaled(losses["total"]).backward()
