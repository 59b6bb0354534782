"""Schemes whose combination of the tasks' gradients comes from the library torchjd (`pip install torchjd[full]`).

Each gives weights of the tasks from their gradients, and the backbone's gradient is the weighted sum. The library
computes on the host.
"""

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from losses.balancing.base import NoOptions
from losses.balancing.gradients import GradientBalancing
from utils.options import Options


class Weighted(GradientBalancing):
    """Base: `weighting` names a class of `torchjd.aggregation` that makes weights (T,) of the Gramian G G^T (T, T).

    Its random choices follow the number of the pass, so that all processes, and resumed runs, make the same ones. The
    Gramian is scaled to mean diagonal 1: the weights of all these schemes depend on the directions of the gradients and
    the ratios of their norms alone.
    """

    Config = NoOptions
    reads_values = True
    weighting: ClassVar[str]

    def __init__(self, tasks: Sequence[str], weights: Mapping[str, float], config: Options):
        super().__init__(tasks, weights, config)
        self.register_buffer("passes", torch.zeros((), dtype=torch.long))
        self.solve = self.solver(_library(type(self).__name__))

    def solver(self, library: Any) -> Callable[[Tensor], Tensor]:
        """From the Gramian, float64 on the CPU, to the weights."""
        return getattr(library, self.weighting)()

    def direct(self, gradients: Tensor, losses: Tensor) -> Tensor:
        gramian = (gradients @ gradients.T).double().cpu()
        gramian /= gramian.diagonal().mean().clamp(min=1e-300)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(int(self.passes))
            weights = self.solve(gramian)
        self.passes += 1
        return weights.to(gradients) @ gradients


def _library(scheme: str) -> Any:
    try:
        return importlib.import_module("torchjd.aggregation")
    except ImportError as error:
        raise ValueError(f"the loss balancing {scheme} needs the library torchjd: pip install 'torchjd[full]' "
                         f"({error})") from error


class PCGrad(Weighted):
    """Takes from each gradient what opposes another, in random order. Yu et al., "Gradient Surgery", NeurIPS 2020."""

    Config = NoOptions
    weighting = "PCGradWeighting"


class MGDA(Weighted):
    """The smallest convex combination. Desideri, 2012; Sener and Koltun, NeurIPS 2018."""

    Config = NoOptions
    weighting = "MGDAWeighting"


class IMTLG(Weighted):
    """Equal projections on all gradients. Liu et al., "Towards Impartial Multi-Task Learning", ICLR 2021."""

    Config = NoOptions
    weighting = "IMTLGWeighting"


class AlignedMTL(Weighted):
    """Aligns the principal components of the gradients. Senushkin et al., CVPR 2023."""

    Config = NoOptions
    weighting = "AlignedMTLWeighting"


class UPGrad(Weighted):
    """Projects each gradient on the cone that opposes none, and adds up. Quinton and Rey, 2024."""

    Config = NoOptions
    weighting = "UPGradWeighting"


@dataclass(frozen=True)
class CAGradConfig(Options):
    """c: radius of the ball around the mean gradient in which the direction is sought, in its norms."""

    c: float = 0.4

    def __post_init__(self):
        self.require(0 <= self.c < math.inf, "c", "a number of at least 0")


class CAGrad(Weighted):
    """The direction near the mean that improves the worst task most. Liu et al., NeurIPS 2021, algorithm 1."""

    Config = CAGradConfig

    def solver(self, library: Any) -> Callable[[Tensor], Tensor]:
        return _built(library.CAGradWeighting, "CAGrad", c=self.config.c)


class NashMTL(Weighted):
    """The bargaining solution: G G^T w = 1 / w. Navon et al., "Multi-Task Learning as a Bargaining Game", ICML 2022.

    Solved anew in every pass, from weights of 1, so that nothing has to be remembered.
    """

    Config = NoOptions
    ITERATIONS = 20

    def solver(self, library: Any) -> Callable[[Tensor], Tensor]:
        count = len(self.tasks)

        def solve(gramian: Tensor) -> Tensor:
            nash = _built(library.NashMTL, "NashMTL", n_tasks=count, max_norm=0.0, update_weights_every=1,
                          optim_niter=self.ITERATIONS)
            return nash.weighting(torch.linalg.cholesky(gramian + 1e-9 * torch.eye(count, dtype=gramian.dtype)))
        return solve


def _built(kind: Callable[..., Any], scheme: str, **options: Any) -> Any:
    try:
        return kind(**options)
    except ImportError as error:
        raise ValueError(f"the loss balancing {scheme}: {error}") from error
