"""Folders of one's own, from YAML to samples, scores and files; mistakes are named by key or file."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from data.base import MultiTaskDataset
from data.check import SoundFiles
from data.datasets import DATASETS
from data.datasets.cityscapes import CLASS_NAMES as CITYSCAPES
from data.datasets.cityscapes import TRAIN_IDS
from data.label_files import (
    AnnotatorsFile,
    ClassFile,
    ColourFile,
    DepthFile,
    ImageFile,
    MaskFile,
    NormalsFile,
    RegionsFile,
    TruthFile,
)
from data.labels import VOID, DisparityLabel
from data.transforms import build_transform
from evaluation.boundary.edge_maps import save_edge_maps
from tests.conftest import TINY
from tests.shared import ROOT, golden
from utils.engine.config import config_from_dict, load_config
from utils.engine.data_choice import DataChoice
from utils.engine.predict import infer, predict
from utils.engine.tasks import label_rules
from utils.engine.train import train
from utils.options import ConfigError

BASE = ROOT / "configs" / "_base_" / "bim.yml"


def save(path: Path, array: np.ndarray, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix in (".npz", ".mat"):
        np.savez(path, a=array) if path.suffix == ".npz" else savemat(path, {"a": array})
    else:
        Image.fromarray(array).save(path, **options)
    return path


# Files ---------------------------------------------------------------------------------------------------------------

CLASSES = ClassFile({0: 0, 300: 1, -1: 255})
STORED = np.array([[0, 300], [-1, 300]])


@pytest.mark.parametrize("name", ["l.npy", "l.npz", "l.mat", "l.tif"])
def test_classes_of_any_numbers(tmp_path, name):
    path = save(tmp_path / name, STORED.astype(np.int32))
    label = ClassFile(CLASSES.values, variable="a")(path)
    assert label.tolist() == [[[0], [1]], [[255], [1]]] and label.dtype == np.float32
    assert ClassFile({0: 2}, other_is_void=True, variable="a")(path).tolist() == [[[2], [255]], [[255], [255]]]
    with pytest.raises(ValueError, match=rf"{name}: label value\(s\) -1, 300 out of range; valid: 0, 7$"):
        ClassFile({0: 0, 7: 1}, variable="a")(path)


def test_classes_of_pictures(tmp_path):
    few = save(tmp_path / "p.png", np.array([[3, 0, 255]], np.uint8))
    deep = save(tmp_path / "d.png", np.array([[300, 0, 0]], np.uint16))
    assert ClassFile({3: 1, 0: 0, 255: 255})(few).tolist() == [[[1], [0], [255]]]
    assert CLASSES(deep).tolist() == [[[1], [0], [0]]]
    whole = save(tmp_path / "f.npy", np.array([[300.0, 0]]))
    assert CLASSES(whole).tolist() == [[[1], [0]]]
    for array, words in ((np.array([[0.5]]), "holds whole numbers, this one float64"),
                         (np.zeros((2, 2, 3), np.uint8), r"expected one channel .* \(2, 2, 3\) \(colours"),
                         (np.array([["a"]]), "this one <U1")):
        with pytest.raises(ValueError, match=words):
            CLASSES(save(tmp_path / "x.npy", array))


def test_classes_as_colours(tmp_path):
    read = ColourFile({(128 << 16) | (64 << 8) | 1: 0, 0: 1, 255: 2})
    path = save(tmp_path / "c.png", np.array([[[128, 64, 1], [0, 0, 0], [0, 0, 255]]], np.uint8))
    assert read(path).tolist() == [[[0], [1], [2]]]
    save(path, np.array([[[128, 64, 1], [9, 8, 7], [1, 1, 1]]], np.uint8))
    with pytest.raises(ValueError, match=r"c\.png: 2 colour.s. belong to no class, .* \[1, 1, 1\], \[9, 8, 7\]"):
        read(path)
    assert ColourFile(read.values, other_is_void=True)(path).tolist() == [[[0], [255], [255]]]


def test_depth_of_every_unit(tmp_path):
    path = save(tmp_path / "d.png", np.array([[0, 100, 1500, 65535]], np.uint16))
    assert DepthFile(0.001)(path)[0, :, 0].tolist() == pytest.approx([0, 0.1, 1.5, 65.535])
    assert DepthFile(0.001, void=(0, 65535), valid=(0.1, 10))(path)[0, :, 0].tolist() == pytest.approx([0, 0, 1.5, 0])
    assert DepthFile(1 / 256, offset=-4, valid=(0, 100))(path)[0, :2, 0].tolist() == [0, 96 / 256]
    holes = save(tmp_path / "n.npy", np.array([[np.nan, np.inf, 2.0]]))
    assert DepthFile(nan_is_void=True)(holes)[0, :, 0].tolist() == [0, 0, 2]
    for read, file, words in ((DepthFile(), path, r"d\.png: values 0\.\.65535 after .* outside \[0, 255\); say which"),
                              (DepthFile(), holes, r"n\.npy: values nan\.\.nan after"),
                              (DepthFile(offset=-200), path, "values -100"),
                              (DepthFile(), save(tmp_path / "c.npy", np.zeros((2, 2), complex)), "must be real")):
        with pytest.raises(ValueError, match=words):
            read(file)


def test_normals_of_every_convention(tmp_path):
    path = save(tmp_path / "n.png", np.array([[[255, 128, 128], [128, 255, 128], [128, 128, 128]]], np.uint8))
    normals = NormalsFile(void=(128, 128, 128))(path)
    assert np.round(normals[0], 1).tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 0]]
    assert np.round(NormalsFile(axes=(-2, 1, 3))(path)[0, :2], 1).tolist() == [[0, 1, 0], [-1, 0, 0]]
    vectors = save(tmp_path / "v.npy", np.array([[[0, 0, 1], [np.nan, 0, 0], [0.6, 0.8, 0]]]))
    assert NormalsFile("vectors")(vectors)[0].tolist() == pytest.approx(np.array([[0, 0, 1], [0, 0, 0], [0.6, 0.8, 0]]))
    for read, file, words in ((NormalsFile("vectors"), path, r"under encoding vectors .* median length of \d+"),
                              (NormalsFile(), vectors, "rgb means 8-bit colours, found float64; encoding: vectors"),
                              (NormalsFile(), save(tmp_path / "g.png", np.zeros((2, 2), np.uint8)), "three channels")):
        with pytest.raises(ValueError, match=words):
            read(file)


def test_masks(tmp_path):
    path = save(tmp_path / "m.png", np.array([[0, 127, 128, 255]], np.uint8))
    assert MaskFile(threshold=0.5)(path)[0, :, 0].tolist() == [0, 0, 1, 1]
    assert MaskFile(void=128)(path)[0, :, 0].tolist() == pytest.approx([0, 127 / 255, 255, 1])
    small = save(tmp_path / "s.png", np.array([[0, 1]], np.uint8))
    assert MaskFile(full=1)(small)[0, :, 0].tolist() == [0, 1]
    assert MaskFile()(save(tmp_path / "b.png", np.array([[True, False]])))[0, :, 0].tolist() == [1, 0]
    assert MaskFile()(save(tmp_path / "w.png", np.array([[65535, 0]], np.uint16)))[0, :, 0].tolist() == [1, 0]
    for read, file, words in ((MaskFile(), small, r"s\.png holds no value but 0 and 1, and 255 means 1 .*say full: 1"),
                              (MaskFile(full=1), path, r"values 0\.\.255 are outside 0\.\.1, the value that means 1"),
                              (MaskFile(), save(tmp_path / "i.npy", np.array([[3]])), "say which value means 1")):
        with pytest.raises(ValueError, match=words):
            read(file)


def test_boundaries_of_regions(tmp_path):
    regions = np.ones((6, 8), np.int32)
    regions[:, 4:] = 9
    path = save(tmp_path / "r.mat", regions)
    assert RegionsFile("a")(path)[2:4, :, 0].sum(axis=1).tolist() == [1, 1]
    np.testing.assert_array_equal(TruthFile(variable="a")(path), regions)
    drawn = save(tmp_path / "d.png", np.array([[0, 255, 255]], np.uint8))
    assert TruthFile(MaskFile())(drawn).tolist() == [[0, 1, 1]]
    with pytest.raises(ValueError, match=r"r\.mat: say which variable"):
        RegionsFile()(path)


def test_boundaries_of_several_annotators(tmp_path):
    bits = np.array([[0, 1, 3, 7, 16]], np.uint16)                       # five people: 0, 1, 2, 3 and 1 of them
    path = save(tmp_path / "a.png", bits)
    assert AnnotatorsFile(0.4)(path)[0, :, 0].tolist() == [0, 255, 1, 1, 255]
    assert AnnotatorsFile(0.6)(path)[0, :, 0].tolist() == [0, 255, 255, 1, 255]
    truth = TruthFile(AnnotatorsFile(0.4))(path)
    assert truth.shape == (5, 1, 5) and truth[:, 0].tolist() == [
        [0, 1, 1, 1, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 1]]
    assert TruthFile(AnnotatorsFile(0.4))(save(tmp_path / "n.png", bits * 0)).shape == (1, 1, 5)
    with pytest.raises(ValueError, match=r"n\.npy: bits of annotators .* found -1"):
        AnnotatorsFile(0.4)(save(tmp_path / "n.npy", np.array([[-1]])))


def test_a_network_may_be_scored_on_some_of_its_tasks():
    config = load_config(ROOT / "configs" / "photos" / "bsds500_test.yml")
    assert config.tasks == ("sal", "edge") and list(config.val_db_name.spec.labels) == ["edge"]
    with pytest.raises(ConfigError, match="BSDS_SOD has no labels for depth"):
        load_config(ROOT / "configs" / "photos" / "boundaries.yml", ["task_dictionary.include_depth=true",
                                                                     "loss_kwargs.loss_weights.depth=1"])


def test_arrays_have_names(tmp_path):
    np.savez(tmp_path / "two.npz", a=np.zeros((1, 1), int), b=np.ones((1, 1), int))
    assert ClassFile({1: 0}, variable="b")(tmp_path / "two.npz").tolist() == [[[0]]]
    with pytest.raises(ValueError, match=r"two\.npz: it holds a, b; say which one \(variable"):
        ClassFile({1: 0})(tmp_path / "two.npz")
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 no")
    with pytest.raises(ValueError, match=r"cannot read .*bad\.npz"):
        ClassFile({1: 0})(tmp_path / "bad.npz")
    cv2.imwrite(str(tmp_path / "h.hdr"), np.full((2, 3, 3), 0.577, np.float32))
    assert NormalsFile("vectors")(tmp_path / "h.hdr").shape == (2, 3, 3)


def test_a_turned_photograph_asks_what_its_labels_belong_to(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(tmp_path / "i.jpg", np.zeros((4, 6, 3), np.uint8), exif=exif)
    assert ImageFile("stored")(path).shape == (4, 6, 3) and ImageFile("upright")(path).shape == (6, 4, 3)
    with pytest.raises(ValueError, match=r"i\.jpg carries EXIF orientation 6: .*exif: stored.*exif: upright"):
        ImageFile()(path)
    assert ImageFile()(save(tmp_path / "p.png", np.zeros((4, 6), np.uint8))).shape == (4, 6, 3)


# Descriptions --------------------------------------------------------------------------------------------------------

def write_own(root: Path, number: int = 12, size=(70, 110)) -> Path:
    """Photographs in two sub-folders with equal file names, classes, depth in millimetres and drawn boundaries."""
    rng = np.random.default_rng(0)
    for i in range(number):
        name = f"{'ab'[i % 2]}/img {i // 2}"
        save(root / "photos" / f"{name}.jpg", rng.integers(0, 256, (*size, 3)).astype(np.uint8))
        save(root / "masks" / f"{name}.png", rng.choice([0, 3, 7, 255], size).astype(np.uint8))
        save(root / "depth" / f"{name}.png", rng.integers(500, 9000, size).astype(np.uint16))
        save(root / "edge" / f"{name}.png", rng.choice([0] * 9 + [255], size).astype(np.uint8))
    (root / "names.txt").write_text("sky\nroad\n\ncar\n")
    return root


DESCRIPTION = """
images: photos
image_size: [64, 96]
splits: {val: 0.3}
tasks:
  semseg: {files: masks, classes: names.txt, values: {sky: 0, road: 3, car: [7]}}
  depth: {unit: mm, valid: [0.6, 8]}
  edge: {}
"""
TASKS = "{include_semseg: true, include_depth: true, include_edge: true}"


@pytest.fixture
def own(tmp_path):
    root = write_own(tmp_path / "own")
    (root / "dataset.yml").write_text(DESCRIPTION)
    return root


def experiment(own: Path, *more: str):
    return load_config(BASE, [*TINY, f"train_db_name={{folder: {own}}}", f"task_dictionary={TASKS}",
                              f"out_dir={own.parent / 'runs'}", "version_name=own", *more])


def test_a_description_becomes_a_specification(own):
    config = experiment(own)
    spec = config.dataset
    assert spec.tasks == {"semseg": 3, "depth": 1, "edge": 1} and spec.name == "own" and config.input_size == (64, 96)
    assert spec.labels["semseg"].classes == ("sky", "road", "car") and str(config.train_db_name) == "own"
    assert spec.labels["depth"].unit == "m" and spec.labels["depth"].valid_range == (0.6, 8)
    assert spec.labels["edge"].boundary.kind == "boundary" and spec.labels["edge"].boundary.max_dist == 0.0075
    assert config.val_db_name == config.train_db_name
    dataset = MultiTaskDataset(spec, "", "train", label_rules(spec.tasks))
    assert set(dataset.ids) < {f"{folder}/img {i}" for folder in "ab" for i in range(6)}
    assert set(dataset.ids).isdisjoint(MultiTaskDataset(spec, "", "val", label_rules(spec.tasks)).ids)
    sample = dataset.load("b/img 2")
    stored = np.asarray(Image.open(own / "masks" / "b" / "img 2.png"))
    classes = np.select([stored == 0, stored == 3, stored == 7], [0, 1, 2], 255)
    np.testing.assert_array_equal(sample["semseg"][..., 0], classes)
    depth = np.asarray(Image.open(own / "depth" / "b" / "img 2.png")) / 1000
    np.testing.assert_allclose(sample["depth"][..., 0], np.where((depth > 0.6) & (depth < 8), depth, 0), rtol=1e-6)
    assert sample["meta"] == {"name": "b/img 2", "size": (70, 110)}


def test_a_checkpoint_needs_neither_description_nor_folder(own):
    values = experiment(own).to_dict()
    (own / "dataset.yml").unlink()
    (own / "names.txt").unlink()
    again = config_from_dict(values, "last.pt")
    assert again.dataset == experiment_spec(again) and again.dataset.labels["semseg"].classes == ("sky", "road", "car")
    own.rename(own.parent / "moved")
    moved = config_from_dict(values, "last.pt", [f"val_db_name.folder={own.parent / 'moved'}"])
    assert len(MultiTaskDataset(moved.val_db_name.spec, "", "val", label_rules(["depth"]))) > 0
    with pytest.raises(FileNotFoundError, match=r"data set own is not there: .*/own \(say where .*val_db_name\.folder"):
        MultiTaskDataset(again.dataset, "", "val", label_rules(["depth"]))


def experiment_spec(config):
    return config_from_dict(config.to_dict(), "again").dataset


def test_training_scoring_and_files_of_equal_names(own):
    """Images of equal names in two sub-folders keep their outputs apart, at their own sizes."""
    config = experiment(own, "max_iter=2", "val_interval=2", "boundary_kwargs.workers=0")
    assert set(train(config, resume=False)) == {"semseg", "depth", "edge"}
    (own / "dataset.yml").unlink()
    checkpoint = config.run_dir / "last.pt"
    scores = infer(config_from_dict(config.to_dict(), "last.pt"), checkpoint, own.parent / "out")
    val = MultiTaskDataset(config.dataset, "", "val", {}).ids
    written = {path.relative_to(own.parent / "out" / "edge").as_posix() for path in
               (own.parent / "out" / "edge").rglob("*.png")}
    assert written == {f"{name}.png" for name in val} and len({Path(name).name for name in val}) < len(val)
    assert Image.open(own.parent / "out" / "edge" / f"{val[0]}.png").size == (110, 70)
    assert scores["edge"]["images"] == len(val) and 0 <= scores["edge"]["odsF"] <= 1
    assert len(predict(config, checkpoint, own / "photos" / "a", own.parent / "out")) == 6


@pytest.mark.parametrize(("rule", "size", "image", "expected"), [
    ("fit", (64, 96), (70, 110), (61, 96)), ("fit", (64, 96), (40, 50), (40, 50)),
    ("fit", (64, 96), (300, 100), (64, 21)),
    ("stretch", (64, 96), (70, 110), (64, 96)), ("stretch", (64, 96), (10, 10), (64, 96))])
def test_images_of_any_size(rule, size, image, expected):
    labels = label_rules(["semseg", "depth"])
    sample = {"image": np.full((*image, 3), 128, np.uint8), "semseg": np.full((*image, 1), 3.0, np.float32),
              "depth": np.full((*image, 1), 2.5, np.float32), "meta": {"name": "x", "size": image}}
    made = build_transform(size, None, False, labels, rule)(sample, None)
    assert made["image"].shape == (3, *size) and made["meta"]["size"] == expected
    assert made["meta"].get("original", image) == image
    valid = made["depth"] != 255
    assert valid.sum() == expected[0] * expected[1] == (made["semseg"] == 3).sum()
    assert (made["depth"][valid] == 2.5).all()


def test_boundaries_are_written_at_the_images_own_size(tmp_path):
    prob = torch.zeros(1, 1, 64, 96)
    prob[..., 8:24, :] = 1
    [path] = save_edge_maps(prob, [{"name": "a/b", "size": (32, 96), "original": (64, 192)}], tmp_path / "edge")
    picture = np.asarray(Image.open(path))
    assert path == tmp_path / "edge" / "a" / "b.png" and picture.shape == (64, 192) and picture.max() == 255
    assert (picture[:10] == 255).all() and (picture[20:] == 0).all()


@pytest.mark.parametrize(("change", "words"), [
    (("unit: mm", "unit: inch"), r"dataset\.yml: 'train_db_name\.tasks\.depth\.unit' must be one of m, cm, mm, "),
    (("depth:", "depht:"), r"dataset\.yml: unknown task 'depht'; did you mean 'depth'\?"),
    (("road: 3", "raod: 3"), r"semseg\.values' must be a group with the file value.* of each class: sky, road, car"),
    (("road: 3", "road: 7"), r"tasks\.semseg\.values' must be different for each class, and not void \(255\)"),
    (("car: [7]", "car: [255]"), "different for each class, and not void"),
    (("names.txt", "nmes.txt"), r"train_db_name': list of names not found: .*own/nmes\.txt"),
    (("names.txt", "[a, b, a]"), r"semseg\.classes' must be a list of 1 to 255 different names, or the name of a"),
    (("[0.6, 8]", "[8, 0.6]"), r"tasks\.depth\.valid' must be two growing numbers in \[0, 255\]"),
    (("edge: {}", "edge: {encoding: dotted}"), r"tasks\.edge\.encoding' must be one of drawn, regions, annotators"),
    (("edge: {}", "edge: 5"), r"'train_db_name\.tasks\.edge' must be a group that says what its labels are"),
    (("edge: {}", "edge: {full: 0}"), r"tasks\.edge\.full' must be above 0, or empty"),
    (("images: photos", "image: photos"), r"unknown key 'train_db_name\.image' of a data set's description; did"),
    (("image_size: [64, 96]", ""), r"the key 'train_db_name\.image_size' is required"),
    (("val: 0.3", "val: 0.3, train: 0.8"), r"splits' must be either shares that add up to at most 1, or lists and"),
    (("val: 0.3", "test: 0.3"), r"splits' must be a group of train and val: lists"),
    (("val: 0.3", "val: 3"), r"splits' must be names of lists, patterns of images, or shares in \(0, 1\)"),
    (("tasks:", "folder: x\ntasks:"), r"dataset\.yml must hold 'key: value' lines .*, not folder")])
def test_mistakes_in_a_description(own, change, words):
    (own / "dataset.yml").write_text(DESCRIPTION.replace(*change))
    with pytest.raises(ConfigError, match=words):
        experiment(own)


def test_mistakes_around_a_description(own):
    (own / "dataset.yml").rename(own / "data.yml")
    with pytest.raises(ConfigError, match=r"'train_db_name' says nothing of tasks, and there is no .*dataset\.yml"):
        experiment(own)
    with pytest.raises(ConfigError, match=r"'train_db_name\.folder' must be the folder of the data set, got"):
        experiment(own, "train_db_name={folders: x}")
    with pytest.raises(ConfigError, match=r"unknown data set 'NYUDD'; did you mean 'NYUD'\?.*a folder of your own"):
        experiment(own, "train_db_name=NYUDD")


def test_files_that_differ_in_the_ending_alone(own):
    save(own / "masks" / "a" / "img 0.npy", np.zeros((70, 110)))
    with pytest.raises(ValueError, match=r"masks/a holds img 0\.npy and img 0\.png: which of them belongs to"):
        MultiTaskDataset(experiment(own).dataset, "", "train", label_rules(["semseg"]))


def test_disparities_grow_when_the_camera_comes_nearer():
    near = DisparityLabel().scale(np.full((2, 2, 1), 8, np.float32), (4, 4), 2.0)
    assert near.shape == (4, 4, 1) and (near == 16).all()


# The tutorial --------------------------------------------------------------------------------------------------------

def test_the_tutorial_as_it_is_printed(tmp_path, monkeypatch):
    """docs/own_data.md: its folder, its two files and its commands, with a smaller backbone and fewer updates."""
    page = (ROOT / "docs" / "own_data.md").read_text(encoding="utf-8")
    files = dict(re.findall(r"```yaml\n# (\S+)\n(.*?)```", page, flags=re.DOTALL))
    assert set(files) == {"street/dataset.yml", "street.yml"}
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for i in range(10):
        name = f"north/b{i:03d}" if i % 2 else f"a{i:03d}"
        save(tmp_path / "street" / "photos" / f"{name}.jpg", rng.integers(0, 256, (120, 180, 3)).astype(np.uint8))
        mask = rng.choice([0, 7, 23, 26, 27, 33, 255], (120, 180))
        save(tmp_path / "street" / "masks" / f"{name}.png", mask.astype(np.uint8))
        save(tmp_path / "street" / "depth" / f"{name}.png", rng.integers(0, 65535, (60, 90)).astype(np.uint16))
    (tmp_path / "street" / "names.txt").write_text("road\ncar\nsky\n")
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    small = [item for item in TINY if item.startswith(("backbone", "nworkers", "tensorboard", "progress", "report",
                                                         "device"))]
    config = load_config("street.yml", [*small, "max_iter=1", "trBatch=2"])
    assert config.dataset.labels["semseg"].classes == ("road", "car", "sky") and config.version_name == "street"
    assert set(train(config, resume=False)) == {"semseg", "depth"}
    assert predict(config, Path("runs/street/best.pt"), tmp_path / "street" / "photos" / "a000.jpg", tmp_path / "out")
    (tmp_path / "street" / "masks" / "a000.png").unlink()
    partial = load_config("street.yml", [*small, "max_iter=1", "trBatch=2", "partial_labels.missing=allow"])
    assert not MultiTaskDataset(partial.dataset, "", "train", label_rules(["semseg", "depth"]), None, None,
                                partial.partial_labels).present.all()


def test_a_known_layout_described(tmp_path):
    """Cityscapes by its official folders: other endings for each kind of file, ids with a folder, raw class numbers."""
    known = DATASETS.load("Cityscapes")
    shutil.copytree(golden("metrics") / "fixture_cityscapes", tmp_path / "cityscapes")
    ids = ", ".join(f"{name}: {number}" for name, number in zip(CITYSCAPES, TRAIN_IDS, strict=True))
    files = {name: known.labels[name].files[0] for name in ("semseg", "depth")}
    (tmp_path / "cityscapes" / "dataset.yml").write_text(
        "images: 'leftImg8bit/{id}_leftImg8bit.png'\nimage_size: [16, 32]\n"
        "splits: {train: 'leftImg8bit/train/*/*_leftImg8bit.png', val: 'leftImg8bit/val/*/*_leftImg8bit.png'}\ntasks:\n"
        f"  semseg: {{files: '{files['semseg']}', classes: [{', '.join(CITYSCAPES)}], values: {{{ids}}}, void: [], "
        f"other: void}}\n  depth: {{files: '{files['depth']}', unit: disparity, offset: -1, scale: 0.00390625, "
        "void: [0, 1]}\n")
    spec = DataChoice.from_yaml({"folder": str(tmp_path / "cityscapes")}, "train_db_name", str).spec
    labels = label_rules(spec.tasks)
    for split in ("train", "val"):
        own, theirs = (MultiTaskDataset(s, tmp_path, split, labels) for s in (spec, known))
        assert own.ids == theirs.ids and len(own)
        for name in own.ids:
            np.testing.assert_array_equal(own.read("image", name), theirs.read("image", name))
            np.testing.assert_array_equal(own.read("semseg", name), theirs.read("semseg", name))
            mine, known_depth = own.read("depth", name), theirs.read("depth", name)
            measured = (mine > 0) & (known_depth > 0) & (known_depth < VOID)       # theirs: 0 is a class
            assert measured.any()
            np.testing.assert_array_equal(mine[measured], known_depth[measured])


def test_a_reader_that_no_process_can_be_sent_is_named(own):
    spec = experiment(own).dataset
    image = replace(spec.image, read=lambda path: path)
    dataset = MultiTaskDataset(replace(spec, image=image), "", "train", label_rules(["depth"]))
    with pytest.raises(ValueError, match="a reader or a label rule of own cannot be sent to other processes .*partial"):
        SoundFiles(dataset)
