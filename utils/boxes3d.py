"""Vehicles as boxes in space, seen by one camera: what labels and predictions of 3-D detection hold, and its geometry.

Four systems of coordinates (Cityscapes 3D, Gaehlert et al., arXiv 2006.07864), lengths in metres:

    V  vehicle: x forward, y left, z up, origin on the ground below the rear axle; annotations and result files
    C  camera: axes as V, origin in the camera; p_C = T (p_V, 1), where T (3, 4) is the sensor's matrix
    S  view: origin in the camera, x right, y down, z forward; what the network predicts in
    I  image: (u, v) in pixels, and the depth z of S

A box has a centre, length, width and height along its own axes (those of V where it is not turned) and a rotation.
Three angles stand for a rotation in S: R = R_z(a) R_x(b) R_y(c). TaskPrompter's program takes them of another rotation,
because it reads the quaternion (w, x, y, z) as (x, y, z, w): the reading "original", which its released weights need.
Functions keep the dtype, take any leading dimensions, and quaternions are (w, x, y, z).
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

Reading = Literal["correct", "original"]
OF_VEHICLES = ("labels", "centers", "projected", "sizes", "angles", "modal", "amodal")      # one row for each
NEAREST_M = 0.01            # what lies nearer to the camera's plane than this is not projected
CORNERS = ((-1, 1, -1), (-1, -1, -1), (1, -1, -1), (1, 1, -1), (-1, 1, 1), (-1, -1, 1), (1, -1, 1), (1, 1, 1))
EDGES = ((0, 1), (1, 2), (2, 3), (3, 0), (4, 5), (5, 6), (6, 7), (7, 4), (0, 4), (1, 5), (2, 6), (3, 7))
VIEW_AXES = ((0.0, -1.0, 0.0), (0.0, 0.0, -1.0), (1.0, 0.0, 0.0))          # rows: the axes of S in C


class Boxes3D(NamedTuple):
    """The vehicles of one image, n of them (also 0), and its camera: a label, or with `scores` a prediction.

    labels (n,) long, 0..5 of `data.boxes_file.VEHICLES`. centers (n, 3): x, y, z in S. projected (n, 3): u, v, z.
    sizes (n, 3): length, width, height. angles (n, 3): a, b, c of the rotation in S. modal, amodal (n, 4): xmin, ymin,
    xmax, ymax of the visible part and of the whole vehicle. intrinsics (3, 3): K; sensor (3, 4): T, NaN where nobody
    knows whether there are vehicles; image_size (2,) long: H, W. All pixels are those of an image of this size.
    ignore (m, 4): regions in which vehicles are not told apart. reading: what the angles are. Labels are float64.
    """

    labels: Tensor
    centers: Tensor
    projected: Tensor
    sizes: Tensor
    angles: Tensor
    modal: Tensor
    amodal: Tensor
    intrinsics: Tensor
    sensor: Tensor
    image_size: Tensor
    ignore: Tensor | None = None
    scores: Tensor | None = None
    reading: Reading = "correct"

    def __reduce__(self) -> tuple:
        """Between processes by value: sent as tensors, every field of every image would hold a file open."""
        return _from_arrays, tuple(value.cpu().numpy() if isinstance(value, Tensor) else value for value in self)

    @property
    def is_known(self) -> bool:
        """Whether somebody has looked for vehicles in this image."""
        return not self.sensor.isnan().any()

    def select(self, index: Tensor) -> "Boxes3D":
        """Some of the vehicles: by index, or by a mask."""
        chosen = {name: getattr(self, name)[index] for name in OF_VEHICLES}
        return self._replace(**chosen, scores=None if self.scores is None else self.scores[index])

    def rotations(self) -> Tensor:
        """Matrices in S, (n, 3, 3)."""
        return quaternion_to_matrix(angles_to_quaternion(self.angles, self.reading))

    def corners(self) -> Tensor:
        """In S, (n, 8, 3), in the order of `CORNERS`."""
        return corners_in_view(self.centers, self.sizes, self.rotations())

    def in_vehicle(self) -> tuple[Tensor, Tensor]:
        """Centres (n, 3) and quaternions (n, 4) in V."""
        rotations = view_to_vehicle_rotation(self.rotations(), self.sensor)
        return camera_to_vehicle(view_to_camera(self.centers), self.sensor), matrix_to_quaternion(rotations)


def _from_arrays(*values: object) -> Boxes3D:
    return Boxes3D(*(value if value is None or isinstance(value, str) else torch.from_numpy(value)
                     for value in values))


class Detections3D(NamedTuple):
    """What a network found in one image, n vehicles, the surest of a class first.

    boxes (n, 9): x, y, z in S, length, width, height, angles a, b, c. scores (n,) in 0..1. labels (n,) long.
    projected (n, 3): u, v, z of the centre. boxes2d (n, 4): xmin, ymin, xmax, ymax of the visible part. Pixels as in
    `Boxes3D`.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    projected: Tensor
    boxes2d: Tensor


# Points -----------------------------------------------------------------------------------------------------------


def view_axes(like: Tensor) -> Tensor:
    """A (3, 3): p_S = A p_C."""
    return torch.tensor(VIEW_AXES, dtype=like.dtype, device=like.device)


def vehicle_to_camera(points: Tensor, sensor: Tensor) -> Tensor:
    """V -> C, (..., 3)."""
    return points @ sensor[:, :3].T + sensor[:, 3]


def camera_to_vehicle(points: Tensor, sensor: Tensor) -> Tensor:
    """C -> V, (..., 3)."""
    return (points - sensor[:, 3]) @ torch.linalg.inv(sensor[:, :3]).T


def camera_to_view(points: Tensor) -> Tensor:
    """C -> S, (..., 3)."""
    return points @ view_axes(points).T


def view_to_camera(points: Tensor) -> Tensor:
    """S -> C, (..., 3)."""
    return points @ view_axes(points)


def view_to_image(points: Tensor, intrinsics: Tensor) -> Tensor:
    """S -> I: (..., 3) to (..., 3), u, v and z."""
    focal, centre = intrinsics.diagonal()[:2], intrinsics[:2, 2]
    return torch.cat([focal * points[..., :2] / points[..., 2:] + centre, points[..., 2:]], dim=-1)


def image_to_view(points: Tensor, intrinsics: Tensor) -> Tensor:
    """I -> S: (..., 3), u, v and z, to (..., 3)."""
    focal, centre = intrinsics.diagonal()[:2], intrinsics[:2, 2]
    return torch.cat([(points[..., :2] - centre) / focal * points[..., 2:], points[..., 2:]], dim=-1)


# Rotations --------------------------------------------------------------------------------------------------------


def vehicle_to_view_rotation(rotation: Tensor, sensor: Tensor) -> Tensor:
    """Matrices (..., 3, 3) of V in S: R_S = A T R_V A^T."""
    axes = view_axes(rotation)
    return axes @ sensor[:, :3] @ rotation @ axes.T


def view_to_vehicle_rotation(rotation: Tensor, sensor: Tensor) -> Tensor:
    """Matrices (..., 3, 3) of S in V."""
    axes = view_axes(rotation)
    return torch.linalg.inv(sensor[:, :3]) @ axes.T @ rotation @ axes


def quaternion_to_matrix(quaternion: Tensor) -> Tensor:
    """(..., 4) of any length but 0 -> (..., 3, 3)."""
    w, x, y, z = (quaternion / quaternion.norm(dim=-1, keepdim=True)).unbind(-1)
    rows = (1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y),
            2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x),
            2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y))
    return torch.stack(rows, dim=-1).unflatten(-1, (3, 3))


def matrix_to_quaternion(matrix: Tensor) -> Tensor:
    """(..., 3, 3) -> (..., 4) of length 1 with w >= 0."""
    m = matrix.flatten(-2).unbind(-1)
    # Four times the products of the quaternion's entries: each row is the quaternion times one entry, so that of the
    # largest entry is the most exact.
    table = torch.stack([1 + m[0] + m[4] + m[8], m[7] - m[5], m[2] - m[6], m[3] - m[1],
                         m[7] - m[5], 1 + m[0] - m[4] - m[8], m[1] + m[3], m[2] + m[6],
                         m[2] - m[6], m[1] + m[3], 1 - m[0] + m[4] - m[8], m[5] + m[7],
                         m[3] - m[1], m[2] + m[6], m[5] + m[7], 1 - m[0] - m[4] + m[8]], dim=-1).unflatten(-1, (4, 4))
    largest = table.diagonal(dim1=-2, dim2=-1).argmax(dim=-1)[..., None, None].expand(*matrix.shape[:-2], 1, 4)
    row = table.gather(-2, largest).squeeze(-2)
    row = row / row.norm(dim=-1, keepdim=True)
    return torch.where(row[..., :1] < 0, -row, row)


def quaternion_to_angles(quaternion: Tensor, reading: Reading = "correct") -> Tensor:
    """Quaternions of length 1 (..., 4) of rotations in S -> a, b, c (..., 3)."""
    w, x, y, z = _as_read(quaternion, reading).unbind(-1)
    return torch.stack([torch.atan2(2 * (w * z - x * y), 1 - 2 * (x * x + z * z)),
                        torch.asin((2 * (y * z + w * x)).clamp(-1, 1)),
                        torch.atan2(2 * (w * y - x * z), 1 - 2 * (x * x + y * y))], dim=-1)


def angles_to_quaternion(angles: Tensor, reading: Reading = "correct") -> Tensor:
    """a, b, c (..., 3) -> quaternions (..., 4) in S; the inverse of `quaternion_to_angles`, up to the sign."""
    (sa, sb, sc), (ca, cb, cc) = ((angles / 2).sin().unbind(-1), (angles / 2).cos().unbind(-1))
    quaternion = torch.stack([ca * cb * cc - sa * sb * sc, ca * sb * cc - sa * cb * sc,
                              ca * cb * sc + sa * sb * cc, sa * cb * cc + ca * sb * sc], dim=-1)
    return quaternion if reading == "correct" else quaternion.roll(-1, dims=-1)      # (W, X, Y, Z) -> (X, Y, Z, W)


def _as_read(quaternion: Tensor, reading: Reading) -> Tensor:
    """(w, x, y, z) as the reading takes the four numbers of the file."""
    return quaternion if reading == "correct" else quaternion.roll(1, dims=-1)


# Boxes ------------------------------------------------------------------------------------------------------------


def corners(centers: Tensor, sizes: Tensor, rotations: Tensor) -> Tensor:
    """Boxes (n, 3), (n, 3), (n, 3, 3) in V -> (n, 8, 3), in the order of `CORNERS`: back left bottom first."""
    signs = torch.tensor(CORNERS, dtype=sizes.dtype, device=sizes.device)
    return (signs * sizes[:, None] / 2) @ rotations.mT + centers[:, None]


def corners_in_view(centers: Tensor, sizes: Tensor, rotations: Tensor) -> Tensor:
    """Boxes of S, whose sizes are along the axes that V has -> (n, 8, 3) in S."""
    axes = view_axes(sizes)
    return corners(centers @ axes, sizes, axes.T @ rotations @ axes) @ axes.T


def amodal_boxes(corners_S: Tensor, intrinsics: Tensor, image_size: Tensor) -> Tensor:
    """Rectangles (n, 4) around what lies before the camera of boxes with these corners (n, 8, 3) in S.

    Edges are cut `NEAREST_M` before the camera; xmin, ymin, xmax, ymax are clamped to 0..W-1 and 0..H-1; a box that
    lies behind the camera has 0, 0, 0, 0.
    """
    start, end = (corners_S[:, list(index)] for index in zip(*EDGES, strict=True))          # (n, 12, 3)
    before, crossing = corners_S[..., 2] > NEAREST_M, (start[..., 2] > NEAREST_M) != (end[..., 2] > NEAREST_M)
    rise = torch.where(crossing, end[..., 2] - start[..., 2], 1.0)
    cuts = start + ((NEAREST_M - start[..., 2]) / rise)[..., None] * (end - start)
    shown = torch.cat([before, crossing], dim=1)                                            # (n, 20)
    points = torch.cat([corners_S, cuts], dim=1)
    points = torch.where(shown[..., None], points, 1.0)                                     # nothing is divided by 0
    pixels = view_to_image(points, intrinsics)[..., :2]
    low = torch.where(shown[..., None], pixels, torch.inf).amin(dim=1)
    high = torch.where(shown[..., None], pixels, -torch.inf).amax(dim=1)
    limit = image_size.to(pixels).flip(0).sub(1).repeat(2)                                  # W-1, H-1, W-1, H-1
    boxes = torch.cat([low, high], dim=1).clamp(min=0).minimum(limit)
    return torch.where(before.any(dim=1, keepdim=True), boxes, 0.0)
