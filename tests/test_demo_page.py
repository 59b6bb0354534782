"""The demo page: values in words, pictures over the photograph, the surface in space; the page where gradio is."""

import json
import struct
import sys
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest

from evaluation.evaluator import TaskContext
from scripts import app
from scripts.demo_page.relief import glb, surface, write_relief
from scripts.demo_page.showing import LONGEST, over_photograph, pack, value_at
from utils.engine.prediction import Prediction, TaskResult

IMAGE = np.full((40, 60, 3), 100, np.uint8)


def result(task, prediction, **context) -> TaskResult:
    return TaskResult(task, prediction, TaskContext(prediction.shape[-1], **context), IMAGE)


@pytest.fixture
def prediction() -> Prediction:
    """A wall two metres away, a step in its right half, seen by a network of three tasks."""
    classes = np.zeros((40, 60, 1), np.uint8)
    classes[:, 30:] = 1
    depth = np.where(np.arange(60) < 30, 2.0, 3.0)[None, :, None].repeat(40, 0).astype(np.float32)
    edge = np.zeros((40, 60, 1), np.float32)
    edge[:, 30] = 0.75
    normals = np.zeros((40, 60, 3), np.float32)
    normals[..., 2] = 1
    normals[:, 30:] = (0, 0.6, 0.8)
    return Prediction(IMAGE, [
        result("semseg", classes, class_names=("wall", "door")), result("depth", depth, unit="m"),
        result("edge", edge), result("normals", normals)])


@pytest.mark.parametrize("task, x, words", [
    ("semseg", 0.75, "semseg at column 45, row 20: door (class 1)"),
    ("depth", 0.0, "depth at column 0, row 20: 2.00 m"), ("depth", 1.0, "depth at column 59, row 20: 3.00 m"),
    ("edge", 0.51, "edge at column 30, row 20: 0.75 probability"),
    ("normals", 0.75, "normals at column 45, row 20: 37 degrees away from the line of sight, facing 90 degrees"),
])
def test_what_is_predicted_at_a_place(prediction, task, x, words):
    assert value_at(prediction[task], x, 0.5).startswith(words)


def test_colours_over_the_photograph(prediction):
    colours = prediction["semseg"].colour()
    np.testing.assert_array_equal(over_photograph(prediction["semseg"], IMAGE, 1, 0), colours)
    np.testing.assert_array_equal(over_photograph(prediction["semseg"], IMAGE, 0, 0), IMAGE)
    half = over_photograph(prediction["semseg"], IMAGE, 0.5, 0.9)                       # no probability: no threshold
    assert np.abs(half.astype(int) - (IMAGE.astype(int) + colours) / 2).max() <= 1
    lines = over_photograph(prediction["edge"], IMAGE, 1, 0.7)
    assert np.unique(lines).tolist() == [0, 255] and (lines[:, 30] == 255).all()
    assert not over_photograph(prediction["edge"], IMAGE, 1, 0.8).any()
    large = np.zeros((2 * LONGEST, 30, 3), np.uint8)
    flat = TaskResult("edge", np.ones((2 * LONGEST, 30, 1), np.float32), TaskContext(1), large)
    assert over_photograph(flat, large, 1, 0).shape == (LONGEST, 15, 3)


def test_points_are_where_a_camera_saw_them_and_jumps_are_cut():
    depth = np.full((4, 6), 2.0, np.float32)
    points, triangles = surface(depth, 90)                  # a focal length of three pixels
    assert len(triangles) == 2 * 3 * 5
    np.testing.assert_allclose(points[0], [-2.5 * 2 / 3, 1.5 * 2 / 3, -2])
    corners = points[triangles]
    facing = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    assert (facing[:, 2] > 0).all()                         # towards the viewer
    depth[:, 3:] = 2.5
    assert len(surface(depth, 90)[1]) == 2 * 3 * 4
    depth[0, 0] = 0                                         # no depth
    assert len(surface(depth, 90)[1]) == 2 * (3 * 4 - 1)


def test_the_file_holds_what_glTF_wants():
    points, triangles = surface(np.full((3, 4), 1.0, np.float32), 60)
    normals = np.tile(np.float32([0, 0, 1]), (12, 1))
    data = glb(points, triangles, np.full((12, 3), 255, np.uint8), normals)
    magic, version, length = struct.unpack_from("<4sII", data)
    assert (magic, version, length) == (b"glTF", 2, len(data))
    size, = struct.unpack_from("<I", data, 12)
    scene, body = json.loads(data[20:20 + size]), data[28 + size:]
    assert len(body) == scene["buffers"][0]["byteLength"]
    primitive = scene["meshes"][0]["primitives"][0]

    def read(number, dtype):
        view = scene["bufferViews"][scene["accessors"][number]["bufferView"]]
        return np.frombuffer(body, dtype, view["byteLength"] // np.dtype(dtype).itemsize, view["byteOffset"])

    np.testing.assert_array_equal(read(primitive["attributes"]["POSITION"], "<f4").reshape(-1, 3), points)
    np.testing.assert_array_equal(read(primitive["attributes"]["NORMAL"], "<f4").reshape(-1, 3), normals)
    np.testing.assert_array_equal(read(primitive["indices"], "<u4").reshape(-1, 3), triangles)
    assert (read(primitive["attributes"]["COLOR_0"], "u1") == 255).all()
    assert scene["accessors"][0]["min"] == points.min(axis=0).tolist()


def test_files_of_a_picture(prediction, tmp_path):
    assert write_relief(prediction, 60, tmp_path / "s.glb").read_bytes()[:4] == b"glTF"
    without = Prediction(IMAGE, [result("depth", prediction["depth"].prediction, unit="px")])
    assert write_relief(without, 60, tmp_path / "no.glb") is None and not (tmp_path / "no.glb").exists()
    with zipfile.ZipFile(pack(prediction, tmp_path, "photo")) as archive:
        names = set(archive.namelist())
        assert "depth: " in archive.read("photo/formats.txt").decode()
    assert {"photo/panels/photo.png", "photo/raw/depth/photo.png", "photo/raw/normals/photo.npy",
            "photo/formats.txt"} <= names


def test_without_gradio_the_page_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "scripts.demo_page.page", raising=False)
    assert app.main(["--trained_model", "nothing"]) == 1
    assert "pip install -r requirements-demo.txt" in capsys.readouterr().err


def test_the_page_shows_and_tells(prediction, tmp_path):
    gradio = pytest.importorskip("gradio", reason="the demo page needs gradio (requirements-demo.txt)")
    from scripts.demo_page import page
    model = SimpleNamespace(config=SimpleNamespace(model="bim", backbone="swin"), selection="last update",
                            tasks=tuple(prediction), predict=lambda path: prediction,
                            contexts={task: one.context for task, one in prediction.items()})
    built = page.build_page({"a": model, "b": model}, [])
    assert {block.label for block in built.blocks.values() if isinstance(block, gradio.Image)} == {
        "photograph", *prediction}
    heard = {(block, event) for fn in built.fns.values() for block, event in fn.targets
             if isinstance(built.blocks.get(block), gradio.Slider)}
    assert len(heard) == 3 and {event for _, event in heard} == {"change"}          # by the keyboard too
    painted = page._paint([page.Shown("a", model)], {"a": prediction}, ["semseg", "edge"], 1.0, 0.0)
    pictures, keys = painted[:len(prediction)], painted[len(prediction):]
    for task, picture, key in zip(prediction, pictures, keys, strict=True):
        assert picture.visible == key.visible == (task in ("semseg", "edge"))
        assert key.value.count("<li>") == len(prediction[task].legend())
    assert "wall" in keys[0].value and 'fill="#800000"' in keys[0].value
    scratch = page.Scratch()
    found, *files = page._predict({"a": model}, scratch, "photo.jpg")
    assert found["a"] is prediction and len(files) == 1
    with pytest.raises(gradio.Error, match="Choose a photograph"):
        page._predict({"a": model}, scratch, None)

    def refuse(path):
        raise ValueError("photo.jpg is no picture")

    with pytest.raises(gradio.Error, match="is no picture"):
        page._predict({"a": SimpleNamespace(predict=refuse)}, scratch, "photo.jpg")
    told = page._values("a")(found, SimpleNamespace(index=[45, 20]))
    assert told.splitlines()[1] == "- depth at column 45, row 20: 3.00 m"
