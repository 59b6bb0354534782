"""Boxes in space: coordinates, rotations and projections, by hand and against the official conversions."""

import json
import math

import pytest
import torch

from tests.shared import golden
from utils import boxes3d
from utils.batches import to_device

LEVEL = torch.tensor([[1.0, 0, 0, -1.5], [0, 1, 0, 0], [0, 0, 1, -1.2]], dtype=torch.float64)    # 1.2 m above ground
CAMERA = torch.tensor([[1000.0, 0, 500], [0, 1000, 250], [0, 0, 1]], dtype=torch.float64)
SIZE = torch.tensor([512, 1024])


def yaw(angle: float) -> torch.Tensor:
    return torch.tensor([math.cos(angle / 2), 0, 0, math.sin(angle / 2)], dtype=torch.float64)


def near(got: torch.Tensor, want, tolerance: float = 1e-9) -> bool:
    want = torch.as_tensor(want, dtype=torch.float64)
    return bool(((got - want).abs() <= tolerance * want.abs().clamp_min(1)).all())


def test_a_car_ten_metres_ahead():
    """It stands 2 m to the left, on the ground: its centre is 0.75 m high."""
    point = torch.tensor([11.5, 2.0, 0.75], dtype=torch.float64)
    view = boxes3d.camera_to_view(boxes3d.vehicle_to_camera(point, LEVEL))
    assert near(view, [-2.0, 0.45, 10.0])
    image = boxes3d.view_to_image(view, CAMERA)
    assert near(image, [300.0, 295.0, 10.0]) and near(boxes3d.image_to_view(image, CAMERA), view)
    assert near(boxes3d.camera_to_vehicle(boxes3d.view_to_camera(view), LEVEL), point)


@pytest.mark.parametrize("angle", [0.0, 0.3, -2.0, 3.1])
def test_a_level_car_turns_about_one_angle(angle):
    """Read correctly the third angle is the turn about the axis that points down; the original's is half a turn off."""
    rotation = boxes3d.vehicle_to_view_rotation(boxes3d.quaternion_to_matrix(yaw(angle)), LEVEL)
    quaternion = boxes3d.matrix_to_quaternion(rotation)
    assert near(boxes3d.quaternion_to_angles(quaternion), [0.0, 0.0, -angle])
    a, b, c = boxes3d.quaternion_to_angles(quaternion, "original").tolist()
    assert (abs(a), b) == pytest.approx((math.pi, 0)) and math.cos(c - (math.pi - angle)) == pytest.approx(1)


def test_quaternions_survive_every_detour():
    """Random ones, and those in which an entry is the largest or nothing."""
    quaternions = torch.cat([torch.randn(200, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
                             torch.eye(4, dtype=torch.float64), torch.tensor([[1.0, -1, 0, 0], [0, 1, 0, -1]])])
    quaternions = quaternions / quaternions.norm(dim=-1, keepdim=True)
    detours = [boxes3d.matrix_to_quaternion(boxes3d.quaternion_to_matrix(3 * quaternions))]
    for reading in ("correct", "original"):
        detours.append(boxes3d.angles_to_quaternion(boxes3d.quaternion_to_angles(quaternions, reading), reading))
    for back in detours:
        assert near((back * quaternions).sum(dim=-1).abs(), torch.ones(len(back)), 1e-7)      # asin near its ends


def test_what_lies_behind_the_camera_is_cut_off():
    """A box beside the camera, one that reaches from behind it to 4 m before it, and one behind it."""
    centers = torch.tensor([[0.0, 0, 10], [-3.0, 1, 0], [0.0, 0, -10]], dtype=torch.float64)
    sizes = torch.tensor([[4.0, 2, 2], [8.0, 2, 2], [4.0, 2, 2]], dtype=torch.float64)
    corners = boxes3d.corners_in_view(centers, sizes, torch.eye(3, dtype=torch.float64).expand(3, 3, 3))
    assert near(corners[0].amin(0), [-1.0, -1, 8]) and near(corners[0].amax(0), [1.0, 1, 12])
    boxes = boxes3d.amodal_boxes(corners, CAMERA, SIZE)
    assert near(boxes[0], [375.0, 125, 625, 375])
    assert near(boxes[1], [0.0, 250, 0, 511]) and near(boxes[2], [0.0, 0, 0, 0])
    none = boxes3d.corners_in_view(centers[:0], sizes[:0], torch.zeros(0, 3, 3, dtype=torch.float64))
    assert boxes3d.amodal_boxes(none, CAMERA, SIZE).shape == (0, 4)


def test_boxes_travel_with_their_batch():
    fields = {name: torch.zeros(0) for name in boxes3d.Boxes3D._fields}
    boxes = boxes3d.Boxes3D(**fields | {"scores": None, "reading": "original"})
    [moved] = to_device([boxes], torch.device("meta"))
    assert type(moved) is boxes3d.Boxes3D and moved.scores is None and moved.reading == "original"
    assert {field.device.type for field in moved if isinstance(field, torch.Tensor)} == {"meta"}


def official() -> list[dict]:
    return json.loads((golden("cityscapes3d") / "conversions.json").read_text())


def test_the_official_conversions():
    for case in official():
        sensor, [annotated], want = case["annotation"]["sensor"], case["annotation"]["objects"], case["float64"]
        matrix = torch.tensor(sensor["sensor_T_ISO_8855"], dtype=torch.float64)
        k = torch.tensor([[sensor["fx"], 0, sensor["u0"]], [0, sensor["fy"], sensor["v0"]], [0, 0, 1]],
                         dtype=torch.float64)
        center, size, quaternion = (torch.tensor(annotated["3d"][key], dtype=torch.float64)
                                    for key in ("center", "dimensions", "rotation"))
        in_camera = boxes3d.vehicle_to_camera(center, matrix)
        in_view = boxes3d.camera_to_view(in_camera)
        rotation = boxes3d.vehicle_to_view_rotation(boxes3d.quaternion_to_matrix(quaternion), matrix)
        assert near(in_camera, want["center_C"]) and near(in_view, want["center_S"])
        seen = boxes3d.matrix_to_quaternion(rotation)
        assert same_rotation(seen, want["quaternion_S_wxyz"])
        assert same_rotation(boxes3d.matrix_to_quaternion(matrix[:, :3] @ boxes3d.quaternion_to_matrix(quaternion)),
                             want["quaternion_C_wxyz"])
        angles = boxes3d.quaternion_to_angles(seen, "original")
        assert near(angles, want["angles_ZXY"])
        [corners] = boxes3d.corners_in_view(in_view[None], size[None], rotation[None])
        assert near(corners, list(want["vertices_S"].values()))
        assert near(boxes3d.view_to_image(corners, k)[:, :2], list(want["vertices_I"].values()))
        size = torch.tensor([case["annotation"]["imgHeight"], case["annotation"]["imgWidth"]])
        assert near(boxes3d.amodal_boxes(corners[None], k, size)[0], want["amodal_box"])
        back = boxes3d.quaternion_to_matrix(boxes3d.angles_to_quaternion(angles, "original"))
        assert same_rotation(boxes3d.matrix_to_quaternion(boxes3d.view_to_vehicle_rotation(back, matrix)),
                             want["back_to_V"]["quaternion_wxyz"])
        assert near(boxes3d.camera_to_vehicle(boxes3d.view_to_camera(in_view), matrix), want["back_to_V"]["center"])


def same_rotation(got: torch.Tensor, want) -> bool:
    return near(got, want) or near(-got, want)
