"""Vehicles in space through a whole run: read, trained, scored, drawn, written; alone and on two processes."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data.base import MultiTaskDataset
from data.boxes_file import VEHICLES, prediction_json, read_boxes
from data.boxes_label import Boxes3DLabel
from data.datasets import DATASETS
from data.partial import PartialLabels
from evaluation.detection3d.meter import DetectionMeter
from evaluation.evaluator import TaskContext
from scripts.benchmark import Step, random_batch
from scripts.check_data import check
from scripts.example_data.write import write_example
from tests.conftest import TINY
from tests.processes import run_main
from tests.shared import ROOT, golden
from utils.boxes3d import Boxes3D, view_to_image
from utils.engine.box_views import BOXES, shown
from utils.engine.build import build_split
from utils.engine.config import load_config
from utils.engine.predict import infer
from utils.engine.predictor import Predictor
from utils.engine.tasks import TASKS, label_rules
from utils.engine.train import train

SMALL_HEAD = "det3d_kwargs={channels: 8, class_channels: [8], norm_groups: 2}"
TASKS_3 = ("semseg", "depth", "det3d")


@pytest.fixture(scope="module")
def street(tmp_path_factory) -> Path:
    """Eight streets of 64 x 128 pixels; one training image has no vehicle."""
    root = tmp_path_factory.mktemp("street")
    write_example(root, num_train=6, num_val=2, size=(64, 128), seed=1, workers=1, progress=False,
                  layouts=("cityscapes",))
    path = sorted(root.rglob("gtBbox3d/train/*/*.json"))[2]
    path.write_text(json.dumps(json.loads(path.read_text()) | {"objects": []}))
    return root


@pytest.fixture
def config(street, tmp_path):
    return lambda *changes: load_config(ROOT / "configs" / "example" / "bim_cityscapes3d.yml", [
        *TINY, f"db_root={street}", f"out_dir={tmp_path / 'runs'}", "image_size=[64, 128]", "label_size=[32, 64]",
        "scheduler_kwargs.warmup_iters=0", "max_iter=2", "val_interval=2", "eval_at_start=false", SMALL_HEAD, *changes])


def test_images_without_a_vehicle_are_not_trained_on(config, caplog):
    with caplog.at_level(logging.INFO):
        assert len(build_split(config(), "train")) == 5
    assert "split train: 1 of 6 images are left out, whose labels say nothing" in caplog.text
    assert len(build_split(config("partial_labels.empty=keep"), "train")) == 6
    assert len(build_split(config("task_dictionary.include_det3d=false"), "train")) == 6
    assert len(build_split(config(), "val")) == 2


@pytest.mark.parametrize("scope", ["process", "image"])
def test_a_run_from_files_to_files(config, tmp_path, scope):
    made = config(f"loss_kwargs.loss_scope={scope}", "partial_labels.empty=keep", "augmentation.fixed_flip_prob=0.5",
                  "ema_decay=0.5", f"report={'true' if scope == 'image' else 'false'}")
    results = train(made, resume=False)
    assert set(results) == set(TASKS_3) and {"mDS", "mAP", "DS_car"} <= set(results["det3d"])
    assert results["det3d"]["valid_pixels"] > 0
    again = infer(made, made.run_dir / "last.pt", tmp_path / "infer")
    assert again["det3d"] == pytest.approx(results["det3d"], nan_ok=True)
    names = {path.stem for path in (tmp_path / "infer" / "det3d").iterdir()}
    assert names == {f"exampletown_00000{number}_000019_leftImg8bit" for number in (7, 8)}
    if scope == "image":                                   # single images have an AP of their own
        page = (tmp_path / "infer" / "report.html").read_text(encoding="utf-8")
        assert "<h2 id=\"task-det3d\">" in page and "det3d: best images by mAP" in page and "depth RMSE px" in page
        pictures = list((tmp_path / "infer" / "thumbnails" / "det3d").rglob("*.jpg"))
        assert {path.stem for path in pictures} == names


def test_two_processes_score_what_one_does(config, street, tmp_path):
    made = config("max_iter=1", "val_interval=1", "valBatch=1")
    train(made, resume=False)
    arguments = ["--run_mode", "infer", "--trained_model", str(made.run_dir / "last.pt"), f"db_root={street}"]
    for processes in (1, 2):
        run_main([*arguments, "--output", str(tmp_path / str(processes))], processes)
    one, two = (json.loads((tmp_path / str(n) / "results.json").read_text())["scores"] for n in (1, 2))
    assert one["det3d"] == pytest.approx(two["det3d"], nan_ok=True)


def test_a_cache_keeps_the_maps_and_reads_the_boxes(config, tmp_path):
    plain = build_split(config(), "val")
    for _ in range(2):
        cached = build_split(config(f"data_cache.folder={tmp_path / 'cache'}"), "val")
        for expected, found in zip(map(plain.load, plain.ids), map(cached.load, cached.ids), strict=True):
            np.testing.assert_array_equal(found["depth"], expected["depth"])
            assert all(np.array_equal(a, b) for a, b in zip(found["det3d"], expected["det3d"], strict=True))


# Data -----------------------------------------------------------------------------------------------------------


def test_the_check_knows_the_files(street, capsys, tmp_path):
    assert check(street, None, None, None, None, 1, tmp_path / "sheet.png", None) == 0
    out = capsys.readouterr().out
    assert "Cityscapes3D train: 6 ids" in out and "vehicles an image" in out and (tmp_path / "sheet.png").is_file()
    [path, *_] = sorted(street.rglob("gtBbox3d/val/*/*.json"))
    kept = path.read_text()
    try:
        path.write_text(kept[:len(kept) // 2])
        assert check(street, None, "val", None, None, 1, None, None) == 1
        assert f"cannot read {path}" in capsys.readouterr().out
    finally:
        path.write_text(kept)


def test_a_folder_of_ones_own_may_have_boxes(street, tmp_path):
    from utils.engine.data_choice import DataChoice
    folder = tmp_path / "own"
    for name in ("images", "boxes"):
        (folder / name).mkdir(parents=True)
    [image, *_] = sorted(street.rglob("leftImg8bit/val/*/*.png"))
    (folder / "images" / "a.png").write_bytes(image.read_bytes())
    boxes = Path(str(image).replace("leftImg8bit", "gtBbox3d")).with_suffix(".json")
    (folder / "boxes" / "a.json").write_text(boxes.read_text())
    given = {"folder": str(folder), "image_size": [64, 128], "splits": {"val": "images/*.png"},
             "tasks": {"det3d": {"files": "boxes/{id}.json"}}}
    spec = DataChoice.from_yaml(given, "train_db_name", str).spec
    sample = MultiTaskDataset(spec, "", "val", label_rules(spec.tasks))[0]
    assert len(sample["det3d"].labels) > 0 and sample["meta"]["camera"].is_known


def test_the_published_loader():
    """Three training images, one of them without a vehicle; two to evaluate. Files are of larger images."""
    folder = golden("cityscapes3d") / "dataset"
    from safetensors.torch import load_file
    want = load_file(folder / "loader.safetensors")
    spec = replace(DATASETS.load("Cityscapes3DTaskPrompter"), folder="Cityscapes3D")
    for split, number in (("train", 2), ("val", 2)):
        dataset = MultiTaskDataset(spec, folder, split, label_rules(spec.tasks),
                                   partial_labels=PartialLabels(empty="drop" if split == "train" else "keep"))
        assert len(dataset) == number
        for name in dataset.ids:
            boxes, sample = dataset.read("det3d", name), dataset.load(name)
            prefix = f"{split}.64x128.{sample['meta']['name']}"
            assert sample["meta"]["camera"].image_size.tolist() == [64, 128]
            stored = [key for key in want if key.startswith(f"{prefix}.det.") and key.endswith(".label")]
            assert len(boxes.labels) == len(stored)
            for row in range(len(stored)):
                for theirs, ours in (("center_S", boxes.centers), ("center_I", boxes.projected),
                                     ("size_S", boxes.sizes), ("rotation_S", boxes.angles),
                                     ("bbox_modal", boxes.modal)):
                    torch.testing.assert_close(ours[row], want[f"{prefix}.det.{row}.{theirs}"].double(), rtol=2e-6,
                                               atol=2e-6)


# Pictures and files ---------------------------------------------------------------------------------------------


@pytest.fixture
def boxes(street) -> Boxes3D:
    [path, *_] = sorted(street.rglob("gtBbox3d/val/*/*.json"))
    return read_boxes(path)


def test_vehicles_are_drawn_on_the_picture(boxes):
    context, grey = TaskContext(6, class_names=VEHICLES), np.full((64, 128, 3), 90, np.uint8)
    picture = BOXES.picture(boxes, context, grey)
    assert picture.shape == (512, 1024, 3) and (picture == (60, 220, 60)).all(axis=-1).any()
    empty = BOXES.picture(boxes.select(slice(0)), context, grey)
    assert not (empty == (60, 220, 60)).all(axis=-1).any() and (empty != 90).any()       # the street from above
    [(colour, text)] = BOXES.legend(boxes, context)
    assert colour == (60, 220, 60) and text.startswith(f"car: {len(boxes.labels)}, from ") and text.endswith(" m")
    assert [name for _, name in BOXES.key(context)] == list(VEHICLES) and (colour, "car") in BOXES.key(context)
    unsure = boxes._replace(scores=torch.linspace(0, 1, len(boxes.labels)))
    assert 0 < len(shown(unsure).labels) < len(boxes.labels)
    assert shown(boxes).centers[:, 2].tolist() == sorted(boxes.centers[:, 2].tolist(), reverse=True)


def test_a_vehicle_beside_the_camera_is_drawn_as_far_as_it_is_seen(boxes):
    beside = boxes.select(slice(1))
    beside = beside._replace(centers=beside.centers.new_tensor([[-2.0, 1.0, 0.5]]))
    picture = BOXES.picture(beside, TaskContext(6), np.zeros((64, 128, 3), np.uint8))
    assert (picture[100:, :500] == (60, 220, 60)).all(axis=-1).any()


def test_raw_files_are_those_of_the_official_evaluation(boxes, tmp_path):
    found = boxes._replace(scores=torch.ones(len(boxes.labels)))
    path = BOXES.write(tmp_path / "det3d" / "a.b", found, TaskContext(6))
    assert path.name == "a.b.json" and json.loads(path.read_text()) == prediction_json(found, VEHICLES)
    assert "metres" in BOXES.raw_format(TaskContext(6))


def test_published_prediction_files():
    """Results of decoding, and the files that were written of them; that program's images are always 1024 x 2048."""
    from safetensors.torch import load_file
    folder = golden("cityscapes3d")
    for name in ("decode_two_images", "decode_limits"):
        data = load_file(folder / f"{name}.safetensors")
        for image in range(2):
            file = f"{name}_{image:06d}_000019"
            camera = Boxes3DLabel().known(read_boxes(folder / "annotations" / f"{file}_gtBbox3d.json", "original"))
            result = {key: data[f"result.{image}.{key}"].double() for key in (
                "boxes", "scores", "labels", "centers2d", "boxes2d_score")}
            box = result["boxes"]
            found = camera["camera"]._replace(
                labels=result["labels"].long(), centers=box[:, :3], sizes=box[:, 3:6], angles=box[:, 6:],
                projected=result["centers2d"], modal=result["boxes2d_score"][:, :4], scores=result["scores"],
                image_size=torch.tensor([1024, 2048]))
            want = json.loads((folder / "predictions" / f"{file}_leftImg8bit.json").read_text())["objects"]
            got = prediction_json(found, VEHICLES)["objects"]
            assert [entry["label"] for entry in got] == [entry["label"] for entry in want]
            for ours, theirs in zip(got, want, strict=True):
                assert ours["score"] == pytest.approx(theirs["score"], abs=1e-5)
                for key in ("center", "dimensions"):
                    assert ours["3d"][key] == pytest.approx(theirs["3d"][key], rel=1e-5, abs=1e-5)
                same = np.dot(ours["3d"]["rotation"], theirs["3d"]["rotation"])
                assert abs(same) == pytest.approx(1, abs=1e-5)
                for key in ("modal", "amodal"):
                    assert ours["2d"][key] == pytest.approx(theirs["2d"][key], rel=1e-5, abs=1e-5)


def test_the_report_shows_classes_that_are_there(boxes):
    meter = DetectionMeter(VEHICLES)
    meter.update([boxes._replace(scores=torch.ones(len(boxes.labels)))], [boxes])
    meter.reduce()
    score, precision = meter.figures()
    assert score.names == precision.names == ("car",) and precision.values.tolist() == pytest.approx([100.0])
    assert meter.compute()[DetectionMeter.of_image.key] == pytest.approx(1.0)


def test_photographs_with_a_camera_of_their_own(config, street, tmp_path):
    """A picture of twice the size; what is found is told in its pixels and in the coordinates of its vehicle."""
    made = config("max_iter=1", "val_interval=1")
    train(made, resume=False)
    checkpoint = made.run_dir / "last.pt"
    [file, *_] = sorted(street.rglob("gtBbox3d/val/*/*.json"))
    picture = np.full((128, 256, 3), 120, np.uint8)
    network = Predictor.load(checkpoint, overrides=[f"camera_file={file}"])
    [boxes] = [result.array for task, result in network.predict(picture).items() if task == "det3d"]
    own = read_boxes(file)
    assert boxes.image_size.tolist() == [128, 256] and torch.equal(boxes.sensor, own.sensor)
    assert boxes.intrinsics[0, 0].item() == pytest.approx(2 * own.intrinsics[0, 0].item())
    seen = view_to_image(boxes.centers, boxes.intrinsics)
    torch.testing.assert_close(seen, boxes.projected, rtol=1e-4, atol=1e-3)
    prediction = network.predict(picture)
    prediction.save(tmp_path / "out", "a.b")
    objects = json.loads((tmp_path / "out" / "raw" / "det3d" / "a.b.json").read_text())["objects"]
    assert len(objects) == len(prediction["det3d"].array.labels) and prediction["det3d"].unit == "m"
    with pytest.raises(FileNotFoundError, match="file not found: .*none.json"):
        Predictor.load(checkpoint, overrides=["camera_file=none.json"])


def test_a_step_can_be_timed(config):
    step = Step(config())
    batch = random_batch(step.config, step.device)
    assert batch["semseg"].shape == (2, 1, 32, 64) and [len(boxes.labels) for boxes in batch["det3d"]] == [0, 0]
    losses = step.criterion(step.model(batch["image"]).final, batch)
    losses["total"].backward()
    assert losses["det3d"].item() == 0 and all(
        parameter.grad is not None and not parameter.grad.any() for parameter in step.model.heads["det3d"].parameters())


def test_the_row_says_what_it_is():
    row = TASKS.load("det3d")
    assert not row.label.is_map and row.head is not None and [score.key for score in row.scores] == ["mDS", "mAP"]
