"""Checks a data folder: python scripts/check_data.py --db_root DIR --dataset NYUD [--split train] [--limit N]

Reads every file of the chosen splits with the training loaders and reports counts, sizes, value ranges and the share
of void per task, plus what the papers leave open (how wide boundary lines are, whether depth has holes, whether
normals have unit length). Ends with exit status 1 and a list if anything is missing, unreadable or out of range.
"""

import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.base import MultiTaskDataset
from data.datasets import DATASETS
from data.labels import VOID, LabelRules
from evaluation.boundary.thinning import thin
from scripts.command_line import Command
from utils.engine.tasks import label_rules

MAX_LISTED = 50


@dataclass
class MapReport:
    """What is gathered about one kind of map ("image" or a task) of a split."""

    count: int = 0
    low: float = np.inf
    high: float = -np.inf
    void: float = 0.0                                       # sum over images of the share of void pixels
    empty: int = 0                                          # images that are void everywhere
    sizes: Counter = field(default_factory=Counter)
    resized: Counter = field(default_factory=Counter)       # folder -> labels whose size is not the image's
    answers: list[tuple[float, ...]] = field(default_factory=list)

    def add(self, label: np.ndarray, void: np.ndarray) -> None:
        """`label` H x W x C as stored; `void` H x W bool."""
        self.count += 1
        self.sizes[label.shape[:2]] += 1
        self.void += void.mean()
        self.empty += bool(void.all())
        if (values := label[~void]).size:
            self.low, self.high = min(self.low, values.min()), max(self.high, values.max())


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
}


def examine(dataset: MultiTaskDataset, name: str, reports: dict[str, MapReport]) -> list[str]:
    """Reads all maps of one image into the reports; returns what is wrong."""
    problems = []
    image_size = None
    for key, report in reports.items():
        try:
            label = dataset.read(key, name)
        except (ValueError, OSError) as error:
            problems.append(str(error))
            continue
        if key == "image":
            image_size = label.shape[:2]
            report.add(label, np.zeros(image_size, bool))
            continue
        report.add(label, (dataset.labels[key].mark_void(label) == VOID).all(axis=-1))
        if image_size and label.shape[:2] not in (image_size, (1, 1)):     # 1 x 1: a map without objects
            report.resized[dataset.paths(key, name)[0].parent.relative_to(dataset.folder).as_posix()] += 1
        if key in QUESTIONS:
            report.answers.append(QUESTIONS[key][0](label))
    return problems


def describe(key: str, report: MapReport) -> str:
    """The lines printed about one kind of map."""
    if not report.count:
        return f"  {key:12s} nothing readable"
    sizes = ", ".join(f"{h} x {w}: {n}" for (h, w), n in report.sizes.most_common(3))
    more = f" and {len(report.sizes) - 3} other sizes" if len(report.sizes) > 3 else ""
    lines = [f"  {key:12s} {report.count} read; values {report.low:g}..{report.high:g}; void "
             f"{report.void / report.count:.2%}, all void in {report.empty}; H x W {sizes}{more}"]
    if report.resized:
        folders = ", ".join(f"{folder}: {n}" for folder, n in report.resized.items())
        lines.append(f"{'':15s}size differs from the image's (labels will be resized): {folders}")
    if report.answers:
        means = [np.nanmean(c) if np.isfinite(c).any() else np.nan for c in np.array(report.answers).T]
        lines.append(f"{'':15s}{QUESTIONS[key][1].format(*means)}")
    return "\n".join(lines)


def check_split(name: str, db_root: str, split: str, labels: Mapping[str, LabelRules], limit: int | None) -> list[str]:
    """Prints the report of one split; returns its problems."""
    # The data set without its own start-up checks, so that everything wrong can be listed at once.
    lenient = {"check_files": lambda self: None, "select_ids": lambda self: self.ids}
    try:
        dataset = type("Lenient", (MultiTaskDataset,), lenient)(DATASETS.load(name), db_root, split, labels)
    except (ValueError, OSError) as error:
        return [str(error)]
    missing = dataset.missing_files()
    problems = [f"missing: {path}" for path in missing]
    if double := len(dataset.ids) - len(set(dataset.ids)):
        problems.append(f"split {split!r} lists {double} id(s) more than once")
    reports = {key: MapReport() for key in ("image", *dataset.labels)}
    step = max(1, len(dataset.ids) // limit) if limit else 1
    chosen = [image_id for image_id in dataset.ids[::step]
              if all(path.is_file() for key in reports for path in dataset.paths(key, image_id))]
    for image_id in tqdm(chosen, desc=split, leave=False, disable=not sys.stderr.isatty()):
        problems += examine(dataset, image_id, reports)
    print(f"{name} {split}: {len(dataset.ids)} ids, {len(missing)} missing files, {len(chosen)} images "
          f"examined in {dataset.folder}")
    for key, report in reports.items():
        print(describe(key, report))
    return problems


def check(db_root: str, dataset: str, split: str | None, tasks: list[str] | None, limit: int | None) -> int:
    """0 if all is well, 1 with a list of problems otherwise."""
    spec = DATASETS.load(dataset)
    labels = label_rules(tasks or spec.labels)
    problems = list(dict.fromkeys(problem for name in ([split] if split else spec.splits)
                                  for problem in check_split(dataset, db_root, name, labels, limit)))
    more = [f"and {len(problems) - MAX_LISTED} more"] if len(problems) > MAX_LISTED else []
    if problems:
        print(f"{len(problems)} problem(s):", *problems[:MAX_LISTED], *more, sep="\n  ")
    else:
        print("no problems found")
    return 1 if problems else 0


main = Command(__doc__, check, {
    "--db_root": dict(required=True, help="holds NYUDv2/, PASCALContext/ or cityscapes/"),
    "--dataset": dict(required=True, choices=list(DATASETS)),
    "--split": dict(help="default: all splits"),
    "--tasks": dict(nargs="+", help="default: all tasks of the data set"),
    "--limit": dict(type=int, help="examine about this many images per split, evenly spaced"),
})

if __name__ == "__main__":
    sys.exit(main())
