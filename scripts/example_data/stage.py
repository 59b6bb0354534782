"""The small vocabulary in which furniture and people are written: a stage, things on it, poses and materials."""

from itertools import product
from typing import NamedTuple

import numpy as np

from scripts.example_data.geometry import Solid, rotation
from scripts.example_data.labels import PART_NAMES
from scripts.example_data.texture import Material

UPRIGHT = np.eye(3)


class Pose(NamedTuple):
    """Where a thing stands: origin (3,) in metres, rotation (3, 3) from its own frame (front = +z, up = +y)."""

    origin: np.ndarray
    rotation: np.ndarray

    def at(self, x: float, y: float, z: float, yaw: float = 0.0) -> "Pose":
        """A pose given relative to this one; yaw in radians, z towards x."""
        return Pose(self.origin + self.rotation @ np.array([x, y, z]), self.rotation @ rotation("y", yaw))


WORLD = Pose(np.zeros(3), UPRIGHT)


class Stage:
    """Everything in a scene, and the materials of which it is made: colours drawn at random around the usual ones.

    solids; names: label name of every instance; seats: free ones, origin on the seat, front = the way a sitter looks.
    """

    def __init__(self, rng: np.random.Generator):
        self.rng = rng
        self.solids: list[Solid] = []
        self.names: list[str] = []
        self.seats: list[Pose] = []

    def thing(self, name: str, pose: Pose) -> "Thing":
        """Start a new instance of label `name`."""
        self.names.append(name)
        return Thing(self, len(self.names) - 1, pose)

    def pick(self, colours) -> np.ndarray:
        """One of several sRGB colours, (3,)."""
        return np.asarray(colours[self.rng.integers(len(colours))], np.float64)

    def material(self, kind: str, first, second=None, cell=(0.1, 0.1), vary: float = 0.06, **options) -> Material:
        """A material from sRGB colours 0..1, each moved at random by up to `vary`."""
        rng = self.rng
        first = np.clip(np.asarray(first) + rng.uniform(-vary, vary, 3), 0.02, 0.97)
        second = 0.75 * first if second is None else np.clip(second + rng.uniform(-vary, vary, 3), 0.02, 0.97)
        shift = options.pop("shift", tuple(rng.uniform(0, 40, 2)))
        first, second = ((colour**2.2).astype(np.float32) for colour in (first, second))
        return Material(kind, first, second, cell, shift, **options)

    def plain(self, colour, **options) -> Material:
        """One colour all over."""
        return self.material("plain", colour, **options)

    def wood(self, tone=None) -> Material:
        """Grained wood."""
        tone = self.pick([(0.72, 0.5, 0.3), (0.58, 0.37, 0.2), (0.8, 0.62, 0.42)]) if tone is None else tone
        return self.material("wood", tone, 0.68 * np.asarray(tone), (0.5, 0.25), 0.03, gloss=0.12)

    def fabric(self, colours, pattern: str | None = None, cell: float = 0.12) -> Material:
        """Cloth in one of `colours`; plain, striped or checked."""
        pattern = pattern or self.rng.choice(["plain", "plain", "stripes", "checks"])
        first = self.pick(colours)
        second = 0.6 * first + 0.4 * self.pick([(0.95, 0.93, 0.88), (0.25, 0.25, 0.3)])
        return self.material(pattern, first, second, (cell, cell), 0.04)

    def metal(self) -> Material:
        """Grey with a highlight."""
        return self.plain((0.55, 0.56, 0.58), vary=0.03, gloss=0.5)


class Thing(NamedTuple):
    """Adds solids to one instance. Sizes and positions are metres in the thing's own frame; where a coordinate of a
    centre is a tuple or list, there is one solid at each of its values.
    """

    stage: Stage
    instance: int
    pose: Pose

    def box(self, centre, size, material: Material, **options) -> None:
        """A box with full edge lengths `size` (x, y, z)."""
        self.solid("box", centre, np.diag(size) / 2, material, **options)

    def ball(self, centre, radii, material: Material, turn: np.ndarray = UPRIGHT, **options) -> None:
        """An ellipsoid with radii (x, y, z), turned by `turn` (3, 3)."""
        self.solid("ellipsoid", centre, turn @ np.diag(radii), material, **options)

    def post(self, centre, radius: float, height: float, material: Material, **options) -> None:
        """An upright cylinder; radius: that of its foot, where it has a `taper`."""
        self.solid("cylinder", centre, np.diag([radius, height / 2, radius]), material, **options)

    def solid(self, kind: str, centre, axes: np.ndarray, material: Material, part: str = "", **options) -> None:
        """Any solid; `axes` (3, 3) holds its half axes in columns, `part` is one of labels.PART_NAMES, or none.

        Options are those of `Solid`: taper, casts_shadow.
        """
        number = PART_NAMES.index(part) + 1 if part else 0
        for place in product(*(c if isinstance(c, (tuple, list)) else [c] for c in centre)):
            middle = self.pose.at(*place).origin
            turned = self.pose.rotation @ axes
            self.stage.solids.append(Solid(kind, middle, turned, material, self.instance, number, **options))
