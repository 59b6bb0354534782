"""Augmentations: equal to the recorded runs of the published code, and right on their own terms."""

import json
import random
import re

import numpy as np
import pytest
import torch

from data import photometric
from data import transforms as T
from data.labels import DepthLabel
from tests.shared import SHARED, golden
from utils.engine.tasks import label_rules

GUIDE = label_rules(["semseg"])
MAPS = ("semseg", "depth", "normals", "edge", "sal", "human_parts")
DEPTH_VOID = {"mtmamba": 255.0, "taskprompter": -1.0, "mlore": 0.0}
CASES_PATH = SHARED / "golden" / "metrics" / "transforms.json"
CASES = json.loads(CASES_PATH.read_text()) if CASES_PATH.is_file() else []

# One grey level after normalisation with the smallest std: bilinear resizing may round differently between
# OpenCV versions. Everything else is exact.
GREY_LEVEL = 1.001 / 255 / 0.224
IMAGE_TOLERANCE = {"scale": 1e-3, "train pipeline": GREY_LEVEL}


class Replay:
    """Hands out recorded draws and insists that kind, arguments and order are the recorded ones."""

    def __init__(self, draws):
        self.draws = list(draws)

    def _next(self, kind, *arguments):
        assert self.draws, f"a draw of {kind} too many"
        recorded, *values = self.draws.pop(0)
        assert (recorded, *values[:-1]) == (kind, *arguments)
        return values[-1]

    def random(self):
        return self._next("random")

    def uniform(self, a, b):
        return self._next("uniform", a, b)

    def randint(self, a, b):
        return self._next("randint", a, b)


def family_tasks(family):
    """The label rules with the depth void value of one of the published families."""
    class OtherVoid(DepthLabel):
        def mark_void(self, label):
            return np.where(label == 0, np.float32(DEPTH_VOID[family]), label)
    return label_rules(MAPS) | {"depth": OtherVoid()}


def run_case(case, sample):
    op, tasks = case["op"], family_tasks(case.get("family", "mtmamba"))
    if op == "scale":
        return T.RandomScale(tasks).apply(sample, case["scale"])
    if op == "crop":
        top, bottom, left, right = case["loc"]
        return T.RandomCrop(tasks, (bottom - top, right - left)).apply(sample, top, left)
    if op == "flip":
        return T.RandomFlip(tasks).apply(sample)
    if op == "pad":                            # the reference leaves a side that is already larger alone
        frame = [max(a, b) for a, b in zip(case["size"], sample["image"].shape[:2], strict=True)]
        return T.Pad(tasks, frame)(sample, None)
    if op == "normalize":
        return T.Normalise()(sample, None)
    if op == "pad(64,90) then add_ignore":
        return T.MarkVoid(tasks)(T.Pad(tasks, (64, 90))(sample, None), None)
    if op == "add_ignore":
        no_people = np.where(sample["human_parts"] == 255, 255, 0).astype(np.float32)
        return {"human_parts": tasks["human_parts"].mark_void(no_people)}
    if op == "photometric":
        image = sample["image"].astype(np.uint8)
        for name, value in case["steps"]:
            image = getattr(photometric, name)(image, value)
        return {"image": image}
    build = {"train pipeline": T.train_transform, "val pipeline": T.eval_transform}[op]
    replay = Replay(case.get("draws", ()))
    result = build(case["size"], tasks)(sample, replay)
    assert not replay.draws, f"draws left over: {replay.draws}"
    return result


@pytest.fixture(scope="module")
def recorded():
    with np.load(golden("metrics") / "transforms.npz") as file:
        return dict(file)


def below(arrays, prefix):
    return {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}


@pytest.mark.parametrize("case", CASES or [None], ids=lambda case: case["name"] if case else "absent")
def test_equals_recorded_run(case, recorded):
    result = run_case(case, below(recorded, "input/"))
    expected = below(recorded, case["name"] + "/")
    assert expected
    for key, value in expected.items():
        tolerance = IMAGE_TOLERANCE.get(case["op"], 0) if key == "image" else 0
        np.testing.assert_allclose(np.asarray(result[key]), value, rtol=0, atol=tolerance, err_msg=key)


def make_sample(height=40, width=50, seed=0):
    rng = np.random.default_rng(seed)
    normals = rng.normal(size=(height, width, 3)).astype(np.float32)
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    normals[:3] = 0
    return {
        "image": rng.integers(0, 256, (height, width, 3), dtype=np.uint8),
        "semseg": rng.integers(0, 5, (height, width, 1)).astype(np.float32),
        "depth": rng.uniform(1, 9, (height, width, 1)).astype(np.float32),
        "normals": normals,
        "edge": rng.integers(0, 2, (height, width, 1)).astype(np.float32),
        "meta": {"name": "frame_7", "size": (height, width)},
    }


TASKS4 = label_rules(("semseg", "depth", "normals", "edge"))


def test_train_output_contract_and_determinism():
    transform = T.train_transform((32, 48), TASKS4)
    for seed in range(12):
        first, second = (transform(make_sample(), random.Random(seed)) for _ in range(2))
        assert first["meta"] == {"name": "frame_7", "size": (40, 50)}
        for key, channels in {"image": 3, "semseg": 1, "depth": 1, "normals": 3, "edge": 1}.items():
            assert first[key].shape == (channels, 32, 48) and first[key].dtype == torch.float32
            assert torch.equal(first[key], second[key])
        length = first["normals"].norm(dim=0)
        void = (first["normals"] == 255).all(dim=0)
        torch.testing.assert_close(length[~void], torch.ones_like(length[~void]))
        assert set(first["semseg"].unique().tolist()) <= {0, 1, 2, 3, 4, 255}


def test_input_sample_is_not_modified():
    sample, untouched = make_sample(), make_sample()
    for seed in range(4):
        T.train_transform((32, 48), TASKS4)(sample, random.Random(seed))
    for key in ("image", *TASKS4):
        np.testing.assert_array_equal(sample[key], untouched[key])


def test_flip_negates_only_x_of_normals():
    sample = make_sample()
    flipped = T.RandomFlip(TASKS4).apply(sample)
    expected = sample["normals"][:, ::-1] * np.array([-1, 1, 1], np.float32)
    np.testing.assert_array_equal(flipped["normals"], expected)
    np.testing.assert_array_equal(flipped["depth"], sample["depth"][:, ::-1])


def test_scale_divides_depth_and_keeps_classes():
    scaled = T.RandomScale(TASKS4).apply(make_sample(), 2.0)
    assert scaled["depth"].shape == (80, 100, 1)
    np.testing.assert_allclose(scaled["depth"][::2, ::2], make_sample()["depth"] / 2, rtol=1e-6)
    np.testing.assert_array_equal(scaled["semseg"][1::2, 1::2], make_sample()["semseg"])


class Corners:
    """Random source whose corners are listed; counts the draws."""

    def __init__(self, values):
        self.values, self.count = list(values), 0

    def randint(self, low, high):
        self.count += 1
        assert low == 0
        return min(self.values.pop(0) if self.values else 0, high)


def one_class_sample():
    """All class 3 but for the lower right corner, which is half class 1 and half class 2."""
    sample = make_sample(40, 40)
    sample["semseg"][:] = 3
    sample["semseg"][20:, 20:30], sample["semseg"][20:, 30:] = 1, 2
    return sample


def test_crop_redraws_until_classes_vary():
    rng = Corners([0, 0, 5, 0, 20, 20, 0, 0])
    cropped = T.RandomCrop(GUIDE, (20, 20))(one_class_sample(), rng)
    assert rng.count == 6
    np.testing.assert_array_equal(np.unique(cropped["semseg"]), [1, 2])
    assert cropped["image"].shape == (20, 20, 3)


def test_crop_takes_the_eleventh_position_unseen():
    rng = Corners([])
    cropped = T.RandomCrop(GUIDE, (20, 20))(one_class_sample(), rng)
    assert rng.count == 22 and (cropped["semseg"] == 3).all()


@pytest.mark.parametrize(("shares", "draws"), [
    ({1: 0.7, 2: 0.3}, 2), ({1: 0.8, 2: 0.2}, 22),
    ({1: 0.1, 2: 0.1, 255: 0.8}, 2), ({1: 0.6, 255: 0.4}, 22), ({255: 1.0}, 22),       # void is not a class
])
def test_crop_compares_the_labelled_pixels(shares, draws):
    sample = make_sample(40, 50)
    row = np.repeat(list(shares), [round(40 * share) for share in shares.values()])
    sample["semseg"] = np.tile(row, 50).reshape(50, 40).T[..., None].astype(np.float32)   # each column alike
    rng = Corners([])
    T.RandomCrop(GUIDE, (40, 30))(sample, rng)
    assert rng.count == draws


def test_crop_without_semseg_draws_once_and_without_excess_not_at_all():
    sample = one_class_sample()
    del sample["semseg"]
    rng = Corners([7, 9])
    cropped = T.RandomCrop({}, (20, 20))(sample, rng)
    assert rng.count == 2
    np.testing.assert_array_equal(cropped["image"], sample["image"][7:27, 9:29])
    rng = Corners([])
    assert T.RandomCrop({}, (40, 40))(sample, rng) is sample and rng.count == 0


def test_normalise_is_the_same_from_uint8_and_float():
    image = make_sample()["image"]
    for view in (image, image[:, ::-1], image[3:9, 4:8]):
        by_table = T.Normalise()({"image": view}, None)["image"]
        computed = T.Normalise()({"image": view.astype(np.float32)}, None)["image"]
        np.testing.assert_array_equal(by_table, computed)


def test_eval_pads_around_the_centre_with_void():
    result = T.eval_transform((45, 53), TASKS4)(make_sample(), random.Random(0))
    sample = make_sample()
    np.testing.assert_array_equal(result["semseg"][0, 2:42, 1:51], sample["semseg"][..., 0])
    outside = torch.ones(45, 53, dtype=torch.bool)
    outside[2:42, 1:51] = False
    assert (result["image"][:, outside] == 0).all()
    for key in TASKS4:
        assert (result[key][:, outside] == 255).all(), key


def test_image_larger_than_the_frame_is_refused():
    message = re.escape("image frame_7 is 40 x 50 (height x width) and does not fit into the "
                        "frame of 40 x 48; set image_size to at least [40, 50]")
    with pytest.raises(ValueError, match=message):
        T.eval_transform((40, 48), TASKS4)(make_sample(), random.Random(0))


@pytest.mark.parametrize(("label_size", "expected"), [(None, (40, 50)), ((20, 25), (20, 25))])
def test_fixed_transform_resizes_the_image_only_unless_told(label_size, expected):
    tasks = label_rules(("semseg", "depth"))
    sample = {key: value for key, value in make_sample().items() if key in ("image", "meta", *tasks)}
    sample["depth"][0, 0] = 0
    result = T.fixed_transform((16, 32), tasks, label_size)(sample, random.Random(0))
    assert result["image"].shape == (3, 16, 32)
    assert result["semseg"].shape == (1, *expected) and result["depth"].shape == (1, *expected)
    assert result["depth"][0, 0, 0] == 0                  # zero disparity is a value here, not void
