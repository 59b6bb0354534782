"""Data sets: what the loaders make of tiny data folders in the layouts of the published archives."""

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from data.base import MultiTaskDataset
from data.datasets import DATASETS
from data.datasets.cityscapes import VOID_DISPARITY
from data.datasets.pascal_context import NORMALS_IDS, has_people
from data.spec import DatasetSpec
from data.transforms import STD, fixed_transform
from scripts.parity.base import Arrays, Check, Folder, Measure, NotCovered, Options, absolute_error
from utils.engine.tasks import TASKS, label_rules

GREY_LEVEL = float(1.01 / 255 / STD.min())      # one level of 255 after normalisation


def checks(folder: Folder) -> Iterator[Check]:
    for expected in folder.arrays:
        for directory in folder.data_sets:
            if expected.stem.startswith(directory.name) and expected.suffix == ".npz":
                data = np.load(expected)
                for sample in dict.fromkeys(key.rpartition("/")[0] for key in data):
                    yield Check(f"{directory.name}/{sample}", frozenset({expected}),
                                partial(_run, directory, data, sample))
    for path, content in folder.tables.items():
        if isinstance(content, list) and content and all(isinstance(x, int) for x in content):
            yield Check(path.stem, frozenset({path}), partial(_normals_ids, content))


def _normals_ids(ids: list[int], options: Options) -> Iterator[Measure]:
    yield Measure("number of differing ids", len(set(ids) ^ set(NORMALS_IDS)), 0.0)


def _data_set_of(directory: Path) -> DatasetSpec:
    """The data set whose files' top folders are all there."""
    for spec in map(DATASETS.load, DATASETS):
        tops = {option.partition("/")[0] for source in (spec.image, *spec.labels.values())
                for pattern in source.files for option in pattern.split("|")}
        if all((directory / top).is_dir() for top in tops):
            return spec
    raise NotCovered("not the layout of a data set of this program")


def _run(directory: Path, expected: Arrays, sample: str, options: Options) -> Iterator[Measure]:
    split, name = sample.split("/")
    want = {path.rpartition("/")[2]: expected[path] for path in expected if path.startswith(f"{sample}/")}
    spec = _data_set_of(directory)
    tasks = label_rules(task for task in want if task in TASKS)
    with tempfile.TemporaryDirectory() as root:    # a data set insists on its folder's name
        (Path(root) / spec.folder).symlink_to(directory.resolve(), target_is_directory=True)
        transform = None
        if spec.label_size is not None:
            transform = fixed_transform(want["image"].shape[-2:], tasks, want["semseg"].shape[-2:])
        data = MultiTaskDataset(spec, root, split, tasks, transform)
        index = _index(data, str(want.pop("name", name)))
        got = data[index]
        lossy = float(data.paths("image", data.ids[index])[0].suffix == ".jpg")    # decoders may differ by 1
        if "has_human_parts" in want:
            got["has_human_parts"] = has_people(*data.paths("human_parts", data.ids[index]))
    if transform is not None:                      # theirs: -1 is invalid
        want["depth"] = np.where(want["depth"] == -1, VOID_DISPARITY, want["depth"])
    for key, value in want.items():
        tolerance = (lossy if transform is None else GREY_LEVEL) if key == "image" else 0.0
        yield Measure(key, absolute_error(np.reshape(got[key], value.shape), value), tolerance)


def _index(data: MultiTaskDataset, name: str) -> int:
    """Position of the image whose file name or id begins like this."""
    found = [i for i, image in enumerate(data.ids)
             if image == name or data.paths("image", image)[0].name.startswith(name)]
    if len(found) != 1:
        raise ValueError(f"{len(found)} images are named '{name}' among {', '.join(data.ids)}")
    return found[0]
