"""The small vocabulary in which furniture and people are written: a stage, things on it, poses and paints."""

from dataclasses import dataclass, field

import numpy as np

from scripts.example_data.geometry import Solid, rotation_y
from scripts.example_data.texture import Material

UPRIGHT = np.eye(3)


@dataclass(frozen=True)
class Pose:
    """Where a thing stands: origin (3,) in metres, rotation (3, 3) from its own frame (front = +z, up =
    +y)."""

    origin: np.ndarray
    rotation: np.ndarray = field(default_factory=lambda: UPRIGHT)

    @classmethod
    def on_floor(cls, x: float, z: float, yaw: float = 0.0) -> "Pose":
        """Standing on the floor, turned by `yaw` radians (z towards x)."""
        return cls(np.array([x, 0.0, z]), rotation_y(yaw))

    def at(self, x: float, y: float, z: float, yaw: float = 0.0) -> "Pose":
        """A pose given relative to this one."""
        return Pose(self.origin + self.rotation @ np.array([x, y, z]), self.rotation @ rotation_y(yaw))


@dataclass
class Stage:
    """Everything in a scene: solids, the label name of every instance, free seats (origin on the seat, front
    = the way a sitter looks)."""

    solids: list[Solid] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    seats: list[Pose] = field(default_factory=list)

    def thing(self, name: str, pose: Pose) -> "Thing":
        """Start a new instance of label `name`."""
        self.names.append(name)
        return Thing(self, len(self.names) - 1, pose)


@dataclass(frozen=True)
class Thing:
    """Adds solids to one instance. Sizes and positions are metres in the thing's own frame."""

    stage: Stage
    instance: int
    pose: Pose

    def box(self, centre, size, material: Material, casts_shadow: bool = True) -> None:
        """A box with full edge lengths `size` (x, y, z)."""
        self.solid("box", centre, np.diag(size) / 2, material, casts_shadow=casts_shadow)

    def ball(self, centre, radii, material: Material, turn: np.ndarray = UPRIGHT, part: int = 0) -> None:
        """An ellipsoid with radii (x, y, z), turned by `turn` (3, 3)."""
        self.solid("ellipsoid", centre, turn @ np.diag(radii), material, part=part)

    def post(
        self,
        centre,
        radius: float,
        height: float,
        material: Material,
        taper: float = 1.0,
        casts_shadow: bool = True,
    ) -> None:
        """An upright cylinder; top radius = taper * radius."""
        self.solid(
            "cylinder",
            centre,
            np.diag([radius, height / 2, radius]),
            material,
            taper=taper,
            casts_shadow=casts_shadow,
        )

    def solid(self, kind: str, centre, axes: np.ndarray, material: Material, **options) -> None:
        """Any solid; `axes` (3, 3) holds its half axes in columns."""
        centre = self.pose.origin + self.pose.rotation @ np.asarray(centre, np.float64)
        axes = self.pose.rotation @ axes
        self.stage.solids.append(Solid(kind, centre, axes, material, self.instance, **options))


class Paint:
    """Materials with colours drawn at random around those that are usual for their use."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng

    def make(self, kind: str, first, second=None, cell=(0.1, 0.1), vary: float = 0.06, **options) -> Material:
        """A material from sRGB colours 0..1, each moved at random by up to `vary`."""
        rng = self.rng
        first = np.clip(np.asarray(first) + rng.uniform(-vary, vary, 3), 0.02, 0.97)
        second = 0.75 * first if second is None else np.clip(second + rng.uniform(-vary, vary, 3), 0.02, 0.97)
        shift = options.pop("shift", tuple(rng.uniform(0, 40, 2)))
        return Material(
            kind, (first**2.2).astype(np.float32), (second**2.2).astype(np.float32), cell, shift, **options
        )

    def pick(self, colours) -> np.ndarray:
        """One of several sRGB colours."""
        return np.asarray(colours[self.rng.integers(len(colours))], np.float64)

    def wood(self, tone=None) -> Material:
        """Grained wood."""
        tone = self.pick([(0.72, 0.5, 0.3), (0.58, 0.37, 0.2), (0.8, 0.62, 0.42)]) if tone is None else tone
        return self.make("wood", tone, 0.68 * np.asarray(tone), (0.5, 0.25), 0.03, gloss=0.12)

    def fabric(self, colours, pattern: str | None = None, cell: float = 0.12) -> Material:
        """Cloth in one of `colours`; plain, striped or checked."""
        pattern = pattern or self.rng.choice(["plain", "plain", "stripes", "checks"])
        first = self.pick(colours)
        second = 0.6 * first + 0.4 * self.pick([(0.95, 0.93, 0.88), (0.25, 0.25, 0.3)])
        return self.make(pattern, first, second, (cell, cell), 0.04)

    def metal(self) -> Material:
        """Grey with a highlight."""
        return self.make("plain", (0.55, 0.56, 0.58), vary=0.03, gloss=0.5)
