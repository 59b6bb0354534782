"""Every augmentation and every task's label rules on a few pixels, and the order in which random numbers are drawn."""

import random
import re

import numpy as np
import pytest
import torch

from data import photometric
from data import transforms as T
from data.datasets import DATASETS
from data.labels import MapLabel
from data.transforms import build_transform
from utils.engine.tasks import label_rules

ALL = ("semseg", "depth", "human_parts", "sal", "normals", "edge")


def rules(*names: str):
    """Label rules of these tasks: what the transforms read from the task table."""
    return label_rules(names or ALL)


GUIDE = rules("semseg")


def image(*values: float, dtype=np.uint8) -> np.ndarray:
    """One row of grey pixels, 1 x W x 3."""
    return np.repeat(np.array(values, dtype)[None, :, None], 3, axis=2)


def label(*values) -> np.ndarray:
    """One row of labels, 1 x W x C float32."""
    return np.array(values, np.float32).reshape(1, len(values), -1)


class Draws:
    """A random source whose values are listed; `asked` records every draw with its limits."""

    def __init__(self, *values: float):
        self.values, self.asked = list(values), []

    def _next(self, *what):
        self.asked.append(what)
        return self.values.pop(0)

    def random(self):
        return self._next("random")

    def uniform(self, low, high):
        return self._next("uniform", low, high)

    def randint(self, low, high):
        return self._next("randint", low, high)


# The rules of the labels ---------------------------------------------------------------------------------------------

def test_tasks_stand_in_their_order():
    assert tuple(rules("edge", "sal", "semseg")) == ("semseg", "sal", "edge") and tuple(rules()) == ALL


def test_padding_and_resizing_of_every_task():
    table = rules()
    assert {name: rule.pad_value for name, rule in table.items()} == {
        "semseg": 255, "depth": 0, "human_parts": 255, "sal": 255, "normals": 0, "edge": 255}
    assert {name: rule.interp for name, rule in table.items()} == dict.fromkeys(ALL, "nearest") | {"normals": "cubic"}


@pytest.mark.parametrize(("task", "before", "after"), [
    ("depth", (0, 1, 255, 1e-6), (255, 1, 255, 1e-6)), ("semseg", (0, 1, 255), (0, 1, 255)),
    ("sal", (0, 1, 255), (0, 1, 255)), ("edge", (0, 1, 255), (0, 1, 255)),
    ("human_parts", (0, 0, 255), (255, 255, 255)),         # a crop without people is void, its background too
    ("human_parts", (0, 1, 255), (0, 1, 255)), ("human_parts", (0, 0, 0), (255, 255, 255)),
    ("human_parts", (6, 6, 6), (6, 6, 6)), ("human_parts", (255, 255, 255), (255, 255, 255)),
    ("normals", ((0, 0, 0), (0, 0, 1), (-1, 0, 0)), ((255, 255, 255), (0, 0, 1), (-1, 0, 0))),
])
def test_what_supervises_nothing_is_void(task, before, after):
    marked = T.MarkVoid(rules(task))({task: label(*before)}, None)[task]
    np.testing.assert_array_equal(marked, label(*after))
    assert marked.dtype == np.float32


def test_a_flip_turns_x_of_normals_and_nothing_else():
    sample = {"image": image(1, 2), "normals": label((0.1, 0.2, 0.3), (-0.4, 0.5, -0.6)), "depth": label(1, 2),
              "semseg": label(3, 255), "sal": label(0, 1), "edge": label(1, 0), "human_parts": label(5, 6),
              "meta": {"name": "a"}}
    flipped = T.RandomFlip(rules()).apply(sample)
    np.testing.assert_array_equal(flipped["normals"], label((0.4, 0.5, -0.6), (-0.1, 0.2, 0.3)))
    assert {key: flipped[key].ravel().tolist() for key in ALL if key != "normals"} == {
        "semseg": [255, 3], "depth": [2, 1], "human_parts": [6, 5], "sal": [1, 0], "edge": [0, 1]}
    assert flipped["image"][0, :, 0].tolist() == [2, 1] and flipped["meta"] == {"name": "a"}


@pytest.mark.parametrize(("drawn", "flipped"), [(0.0, True), (0.299, True), (0.3, False), (0.9, False)])
def test_a_flip_happens_below_its_probability(drawn, flipped):
    sample = {"image": image(1, 2)}
    result = T.RandomFlip({}, 0.3)(sample, Draws(drawn))["image"][0, :, 0].tolist()
    assert result == ([2, 1] if flipped else [1, 2])
    assert T.RandomFlip({}).probability == 0.5


# Scale ---------------------------------------------------------------------------------------------------------------

def test_scale_divides_depth_by_the_factor_and_keeps_the_rest():
    sample = {"image": np.zeros((2, 4, 3), np.uint8), "depth": np.full((2, 4, 1), 6, np.float32),
              "semseg": np.full((2, 4, 1), 7, np.float32), "edge": np.ones((2, 4, 1), np.float32),
              "normals": np.full((2, 4, 3), 0.5, np.float32), "meta": {}}
    scaled = T.RandomScale(rules("depth", "semseg", "normals", "edge")).apply(sample, 1.5)
    for key in ("image", "depth", "semseg", "normals", "edge"):
        assert scaled[key].shape[:2] == (3, 6), key
    assert (scaled["depth"] == 4).all() and scaled["depth"].dtype == np.float32
    assert (scaled["semseg"] == 7).all() and (scaled["normals"] == 0.5).all() and (scaled["edge"] == 1).all()


def test_scale_rounds_sizes_down_and_leaves_one_alone():
    sample = {"image": np.zeros((5, 7, 3), np.uint8), "meta": {}}
    assert T.RandomScale({}).apply(sample, 1.0) is sample
    assert T.RandomScale({}).apply(sample, 0.5)["image"].shape == (2, 3, 3)
    assert T.RandomScale({}).apply(sample, 0.5)["image"].dtype == np.float32
    ramp = {"image": image(0, 10, dtype=np.uint8).repeat(2, axis=0)}
    np.testing.assert_allclose(T.RandomScale({}).apply(ramp, 2.0)["image"][0, :, 0], [0, 2.5, 7.5, 10])
    draws = Draws(1.0)
    assert T.RandomScale({})(sample, draws) is sample and draws.asked == [("uniform", 0.5, 2.0)]
    T.RandomScale({}, 0.8, 1.2)(sample, draws := Draws(1.0))
    assert draws.asked == [("uniform", 0.8, 1.2)]


# Crop ----------------------------------------------------------------------------------------------------------------

def crop_sample(height: int = 4, width: int = 6) -> dict:
    index = np.arange(height * width).reshape(height, width, 1)
    return {"image": np.repeat(index, 3, axis=2).astype(np.uint8), "semseg": (index % 2).astype(np.float32),
            "meta": {}}


def test_crop_draws_top_then_left_within_the_image():
    draws = Draws(1, 2)
    cropped = T.RandomCrop(GUIDE, (2, 3))(crop_sample(), draws)
    assert draws.asked == [("randint", 0, 2), ("randint", 0, 3)]
    assert cropped["image"][..., 0].tolist() == [[8, 9, 10], [14, 15, 16]]
    assert cropped["semseg"].shape == (2, 3, 1)


@pytest.mark.parametrize(("size", "asked", "shape"), [
    ((9, 3), [("randint", 0, 0), ("randint", 0, 3)], (4, 3)), ((2, 9), [("randint", 0, 2), ("randint", 0, 0)], (2, 6)),
    ((4, 3), [("randint", 0, 0), ("randint", 0, 3)], (4, 3)), ((9, 9), [("randint", 0, 0)] * 2, (4, 6)),
    ((4, 6), [], (4, 6)), ((6, 4), [("randint", 0, 0), ("randint", 0, 2)], (4, 4))])
def test_a_side_shorter_than_the_window_is_kept(size, asked, shape):
    draws = Draws(0, 0)
    assert T.RandomCrop(GUIDE, size)(crop_sample(), draws)["image"].shape[:2] == shape
    assert draws.asked == asked


@pytest.mark.parametrize(("labels", "accepted"), [
    ((1, 1, 1, 2), False), ((1, 1, 2, 2), True), ((1, 1, 1, 2, 2), True), ((1, 1, 1, 1, 2, 2), True),   # 0.75 is not
    ((1, 2, 255, 255, 255, 255), True), ((1, 255, 255, 255), False), ((0, 0, 1, 2), True), ((1, 1, 1, 1), False),
    ((254, 254, 0, 0), True), ((255, 255, 255, 255), False)])
def test_a_crop_is_varied_when_its_commonest_class_is_below_the_limit(labels, accepted):
    """Redrawn until it is; a window beside the whole row would show nothing else."""
    sample = {"image": np.zeros((2, len(labels), 3), np.uint8), "semseg": label(*labels).repeat(2, axis=0)}
    draws = Draws(*[0] * 22)
    T.RandomCrop(GUIDE, (1, len(labels)))(sample, draws)
    assert len(draws.asked) == (2 if accepted else 22)
    assert T.RandomCrop.max_tries == 10 and T.RandomCrop(GUIDE, (1, 1)).category_limit == 0.75


def test_the_limit_and_the_guiding_label_can_be_set():
    sample = {"image": np.zeros((2, 4, 3), np.uint8), "semseg": label(1, 1, 1, 2).repeat(2, axis=0),
              "parts": label(1, 1, 2, 2).repeat(2, axis=0)}
    for crop in (T.RandomCrop(GUIDE, (1, 4), 0.76), T.RandomCrop({"parts": MapLabel(guides_crop=True)}, (1, 4))):
        crop(sample, draws := Draws(0, 0))
        assert len(draws.asked) == 2
    assert [name for name, label in rules().items() if label.guides_crop] == ["semseg"]


# Colours -------------------------------------------------------------------------------------------------------------

def test_colour_changes_clip_and_truncate():
    assert photometric.brightness(image(0, 100, 250), 7.9)[0, :, 0].tolist() == [7, 107, 255]
    assert photometric.brightness(image(0, 100, 250), -20.5)[0, :, 0].tolist() == [0, 79, 229]
    assert photometric.contrast(image(0, 101, 200), 1.5)[0, :, 0].tolist() == [0, 151, 255]
    assert photometric.contrast(image(0, 101, 200), 0.5)[0, :, 0].tolist() == [0, 50, 100]
    red = np.array([[[255, 0, 0]]], np.uint8)
    assert [photometric.hue(red, delta)[0, 0].tolist() for delta in (60, -60, 120, 0, 180)] == [
        [0, 255, 0], [0, 0, 255], [0, 0, 255], [255, 0, 0], [255, 0, 0]]
    assert photometric.saturation(red, 0.0)[0, 0].tolist() == [255, 255, 255]
    pale = np.array([[[200, 100, 100]]], np.uint8)
    assert photometric.saturation(pale, 1.5)[0, 0].tolist() == pytest.approx([200, 50, 50], abs=1)
    assert photometric.saturation(red, 1.5)[0, 0].tolist() == [255, 0, 0]


NO, YES = 0.5, 0.49


@pytest.mark.parametrize(("values", "expected"), [
    ((NO, NO, NO, NO, NO), 100), ((YES, 20.0, NO, NO, NO, NO), 120), ((NO, YES, YES, 1.5, NO, NO), 150),
    ((NO, NO, NO, NO, YES, 0.5), 50), ((NO, NO, YES, 1.2, NO, NO), 100), ((NO, NO, NO, YES, 5, NO), 100),
    ((YES, 20.0, YES, YES, 1.5, NO, NO), 180)])
def test_distortion_draws_in_its_published_order(values, expected):
    """Brightness, whether contrast comes second or last, saturation, hue; grey pixels show no colour change."""
    draws = Draws(*values)
    result = photometric.PhotometricDistortion()({"image": image(100.9, 100, dtype=np.float32)}, draws)["image"]
    assert result[0, :, 0].tolist() == [expected, expected] and result.dtype == np.uint8
    assert draws.values == []


def test_limits_of_the_distortion():
    photometric.PhotometricDistortion()({"image": image(100)}, first := Draws(YES, 0, YES, YES, 1, YES, 1, YES, 0))
    photometric.PhotometricDistortion()({"image": image(100)}, last := Draws(YES, 0, NO, YES, 1, YES, 0, YES, 1))
    coin, bright, around_one, turn = ("random",), ("uniform", -32, 32), ("uniform", 0.5, 1.5), ("randint", -18, 17)
    assert first.asked == [coin, bright, coin, coin, around_one, coin, around_one, coin, turn]
    assert last.asked == [coin, bright, coin, coin, around_one, coin, turn, coin, around_one]


def test_normalisation_is_that_of_imagenet():
    for dtype in (np.uint8, np.float32):
        colours = np.array([[[0, 0, 0], [255, 255, 255], [51, 102, 204]]], dtype)
        result = T.Normalise()({"image": colours}, None)["image"]
        assert result.dtype == np.float32
        np.testing.assert_allclose(result[0], [
            [-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225], [0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225],
            [(0.2 - 0.485) / 0.229, (0.4 - 0.456) / 0.224, (0.8 - 0.406) / 0.225]], rtol=1e-5)


# Frame and tensors ---------------------------------------------------------------------------------------------------

def test_padding_is_void_around_the_centre():
    sample = {"image": image(9, dtype=np.float32), "depth": label(5), "semseg": label(6), "normals": label((1, 2, 3))}
    padded = T.Pad(rules("depth", "semseg", "normals"), (2, 4))(sample, None)
    assert padded["image"][..., 1].tolist() == [[0, 9, 0, 0], [0, 0, 0, 0]]        # floor of half the excess
    assert padded["depth"][..., 0].tolist() == [[0, 5, 0, 0], [0, 0, 0, 0]]
    assert padded["semseg"][..., 0].tolist() == [[255, 6, 255, 255], [255] * 4]
    assert padded["normals"][0].tolist() == [[0, 0, 0], [1, 2, 3], [0, 0, 0], [0, 0, 0]]
    wide = T.Pad({}, (3, 1))({"image": image(1, 2, 3, dtype=np.float32)}, None)["image"]
    assert wide[..., 0].tolist() == [[0] * 3, [1, 2, 3], [0] * 3]                  # a longer side stays as it is


@pytest.mark.parametrize(("size", "fits"), [((3, 4), True), ((4, 5), True), ((2, 4), False), ((3, 3), False)])
def test_an_image_must_fit_the_frame(size, fits):
    sample = {"image": np.zeros((3, 4, 3), np.uint8)}
    if fits:
        assert T.RequireFit(size)(sample, None) is sample
        return
    words = re.escape(f"image of this sample is 3 x 4 (height x width) and does not fit into the frame of {size[0]} x "
                      f"{size[1]}; set image_size to at least [3, 4]")
    with pytest.raises(ValueError, match=words):
        T.RequireFit(size)(sample, None)


def test_tensors_are_channel_first():
    sample = {"image": image(1, 2), "normals": label((1, 2, 3), (4, 5, 6)), "edge": np.ones((1, 2, 1), np.uint8),
              "meta": 7}
    result = T.ToTensor(rules("normals", "edge"))(sample, None)
    assert result["image"].tolist() == [[[1, 2]]] * 3
    assert result["normals"].tolist() == [[[1, 4]], [[2, 5]], [[3, 6]]] and result["meta"] == 7
    assert result["edge"].dtype == torch.float32 and result["edge"].shape == (1, 1, 2)


def test_resizing_without_augmentation():
    small = T.ResizeImage({}, (1, 2))({"image": image(10, 20, 30, 50)}, None)["image"]
    assert small[0, :, 0].tolist() == pytest.approx([17, 37.5], abs=1)     # weighs neighbours too: not 15 and 40
    resized = T.ResizeLabels(rules("semseg"), (2, 2))({"semseg": label(1, 2, 3, 4), "other": 5}, None)
    assert resized["semseg"][..., 0].tolist() == [[1, 3], [1, 3]] and resized["other"] == 5


# The whole of it -----------------------------------------------------------------------------------------------------

def kinds(transform: T.Compose) -> list[str]:
    return [type(step).__name__ for step in transform.steps]


FRAME = ["RequireFit", "Normalise", "Pad", "MarkVoid", "ToTensor"]


def test_steps_of_every_data_set():
    tasks = rules("semseg", "depth")
    for name in ("NYUD", "PASCALContext"):
        spec = DATASETS.load(name)
        train, evaluation = (build_transform(spec.image_size, None, training, tasks) for training in (True, False))
        assert kinds(train) == ["RandomScale", "RandomCrop", "RandomFlip", "PhotometricDistortion", *FRAME]
        assert kinds(evaluation) == FRAME
        scale, crop, flip = train.steps[:3]
        assert (scale.low, scale.high, crop.size, crop.category_limit, flip.probability) == (
            0.5, 2.0, spec.image_size, 0.75, 0.5)
    for training in (True, False):
        fixed = build_transform((512, 1024), (1024, 2048), training, tasks)
        assert kinds(fixed) == ["ResizeImage", "ResizeLabels", "Normalise", "ToTensor"]
        assert (fixed.steps[0].size, fixed.steps[1].size) == ((512, 1024), (1024, 2048))


def test_steps_can_be_changed_by_name():
    train = build_transform((32, 64), None, True, {}, scale_range=(1, 3), flip=0.25, photometric=False,
                            category_limit=0.9)
    scale, crop, flip = train.steps[:3]
    assert kinds(train) == ["RandomScale", "RandomCrop", "RandomFlip", *FRAME]
    assert (scale.low, scale.high, crop.size, crop.category_limit, flip.probability) == (1, 3, (32, 64), 0.9, 0.25)
    fixed = build_transform((16, 32), (8, 24), True, {})
    assert (fixed.steps[0].size, fixed.steps[1].size) == ((16, 32), (8, 24))
    assert kinds(T.fixed_transform((16, 32), {})) == ["ResizeImage", "Normalise", "ToTensor"]


def test_numbers_are_drawn_in_one_order():
    """Scale, corner, flip, colours: a changed order would change every published run."""
    sample = {"image": np.zeros((4, 6, 3), np.uint8), "semseg": label(*[0, 1] * 12).reshape(4, 6, 1), "meta": {}}
    T.train_transform((2, 3), rules("semseg"))(sample, draws := Draws(1.0, 1, 2, NO, NO, NO, NO, NO, NO))
    assert [what[0] for what in draws.asked] == ["uniform", "randint", "randint", *["random"] * 6]
    first = T.train_transform((2, 3), rules("semseg"))(sample, random.Random(4))
    second = T.train_transform((2, 3), rules("semseg"))(sample, random.Random(4))
    assert torch.equal(first["image"], second["image"])
