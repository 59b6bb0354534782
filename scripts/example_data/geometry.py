"""Solids and rays: which solid a ray meets first, and which points a light reaches.

Every solid is an affine image of a unit shape inside the cube [-1, 1]^3, so an intersection is computed in the unit
frame and the ray parameter t carries over unchanged. All rays of a call start at one point (the camera or a light);
in the plane before that point each solid covers a bounding rectangle, and only rays inside it are tested. Arrays are
float32 with one row per component: points and directions are (3, N).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from scripts.example_data.texture import Material

NEAR = 0.05  # metres before a ray's origin inside which a rectangle is not trusted
CORNERS = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], np.float64).T  # (3, 8)


def rows(matrix: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """matrix (3, 3) times vectors (3, N), without BLAS: its rounding may depend on the number of threads."""
    columns = matrix.astype(np.float32)[:, :, None]  # (3, 3, 1)
    return columns[:, 0] * vectors[0] + columns[:, 1] * vectors[1] + columns[:, 2] * vectors[2]


def dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Dot products over the first axis: (3, N), (3, N) -> (N,)."""
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def unit(vectors: np.ndarray) -> np.ndarray:
    """Vectors (3, N) scaled to length one."""
    return vectors / np.sqrt(dot(vectors, vectors))


def rotation(axis: str, angle: float) -> np.ndarray:
    """Turn (3, 3) by `angle` radians about "x" (y towards z), "y" (z towards x) or "z" (x towards y)."""
    first, second = {"x": (1, 2), "y": (2, 0), "z": (0, 1)}[axis]
    matrix = np.eye(3)
    matrix[first, first] = matrix[second, second] = np.cos(angle)
    matrix[first, second], matrix[second, first] = -np.sin(angle), np.sin(angle)
    return matrix


@dataclass(frozen=True)
class Solid:
    """A box, ellipsoid or cylinder with its labels."""

    kind: str                           # "box", "ellipsoid" or "cylinder" (about its own y axis)
    centre: np.ndarray                  # (3,), metres
    axes: np.ndarray                    # (3, 3), columns are the half axes in metres
    material: Material
    instance: int                       # index of the thing it belongs to
    part: int = 0                       # 0, or 1 + index in labels.PART_NAMES
    taper: float = 1.0                  # of a cylinder: top radius / bottom radius
    casts_shadow: bool = True
    inverse: np.ndarray | None = None   # (3, 3), metres -> unit frame; computed from `axes`

    def __post_init__(self):
        if self.inverse is None:
            object.__setattr__(self, "inverse", np.linalg.inv(self.axes))

    def moved(self, rotation: np.ndarray, origin: np.ndarray) -> "Solid":
        """The solid seen from `origin` (3,) in the frame whose axes are the rows of `rotation` (3, 3)."""
        return replace(self, centre=rotation @ (self.centre - origin), axes=rotation @ self.axes,
                       inverse=self.inverse @ rotation.T)

    def enter(self, origin: np.ndarray, directions: np.ndarray) -> np.ndarray:
        """Ray parameter (N,) where rays origin (3,) + t * directions (3, N) enter the solid; inf where they miss."""
        start = (self.inverse @ (origin - self.centre)).astype(np.float32)
        d = rows(self.inverse, directions)  # (3, N) in the unit frame
        if self.kind == "box":
            return _enter_box(start, d)
        if self.kind == "ellipsoid":
            return _enter_sphere(start, d)
        return _enter_cylinder(start, d, self.taper)

    def surface(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """At points (3, N) on the surface: outward unit normals (3, N), and position in metres and normal in the
        solid's own frame (3, N), which is where textures live.
        """
        local = rows(self.inverse, points - self.centre.astype(np.float32)[:, None])
        if self.kind == "box":
            axis = np.abs(local).argmax(0)
            inner = np.where(np.arange(3)[:, None] == axis, np.sign(local), 0).astype(np.float32)
        elif self.kind == "ellipsoid":
            inner = local
        else:
            inner = _cylinder_normal(local, self.taper)
        lengths = np.linalg.norm(self.axes, axis=0).astype(np.float32)[:, None]  # (3, 1) metres per unit
        return unit(rows(self.inverse.T, inner)), local * lengths, inner


def _enter_box(start: np.ndarray, d: np.ndarray) -> np.ndarray:
    d = np.where(np.abs(d) < 1e-12, np.float32(1e-12), d)  # a ray parallel to a face: 1 / d stays finite
    inverse = 1 / d
    middle, half = -start[:, None] * inverse, np.abs(inverse)
    near, far = (middle - half).max(0), (middle + half).min(0)
    return np.where((near < far) & (near > 0), near, np.inf)


def _enter_sphere(start: np.ndarray, d: np.ndarray) -> np.ndarray:
    square = dot(d, d)
    closest = -dot(start[:, None], d) / square
    foot = start[:, None] + closest * d  # from the foot of the perpendicular: no cancellation far away
    inside = 1 - dot(foot, foot)
    t = closest - np.sqrt(np.maximum(inside, 0) / square)
    return np.where((inside > 0) & (t > 0), t, np.inf)


def _enter_cylinder(start: np.ndarray, d: np.ndarray, taper: float) -> np.ndarray:
    (sx, sy, sz), (dx, dy, dz) = start, d
    mean, slope = np.float32((1 + taper) / 2), np.float32((taper - 1) / 2)  # radius = mean + slope * y
    radius = mean + slope * sy
    a = dx * dx + dz * dz - slope * slope * dy * dy
    a = np.where(np.abs(a) < 1e-12, np.float32(1e-12), a)
    b = sx * dx + sz * dz - radius * slope * dy
    root = b * b - a * (sx * sx + sz * sz - radius * radius)
    real, root = root > 0, np.sqrt(np.maximum(root, 0))
    best = np.full(dy.shape, np.inf, np.float32)
    for t in ((-b - root) / a, (-b + root) / a):
        best = np.where(real & (np.abs(sy + t * dy) <= 1) & (t > 0) & (t < best), t, best)
    safe = np.where(np.abs(dy) < 1e-12, np.float32(1e-12), dy)
    for y in (-1, 1):
        t = (y - sy) / safe
        inside = (sx + t * dx) ** 2 + (sz + t * dz) ** 2 <= (mean + slope * y) ** 2
        best = np.where(inside & (t > 0) & (t < best), t, best)
    return best


def _cylinder_normal(local: np.ndarray, taper: float) -> np.ndarray:
    x, y, z = local
    slope = (taper - 1) / 2
    radius = (1 + taper) / 2 + slope * y
    rho = np.sqrt(x * x + z * z)
    cap = 1 - np.abs(y) < np.abs(radius - rho)  # nearer to a lid than to the side
    side = np.stack([x, -slope * radius, z])
    lid = np.stack([np.zeros_like(y), np.sign(y), np.zeros_like(y)])
    return np.where(cap, lid, side).astype(np.float32)


def meetings(solids: list[Solid], origin: np.ndarray, frame: np.ndarray, rays: np.ndarray) -> Iterator:
    """Every solid with its index and the indices of the rays that may meet it: those inside the rectangle that holds
    its picture, seen from `origin` along -z of `frame`.

    rays: (3, N) directions from `origin` in `frame`, z < 0.
    """
    centres = np.stack([solid.centre for solid in solids]) - origin
    corners = centres[:, :, None] + np.stack([solid.axes for solid in solids]) @ CORNERS    # (S, 3, 8)
    corners = corners.transpose(1, 0, 2).reshape(3, -1)    # (S, 3, 8) -> (3, S*8)
    x, y, z = np.einsum("ij,jn->in", frame, corners).reshape(3, len(solids), 8)
    ahead = (-z).min(1) > NEAR    # one that reaches behind the eye has no finite rectangle
    z = np.where(ahead[:, None], z, -1)
    u, v = x / -z, y / -z
    rectangles = np.stack([u.min(1), u.max(1), v.min(1), v.max(1)], axis=1)
    rectangles = np.where(ahead[:, None], rectangles, (-np.inf, np.inf, -np.inf, np.inf)).astype(np.float32)
    order = np.argsort(rays[0] / -rays[2], kind="stable")    # by u: the rays inside are found without looking at all
    u, v = rays[:2, order] / -rays[2, order]
    for i, (u0, u1, v0, v1) in enumerate(rectangles):
        first, last = np.searchsorted(u, u0), np.searchsorted(u, u1, "right")
        inside = order[first:last][(v[first:last] >= v0) & (v[first:last] <= v1)]
        if inside.size:
            yield i, solids[i], inside


def first_hit(solids: list[Solid], directions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What rays from (0, 0, 0) along directions (3, N) with z = -1 meet first.

    Returns t (N,) float32 (= z-depth in metres, inf for nothing) and the index of the solid (N,) int32 (-1: none).
    """
    origin = np.zeros(3)
    best = np.full(directions.shape[1], np.inf, np.float32)
    index = np.full(directions.shape[1], -1, np.int32)
    for i, solid, rays in meetings(solids, origin, np.eye(3), directions):
        t = solid.enter(origin, directions[:, rays])
        closer = t < best[rays]
        best[rays[closer]], index[rays[closer]] = t[closer], i
    return best, index


def lit(solids: list[Solid], light: np.ndarray, frame: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Bool (N,): no solid stands between `light` (3,) and points (3, N).

    frame: (3, 3), its third row points away from what the light shines on (up, for a ceiling lamp). Points level
    with the light or behind it count as lit.
    """
    solids = [solid for solid in solids if solid.casts_shadow]
    to_point = points - light.astype(np.float32)[:, None]
    turned = rows(frame, to_point)
    clear = np.ones(points.shape[1], bool)
    below = np.flatnonzero(-turned[2] > NEAR)
    for _, solid, rays in meetings(solids, light, frame, turned[:, below]):
        rays = below[rays]
        rays = rays[clear[rays]]
        t = solid.enter(light, to_point[:, rays])
        clear[rays[t < 0.997]] = False  # 0.3 % short of the point, so that no surface shades itself
    return clear
