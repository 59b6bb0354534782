"""What an experiment says about the boundary score, and what a data set says about its ground truth."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from utils.options import Options

TruthKind = Literal["boundary", "regions", "nyud", "bsds"]
ProtocolName = Literal["nms", "plain"]
Mode = Literal["off", "fast", "exact"]      # `fast` takes every eighth image


@dataclass(frozen=True)
class BoundarySettings(Options):
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

    def __post_init__(self):
        self.require(self.max_dist is None or 0 < self.max_dist < 1, "max_dist", "a share of the diagonal, in (0, 1)")
        self.require(self.workers is None or self.workers >= 0, "workers", "at least 0, or empty")


@dataclass(frozen=True)
class BoundaryTruth:
    """Ground truth of the boundary score, as a data set describes it.

    files: patterns below the data set's folder, with {id}; read(*paths) -> H x W integers, or G x H x W of several
    annotators. max_dist: tolerance of a match, as a share of the image's diagonal. published_list: file that names the
    images which published scores cover, where that is not the whole split.
    """

    files: tuple[str, ...]
    read: Callable[..., np.ndarray]
    kind: TruthKind
    max_dist: float
    published_list: str | None = None
