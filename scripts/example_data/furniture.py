"""What stands in a room. Every function puts one thing at a pose: origin on the floor in the middle of its footprint,
back towards -z, front towards +z, so that a wall's furniture only needs to be turned with the wall.
"""

from scripts.example_data.small import CREAM, WHITE, on_top, pillow, plant, table_lamp, television
from scripts.example_data.stage import Pose, Stage, Thing

SOFA_COLOURS = [(0.2, 0.42, 0.5), (0.62, 0.2, 0.18), (0.5, 0.48, 0.45), (0.75, 0.55, 0.2), (0.3, 0.36, 0.25)]
BED_COLOURS = [(0.35, 0.48, 0.72), (0.82, 0.8, 0.86), (0.7, 0.42, 0.52), (0.55, 0.68, 0.75)]
CHAIR_COLOURS = [(0.72, 0.5, 0.28), (0.82, 0.3, 0.14), (0.24, 0.22, 0.22), (0.9, 0.72, 0.25)]


def _legs(thing: Thing, width: float, depth: float, height: float, thick: float, material, inset=0.04) -> None:
    """Four square legs, `inset` metres from the edges of width x depth."""
    x, z = width / 2 - inset - thick / 2, depth / 2 - inset - thick / 2
    thing.box(((-x, x), height / 2, (-z, z)), (thick, height, thick), material)


def bed(stage: Stage, pose: Pose, width: float, depth: float, height: float) -> None:
    """Frame, mattress, blanket, headboard; pillows are things of their own."""
    thing, wood = stage.thing("bed", pose), stage.wood()
    thing.box((0, 0.16, 0), (width, 0.24, depth), wood)
    thing.box((0, height / 2, -depth / 2 + 0.03), (width, height, 0.06), wood)
    thing.box((0, 0.38, 0.02), (width - 0.06, 0.22, depth - 0.1), stage.plain(WHITE))
    cover = stage.fabric(BED_COLOURS, cell=0.22)
    thing.box((0, 0.36, 0.3), (width + 0.04, 0.32, depth - 0.62), cover)
    for x in (-0.24 * width, 0.24 * width):
        pillow(stage, pose.at(x, 0.55, -depth / 2 + 0.32), 0.2 * width, flat=True)


def sofa(stage: Stage, pose: Pose, width: float, depth: float, height: float) -> None:
    """Base, back, two arms and one cushion per seat."""
    thing, cloth = stage.thing("sofa", pose), stage.fabric(SOFA_COLOURS, "plain")
    seat = stage.plain(cloth.first ** (1 / 2.2) * 1.12, vary=0.02)
    thing.box((0, 0.2, 0), (width, 0.24, depth), cloth)
    thing.box((0, height / 2 + 0.04, -depth / 2 + 0.12), (width, height - 0.08, 0.24), cloth)
    thing.box(((-width / 2 + 0.09, width / 2 - 0.09), 0.33, 0.02), (0.18, 0.5, depth - 0.04), cloth)
    number = 3 if width > 1.6 else (2 if width > 1.2 else 1)
    span = (width - 0.36) / number
    for i in range(number):
        x = -width / 2 + 0.18 + span * (i + 0.5)
        thing.box((x, 0.37, 0.11), (span - 0.02, 0.14, depth - 0.26), seat)
        stage.seats.append(pose.at(x, 0.44, 0.02))
    for x in (-width / 2 + 0.36, width / 2 - 0.36):
        if number > 1 and stage.rng.random() < 0.55:
            pillow(stage, pose.at(x, 0.6, -depth / 2 + 0.36), 0.2)


def cabinet(stage: Stage, pose: Pose, width: float, depth: float, height: float, name: str = "cabinet") -> None:
    """Wardrobe with two doors, or drawers where it is low; knobs in front."""
    tone = stage.pick([(0.86, 0.83, 0.77), (0.76, 0.58, 0.38), (0.62, 0.46, 0.33)])
    drawers = max(1, round(height / 0.28)) if height < 1.2 else 0
    cell = (4.0, height / drawers) if drawers else (width / 2, 4.0)
    shift = (0.5, 0.5 * (drawers % 2)) if drawers else (0.0, 0.5)
    body = stage.material("panels", tone, 0.55 * tone, cell, 0.02, shift=shift, gloss=0.1)
    thing, knob = stage.thing(name, pose), stage.metal()
    thing.box((0, height / 2, 0), (width, height, depth), body)
    thing.box((0, height + 0.015, 0), (width + 0.04, 0.03, depth + 0.03), stage.wood(0.8 * tone))
    if drawers:
        rows = [height * (i + 0.5) / drawers for i in range(drawers)]
        thing.box((0, rows, depth / 2 + 0.012), (0.18, 0.022, 0.024), knob)
    else:
        thing.box(((-0.05, 0.05), 0.5 * height, depth / 2 + 0.012), (0.02, 0.2, 0.024), knob)


def dresser(stage: Stage, pose: Pose, width: float, depth: float, height: float) -> None:
    """A low cabinet with drawers, often with something on top."""
    cabinet(stage, pose, width, depth, height, "dresser")
    if stage.rng.random() < 0.6:
        on_top(stage, pose.at(stage.rng.uniform(-0.3, 0.3), height + 0.03, 0))


def nightstand(stage: Stage, pose: Pose, width: float, depth: float, height: float) -> None:
    """A small cabinet with a lamp."""
    cabinet(stage, pose, width, depth, height, "nightstand")
    table_lamp(stage, pose.at(0, height + 0.03, 0))


def bookshelf(stage: Stage, pose: Pose, width: float, depth: float, height: float) -> None:
    """Open shelves with rows of books, each row a thing of its own."""
    thing, wood = stage.thing("bookshelf", pose), stage.wood()
    thing.box((0, height / 2, -depth / 2 + 0.01), (width, height, 0.02), wood)
    thing.box(((-width / 2 + 0.015, width / 2 - 0.015), height / 2, 0), (0.03, height, depth), wood)
    number = max(2, round(height / 0.37))
    gap = (height - 0.08) / number
    thing.box((0, [0.05 + i * gap for i in range(number + 1)], 0), (width - 0.06, 0.03, depth), wood)
    for i in range(number):
        fill = stage.rng.uniform(0.35, 1.0) * (width - 0.1)
        tall = stage.rng.uniform(0.6, 0.85) * (gap - 0.03)
        side = stage.rng.choice([-1, 1]) * (width - 0.1 - fill) / 2
        cell, shift = (stage.rng.uniform(0.035, 0.06), tall), (stage.rng.uniform(0, 40), 0.0)
        spines = stage.material("books", CREAM, CREAM, cell, 0.05, shift=shift)
        stage.thing("books", pose).box((side, 0.065 + i * gap + tall / 2, -0.03), (fill, tall, depth - 0.1), spines)


def desk(stage: Stage, pose: Pose, width: float, depth: float, height: float) -> None:
    """Top on side panels, a drawer block, and a screen, a lamp or papers on it."""
    thing, top = stage.thing("desk", pose), stage.wood((0.5, 0.34, 0.24))
    thing.box((0, height - 0.02, 0), (width, 0.04, depth), top)
    thing.box(((-width / 2 + 0.03, width / 2 - 0.03), height / 2 - 0.02, 0), (0.04, height - 0.04, depth - 0.06), top)
    drawer = stage.material("panels", (0.62, 0.46, 0.34), cell=(4.0, 0.2), shift=(0.5, 0.5))
    thing.box((-width / 2 + 0.25, height - 0.34, 0), (0.4, 0.6, depth - 0.1), drawer)
    television(stage, pose.at(0.05, height, -0.12), 0.62, 0.38)
    if stage.rng.random() < 0.7:
        sheet = stage.thing("paper", pose.at(0.3, height + 0.004, 0.12, stage.rng.uniform(-0.5, 0.5)))
        sheet.box((0, 0, 0), (0.21, 0.008, 0.3), stage.plain((0.96, 0.96, 0.94), vary=0.01))
    if stage.rng.random() < 0.7:
        on_top(stage, pose.at(-width / 2 + 0.2, height, -0.08))


def tv_bench(stage: Stage, pose: Pose, width: float, depth: float, height: float) -> None:
    """A low cabinet with a television."""
    cabinet(stage, pose, width, depth, height)
    television(stage, pose.at(0, height + 0.03, 0), 0.72 * width, 0.42 * width)


def fridge(stage: Stage, pose: Pose, width: float, depth: float, height: float) -> None:
    """White or steel, two doors and handles."""
    thing = stage.thing("fridge", pose)
    tone = stage.pick([(0.9, 0.91, 0.93), (0.7, 0.73, 0.76)])
    skin, grip = stage.plain(tone, vary=0.02, gloss=0.5), stage.metal()
    thing.box((0, 0.33 * height - 0.005, 0), (width, 0.66 * height - 0.01, depth), skin)
    thing.box((0, 0.83 * height, 0), (width, 0.34 * height, depth), skin)
    for y, tall in ((0.5 * height, 0.35), (0.78 * height, 0.2)):
        thing.box((-width / 2 + 0.07, y, depth / 2 + 0.02), (0.025, tall, 0.04), grip)


def counter(stage: Stage, pose: Pose, width: float, depth: float, height: float) -> None:
    """Kitchen unit with a stone top and things on it."""
    thing = stage.thing("counter", pose)
    front = stage.material("panels", (0.55, 0.66, 0.62), cell=(width / 3, 4.0), shift=(0.5, 0.5))
    thing.box((0, height / 2 - 0.02, -0.01), (width, height - 0.04, depth - 0.04), front)
    stone = stage.material("noise", (0.4, 0.4, 0.42), (0.72, 0.7, 0.68), (0.06, 0.06), gloss=0.4)
    thing.box((0, height - 0.02, 0), (width + 0.02, 0.04, depth), stone)
    for x in (-0.3 * width, 0.05 * width, 0.33 * width):
        on_top(stage, pose.at(x, height, stage.rng.uniform(-0.1, 0.1)))


def table(stage: Stage, pose: Pose, width: float, depth: float, height: float) -> None:
    """Square on four legs or round on a column, with things on it."""
    thing, wood = stage.thing("table", pose), stage.wood()
    if stage.rng.random() < 0.25:
        thing.post((0, height - 0.02, 0), depth / 2 + 0.05, 0.04, wood)
        thing.post((0, height / 2, 0), 0.05, height - 0.04, wood)
        thing.post((0, 0.02, 0), 0.26, 0.04, wood, taper=0.7)
        width = 0.7 * depth
    else:
        thing.box((0, height - 0.02, 0), (width, 0.04, depth), wood)
        thing.box((0, height - 0.075, 0), (width - 0.12, 0.07, depth - 0.12), wood)
        _legs(thing, width, depth, height - 0.04, 0.06, wood)
    for x in (-0.32, 0.0, 0.3):
        if stage.rng.random() < 0.75:
            on_top(stage, pose.at(x * width, height, stage.rng.uniform(-0.2, 0.2) * depth))


def chair(stage: Stage, pose: Pose, width: float, depth: float, height: float, colours=None) -> None:
    """Four legs, a seat, two uprights with a back."""
    thing, seat = stage.thing("chair", pose), stage.plain(stage.pick(colours or CHAIR_COLOURS), gloss=0.1)
    wood = stage.wood((0.5, 0.34, 0.22))
    _legs(thing, width, depth, 0.43, 0.04, wood, inset=0.01)
    thing.box((0, 0.45, 0), (width, 0.05, depth), seat)
    uprights, back = (-width / 2 + 0.03, width / 2 - 0.03), -depth / 2 + 0.02
    thing.box((uprights, height / 2 + 0.22, back), (0.035, height - 0.44, 0.035), wood)
    thing.box((0, height - 0.14, back), (width - 0.04, 0.26, 0.03), seat)
    stage.seats.append(pose.at(0, 0.475, 0.04))


def floor_lamp(stage: Stage, pose: Pose, width: float, depth: float, height: float) -> None:
    """Foot, pole, glowing shade."""
    thing, pole = stage.thing("lamp", pose), stage.metal()
    thing.post((0, 0.015, 0), 0.15, 0.03, pole)
    thing.post((0, height / 2, 0), 0.015, height, pole)
    shade = stage.plain((0.97, 0.88, 0.64), vary=0.03, glow=0.55)
    thing.post((0, height, 0), 0.21, 0.3, shade, taper=0.65)


FURNITURE = {    # name -> builder; width, depth and height in metres before the room's random factor
    "bed": (bed, (1.45, 2.05, 0.95)),
    "sofa": (sofa, (1.9, 0.9, 0.85)),
    "armchair": (sofa, (0.85, 0.85, 0.8)),
    "cabinet": (cabinet, (1.0, 0.55, 1.95)),
    "dresser": (dresser, (1.0, 0.5, 0.85)),
    "bookshelf": (bookshelf, (0.95, 0.34, 1.85)),
    "desk": (desk, (1.25, 0.62, 0.75)),
    "fridge": (fridge, (0.68, 0.66, 1.75)),
    "counter": (counter, (1.5, 0.6, 0.9)),
    "nightstand": (nightstand, (0.46, 0.42, 0.5)),
    "tv_bench": (tv_bench, (1.4, 0.42, 0.5)),
    "floor_lamp": (floor_lamp, (0.42, 0.42, 1.6)),
    "plant": (plant, (0.6, 0.6, 1.2)),
    "table": (table, (1.4, 0.85, 0.74)),
    "low_table": (table, (0.95, 0.6, 0.42)),
    "chair": (chair, (0.46, 0.48, 0.92)),
}
