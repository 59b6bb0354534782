"""Base of the streaming evaluators: a handful of summed tensors, so that distributed evaluation is one all-reduce.

Every published figure here is a function of counts over the whole validation set, never a mean of per-batch
scores; therefore the result cannot depend on how images are grouped into batches or shared over processes.
"""

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from evaluation.evaluator import Evaluator, TaskContext
from utils import distributed


class Meter(Evaluator):
    """Streaming evaluator: update(pred, target) per batch, reduce() once at the end, compute() -> figures.

    `state` holds int64 counts and float64 sums, on the device of the data; `update` never waits for it. pred is decoded
    (see each meter), target the label (B, C, H, W) float with void = ignore. Figures that need a valid pixel are NaN
    where there was none.
    """

    SUMS: ClassVar[Mapping[str, tuple[int, ...]]] = {}         # names of the state -> shapes
    COUNTS: ClassVar[Mapping[str, tuple[int, ...]]] = {}

    def __init__(self, ignore_index: float | None = 255) -> None:
        self.ignore = ignore_index
        self.reset()

    @classmethod
    def for_task(cls, context: TaskContext) -> "Meter":
        return cls(context.ignore_index)

    def initial_state(self) -> dict[str, Tensor]:
        """Zeros of the right shapes and dtypes; the order of the keys is the same on every process."""
        return ({name: torch.zeros(shape, dtype=torch.float64) for name, shape in self.SUMS.items()}
                | {name: torch.zeros(shape, dtype=torch.int64) for name, shape in self.COUNTS.items()})

    @property
    def valid_pixels(self) -> int:
        """Number of pixels behind the figures; without any they mean nothing, whatever their value."""
        return int(self.state["num_valid"].item())

    def reset(self) -> None:
        self.state = self.initial_state()
        self._reduced = False

    def add(self, **terms: Tensor) -> None:
        """Add one batch's terms to the state, which follows the data to its device without a host sync."""
        assert not self._reduced, "update() after reduce(): call reset() before the next evaluation"
        for name, term in terms.items():
            total = self.state[name]
            assert term.shape == total.shape, f"{name}: term {tuple(term.shape)}, state {tuple(total.shape)}"
            self.state[name] = total.to(term.device) + term.to(total.dtype)

    def reduce(self) -> None:
        """Sum the state over all processes (one all-reduce); does nothing without torch.distributed.

        Counts travel as float64, which is exact up to 2^53 pixels. A process that saw no image takes part
        too.
        """
        assert not self._reduced, "reduce() called twice would count every process's pixels again"
        self._reduced = True
        flat = torch.cat([value.reshape(-1).double().cpu() for value in self.state.values()])
        flat = distributed.sum_over_ranks(flat)
        parts = flat.split([value.numel() for value in self.state.values()])
        self.state = {name: part.reshape(value.shape).to(value.dtype)
                      for (name, value), part in zip(self.state.items(), parts, strict=True)}


def tally(bins: Tensor, mask: Tensor, num_bins: int) -> Tensor:
    """How many of `bins` under `mask` are 0, 1, ...: (num_bins,) int64.

    bins: int64 of any shape, in 0..num_bins - 1 under the mask. Unlike with torch.bincount and with indexing by a mask
    the host does not wait for the device.
    """
    index = torch.where(mask, bins, num_bins).flatten()
    return torch.zeros(num_bins + 1, dtype=torch.int64, device=bins.device).scatter_add_(
        0, index, torch.ones_like(index))[:num_bins]


def ratio(numerator: float, denominator: float) -> float:
    """numerator / denominator, NaN for an empty denominator."""
    return numerator / denominator if denominator else math.nan
