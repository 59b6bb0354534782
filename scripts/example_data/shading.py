"""Light on surfaces: a ceiling lamp with soft shadows, daylight and ambient light without, corners a little darker.

All vectors are in camera coordinates; colours are linear RGB, float32, (3, N).
"""

import numpy as np

from scripts.example_data.geometry import dot, lit, rows, unit
from scripts.example_data.scene import Scene
from scripts.example_data.texture import colours

LAMP, DAY, SKY = 1.5, 0.22, 0.42  # strengths of lamp, daylight and ambient light


def surfaces(scene: Scene, points: np.ndarray, index: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Normals (3, N), base colours (3, N), gloss and glow (2, N) at points (3, N) on the solids `index` (N,)."""
    normals, base = np.zeros_like(points), np.zeros_like(points)
    finish = np.zeros((2, points.shape[1]), np.float32)
    order = np.argsort(index, kind="stable")
    values, starts = np.unique(index[order], return_index=True)
    for value, pixels in zip(values, np.split(order, starts[1:]), strict=True):
        solid = scene.solids[value]
        normals[:, pixels], position, inner = solid.surface(points[:, pixels])
        radius = 0.0 if solid.kind == "box" else float(np.linalg.norm(solid.axes[:, 0]))
        base[:, pixels] = colours(solid.material, position, inner, radius)
        finish[:, pixels] = np.array([[solid.material.gloss], [solid.material.glow]])
    return normals, base, finish


def shade(scene: Scene, points: np.ndarray, index: np.ndarray,
          share_lamps: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Colour (3, N) and unit normal (3, N) of visible points (3, N) on the solids `index` (N,).

    share_lamps: the points come in one run of equal length per point of the lamp, and each run is lit by its own point
    only; for samples of one pixel that are averaged later.
    """
    normals, base, (gloss, glow) = surfaces(scene, points, index)
    up = scene.room.to_world[1].astype(np.float32)[:, None]
    ambient = SKY * (0.86 + 0.14 * dot(normals, up)) * _openness(scene, points, normals)
    day = DAY * np.maximum(dot(normals, scene.daylight.astype(np.float32)[:, None]), 0)
    lamp, shine = _lamp_light(scene, points, normals, share_lamps)
    light = ambient + day + lamp
    colour = base * light * (1 - glow) + base * glow * 1.15 + gloss * shine
    return colour * scene.brightness.astype(np.float32)[:, None], normals


def _lamp_light(scene: Scene, points: np.ndarray, normals: np.ndarray, share_lamps: bool) -> np.ndarray:
    """Diffuse light and highlight (2, N), averaged over the points of the lamp."""
    x, y, z = scene.room.to_world
    frame = np.stack([x, -z, y])  # (3, 3): a right-handed frame seen from the camera whose third axis is up
    total, number = np.zeros((2, points.shape[1]), np.float32), len(scene.lamps)
    length = points.shape[1] // number
    for i, lamp in enumerate(scene.lamps):
        run = slice(i * length, (i + 1) * length) if share_lamps else slice(None)
        here, normal = points[:, run], normals[:, run]
        towards = lamp.astype(np.float32)[:, None] - here
        square = dot(towards, towards)
        towards = towards / np.sqrt(square)
        facing = dot(normal, towards)
        front = np.flatnonzero(facing > 0)
        seen = front[lit(scene.solids, lamp, frame, here[:, front])]
        half = unit(towards[:, seen] + unit(-here[:, seen]))
        highlight = np.maximum(dot(half, normal[:, seen]), 0) ** 64
        total[:, run][:, seen] += np.stack([facing[seen], highlight]) / (1 + scene.falloff * square[seen])
    return total * (LAMP if share_lamps else LAMP / number)


def _openness(scene: Scene, points: np.ndarray, normals: np.ndarray) -> np.ndarray:
    """How much of the room a point sees (N,), 0..1: less within half a metre of walls, floor and ceiling."""
    room = scene.room
    x, y, z = rows(room.to_world, points) + room.eye.astype(np.float32)[:, None]
    facing = np.abs(rows(room.to_world, normals))
    open_ = np.ones_like(x)
    for distance, along in ((np.minimum(y, room.height - y), 1), (room.width / 2 - np.abs(x), 0), (z + room.depth, 2)):
        near = np.clip(1 - distance / 0.5, 0, 1)
        open_ = open_ * (1 - 0.4 * near * near * (1 - facing[along]))  # a wall does not darken itself
    return open_
