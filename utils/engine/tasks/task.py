"""What a task is: label rules for the data, a loss, decoding, evaluators, a view for people.

Loader, heads, losses, result table, panels and `predict` all read a task's row; none of them asks for a task by name.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data.labels import LabelRules
from evaluation.evaluator import Evaluator, Score, TaskContext
from models.heads import HeadMaker
from utils.engine.views import View


@dataclass(frozen=True)
class Average:
    """How the predictions of several looks at an image become one.

    values(raw output) -> what may be averaged pixel by pixel: probabilities, metres, unit vectors, (B, C, H, W).
    raw(mean of such values) -> a raw output that decodes to it.
    """

    values: Callable[[Tensor], Tensor]
    raw: Callable[[Tensor], Tensor]


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(dim=1)                               # (B, n, H, W)


def _log(probability: Tensor) -> Tensor:
    return probability.clamp_min(torch.finfo(probability.dtype).tiny).log()


def of_probabilities() -> Average:
    """Of what the softmax of the channels says of each class."""
    return Average(_softmax, _log)


@dataclass(frozen=True)
class Task:
    """One row of the table; made of named functions, so that worker processes can be sent one.

    num_channels: of the network's output; None where the data set counts classes.
    label: what the data floor sees of the task.
    loss(context): a module, (raw output, label) -> 0-dim loss.
    decode(output, meta): raw output of a batch, maps (B, n, H, W) -> prediction, maps (B, C, H, W), as evaluators and
    views take it. meta: of each image what evaluators know of it, with `frame`, what is known of it as the network saw
    it (`data.labels.LabelRules.known`).
    head(context): what makes the head of a task that is no map (`models.heads`); None: the decoder makes it.
    evaluators: classes; the first one that runs gives the task's score.
    view: pictures and files for people.
    average: of predictions at test time (`utils.engine.test_time`); None: they cannot be averaged.
    export(prediction, meta, folder): files that `infer` writes for other programs, if any, into the task's folder.
    """

    num_channels: int | None
    label: LabelRules
    loss: Callable[[TaskContext], nn.Module]
    decode: Callable[[Any, Sequence[Mapping]], Any]
    evaluators: Sequence[type[Evaluator]]
    view: View
    average: Average | None = None
    export: Callable[[Any, Sequence[Mapping], Path], object] | None = None
    head: Callable[[TaskContext], HeadMaker] | None = None

    @property
    def scores(self) -> list[Score]:
        """All scores that tables print: those of evaluators that always run, then those that run on request."""
        return [score for kind in sorted(self.evaluators, key=lambda kind: kind.on_request) for score in kind.scores]

    def build_evaluators(self, context: TaskContext) -> list[Evaluator]:
        """The evaluators of one evaluation, those on request only where they were asked for."""
        built = [kind.for_task(context) for kind in self.evaluators]
        return [evaluator for evaluator in built if evaluator is not None]

    def main_score(self, scores: Mapping[str, float]) -> Score:
        """The score that stands for the task in these results: that of the first evaluator that ran."""
        return next(s for kind in self.evaluators for s in kind.scores if s.key in scores)
