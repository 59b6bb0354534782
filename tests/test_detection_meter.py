"""The detection score of Cityscapes 3D: by hand, against the official results, and against the official program."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data.boxes_file import VEHICLES, read_boxes
from data.boxes_label import Boxes3DLabel
from evaluation.detection3d.matching import is_ignored, match, overlaps
from evaluation.detection3d.meter import SIMILARITIES, DetectionMeter, average_precision
from tests.shared import golden
from utils.boxes3d import Boxes3D

CASES = ("noisy", "good", "perfect", "no_predictions", "no_ground_truth", "missing_files", "one_depth_bin")


def test_rectangles_include_their_last_pixel():
    first, second = np.array([[0.0, 0, 9, 9]]), np.array([[0.0, 0, 9, 4], [5, 5, 14, 14], [20, 20, 21, 21]])
    common, overlap = overlaps(first, second)
    assert common.tolist() == [[50, 25, 0]] and overlap[0] == pytest.approx([0.5, 25 / 175, 0])
    assert is_ignored(second, np.array([[0.0, 0, 9, 3.2]])).tolist() == [True, False, False]        # 42 of 50
    assert not is_ignored(second, np.zeros((0, 4))).any()


def test_the_best_pair_is_taken_first():
    """The first of equals; 0.7 is not enough."""
    assert match(np.array([[0.8, 0.9], [0.75, 0.95]])).tolist() == [0, 1]
    assert match(np.array([[0.8, 0.9], [0.71, 0.72]])).tolist() == [1, 0]
    assert match(np.array([[0.8, 0.8], [0.8, 0.8], [0.9, 0.7]])).tolist() == [1, -1, 0]
    assert match(np.array([[0.7]])).tolist() == [-1] and match(np.zeros((2, 0))).tolist() == [-1, -1]


def test_area_below_a_curve():
    assert average_precision(np.array([0.5, 0.25]), np.array([0.5, 1.0])) == pytest.approx(0.25 + 0.25 * 0.5)
    assert average_precision(np.array([0.5, 0.25]), np.array([0.8, 0.2])) == pytest.approx(0.4)    # made to fall
    assert average_precision(np.zeros(3), np.zeros(3)) == 0


def image(*rows: tuple, scores=None) -> Boxes3D:
    """Cars (distance ahead, centre u, yaw) with rectangles of 100 x 100; the camera stands in V."""
    label = Boxes3DLabel().of_photograph((1024, 2048))
    turn = label.sensor.new_tensor([[1.0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0]])
    far, u, yaw = torch.tensor(rows, dtype=torch.float64).reshape(len(rows), 3).T
    zero = torch.zeros_like(far)
    rectangles = torch.stack([u, zero, u + 99, zero + 99], dim=1)
    return label._replace(
        labels=torch.zeros(len(rows), dtype=torch.long), centers=torch.stack([zero, zero, far], dim=1),
        projected=torch.stack([u, zero, far], dim=1), sizes=far.new_tensor([4.0, 2, 1.5]).expand(len(rows), 3),
        angles=torch.stack([zero, zero, -yaw], dim=1), modal=rectangles, amodal=rectangles, sensor=turn,
        scores=None if scores is None else torch.tensor(scores, dtype=torch.float64))


def test_three_cars_by_hand():
    """Two are found, one of them turned by 90 degrees and 10 m off; one is missed, and one prediction is wrong."""
    truth = image((12, 0, 0.0), (30, 200, 0.0), (50, 400, 0.0))
    found = image((12, 0, 0.0), (40, 200, math.pi / 2), (20, 900, 0.0), scores=[0.9, 0.5, 0.7])
    meter = DetectionMeter(VEHICLES)
    meter.update([found], [truth])
    meter.reduce()
    scores, official = meter.compute(), meter.official()
    # 0.9: P 1, R 1/3. From 0.7 down: P 1/2, from 0.5 down: P 2/3, R 2/3: the largest product is at every one of these.
    assert scores["mAP"] == pytest.approx(1 / 3 + 1 / 3 * 2 / 3) and official["working_confidence"]["car"] == 0
    assert [scores[f"m{name}"] for name in SIMILARITIES] == pytest.approx([0.95, 1.0, 0.75, 1.0])
    assert scores["mDS"] == scores["DS_car"] == pytest.approx(scores["mAP"] * 3.7 / 4)
    assert official["GT_stats"]["car"] == 3 and set(official["AP_per_depth"]["car"]) == {"10", "30", "50"}
    assert meter.valid_pixels == 3


def test_images_of_which_nobody_knows_are_not_counted():
    unknown = Boxes3DLabel().absent((1024, 2048))
    meter = DetectionMeter(VEHICLES)
    meter.update([image((12, 0, 0.0), scores=[0.9])], [unknown])
    assert meter.valid_pixels == 0 and not meter.state["wrong"].any()
    assert math.isnan(meter.compute()["mDS"])


def test_parts_of_a_split_add_up():
    """As processes share it, in any order."""
    generator = np.random.default_rng(0)
    pairs = []
    for _ in range(6):
        rows = [(d, 150 * i, yaw) for i, (d, yaw) in enumerate(zip(generator.uniform(5, 90, 4),
                                                                   generator.uniform(-3, 3, 4), strict=True))]
        moved = [(d + 1, u + generator.uniform(0, 25), yaw + 0.2) for d, u, yaw in rows]
        pairs.append((image(*moved, scores=generator.uniform(0, 1, 4).tolist()), image(*rows)))
    whole, parts = DetectionMeter(VEHICLES), [DetectionMeter(VEHICLES) for _ in range(2)]
    whole.update(*zip(*pairs, strict=True))
    for number, (pred, target) in enumerate(reversed(pairs)):
        parts[number % 2].update([pred], [target])
    for name, value in whole.state.items():
        torch.testing.assert_close(value, parts[0].state[name] + parts[1].state[name])


# The official numbers --------------------------------------------------------------------------------------------


def predictions(path: Path, truth: Boxes3D) -> Boxes3D:
    """A prediction file as boxes seen by the camera of the truth."""
    objects = json.loads(path.read_text())["objects"] if path.is_file() else []
    file = {"imgWidth": 2048, "imgHeight": 1024, "objects": objects, "sensor": {
        "sensor_T_ISO_8855": truth.sensor.tolist(), "fx": truth.intrinsics[0, 0].item(), "u0": 0.0, "v0": 0.0,
        "fy": truth.intrinsics[1, 1].item()}}
    copy = Path(path.parent) / f"{path.stem}_as_annotation.json"
    copy.write_text(json.dumps(file))
    return read_boxes(copy)._replace(scores=torch.tensor([entry["score"] for entry in objects], dtype=torch.float64))


def measured(truths: Path, predicted: Path, scratch: Path) -> DetectionMeter:
    meter, found = DetectionMeter(VEHICLES), {path.name.rpartition("_")[0]: path for path in predicted.rglob("*.json")}
    for path in sorted(truths.rglob("*.json")):
        truth = read_boxes(path)
        copy = scratch / path.name
        name = path.name.rpartition("_")[0]
        if name in found:
            copy.write_text(found[name].read_text())
        meter.update([predictions(copy, truth)], [truth])
    meter.reduce()
    return meter


def assert_same(meter: DetectionMeter, want: dict) -> None:
    got = meter.official()
    for name in VEHICLES:
        for part in ("AP", *SIMILARITIES):
            assert got[part][name] == pytest.approx(want[part][name]["auc"], abs=1e-12), (part, name)
        for part in ("Detection_Score", "working_confidence", "GT_stats"):
            assert got[part][name] == pytest.approx(want[part][name], abs=1e-12), (part, name)
        per_depth = {depth: part["auc"] for depth, part in want["AP_per_depth"].get(name, {}).items()}
        assert got["AP_per_depth"][name] == pytest.approx({str(depth): ap for depth, ap in per_depth.items()})
    for name in ("mDetection_Score", "mAP", *(f"m{part}" for part in SIMILARITIES)):
        assert got[name] == pytest.approx(float(want[name]), abs=1e-12, nan_ok=True), name


@pytest.mark.parametrize("case", CASES)
def test_the_official_results(case, tmp_path):
    folder = golden("cityscapes3d") / f"metric_{case}"
    assert_same(measured(folder / "gt", folder / "pred", tmp_path), json.loads((folder / "results.json").read_text()))


def test_the_official_program(tmp_path):
    """Random vehicles, predictions near them, wrong ones and ignored regions, scored by both."""
    if importlib.util.find_spec("cityscapesscripts") is None:
        pytest.skip("needs the official evaluation: pip install cityscapesscripts==2.3.0")
    generator = np.random.default_rng(3)
    for number in range(12):
        truth, found = random_files(generator)
        for folder, end, values in (("gt", "gtBbox3d", truth), ("pred", "leftImg8bit", found)):
            path = tmp_path / folder / f"town_{number:06d}_000019_{end}.json"
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(values))
    (tmp_path / "out").mkdir()
    command = ["-gt", tmp_path / "gt", "-pred", tmp_path / "pred", "--results-folder", tmp_path / "out", "--modal"]
    done = subprocess.run([sys.executable, "-m", "cityscapesscripts.evaluation.evalObjectDetection3d", *command,
                           "--noplot"], capture_output=True, text=True, timeout=200, cwd=tmp_path)
    [results] = (tmp_path / "out").rglob("*.json")
    assert done.returncode == 0, done.stderr[-500:]
    (tmp_path / "scratch").mkdir()
    want = json.loads(results.read_text())
    assert 0.1 < want["mDetection_Score"] < 0.9
    assert_same(measured(tmp_path / "gt", tmp_path / "pred", tmp_path / "scratch"), want)


def random_files(generator: np.random.Generator) -> tuple[dict, dict]:
    """An annotation of four to nine vehicles, and predictions that are more or less theirs."""
    camera = {"imgWidth": 2048, "imgHeight": 1024, "ignore": [{"2d": [0, 0, 900, 500], "label": "car"}], "sensor": {
        "sensor_T_ISO_8855": [[1.0, 0, 0, -1.6], [0, 1, 0, -0.1], [0, 0, 1, -1.3]], "fx": 2262.5, "fy": 2265.3,
        "u0": 1096.9, "v0": 513.1, "baseline": 0.21}}
    truth, found = [], []
    for number in range(generator.integers(4, 10)):
        label, yaw = VEHICLES[generator.integers(3)], generator.uniform(-3, 3)
        box = generator.uniform((0, 0, 40, 40), (1500, 700, 300, 300))
        center, size = generator.uniform((5, -20, -1), (110, 20, 1)), generator.uniform((2, 1, 1), (9, 3, 3))
        space = {"center": center, "dimensions": size, "rotation": [np.cos(yaw / 2), 0, 0, np.sin(yaw / 2)]}
        truth.append(entry(label, box.round(), space, 1.0, number))
        for _ in range(generator.integers(0, 3)):
            near = {"center": center + generator.normal(0, 1, 3), "dimensions": size * generator.uniform(0.8, 1.2, 3),
                    "rotation": [np.cos(yaw / 2 + 0.1), 0, 0, np.sin(yaw / 2 + 0.1)]}
            kind = label if generator.random() < 0.8 else VEHICLES[generator.integers(3)]
            found.append(entry(kind, box + generator.normal(0, 6, 4), near, generator.random(), len(found)))
    return camera | {"objects": truth}, {"objects": found}


def entry(label: str, box: np.ndarray, space: dict, score: float, number: int) -> dict:
    space = {name: np.asarray(values, float).tolist() for name, values in space.items()}
    return {"2d": {"modal": box.tolist(), "amodal": box.tolist()}, "3d": space | {"type": "", "format": "CRS_ISO8855"},
            "occlusion": 0.0, "truncation": 0.0, "instanceId": number, "label": label, "score": float(score)}
