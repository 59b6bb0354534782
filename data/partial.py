"""Which labels of a data set are used, where not every image has every label.

"one" and "random" are the protocols of Li, Liu and Bilen (CVPR 2022, "Learning Multiple Dense Prediction Tasks from
Partially Annotated Data"): one label per image, or a random number of them, at least one and not all. The choice is
drawn here from a seed and the image's id; it is not the list that the authors published scores with.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from utils.options import Options


@dataclass(frozen=True)
class PartialLabels(Options):
    """missing: whether an image may lack the label of a task. subset: which labels of training images are used.

    empty: whether training images in which there is nothing of what a data set is about (`LabelSpec.required`), such as
    vehicles, are left out as published.
    """

    missing: Literal["refuse", "allow"] = "refuse"
    subset: Literal["all", "one", "random"] = "all"
    empty: Literal["drop", "keep"] = "drop"
    seed: int = 0

    def __post_init__(self):
        self.require(self.seed >= 0, "seed", "a whole number of at least 0")


def choose_labels(present: np.ndarray, ids: Sequence[str], rule: PartialLabels) -> np.ndarray:
    """The labels to use, (images, tasks) bool, of those that are `present`.

    What an image keeps depends on the seed, its id and the labels it has: not on the other images, their order or the
    number of processes. An image with one label keeps it.
    """
    if rule.subset == "all":
        return present
    chosen = np.zeros_like(present)
    for row, name in enumerate(ids):
        has = np.flatnonzero(present[row])
        if has.size:
            rng = np.random.default_rng((rule.seed, zlib.crc32(name.encode("utf-8"))))
            number = 1 if rule.subset == "one" or has.size == 1 else rng.integers(1, has.size)
            chosen[row, rng.permutation(has)[:number]] = True
    return chosen
