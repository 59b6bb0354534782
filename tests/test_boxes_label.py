"""Annotation files of boxes in space, and what the preparation of an image does to them."""

import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data.boxes_file import VEHICLES, has_boxes, prediction_json, read_boxes, read_camera
from data.boxes_label import Boxes3DLabel
from data.transforms import fixed_transform
from tests.shared import golden
from utils import boxes3d

CAR = {"2d": {"modal": [200, 100, 300, 150], "amodal": [200, 100, 320, 150]},
       "3d": {"center": [11.5, 2.0, 0.75], "dimensions": [4.0, 1.8, 1.5], "rotation": [1.0, 0.0, 0.0, 0.0]},
       "label": "car", "score": 1.0}
FILE = {"imgWidth": 1000, "imgHeight": 500, "sensor": {
    "sensor_T_ISO_8855": [[1.0, 0, 0, -1.5], [0, 1, 0, 0], [0, 0, 1, -1.2]], "fx": 1000.0, "fy": 1000.0, "u0": 500.0,
    "v0": 250.0}, "objects": [CAR, CAR | {"label": "caravan"}], "ignore": [{"2d": [0, 0, 10, 20], "label": "car"}]}
RULES = Boxes3DLabel()


def written(folder: Path, **changes) -> Path:
    path = folder / "a_gtBbox3d.json"
    path.write_text(json.dumps(FILE | changes))
    return path


@pytest.fixture
def label(tmp_path) -> boxes3d.Boxes3D:
    return read_boxes(written(tmp_path))


def rows(values: torch.Tensor) -> list:
    return [round(value, 9) for value in values.reshape(-1).tolist()]


def test_one_car_and_its_camera(label):
    assert label.labels.tolist() == [0] and rows(label.centers) == [-2.0, 0.45, 10.0]
    assert rows(label.projected) == [300.0, 295.0, 10.0] and rows(label.sizes) == [4.0, 1.8, 1.5]
    assert rows(label.modal) == [200, 100, 500, 250] and rows(label.amodal) == [200, 100, 520, 250]
    assert rows(label.ignore) == [0, 0, 10, 20] and rows(label.angles) == [0, 0, 0]
    assert RULES.size_of(label) == (500, 1000) and label.is_known and not RULES.is_void(label)


def test_nothing_to_learn_from(tmp_path):
    path = written(tmp_path, objects=[CAR | {"label": "trailer"}])
    assert not has_boxes(path) and RULES.is_void(read_boxes(path))
    assert has_boxes(written(tmp_path)) and RULES.is_void(read_camera(written(tmp_path)))


def without(*keys: str) -> dict:
    """The car without one entry."""
    car = json.loads(json.dumps(CAR))
    group = car
    for key in keys[:-1]:
        group = group[key]
    del group[keys[-1]]
    return car


@pytest.mark.parametrize(("changes", "message"), [
    ({"imgWidth": 0}, "imgHeight and imgWidth must be whole numbers above 0, got 500, 0"),
    ({"sensor": None}, "'sensor' must be a JSON object"),
    ({"sensor": FILE["sensor"] | {"fx": -1}}, "the focal lengths fx and fy must be above 0, got -1"),
    ({"sensor": FILE["sensor"] | {"u0": "a"}}, "'u0' must be a finite number, got a"),
    ({"sensor": FILE["sensor"] | {"sensor_T_ISO_8855": [[1, 0, 0]] * 3}}, "must be 3 x 4 finite numbers"),
    ({"sensor": FILE["sensor"] | {"sensor_T_ISO_8855": [[1, 0, 0, 0]] * 3}}, "must be a rotation"),
    ({"objects": {}}, "'objects' must be a list"),
    ({"objects": [without("label")]}, r"objects\[0\]: 'label' must be the name of a class, got None"),
    ({"objects": [CAR, without("2d")]}, r"objects\[1\]: '2d' and '3d' must be JSON objects"),
    ({"objects": [without("3d", "center")]}, r"objects\[0\].3d: 'center' must be 3 finite numbers, got None"),
    ({"objects": [CAR | {"3d": CAR["3d"] | {"dimensions": [1, 0, 1]}}]}, "dimensions must be above 0"),
    ({"objects": [CAR | {"3d": CAR["3d"] | {"rotation": [0, 0, 0, 3]}}]}, "quaternion of length 1, w first; this one"),
    ({"objects": [CAR | {"2d": CAR["2d"] | {"modal": [9, 9, -1, 3]}}]}, "width and height must be at least 0"),
    ({"objects": [CAR | {"2d": CAR["2d"] | {"amodal": [1, 2, 3, float("nan")]}}]}, "'amodal' must be 4 finite"),
    ({"ignore": [{"2d": [1]}]}, r"ignore\[0\]: '2d' must be 4 finite numbers"),
])
def test_files_that_cannot_be_meant(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        read_boxes(written(tmp_path, **changes))


def test_files_that_are_none(tmp_path):
    for content in ("{", "[]", ""):
        (tmp_path / "b.json").write_text(content)
        with pytest.raises(ValueError, match=r"b\.json"):
            read_boxes(tmp_path / "b.json")
    with pytest.raises(FileNotFoundError, match=r"file not found: .*none\.json"):
        read_boxes(tmp_path / "none.json")


# What happens to them with their image ---------------------------------------------------------------------------


def sees_what_it_says(label: boxes3d.Boxes3D) -> bool:
    """Whether the camera puts every centre where the label has it."""
    seen = boxes3d.view_to_image(label.centers, label.intrinsics)
    back, _ = label.in_vehicle()
    again = boxes3d.camera_to_view(boxes3d.vehicle_to_camera(back, label.sensor))
    return torch.allclose(seen, label.projected) and torch.allclose(again, label.centers)


def test_the_camera_follows_the_picture(label):
    smaller = RULES.resize(label, (250, 500))
    assert rows(smaller.projected) == [149.75, 147.25, 10.0] and RULES.size_of(smaller) == (250, 500)
    assert rows(smaller.modal) == [99.75, 49.75, 249.75, 124.75]
    framed = RULES.pad(smaller, (256, 512))
    assert rows(framed.projected) == [155.75, 150.25, 10.0] and rows(framed.ignore) == [5.75, 2.75, 10.75, 12.75]
    cut = RULES.crop(label, 150, 250, (400, 900))
    assert rows(cut.modal) == [0, 0, 250, 100] and RULES.size_of(cut) == (350, 750)
    for changed in (smaller, framed, cut, RULES.flip(label), RULES.scale(label, (600, 1200), 1.2)):
        assert sees_what_it_says(changed) and torch.equal(changed.sizes, label.sizes)
    assert len(RULES.crop(label, 0, 600, (500, 400)).labels) == 0
    back = RULES.onto(framed, RULES.known(label))
    assert torch.allclose(back.modal, label.modal) and RULES.size_of(back) == (500, 1000)
    assert torch.allclose(back.projected, label.projected) and sees_what_it_says(back)


@pytest.mark.parametrize("reading", ["correct", "original"])
def test_mirrored_twice_is_the_same(tmp_path, reading):
    turned = CAR | {"3d": CAR["3d"] | {"rotation": [0.9, 0.1, -0.2, (1 - 0.86) ** 0.5]}}
    aside = {"sensor_T_ISO_8855": [[0.8, 0.6, 0, -1.5], [-0.6, 0.8, 0, 0.1], [0, 0, 1, -1.2]]}
    label = read_boxes(written(tmp_path, objects=[turned], sensor=FILE["sensor"] | aside), reading)
    once = RULES.flip(label)
    twice = RULES.flip(once)
    for name in ("centers", "projected", "angles", "modal", "amodal", "ignore", "intrinsics", "sensor"):
        assert torch.allclose(getattr(twice, name), getattr(label, name)), name
        assert not torch.allclose(getattr(once, name), getattr(label, name)), name
    assert rows(once.modal) == [499, 100, 799, 250] and rows(once.sizes) == [4.0, 1.8, 1.5]
    # The mirrored corners are the corners of the mirrored box, left and right exchanged.
    mirrored = label.corners() * label.centers.new_tensor([-1.0, 1, 1])
    assert torch.allclose(once.corners()[:, [1, 0, 3, 2, 5, 4, 7, 6]], mirrored)


def test_the_derived_mirror_image(tmp_path):
    for case in json.loads((golden("cityscapes3d") / "mirrored_not_in_the_original.json").read_text()):
        path, boxes = tmp_path / "boxes.json", {}
        for which in ("original", "mirrored"):
            path.write_text(json.dumps(case[which]["annotation"]))
            boxes[which] = read_boxes(path, "original")
        got, want = RULES.flip(boxes["original"]), boxes["mirrored"]
        for name in ("centers", "projected", "sizes", "angles", "modal", "amodal", "intrinsics", "sensor"):
            assert torch.allclose(getattr(got, name), getattr(want, name), rtol=0, atol=1e-9), name
        for name, field in (("center_S", got.centers), ("center_I", got.projected), ("rotation_S", got.angles)):
            torch.testing.assert_close(field[0], torch.tensor(case["mirrored"]["loader_float32"][name]).double(),
                                       rtol=2e-6, atol=2e-6)


def test_maps_and_boxes_in_one_sample(label):
    """Maps go to their own size, boxes to that of the image; the camera of the file is kept beside the frame's."""
    from data.labels import MapLabel
    rules = {"semseg": MapLabel(grid="centre"), "det3d": RULES}
    grid = np.arange(8, dtype=np.float32).reshape(2, 4, 1).repeat(250, 0).repeat(250, 1)
    sample = {"image": np.zeros((500, 1000, 3), np.uint8), "semseg": grid, "det3d": label, "meta": RULES.known(label)}
    made = fixed_transform((250, 500), rules, (2, 4))(sample, None)
    assert made["semseg"].shape == (1, 2, 4) and RULES.size_of(made["det3d"]) == (250, 500)
    assert RULES.size_of(made["meta"]["camera"]) == (500, 1000)
    assert RULES.size_of(made["meta"]["frame"]["camera"]) == (250, 500)
    lacking = fixed_transform((250, 500), rules, (2, 4))(sample | {"det3d": None}, None)
    assert not lacking["det3d"].is_known and lacking["meta"]["frame"]["camera"].is_known


def test_which_pixels_a_smaller_grid_takes():
    from data.labels import MapLabel
    columns = np.arange(8, dtype=np.float32)[None, :, None].repeat(4, 0)
    assert MapLabel().regrid(columns, (2, 4))[0, :, 0].tolist() == [0, 2, 4, 6]
    assert MapLabel(grid="centre").regrid(columns, (2, 4))[0, :, 0].tolist() == [1, 3, 5, 7]


def test_by_value_between_processes(label):
    back = pickle.loads(pickle.dumps(label._replace(scores=torch.ones(1))))
    assert type(back) is boxes3d.Boxes3D and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(back, label._replace(scores=torch.ones(1)), strict=True))


def test_a_prediction_file_says_what_was_annotated(label):
    [found] = prediction_json(label._replace(scores=torch.tensor([0.5])), VEHICLES)["objects"]
    for key in ("center", "dimensions", "rotation"):
        assert found["3d"][key] == pytest.approx(CAR["3d"][key])
    assert found["2d"]["modal"] == CAR["2d"]["modal"] and (found["label"], found["score"]) == ("car", 0.5)


def test_photographs_without_a_camera_of_their_own(tmp_path):
    photo = RULES.of_photograph((480, 960))
    assert RULES.size_of(photo) == (480, 960) and len(photo.labels) == 0
    assert photo.intrinsics[0, 0].item() == pytest.approx(2262.52 * 960 / 2048)
    path = written(tmp_path)
    assert torch.equal(RULES.of_photograph((500, 1000), str(path)).intrinsics, read_camera(path).intrinsics)
    assert replace(RULES, reading="original").of_photograph((8, 8)).reading == "original"
