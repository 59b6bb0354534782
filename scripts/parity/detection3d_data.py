"""Cityscapes-3D's files: conversions of coordinates, what the loader yields, prediction files, the detection score.

Sub-folders of annotations, predictions and small data sets are read as a whole.
"""

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from data.base import MultiTaskDataset
from data.boxes_file import VEHICLES, prediction_json, read_boxes
from data.boxes_label import Boxes3DLabel
from data.datasets import DATASETS
from data.datasets.cityscapes import VOID_DISPARITY
from data.partial import PartialLabels
from data.transforms import fixed_transform
from evaluation.detection3d.decoding import Limits, decode
from evaluation.detection3d.meter import SIMILARITIES, DetectionMeter
from scripts.parity.base import Bound, Check, Folder, Measure, Options, absolute_error, below
from scripts.parity.detection3d import output_of
from utils.boxes3d import (
    Boxes3D,
    amodal_boxes,
    matrix_to_quaternion,
    quaternion_to_matrix,
    vehicle_to_camera,
    view_to_image,
)
from utils.engine.tasks import label_rules
from utils.engine.tasks.det3d import seen_by

READ_AS = "Cityscapes3DTaskPrompter"                 # the data set whose rules are the original's
WRITTEN_AS = torch.tensor([1024, 2048])              # the original's files know no other size of images
EVERY_IMAGE = PartialLabels(empty="keep")            # as in an evaluation
FIELDS = {"center_S": "centers", "center_I": "projected", "size_S": "sizes", "rotation_S": "angles",
          "bbox_modal": "modal", "bbox_amodal": "amodal", "label": "labels"}


def _relative(got: Any, want: Any) -> float:
    """Largest |got - want| / max(|want|, 1)."""
    got, want = (torch.as_tensor(value).double() for value in (got, want))
    return float(((got - want).abs() / want.abs().clamp_min(1)).max()) if want.numel() else absolute_error(got, want)


EXACT = Bound(_relative, 1e-9, 1e-9)                 # boxes are float64 in any arithmetic
LOADED, FILE = Bound(_relative, 2e-6, 2e-6), Bound(_relative, 1e-5, 1e-5)      # of float32; of predictions in files
SCORE, PICTURE = Bound(absolute_error, 1e-12, 1e-12), Bound(absolute_error, 1e-5, 1e-5)


def checks(folder: Folder) -> Iterator[Check]:
    for path, content in folder.tables.items():
        first = content[0] if isinstance(content, list) and content else {}
        if isinstance(first, dict) and {"annotation", "loader_float32"} <= first.keys():
            yield Check(path.stem, frozenset({path}), partial(_conversions, content))
        elif isinstance(first, dict) and {"original", "mirrored"} <= first.keys():
            yield Check(path.stem, frozenset({path}), partial(_mirrored, content))
        elif isinstance(content, dict) and "mDetection_Score" in content:
            truth, found = path.parent / "gt", path.parent / "pred"
            yield Check(path.stem, frozenset({path, truth, found}), partial(_score, content, truth, found))
        elif isinstance(content, dict) and "annotations" in content:
            yield from _of_annotations(folder, path, content)
    for path, names in folder.arrays.items():
        if any(name.endswith("camera.sensor_T_ISO_8855") for name in names):
            [data_set] = (entry for entry in path.parent.iterdir() if entry.is_dir())
            yield Check(path.stem, frozenset({path, path.with_suffix(".json"), data_set}),
                        partial(_loader, path, data_set))


def _of_annotations(folder: Folder, path: Path, config: dict) -> Iterator[Check]:
    """The boxes of a case are those of its annotations, and its results those of the prediction files."""
    [arrays] = (other for other in folder.beside(path) if other.suffix == ".safetensors" and ".state" not in other.name)
    annotations, predictions = folder.path / "annotations", folder.path / "predictions"
    if any(name.startswith("gt.") for name in folder.arrays[arrays]):
        yield Check(f"{path.name.partition('.')[0]}/annotations", frozenset({path, arrays, annotations}),
                    partial(_annotations, config, arrays, annotations))
    if "nms_thr" in config:
        yield Check(f"{path.stem}/prediction files", frozenset({path, arrays, annotations, predictions}),
                    partial(_predictions, config, arrays, annotations, predictions))


def read(annotation: Mapping, reading: str = "original") -> Boxes3D:
    """An annotation as read from its file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "annotation.json"
        path.write_text(json.dumps(annotation), encoding="ascii")
        return read_boxes(path, reading)


def _fields(boxes: Boxes3D, want: Mapping[str, Any], bound: Bound, options: Options, row: int = 0) -> Iterator[Measure]:
    """One box under the original's names of its fields."""
    for name, field in FIELDS.items():
        if name in want:
            stored = torch.as_tensor(want[name], dtype=torch.float64).flatten()
            yield bound.measure(name, getattr(boxes, field)[row].reshape(stored.shape), stored, options)


def _conversions(cases: list[dict], options: Options) -> Iterator[Measure]:
    for case in cases:
        boxes, want = read(case["annotation"]), case["float64"]
        [annotated] = case["annotation"]["objects"]
        yield from _fields(boxes, case["loader_float32"], LOADED, options)
        yield LOADED.measure("K", boxes.intrinsics, case["K"], options)
        corners = boxes.corners()
        turned = quaternion_to_matrix(torch.tensor(annotated["3d"]["rotation"], dtype=torch.float64))
        centers, quaternions = boxes.in_vehicle()
        center = vehicle_to_camera(torch.tensor(annotated["3d"]["center"], dtype=torch.float64), boxes.sensor)
        pairs = {"center_C": center, "center_S": boxes.centers[0], "angles_ZXY": boxes.angles[0],
                 "vertices_S": corners[0], "vertices_I": view_to_image(corners[0], boxes.intrinsics)[:, :2],
                 "amodal_box": amodal_boxes(corners, boxes.intrinsics, boxes.image_size)[0],
                 "quaternion_C_wxyz": matrix_to_quaternion(boxes.sensor[:, :3] @ turned),
                 "quaternion_S_wxyz": matrix_to_quaternion(boxes.rotations()[0])}
        back = {"center": centers[0], "quaternion_wxyz": quaternions[0]}
        for name, got in [*pairs.items(), *back.items()]:
            stored = want["back_to_V"][name] if name in back else want[name]
            stored = torch.tensor(list(stored.values()) if isinstance(stored, dict) else stored, dtype=torch.float64)
            yield EXACT.measure(name, _signed(got, stored) if "quaternion" in name else got, stored, options)


def _signed(got: Tensor, want: Tensor) -> Tensor:
    """A quaternion with the sign of the reference: both signs are one rotation."""
    return got * (got * want).sum().sign()


def _mirrored(cases: list[dict], options: Options) -> Iterator[Measure]:
    for case in cases:
        rules = Boxes3DLabel("original")
        got, want = rules.flip(read(case["original"]["annotation"])), read(case["mirrored"]["annotation"])
        for name in (*FIELDS.values(), "intrinsics", "sensor"):
            yield EXACT.measure(name, getattr(got, name), getattr(want, name), options)
        yield from _fields(got, case["mirrored"]["loader_float32"], LOADED, options)


def _annotations(config: dict, arrays: Path, folder: Path, options: Options) -> Iterator[Measure]:
    data = load_file(arrays)
    for image, name in enumerate(config["annotations"]):
        boxes, want = read_boxes(folder / name, "original"), below(data, f"gt.{image}.")
        yield Measure("boxes", abs(len(boxes.labels) - len(want.get("label", ()))))
        for field, stored in want.items():
            yield LOADED.measure(f"{field} of image {image}", getattr(boxes, FIELDS[field]), stored, options)
        if "K" in data:
            yield LOADED.measure(f"K of image {image}", boxes.intrinsics, data["K"][image], options)


def _predictions(config: dict, arrays: Path, annotations: Path, folder: Path, options: Options) -> Iterator[Measure]:
    limits = Limits(config["nms_pre"], config["score_thr"], config["nms_thr"], config["max_per_img"])
    cameras = [Boxes3DLabel("original").known(read_boxes(annotations / name, "original"))["camera"]
               for name in config["annotations"]]
    found = decode(output_of(config, load_file(arrays), options), cameras, limits)
    for name, camera, detections in zip(config["annotations"], cameras, found, strict=True):
        got = prediction_json(seen_by(camera, detections)._replace(image_size=WRITTEN_AS), VEHICLES)["objects"]
        want = json.loads((folder / name.replace("gtBbox3d", "leftImg8bit")).read_text(encoding="utf-8"))["objects"]
        yield Measure(f"{name}: objects", abs(len(got) - len(want)))
        for ours, theirs in zip(got, want, strict=True):
            yield Measure(f"{name}: other classes", float(ours["label"] != theirs["label"]))
            for key, values in {**theirs["2d"], **theirs["3d"], "score": [theirs["score"]]}.items():
                mine = {**ours["2d"], **ours["3d"], "score": [ours["score"]]}[key]
                mine, stored = (torch.tensor(numbers, dtype=torch.float64) for numbers in (mine, values))
                mine = _signed(mine, stored) if key == "rotation" else mine
                yield FILE.measure(f"{name}: {key}", mine, stored, options)


def _loader(path: Path, directory: Path, options: Options) -> Iterator[Measure]:
    data, spec = load_file(path), DATASETS.load(READ_AS)
    rules = {task: spec.labels[task].rules or rules for task, rules in label_rules(spec.labels).items()}
    samples = dict.fromkeys(re.fullmatch(r"(\w+)\.(\d+)x(\d+)\.(\w+)\..+", key).groups() for key in data)
    with tempfile.TemporaryDirectory() as root:  # a data set insists on its folder's name
        (Path(root) / spec.folder).symlink_to(directory.resolve(), target_is_directory=True)
        for split, height, width, name in samples:
            want = below(data, f"{split}.{height}x{width}.{name}.")
            transform = fixed_transform((int(height), int(width)), rules, tuple(want["semseg"].shape[-2:]))
            data_set = MultiTaskDataset(spec, root, split, rules, transform, partial_labels=EVERY_IMAGE)
            yield from _sample(data_set, name, want, rules, options)
        kept = {name for split, *_, name in samples if split == "train"}
        train = MultiTaskDataset(spec, root, "train", rules, None)
        yield Measure("training images kept", abs(len(train) - len(kept)))


def _sample(data: MultiTaskDataset, name: str, want: dict[str, Tensor], rules: Mapping,
            options: Options) -> Iterator[Measure]:
    [index] = (i for i, image in enumerate(data.ids) if data.paths("image", image)[0].stem == name)
    got = data[index]
    # Theirs leave boxes and camera in pixels of the file whatever the network sees; ours go back to them here.
    boxes = rules["det3d"].onto(got["det3d"], {"camera": data.read("det3d", data.ids[index])})
    depth = torch.where(want["depth"] == -1, VOID_DISPARITY, want["depth"])  # theirs: -1 is invalid
    yield PICTURE.measure(f"{name}: image", got["image"], want["image"], options)
    yield PICTURE.measure(f"{name}: semseg", got["semseg"][0], want["semseg"], options)
    yield PICTURE.measure(f"{name}: depth", got["depth"].flatten(), depth.flatten(), options)
    yield LOADED.measure(f"{name}: K", boxes.intrinsics, want["K"], options)
    sensor = want["camera.sensor_T_ISO_8855"]
    yield LOADED.measure(f"{name}: sensor", boxes.sensor, sensor, options)
    rows = [below(want, f"det.{row}.") for row in range(len(boxes.labels) + 1)]
    yield Measure(f"{name}: boxes", float(not all(rows[:-1]) or bool(rows[-1])))
    for row, fields in enumerate(rows[:-1]):
        yield from _fields(boxes, fields, LOADED, options, row)


def _score(want: dict, truth: Path, found: Path, options: Options) -> Iterator[Measure]:
    meter, files = DetectionMeter(VEHICLES), {path.name.rpartition("_")[0]: path for path in found.rglob("*.json")}
    for path in sorted(truth.rglob("*.json")):
        annotation = json.loads(path.read_text(encoding="utf-8"))
        name = path.name.rpartition("_")[0]
        objects = json.loads(files[name].read_text(encoding="utf-8"))["objects"] if name in files else []
        scores = torch.tensor([entry["score"] for entry in objects], dtype=torch.float64)
        meter.update([read({**annotation, "objects": objects})._replace(scores=scores)], [read(annotation)])
    meter.reduce()
    got = meter.official()
    for name in VEHICLES:
        for part in ("AP", *SIMILARITIES):
            yield SCORE.measure(f"{part} {name}", got[part][name], want[part][name]["auc"], options)
        for part in ("Detection_Score", "working_confidence", "GT_stats"):
            yield SCORE.measure(f"{part} {name}", got[part][name], want[part][name], options)
        per_depth = {depth: part["auc"] for depth, part in want["AP_per_depth"].get(name, {}).items()}
        yield Measure(f"distances {name}", len(per_depth.keys() ^ got["AP_per_depth"][name].keys()))
        for depth, value in per_depth.items():
            yield SCORE.measure(f"AP {name} at {depth} m", got["AP_per_depth"][name][depth], value, options)
    for name in ("mDetection_Score", "mAP", *(f"m{part}" for part in SIMILARITIES)):
        yield SCORE.measure(name, got[name], float(want[name]), options)
