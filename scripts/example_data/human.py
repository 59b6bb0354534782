"""Jointed figures: people whose parts are known by name, and cats and dogs.

A person is a small tree of joints (hips, spine, shoulders, elbows, knees) whose angles come from a few families of
poses; each limb is a tapered cylinder between two joint balls. Front = +z, up = +y, the figure's left = +x.
"""

from typing import NamedTuple

import numpy as np

from scripts.example_data.geometry import rotation
from scripts.example_data.stage import UPRIGHT, Pose, Stage, Thing
from scripts.example_data.texture import Material

SKINS = [(0.96, 0.8, 0.69), (0.87, 0.67, 0.53), (0.7, 0.49, 0.36), (0.45, 0.3, 0.22)]
HAIRS = [(0.12, 0.09, 0.08), (0.35, 0.22, 0.12), (0.78, 0.62, 0.35), (0.5, 0.5, 0.5)]
SHIRTS = [(0.85, 0.2, 0.2), (0.2, 0.4, 0.8), (0.95, 0.95, 0.95), (0.15, 0.6, 0.4), (0.95, 0.75, 0.2), (0.6, 0.3, 0.65)]
TROUSERS = [(0.2, 0.26, 0.42), (0.25, 0.25, 0.27), (0.55, 0.48, 0.35), (0.35, 0.2, 0.2)]
SHOES = [(0.1, 0.1, 0.1), (0.9, 0.9, 0.9), (0.45, 0.25, 0.15)]
SIGN = {"l": 1, "r": -1}    # side of the figure -> direction of x

# Angles of arms and legs, in radians: swing forward, spread outward, bend of the elbow or knee. l and r are the
# figure's left and right; 1 and 2 are one of them and the other, at random.
REST = {"larm": (0.05, 0.18, 0.25), "rarm": (0.05, 0.18, 0.25), "lleg": (0, 0.07, 0.06), "rleg": (0, 0.07, 0.06)}
POSTURES = {
    "stand": {},
    "walk": {"1leg": (0.5, 0.04, 0.15), "2leg": (-0.4, 0.04, 0.35),
             "1arm": (-0.5, 0.12, 0.4), "2arm": (0.55, 0.12, 0.6)},
    "one_arm": {"1arm": (0.0, 2.5, 0.25)},
    "both_arms": {"larm": (0.1, 2.45, 0.3), "rarm": (0.1, 2.45, 0.3)},
    "reach": {"1arm": (1.35, 0.25, 0.2), "2arm": (0.2, 0.55, 1.5)},
    "sit": {"lleg": (1.48, 0.16, 1.45), "rleg": (1.48, 0.16, 1.45), "larm": (0.5, 0.22, 0.9), "rarm": (0.5, 0.22, 0.9)},
}


def posture(kind: str, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Angles (3,) of l/r + arm/leg in one of POSTURES, each a little different every time."""

    def varied(angles: dict) -> dict:
        return {limb: np.array(usual) + rng.uniform(-0.12, 0.12, 3) * (1, 0.6, 1) for limb, usual in angles.items()}

    rest = varied(REST)
    sides = dict(zip("12", rng.permutation(["l", "r"]), strict=True))
    return rest | {sides.get(limb[0], limb[0]) + limb[1:]: angles for limb, angles in varied(POSTURES[kind]).items()}


def person(stage: Stage, pose: Pose, kind: str, height: float) -> None:
    """One figure of `height` metres, `kind` of POSTURES; pose.origin is on the floor, or on the seat for "sit"."""
    rng = stage.rng
    joints = posture(kind, rng)
    figure = Figure(stage.thing("person", pose), height / 1.75)
    skin = stage.plain(stage.pick(SKINS), vary=0.03)
    shirt = stage.fabric(SHIRTS, cell=0.08)
    trousers = stage.material("noise", stage.pick(TROUSERS), cell=(0.03, 0.03), vary=0.04)
    shoes = stage.plain(stage.pick(SHOES))
    sleeve = shirt if rng.random() < 0.5 else skin
    trunk = rotation("x", rng.uniform(0.0, 0.12)) @ rotation("y", rng.uniform(-0.15, 0.15))

    legs = {side: figure.leg_points(joints[side + "leg"], SIGN[side]) for side in "lr"}
    lowest = min(ankle[1] for _, _, ankle, _ in legs.values()) - 0.085 * figure.scale
    hips = np.array([0.0, 0.1 * figure.scale if kind == "sit" else -lowest, 0.0])
    for side, points in legs.items():
        figure.draw_leg(side, [hips + point for point in points], trousers, shoes)
    figure.draw_trunk(hips, trunk, shirt, trousers, skin)
    for side in "lr":
        figure.draw_arm(side, joints[side + "arm"], hips, trunk, shirt, sleeve, skin)
    figure.draw_head(hips, trunk @ rotation("y", rng.uniform(-0.5, 0.5)), skin)


class Figure(NamedTuple):
    """A person under construction. Lengths are given for a height of 1.75 m and multiplied by `scale`."""

    thing: Thing
    scale: float

    def point(self, start: np.ndarray | float, turn: np.ndarray, x: float, y: float, z: float) -> np.ndarray:
        """`start` (3,) in metres, and from there (x, y, z) along the axes of `turn` (3, 3)."""
        return start + turn @ (np.array([x, y, z]) * self.scale)

    def ball(self, centre: np.ndarray, radii, material: Material, part: str, turn: np.ndarray = UPRIGHT) -> None:
        """An ellipsoid; centre (3,) in metres."""
        self.thing.ball(centre, np.array(radii) * self.scale, material, turn, part=part)

    def limb(self, start, end, radii: tuple[float, float], material: Material, part: str, lower: bool = False) -> None:
        """A tapered cylinder from `start` to `end` with joint balls; a `lower` limb leaves the first to the upper."""
        foot, top = (radius * self.scale for radius in radii)
        along = end - start
        length = np.linalg.norm(along)
        up = along / length
        side = np.cross(up, (0.0, 0.3, 1.0) if abs(up[2]) < 0.9 else (0.0, 1.0, 0.0))
        side /= np.linalg.norm(side)
        axes = np.stack([foot * side, up * length / 2, foot * np.cross(side, up)], axis=1)
        self.thing.solid("cylinder", (start + end) / 2, axes, material, part, taper=top / foot)
        if not lower:
            self.thing.ball(start, (foot,) * 3, material, part=part)
        self.thing.ball(end, (top,) * 3, material, part=part)

    def leg_points(self, angles: np.ndarray, sign: int) -> list[np.ndarray]:
        """Hip, knee, ankle and toe relative to the middle of the hips, each (3,)."""
        swing, spread, bend = angles
        thigh = rotation("z", sign * spread) @ rotation("x", -swing)
        shin = thigh @ rotation("x", bend)
        hip = self.point(0, UPRIGHT, sign * 0.09, -0.02, 0)
        knee = self.point(hip, thigh, 0, -0.43, 0)
        ankle = self.point(knee, shin, 0, -0.42, 0)
        return [hip, knee, ankle, self.point(ankle, rotation("y", sign * 0.2), 0, -0.04, 0.11)]

    def draw_leg(self, side: str, points: list[np.ndarray], trousers: Material, shoes: Material) -> None:
        """The leg through the `points` of leg_points, with its foot."""
        hip, knee, ankle, toe = points
        self.limb(hip, knee, (0.088, 0.062), trousers, side + "uleg")
        self.limb(knee, ankle, (0.06, 0.043), trousers, side + "lleg", lower=True)
        middle = self.point(0.45 * ankle + 0.55 * toe, UPRIGHT, 0, -0.022, 0)
        self.ball(middle, (0.048, 0.045, 0.125), shoes, side + "foot")

    def draw_trunk(self, hips, turn, shirt: Material, trousers: Material, skin: Material) -> None:
        """Hips, chest, shoulders and neck."""
        self.ball(hips, (0.165, 0.12, 0.115), trousers, "torso")
        axes = turn @ np.diag([0.145, 0.2, 0.1]) * self.scale
        self.thing.solid("cylinder", self.point(hips, turn, 0, 0.24, 0), axes, shirt, "torso", taper=1.25)
        self.ball(self.point(hips, turn, 0, 0.43, 0), (0.19, 0.115, 0.125), shirt, "torso", turn)
        self.ball(self.point(hips, turn, 0, 0.54, 0), (0.05, 0.09, 0.052), skin, "neck", turn)

    def draw_arm(self, side: str, angles, hips, trunk, upper: Material, lower: Material, skin: Material) -> None:
        """Upper and lower arm and the hand."""
        sign, (swing, spread, bend) = SIGN[side], angles
        turn = trunk @ rotation("z", sign * spread) @ rotation("x", -swing)
        fold = turn @ rotation("x", -bend)
        shoulder = self.point(hips, trunk, sign * 0.195, 0.455, 0)
        elbow = self.point(shoulder, turn, 0, -0.27, 0)
        wrist = self.point(elbow, fold, 0, -0.24, 0)
        self.limb(shoulder, elbow, (0.058, 0.044), upper, side + "uarm")
        self.limb(elbow, wrist, (0.042, 0.031), lower, side + "larm", lower=True)
        self.ball(self.point(wrist, fold, 0, -0.06, 0), (0.032, 0.075, 0.042), skin, side + "hand", fold)

    def draw_head(self, hips, turn, skin: Material) -> None:
        """Head, nose, eyes and hair."""
        stage = self.thing.stage
        middle = self.point(hips, UPRIGHT, 0, 0.7, 0.015)

        def ball(centre, radii, material: Material, part: str = "head") -> None:
            self.ball(middle + turn @ np.array(centre) * self.scale, radii, material, part, turn)

        ball((0, 0, 0), (0.085, 0.115, 0.1), skin)
        ball((0, -0.015, 0.1), (0.016, 0.025, 0.02), skin)
        eye = stage.plain((0.08, 0.07, 0.07), vary=0.02)
        for x in (-0.034, 0.034):
            ball((x, 0.018, 0.087), (0.012,) * 3, eye)
        hair = stage.material("noise", stage.pick(HAIRS), cell=(0.02, 0.05), vary=0.03)
        if stage.rng.random() < 0.6:
            ball((0, 0.04, -0.012), (0.092, 0.1, 0.098), hair, "hair")     # short: the hairline is above the eyes
        else:
            ball((0, 0.0, -0.018), (0.094, 0.135, 0.098), hair, "hair")


PETS = {    # size, colours and pattern of the fur, half the length of the snout, z of the nose
    "cat": (0.62, [(0.85, 0.55, 0.25), (0.3, 0.3, 0.32)], "stripes", 0.04, 0.49),
    "dog": (1.0, [(0.65, 0.45, 0.25), (0.9, 0.85, 0.75)], "noise", 0.1, 0.54),
}


def pet(stage: Stage, pose: Pose, name: str) -> None:
    """A standing cat or dog; pose.origin on the floor under its middle."""
    thing, (size, tones, pattern, snout, nose) = stage.thing(name, pose), PETS[name]
    tone = stage.pick(tones)
    fur = stage.material(pattern, tone, 0.75 * tone, (0.07, 0.07), 0.04)
    dark = stage.plain((0.1, 0.08, 0.08), vary=0.02)

    def ball(centre, radii, material: Material = fur, turn: np.ndarray = UPRIGHT) -> None:
        thing.ball(np.array(centre) * size, np.array(radii) * size, material, turn)

    ball((0, 0.36, 0), (0.12, 0.13, 0.3))                       # body
    ball((0, 0.42, 0.2), (0.11, 0.14, 0.13))                    # chest
    for x in (-0.07, 0.07):
        for z in (-0.2, 0.2):
            thing.post(np.array((x, 0.15, z)) * size, 0.035 * size, 0.3 * size, fur)
        ball((x, 0.72, 0.3), (0.03, 0.07, 0.025))               # ear
        ball((0.6 * x, 0.64, 0.42), (0.015,) * 3, dark)         # eye
    ball((0, 0.6, 0.33), (0.1, 0.1, 0.11))                      # head
    ball((0, 0.56, 0.45), (0.05, 0.045, snout))
    ball((0, 0.58, nose), (0.02,) * 3, dark)
    ball((0, 0.5, -0.38), (0.03, 0.03, 0.2), fur, rotation("x", -0.7))      # tail
