"""The rendered example data set: exact geometry and consistent labels (files: test_example_files.py)."""

import numpy as np
import pytest
from skimage.morphology import thin

from scripts.example_data.geometry import Solid, first_hit, lit
from scripts.example_data.labels import BODY_PARTS, LABELS, VOC_NAMES
from scripts.example_data.render import render_scene, view_rays
from scripts.example_data.scene import build_scene

SIZE = (72, 96)
PERSON_SEED = 4  # style pascal: someone stands in the middle


@pytest.fixture(scope="module")
def scenes():
    return [render_scene(seed, SIZE, style) for seed, style in ((PERSON_SEED, "pascal"), (3, "nyud"), (12, "pascal"))]


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
    assert np.allclose(depth, [3, 3.5, (400 - np.sqrt(160000 - 101 * 1500)) / 101])
    assert index.tolist() == [0, 1, 0]


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
        assert scene.depth_m.min() > 0.5 and scene.depth_m.max() < 10


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
    assert len(BODY_PARTS) == 16 and set(BODY_PARTS.values()) == set(range(1, 7))
    for label in LABELS.values():
        assert 1 <= label.nyud <= 40 and 0 <= label.pascal <= 20 and 1 <= label.context <= 459
        assert not label.pascal or label.pascal in VOC_NAMES
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
    def has_person(seed, style):
        return "person" in build_scene(np.random.default_rng(seed), style).room.names

    share = {style: np.mean([has_person(seed, style) for seed in range(30)]) for style in ("nyud", "pascal")}
    assert 0.1 < share["nyud"] < 0.55 and 0.6 < share["pascal"] < 0.95
