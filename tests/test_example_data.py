"""The rendered example data set: exact geometry, consistent labels, complete folders, safe re-runs."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from scipy.io import loadmat
from skimage.morphology import thin

from data.example import write
from data.example.geometry import Solid, first_hit, lit
from data.example.labels import BODY_PARTS, LABELS, PART_NAMES
from data.example.render import render_scene, view_rays
from data.example.scene import build_scene
from data.example.write import PASCAL, image_files, image_name, write_example, write_pascal_parts_mat
from tests.shared import golden

SIZE = (72, 96)
PERSON_SEED = 9  # style pascal: someone stands in the middle
PARAMETERS = {"num_train": 2, "num_val": 1, "size": (40, 56), "seed": 3, "progress": False}


@pytest.fixture(scope="module")
def scenes():
    return [render_scene(seed, SIZE, style) for seed, style in ((PERSON_SEED, "pascal"), (3, "nyud"), (12, "pascal"))]


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


def back_projected(scene):
    """Camera points (H, W, 3) and ray directions (H, W, 3)."""
    rows, columns = (grid.ravel() for grid in np.indices(SIZE))
    rays = view_rays(SIZE, rows, columns).reshape(3, *SIZE).transpose(1, 2, 0)  # (3, H*W) -> (H, W, 3)
    return rays * scene.depth_m[..., None], rays


def test_rays_enter_solids_at_hand_computed_places():
    rays = np.array([[0, 0, -1], [0.5, 0, -1], [0, 0.1, -1]], np.float32).T
    at = np.array([0.0, 0.0, -4.0])
    sphere = Solid("ellipsoid", at, np.diag([1.0, 1.0, 1.0]), None, 0)
    box = Solid("box", at, np.diag([3.0, 0.3, 0.5]), None, 0)
    cone = Solid("cylinder", at, np.diag([1.0, 1.0, 1.0]), None, 0, taper=0.5)
    assert np.allclose(sphere.enter(np.zeros(3), rays)[:2], [3, np.inf])
    assert np.allclose(box.enter(np.zeros(3), rays), [3.5, 3.5, np.inf])
    # Radius 0.75 - 0.25 y: on the ray y = 0.1 t it meets 4 - t = 0.75 - 0.025 t, so t = 3.25 / 0.975.
    assert np.allclose(cone.enter(np.zeros(3), rays)[[0, 2]], [3.25, 3.25 / 0.975])
    depth, index = first_hit([sphere, box], rays)
    assert np.allclose(depth, [3, 3.5, (400 - np.sqrt(160000 - 101 * 1500)) / 101]) and index.tolist() == [0, 1, 0]


def test_shadow_ends_at_the_outline_of_the_caster():
    ball = Solid("ellipsoid", np.array([0.0, 1.0, 0.0]), np.eye(3) * 0.5, None, 0)
    frame = np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])  # third row is up
    light = np.array([0.0, 2.0, 0.0])
    edge = 2 * np.tan(np.arcsin(0.5))  # radius of the shadow on the floor
    points = np.array([[0.0, 0, 0], [edge - 0.01, 0, 0], [edge + 0.01, 0, 0], [0, 1.49, 0]], np.float32).T
    assert lit([ball], light, frame, points).tolist() == [False, False, True, False]


def test_equal_seeds_give_equal_pictures(scenes):
    again = render_scene(PERSON_SEED, SIZE, "pascal")
    for key, value in vars(scenes[0]).items():
        assert np.array_equal(value, getattr(again, key)), key
    assert not np.array_equal(again.image, render_scene(PERSON_SEED + 1, SIZE, "pascal").image)


def test_the_scene_does_not_depend_on_the_size(scenes):
    small = scenes[0]
    large = render_scene(PERSON_SEED, (2 * SIZE[0], 2 * SIZE[1]), "pascal")
    assert large.names == small.names
    blocks = large.instances.reshape(SIZE[0], 2, SIZE[1], 2)  # (2H, 2W) -> (H, 2, W, 2)
    whole = (blocks == small.instances[:, None, :, None]).all((1, 3))
    assert whole.mean() > 0.8
    depth = large.depth_m.reshape(SIZE[0], 2, SIZE[1], 2).mean((1, 3))
    relative = np.abs(depth - small.depth_m)[whole] / small.depth_m[whole]
    assert np.quantile(relative, 0.98) < 0.01


def test_normals_are_unit_and_face_the_camera(scenes):
    for scene in scenes:
        assert np.allclose(np.linalg.norm(scene.normals, axis=-1), 1, atol=1e-5)
        _, rays = back_projected(scene)
        assert ((scene.normals * rays).sum(-1) < 1e-4).all()
        assert 0.5 < scene.depth_m.min() and scene.depth_m.max() < 10


def test_normals_agree_with_the_depth_on_flat_surfaces(scenes):
    flat = [LABELS[name].nyud for name in ("wall", "floor", "ceiling")]
    for scene in scenes:
        points, _ = back_projected(scene)
        right, up = points[1:, 1:] - points[1:, :-1], points[:-1, :-1] - points[1:, :-1]
        numeric = np.cross(right, up)
        numeric /= np.linalg.norm(numeric, axis=-1, keepdims=True)
        corner = scene.instances[1:, :-1]
        whole = (corner == scene.instances[1:, 1:]) & (corner == scene.instances[:-1, :-1])
        whole &= np.isin(scene.nyud_semseg[1:, :-1], flat)
        assert whole.sum() > 500
        cosine = (numeric * scene.normals[1:, :-1]).sum(-1)[whole]
        assert np.quantile(cosine, 0.005) > 0.999


def test_floor_points_up_and_depth_grows_towards_the_horizon(scenes):
    for scene in scenes:
        floor = scene.nyud_semseg == LABELS["floor"].nyud
        assert scene.normals[floor][:, 1].min() > 0.9  # y is up, the camera is nearly level
        rows = np.nonzero(floor)[0]
        assert np.corrcoef(rows, scene.depth_m[floor])[0, 1] < -0.5


def test_class_ids_are_in_range(scenes):
    assert len(PART_NAMES) == len(BODY_PARTS) and set(BODY_PARTS) == set(range(1, 7))
    for label in LABELS.values():
        assert 1 <= label.nyud <= 40 and 0 <= label.pascal <= 20 and 1 <= label.context <= 459
        assert not label.pascal or label.pascal in write.VOC_NAMES
    for scene in scenes:
        names = np.array([LABELS[name].nyud for name in scene.names])
        assert np.array_equal(scene.nyud_semseg, names[scene.instances])
        assert len(np.unique(scene.nyud_semseg)) >= 6 and scene.pascal_semseg.max() <= 20


def test_parts_lie_on_people_and_cover_them(scenes):
    for scene in scenes:
        person = scene.nyud_semseg == LABELS["person"].nyud
        assert np.array_equal(scene.part_map > 0, person)
        assert np.array_equal(scene.pascal_semseg == 15, person)
        assert scene.part_map.max() <= 6
    assert set(np.unique(scenes[0].part_map)) == set(range(7))


def test_edges_are_thin_and_lie_where_the_instance_or_the_depth_changes(scenes):
    for scene in scenes:
        edge, ids = scene.edge, scene.instances
        assert edge.dtype == bool and np.array_equal(thin(edge), edge) and 0.02 < edge.mean() < 0.3
        padded_ids, padded_edge = np.pad(ids, 1, mode="edge"), np.pad(edge, 1)
        padded_depth = np.pad(scene.depth_m, 1, mode="edge")
        change, close, step = np.zeros(SIZE, bool), np.zeros(SIZE, bool), np.zeros(SIZE)
        for dy in range(3):
            for dx in range(3):
                window = (slice(dy, dy + SIZE[0]), slice(dx, dx + SIZE[1]))
                change |= padded_ids[window] != ids
                close |= padded_edge[window]
                step = np.maximum(step, np.abs(padded_depth[window] - scene.depth_m))
        assert (change | (step > 0.04))[edge].all()
        right = np.zeros(SIZE, bool)
        right[:, :-1] = ids[:, 1:] != ids[:, :-1]
        assert close[right].mean() > 0.98


def test_saliency_is_soft_and_highest_on_the_person_in_the_middle(scenes):
    scene = scenes[0]
    person = scene.part_map > 0
    assert scene.saliency.dtype == np.uint8
    assert scene.saliency[person].mean() > 180 > 60 > scene.saliency[~person].mean()
    between = (scene.saliency > 20) & (scene.saliency < 235)
    assert between.mean() > 0.01
    assert (scene.saliency[scene.nyud_semseg == LABELS["ceiling"].nyud] < 128).all()


def test_people_are_common_in_pascal_and_rarer_in_nyud():
    share = {style: np.mean(["person" in build_scene(np.random.default_rng(seed), style).names for seed in range(30)])
             for style in ("nyud", "pascal")}
    assert 0.1 < share["nyud"] < 0.55 and 0.6 < share["pascal"] < 0.95


def test_both_layouts_are_complete_and_typed(example):
    for layout, folder in write.LISTS:
        names = [(example / layout / folder / f"{split}.txt").read_text().split() for split in ("train", "val")]
        assert names == [[image_name(layout, 1), image_name(layout, 2)], [image_name(layout, 3)]]
        for name in sum(names, []):
            assert all((example / path).is_file() for path in image_files(layout, name)), name
    listed = {path for layout, _ in write.LISTS for number in (1, 2, 3)
              for path in image_files(layout, image_name(layout, number))}
    extra = {"example.json"} | {f"{layout}/{folder}/{split}.txt" for layout, folder in write.LISTS
                                for split in ("train", "val")}
    assert set(contents(example)) == listed | extra


def test_nyud_files_follow_the_layout(example):
    for number in (1, 2, 3):
        files = [example / path for path in image_files("NYUDv2", image_name("NYUDv2", number))]
        image, semseg, depth, normals, edge = [np.load(f) if f.suffix == ".npy" else np.array(Image.open(f)) for f in files]
        assert image.shape == normals.shape == (40, 56, 3) and semseg.shape == depth.shape == edge.shape == (40, 56)
        assert semseg.dtype == np.uint8 and 1 <= semseg.min() and semseg.max() <= 40
        assert depth.dtype == np.float32 and 0.5 < depth.min() and depth.max() < 10
        assert set(np.unique(edge)) == {0, 255}
        length = np.linalg.norm(2 * normals / 255.0 - 1, axis=-1)
        assert np.abs(length - 1).max() < 0.01


def test_pascal_files_follow_the_layout(example):
    for number in (1, 2, 3):
        image, semseg, parts, context, normals, saliency = [
            example / path for path in image_files(PASCAL, image_name(PASCAL, number))]
        assert Image.open(image).format == "JPEG" and Image.open(semseg).mode == "P"
        semseg = np.array(Image.open(semseg))
        label_map = loadmat(context)["LabelMap"]
        assert label_map.dtype == np.uint16 and label_map.shape == semseg.shape == (40, 56) and semseg.max() <= 20
        person = LABELS["person"].context
        assert np.array_equal(label_map == person, semseg == 15)
        assert np.array(Image.open(normals)).shape == (40, 56, 3)
        assert np.array(Image.open(saliency)).dtype == np.uint8
        assert str(loadmat(parts)["anno"][0, 0]["imname"][0]) == image_name(PASCAL, number)


def test_normals_mask_has_something_to_remove_and_something_to_keep():
    valid = set(np.ravel(json.loads((golden("metrics") / "pascal_normals_valid_ids.json").read_text())).tolist())
    outside = {name for name, label in LABELS.items() if label.context not in valid}
    assert outside == {"glass", "plant"}


def test_parts_file_paints_back_to_the_part_map(scenes, tmp_path):
    scene, path = scenes[0], tmp_path / "parts.mat"
    write_pascal_parts_mat(path, "2008_000001", write.pascal_objects(scene))
    painted, classes = np.zeros(SIZE, np.uint8), np.zeros(SIZE, np.uint8)
    for item in loadmat(path)["anno"][0, 0]["objects"][0]:
        classes[item["mask"] > 0] = int(item["class_ind"][0, 0])
        for part in item["parts"][0] if item["parts"].size else []:
            painted[part["mask"] > 0] = BODY_PARTS[PART_NAMES.index(str(part["part_name"][0]))]
    assert np.array_equal(painted, scene.part_map) and np.array_equal(classes, scene.pascal_semseg)


def test_parts_file_has_the_structure_of_the_reference_file(scenes, tmp_path):
    path = tmp_path / "parts.mat"
    write_pascal_parts_mat(path, "2008_000001", write.pascal_objects(scenes[0]))
    reference = golden("metrics") / "fixture_PASCALContext" / "human_parts" / "2008_000001.mat"

    def structure(file, wanted):
        anno = loadmat(file)["anno"]
        objects = anno[0, 0]["objects"]
        item = next(o for o in objects[0] if str(o["class"][0]) == "person")
        bare = [o["parts"] for o in objects[0] if not o["parts"].size]
        return (anno.shape, anno.dtype.names, objects.shape[0], objects.dtype.names, item["class"].dtype,
                item["class_ind"].tolist(), item["class_ind"].dtype, item["mask"].dtype, item["parts"].shape[0],
                item["parts"].dtype.names, item["parts"][0, 0]["part_name"].shape, item["parts"][0, 0]["mask"].dtype,
                {(b.shape, b.dtype) for b in bare} if wanted else None)

    assert structure(path, False)[:-3] == structure(reference, False)[:-3]
    assert structure(path, False)[-2] == structure(reference, False)[-2]
    no_parts = loadmat(reference.with_name("2009_000002.mat"))["anno"][0, 0]["objects"][0][0]["parts"]
    assert structure(path, True)[-1] <= {(no_parts.shape, no_parts.dtype)}


def test_parts_file_without_objects_reads_as_an_empty_row(tmp_path):
    write_pascal_parts_mat(tmp_path / "none.mat", "2008_000001", [])
    objects = loadmat(tmp_path / "none.mat")["anno"][0, 0]["objects"]
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
        if job == (PASCAL, 2):
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


@pytest.mark.parametrize("change, message", [
    ({"num_train": 0}, "num_train is 0"), ({"size": (16, 64)}, r"size\[0\] is 16"), ({"seed": -1}, "seed is -1"),
    ({"size": (64,)}, "height and width"), ({"workers": 0}, "workers is 0"),
])
def test_parameters_out_of_range_are_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        write_example(tmp_path / "set", **({"workers": 1} | PARAMETERS | change))
    assert not (tmp_path / "set").exists()
