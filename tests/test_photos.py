"""Real photographs, described by a `dataset.yml` as well as in the layouts of the known data sets: the same samples.

The photographs are not part of this repository; without them these tests are skipped.
"""

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from data.base import MultiTaskDataset
from data.datasets import DATASETS
from data.datasets.nyud import CLASS_NAMES
from data.label_kinds import Boundaries
from data.loader import build_train_loader
from data.transforms import build_transform
from tests.conftest import TINY
from tests.shared import ROOT, real_data
from utils.engine.build import build_split
from utils.engine.config import load_config
from utils.engine.data_choice import DataChoice
from utils.engine.tasks import label_rules
from utils.engine.train import train

LAYOUTS = {"BSDS_SOD": "PASCALContext", "CCP": "PASCALContext", "CamVid": "PASCALContext", "NYUv2_20": "NYUD"}
ANNOTATORS = "edge: {files: boundaries_bits, encoding: annotators}"
ONE_ANNOTATOR = "edge: {files: pascal-context/trainval, variable: LabelMap, encoding: regions}"     # as in the layout
EVERY = 40                           # of the images of a list


@pytest.fixture(scope="session")
def photos(tmp_path_factory) -> Path:
    """NAME/ as a folder of one's own, and layouts/NAME/ with the same files where a known data set has them."""
    root, source = tmp_path_factory.mktemp("photos"), real_data() / "photos"
    if not source.is_dir():
        pytest.skip(f"real photographs not found: {source}")
    for name, layout in LAYOUTS.items():
        own = root / name
        own.mkdir()
        for path in (source / name).iterdir():
            (own / path.name).symlink_to(path.resolve(), target_is_directory=path.is_dir())
        description = (ROOT / "configs" / "suites" / "data" / f"{name}.yml").read_text()
        (own / "dataset.yml").write_text(description.replace(ANNOTATORS, ONE_ANNOTATOR))
        (root / "layouts" / name).mkdir(parents=True)
        (root / "layouts" / name / DATASETS.load(layout).folder).symlink_to(own, target_is_directory=True)
    (root / "NYUv2_20" / "names.txt").write_text("\n".join(CLASS_NAMES))
    prepare(root / "NYUv2_20", root / "CamVid")
    return root


def prepare(nyu: Path, camvid: Path) -> None:
    """What the known layouts have and the pack leaves to be computed."""
    (nyu / "depth").mkdir()
    for path in (nyu / "depth_mm").iterdir():
        np.save(nyu / "depth" / f"{path.stem}.npy", np.asarray(Image.open(path)).astype(np.float32) / 1000)
    shutil.copy(nyu / "gt_sets" / "val.txt", nyu / "train.txt")
    (camvid / "pascal-context" / "trainval").mkdir(parents=True)
    for split in ("train", "val"):
        names = (camvid / "ImageSets" / "Context" / f"{split}.txt").read_text().split()[::EVERY]
        for name in names:
            label = np.asarray(Image.open(camvid / "semseg" / "pascal-context" / f"{name}.png")).astype(np.uint16)
            savemat(camvid / "pascal-context" / "trainval" / f"{name}.mat",
                    {"LabelMap": np.where(label == 255, 0, label + 1).astype(np.uint16)})


def described(folder: Path) -> DataChoice:
    return DataChoice.from_yaml({"folder": str(folder)}, "train_db_name", lambda key: "test")


class Sparse(MultiTaskDataset):
    """Every 40th image of a list (all of a short one)."""

    def check_files(self):
        self.ids = self.ids[::EVERY if len(self.ids) > EVERY else 1]
        super().check_files()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_description_gives_the_samples_of_the_layout(photos, name, training):
    spec, layout = described(photos / name).spec, DATASETS.load(LAYOUTS[name])
    labels = label_rules(spec.tasks)
    split = "train" if training and name != "NYUv2_20" else "val"      # of NYUv2 there is one list
    own, known = (Sparse(s, root, split, labels, build_transform(layout.image_size, None, training, labels, s.resize))
                  for s, root in ((spec, ""), (layout, photos / "layouts" / name)))
    assert own.ids == known.ids and len(own) >= 3
    for index in range(len(own)):
        mine, theirs = own[(index, 7)], known[(index, 7)]
        assert mine["meta"] == theirs["meta"]
        for key in ("image", *labels):
            assert torch.equal(mine[key], theirs[key]), (name, own.ids[index], key)


def test_boundaries_of_the_regions_are_among_those_of_all_annotators(photos):
    own = described(photos / "BSDS_SOD").spec
    several = Boundaries(encoding="annotators", agree=0.01).spec(("boundaries_bits/{id}.png",))
    name = (photos / "BSDS_SOD" / "ImageSets" / "Context" / "train.txt").read_text().split()[0]
    drawn = several.read(photos / "BSDS_SOD" / "boundaries_bits" / f"{name}.png")[..., 0] == 1
    regions = own.labels["edge"].read(photos / "BSDS_SOD" / "pascal-context" / "trainval" / f"{name}.mat")[..., 0] == 1
    near = cv2.dilate(drawn.astype(np.uint8), np.ones((5, 5))) > 0
    assert near[regions].mean() > 0.99 and 4 <= len(several.boundary.read(
        photos / "BSDS_SOD" / "boundaries_bits" / f"{name}.png")) <= 9


def test_one_training_mixes_all_four(photos, tmp_path):
    """Saliency, boundaries, two kinds of classes and one of rooms, clothes, depth and normals, in one network."""
    parts = []
    for name in LAYOUTS:
        folder = photos / name / ("gt_sets" if name == "NYUv2_20" else "ImageSets/Context")
        listed = (folder / "val.txt").read_text().split()
        few = listed[::EVERY if len(listed) >= 2 * EVERY else len(listed) // 2]
        (photos / name / "few.txt").write_text("\n".join(few[:-1]))
        (photos / name / "others.txt").write_text(few[-1])
        rename = {"CCP": ", rename: {semseg: semseg@clothes, human_parts: human_parts@clothes}",
                  "CamVid": ", rename: {semseg: semseg@street}"}.get(name, "")
        parts.append(f"{{folder: {photos / name}, splits: {{train: few.txt, val: others.txt}}, weight: 1{rename}}}")
    tasks = ("semseg", "semseg@clothes", "semseg@street", "depth", "human_parts@clothes", "sal", "normals", "edge")
    on = ", ".join(f"include_{task}: true" for task in tasks)
    config = load_config(ROOT / "configs" / "_base_" / "bim.yml", [
        *TINY, f"train_db_name=[{', '.join(parts)}]", f"task_dictionary={{{on}}}", f"out_dir={tmp_path}", "trBatch=2",
        "version_name=four", "max_iter=2", "val_interval=2"])
    results = train(config, resume=False)
    assert tuple(results) == tasks == config.tasks
    assert {task: config.dataset.tasks[task] for task in tasks[:3]} == {
        "semseg": 40, "semseg@clothes": 8, "semseg@street": 11}
    assert all(scores["valid_pixels"] > 0 for scores in results.values())
    data = build_split(config, "train")
    batch = next(iter(build_train_loader(data, 8, seed=0)))
    of = [meta["name"].partition("/")[0] for meta in batch["meta"]]
    assert set(of) <= set(LAYOUTS) and len(set(of)) > 1
    for task in tasks:
        has = (batch[task] != 255).flatten(1).any(dim=1).tolist()
        assert all(not lit or task in {t for part in config.train_db_name.parts if part.spec.name == name
                                       for t in part.spec.labels} for name, lit in zip(of, has, strict=True))
