"""Small things that stand on furniture, or lie on it: bottles, lamps, plants, screens, cushions.

Every function puts one thing at a pose whose origin is the middle of the thing's foot, +z to the front.
"""

import numpy as np

from scripts.example_data.stage import UPRIGHT, Pose, Stage

WHITE, CREAM, DARK = (0.92, 0.91, 0.89), (0.87, 0.82, 0.72), (0.13, 0.13, 0.15)
LEAF_GREENS = [(0.2, 0.45, 0.16), (0.3, 0.52, 0.2), (0.16, 0.38, 0.22)]
SHOWS = [((0.95, 0.6, 0.35), (0.3, 0.3, 0.65)), ((0.75, 0.9, 0.95), (0.2, 0.5, 0.85)), (DARK, (0.1, 0.11, 0.14))]


def on_top(stage: Stage, pose: Pose) -> None:
    """A small thing for a table top: bottle, plant, lamp, vase, books or a box."""
    kind = stage.rng.choice(["bottle", "bottle", "bottle", "plant", "lamp", "vase", "books", "box"])
    if kind == "bottle":
        bottle(stage, pose)
        if stage.rng.random() < 0.4:
            bottle(stage, pose.at(0.12, 0, 0.05))
    elif kind == "plant":
        plant(stage, pose, 0.2, 0.2, stage.rng.uniform(0.32, 0.45))
    elif kind == "lamp":
        table_lamp(stage, pose)
    elif kind == "vase":
        clay = stage.material("stripes", (0.8, 0.75, 0.65), (0.3, 0.45, 0.6), (9.0, 0.1), gloss=0.4)
        thing = stage.thing("vase", pose)
        thing.ball((0, 0.11, 0), (0.08, 0.11, 0.08), clay)
        thing.post((0, 0.22, 0), 0.035, 0.08, clay, taper=1.5)
    elif kind == "books":
        thing = stage.thing("books", pose)
        for i in range(3):
            cover = stage.plain(stage.pick([(0.6, 0.2, 0.2), (0.2, 0.3, 0.5), (0.75, 0.65, 0.3)]))
            thing.box((0.01 * i, 0.018 + 0.036 * i, 0), (0.24 - 0.02 * i, 0.034, 0.17), cover)
    else:
        carton(stage, pose, 0.2)


def bottle(stage: Stage, pose: Pose) -> None:
    """Body, a label band round it, shoulder, neck, cap."""
    thing = stage.thing("bottle", pose)
    tone = stage.pick([(0.1, 0.42, 0.2), (0.45, 0.2, 0.08), (0.15, 0.4, 0.62)])
    glass, band = stage.plain(tone, gloss=0.8), stage.plain(WHITE)
    scale = stage.rng.uniform(1.0, 1.35)
    for y, radius, tall, taper, material in (
        (0.095, 0.042, 0.19, 1.0, glass),
        (0.1, 0.0425, 0.08, 1.0, band),
        (0.215, 0.042, 0.05, 0.36, glass),
        (0.27, 0.015, 0.06, 1.0, glass),
        (0.305, 0.018, 0.02, 1.0, band),
    ):
        thing.post((0, scale * y, 0), scale * radius, scale * tall, material, taper=taper)


def carton(stage: Stage, pose: Pose, edge: float) -> None:
    """A cardboard box with tape."""
    thing, middle, high = stage.thing("box", pose), (0, 0.4 * edge, 0), 0.8 * edge
    thing.box(middle, (edge, high, high), stage.plain((0.74, 0.58, 0.38), vary=0.04))
    thing.box(middle, (0.16 * edge, high + 0.006, high + 0.006), stage.plain(CREAM))


def table_lamp(stage: Stage, pose: Pose) -> None:
    """A round foot and a glowing shade."""
    thing = stage.thing("lamp", pose)
    foot = stage.plain(stage.pick([(0.75, 0.35, 0.25), (0.3, 0.5, 0.55), (0.85, 0.8, 0.7)]), gloss=0.4)
    thing.ball((0, 0.09, 0), (0.075, 0.09, 0.075), foot)
    thing.post((0, 0.2, 0), 0.012, 0.1, foot)
    thing.post((0, 0.31, 0), 0.13, 0.18, stage.plain((0.97, 0.88, 0.64), vary=0.03, glow=0.55), taper=0.6)


def plant(stage: Stage, pose: Pose, width: float, depth: float, height: float) -> None:
    """A pot, a stem and a crown of leaves; all their sizes come from the height."""
    rng = stage.rng
    thing, green = stage.thing("plant", pose), stage.pick(LEAF_GREENS)
    pot = stage.plain(stage.pick([(0.72, 0.38, 0.24), (0.88, 0.86, 0.82)]), gloss=0.15)
    pot_height, radius = 0.28 * height, 0.15 * height
    thing.post((0, pot_height / 2, 0), 0.7 * radius, pot_height, pot, taper=1.4)
    thing.post((0, 0.5 * height, 0), 0.02, 0.5 * height, stage.wood((0.4, 0.3, 0.2)))
    for i in range(9):
        angle, rise = 2.4 * i + rng.uniform(-0.3, 0.3), (0.45 + 0.055 * i) * height
        reach = (0.34 - 0.025 * i) * 0.75 * height * rng.uniform(0.7, 1.0)
        leaf = stage.material("leaves", green, 0.5 * green, (0.16, 0.16), 0.05)
        c, s = np.cos(angle), np.sin(angle)
        lift = np.array([[c, 0, s], [0.5, 1, 0], [-s, 0, c]])
        thing.ball((reach * c * 0.8, rise, -reach * s * 0.8), (0.2 * height, 0.05 * height, 0.09 * height), leaf, lift)


def pillow(stage: Stage, pose: Pose, half_width: float, flat: bool = False) -> None:
    """One cushion, lying or leaning back."""
    cloth = stage.fabric([(0.93, 0.92, 0.9), (0.85, 0.45, 0.35), (0.9, 0.8, 0.5), (0.4, 0.55, 0.65)], cell=0.09)
    lean = np.array([[1, 0, 0], [0, 1, 0.35], [0, -0.35, 1]])
    radii = (half_width, 0.08, 0.19) if flat else (half_width, 0.19, 0.08)
    stage.thing("pillow", pose).ball((0, 0, 0), radii, cloth, UPRIGHT if flat else lean)


def television(stage: Stage, pose: Pose, width: float, height: float) -> None:
    """A flat screen on a foot."""
    thing, frame = stage.thing("tv", pose), stage.plain(DARK, vary=0.03, gloss=0.3)
    thing.box((0, 0.01, 0), (0.4 * width, 0.02, 0.2), frame)
    thing.box((0, 0.06, 0), (0.06, 0.12, 0.04), frame)
    thing.box((0, 0.08 + height / 2, 0), (width, height, 0.05), frame)
    show = SHOWS[stage.rng.integers(3)]
    screen = stage.material("screen", *show, (width, height), 0.04, shift=(0.0, 0.0), glow=0.5, gloss=0.2)
    thing.box((0, 0.08 + height / 2, 0.005), (width - 0.05, height - 0.05, 0.05), screen)
