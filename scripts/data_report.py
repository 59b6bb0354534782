"""What `check_data.py` tells about the maps of a split: sizes, ranges, void, classes, what the papers leave open."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from data.base import MultiTaskDataset
from data.labels import VOID
from data.spec import DatasetSpec
from evaluation.boundary.thinning import thin


class Facts(NamedTuple):
    """About one map of one image."""

    size: tuple[int, int]
    low: float                         # of the values that are not void
    high: float
    void: float                        # share of the pixels
    other_size: str                    # folder of a label whose size is not its image's
    answers: tuple[float, ...]         # to the questions below
    counts: np.ndarray | None          # pixels of each class


def edge_facts(label: np.ndarray) -> tuple[float, ...]:
    """Share of values other than 0 and 1, share of edge pixels, share of these that thinning keeps."""
    edge = label[..., 0] > 0
    kept = thin(edge).sum() / edge.sum() if edge.any() else np.nan
    return float(((label != 0) & (label != 1)).mean()), float(edge.mean()), float(kept)


def normals_facts(label: np.ndarray) -> tuple[float, ...]:
    """Share of vectors of zero length; of the others, the share whose length is off by more than 0.1."""
    length = np.linalg.norm(label, axis=-1)
    zero = length == 0
    return float(zero.mean()), float((np.abs(length[~zero] - 1) > 0.1).mean()) if not zero.all() else np.nan


# Questions that need more than a range: task -> (function of the stored label, sentence with their means).
QUESTIONS: dict[str, tuple[Callable[[np.ndarray], tuple[float, ...]], str]] = {
    "edge": (edge_facts, "values other than 0 and full: {:.2%}; edge pixels: {:.2%}; "
                         "kept by thinning: {:.1%} (100% = lines one pixel wide, about 50% = two)"),
    "normals": (normals_facts, "zero vectors: {:.2%}; other lengths off by more than 0.1: {:.2%}"),
    "depth": (lambda label: (float((label == 0).mean()),), "zeros (no value): {:.3%}"),
    "det3d": (lambda boxes: (len(boxes.labels), len(boxes.ignore)),
              "values: metres ahead of the camera; vehicles an image: {:.1f}, regions that are not scored: {:.1f}"),
}


def look(dataset: MultiTaskDataset, name: str, maps: Mapping[str, Any]) -> dict[str, Facts]:
    """Facts about every map of an image that could be read."""
    found = {}
    for key, label in maps.items():
        if key != "image" and not dataset.labels[key].is_map:
            found[key] = _box_facts(key, label, dataset)
            continue
        is_image = key == "image"
        void = (np.zeros(label.shape[:2], bool) if is_image else
                np.all(dataset.labels[key].mark_void(label) == VOID, axis=-1))
        values = label[~void]
        low, high = (float(values.min()), float(values.max())) if values.size else (np.inf, -np.inf)
        other = ""
        if not is_image and "image" in maps and label.shape[:2] not in (maps["image"].shape[:2], (1, 1)):
            other = dataset.paths(key, name)[0].parent.relative_to(dataset.folder).as_posix()
        classes = () if is_image else dataset.spec.labels[key].classes
        counts = np.bincount(values.astype(np.int64).ravel(), minlength=len(classes)) if classes else None
        answers = QUESTIONS[key][0](label) if key in QUESTIONS else ()
        found[key] = Facts(label.shape[:2], low, high, float(void.mean()), other, answers, counts)
    return found


def _box_facts(key: str, boxes: Any, dataset: MultiTaskDataset) -> Facts:
    """Of vehicles in space; of the classes the vehicles are counted."""
    distances, classes = boxes.centers[:, 2].tolist(), dataset.spec.labels[key].classes
    low, high = (min(distances), max(distances)) if distances else (np.inf, -np.inf)
    counts = np.bincount(boxes.labels.numpy(), minlength=len(classes))
    return Facts(dataset.labels[key].size_of(boxes), low, high, float(not distances), "", QUESTIONS[key][0](boxes),
                 counts)


@dataclass
class MapReport:
    """What is gathered about one kind of map ("image" or a task) of a split."""

    classes: tuple[str, ...] = ()
    facts: list[Facts] = field(default_factory=list)

    def lines(self, key: str) -> list[str]:
        """What is printed."""
        if not self.facts:
            return [f"  {key:12s} nothing readable"]
        sizes = Counter(fact.size for fact in self.facts)
        listed = ", ".join(f"{h} x {w}: {n}" for (h, w), n in sizes.most_common(3))
        more = f" and {len(sizes) - 3} other sizes" if len(sizes) > 3 else ""
        void = np.array([fact.void for fact in self.facts])
        low, high = min(fact.low for fact in self.facts), max(fact.high for fact in self.facts)
        lines = [f"  {key:12s} {len(self.facts)} read; values {low:g}..{high:g}; void {void.mean():.2%}, all void in "
                 f"{(void == 1).sum()}; H x W {listed}{more}"]
        if resized := Counter(fact.other_size for fact in self.facts if fact.other_size):
            folders = ", ".join(f"{folder}: {n}" for folder, n in resized.items())
            lines.append(f"{'':15s}size differs from the image's (labels will be resized): {folders}")
        if self.facts[0].answers:
            columns = np.array([fact.answers for fact in self.facts]).T
            means = [np.nanmean(column) if np.isfinite(column).any() else np.nan for column in columns]
            lines.append(f"{'':15s}{QUESTIONS[key][1].format(*means)}")
        return lines + self._class_lines()

    def _class_lines(self) -> list[str]:
        """Share of the labelled pixels and number of images of every class, five in a line."""
        if not self.classes:
            return []
        counts = np.stack([fact.counts[:len(self.classes)] for fact in self.facts])       # (images, classes)
        shares, images = counts.sum(axis=0) / max(1, counts.sum()), (counts > 0).sum(axis=0)
        rows = list(zip(self.classes, shares, images, strict=True))
        present = [f"{name} {share:.2%} ({n})" for name, share, n in rows if n]
        absent = [name for name, _, n in rows if not n]
        lines = [f"{'':15s}{', '.join(present[i:i + 5])}" for i in range(0, len(present), 5)]
        return lines + ([f"{'':15s}never: {', '.join(absent)}"] if absent else [])


class Copy(NamedTuple):
    """A copy of a data set that many people have: images in train and val, and (height, width) of the images."""

    dataset: str
    title: str
    train: int
    val: int
    size: tuple[int, int] | None       # of all images; None: any that fits the network's frame


KNOWN = (
    Copy("NYUD", "the archive of InvPT, TaskPrompter, MLoRE and MTMamba (NYUDv2.tar.gz)", 795, 654, (425, 560)),
    Copy("NYUD", "full frames, not the crop of the usual archive", 795, 654, (480, 640)),
    Copy("PASCALContext", "the archive of InvPT, TaskPrompter, MLoRE and MTMamba (PASCALContext.tar.gz)", 4998, 5105,
         None),
    Copy("Cityscapes", "the official packages", 2975, 500, (1024, 2048)),
    Copy("Cityscapes3D", "the official packages, those of Cityscapes 3D among them", 2975, 500, (1024, 2048)),
)


def recognise(spec: DatasetSpec, numbers: Mapping[str, int], sizes: set[tuple[int, int]]) -> str:
    """Which known copy this is, in words; numbers: images by split, sizes: of the images that were read."""
    mine = [copy for copy in KNOWN if copy.dataset == spec.name]
    for copy in mine:
        if (numbers.get("train"), numbers.get("val")) == (copy.train, copy.val) and (copy.size is None or sizes ==
                                                                                     {copy.size}):
            return f"this is {copy.title}"
    found = ", ".join(f"{n} {split}" for split, n in numbers.items())
    usual = f"; the usual one has {mine[0].train} train, {mine[0].val} val" if mine else ""
    return f"no copy that is known here: {found} images{usual}"
