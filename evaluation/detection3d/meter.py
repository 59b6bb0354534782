"""The detection score of Cityscapes 3D: how many vehicles are found, and how well they lie in space.

mDS (Gaehlert et al., arXiv 2006.07864) is the mean over the classes of AP * (centre + size + yaw + pitch and roll) / 4.
The four similarities are those of the vehicles found with the best confidence, which is known only when all images have
been seen: so sums are kept for each of the 51 confidences, and an evaluation of many processes is one all-reduce.
"""

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch

from evaluation.detection3d.matching import is_ignored, match, overlaps
from evaluation.evaluator import Score, TaskContext
from evaluation.figures import Bars, Figure
from evaluation.meter import Meter
from utils.boxes3d import Boxes3D

CONFIDENCES = np.arange(0.0, 1.01, 0.02)
MAX_DEPTH_M, BIN_M = 100, 5
NUM_BINS = MAX_DEPTH_M // BIN_M                  # and one more for what is farther away
SIMILARITIES = ("Center_Dist", "Size_Similarity", "OS_Yaw", "OS_Pitch_Roll")
NUM_CLASSES = 6


class DetectionMeter(Meter):
    """mDS, its parts (mAP, mCenter_Dist, ...) and the score of every class, in 0..1.

    pred and target: one `Boxes3D` per image, pixels and camera alike. Distances are whole metres on the ground, of the
    vehicle in the truth (of the prediction where there is none). A similarity that was seen in fewer than two bins of
    5 m is 0, and means are taken over the classes that the truth has: so does the official evaluation. An image whose
    vehicles nobody knows (`Boxes3D.is_known`) is not counted.
    """

    scores: ClassVar = (Score("mDS", "mDS", True, scale=100), Score("mAP", "mAP", True, scale=100))
    of_image: ClassVar = scores[1]               # one image has vehicles at too few distances for the other
    COUNTS: ClassVar = dict.fromkeys(("found", "missed", "wrong"), (NUM_CLASSES, len(CONFIDENCES), NUM_BINS + 1))
    SUMS: ClassVar = {"similarity": (NUM_CLASSES, len(CONFIDENCES), NUM_BINS, len(SIMILARITIES))}

    def __init__(self, class_names: Sequence[str]) -> None:
        assert len(class_names) == NUM_CLASSES, class_names
        self.class_names = tuple(class_names)
        super().__init__()

    @classmethod
    def for_task(cls, context: TaskContext) -> "DetectionMeter":
        return cls(context.class_names)

    @property
    def valid_pixels(self) -> int:
        """Number of vehicles in the truth: without any the score means nothing."""
        return int(self._vehicles().sum())

    def _vehicles(self) -> np.ndarray:
        """(classes,)"""
        return (self.state["found"] + self.state["missed"])[:, 0].sum(dim=-1).numpy()

    def update(self, pred: Sequence[Boxes3D], target: Sequence[Boxes3D], meta: Sequence[Mapping] = ()) -> None:
        for predicted, truth in zip(pred, target, strict=True):
            if not truth.is_known:
                continue
            terms = {name: np.zeros(shape, np.float64 if name in self.SUMS else np.int64)
                     for name, shape in {**self.SUMS, **self.COUNTS}.items()}
            predicted, truth = _Seen(predicted), _Seen(truth)
            for number in range(NUM_CLASSES):
                _count(predicted.of_class(number), truth.of_class(number), truth.ignore,
                       {name: term[number] for name, term in terms.items()})
            self.add(**{name: torch.from_numpy(term) for name, term in terms.items()})

    def compute(self) -> dict[str, float]:
        official = self.official()
        of_class = official["Detection_Score"]
        means = {f"m{name}": official[f"m{name}"] for name in ("AP", *SIMILARITIES)}
        return {"mDS": official["mDetection_Score"], **means, **{f"DS_{name}": of_class[name] for name in of_class}}

    def figures(self) -> list[Figure]:
        official, there = self.official(), self._vehicles() > 0
        names = tuple(name for name, seen in zip(self.class_names, there, strict=True) if seen)
        return [Bars(title, names, 100 * np.array([official[part][name] for name in names]))
                for part, title in (("Detection_Score", "detection score"), ("AP", "average precision"))]

    def official(self) -> dict:
        """Everything, under the names of the official result file."""
        state = {name: value.numpy() for name, value in self.state.items()}
        counts = [[state[name][number] for name in self.COUNTS] for number in range(NUM_CLASSES)]
        curves = [_curve(*(count.sum(axis=-1) for count in of_class)) for of_class in counts]
        best = np.array([_working_point(*curve) for curve in curves])
        at = range(NUM_CLASSES), best
        parts = {"AP": np.array([average_precision(*curve) for curve in curves]),
                 **dict(zip(SIMILARITIES, _similarities(state["similarity"][at], state["found"][at]), strict=True))}
        score = parts["AP"] * sum(parts[name] for name in SIMILARITIES) / len(SIMILARITIES)
        there = self._vehicles() > 0

        def named(values: np.ndarray) -> dict[str, float]:
            return dict(zip(self.class_names, values.tolist(), strict=True))

        parts = {"Detection_Score": score, **parts}
        means = {f"m{name}": float(value[there].mean()) if there.any() else math.nan for name, value in parts.items()}
        return {name: named(value) for name, value in parts.items()} | means | {
            "working_confidence": named(CONFIDENCES[best]), "GT_stats": named(self._vehicles()),
            "AP_per_depth": {name: _per_depth(*count) for name, count in zip(self.class_names, counts, strict=True)}}


class _Seen:
    """The vehicles of one image as arrays of float64, in V."""

    def __init__(self, boxes: Boxes3D):
        boxes = Boxes3D(*(value.detach().cpu() if isinstance(value, torch.Tensor) else value for value in boxes))
        boxes = boxes._replace(**{name: value.double() for name, value in boxes._asdict().items()
                                  if isinstance(value, torch.Tensor) and value.is_floating_point()})
        centers, quaternions = boxes.in_vehicle()
        self.labels, self.rectangles, self.sizes = boxes.labels.numpy(), boxes.modal.numpy(), boxes.sizes.numpy()
        self.centers, self.turns = centers.numpy(), _turns(quaternions.numpy())
        self.scores = np.ones(len(self.labels)) if boxes.scores is None else boxes.scores.numpy()
        self.ignore = np.zeros((0, 4)) if boxes.ignore is None else boxes.ignore.numpy()
        # Annotations are given in centimetres: a distance is a whole number of metres, or farther from one than this.
        self.distance = np.floor(np.linalg.norm(self.centers[:, :2], axis=1) + 1e-9)

    def of_class(self, number: int) -> "_Seen":
        """Those of one class, in their order."""
        chosen, mask = object.__new__(_Seen), self.labels == number
        for name, value in vars(self).items():
            setattr(chosen, name, value if name == "ignore" else value[mask])
        return chosen


def _turns(quaternions: np.ndarray) -> np.ndarray:
    """(n, 4) in V -> yaw, pitch, roll (n, 3)."""
    w, x, y, z = quaternions.T
    return np.stack([np.arctan2(2 * (w * z - x * y), 1 - 2 * (y * y + z * z)),
                     np.arcsin(np.clip(2 * (w * y + z * x), -1, 1)),
                     np.arctan2(2 * (w * x - y * z), 1 - 2 * (x * x + y * y))], axis=1)


def _bins(distance: np.ndarray) -> np.ndarray:
    return np.minimum(distance // BIN_M, NUM_BINS).astype(np.int64)


def _count(predicted: _Seen, truth: _Seen, ignore: np.ndarray, terms: Mapping[str, np.ndarray]) -> None:
    """Adds the vehicles of one class of one image to the terms, each (confidences, ...)."""
    _, overlap = overlaps(truth.rectangles, predicted.rectangles)
    ignored = is_ignored(predicted.rectangles, ignore)
    sure = predicted.scores >= CONFIDENCES[:, None]                    # (confidences, m)
    numbers = sure.sum(axis=1)
    starts = np.flatnonzero(np.diff(numbers, prepend=-1))              # where the predictions are others than before
    for start, end in zip(starts, [*starts[1:], len(CONFIDENCES)], strict=True):
        index = np.flatnonzero(sure[start])
        partner = match(overlap[:, index])
        found, taken = partner >= 0, index[partner[partner >= 0]]
        wrong = np.setdiff1d(index[~ignored[index]], taken)
        rows = np.s_[start:end]
        for name, distance in (("found", truth.distance[found]), ("missed", truth.distance[~found]),
                               ("wrong", predicted.distance[wrong])):
            terms[name][rows] += np.bincount(_bins(distance), minlength=NUM_BINS + 1)
        near = truth.distance[found] < MAX_DEPTH_M
        values = _alike(predicted, taken[near], truth, np.flatnonzero(found)[near])
        places = _bins(truth.distance[found][near])
        for kind, of_kind in enumerate(values.T):
            terms["similarity"][rows, :, kind] += np.bincount(places, of_kind, minlength=NUM_BINS)


def _alike(predicted: _Seen, p: np.ndarray, truth: _Seen, t: np.ndarray) -> np.ndarray:
    """How alike the pairs of these indices are, (pairs, 4) in the order of SIMILARITIES."""
    apart = np.linalg.norm(predicted.centers[p, :2] - truth.centers[t, :2], axis=1)
    ratio = predicted.sizes[p] / truth.sizes[t]
    yaw, pitch, roll = np.cos(predicted.turns[p] - truth.turns[t]).T
    return np.stack([1 - np.minimum(apart / MAX_DEPTH_M, 1), np.minimum(ratio, 1 / ratio).prod(axis=1),
                     (1 + yaw) / 2, 0.5 + (pitch + roll) / 4], axis=1)


# From counts to scores --------------------------------------------------------------------------------------------


def _curve(found: np.ndarray, missed: np.ndarray, wrong: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Counts at every confidence -> recall and precision, 0 where nothing was found."""
    some = np.maximum(found, 1)
    return (np.where(found > 0, some / (some + missed), 0.0), np.where(found > 0, some / (some + wrong), 0.0))


def average_precision(recall: np.ndarray, precision: np.ndarray) -> float:
    """The area below the curve, made to fall."""
    order = np.argsort(recall, kind="stable")
    recall = np.concatenate([[0.0], recall[order], [1.0]])
    falling = np.maximum.accumulate(np.concatenate([precision[order], [0.0]])[::-1])[::-1]
    return float((np.diff(recall) * falling).sum())


def _working_point(recall: np.ndarray, precision: np.ndarray) -> int:
    """Index of the first confidence with the largest product; 0 where nothing was found at any."""
    return int((recall * precision).argmax())


def _similarities(sums: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Sums (classes, bins, 4) and pairs (classes, bins + 1) -> means over the bins that have any, (4, classes)."""
    pairs = found[:, :NUM_BINS]
    seen = (pairs > 0).sum(axis=1)
    means = (sums / np.maximum(pairs, 1)[..., None]).sum(axis=1) / np.maximum(seen, 1)[:, None]
    return np.where(seen >= 2, means.T, 0.0)


def _per_depth(found: np.ndarray, missed: np.ndarray, wrong: np.ndarray) -> dict[str, float]:
    """AP of every bin that ever has a vehicle, by its nearest distance in metres."""
    return {str(BIN_M * number): average_precision(*_curve(found[:, number], missed[:, number], wrong[:, number]))
            for number in range(NUM_BINS) if (found[:, number] + missed[:, number]).any()}
