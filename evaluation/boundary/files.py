"""Folders of predictions and ground truth: which file belongs to which, and reading one image of each."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from evaluation.boundary.protocol import Protocol, image_counts
from evaluation.boundary.truth import truth_boundary
from utils.files import read_mat, read_uint8, read_uint16

TRUTH_SUFFIXES = (".png", ".mat", ".npy")


@dataclass(frozen=True)
class Pair:
    """An image: its prediction, and its ground truth by one annotator or several."""

    prediction: Path
    truths: tuple[Path, ...]

    def counts(self, kind: str, protocol: Protocol) -> np.ndarray:
        """`image_counts` of the files, (K, 4). Errors name the file."""
        prediction = read_uint8(self.prediction, channels=1)
        truths = []
        for path in self.truths:
            for raw in read_truths(path, kind):
                if raw.shape != prediction.shape:
                    raise ValueError(f"{self.prediction} has (H, W) = {prediction.shape}, its ground truth {path} "
                                     f"{raw.shape}; predictions are needed at the original size")
                try:
                    truths.append(truth_boundary(raw, kind))
                except ValueError as error:
                    raise ValueError(f"{path}: {error}") from error
        return image_counts(prediction, truths, protocol)


def read_truths(path: Path, kind: str) -> list[np.ndarray]:
    """The ground truths in a file, each H x W integers: one, or those of all annotators in a .mat file of BSDS.

    A grey, palette or 16-bit PNG, an .npy array, the `LabelMap` of a .mat file, or, for the kind `bsds`, the
    `Boundaries` of each entry of its `groundTruth`.
    """
    if path.suffix == ".mat":
        return _annotators(path) if kind == "bsds" else [np.asarray(read_mat(path, "LabelMap"))]
    if path.suffix == ".npy":
        return [np.load(path, allow_pickle=False)]
    with Image.open(path) as image:
        deep = image.mode.startswith("I")
    return [read_uint16(path) if deep else read_uint8(path, channels=1)]


def _annotators(path: Path) -> list[np.ndarray]:
    entries = np.atleast_1d(read_mat(path, "groundTruth"))
    if not entries.size or not all(hasattr(entry, "Boundaries") for entry in entries):
        raise ValueError(f"{path}: 'groundTruth' holds no 'Boundaries'; a ground truth of BSDS has them for each "
                         "annotator")
    return [np.asarray(entry.Boundaries) for entry in entries]


def find_pairs(predictions: Path, truths: Path, names: Sequence[str] | None = None) -> list[Pair]:
    """One pair per image, by file name without suffix.

    A ground truth `<name>` is a file of one of `TRUTH_SUFFIXES`, or a folder of them: one per annotator. Without
    `names` both folders must hold the same images, so that an incomplete prediction cannot pass as a score.
    """
    predicted = {path.stem: path for path in sorted(_entries(predictions, "--pred")) if path.suffix == ".png"}
    if not predicted:
        hint = f"; did you mean {predictions / 'edge'}?" if (predictions / "edge").is_dir() else ""
        raise FileNotFoundError(f"--pred {predictions}: the folder holds no PNG file{hint}")
    known: dict[str, Path] = {}
    for path in sorted(_entries(truths, "--gt")):
        if path.is_dir() or path.suffix in TRUTH_SUFFIXES:
            name = path.name if path.is_dir() else path.stem
            if name in known:
                raise ValueError(f"two ground truths for the image {name}: {known[name]} and {path}")
            known[name] = path
    if names is None:
        names = sorted(predicted)
        if extra := sorted(known.keys() - predicted.keys()):
            raise ValueError(f"{len(extra)} of {len(known)} ground truths in {truths} have no prediction in "
                             f"{predictions}, first {known[extra[0]].name}; to score a part, list it with --images")
    for name in names:
        if name not in predicted:
            raise FileNotFoundError(f"no prediction for the image {name}: {predictions / name}.png not found")
        if name not in known:
            raise FileNotFoundError(f"{predicted[name]} has no ground truth: "
                                    f"{truths / name}{{{','.join(TRUTH_SUFFIXES)}}} not found")
    return [Pair(predicted[name], _annotations(known[name])) for name in names]


def _entries(folder: Path, option: str) -> list[Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"{option} {folder}: no such folder")
    return [path for path in folder.iterdir() if not path.name.startswith(".")]


def _annotations(path: Path) -> tuple[Path, ...]:
    if not path.is_dir():
        return (path,)
    found = tuple(sorted(p for p in path.iterdir() if p.suffix in TRUTH_SUFFIXES))
    if not found:
        raise FileNotFoundError(f"{path} holds no ground truth ({', '.join(TRUTH_SUFFIXES)})")
    return found
