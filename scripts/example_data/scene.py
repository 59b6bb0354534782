"""A room from a seed: size, theme, furniture along the walls, a table set, people, small things, camera, light.

World frame: floor at y = 0, room x in +-width/2 and z in -depth..0; the camera stands near z = 0 and looks towards -z.
Nothing here knows the size of the picture, so one seed gives one scene at every size.
"""

from functools import partial
from typing import NamedTuple

import numpy as np

from scripts.example_data import fittings, human, small
from scripts.example_data.furniture import CHAIR_COLOURS, FURNITURE, chair, table
from scripts.example_data.geometry import Solid, rotation
from scripts.example_data.stage import UPRIGHT, WORLD, Pose, Stage

# What may stand along the walls, by theme; earlier ones are tried first on the wall that the camera faces.
THEMES = {
    "living": ("sofa", "tv_bench", "bookshelf", "floor_lamp", "plant", "armchair", "cabinet"),
    "bedroom": ("bed", "nightstand", "cabinet", "dresser", "plant", "armchair", "floor_lamp"),
    "kitchen": ("fridge", "counter", "cabinet", "plant", "chair", "tv_bench"),
    "office": ("desk", "bookshelf", "cabinet", "plant", "chair", "sofa", "desk"),
}
SMALL_THINGS = (    # what may stand anywhere: chance, edge in metres of the square that it takes, how it is built
    (0.35, 0.4, partial(human.pet, name="cat")),
    (0.35, 0.6, partial(human.pet, name="dog")),
    (0.3, 0.35, fittings.ball),
    (0.25, 0.5, fittings.bag),
    (0.3, 0.45, partial(small.carton, edge=0.45)),
    (0.25, 0.5, partial(small.plant, width=0.6, depth=0.6, height=1.2)),
    (0.3, 0.5, partial(chair, width=0.46, depth=0.48, height=0.92)),
)
PEOPLE = {"nyud": (0.35, 2), "pascal": (0.76, 3)}    # style of the data set -> chance of people, how many at most
LOW = 1.0  # metres: above furniture lower than this a wall can carry pictures and windows


class Room(Stage):
    """An empty room and its camera; knows what the camera sees and which part of the floor is taken."""

    def __init__(self, rng: np.random.Generator):
        super().__init__(rng)
        self.width, self.depth = rng.uniform(3.8, 5.4), rng.uniform(4.2, 7.4)
        self.height = rng.uniform(2.45, 2.9)
        self.taken: list[tuple[float, float, float, float]] = []  # x0, x1, z0, z1
        x = rng.uniform(-0.2, 0.2) * self.width
        self.eye = np.array([x, rng.uniform(1.2, 1.6), -0.2])
        aim = np.array([rng.uniform(-0.28, 0.28) * self.width, 0, -0.75 * self.depth]) - self.eye
        self.yaw = np.arctan2(-aim[0], -aim[2])
        tilt, roll = rng.uniform(-0.2, -0.04), rng.normal(0, 0.012)
        self.to_world = rotation("y", self.yaw) @ rotation("x", tilt) @ rotation("z", roll)

    def claim(self, pose: Pose, width: float, depth: float, clear: float = 1.3) -> bool:
        """Take the floor under a thing, if it is free, inside the room and `clear` metres from the camera."""
        dx, dz = np.abs(pose.rotation[np.ix_([0, 2], [0, 2])]) @ (width / 2, depth / 2)
        x, _, z = pose.origin
        inside = abs(x) + dx <= self.width / 2 and -self.depth <= z - dz and z + dz <= 0
        gap = np.hypot(max(abs(x - self.eye[0]) - dx, 0), max(abs(z - self.eye[2]) - dz, 0))
        free = all(x + dx < a or x - dx > b or z + dz < c or z - dz > d for a, b, c, d in self.taken)
        fits = bool(inside and free and gap >= clear)
        if fits:
            self.taken.append((x - dx, x + dx, z - dz, z + dz))
        return fits

    def seen(self, point: np.ndarray, nearest: float, farthest: float, side: float = 0.45) -> bool:
        """Whether a point (3,) lies in the middle of the view, between two depths in metres."""
        x, _, z = self.to_world.T @ (point - self.eye)
        return nearest < -z < farthest and abs(x) < side * -z

    def spot(self, nearest: float, farthest: float, side: float = 0.45) -> Pose:
        """A random place on the floor at a depth of `nearest`..`farthest` metres."""
        ahead = self.rng.uniform(nearest, farthest)
        forward = rotation("y", self.yaw) @ np.array([self.rng.uniform(-side, side) * ahead, 0, -ahead])
        return Pose((self.eye + forward) * (1, 0, 1), UPRIGHT)


class Scene(NamedTuple):
    """A furnished room in camera coordinates (x right, y up, z towards the camera), and its light."""

    room: Room                  # in its own frame: world point = room.to_world @ point + room.eye
    solids: list[Solid]
    lamps: np.ndarray           # (S, 3), points of the ceiling lamp
    daylight: np.ndarray        # (3,), direction to the brightest window
    brightness: np.ndarray      # (3,), factors of the colours: tint of the light times exposure
    falloff: float = 0.16       # the lamp's light is divided by 1 + falloff * (distance in metres) ** 2


def build_scene(rng: np.random.Generator, style: str) -> Scene:
    """Draw a room of `style` ("nyud" or "pascal") from `rng`."""
    room = Room(rng)
    fittings.shell(room, room.width, room.depth, room.height)
    lamp = np.array([rng.uniform(-0.2, 0.2) * room.width, room.height, -rng.uniform(0.35, 0.65) * room.depth])
    glass = room.plain((0.97, 0.95, 0.88), vary=0.01, glow=0.8)
    room.thing("lamp", WORLD.at(*lamp)).post((0, -0.05, 0), 0.22, 0.1, glass, casts_shadow=False)
    theme = THEMES[str(rng.choice(list(THEMES)))]
    left, right, back = -room.width / 2, room.width / 2, -room.depth
    _furnish(room, WORLD.at(left, 0, back), room.width, theme, 1.0, first=0.7)
    _furnish(room, WORLD.at(left, 0, 0, np.pi / 2), room.depth, theme, 0.8)
    _furnish(room, WORLD.at(right, 0, back, -np.pi / 2), room.depth, theme, 0.8)
    if rng.random() < 0.65:
        _table_set(room)
    chance, most = PEOPLE[style]
    if rng.random() < chance:
        for _ in range(rng.integers(1, most + 1)):
            _add_person(room)
    _small_things(room)
    return _finish(room, lamp)


def _furnish(room: Room, wall: Pose, length: float, theme: tuple[str, ...], share: float, first: float = 0.0) -> None:
    """Furniture from left to right along one wall, and what hangs above it or between it.

    wall: the foot of its left end as seen from the room, facing the room. share: chance that a place is furnished;
    first: that the first of the theme comes first.
    """
    rng, along = room.rng, room.rng.uniform(0.05, 0.4)
    menu = list(rng.permutation(theme)) * 2
    if first and rng.random() < first:
        menu = [theme[0], *menu]
    while along < length - 0.6:
        if rng.random() > share or not menu:
            _hang(room, wall, length, along, along + 1.1)
            along += 1.2
            continue
        name = menu.pop(0)
        build, size = FURNITURE[name]
        width, depth, height = np.array(size) * rng.uniform(0.92, 1.1)
        pose = wall.at(along + width / 2, 0, depth / 2 + 0.03)
        tall_and_near = height > 1.2 and pose.origin[2] > -2.2
        if along + width > length or tall_and_near or not room.claim(pose, width, depth + 0.04):
            along += 0.25
            continue
        build(room, pose, width, depth, height)
        if height < LOW:
            _hang(room, wall, length, along, along + width, furnished=True)
        along += width + rng.choice([0.04, 0.1, rng.uniform(0.2, 1.0)])


def _hang(room: Room, wall: Pose, length: float, start: float, end: float, furnished: bool = False) -> None:
    """A door, window, picture or whiteboard on the stretch start..end of a wall's length; no door where furnished."""
    rng, middle = room.rng, (start + end) / 2
    pose, span = wall.at(middle, 0, 0), end - start
    if middle + 0.6 > length or middle < 0.6 or span < 0.6:
        return
    kind = str(rng.choice(["window", "window", "picture", "picture", "whiteboard", "door", "none"]))
    if kind == "door" and not furnished and room.claim(pose.at(0, 0, 0.05), 1.0, 0.1):
        fittings.door(room, pose, 2.02)
    elif kind == "window" and span > 0.9:
        fittings.window(room, pose, min(span - 0.3, 1.5), rng.uniform(0.95, 1.2))
    elif kind == "whiteboard" and span > 1.4:
        fittings.whiteboard(room, pose)
    elif kind == "picture":
        fittings.picture(room, pose, rng.uniform(0.4, 0.8), rng.uniform(0.4, 0.65))


def _table_set(room: Room) -> None:
    """A table in the middle of the room with chairs round it, often on a rug."""
    rng = room.rng
    name = str(rng.choice(["table", "table", "low_table"]))
    width, depth, height = np.array(FURNITURE[name][1]) * rng.uniform(0.9, 1.1)
    for _ in range(30):
        pose = room.spot(2.2, 4.2, 0.35).at(0, 0, 0, rng.uniform(-0.4, 0.4))
        if room.claim(pose, width, depth, clear=1.5):
            break
    else:
        return
    table(room, pose, width, depth, height)
    if rng.random() < 0.6:
        fittings.rug(room, pose, width + 1.0, depth + 0.9)
    colours = [room.pick(CHAIR_COLOURS)]
    for x, z, yaw in ((0, -1, 0.0), (0, 1, np.pi), (-1, 0, np.pi / 2), (1, 0, -np.pi / 2)):
        place = pose.at(x * (width / 2 + 0.28), 0, z * (depth / 2 + 0.28), yaw + rng.uniform(-0.3, 0.3))
        if name == "table" and rng.random() < 0.75 and room.claim(place, 0.36, 0.36):
            chair(room, place, *FURNITURE["chair"][1], colours)


def _add_person(room: Room) -> None:
    """Someone on a free seat in view, or standing on free floor; nobody where there is no room."""
    rng, height = room.rng, room.rng.uniform(1.55, 1.85)
    seats = [i for i, seat in enumerate(room.seats) if room.seen(seat.origin, 1.8, 4.5)]
    if seats and rng.random() < 0.4:
        seat = room.seats.pop(seats[rng.integers(len(seats))])
        human.person(room, seat, "sit", height)
        return
    for _ in range(60):
        place = room.spot(2.0, 3.8)
        x, _, z = room.eye - place.origin
        pose = place.at(0, 0, 0, np.arctan2(x, z) + rng.normal(0, 0.8))    # more or less towards the camera
        if room.claim(pose, 0.42, 0.42):
            kind = rng.choice(["stand", "walk", "one_arm", "both_arms", "reach"], p=(0.3, 0.3, 0.15, 0.1, 0.15))
            human.person(room, pose, str(kind), height)
            return


def _small_things(room: Room) -> None:
    """Pets, a ball, a bag, a box, a plant, a chair on the free floor."""
    rng = room.rng
    for chance, edge, build in SMALL_THINGS:
        if rng.random() > chance:
            continue
        pose = room.spot(1.8, 4.0).at(0, 0, 0, rng.uniform(-np.pi, np.pi))
        if room.claim(pose, edge, edge):
            build(room, pose)


def _finish(room: Room, lamp: np.ndarray) -> Scene:
    """Turn the room into camera coordinates and set the light."""
    rng, to_camera = room.rng, room.to_world.T
    square = 0.18 * np.array([[-1, 0, -1], [-1, 0, 1], [1, 0, -1], [1, 0, 1]]) - (0, 0.16, 0)
    lamps = (lamp + square - room.eye) @ room.to_world  # rows: to_camera @ (point - eye)
    sun = np.array([rng.choice([-1, 1]) * 0.8, 0.3, rng.uniform(-0.4, 0.6)])
    warmth = rng.uniform(-0.06, 0.08)
    return Scene(
        room=room,
        solids=[solid.moved(to_camera, room.eye) for solid in room.solids],
        lamps=lamps,
        daylight=to_camera @ (sun / np.linalg.norm(sun)),
        brightness=rng.uniform(0.85, 1.15) * np.array([1 + warmth, 1.0, 1 - warmth]),
    )
