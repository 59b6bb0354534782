"""Label rules of boxes in space: not a map but a list of vehicles, whose pixels follow the image.

Whatever is done to the picture is done to the camera: its intrinsics change, and so does everything in pixels, while
metres and angles stay. Mirroring also mirrors the world; it is derived, and tested with the official projection, since
the program that published this task never mirrors (TaskPrompter, Ye and Xu, ICLR 2023).
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.boxes_file import Reading, no_boxes, read_camera
from data.labels import LabelRules, same_aspect

if TYPE_CHECKING:
    from utils.boxes3d import Boxes3D

Size = tuple[int, int]
# A camera like that of Cityscapes, for photographs about which nothing is known: focal length and centre as shares of
# an image of 1024 x 2048 pixels, and a sensor 1.28 m above the ground that looks down by 0.038.
FOCAL, CENTRE, NOMINAL_SIZE = (2262.52, 2265.30), (1096.98, 513.137), (1024, 2048)
PITCH, PLACE = 0.038, (-1.65, -0.13, -1.28)
NOMINAL_SENSOR = ((math.cos(PITCH), 0.0, -math.sin(PITCH), PLACE[0]), (0.0, 1.0, 0.0, PLACE[1]),
                  (math.sin(PITCH), 0.0, math.cos(PITCH), PLACE[2]))
UNKNOWN = ((math.nan,) * 4,) * 3
MIRRORED_ANGLES = {"correct": (-1.0, 1.0, -1.0), "original": (1.0, -1.0, -1.0)}      # factors of a, b, c


@dataclass(frozen=True)
class Boxes3DLabel(LabelRules):
    """Of labels and predictions (`utils.boxes3d.Boxes3D`). reading: of the quaternions in the files.

    Where labels are missing there is a camera with a sensor of NaN; known of an image is its camera, without vehicles.
    """

    reading: Reading = "correct"

    def size_of(self, label: "Boxes3D") -> Size:
        return tuple(label.image_size.tolist())

    def same_view(self, label: Size, image: Size) -> bool:
        return same_aspect(label, image)

    def is_void(self, label: "Boxes3D") -> bool:
        return len(label.labels) == 0

    def known(self, label: "Boxes3D") -> dict[str, Any]:
        camera = label.select(slice(0))._replace(ignore=None, scores=None)
        return {"camera": camera if camera.is_known else self._nominal(self.size_of(label))}

    def fit(self, label: "Boxes3D", size: Size) -> "Boxes3D":
        return self.resize(label, size)

    def resize(self, label: "Boxes3D", size: Size) -> "Boxes3D":
        """Pixels lie at whole numbers, their corners between: u becomes (u + 0.5) * factor - 0.5."""
        height, width = self.size_of(label)
        factors = size[1] / width, size[0] / height
        if factors == (1.0, 1.0):
            return label
        return _moved(label, factors, [(factor - 1) / 2 for factor in factors], size)

    def crop(self, label: "Boxes3D", top: int, left: int, size: Size) -> "Boxes3D":
        """What is no longer seen is no vehicle any more; visible rectangles end where the picture does."""
        height, width = self.size_of(label)
        size = min(size[0], height - top), min(size[1], width - left)
        moved = _moved(label, (1.0, 1.0), (-left, -top), size)
        limits = moved.modal.new_tensor([size[1] - 1, size[0] - 1]).repeat(2)
        modal = moved.modal.clamp(min=0).minimum(limits)
        inside = (moved.modal[:, 2:] > 0).all(dim=1) & (moved.modal[:, :2] < limits[:2]).all(dim=1)
        return moved._replace(modal=modal).select(inside)

    def pad(self, label: "Boxes3D", frame: Size) -> "Boxes3D":
        height, width = self.size_of(label)
        return _moved(label, (1.0, 1.0), ((frame[1] - width) // 2, (frame[0] - height) // 2), frame)

    def flip(self, label: "Boxes3D") -> "Boxes3D":
        last = label.image_size[1].item() - 1
        projected, intrinsics = label.projected.clone(), label.intrinsics.clone()
        projected[:, 0], intrinsics[0, 2] = last - projected[:, 0], last - intrinsics[0, 2]
        rectangles = {name: None if value is None else _mirrored(value, last) for name, value in _rectangles(label)}
        return label._replace(
            centers=label.centers * label.centers.new_tensor([-1.0, 1.0, 1.0]),
            angles=label.angles * label.angles.new_tensor(MIRRORED_ANGLES[label.reading]),
            projected=projected, intrinsics=intrinsics, **rectangles,
            sensor=label.sensor * label.sensor.new_tensor([[1, -1, 1, 1], [-1, 1, -1, -1], [1, -1, 1, 1]]))

    def to_tensor(self, label: "Boxes3D") -> "Boxes3D":
        return label

    def absent(self, size: Size) -> "Boxes3D":
        """No vehicles, and a camera of which nothing is known."""
        label = self._nominal(size)
        return label._replace(sensor=label.sensor.new_tensor(UNKNOWN))

    def onto(self, prediction: "Boxes3D", known: Mapping[str, Any]) -> "Boxes3D":
        camera = known["camera"]
        (ax, _, au), (_, ay, av), _ = prediction.intrinsics.tolist()
        (bx, _, bu), (_, by, bv), _ = camera.intrinsics.tolist()
        factors = bx / ax, by / ay
        moved = _moved(prediction, factors, (bu - au * factors[0], bv - av * factors[1]), self.size_of(camera))
        return moved._replace(intrinsics=camera.intrinsics.to(prediction.intrinsics))

    def of_photograph(self, size: Size, camera: str = "") -> "Boxes3D":
        """A camera without vehicles: that of a file, or one like that of Cityscapes."""
        return self.resize(read_camera(Path(camera), self.reading), size) if camera else self._nominal(size)

    def _nominal(self, size: Size) -> "Boxes3D":
        intrinsics = [[FOCAL[0], 0.0, CENTRE[0]], [0.0, FOCAL[1], CENTRE[1]], [0.0, 0.0, 1.0]]
        return self.resize(no_boxes(intrinsics, NOMINAL_SENSOR, NOMINAL_SIZE, self.reading), size)


def _moved(label: "Boxes3D", factors: Any, shifts: Any, size: Size) -> "Boxes3D":
    """Every pixel (u, v) now lies at (u, v) * factors + shifts, in an image of `size`."""
    scale, shift = (label.intrinsics.new_tensor(values) for values in (factors, shifts))
    intrinsics = label.intrinsics.clone()
    intrinsics[:2, :2] *= scale[:, None]
    intrinsics[:2, 2] = intrinsics[:2, 2] * scale + shift
    projected = label.projected.clone()
    projected[:, :2] = projected[:, :2] * scale + shift
    rectangles = {name: None if value is None else value * scale.repeat(2).to(value) + shift.repeat(2).to(value)
                  for name, value in _rectangles(label)}
    return label._replace(intrinsics=intrinsics, projected=projected, **rectangles,
                          image_size=label.image_size.new_tensor(size))


def _rectangles(label: "Boxes3D") -> Iterator[tuple[str, Any]]:
    return ((name, getattr(label, name)) for name in ("modal", "amodal", "ignore"))


def _mirrored(rectangles: Any, last: int) -> Any:
    """(n, 4), in a picture whose last column is `last`."""
    mirrored = rectangles[:, [2, 1, 0, 3]]
    mirrored[:, ::2] = last - mirrored[:, ::2]
    return mirrored
