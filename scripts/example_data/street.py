"""A street from a seed: road, pavements, houses, trees, cars, people, posts and signs under a sky.

World frame as in `scene`: y up, the camera near z = 0 looks towards -z, along the street. The sun is a lamp so far away
that its light is nearly parallel and hardly weaker at one end of the street than at the other.
"""

import numpy as np

from scripts.example_data import human
from scripts.example_data.geometry import rotation
from scripts.example_data.scene import Scene
from scripts.example_data.stage import WORLD, Pose, Stage
from scripts.example_data.vehicles import Vehicle

LENGTH = 130.0       # metres of street, then the sky
KERB = 0.14          # height of a pavement
FACADES = [(0.78, 0.7, 0.6), (0.7, 0.42, 0.34), (0.83, 0.8, 0.74), (0.58, 0.6, 0.62), (0.8, 0.66, 0.44)]
PAINTS = [(0.75, 0.1, 0.1), (0.15, 0.25, 0.55), (0.85, 0.85, 0.86), (0.12, 0.12, 0.13), (0.5, 0.53, 0.55)]
CAR_SIZE = (4.23, 1.82, 1.2)                           # length, width, height in metres, with lights and wheels
SIGNS = [(0.8, 0.1, 0.1), (0.1, 0.25, 0.65), (0.9, 0.75, 0.1)]
# Names of things -> ids of Cityscapes' label files.
STREET_IDS = {"road": 7, "sidewalk": 8, "building": 11, "fence": 13, "pole": 17, "light": 19, "sign": 20, "tree": 21,
              "lawn": 22, "sky": 23, "person": 24, "car": 26}


class Street(Stage):
    """An empty street and its camera."""

    width = depth = height = 800.0                         # metres to where a room would have walls and a ceiling

    def __init__(self, rng: np.random.Generator):
        super().__init__(rng)
        self.half, self.pavement = rng.uniform(3.4, 5.2), rng.uniform(2.2, 3.6)       # metres, of one side
        self.vehicles: list[Vehicle] = []
        self.eye = np.array([rng.uniform(0.1, 0.5) * self.half, rng.uniform(1.25, 1.6), 0.0])
        self.to_world = rotation("y", rng.uniform(-0.07, 0.07)) @ rotation("x", rng.uniform(-0.07, -0.01))


def build_street(rng: np.random.Generator) -> Scene:
    """Draw a street from `rng`."""
    street = Street(rng)
    _ground(street)
    for side in (-1, 1):
        _row_of_houses(street, side)
        _kerbside(street, side)
    _traffic(street)
    sun = np.array([rng.choice([-1, 1]) * rng.uniform(30, 60), rng.uniform(60, 90), rng.uniform(10, 50)])
    square = 0.5 * np.array([[-1, 0, -1], [-1, 0, 1], [1, 0, -1], [1, 0, 1]])
    to_camera, warmth = street.to_world.T, rng.uniform(-0.02, 0.06)
    return Scene(
        room=street, solids=[solid.moved(to_camera, street.eye) for solid in street.solids],
        lamps=(sun + square - street.eye) @ street.to_world, daylight=to_camera @ (sun / np.linalg.norm(sun)),
        brightness=rng.uniform(0.85, 1.1) * np.array([1 + warmth, 1.0, 1 - warmth]), falloff=0.5 / float(sun @ sun))


def _ground(street: Street) -> None:
    """Road with a broken middle line, pavements, lawn behind them, and the sky at the end."""
    asphalt = street.material("noise", (0.3, 0.3, 0.32), (0.38, 0.38, 0.39), (0.3, 0.3), 0.03)
    middle, flat = -LENGTH / 2 + 5, dict(casts_shadow=False)
    thing = street.thing("road", WORLD)
    thing.box((0, -0.1, middle), (2 * street.half, 0.2, LENGTH + 20), asphalt, **flat)
    white = street.plain((0.85, 0.85, 0.83), vary=0.02)
    thing.box((0, 0.004, list(np.arange(-4.0, -60, -6.0))), (0.14, 0.008, 2.6), white, **flat)
    paving = street.material("tiles", (0.62, 0.6, 0.57), (0.45, 0.44, 0.42), (0.6, 0.6), 0.03)
    grass = street.material("leaves", (0.16, 0.3, 0.1), (0.3, 0.45, 0.16), (0.4, 0.4), 0.03)
    for side in (-1, 1):
        x = side * (street.half + street.pavement / 2)
        street.thing("sidewalk", WORLD).box((x, KERB / 2 - 0.1, middle), (street.pavement, KERB + 0.2, LENGTH + 20),
                                            paving, **flat)
        x = side * (street.half + street.pavement + 60)
        street.thing("lawn", WORLD).box((x, -0.1, middle), (120, 0.2 + KERB, LENGTH + 20), grass, **flat)
    sky = street.material("noise", (0.45, 0.66, 0.92), (0.95, 0.96, 0.98), (60, 16), 0.03, glow=0.9)
    street.thing("sky", WORLD).box((0, 60, -LENGTH - 6), (700, 300, 0.2), sky, **flat)


def _row_of_houses(street: Street, side: int) -> None:
    """Houses, fences and trees behind the pavement of one side, from the camera to the end."""
    rng, z = street.rng, float(street.rng.uniform(-2, 3))         # the first begins beside the camera
    edge = street.half + street.pavement
    while z > -LENGTH + 12:
        length = rng.uniform(8, 17)
        x, middle = side * (edge + rng.uniform(0, 1.5)), z - length / 2
        if rng.random() < 0.75:
            tall, deep = rng.uniform(6, 17), 10.0
            facade = street.material("facade", street.pick(FACADES), (0.18, 0.2, 0.24), (2.1, 2.9), 0.05)
            street.thing("building", WORLD).box((x + side * deep / 2, tall / 2, middle), (deep, tall, length), facade)
        else:
            _tree(street, Pose(np.array([x + side * 2.5, KERB, middle]), WORLD.rotation))
            wood = street.material("stripes", (0.5, 0.4, 0.3), (0.32, 0.25, 0.18), (0.3, 0.3), 0.04)
            street.thing("fence", WORLD).box((x, 0.6, middle), (0.06, 1.1, length), wood)
        z -= length + rng.choice([0.0, 0.0, rng.uniform(1, 4)])


def _kerbside(street: Street, side: int) -> None:
    """What stands on the pavement near the kerb, and who walks on it."""
    rng, z = street.rng, -float(street.rng.uniform(3, 8))
    while z > -60:
        pose = Pose(np.array([side * (street.half + 0.5), KERB, z]), rotation("y", -side * np.pi / 2))
        kind = str(rng.choice(["lamp", "sign", "light", "tree", "none", "none"]))
        if kind != "none":
            {"lamp": _lamp, "sign": _sign, "light": _traffic_light, "tree": _tree}[kind](street, pose)
        if rng.random() < 0.55:
            x = side * (street.half + rng.uniform(1.0, street.pavement - 0.3))
            yaw = rng.choice([0, np.pi]) + rng.normal(0, 0.4)
            place = Pose(np.array([x, KERB, z - rng.uniform(1, 4)]), rotation("y", yaw))
            human.person(street, place, str(rng.choice(["walk", "walk", "stand", "one_arm"])), rng.uniform(1.5, 1.9))
        z -= rng.uniform(5, 11)


def _traffic(street: Street) -> None:
    """Parked cars on both sides, cars on both lanes, sometimes someone who crosses."""
    rng = street.rng
    for side, lane, first in ((-1, 0.45, 9.0), (1, 0.5, 7.0), (-1, 0.98, 5.0), (1, 0.98, 6.0)):
        parked = lane > 0.9
        z = -first - rng.uniform(0, 12)
        while z > -75:
            if rng.random() < 0.5:
                x = side * (lane * street.half - (0.95 if parked else 0))
                _car(street, Pose(np.array([x, 0, z]), rotation("y", (np.pi if side < 0 else 0) + rng.normal(0, 0.02))))
            z -= rng.uniform(6, 9) if parked else rng.uniform(12, 25)
    if rng.random() < 0.4:
        pose = Pose(np.array([rng.uniform(-0.7, 0.7) * street.half, 0, -rng.uniform(7, 20)]),
                    rotation("y", rng.choice([-1, 1]) * np.pi / 2))
        human.person(street, pose, "walk", rng.uniform(1.5, 1.9))


def _car(street: Street, pose: Pose) -> None:
    """A saloon of 4.2 m; its back is towards +z."""
    street.vehicles.append(Vehicle(len(street.names), pose, CAR_SIZE, "car"))
    thing, paint = street.thing("car", pose), street.plain(street.pick(PAINTS), gloss=0.5)
    glass, rubber = street.plain((0.1, 0.13, 0.16), vary=0.02, gloss=0.7), street.plain((0.06, 0.06, 0.06), vary=0.01)
    thing.box((0, 0.56, 0), (1.76, 0.5, 4.2), paint)
    thing.box((0, 0.92, 0.15), (1.6, 0.32, 2.5), glass)
    thing.box((0, 1.14, 0.2), (1.5, 0.12, 2.1), paint)
    wheel = np.array([[0, 0.11, 0], [0.32, 0, 0], [0, 0, 0.32]])      # columns: half axes; the second is the axle
    for x in (-0.8, 0.8):
        for z in (-1.3, 1.3):
            thing.solid("cylinder", (x, 0.32, z), wheel, rubber)
    thing.box(((-0.68, 0.68), 0.66, 2.1), (0.28, 0.14, 0.03), street.plain((0.7, 0.05, 0.05), vary=0.02, glow=0.3))
    thing.box(((-0.68, 0.68), 0.62, -2.1), (0.28, 0.16, 0.03), street.plain((0.95, 0.94, 0.88), vary=0.02, glow=0.3))
    thing.box((0, 0.55, 2.11), (0.5, 0.11, 0.02), street.plain((0.9, 0.9, 0.9), vary=0.01))


def _tree(street: Street, pose: Pose) -> None:
    thing, size = street.thing("tree", pose), street.rng.uniform(0.8, 1.4)
    thing.post((0, 1.2 * size, 0), 0.16 * size, 2.4 * size, street.wood((0.3, 0.22, 0.15)), taper=0.7)
    leaves = street.material("leaves", (0.1, 0.26, 0.08), (0.28, 0.46, 0.16), (0.5, 0.5), 0.04)
    for x, y, z, r in ((0, 3.3, 0, 1.25), (0.7, 2.9, 0.3, 0.8), (-0.6, 3.0, -0.3, 0.85)):
        thing.ball(np.array((x, y, z)) * size, np.array((r, 0.9 * r, r)) * size, leaves)


def _lamp(street: Street, pose: Pose) -> None:
    thing, steel = street.thing("pole", pose), street.plain((0.4, 0.42, 0.43), vary=0.03)
    thing.post((0, 2.8, 0), 0.08, 5.6, steel, taper=0.6)
    thing.box((0, 5.6, 0.7), (0.1, 0.08, 1.5), steel)


def _sign(street: Street, pose: Pose) -> None:
    street.thing("pole", pose).post((0, 1.2, 0), 0.045, 2.4, street.metal())
    disc = np.array([[0.32, 0, 0], [0, 0, 0.32], [0, 0.02, 0]])
    turned = pose.at(0, 2.2, 0.06, np.pi / 2 if pose.origin[0] > 0 else -np.pi / 2)        # it faces the camera
    street.thing("sign", turned).solid("cylinder", (0, 0, 0), disc, street.plain(street.pick(SIGNS)))


def _traffic_light(street: Street, pose: Pose) -> None:
    street.thing("pole", pose).post((0, 1.4, 0), 0.06, 2.8, street.metal())
    turned = pose.at(0, 2.75, 0, np.pi / 2 if pose.origin[0] > 0 else -np.pi / 2)
    thing, lit = street.thing("light", turned), int(street.rng.integers(3))
    thing.box((0, 0, 0.08), (0.3, 0.86, 0.22), street.plain((0.09, 0.09, 0.1), vary=0.01))
    for i, tone in enumerate(((0.2, 0.85, 0.3), (0.95, 0.7, 0.15), (0.95, 0.12, 0.1))):
        lens = street.plain(tone if i == lit else 0.25 * np.array(tone), vary=0.01, glow=0.9 if i == lit else 0.0)
        thing.ball((0, -0.27 + 0.27 * i, 0.2), (0.09, 0.09, 0.05), lens)
