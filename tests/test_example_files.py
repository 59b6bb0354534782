"""The example data set on disk: both layouts complete and typed, re-runs safe, bytes reproducible."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat

from data.base import MultiTaskDataset
from data.boxes_file import read_boxes
from data.datasets import DATASETS
from scripts.example_data import write
from scripts.example_data.labels import BODY_PARTS, LABELS
from scripts.example_data.layouts import LAYOUTS
from scripts.example_data.render import BASELINE, _matched, render_scene, render_street
from scripts.example_data.street import STREET_IDS
from scripts.example_data.write import write_example
from tests.shared import golden
from utils.engine.tasks import label_rules

PARAMETERS = {"num_train": 2, "num_val": 1, "size": (40, 56), "seed": 3, "progress": False}


@pytest.fixture(scope="module")
def scene():
    return render_scene(4, (72, 96), "pascal")  # someone stands in the middle


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    root = tmp_path_factory.mktemp("example")
    assert write_example(root, workers=1, **PARAMETERS)
    return root


@pytest.fixture
def fresh(example, tmp_path):
    return shutil.copytree(example, tmp_path / "copy")


def contents(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def files_of(example, name, number):
    split = "train" if number <= PARAMETERS["num_train"] else "val"
    return [example / name / file for file in LAYOUTS[name].files(number, split)]


def save_parts(folder, scene):
    """The human_parts file of image 1 of a folder in the PASCAL layout that holds this scene."""
    for path in files_of(folder, "PASCALContext", 1):
        path.parent.mkdir(parents=True, exist_ok=True)
    LAYOUTS["PASCALContext"].save(folder / "PASCALContext", 1, "train", scene)
    return folder / "PASCALContext" / "human_parts" / "2008_000001.mat"


def test_all_layouts_are_complete_and_typed(example):
    expected, splits = {"example.json"}, {1: "train", 2: "train", 3: "val"}
    for name, layout in LAYOUTS.items():
        lists = [f"{name}/{file}" for file in layout.split_lists()]
        ids = [layout.image_id(number, split) for number, split in splits.items()]
        assert [(example / file).read_text().split() for file in lists] == ([ids[:2], ids[2:]] if lists else [])
        expected |= {*lists, *(f"{name}/{file}" for number, split in splits.items()
                               for file in layout.files(number, split))}
    assert set(contents(example)) == expected


def test_nyud_files_follow_the_layout(example):
    for number in (1, 2, 3):
        files = files_of(example, "NYUDv2", number)
        image, semseg, depth, normals, edge = [
            np.load(f) if f.suffix == ".npy" else np.array(Image.open(f)) for f in files]
        assert image.shape == normals.shape == (40, 56, 3)
        assert semseg.shape == depth.shape == edge.shape == (40, 56)
        assert semseg.dtype == np.uint8 and semseg.min() >= 1 and semseg.max() <= 40
        assert depth.dtype == np.float32 and depth.min() > 0.5 and depth.max() < 10
        assert set(np.unique(edge)) == {0, 255}
        length = np.linalg.norm(2.0 * normals / 255 - 1, axis=-1)
        assert np.abs(length - 1).max() < 0.01


def test_pascal_files_follow_the_layout(example):
    for number in (1, 2, 3):
        image, semseg, parts, context, normals, saliency = files_of(example, "PASCALContext", number)
        assert Image.open(image).format == "JPEG" and Image.open(semseg).mode == "P"
        semseg = np.array(Image.open(semseg))
        label_map = loadmat(context)["LabelMap"]
        assert label_map.dtype == np.uint16 and label_map.shape == semseg.shape == (40, 56) and semseg.max() <= 20
        person = LABELS["person"].context
        assert np.array_equal(label_map == person, semseg == 15)
        assert np.array(Image.open(normals)).shape == (40, 56, 3)
        assert np.array(Image.open(saliency)).dtype == np.uint8
        assert str(loadmat(parts)["anno"][0, 0]["imname"][0]) == f"2008_{number:06d}"


def test_normals_mask_has_something_to_remove_and_something_to_keep():
    valid = set(np.ravel(json.loads((golden("metrics") / "pascal_normals_valid_ids.json").read_text())).tolist())
    outside = {name for name, label in LABELS.items() if label.context not in valid}
    assert outside == {"glass", "plant"}


def test_parts_file_paints_back_to_the_part_map(scene, tmp_path):
    path = save_parts(tmp_path, scene)
    painted, classes = np.zeros((2, 72, 96), np.uint8)
    for item in loadmat(path)["anno"][0, 0]["objects"][0]:
        classes[item["mask"] > 0] = int(item["class_ind"][0, 0])
        for part in item["parts"][0] if item["parts"].size else []:
            painted[part["mask"] > 0] = BODY_PARTS[str(part["part_name"][0])]
    assert np.array_equal(painted, scene.part_map) and np.array_equal(classes, scene.pascal_semseg)


def test_parts_file_has_the_structure_of_the_reference_file(scene, tmp_path):
    path = save_parts(tmp_path, scene)
    reference = golden("metrics") / "fixture_PASCALContext" / "human_parts" / "2008_000001.mat"

    def structure(file):
        anno = loadmat(file)["anno"]
        objects = anno[0, 0]["objects"]
        person = next(item for item in objects[0] if str(item["class"][0]) == "person")
        part = person["parts"][0, 0]
        kinds = [person[key].dtype for key in ("class", "class_ind", "mask")] + [part["mask"].dtype]
        fields = [anno.dtype.names, objects.dtype.names, person["parts"].dtype.names]
        ranks = [anno.shape, objects.shape[0], person["class_ind"].tolist(), person["parts"].shape[0]]
        return kinds, fields, ranks

    assert structure(path) == structure(reference)
    without = loadmat(reference.with_name("2009_000002.mat"))["anno"][0, 0]["objects"][0, 0]["parts"]
    ours = [item["parts"] for item in loadmat(path)["anno"][0, 0]["objects"][0] if not item["parts"].size]
    assert ours and all((item.shape, item.dtype) == (without.shape, without.dtype) for item in ours)


def test_parts_file_without_objects_reads_as_an_empty_row(scene, tmp_path):
    empty = replace(scene, names=["wall"], instances=np.zeros_like(scene.instances))
    objects = loadmat(save_parts(tmp_path, empty))["anno"][0, 0]["objects"]
    assert objects.shape == (1, 0) and list(objects[0]) == []


def test_bytes_do_not_depend_on_the_number_of_workers(example, tmp_path):
    write_example(tmp_path / "two", workers=2, **PARAMETERS)
    assert contents(tmp_path / "two") == contents(example)


def test_second_run_with_equal_parameters_does_nothing(fresh):
    stamps = {path: path.stat().st_mtime_ns for path in fresh.rglob("*")}
    assert write_example(fresh, workers=1, **PARAMETERS) is False
    assert stamps == {path: path.stat().st_mtime_ns for path in fresh.rglob("*")}


def test_other_parameters_are_refused_and_replaced_on_request(fresh):
    other = PARAMETERS | {"num_train": 1}
    with pytest.raises(FileExistsError, match="num_train 2.*--overwrite"):
        write_example(fresh, workers=1, **other)
    note = fresh / "NYUDv2" / "images" / "note.txt"
    note.write_text("not ours")
    assert write_example(fresh, workers=1, overwrite=True, **other)
    assert note.read_text() == "not ours"
    assert not (fresh / "NYUDv2" / "images" / "0003.png").exists()
    assert not (fresh / write.PARTIAL).exists()


def test_interrupted_run_is_noticed_and_repaired(example, tmp_path, monkeypatch):
    real = write._write_image

    def breaks(root, size, seed, job):
        if job == ("PASCALContext", 2, "train"):
            raise KeyboardInterrupt
        real(root, size, seed, job)

    monkeypatch.setattr(write, "_write_image", breaks)
    with pytest.raises(KeyboardInterrupt):
        write_example(tmp_path / "set", workers=1, **PARAMETERS)
    monkeypatch.undo()
    with pytest.raises(FileExistsError, match="unfinished run"):
        write_example(tmp_path / "set", workers=1, **PARAMETERS)
    assert write_example(tmp_path / "set", workers=1, overwrite=True, **PARAMETERS)
    assert contents(tmp_path / "set") == contents(example)


def test_foreign_data_is_never_touched(tmp_path):
    real = tmp_path / "NYUDv2" / "images" / "0001.png"
    real.parent.mkdir(parents=True)
    real.write_bytes(b"a real picture")
    with pytest.raises(FileExistsError, match="NYUDv2.*left alone"):
        write_example(tmp_path, workers=1, overwrite=True, **PARAMETERS)
    assert contents(tmp_path) == {"NYUDv2/images/0001.png": b"a real picture"}
    (tmp_path / write.MARKER).write_text("{}")
    with pytest.raises(ValueError, match="not a marker"):
        write_example(tmp_path, workers=1, overwrite=True, **PARAMETERS)
    assert real.read_bytes() == b"a real picture"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_train": 0}, "num_train is 0"),
        ({"size": (16, 64)}, "height is 16"),
        ({"seed": -1}, "seed is -1"),
        ({"size": (64,)}, "height and width"),
        ({"workers": 0}, "workers is 0"),
        ({"layouts": ["KITTI"]}, "unknown layout.s. KITTI; known: NYUDv2, PASCALContext, cityscapes"),
    ],
)
def test_parameters_out_of_range_are_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        write_example(tmp_path / "set", **({"workers": 1} | PARAMETERS | change))
    assert not (tmp_path / "set").exists()


def test_the_loaders_read_what_the_renderer_drew(example):
    for layout, (name, style) in enumerate((("NYUD", "nyud"), ("PASCALContext", "pascal"))):
        spec = DATASETS.load(name)
        sample = MultiTaskDataset(spec, example, "val", label_rules(spec.tasks))[0]
        drawn = render_scene([PARAMETERS["seed"], layout, 3], PARAMETERS["size"], style)
        semseg = drawn.nyud_semseg - 1 if layout == 0 else drawn.pascal_semseg
        assert np.array_equal(sample["semseg"][..., 0], semseg)
        kept = np.linalg.norm(sample["normals"], axis=-1) > 0.5
        assert kept.mean() > 0.5 and np.abs(sample["normals"] - drawn.normals)[kept].max() < 0.005
        difference = np.abs(sample["image"].astype(float) - drawn.image).mean()
        if layout == 0:
            assert difference == 0 and np.array_equal(sample["depth"][..., 0], drawn.depth_m)
            assert np.array_equal(sample["edge"][..., 0], drawn.edge)
        else:
            assert difference < 6 and np.array_equal(sample["human_parts"][..., 0], drawn.part_map)
            assert np.array_equal(sample["sal"][..., 0] > 0.5, drawn.saliency >= 128)


# Streets -------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def streets():
    return [render_street(seed, (64, 128)) for seed in range(3)]


def test_a_street_has_what_streets_have(streets):
    for street in streets:
        assert street.image.shape == (64, 128, 3) and street.image.dtype == street.label_ids.dtype == np.uint8
        assert set(np.unique(street.label_ids)) <= set(STREET_IDS.values())
        for name, share in (("road", 0.15), ("building", 0.1), ("sky", 0.01), ("sidewalk", 0.01), ("car", 0.002)):
            assert (street.label_ids == STREET_IDS[name]).mean() > share, name
        assert (street.label_ids[-1] == STREET_IDS["road"]).mean() > 0.5
    seen = {name for street in streets for name, number in STREET_IDS.items() if (street.label_ids == number).any()}
    assert seen >= {"person", "pole", "tree"}
    again = render_street(1, (64, 128))
    assert all(np.array_equal(a, b) for a, b in zip(again, streets[1], strict=True))


def test_the_disparity_of_a_road_grows_towards_the_camera(streets):
    """On a plane seen at a constant height disparity is linear in the row, up to the small tilt of the camera."""
    for street in streets:
        assert street.disparity.dtype == np.uint16
        assert not street.disparity[street.label_ids == STREET_IDS["sky"]].any()
        assert 0.02 < (street.disparity == 0).mean() < 0.6
        road = (street.label_ids == STREET_IDS["road"]) & (street.disparity > 0)
        rows, values = np.nonzero(road)[0], (street.disparity[road].astype(float) - 1) / 256
        slope, start = np.polyfit(rows, values, 1)
        assert slope > 0 and np.abs(slope * rows + start - values).max() < 0.03 * values.max()


def test_what_the_right_camera_does_not_see_has_no_disparity():
    near, far = 4.0, 1.0
    disparity = np.full((1, 12), far)
    disparity[0, 6:9] = near                                   # a post: at 2..4 on the right, where 3..5 are seen too
    assert _matched(disparity)[0].tolist() == [False] + [True] * 2 + [False] * 3 + [True] * 6


def test_the_loader_reads_the_street_that_was_drawn(example):
    spec = DATASETS.load("Cityscapes")
    dataset = MultiTaskDataset(spec, example, "val", label_rules(spec.tasks))
    drawn = render_street([PARAMETERS["seed"], 2, 3], PARAMETERS["size"])
    sample = dataset[0]
    assert len(dataset) == 1 and dataset.ids == ["val/exampletown/exampletown_000003_000019"]
    assert np.array_equal(sample["image"], drawn.image)
    names = np.array([*spec.labels["semseg"].classes, "void"])
    assert (names[sample["semseg"][..., 0].astype(int)][drawn.label_ids == STREET_IDS["car"]] == "car").all()
    valid = drawn.disparity > 1
    assert np.allclose(sample["depth"][..., 0][valid], (drawn.disparity[valid] - 1) / 256)
    assert (sample["depth"][..., 0][~valid] == 255).all()


def test_vehicles_stand_where_their_boxes_are(streets, tmp_path):
    """What is visible lies inside of the whole, and the nearest point in the middle of it is a point of the box."""
    seen = 0
    for street in streets:
        path = tmp_path / "boxes.json"
        path.write_text(json.dumps(street.boxes))
        boxes = read_boxes(path)
        corners, focal = boxes.corners(), boxes.intrinsics[0, 0].item()
        assert boxes.sizes.shape == (len(boxes.labels), 3) and set(boxes.labels.tolist()) <= {0}
        for number, (modal, amodal) in enumerate(zip(boxes.modal.tolist(), boxes.amodal.tolist(), strict=True)):
            assert all(a < m + 0.51 for a, m in zip(amodal[:2], modal[:2], strict=True))
            assert all(a > m - 0.51 for a, m in zip(amodal[2:], modal[2:], strict=True))
            x0, y0, x1, y1 = map(int, modal)
            is_car = street.label_ids[y0:y1 + 1, x0:x1 + 1] == STREET_IDS["car"]
            disparity = (street.disparity[y0:y1 + 1, x0:x1 + 1][is_car].astype(float) - 1) / 256
            depth = focal * BASELINE / np.median(disparity[disparity > 0]) if (disparity > 0).any() else np.nan
            near, far = corners[number, :, 2].min().item(), corners[number, :, 2].max().item()
            seen += near - 0.2 < depth < far + 0.2
    assert seen >= 0.7 * sum(len(street.boxes["objects"]) for street in streets) > 0       # others are half hidden
