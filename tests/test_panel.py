"""The sheet of pictures for people: where tiles, legends and swatches lie, in pixels."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from evaluation.evaluator import TaskContext
from utils.engine.panel import INK, PAPER, batch_panel, prediction_panel, to_array
from utils.engine.views import CLASSES, DEPTH_MAP, PROBABILITY, VECTORS, colour_normals

RGB = np.full((60, 80, 3), 200, np.uint8)
EDGE, NORMALS = TaskContext(1), TaskContext(3)


@pytest.mark.parametrize(("tasks", "size"), [
    ((), (8 + 22 + 240 + 4 + 8, 8 + 328)),                                     # the input alone: no legend
    (("edge",), (8 + 22 + 240 + 4 + 16 + 8, 8 + 2 * 328)),                     # a legend of one line
    (("edge", "normals"), (8 + 22 + 240 + 4 + 32 + 8, 8 + 3 * 328)),           # of two lines
    (("edge", "normals", "sal"), (8 + 2 * (22 + 240 + 4 + 32 + 8), 8 + 3 * 328)),      # a second row of tiles
])
def test_the_size_of_the_sheet(tasks, size):
    """Tiles are 320 pixels wide, three to a row, with 8 pixels between them."""
    maps = {task: np.zeros((60, 80, 3 if task == "normals" else 1), np.float32) for task in tasks}
    panel = prediction_panel(RGB, maps, {task: NORMALS if task == "normals" else EDGE for task in tasks})
    assert panel.shape == (*size, 3) and panel.dtype == np.uint8


def test_pictures_and_swatches_lie_where_they_belong():
    panel = prediction_panel(RGB, {"edge": np.ones((60, 80, 1), np.float32)}, {"edge": EDGE})
    assert (panel[8 + 22:8 + 22 + 240, 8:328] == 200).all()                     # the input, enlarged to 320 x 240
    assert (panel[8 + 22:8 + 22 + 240, 336:656] == 255).all()                   # the prediction: white
    assert (panel[:8] == PAPER).all() and (panel[:, :8] == PAPER).all()
    top = 8 + 22 + 240 + 4
    for left, colour in ((336, 0), (336 + 160, 255)):                           # "0" is black, "1" is white
        assert (panel[top + 2, left + 2:left + 15] == INK).all() and (panel[top + 13, left + 2:left + 15] == INK).all()
        assert (panel[top + 2:top + 14, left + 2] == INK).all() and (panel[top + 2:top + 14, left + 14] == INK).all()
        assert (panel[top + 3:top + 13, left + 3:left + 14] == colour).all()
        assert (panel[top + 1, left:left + 18] == PAPER).all() and (panel[top:top + 14, left + 1] == PAPER).all()
        assert (panel[top + 3:top + 13, left + 19:left + 30] != 255).any()      # its text


def test_a_batch_shows_predictions_above_labels():
    """First image: unnormalised input, prediction; below the label of half the size, enlarged without smoothing."""
    prediction, label = torch.zeros(2, 1, 4, 6), torch.ones(2, 1, 2, 3)
    batch = {"image": torch.zeros(2, 3, 4, 6), "edge": label}
    panel = batch_panel(batch, {"edge": prediction}, {"edge": EDGE})
    assert panel.shape == (8, 12, 3)
    assert panel[:, :6].reshape(-1, 3).tolist() == [[123, 116, 103]] * 48       # ImageNet's mean colour, truncated
    assert (panel[:4, 6:] == 0).all() and (panel[4:, 6:] == 255).all()


def test_only_maps_are_turned_into_arrays():
    boxes = torch.zeros(5, 4)
    assert to_array(boxes) is boxes and to_array([1]) == [1]
    assert to_array(torch.zeros(2, 3, 4)).shape == (3, 4, 2)


def test_colours_saturate_and_legends_name_them():
    assert colour_normals(np.array([[[1.2, -1.2, 0.0]]], np.float32)).tolist() == [[[255, 0, 127]]]
    depth = np.linspace(1, 3, 101, dtype=np.float32).reshape(1, -1, 1)
    legend = DEPTH_MAP.legend(depth, replace(EDGE, unit="m"))
    assert legend == [((122, 4, 3), "near 1.04 m"), ((48, 18, 59), "far 2.96 m")]
    assert [text for _, text in DEPTH_MAP.legend(depth, replace(EDGE, unit="px"))] == ["1.04 px", "2.96 px"]
    assert VECTORS.legend(None, NORMALS) == [
        ((255, 127, 127), "+x"), ((0, 127, 127), "-x"), ((127, 255, 127), "+y"), ((127, 127, 255), "+z")]
    assert PROBABILITY.legend(None, EDGE) == [((0, 0, 0), "0"), ((255, 255, 255), "1")]
    classes = TaskContext(3, class_names=("background", "cat", "dog"))
    assert CLASSES.legend(np.array([[[1], [1], [2]]]), classes) == [((128, 0, 0), "cat"), ((0, 128, 0), "dog")]


CAT = ("wall", "cat", "dog")


@pytest.mark.parametrize(("view", "context", "values", "words"), [
    (CLASSES, TaskContext(3, class_names=CAT), [0, 1, 2, 255], [*CAT, "no label"]),
    (CLASSES, TaskContext(3, class_names=CAT, colours=((1, 2, 3), (4, 5, 6), (7, 8, 9))), [0, 1, 2, 255],
     [*CAT, "no label"]),
    (CLASSES, TaskContext(2), [0, 1, 255], ["0", "1", "no label"]),
    (DEPTH_MAP, TaskContext(1, unit="m", shown=(1.0, 3.0)), [1, 3, 0], ["near", "far", "no label"]),
    (DEPTH_MAP, TaskContext(1, unit="px", shown=(1.0, 3.0)), [1, 3, 255], ["small", "large", "no label"]),
    (VECTORS, NORMALS, [(1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, 0, 1), (255, 255, 255)],
     ["+x", "-x", "+y", "+z", "no label"]),
    (PROBABILITY, EDGE, [0, 1, 255], ["0", "1", "no label"]),
])
def test_a_key_names_the_colours_that_are_painted(view, context, values, words):
    column = np.array(values, np.float32).reshape(len(values), 1, -1)
    painted = view.picture(column, context, RGB)[:, 0].tolist()
    assert [([*colour], text) for colour, text in view.key(context)] == list(zip(painted, words, strict=True))


@pytest.mark.parametrize(("unit", "valid_range", "steps", "words"), [
    ("m", None, 1000, "16-bit PNG, millimetres, at most 65.535 m"),
    ("m", (0.1, 80), 256, "16-bit PNG, m * 256, at most 255.996 m"),
    ("px", (0, 80), 256, "16-bit PNG, px * 256, at most 255.996 px"),
    ("", None, 256, "16-bit PNG, label value * 256, at most 255.996")])
def test_raw_depth_says_its_unit(tmp_path, unit, valid_range, steps, words):
    """Disparities of Cityscapes reach 127 pixels, which as thousandths would not fit into 16 bits."""
    context = TaskContext(1, unit=unit, valid_range=valid_range)
    path = DEPTH_MAP.write(tmp_path / "x", np.array([[[1.5], [60.0]]], np.float32), context)
    assert np.asarray(Image.open(path)).tolist() == [[1.5 * steps, 60 * steps]]
    assert DEPTH_MAP.raw_format(context) == words
