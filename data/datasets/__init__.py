"""The data sets by name, and the transform each of them uses. A new data set: a module and one entry here."""

from collections.abc import Mapping
from pathlib import Path

from data.base import DatasetSpec, MultiTaskDataset
from data.datasets.cityscapes import Cityscapes
from data.datasets.nyud import NYUD
from data.datasets.pascal_context import PASCALContext
from data.transforms import Compose, eval_transform, fixed_transform, train_transform
from utils.engine.tasks import Task

DATASETS: dict[str, type[MultiTaskDataset]] = {
    "NYUD": NYUD,
    "PASCALContext": PASCALContext,
    "Cityscapes": Cityscapes,
}


def build_transform(spec: DatasetSpec, training: bool, tasks: Mapping[str, Task],
                    image_size: tuple[int, int] | None = None, label_size: tuple[int, int] | None = None,
                    **augmentation) -> Compose:
    """Transform of a data set; the sizes (H, W) replace the spec's; the rest goes to `train_transform`.

    A data set with a label size of its own (Cityscapes) is resized and never augmented.
    """
    size = image_size or spec.image_size
    if spec.label_size is not None:
        return fixed_transform(size, tasks, label_size or spec.label_size)
    return train_transform(size, tasks, **augmentation) if training else eval_transform(size, tasks)


def build_dataset(name: str, root: str | Path, split: str, tasks: Mapping[str, Task],
                  transform: Compose | None = None) -> MultiTaskDataset:
    """Data set `name` below the folder `root`, with these rows of the task table."""
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}; known: {', '.join(DATASETS)}")
    return DATASETS[name](root, split, tasks, transform)
