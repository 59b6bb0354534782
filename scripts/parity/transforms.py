"""Augmentation: every single step with given parameters, and whole pipelines replayed from recorded draws."""

import re
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from data import photometric, transforms
from data.labels import VOID
from scripts.parity.base import Arrays, Check, Folder, Measure, NotCovered, Options, absolute_error
from utils.engine.tasks import TASKS, label_rules

OTHER_VOID = {("taskprompter", "depth"): -1.0, ("mlore", "depth"): 0.0}      # after the transforms; else and ours: 255
ROUNDED = {"image": 1e-6, "depth": 1e-6}               # depth is divided by the scale factor
PARTS = "human_parts"
GREY_LEVEL = float(1.01 / 255 / transforms.STD.min())  # one level of 255 after normalisation
# Bilinear resizing and 8-bit colours may differ by one level between versions of OpenCV; labels never.
IMAGE_TOLERANCE = {"scale": 1e-3, "photometric": 1.0, "train pipeline": GREY_LEVEL}


class Replay:
    """Stands in for `random.Random`: returns recorded draws and insists on their kind, bounds and number."""

    def __init__(self, draws: Sequence[Sequence]):
        self.draws = list(draws)

    def _next(self, *call):
        if not self.draws:
            raise ValueError(f"draw {call} after the last recorded one")
        *recorded, value = self.draws.pop(0)
        if tuple(recorded) != call:
            raise ValueError(f"draw {call} where {tuple(recorded)} was recorded")
        return value

    def random(self) -> float:
        return self._next("random")

    def uniform(self, low: float, high: float) -> float:
        return self._next("uniform", low, high)

    def randint(self, low: int, high: int) -> int:
        return self._next("randint", low, high)


def checks(folder: Folder) -> Iterator[Check]:
    data = folder.holding(["input/image"])
    for table, entry in folder.records():
        if data is not None and "op" in entry:
            yield Check(entry["name"], frozenset({table, data}), partial(_run, entry, np.load(data)))


def _run(entry: dict, data: Arrays, options: Options) -> Iterator[Measure]:
    prefix = f"{entry['name']}/"
    wanted = [key.removeprefix(prefix) for key in data if key.startswith(prefix)]
    if not wanted:
        raise NotCovered("no arrays of this case")
    sample = {key.removeprefix("input/"): data[key] for key in data if key.startswith("input/")}
    sample = {key: value for key, value in sample.items() if key == "image" or key in TASKS}
    if set(wanted) == {PARTS}:                     # a map without people: nothing but background
        sample[PARTS] = np.zeros_like(sample[PARTS])
    got = _apply(entry, sample)
    for key in wanted:
        if key not in got:
            yield Measure(key, uncovered="not a map of this program")
            continue
        want = data[prefix + key]
        if (void := OTHER_VOID.get((entry.get("family"), key))) is not None:
            want = np.where(want == void, VOID, want)
        default = ROUNDED.get(key, 0.0)
        tolerance = IMAGE_TOLERANCE.get(entry["op"], default) if key == "image" else default
        yield Measure(key, absolute_error(got[key], want), tolerance)


def _apply(entry: dict, sample: dict) -> dict:
    op, tasks = entry["op"], label_rules(key for key in sample if key != "image")
    if op == "scale":
        return transforms.RandomScale(tasks).apply(sample, entry["scale"])
    if op == "crop":
        top, bottom, left, right = entry["loc"]
        return transforms.RandomCrop(tasks, (bottom - top, right - left)).apply(sample, top, left)
    if op == "photometric":
        image = sample["image"].astype(np.uint8)
        for name, value in entry["steps"]:
            image = getattr(photometric, name)(image, value)
        return {"image": image}
    if op in ("train pipeline", "val pipeline"):
        build = transforms.train_transform if op.startswith("train") else transforms.eval_transform
        replay = Replay(entry.get("draws", ()))
        result = build(tuple(entry["size"]), tasks)(sample, replay)
        if replay.draws:
            raise ValueError(f"{len(replay.draws)} recorded draws were not made")
        return result
    # flip, normalize, pad, add_ignore, and "pad(H,W) then add_ignore"
    for name, size in re.findall(r"(\w+)(?:\((\d+,\d+)\))?(?: then )?", entry["op"]):
        if name == "flip":
            sample = transforms.RandomFlip(tasks).apply(sample)
        elif name == "normalize":
            sample = transforms.Normalise()(sample, None)
        elif name == "pad":
            frame = tuple(int(side) for side in (size.split(",") if size else entry["size"]))
            sample = transforms.Pad(tasks, frame)(sample, None)
        else:
            sample = {"add_ignore": transforms.MarkVoid(tasks)}[name](sample, None)
    return sample
