"""The boundary score as part of an evaluation: counts every predicted image in the background."""


import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from evaluation.boundary.matching import pick_backend
from evaluation.boundary.pool import CountingPool, default_workers
from evaluation.boundary.protocol import Protocol, ProtocolName, image_counts
from evaluation.boundary.scores import COUNT_NAMES, BoundaryTotals
from evaluation.boundary.truth import TruthKind, truth_boundary
from evaluation.edge_maps import edge_maps

logger = logging.getLogger(__name__)

SMALL_SET = 32       # so few images are counted before workers have started


@dataclass(frozen=True)
class BoundarySettings:
    """What published evaluations differ in, and the number of worker processes.

    images: `test_new` takes the images of the data set's list of that name (PASCAL), `all` the whole split, `auto` the
    list where it lies in the data folder. nyud_gt: `seism` reads NYUD's edge pictures as if they were label maps,
    `thin` thins them. protocol, max_dist: see `Protocol`; an empty max_dist is the data set's. workers: empty for the
    machine's cores (none for few images), 0 for none.
    """

    images: Literal["auto", "test_new", "all"] = "auto"
    nyud_gt: Literal["seism", "thin"] = "seism"
    protocol: ProtocolName = "nms"
    max_dist: float | None = None
    workers: int | None = None


@dataclass(frozen=True)
class TruthSource:
    """Where the ground truth of a split comes from.

    `find(name)` gives the files of an image and `read(*files)` their H x W map of this `kind`. `names`: the images
    that are scored, None for every one; `covered` says which in words.
    """

    find: Callable[[str], tuple[Path, ...]]
    read: Callable[..., np.ndarray]
    kind: TruthKind
    max_dist: float
    num_images: int
    names: frozenset[str] | None = None
    covered: str = "all"


class BoundaryBenchmark:
    """`update` per batch, `reduce` once at the end, `compute`; a context manager that ends its workers."""

    def __init__(self, source: TruthSource, settings: BoundarySettings, progress: bool = False):
        self.source, self.settings, self.progress = source, settings, progress
        self.kind = "boundary" if source.kind == "nyud" and settings.nyud_gt == "thin" else source.kind
        self.protocol = Protocol(settings.max_dist or source.max_dist, settings.protocol)
        workers = settings.workers
        if workers is None:
            ranks = dist.get_world_size() if dist.is_initialized() else 1
            workers = 0 if source.num_images <= SMALL_SET else default_workers(ranks)
        self.totals = BoundaryTotals.empty(len(self.protocol.thresholds))
        self.pool = CountingPool(self.totals, workers)

    def __enter__(self) -> "BoundaryBenchmark":
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.__exit__(*error)

    def update(self, prediction: Tensor, meta: Sequence[Mapping]) -> None:
        """prediction (B, 1, H, W) edge probability in the padded frame; meta: each image's "name" and "size".

        What is scored is what `save_edge_maps` writes, so the files give the same score.
        """
        for picture, image in zip(edge_maps(prediction, meta), meta, strict=True):
            if self.source.names is None or image["name"] in self.source.names:
                self.pool.submit(count_prediction, picture, self.source.read, self.source.find(image["name"]),
                                 self.kind, self.protocol)

    def reduce(self) -> None:
        """Waits for the workers and adds up the counts of all processes (one all-reduce)."""
        with tqdm(total=len(self.pool), desc="boundary score", unit="image", leave=False,
                  disable=None if self.progress else True) as bar:
            self.pool.finish(bar)
        if not dist.is_initialized():
            return
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        flat = np.concatenate([self.totals.counts.ravel(), self.totals.best, [self.totals.images]])
        summed = torch.from_numpy(flat).to(device)                     # (4 K + 5,) int64
        dist.all_reduce(summed)
        flat = summed.cpu().numpy()
        self.totals.counts[:] = flat[:-5].reshape(-1, 4)
        self.totals.best[:] = flat[-5:-1]
        self.totals.images = int(flat[-1])

    def compute(self) -> dict[str, float]:
        """odsF, oisF, ap (fractions), threshold, images."""
        return self.totals.scores(self.protocol.thresholds)

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
        return image_counts(prediction, [truth_boundary(raw, kind)], protocol)
    except ValueError as error:
        raise ValueError(f"{files[0]}: {error}") from error
