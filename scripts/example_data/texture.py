"""Procedural colours: wood, planks, checks, stripes, tiles, noise, books, leaves, sky, pictures, screens.

A texture is a function of the position on a surface in metres, so it does not depend on the picture's size.
"""

from typing import NamedTuple

import numpy as np

# One fixed table of random numbers serves every lattice; a material's `shift` moves the window on it.
TABLE = np.random.default_rng(7).random((64, 64), np.float32)


class Material(NamedTuple):
    """What a surface looks like: a pattern of two colours, and how it shines."""

    kind: str                                   # key of MIXES or PAINTINGS
    first: np.ndarray                           # (3,) linear RGB 0..1
    second: np.ndarray
    cell: tuple[float, float] = (0.1, 0.1)      # period of the pattern (u, v), metres
    shift: tuple[float, float] = (0.0, 0.0)     # offset of the pattern, periods
    gloss: float = 0.0                          # strength of the highlight
    glow: float = 0.0                           # light given off, 0..1


def noise(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Smooth value noise 0..1 with period-one lattice at (u, v), each (N,)."""
    iu, iv = np.floor(u), np.floor(v)
    fu, fv = u - iu, v - iv
    fu, fv = fu * fu * (3 - 2 * fu), fv * fv * (3 - 2 * fv)
    low, low_right = cells(iu, iv), cells(iu + 1, iv)
    high, high_right = cells(iu, iv + 1), cells(iu + 1, iv + 1)
    low, high = low + fu * (low_right - low), high + fu * (high_right - high)
    return low + fv * (high - low)


def cells(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """One random number 0..1 per unit cell."""
    return TABLE[np.floor(u).astype(np.int32) & 63, np.floor(v).astype(np.int32) & 63]


def _seam(x: np.ndarray, width: float) -> np.ndarray:
    return np.abs(x - np.round(x)) < width


def _wood(u, v):
    return 0.6 * noise(u, 9 * v) + 0.4 * noise(2.5 * u, 31 * v)


def _planks(u, v):
    row = np.floor(v)
    along = u * 0.2 + 0.37 * row    # boards are five widths long and staggered from row to row
    tone = 0.65 * cells(along, v) + 0.35 * _wood(u, v)
    return np.where(_seam(v, 0.03) | _seam(along, 0.006), 1.6, tone)


# Patterns that mix the two colours of a material; 0 gives the first, 1 the second, 1.3 is the second at 70 %
# brightness (seams).
MIXES = {
    "plain": lambda u, v: 0.15 * noise(3 * u, 3 * v),
    "wood": _wood,
    "planks": _planks,
    "checks": lambda u, v: ((np.floor(u) + np.floor(v)) % 2) + 0.1 * noise(5 * u, 5 * v),
    "stripes": lambda u, v: (np.floor(2 * u) % 2) + 0.1 * noise(8 * u, 8 * v),
    "tiles": lambda u, v: np.where(_seam(u, 0.025) | _seam(v, 0.025), 1.0,
                                   0.25 * cells(u, v) + 0.1 * noise(4 * u, 4 * v)),
    "panels": lambda u, v: np.where(_seam(u, 0.012) | _seam(v, 0.02), 1.3, 0.25 * _wood(v, u)),
    "facade": lambda u, v: np.where((np.abs(u - np.floor(u) - 0.5) < 0.27) & (np.abs(v - np.floor(v) - 0.5) < 0.24),
                                    1.0, 0.12 * noise(6 * u, 6 * v)),
    "noise": lambda u, v: 0.6 * noise(u, v) + 0.4 * noise(4 * u, 4 * v),
    "leaves": lambda u, v: np.clip(1.6 * noise(2 * u + 3 * v, 2 * v - 3 * u) - 0.3, 0, 1),
}


def _books(u, v, material):
    """Upright spines of many colours; dark above the top of each book."""
    pick = cells(u, np.zeros_like(u))
    hue = 6.2832 * (pick + 0.13 * cells(u, np.ones_like(u)))
    colour = np.stack([0.28 + 0.24 * np.cos(hue), 0.24 + 0.18 * np.cos(hue - 2.1), 0.22 + 0.2 * np.cos(hue - 4.2)])
    band = np.abs(v - 0.3) < 0.06
    colour = np.where(band, material.second[:, None], colour)
    return np.where(_seam(u, 0.07), 0.25 * colour, colour)


def _sky(u, v, material):
    """Pale horizon to blue with clouds, and dark tree tops below."""
    rise = np.clip(v + 0.5, 0, 1)
    colour = material.first[:, None] * (1 - rise) + material.second[:, None] * rise
    cloud = np.clip(2 * noise(5 * u, 9 * v) - 0.9, 0, 1)
    colour = colour + (0.95 - colour) * cloud
    trees = v < -0.3 + 0.25 * noise(6 * u, 0 * v) + 0.08 * noise(25 * u, 0 * v)
    return np.where(trees, np.float32([[0.06], [0.16], [0.05]]), colour)


def _picture(u, v, material):
    """An abstract painting: three flat fields with soft outlines."""
    field = noise(2.3 * u, 2.3 * v)[None]
    third = np.float32([[0.85], [0.82], [0.72]])
    colour = np.where(field < 0.4, material.first[:, None], np.where(field < 0.6, third, material.second[:, None]))
    return colour * (0.85 + 0.3 * noise(9 * u, 9 * v))


def _screen(u, v, material):
    """A bright show: sky gradient, a hill, a sun."""
    colour = material.first[:, None] * (0.5 - v) + material.second[:, None] * (0.5 + v)
    hill = v < -0.15 + 0.35 * (noise(2 * u, 0 * v) - 0.5)
    colour = np.where(hill, 0.5 * material.first[::-1, None], colour)
    return np.where((u - 0.2) ** 2 + (v - 0.22) ** 2 < 0.008, 0.95, colour)


# Patterns that choose their colours themselves.
PAINTINGS = {"books": _books, "sky": _sky, "picture": _picture, "screen": _screen}


def colours(material: Material, position: np.ndarray, normal: np.ndarray, radius: float = 0.0) -> np.ndarray:
    """Linear RGB (3, N) at positions (3, N) in metres with normals (3, N), both in the solid's own frame.

    radius: of a round solid, in metres; its side is unrolled about y. 0: a box, each face is mapped flat.
    """
    x, y, z = position
    if radius:
        side_u, side_v, lid = np.arctan2(x, z) * np.float32(radius), y, np.abs(normal[1]) > 0.95
    else:
        axis = np.abs(normal).argmax(0)
        side_u, side_v, lid = np.where(axis == 0, z, x), y, axis == 1
    u, v = np.where(lid, x, side_u), np.where(lid, z, side_v)
    u = u / np.float32(material.cell[0]) + np.float32(material.shift[0])
    v = v / np.float32(material.cell[1]) + np.float32(material.shift[1])
    if material.kind in PAINTINGS:
        return PAINTINGS[material.kind](u, v, material).astype(np.float32)
    mix = MIXES[material.kind](u, v).astype(np.float32)
    first, second = material.first[:, None], material.second[:, None]
    return (first + np.minimum(mix, 1) * (second - first)) * np.clip(2 - mix, 0, 1)
