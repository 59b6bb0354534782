"""Several data sets in one training: each with its own tasks and classes, drawn from by weight.

A task that several of them have means the same in each, or is named apart (`semseg@street`), which is settled before
anything is opened (`merged_spec`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from data.base import MultiTaskDataset
from data.spec import DatasetSpec, LabelSpec
from evaluation.evaluator import Split


@dataclass(frozen=True)
class Part:
    """One data set of a mixture. weight: its share of the images drawn, against those of the others; None: its size."""

    spec: DatasetSpec
    weight: float | None = None


def merged_spec(parts: Sequence[Part]) -> DatasetSpec:
    """The specification that several data sets have in common: the labels of all, the first one's image size.

    A ValueError where they cannot be trained together, with what would help.
    """
    first = parts[0].spec
    if len(parts) == 1:
        return first
    names = [part.spec.name for part in parts]
    if doubled := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"two of the data sets are called {doubled!r}; give one of them another name (name: ...)")
    if len({part.weight is None for part in parts}) > 1:
        raise ValueError("either every data set has a weight, or none has")
    labels: dict[str, LabelSpec] = {}
    for spec in (part.spec for part in parts):
        if spec.label_size is not None:
            raise ValueError(f"{spec.name} cannot be mixed: its labels have a size of their own")
        for task, label in spec.labels.items():
            if task not in labels:
                labels[task] = label
            elif difference := label.difference(labels[task]):
                raise ValueError(f"{task} of {spec.name} is not that of the data sets before it: {difference}; name it "
                                 f"apart (rename: {{{task}: {task}@{'_'.join(spec.name.lower().split())}}})")
            elif label.valid_range != labels[task].valid_range:
                labels[task] = replace(labels[task], valid_range=None)     # what lies outside is void already
    return replace(first, name=" + ".join(names), labels=labels)


class MixedDataset:
    """Several `MultiTaskDataset`s one after the other, as one. Names of images begin with that of their data set.

    draws: for each, how many images it has and how many of them an epoch takes; None: every image once.
    """

    def __init__(self, parts: Sequence[MultiTaskDataset], weights: Sequence[float | None]):
        self.parts = tuple(parts)
        self.labels = parts[0].labels
        self.split = parts[0].split
        self.present = np.concatenate([part.present for part in parts])
        self.ids = [f"{part.spec.name}/{name}" for part in parts for name in part.ids]
        self.starts = np.cumsum([0, *(len(part) for part in parts)])
        self.draws: list[tuple[int, int]] | None = None
        if weights[0] is not None:
            shares = np.array(weights) / sum(weights) * len(self)
            self.draws = [(len(part), max(1, round(share))) for part, share in zip(parts, shares, strict=True)]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, key: int | tuple[int, int]) -> dict:
        index, seed = key if isinstance(key, tuple) else (key, key)
        number = int(np.searchsorted(self.starts, index, side="right")) - 1
        part = self.parts[number]
        sample = part[(index - int(self.starts[number]), seed)]
        return sample | {"meta": sample["meta"] | {"name": f"{part.spec.name}/{sample['meta']['name']}"}}

    def labelled(self, task: str) -> list[str]:
        """Names of the images that have a label of this task."""
        return [f"{part.spec.name}/{name}" for part in self.parts for name in part.labelled(task)]

    def truth_files(self, task: str, name: str) -> tuple[Path, ...]:
        """Files of the boundary score's ground truth of the image of this name."""
        of, _, rest = name.partition("/")
        return next(part for part in self.parts if part.spec.name == of).truth_files(task, rest)

    def scored(self, task: str) -> Split:
        """What an evaluation of a task must know of these images: the boundary score needs one kind of ground truth."""
        truths = [part.spec.labels[task].boundary for part in self.parts if task in part.spec.labels]
        same = all(truth == truths[0] for truth in truths)
        truth = replace(truths[0], published_list=None) if same and truths[0] is not None else None
        named = " + ".join(part.spec.name for part in self.parts)
        return Split(f"{named} (whose ground truths differ)" if not same else named, self.split, self.parts[0].folder,
                     tuple(self.labelled(task)), truth, partial(self.truth_files, task), complete=False)
