"""The kinds of labels that a data set of one's own may have, as its YAML describes them; each becomes a `LabelSpec`.

The group of a task, such as `depth: {files: depth/{id}.png, unit: mm, valid: [0.1, 10]}`, is parsed by the class of its
kind. Which kind a task has says the task table (`utils.engine.tasks`), or the group's own `kind`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from data.boxes_file import VEHICLES, has_boxes, read_boxes
from data.label_files import (
    AnnotatorsFile,
    ClassFile,
    ColourFile,
    DepthFile,
    MaskFile,
    NormalsFile,
    RegionsFile,
    TruthFile,
)
from data.labels import VOID, DisparityLabel
from data.spec import LabelSpec
from evaluation.boundary.settings import BoundaryTruth
from utils.options import Options

MOST_CLASSES = 255                   # ids 0..254; 255 is void
METRES = {"m": 1.0, "cm": 0.01, "mm": 0.001}


@dataclass(frozen=True)
class LabelKind(Options):
    """What all kinds share. files: a pattern with {id} (a folder: {id}.* in it); variable: of .mat and .npz files."""

    files: str = ""
    variable: str = ""

    listed: ClassVar[tuple[str, ...]] = ()           # options whose value may be the name of a text file, a line each

    def spec(self, files: tuple[str, ...]) -> LabelSpec:
        """Of labels in these files."""
        raise NotImplementedError(f"{type(self).__name__}.spec")


@dataclass(frozen=True)
class Classes(LabelKind):
    """Maps of classes.

    classes: their names, in the order of the network's outputs. first: the file value of the first class, which the
    others follow; values: instead, the file value of each class, or a list of them. void: file values without a class.
    other: what any other value is. colours: [R, G, B] of each class, for pictures; with `encoding: colours` also how
    the files show them.
    """

    classes: Any = None
    first: int = 0
    values: dict[str, Any] = field(default_factory=dict)
    void: tuple[int, ...] = (255,)
    other: Literal["refuse", "void"] = "refuse"
    encoding: Literal["index", "colours"] = "index"
    colours: tuple[tuple[int, int, int], ...] = ()

    listed: ClassVar[tuple[str, ...]] = ("classes",)

    def __post_init__(self):
        names = self.classes if isinstance(self.classes, (list, tuple)) else ()
        names = tuple(str(name) for name in names)
        self.require(names and len(names) <= MOST_CLASSES and len(set(names)) == len(names) and all(names), "classes",
                     f"a list of 1 to {MOST_CLASSES} different names, or the name of a text file with one on each line")
        object.__setattr__(self, "classes", names)
        self.require(not self.colours or len(self.colours) == len(names), "colours",
                     f"one [R, G, B] for each of the {len(names)} classes")
        self.require(self.colours or self.encoding == "index", "encoding", "index, or colours with the option colours")
        self.require(not self.values or set(self.values) == set(names), "values",
                     f"a group with the file value, or a list of them, of each class: {', '.join(names)}")
        given = [value for name in self.values for value in self._values_of(name)]
        self.require(all(type(value) is int for value in given), "values", "whole numbers, or lists of them")
        self.require(len(set(given)) == len(given) and not set(given) & set(self.void), "values",
                     f"different for each class, and not void ({', '.join(map(str, self.void)) or 'no value is'})")

    def _values_of(self, name: str) -> list:
        stored = self.values[name]
        return stored if isinstance(stored, list) else [stored]

    def spec(self, files: tuple[str, ...]) -> LabelSpec:
        void = {value: int(VOID) for value in self.void}
        others = self.other == "void"
        if self.encoding == "colours":
            numbers = {(r << 16) | (g << 8) | b: index for index, (r, g, b) in enumerate(self.colours)}
            read: Any = ColourFile(numbers, others)
        else:
            if self.values:
                named = {v: i for i, name in enumerate(self.classes) for v in self._values_of(name)}
            else:
                named = {index + self.first: index for index in range(len(self.classes))}
            read = ClassFile(void | named, others, self.variable)
        return LabelSpec(files, read, channels=len(self.classes), classes=self.classes, colours=self.colours)


@dataclass(frozen=True)
class Depth(LabelKind):
    """Depth, or disparity in pixels: (stored + offset) * scale in `unit`. valid: what lies outside is void.

    void: stored values without a depth. nan: what NaN and infinity are.
    """

    unit: Literal["m", "cm", "mm", "disparity"] = "m"
    scale: float = 1.0
    offset: float = 0.0
    void: tuple[float, ...] = (0.0,)
    nan: Literal["refuse", "void"] = "refuse"
    valid: tuple[float, float] | None = None

    def __post_init__(self):
        self.require(self.scale > 0, "scale", "above 0")
        self.require(self.valid is None or 0 <= self.valid[0] < self.valid[1] <= VOID, "valid",
                     f"two growing numbers in [0, {VOID:g}], in metres or pixels")

    def spec(self, files: tuple[str, ...]) -> LabelSpec:
        scale = self.scale * METRES.get(self.unit, 1.0)
        read = DepthFile(scale, self.offset, self.void, self.nan == "void", self.valid, self.variable)
        is_depth = self.unit in METRES
        return LabelSpec(files, read, unit="m" if is_depth else "px", valid_range=self.valid,
                         rules=None if is_depth else DisparityLabel())


@dataclass(frozen=True)
class Normals(LabelKind):
    """Surface normals. axes: which stored component is x (right), y and z, with its sign; void: a stored colour."""

    encoding: Literal["rgb", "vectors"] = "rgb"
    axes: tuple[Literal["x", "-x", "y", "-y", "z", "-z"], ...] = ("x", "y", "z")
    void: tuple[int, int, int] | None = None

    def __post_init__(self):
        self.require(sorted(axis.removeprefix("-") for axis in self.axes) == ["x", "y", "z"], "axes",
                     "three of x, y and z in any order, each with or without a minus")

    def spec(self, files: tuple[str, ...]) -> LabelSpec:
        axes = tuple((1 + "xyz".index(axis[-1])) * (-1 if axis.startswith("-") else 1) for axis in self.axes)
        return LabelSpec(files, NormalsFile(self.encoding, axes, self.void, self.variable), channels=3)


@dataclass(frozen=True)
class Mask(LabelKind):
    """Pictures of something between 0 and 1. full: the stored value that means 1 (255 of 8 bits, 65535 of 16)."""

    full: float | None = None
    threshold: float | None = None
    void: float | None = None

    def __post_init__(self):
        self.require(self.full is None or self.full > 0, "full", "above 0, or empty")
        self.require(self.threshold is None or 0 <= self.threshold < 1, "threshold", "in [0, 1), or empty")

    def reader(self) -> MaskFile:
        """Of the training label."""
        return MaskFile(self.full, self.threshold, self.void, self.variable)


@dataclass(frozen=True)
class Saliency(Mask):
    """Salient, where the stored value is above `threshold` of what means 1."""

    threshold: float | None = 0.5

    def spec(self, files: tuple[str, ...]) -> LabelSpec:
        return LabelSpec(files, self.reader(), channels=2)


@dataclass(frozen=True)
class Boundaries(Mask):
    """Boundaries: drawn, or with `encoding: regions` those between the regions of a map, or with `encoding: annotators`
    drawn by several people, whose boundaries are the bits of whole numbers.

    agree: the share of the people that makes a boundary to train on; what fewer drew is void. The score asks all.
    max_dist: how far a predicted boundary may lie from a true one in the boundary score, a share of the diagonal.
    """

    encoding: Literal["drawn", "regions", "annotators"] = "drawn"
    agree: float = 0.3
    max_dist: float = 0.0075

    def __post_init__(self):
        super().__post_init__()
        self.require(0 < self.max_dist < 1, "max_dist", "a share of the diagonal, in (0, 1)")
        self.require(0 < self.agree <= 1, "agree", "a share of the people, in (0, 1]")

    def spec(self, files: tuple[str, ...]) -> LabelSpec:
        if self.encoding == "regions":
            read, kind, truth = RegionsFile(self.variable), "regions", TruthFile(None, self.variable)
        elif self.encoding == "annotators":
            read, kind = AnnotatorsFile(self.agree, self.variable), "bsds"
            truth = TruthFile(read)
        else:
            read, kind, truth = self.reader(), "boundary", TruthFile(self.reader(), self.variable)
        return LabelSpec(files, read, boundary=BoundaryTruth(files, truth, kind, self.max_dist))


@dataclass(frozen=True)
class Boxes(LabelKind):
    """Vehicles in space and the camera that sees them: JSON files as those of Cityscapes 3D."""

    def __post_init__(self):
        self.require(self.files.endswith(".json") and not self.variable, "files",
                     "a pattern with {id} that ends in .json, such as boxes/{id}.json, without variable")

    def spec(self, files: tuple[str, ...]) -> LabelSpec:
        return LabelSpec(files, read_boxes, channels=len(VEHICLES), classes=VEHICLES, informs=has_boxes)


LABEL_KINDS: Mapping[str, type[LabelKind]] = {"classes": Classes, "depth": Depth, "normals": Normals,
                                              "saliency": Saliency, "boundaries": Boundaries,
                                              "boxes": Boxes}


def read_names(path: Path) -> list[str]:
    """The lines of a text file that are not empty."""
    if not path.is_file():
        raise FileNotFoundError(f"list of names not found: {path}")
    return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
