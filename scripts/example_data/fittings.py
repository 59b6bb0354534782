"""The room itself and what hangs on its walls or lies on its floor.

Wall things are placed at a pose whose origin is on the floor at the foot of the wall, with +z into the room.
"""

from scripts.example_data.stage import WORLD, Pose, Stage

WALLS = [(0.86, 0.82, 0.74), (0.78, 0.83, 0.84), (0.85, 0.77, 0.72), (0.8, 0.84, 0.76), (0.9, 0.88, 0.86)]
FLOORS = {   # pattern -> its two colours and cell
    "planks": ((0.62, 0.43, 0.27), (0.45, 0.29, 0.17), (0.13, 0.13)),
    "tiles": ((0.68, 0.6, 0.52), (0.5, 0.46, 0.42), (0.4, 0.4)),
    "checks": ((0.72, 0.66, 0.6), (0.5, 0.42, 0.36), (0.45, 0.45)),
    "noise": ((0.6, 0.5, 0.42), (0.5, 0.42, 0.36), (0.05, 0.05)),
}
THICK = 0.2  # walls, metres


def shell(stage: Stage, width: float, depth: float, height: float) -> None:
    """Floor, ceiling and the four walls of a room: x in +-width/2, z in -depth..0, y in 0..height."""
    kind = str(stage.rng.choice(["planks", "planks", "tiles", "checks", "noise"]))
    floor = stage.material(kind, *FLOORS[kind], 0.04, gloss=0.12)
    pattern = str(stage.rng.choice(["plain", "plain", "plain", "stripes"]))
    tone = stage.pick(WALLS)
    paper = stage.material(pattern, tone, 0.93 * tone, (0.3, 0.3), 0.02)
    ceiling = stage.plain((0.95, 0.95, 0.94), vary=0.01)
    middle, t = -depth / 2, THICK
    wide, tall, deep = width + 2 * t, height + 2 * t, depth + 2 * t    # overlapping: no ray slips through a seam
    for name, centre, size, material in (
        ("floor", (0, -t / 2, middle), (wide, t, deep), floor),
        ("ceiling", (0, height + t / 2, middle), (wide, t, deep), ceiling),
        ("wall", (0, height / 2, -depth - t / 2), (wide, tall, t), paper),
        ("wall", (0, height / 2, t / 2), (wide, tall, t), paper),
        ("wall", (-width / 2 - t / 2, height / 2, middle), (t, tall, deep), paper),
        ("wall", (width / 2 + t / 2, height / 2, middle), (t, tall, deep), paper),
    ):
        stage.thing(name, WORLD).box(centre, size, material, casts_shadow=False)


def door(stage: Stage, pose: Pose, height: float) -> None:
    """Frame, two-panel leaf, handle; 0.95 m wide."""
    tone = stage.pick([(0.93, 0.92, 0.9), (0.52, 0.33, 0.2)])
    thing, wood, frame = stage.thing("door", pose), stage.wood(tone), stage.plain(0.9 * tone, vary=0.02)
    thing.box((0, height / 2, 0.02), (0.85, height, 0.04), wood)
    thing.box(((-0.45, 0.45), height / 2, 0.03), (0.08, height, 0.06), frame)
    thing.box((0, height + 0.04, 0.03), (0.98, 0.08, 0.06), frame)
    thing.box((0, (0.28 * height, 0.72 * height), 0.045), (0.5, 0.34 * height, 0.015), frame)
    thing.box((0.33, 0.48 * height, 0.07), (0.12, 0.025, 0.03), stage.metal())


def window(stage: Stage, pose: Pose, width: float, height: float) -> None:
    """Sky behind a cross-barred frame; sometimes with curtains or blinds. The sill is at 0.95 m."""
    base, rng = 0.95, stage.rng
    shift = rng.uniform(0, 40), 0.0
    sky = stage.material("sky", (0.86, 0.92, 0.97), (0.4, 0.63, 0.92), (height, height), 0.03, shift=shift, glow=0.85)
    stage.thing("glass", pose).box((0, base + height / 2, 0.01), (width, height, 0.02), sky)
    thing, frame = stage.thing("window", pose), stage.plain((0.95, 0.95, 0.94), vary=0.02)
    thing.box(((-width / 2, 0, width / 2), base + height / 2, 0.03), (0.06, height + 0.06, 0.06), frame)
    thing.box((0, (base, base + 0.6 * height, base + height), 0.03), (width, 0.06, 0.055), frame)
    thing.box((0, base - 0.04, 0.07), (width + 0.12, 0.03, 0.14), frame)
    dressing = rng.choice(["curtain", "curtain", "blinds", "none"])
    if dressing == "curtain":
        tone = stage.pick([(0.75, 0.32, 0.3), (0.35, 0.45, 0.62), (0.85, 0.72, 0.45), (0.5, 0.6, 0.5)])
        cloth = stage.material("stripes", tone, 0.82 * tone, (0.11, 0.11), 0.03)
        for x in (-width / 2 - 0.14, width / 2 + 0.14):
            stage.thing("curtain", pose).box((x, base + height / 2 - 0.12, 0.1), (0.34, height + 0.5, 0.05), cloth)
    elif dressing == "blinds":
        slats = stage.material("panels", (0.9, 0.88, 0.82), (0.62, 0.6, 0.55), (9.0, 0.07), 0.02, shift=(0.5, 0.0))
        drop = rng.uniform(0.35, 0.7) * height
        stage.thing("blinds", pose).box((0, base + height - drop / 2, 0.09), (width + 0.06, drop, 0.025), slats)


def picture(stage: Stage, pose: Pose, width: float, height: float) -> None:
    """A framed painting, its middle at 1.6 m."""
    thing, frame = stage.thing("picture", pose), stage.wood(stage.pick([(0.25, 0.18, 0.12), (0.75, 0.6, 0.3)]))
    thing.box((0, 1.6, 0.015), (width, height, 0.03), frame)
    warm, cold = stage.pick([(0.8, 0.35, 0.25), (0.85, 0.7, 0.25)]), stage.pick([(0.2, 0.4, 0.6), (0.2, 0.5, 0.4)])
    art = stage.material("picture", warm, cold, (0.4, 0.4), 0.06)
    thing.box((0, 1.6, 0.02), (width - 0.08, height - 0.08, 0.03), art)


def whiteboard(stage: Stage, pose: Pose) -> None:
    """A board of 1.4 m by 0.9 m in a metal frame."""
    thing = stage.thing("whiteboard", pose)
    thing.box((0, 1.55, 0.015), (1.4, 0.9, 0.03), stage.metal())
    thing.box((0, 1.55, 0.02), (1.34, 0.84, 0.03), stage.plain((0.96, 0.96, 0.97), vary=0.01, gloss=0.4))


def rug(stage: Stage, pose: Pose, width: float, depth: float) -> None:
    """A flat mat, 1 cm thick."""
    cloth = stage.fabric([(0.55, 0.15, 0.2), (0.18, 0.28, 0.45), (0.75, 0.68, 0.55)], cell=0.35)
    stage.thing("mat", pose).box((0, 0.005, 0), (width, 0.01, depth), cloth, casts_shadow=False)


def ball(stage: Stage, pose: Pose) -> None:
    """A striped ball on the floor."""
    thing, radius = stage.thing("ball", pose), stage.rng.uniform(0.1, 0.17)
    cloth = stage.fabric([(0.9, 0.25, 0.15), (0.2, 0.5, 0.85), (0.95, 0.8, 0.2)], "stripes", 0.11)
    thing.ball((0, radius, 0), (radius,) * 3, cloth)


def bag(stage: Stage, pose: Pose) -> None:
    """A bag with two handles on the floor."""
    thing = stage.thing("bag", pose)
    cloth = stage.material("noise", stage.pick([(0.5, 0.2, 0.25), (0.2, 0.3, 0.28), (0.35, 0.22, 0.14)]))
    thing.ball((0, 0.17, 0), (0.22, 0.17, 0.13), cloth)
    for z in (-0.05, 0.05):
        thing.box((0, 0.36, z), (0.2, 0.02, 0.02), cloth)
        thing.box(((-0.09, 0.09), 0.32, z), (0.02, 0.1, 0.02), cloth)
