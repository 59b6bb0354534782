"""Jointed figures: people whose parts are known by name, and cats and dogs.

A person is a small tree of joints (hips, spine, shoulders, elbows, knees) whose angles come from a few
families of poses; each limb is a tapered cylinder between two joint balls. Front = +z, up = +y, the figure's
left = +x."""

from dataclasses import dataclass

import numpy as np

from scripts.example_data.geometry import rotation_x, rotation_y, rotation_z
from scripts.example_data.labels import PART_NAMES
from scripts.example_data.stage import Paint, Pose, Stage, Thing

SKINS = [(0.96, 0.8, 0.69), (0.87, 0.67, 0.53), (0.7, 0.49, 0.36), (0.45, 0.3, 0.22)]
HAIRS = [(0.12, 0.09, 0.08), (0.35, 0.22, 0.12), (0.78, 0.62, 0.35), (0.5, 0.5, 0.5)]
SHIRTS = [
    (0.85, 0.2, 0.2),
    (0.2, 0.4, 0.8),
    (0.95, 0.95, 0.95),
    (0.15, 0.6, 0.4),
    (0.95, 0.75, 0.2),
    (0.6, 0.3, 0.65),
]
TROUSERS = [(0.2, 0.26, 0.42), (0.25, 0.25, 0.27), (0.55, 0.48, 0.35), (0.35, 0.2, 0.2)]
POSES = ("stand", "walk", "one_arm", "both_arms", "reach")


@dataclass(frozen=True)
class Limb:
    """Angles in radians: swing forward, spread outward, bend of the elbow or knee."""

    swing: float = 0.0
    spread: float = 0.0
    bend: float = 0.0


def posture(kind: str, rng: np.random.Generator) -> dict[str, Limb]:
    """Joint angles of one of POSES or "sit"; keys l/r + arm/leg."""

    def about(swing, spread, bend):
        return Limb(*(np.array([swing, spread, bend]) + rng.uniform(-0.12, 0.12, 3) * (1, 0.6, 1)))

    rest = {side + "arm": about(0.05, 0.18, 0.25) for side in "lr"} | {
        side + "leg": about(0, 0.07, 0.06) for side in "lr"
    }
    side, other = rng.permutation(["l", "r"])
    if kind == "walk":
        return {
            side + "leg": about(0.5, 0.04, 0.15),
            other + "leg": about(-0.4, 0.04, 0.35),
            side + "arm": about(-0.5, 0.12, 0.4),
            other + "arm": about(0.55, 0.12, 0.6),
        }
    if kind == "one_arm":
        return rest | {side + "arm": about(0.0, 2.5, 0.25)}
    if kind == "both_arms":
        return rest | {s + "arm": about(0.1, 2.45, 0.3) for s in "lr"}
    if kind == "reach":
        return rest | {side + "arm": about(1.35, 0.25, 0.2), other + "arm": about(0.2, 0.55, 1.5)}
    if kind == "sit":
        return {s + "leg": about(1.48, 0.16, 1.45) for s in "lr"} | {
            s + "arm": about(0.5, 0.22, 0.9) for s in "lr"
        }
    return rest


def limb(
    thing: Thing, start, end, radii: tuple[float, float], material, part: str, lower: bool = False
) -> None:
    """A tapered cylinder from `start` to `end` (3,) with joint balls; radii in metres at both ends.

    lower: the ball at `start` belongs to the upper limb.
    """
    number = PART_NAMES.index(part) + 1
    along = end - start
    length = np.linalg.norm(along)
    up = along / length
    side = np.cross(up, (0.0, 0.3, 1.0) if abs(up[2]) < 0.9 else (0.0, 1.0, 0.0))
    side /= np.linalg.norm(side)
    axes = np.stack([radii[0] * side, up * length / 2, radii[0] * np.cross(side, up)], axis=1)
    thing.solid("cylinder", (start + end) / 2, axes, material, part=number, taper=radii[1] / radii[0])
    for joint, radius in list(zip((start, end), radii, strict=True))[lower:]:
        thing.ball(joint, (radius,) * 3, material, part=number)


def person(stage: Stage, pose: Pose, kind: str, height: float, paint: Paint) -> None:
    """One figure of `height` metres in pose `kind`; pose.origin is on the floor, or on the seat for "sit"."""
    rng, s = paint.rng, height / 1.75
    joints = posture(kind, rng)
    thing = stage.thing("person", pose)
    skin = paint.make("plain", paint.pick(SKINS), vary=0.03)
    shirt = paint.fabric(SHIRTS, cell=0.08)
    trousers = paint.make("noise", paint.pick(TROUSERS), cell=(0.03, 0.03), vary=0.04)
    shoes = paint.make("plain", paint.pick([(0.1, 0.1, 0.1), (0.9, 0.9, 0.9), (0.45, 0.25, 0.15)]))
    sleeve = shirt if rng.random() < 0.5 else skin
    trunk = rotation_x(rng.uniform(0.0, 0.12)) @ rotation_y(rng.uniform(-0.15, 0.15))

    legs = {side: _leg(joints[side + "leg"], 1 if side == "l" else -1, s) for side in "lr"}
    lowest = min(points[2][1] for points in legs.values()) - 0.085 * s
    hips = np.array([0.0, 0.1 * s if kind == "sit" else -lowest, 0.0])
    for side, points in legs.items():
        _draw_leg(thing, side, [hips + p for p in points], s, trousers, shoes)
    _trunk(thing, hips, trunk, s, (shirt, trousers, skin))
    for side in "lr":
        _arm(thing, side, joints[side + "arm"], hips, trunk, s, (shirt, sleeve, skin))
    _head(thing, hips, trunk @ rotation_y(rng.uniform(-0.5, 0.5)), s, skin, paint)


def _leg(angles: Limb, sign: int, s: float) -> list[np.ndarray]:
    """Hip, knee, ankle and toe relative to the middle of the hips, each (3,)."""
    thigh = rotation_z(sign * angles.spread) @ rotation_x(-angles.swing)
    shin = thigh @ rotation_x(angles.bend)
    hip = np.array([sign * 0.09 * s, -0.02 * s, 0.0])
    knee = hip + thigh @ np.array([0, -0.43 * s, 0])
    ankle = knee + shin @ np.array([0, -0.42 * s, 0])
    return [hip, knee, ankle, ankle + rotation_y(sign * 0.2) @ np.array([0, -0.04 * s, 0.11 * s])]


def _draw_leg(thing: Thing, side: str, points: list[np.ndarray], s: float, trousers, shoes) -> None:
    hip, knee, ankle, toe = points
    limb(thing, hip, knee, (0.088 * s, 0.062 * s), trousers, side + "uleg")
    limb(thing, knee, ankle, (0.06 * s, 0.043 * s), trousers, side + "lleg", lower=True)
    foot = PART_NAMES.index(side + "foot") + 1
    thing.ball(
        0.45 * ankle + 0.55 * toe + np.array([0, -0.022 * s, 0]),
        (0.048 * s, 0.045 * s, 0.125 * s),
        shoes,
        part=foot,
    )


def _trunk(thing: Thing, hips, turn, s: float, materials) -> None:
    shirt, trousers, skin = materials
    torso, neck = PART_NAMES.index("torso") + 1, PART_NAMES.index("neck") + 1
    thing.ball(hips, (0.165 * s, 0.12 * s, 0.115 * s), trousers, part=torso)
    axes = turn @ np.diag([0.145, 0.2, 0.1]) * s
    thing.solid("cylinder", hips + turn @ np.array([0, 0.24 * s, 0]), axes, shirt, part=torso, taper=1.25)
    thing.ball(
        hips + turn @ np.array([0, 0.43 * s, 0]), np.array([0.19, 0.115, 0.125]) * s, shirt, turn, torso
    )
    thing.ball(hips + turn @ np.array([0, 0.54 * s, 0]), np.array([0.05, 0.09, 0.052]) * s, skin, turn, neck)


def _arm(thing: Thing, side: str, angles: Limb, hips, trunk, s: float, materials) -> None:
    upper, lower, skin = materials
    sign = 1 if side == "l" else -1
    turn = trunk @ rotation_z(sign * angles.spread) @ rotation_x(-angles.swing)
    fold = turn @ rotation_x(-angles.bend)
    shoulder = hips + trunk @ np.array([sign * 0.195 * s, 0.455 * s, 0])
    elbow = shoulder + turn @ np.array([0, -0.27 * s, 0])
    wrist = elbow + fold @ np.array([0, -0.24 * s, 0])
    limb(thing, shoulder, elbow, (0.058 * s, 0.044 * s), upper, side + "uarm")
    limb(thing, elbow, wrist, (0.042 * s, 0.031 * s), lower, side + "larm", lower=True)
    hand = PART_NAMES.index(side + "hand") + 1
    thing.ball(
        wrist + fold @ np.array([0, -0.06 * s, 0]), np.array([0.032, 0.075, 0.042]) * s, skin, fold, hand
    )


def _head(thing: Thing, hips, turn, s: float, skin, paint: Paint) -> None:
    head, hair = PART_NAMES.index("head") + 1, PART_NAMES.index("hair") + 1
    middle = hips + np.array([0, 0.7 * s, 0.015 * s])
    thing.ball(middle, np.array([0.085, 0.115, 0.1]) * s, skin, turn, head)
    thing.ball(
        middle + turn @ np.array([0, -0.015, 0.1]) * s, np.array([0.016, 0.025, 0.02]) * s, skin, turn, head
    )
    eye = paint.make("plain", (0.08, 0.07, 0.07), vary=0.02)
    for x in (-0.034, 0.034):
        thing.ball(middle + turn @ np.array([x, 0.018, 0.087]) * s, (0.012 * s,) * 3, eye, turn, head)
    colour = paint.make("noise", paint.pick(HAIRS), cell=(0.02, 0.05), vary=0.03)
    short = (0.04, -0.012), (0.092, 0.1, 0.098)  # middle (y, z) and radii; the hairline is above the eyes
    long = (0.0, -0.018), (0.094, 0.135, 0.098)
    (y, z), radii = short if paint.rng.random() < 0.6 else long
    thing.ball(
        middle + turn @ np.array([0, y, z]) * s,
        np.array(radii) * s,
        colour,
        turn,
        hair,
    )


def pet(stage: Stage, pose: Pose, kind: str, paint: Paint) -> None:
    """A standing cat or dog; pose.origin on the floor under its middle."""
    thing, size = stage.thing(kind, pose), {"cat": 0.62, "dog": 1.0}[kind]
    tones = {"cat": [(0.85, 0.55, 0.25), (0.3, 0.3, 0.32)], "dog": [(0.65, 0.45, 0.25), (0.9, 0.85, 0.75)]}[
        kind
    ]
    tone = paint.pick(tones)
    fur = paint.make("stripes" if kind == "cat" else "noise", tone, 0.75 * tone, (0.07, 0.07), 0.04)
    dark = paint.make("plain", (0.1, 0.08, 0.08), vary=0.02)
    thing.ball((0, 0.36 * size, 0), (0.12 * size, 0.13 * size, 0.3 * size), fur)
    thing.ball((0, 0.42 * size, 0.2 * size), (0.11 * size, 0.14 * size, 0.13 * size), fur)
    for x in (-0.07 * size, 0.07 * size):
        for z in (-0.2 * size, 0.2 * size):
            thing.post((x, 0.15 * size, z), 0.035 * size, 0.3 * size, fur)
        thing.ball((x, 0.72 * size, 0.3 * size), (0.03 * size, 0.07 * size, 0.025 * size), fur)
        thing.ball((0.6 * x, 0.64 * size, 0.42 * size), (0.015 * size,) * 3, dark)
    thing.ball((0, 0.6 * size, 0.33 * size), (0.1 * size, 0.1 * size, 0.11 * size), fur)
    thing.ball(
        (0, 0.56 * size, 0.45 * size),
        (0.05 * size, 0.045 * size, (0.1 if kind == "dog" else 0.04) * size),
        fur,
    )
    thing.ball((0, 0.58 * size, (0.54 if kind == "dog" else 0.49) * size), (0.02 * size,) * 3, dark)
    tail = rotation_x(-0.7)
    thing.ball((0, 0.5 * size, -0.38 * size), (0.03 * size, 0.03 * size, 0.2 * size), fur, tail)
