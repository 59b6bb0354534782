"""The boundary score as part of an evaluation: counts every predicted image in the background."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from evaluation.boundary.edge_maps import edge_maps
from evaluation.boundary.matching import pick_backend
from evaluation.boundary.pool import CountingPool, default_workers
from evaluation.boundary.protocol import Protocol, image_counts
from evaluation.boundary.scores import COUNT_NAMES, BoundaryTotals, precision_recall_f
from evaluation.boundary.settings import BoundarySettings
from evaluation.boundary.source import TruthSource, truth_source
from evaluation.boundary.truth import truth_boundary
from evaluation.evaluator import Evaluator, Score, TaskContext
from evaluation.figures import Figure, PrecisionRecall
from utils import distributed

SMALL_SET = 32       # so few images are counted before workers have started


class BoundaryEvaluator(Evaluator):
    """odsF, oisF and AP of the images of a `TruthSource`, counted in worker processes (a pooled evaluator)."""

    scores: ClassVar = (Score("odsF", "odsF", True, scale=100, unit="%"),)
    on_request: ClassVar = True

    def __init__(self, source: TruthSource, settings: BoundarySettings, progress: bool = False):
        self.source, self.progress = source, progress
        kind = source.truth.kind
        self.kind = "boundary" if kind == "nyud" and settings.nyud_gt == "thin" else kind
        self.protocol = Protocol(settings.max_dist or source.truth.max_dist, settings.protocol)
        workers = settings.workers
        if workers is None:
            workers = 0 if source.num_images <= SMALL_SET else default_workers(distributed.world_size())
        self.totals = BoundaryTotals.empty(len(self.protocol.thresholds))
        self.pool = CountingPool(self.totals, workers)

    @classmethod
    def for_task(cls, context: TaskContext) -> "BoundaryEvaluator | None":
        """Only where `boundary_infer` or `boundary_eval` asks for it."""
        if context.boundary_mode == "off" or context.split is None:
            return None
        source = truth_source(context.split, context.boundary.images, context.boundary_mode == "fast")
        return cls(source, context.boundary, context.progress)

    def close(self) -> None:
        self.pool.__exit__()

    def update(self, prediction: Tensor, target: Tensor | None = None, meta: Sequence[Mapping] = ()) -> None:
        """prediction (B, 1, H, W) edge probability in the padded frame; meta: each image's "name" and "size".

        The ground truth comes from the data set's files, not from the training label `target`. What is scored is what
        `save_edge_maps` writes, so the files give the same score.
        """
        for picture, image in zip(edge_maps(prediction, meta), meta, strict=True):
            if self.source.names is None or image["name"] in self.source.names:
                self.pool.submit(count_prediction, picture, self.source.truth.read,
                                 self.source.files(image["name"]), self.kind, self.protocol)

    def reduce(self) -> None:
        """Waits for the workers and adds up the counts of all processes (one all-reduce)."""
        with tqdm(total=len(self.pool), desc="boundary score", unit="image", leave=False,
                  disable=None if self.progress else True) as bar:
            self.pool.finish(bar)
        flat = np.concatenate([self.totals.counts.ravel(), self.totals.best, [self.totals.images]])
        flat = distributed.sum_over_ranks(torch.from_numpy(flat)).numpy()             # (4 K + 5,) int64
        self.totals.counts[:] = flat[:-5].reshape(-1, 4)
        self.totals.best[:] = flat[-5:-1]
        self.totals.images = int(flat[-1])

    def compute(self) -> dict[str, float]:
        """odsF, oisF, ap (fractions), threshold, images."""
        return self.totals.scores(self.protocol.thresholds)

    def figures(self) -> list[Figure]:
        precision, recall, _ = precision_recall_f(self.totals.counts)
        measured = self.totals.counts[:, 3] > 0                        # P = 1 by definition elsewhere
        if not measured.any():
            return []
        best = int(measured[:self.totals.optimum].sum())
        return [PrecisionRecall("boundaries at all thresholds", precision[measured], recall[measured],
                                self.protocol.thresholds[measured], best)]

    def report(self) -> str:
        """One line: what was scored, how, and the counts behind the score."""
        scores = self.compute()
        counts = ", ".join(f"{n} {v}" for n, v in zip(COUNT_NAMES, self.totals.counts[self.totals.optimum],
                                                            strict=True))
        return (f"odsF {100 * scores['odsF']:.2f} at threshold {scores['threshold']:g} over {scores['images']} images "
                f"({self.source.covered}), oisF {100 * scores['oisF']:.2f}, AP {100 * scores['ap']:.2f}; {counts}; "
                f"ground truth {self.kind}, max_dist {self.protocol.max_dist:g}, protocol {self.protocol.name}, "
                f"{pick_backend()} matching")


def count_prediction(prediction: np.ndarray, read: Callable[..., np.ndarray], files: Sequence[Path], kind: str,
                     protocol: Protocol) -> np.ndarray:
    """`image_counts` against the ground truth that `read(*files)` gives. Errors name the file."""
    raw = read(*files)
    try:
        drawn = raw if raw.ndim == 3 else raw[None]
        return image_counts(prediction, [truth_boundary(one, kind) for one in drawn], protocol)
    except ValueError as error:
        raise ValueError(f"{files[0]}: {error}") from error
