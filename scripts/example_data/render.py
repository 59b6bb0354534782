"""One scene to an image and its label maps.

Camera: pinhole, square pixels, principal point in the middle, focal length LENS * sqrt(height * width) pixels. Camera
coordinates: x right, y up, z towards the camera, so that a visible surface's normal has a positive z on the optical
axis, and a horizontal flip of the picture negates x. Depth is z-depth, the distance along the optical axis.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.ndimage import gaussian_filter

from evaluation.boundary.thinning import thin
from scripts.example_data.geometry import first_hit
from scripts.example_data.labels import BODY_PARTS, LABELS
from scripts.example_data.scene import Scene, build_scene
from scripts.example_data.shading import shade
from scripts.example_data.street import STREET_IDS, build_street
from scripts.example_data.vehicles import annotation

LENS = 0.95         # focal length / sqrt(height * width): about 60 degrees across for a 4:3 picture
BASELINE = 0.22     # metres between the two cameras of a street
GAMMA = 1 / 2.2
SUBSAMPLES = np.array([(-0.375, -0.125), (0.125, -0.375), (0.375, 0.125), (-0.125, 0.375)])  # rotated grid, pixels
# Slices that select each pixel that has a right neighbour, and that neighbour; then the same for those below.
NEIGHBOURS = ((np.s_[:, :-1], np.s_[:, 1:]), (np.s_[:-1], np.s_[1:]))


@dataclass(frozen=True)
class Rendered:
    """All maps of one scene, H x W."""

    image: np.ndarray           # uint8 (H, W, 3), RGB
    depth_m: np.ndarray         # float32, metres
    normals: np.ndarray         # float32 (H, W, 3), unit, camera coordinates
    nyud_semseg: np.ndarray     # uint8 1..40
    pascal_semseg: np.ndarray   # uint8 0..20
    label_map: np.ndarray       # uint16, ids in the style of PASCAL-Context
    instances: np.ndarray       # int32, index into `names`
    part_names: np.ndarray      # uint8, 0 or 1 + index in labels.PART_NAMES
    part_map: np.ndarray        # uint8, the six body parts, 0 elsewhere
    saliency: np.ndarray        # uint8 0..255, soft
    edge: np.ndarray            # bool, one pixel thin
    names: list[str]            # label name per instance, key of labels.LABELS


class StreetView(NamedTuple):
    """The maps of a street, H x W, as Cityscapes stores them."""

    image: np.ndarray           # uint8 (H, W, 3), RGB
    label_ids: np.ndarray       # uint8, ids of the label files
    disparity: np.ndarray       # uint16, 256 * pixels + 1; 0: sky, and what the right camera does not see
    boxes: dict                 # the vehicles in space and the camera, as an annotation file holds them


def view_rays(size: tuple[int, int], rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Directions (3, N) float32 with z = -1 through the positions rows, columns (N,) of a picture of size (H, W)
    pixels; 0 = centre of the first.
    """
    focal = LENS * float(np.sqrt(size[0] * size[1]))    # pixels
    u = (columns + 0.5 - size[1] / 2) / focal
    v = (size[0] / 2 - 0.5 - rows) / focal
    return np.stack([u, v, np.full_like(u, -1)]).astype(np.float32)


def render_scene(seed: int | list[int], size: tuple[int, int], style: str = "nyud") -> Rendered:
    """Draw the scene of `seed` at size (H, W) pixels; style: key of scene.PEOPLE.

    The scene depends on seed and style alone; a larger size only samples it more finely.
    """
    geometry, sensor = np.random.SeedSequence(seed).spawn(2)
    scene = build_scene(np.random.default_rng(geometry), style)
    image, points, normals, index = _photograph(scene, size, np.random.default_rng(sensor))
    maps = _label_maps(scene, index)
    return Rendered(
        image=image,
        depth_m=-points[..., 2],
        normals=normals,
        saliency=_saliency(scene.room.names, maps["instances"]),
        edge=_boundaries(maps["instances"], points, normals),
        names=scene.room.names,
        **maps,
    )


def render_street(seed: int | list[int], size: tuple[int, int]) -> StreetView:
    """Draw the street of `seed` at size (H, W) pixels, as `render_scene` draws a room."""
    geometry, sensor = np.random.SeedSequence(seed).spawn(2)
    scene = build_street(np.random.default_rng(geometry))
    image, points, _, index = _photograph(scene, size, np.random.default_rng(sensor))
    ids = np.array([STREET_IDS[scene.room.names[solid.instance]] for solid in scene.solids], np.uint8)[index]
    focal = LENS * float(np.sqrt(size[0] * size[1]))                                       # pixels
    disparity = focal * BASELINE / -points[..., 2]
    stored = np.rint(256 * disparity + 1).astype(np.uint16)
    stored[~_matched(disparity) | (ids == STREET_IDS["sky"])] = 0
    instances = np.array([solid.instance for solid in scene.solids])[index]
    return StreetView(image, ids, stored, annotation(scene.room, scene.room.vehicles, instances, focal))


def _matched(disparity: np.ndarray) -> np.ndarray:
    """Bool (H, W): the point is inside the right camera's picture, and nothing nearer hides it there."""
    rows, columns = np.indices(disparity.shape)
    there = np.rint(columns - disparity).astype(int)
    nearest = np.zeros_like(disparity)
    inside = there >= 0
    np.maximum.at(nearest, (rows[inside], there[inside]), disparity[inside])
    return inside & (disparity > nearest[rows, np.maximum(there, 0)] - 1)


def _photograph(scene: Scene, size: tuple[int, int], sensor: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Image (H, W, 3) uint8, points and normals (H, W, 3) in camera coordinates, index of the solid (H, W)."""
    rays = view_rays(size, *np.indices(size).reshape(2, -1))    # (3, H*W)
    depth, index = first_hit(scene.solids, rays)
    assert (index >= 0).all(), "a ray left the scene"
    points = rays * depth
    colour, normals = shade(scene, points, index)
    colour = _refine(scene, size, colour.reshape(3, *size))
    points, normals = (a.reshape(3, *size).transpose(1, 2, 0) for a in (points, normals))    # (3, H*W) -> (H, W, 3)
    return _develop(colour, sensor), points, normals, index.reshape(size)


def _refine(scene: Scene, size: tuple[int, int], colour: np.ndarray) -> np.ndarray:
    """Average four rays per pixel where colour (3, H, W) differs much from a neighbour's: outlines, shadows, fine
    texture.
    """
    shown = (np.clip(colour, 0, 1) ** GAMMA).transpose(1, 2, 0)    # (H, W, 3)
    rough = np.zeros(size, bool)
    for here, there in NEIGHBOURS:
        step = np.abs(shown[there] - shown[here]).max(-1) > 0.1
        rough[here] |= step
        rough[there] |= step
    pixels = np.argwhere(rough)
    if not pixels.size:
        return colour
    samples = (SUBSAMPLES[:, None] + pixels).reshape(-1, 2)    # (4, N, 2) -> (4*N, 2): row, column
    rays = view_rays(size, *samples.T)
    depth, index = first_hit(scene.solids, rays)
    fine, _ = shade(scene, rays * depth, index, share_lamps=True)
    colour[:, rough] = np.minimum(fine, 1).reshape(3, len(SUBSAMPLES), -1).mean(1)    # (3, 4, N) -> (3, N)
    return colour


def _develop(colour: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Linear (3, H, W) to 8-bit (H, W, 3): darker towards the corners, tone curve, a little sensor noise."""
    _, height, width = colour.shape
    v, u = np.indices((height, width), dtype=np.float32)
    off_centre = ((u - width / 2) ** 2 + (v - height / 2) ** 2) / (width * height)
    shown = np.clip(colour * (1 - 0.12 * off_centre), 0, 1) ** GAMMA
    shown = shown + rng.normal(0, 0.008, shown.shape).astype(np.float32)
    return _to_uint8(shown).transpose(1, 2, 0)    # (3, H, W) -> (H, W, 3)


def _to_uint8(values: np.ndarray) -> np.ndarray:
    """0..1, where need be clipped, to 0..255."""
    return (np.clip(values, 0, 1) * 255 + 0.5).astype(np.uint8)


def _label_maps(scene: Scene, index: np.ndarray) -> dict[str, np.ndarray]:
    """Class, instance and part maps (H, W) from the map of solids."""
    labels = [LABELS[scene.room.names[solid.instance]] for solid in scene.solids]
    part = np.array([solid.part for solid in scene.solids], np.uint8)[index]
    return {
        "nyud_semseg": np.array([label.nyud for label in labels], np.uint8)[index],
        "pascal_semseg": np.array([label.pascal for label in labels], np.uint8)[index],
        "label_map": np.array([label.context for label in labels], np.uint16)[index],
        "instances": np.array([solid.instance for solid in scene.solids], np.int32)[index],
        "part_names": part,
        "part_map": np.array((0, *BODY_PARTS.values()), np.uint8)[part],
    }


def _saliency(names: list[str], instances: np.ndarray) -> np.ndarray:
    """Soft saliency (H, W) 0..255: people and animals first, else the things that are large and central.

    A thing's score is its class's salience times how central and how large it is; scores are relative to the best in
    the picture and everything far below that is background. Outlines are blurred by 1 % of the picture's size.
    """
    height, width = instances.shape
    v, u = np.indices(instances.shape)
    area = np.maximum(np.bincount(instances.ravel(), minlength=len(names)), 1)
    off = ((u + 0.5) / width - 0.5) ** 2 + ((v + 0.5) / height - 0.5) ** 2
    off = np.bincount(instances.ravel(), off.ravel(), len(names)) / area    # mean squared distance from the middle
    share = np.minimum(area / area.sum() / 0.02, 1)
    score = np.array([LABELS[name].salience for name in names]) * np.exp(-3 * off) * np.sqrt(share)
    score = score / max(score.max(), 1e-6)
    strength = np.clip((score - 0.35) / 0.35, 0, 1).astype(np.float32)
    return _to_uint8(gaussian_filter(strength[instances], 0.01 * np.sqrt(height * width)))


def _boundaries(instances: np.ndarray, points: np.ndarray, normals: np.ndarray) -> np.ndarray:
    """One-pixel boundaries (H, W) bool between instances and at steps in depth, on the nearer side.

    Two neighbours are on one surface when each of their points (H, W, 3) lies close to the other's tangent plane; a
    step in depth is a neighbour off both planes by more than 4 cm + 1 % of the depth.
    """
    edge, depth_m = np.zeros(instances.shape, bool), -points[..., 2]
    for here, there in NEIGHBOURS:
        apart = points[there] - points[here]
        off = np.minimum(np.abs((apart * normals[here]).sum(-1)), np.abs((apart * normals[there]).sum(-1)))
        step = (instances[here] != instances[there]) | (off > 0.04 + 0.01 * depth_m[here])
        nearer = depth_m[here] <= depth_m[there]
        edge[here] |= step & nearer
        edge[there] |= step & ~nearer
    return thin(edge)
