"""JSON files of Cityscapes 3D: vehicles in space and the camera that sees them; read as labels, written as predictions.

Boxes are annotated in the coordinates V of the vehicle that carries the camera and are read into those of the camera,
S (`utils.boxes3d`). Everything is float64: what the score rests on, such as whole metres, must not move. PyTorch is
loaded when a file is read.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from utils.boxes3d import Boxes3D

VEHICLES = ("car", "truck", "bus", "train", "motorcycle", "bicycle")     # labels 0..5; other objects are left out
Reading = Literal["correct", "original"]
UNIT = 0.05                                # how far the length of a quaternion, or an entry of T T', may be off


def read_boxes(path: Path, reading: Reading = "correct") -> "Boxes3D":
    """The vehicles of an annotation file, and its camera. reading: of quaternions, see `utils.boxes3d`."""
    from utils import boxes3d
    values = _read_json(path)
    empty = _camera(values, path, reading)
    objects = [_object(entry, path, number) for number, entry in enumerate(_list(values, "objects", path))]
    objects = [entry for entry in objects if entry is not None]
    regions = [_rectangle(entry, "2d", f"{path}: ignore[{number}]")
               for number, entry in enumerate(_list(values, "ignore", path, required=False))]

    def column(name: str, width: int) -> Any:
        return empty.intrinsics.new_tensor([entry[name] for entry in objects]).reshape(len(objects), width)

    centers = boxes3d.camera_to_view(boxes3d.vehicle_to_camera(column("center", 3), empty.sensor))
    turned = boxes3d.vehicle_to_view_rotation(boxes3d.quaternion_to_matrix(column("rotation", 4)), empty.sensor)
    return empty._replace(
        labels=column("label", 1).long().squeeze(1), centers=centers, sizes=column("dimensions", 3),
        projected=boxes3d.view_to_image(centers, empty.intrinsics),
        angles=boxes3d.quaternion_to_angles(boxes3d.matrix_to_quaternion(turned), reading),
        modal=column("modal", 4), amodal=column("amodal", 4),
        ignore=empty.intrinsics.new_tensor(regions).reshape(len(regions), 4))


def has_boxes(path: Path) -> bool:
    """Whether an annotation file has a vehicle of one of the classes."""
    return any(entry.get("label") in VEHICLES for entry in _list(_read_json(path), "objects", path))


def read_camera(path: Path, reading: Reading = "correct") -> "Boxes3D":
    """The camera of an annotation file, or of one with `imgWidth`, `imgHeight` and `sensor` alone; no vehicles."""
    return _camera(_read_json(path), path, reading)


def no_boxes(intrinsics: Sequence, sensor: Sequence, size: tuple[int, int], reading: Reading) -> "Boxes3D":
    """A camera without vehicles; size: (height, width)."""
    import torch

    from utils.boxes3d import Boxes3D
    rows = dict.fromkeys(("centers", "projected", "sizes", "angles"), 3) | dict.fromkeys(("modal", "amodal"), 4)
    return Boxes3D(labels=torch.zeros(0, dtype=torch.long), image_size=torch.tensor(size),
                   **{name: torch.zeros(0, width, dtype=torch.float64) for name, width in rows.items()},
                   intrinsics=torch.tensor(intrinsics, dtype=torch.float64), ignore=torch.zeros(0, 4).double(),
                   sensor=torch.tensor(sensor, dtype=torch.float64), reading=reading)


def prediction_json(boxes: "Boxes3D", class_names: Sequence[str]) -> dict:
    """What a prediction file of the official evaluation holds: everything in V, and in pixels of `boxes.image_size`."""
    from utils.boxes3d import amodal_boxes
    centers, quaternions = boxes.in_vehicle()
    amodal = amodal_boxes(boxes.corners(), boxes.intrinsics, boxes.image_size)
    columns = zip(boxes.labels.tolist(), boxes.scores.tolist(), centers.tolist(), boxes.sizes.tolist(),
                  quaternions.tolist(), _as_file(boxes.modal), _as_file(amodal), strict=True)
    return {"objects": [{
        "2d": {"amodal": whole, "modal": visible},
        "3d": {"center": center, "dimensions": size, "rotation": rotation},
        "label": class_names[label], "score": score,
    } for label, score, center, size, rotation, visible, whole in columns]}


def _as_file(rectangles: Any) -> list[list[float]]:
    """xmin, ymin, xmax, ymax -> xmin, ymin, width, height."""
    return [[x0, y0, x1 - x0, y1 - y0] for x0, y0, x1, y1 in rectangles.tolist()]


# Parts of a file; each error says where ---------------------------------------------------------------------------


def _read_json(path: Path) -> dict:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"file not found: {path}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot read {path}: {error}; the file is damaged or not JSON") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no JSON object with the keys sensor and objects")
    return values


def _list(values: Mapping, key: str, path: Path, required: bool = True) -> list[dict]:
    found = values.get(key, None if required else [])
    if not isinstance(found, list) or not all(isinstance(entry, dict) for entry in found):
        raise ValueError(f"{path}: '{key}' must be a list of JSON objects")
    return found


def _camera(values: Mapping, path: Path, reading: Reading) -> "Boxes3D":
    size = values.get("imgHeight"), values.get("imgWidth")
    if not all(type(side) is int and side > 0 for side in size):
        raise ValueError(f"{path}: imgHeight and imgWidth must be whole numbers above 0, got {size[0]!r}, {size[1]!r}")
    sensor = values.get("sensor")
    if not isinstance(sensor, dict):
        raise ValueError(f"{path}: 'sensor' must be a JSON object with fx, fy, u0, v0 and sensor_T_ISO_8855")
    fx, fy, u0, v0 = (_numbers(sensor, key, (), f"{path}: sensor") for key in ("fx", "fy", "u0", "v0"))
    if min(fx, fy) <= 0:
        raise ValueError(f"{path}: sensor: the focal lengths fx and fy must be above 0, got {fx:g} and {fy:g}")
    matrix = np.array(_numbers(sensor, "sensor_T_ISO_8855", (3, 4), f"{path}: sensor"))
    turn = matrix[:, :3]
    if np.abs(turn @ turn.T - np.eye(3)).max() > UNIT or np.linalg.det(turn) < 0:
        raise ValueError(f"{path}: sensor: the first three columns of sensor_T_ISO_8855 must be a rotation")
    return no_boxes([[fx, 0.0, u0], [0.0, fy, v0], [0.0, 0.0, 1.0]], matrix.tolist(), size, reading)


def _object(values: Mapping, path: Path, number: int) -> dict | None:
    """One vehicle; None for objects of other classes."""
    where = f"{path}: objects[{number}]"
    if not isinstance(values.get("label"), str):
        raise ValueError(f"{where}: 'label' must be the name of a class, got {values.get('label')!r}")
    if values["label"] not in VEHICLES:
        return None
    plane, space = (values.get(key) for key in ("2d", "3d"))
    if not isinstance(plane, dict) or not isinstance(space, dict):
        raise ValueError(f"{where}: '2d' and '3d' must be JSON objects")
    found = {name: _numbers(space, name, (width,), f"{where}.3d")
             for name, width in (("center", 3), ("dimensions", 3), ("rotation", 4))}
    if min(found["dimensions"]) <= 0:
        raise ValueError(f"{where}.3d: dimensions must be above 0, got {found['dimensions']}")
    length = math.hypot(*found["rotation"])
    if abs(length - 1) > UNIT:
        raise ValueError(f"{where}.3d: rotation must be a quaternion of length 1, w first; this one's is {length:.3g}")
    rectangles = {name: _rectangle(plane, name, f"{where}.2d") for name in ("modal", "amodal")}
    return {"label": [VEHICLES.index(values["label"])], **found, **rectangles}


def _rectangle(values: Mapping, key: str, where: str) -> list[float]:
    """xmin, ymin, width, height of the file -> xmin, ymin, xmax, ymax."""
    x, y, width, height = _numbers(values, key, (4,), where)
    if min(width, height) < 0:
        raise ValueError(f"{where}: '{key}' is [xmin, ymin, width, height]; width and height must be at least 0, got "
                         f"{width:g} and {height:g}")
    return [x, y, x + width, y + height]


def _numbers(values: Mapping, key: str, shape: tuple[int, ...], where: str) -> Any:
    """Finite numbers of this shape, as nested lists; () is a single one."""
    try:
        found = np.asarray(values.get(key), np.float64)
    except (TypeError, ValueError):
        found = np.full((), np.nan)
    if found.shape != shape or not np.isfinite(found).all():
        wanted = " x ".join(map(str, shape)) + " finite numbers" if shape else "a finite number"
        raise ValueError(f"{where}: '{key}' must be {wanted}, got {str(values.get(key))[:60]}")
    return found.tolist()
