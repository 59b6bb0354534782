"""The vehicles of a street as boxes in space: what Cityscapes 3D's annotation files hold.

The vehicle that carries the camera stands along the street: x points down it, y to the left, z up, and its origin lies
on the ground REAR metres behind the camera.
"""

from typing import NamedTuple

import numpy as np

from scripts.example_data.stage import Pose, Stage

REAR = 1.6
SEEN = 4e-4                  # share of the picture of which a vehicle must show something to be annotated
TO_VEHICLE = np.array([[0.0, 0, -1], [-1, 0, 0], [0, 1, 0]])       # rows: its axes in the world, or in that of a thing


class Vehicle(NamedTuple):
    """A thing with a box: its instance, pose (front = -z), length, width and height in metres, and its class."""

    instance: int
    pose: Pose
    size: tuple[float, float, float]
    label: str


def annotation(street: Stage, vehicles: list[Vehicle], instances: np.ndarray, focal: float) -> dict:
    """The annotation of a picture. instances (H, W): which thing a pixel shows; focal: focal length in pixels."""
    height, width = instances.shape
    origin = street.eye * (1, 0, 1) + (0, 0, REAR)
    turn = TO_VEHICLE @ street.to_world.T @ TO_VEHICLE.T
    sensor = np.column_stack([turn, TO_VEHICLE @ street.to_world.T @ (origin - street.eye)])
    camera = {"sensor_T_ISO_8855": sensor.tolist(), "fx": focal, "fy": focal, "u0": width / 2 - 0.5,
              "v0": height / 2 - 0.5}
    seen = [vehicle for vehicle in vehicles if (instances == vehicle.instance).mean() > SEEN]
    centers = [TO_VEHICLE @ (vehicle.pose.origin + (0, vehicle.size[2] / 2, 0) - origin) for vehicle in seen]
    yaws = [float(np.arctan2(vehicle.pose.rotation[0, 2], vehicle.pose.rotation[2, 2])) for vehicle in seen]
    amodal = _amodal(seen, np.reshape(centers, (-1, 3)), sensor, camera, (height, width))
    objects = [{
        "2d": {"modal": _rectangle(instances == vehicle.instance), "amodal": whole},
        "3d": {"center": center.tolist(), "dimensions": list(vehicle.size),
               "rotation": [float(np.cos(yaw / 2)), 0.0, 0.0, float(np.sin(yaw / 2))], "format": "CRS_ISO8855"},
        "instanceId": number, "label": vehicle.label, "score": 1.0,
    } for number, (vehicle, center, yaw, whole) in enumerate(zip(seen, centers, yaws, amodal, strict=True))]
    return {"imgWidth": width, "imgHeight": height, "sensor": camera, "objects": objects, "ignore": []}


def _rectangle(mask: np.ndarray) -> list[int]:
    """xmin, ymin, width, height from the first to the last pixel of a mask (H, W)."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return [int(columns[0]), int(rows[0]), int(columns[-1] - columns[0]), int(rows[-1] - rows[0])]


def _amodal(seen: list[Vehicle], centers: np.ndarray, sensor: np.ndarray, camera: dict,
            size: tuple[int, int]) -> list[list[float]]:
    """Rectangles around whole vehicles, centres (n, 3) in V: xmin, ymin, width, height."""
    import torch  # here: rooms are drawn without it

    from utils import boxes3d
    matrix, places = torch.from_numpy(sensor), torch.from_numpy(centers)
    turns = np.reshape([TO_VEHICLE @ vehicle.pose.rotation @ TO_VEHICLE.T for vehicle in seen], (-1, 3, 3))
    corners = boxes3d.corners_in_view(
        boxes3d.camera_to_view(boxes3d.vehicle_to_camera(places, matrix)),
        torch.tensor([vehicle.size for vehicle in seen], dtype=torch.float64).reshape(-1, 3),
        boxes3d.vehicle_to_view_rotation(torch.from_numpy(turns), matrix))
    k = torch.tensor([[camera["fx"], 0, camera["u0"]], [0, camera["fy"], camera["v0"]], [0, 0, 1]], dtype=torch.float64)
    boxes = boxes3d.amodal_boxes(corners, k, torch.tensor(size))
    return torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1).tolist()
