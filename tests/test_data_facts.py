"""What the project claims about the data sets, as literal values: sizes, classes, tolerances, files, label tables."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from scipy.io import savemat

from data.datasets import DATASETS
from data.datasets.cityscapes import COLOURS as CITYSCAPES
from data.datasets.cityscapes import read_disparity
from data.datasets.pascal_context import NORMALS_IDS, has_people, read_edge, read_human_parts, read_normals
from data.spec import LabelSpec, read_image
from data.splits import SplitGlob, listed
from utils.engine.views import (
    VOC,
    colour_classes,
    colour_depth,
    colour_normals,
    colour_probability,
    depth_range,
    voc_palette,
)

SPECS = {name: DATASETS.load(name) for name in DATASETS}
MAT = "pascal-context/trainval/{id}.mat"
VALUES = np.arange(256, dtype=np.uint8).reshape(16, 16)


def png(path: Path, pixels: np.ndarray) -> Path:
    assert cv2.imwrite(str(path), pixels[..., ::-1] if pixels.ndim == 3 else pixels)
    return path


def label_map(path: Path, labels: list | np.ndarray) -> Path:
    savemat(path, {"LabelMap": np.asarray(labels)})
    return path


@pytest.mark.parametrize(("name", "facts"), [
    ("NYUD", {"folder": "NYUDv2", "image_size": (448, 576), "label_size": None, "splits": listed("gt_sets/{split}.txt"),
              "tasks": {"semseg": 40, "depth": 1, "normals": 3, "edge": 1}}),
    ("PASCALContext", {"folder": "PASCALContext", "image_size": (512, 512), "label_size": None,
                       "splits": listed("ImageSets/Context/{split}.txt"),
                       "tasks": {"semseg": 21, "human_parts": 7, "sal": 2, "normals": 3, "edge": 1}}),
    ("Cityscapes", {"folder": "cityscapes", "image_size": (512, 1024), "label_size": (1024, 2048),
                    "splits": {s: SplitGlob(f"leftImg8bit/{s}/*/*_leftImg8bit.png") for s in ("train", "val")},
                    "tasks": {"semseg": 19, "depth": 1}}),
])
def test_specifications(name, facts):
    spec = SPECS[name]
    assert spec.name == name
    assert {fact: getattr(spec, fact) for fact in facts} == facts
    assert list(spec.tasks) == list(facts["tasks"])
    ranges = {task: label.valid_range for task, label in spec.labels.items() if label.valid_range}
    assert ranges == ({"depth": (0, 80)} if name == "Cityscapes" else {})
    assert spec.labels.get("depth", LabelSpec((), None)).unit == {"NYUD": "m", "Cityscapes": "px"}.get(name, "")


@pytest.mark.parametrize(("name", "max_dist", "kind", "published_list"), [
    ("NYUD", 0.011, "nyud", None), ("PASCALContext", 0.0075, "regions", "ImageSets/Context/test_new.txt")])
def test_boundary_score(name, max_dist, kind, published_list):
    truth = SPECS[name].labels["edge"].boundary
    assert (truth.max_dist, truth.kind, truth.published_list) == (max_dist, kind, published_list)


@pytest.mark.parametrize(("name", "task", "number", "some"), [
    ("NYUD", "semseg", 40, {0: "wall", 1: "floor", 22: "books", 30: "person", 39: "otherprop"}),
    ("PASCALContext", "semseg", 21, {0: "background", 1: "aeroplane", 15: "person", 20: "tvmonitor"}),
    ("PASCALContext", "human_parts", 7, {0: "background", 1: "head", 4: "lower arm", 6: "lower leg"}),
    ("Cityscapes", "semseg", 19, {0: "road", 10: "sky", 11: "person", 18: "bicycle"}),
])
def test_class_names(name, task, number, some):
    names = SPECS[name].labels[task].classes
    assert len(names) == number and {index: names[index] for index in some} == some


@pytest.mark.parametrize(("name", "files"), [
    ("NYUD", {"image": ("images/{id}.png",), "semseg": ("segmentation/{id}.png",), "depth": ("depth/{id}.npy",),
              "normals": ("normals/{id}.png",), "edge": ("edge/{id}.png",), "score": ("edge/{id}.png",)}),
    ("PASCALContext", {
        "image": ("JPEGImages/{id}.jpg",), "semseg": ("semseg/VOC12/{id}.png|semseg/pascal-context/{id}.png",),
        "human_parts": ("human_parts/{id}.mat",), "sal": ("sal_distill/{id}.png",),
        "normals": ("normals_distill/{id}.png", MAT), "edge": (MAT,), "score": (MAT,)}),
    ("Cityscapes", {
        "image": ("leftImg8bit/{id}_leftImg8bit.png",), "semseg": ("gtFine/{id}_gtFine_labelIds.png",),
        "depth": ("disparity/{id}_disparity.png", "gtFine/{id}_gtFine_labelIds.png")}),
])
def test_file_patterns(name, files):
    spec = SPECS[name]
    found = {"image": spec.image.files, **{task: label.files for task, label in spec.labels.items()}}
    if "edge" in spec.labels:
        found["score"] = spec.labels["edge"].boundary.files
    assert found == files


# 8-bit labels: a picture that holds all 256 values ------------------------------------------------------------------

@pytest.mark.parametrize(("name", "task", "values", "expected"), [
    ("NYUD", "semseg", range(41), [255, *range(40)]), ("NYUD", "edge", (0, 51, 255), (0, 0.2, 1)),
    ("PASCALContext", "semseg", (*range(21), 255), (*range(21), 255)),
    ("PASCALContext", "sal", (0, 1, 127, 128, 255), (0, 0, 0, 1, 1)),
    ("Cityscapes", "semseg", range(34),
     [255] * 7 + [0, 1, 255, 255, 2, 3, 4, 255, 255, 255, 5, 255, *range(6, 16), 255, 255, 16, 17, 18]),
    ("Cityscapes", "semseg", (34, 200, 255), (255, 255, 255)),
])
def test_label_tables(tmp_path, name, task, values, expected):
    path = png(tmp_path / "label.png", np.array([values], np.uint8))
    label = DATASETS.load(name).labels[task].read(path)
    assert label.shape == (1, len(expected), 1) and label.dtype == np.float32
    assert label[0, :, 0].tolist() == pytest.approx(list(expected))


@pytest.mark.parametrize(("name", "values", "found", "valid"), [
    ("NYUD", (0, 41, 42, 255), r"41\.\.42, 255", r"0\.\.40"),
    ("PASCALContext", (0, 21, 254), "21, 254", r"0\.\.20, 255")])
def test_values_beyond_the_classes_are_refused(tmp_path, name, values, found, valid):
    path = png(tmp_path / "label.png", np.array([values], np.uint8))
    with pytest.raises(ValueError, match=rf"label\.png: label value\(s\) {found} out of range; valid: {valid}$"):
        DATASETS.load(name).labels["semseg"].read(path)


def test_normals_of_nyud_are_never_zero(tmp_path):
    normals = DATASETS.load("NYUD").labels["normals"].read(png(tmp_path / "n.png", np.stack([VALUES] * 3, axis=-1)))
    assert normals[0, 0].tolist() == [-1] * 3 and normals[15, 15].tolist() == [1] * 3
    assert normals[3, 3, 0] == pytest.approx(2 * 51 / 255 - 1) and (normals != 0).all()


def test_nyud_depth_is_in_metres(tmp_path):
    np.save(tmp_path / "d.npy", np.array([[0, 2.5]], np.float64))
    assert DATASETS.load("NYUD").labels["depth"].read(tmp_path / "d.npy").tolist() == [[[0], [2.5]]]


def test_images_keep_the_order_of_colours(tmp_path):
    assert read_image(png(tmp_path / "i.png", np.array([[[1, 2, 3]]], np.uint8))).tolist() == [[[1, 2, 3]]]


# PASCAL-Context ------------------------------------------------------------------------------------------------------

def test_classes_with_normals():
    assert len(NORMALS_IDS) == 170 and (min(NORMALS_IDS), max(NORMALS_IDS)) == (3, 457)
    assert sum(NORMALS_IDS) == 37556 and sum(i * i for i in NORMALS_IDS) == 11502518
    assert sorted(set(NORMALS_IDS)) == list(NORMALS_IDS)


def test_normals_are_zero_where_the_class_has_none(tmp_path):
    colours = png(tmp_path / "n.png", np.full((2, 4, 3), (255, 0, 51), np.uint8))
    labels = label_map(tmp_path / "l.mat", [[2, 3, 457, 458]] * 2)
    normals = read_normals(colours, labels)
    assert normals[0, 0].tolist() == normals[0, 3].tolist() == [0, 0, 0]
    assert normals[0, 1].tolist() == normals[0, 2].tolist() == pytest.approx([1, -1, -0.6])
    with pytest.raises(ValueError, match=r"n\.png has \(H, W\) = \(2, 4\), its mask .*m\.mat \(3, 4\)"):
        read_normals(colours, label_map(tmp_path / "m.mat", np.zeros((3, 4))))


def test_training_boundaries_are_the_thinned_laplacian(tmp_path):
    """Both sides of a vertical border respond, a band two pixels wide; thinning leaves one of them."""
    labels = np.ones((6, 8))
    labels[:, 4:] = 300                                    # does not fit into 8 bits
    edge = read_edge(label_map(tmp_path / "l.mat", labels))
    assert edge.shape == (6, 8, 1) and edge.dtype == np.float32
    assert set(np.unique(edge)) == {0, 1} and edge[..., 0].any(axis=0).nonzero()[0].tolist() in ([3], [4], [3, 4])
    assert edge[2:4, :, 0].sum(axis=1).tolist() == [1, 1]
    assert not read_edge(label_map(tmp_path / "flat.mat", np.full((6, 8), 7))).any()
    savemat(tmp_path / "bad.mat", {"LabelMap": np.zeros((2, 2, 2))})
    with pytest.raises(ValueError, match=r"bad\.mat: LabelMap should be H x W, it has shape \(2, 2, 2\)"):
        read_edge(tmp_path / "bad.mat")


def people(path: Path, *objects: tuple[int, np.ndarray, dict[str, np.ndarray]]) -> Path:
    """A PASCAL-Part file: class, mask, and the parts of each object."""
    made = [{"class_ind": float(kind), "mask": mask.astype(np.uint8),
             "parts": np.array([{"part_name": part, "mask": m.astype(np.uint8)} for part, m in parts.items()])}
            for kind, mask, parts in objects]
    savemat(path, {"anno": {"objects": np.array(made, dtype=object)}})
    return path


def square(*columns: int) -> np.ndarray:
    mask = np.zeros((2, 6), bool)
    mask[:, list(columns)] = True
    return mask


def test_body_parts(tmp_path):
    """Later parts overwrite earlier ones, other classes do not count; class 15 is a person."""
    everyone = people(tmp_path / "p.mat", (15, square(0, 1, 2, 3), {
        "hair": square(0), "torso": square(1), "luarm": square(2), "rhand": square(3)}),
        (7, square(5), {"head": square(5)}), (15, square(4), {"ruleg": square(4), "lfoot": square(4)}))
    label = read_human_parts(everyone)
    assert label.shape == (2, 6, 1) and label[0, :, 0].tolist() == label[1, :, 0].tolist() == [1, 2, 3, 4, 6, 0]
    assert has_people(everyone)


@pytest.mark.parametrize(("part", "index"), [
    ("hair", 1), ("head", 1), ("nose", 1), ("neck", 2), ("luarm", 3), ("ruarm", 3), ("llarm", 4),
    ("rhand", 4), ("luleg", 5), ("ruleg", 5), ("llleg", 6), ("rfoot", 6)])
def test_every_part_has_its_class(tmp_path, part, index):
    path = people(tmp_path / "p.mat", (15, square(2), {part: square(2), "torso": square(3)}))
    assert read_human_parts(path)[0, :, 0].tolist() == [0, 0, index, 2, 0, 0]


@pytest.mark.parametrize("objects", [
    ((7, square(5), {"head": square(5), "torso": square(1)}),),
    ((15, square(), {"head": square(), "torso": square()}), (7, square(5), {"head": square(5), "neck": square(1)}))])
def test_without_people_a_map_is_zero(tmp_path, objects):
    path = people(tmp_path / "p.mat", *objects)
    assert not read_human_parts(path).any() and read_human_parts(path).shape == (2, 6, 1) and not has_people(path)


def test_an_unknown_part_is_named(tmp_path):
    path = people(tmp_path / "p.mat", (15, square(2), {"wing": square(2), "torso": square(3)}))
    with pytest.raises(ValueError, match=r"p\.mat: unknown part 'wing'; known: hair, head, "):
        read_human_parts(path)


# Cityscapes ----------------------------------------------------------------------------------------------------------

def test_disparity(tmp_path):
    """(v - 1) / 256, void for 0 and 1, and 0 for rail track (file id 10), the slip of the published loader."""
    stored = png(tmp_path / "d.png", np.array([[0, 1, 2, 257, 32513, 257]], np.uint16))
    labels = png(tmp_path / "l.png", np.array([[7, 23, 7, 9, 11, 10]], np.uint8))
    disparity = read_disparity(stored, labels)
    assert disparity.shape == (1, 6, 1) and disparity.dtype == np.float32
    assert disparity[0, :, 0].tolist() == [255, 255, 1 / 256, 1, 127, 0]
    assert read_disparity(stored, labels, void=-1)[0, :2, 0].tolist() == [-1, -1]
    with pytest.raises(ValueError, match=r"d\.png has \(H, W\) = \(1, 6\), its labels .*s\.png \(1, 5\)"):
        read_disparity(stored, png(tmp_path / "s.png", np.zeros((1, 5), np.uint8)))


# Colours -------------------------------------------------------------------------------------------------------------

def hex_of(colours) -> str:
    return " ".join(bytes(np.asarray(colour, np.uint8)).hex() for colour in colours)


def test_palettes():
    assert hex_of(CITYSCAPES) == ("804080 f423e8 464646 66669c be9999 999999 faaa1e dcdc00 6b8e23 98fb98 4682b4 dc143c "
                                  "ff0000 00008e 000046 003c64 005064 0000e6 770b20")
    assert SPECS["Cityscapes"].labels["semseg"].colours == CITYSCAPES and not SPECS["NYUD"].labels["semseg"].colours
    assert hex_of(VOC[:10]) == "000000 800000 008000 808000 000080 800080 008080 808080 400000 c00000"
    assert hex_of(VOC[[20, 21, 64, 255]]) == "004080 804080 200000 e0e0c0"
    assert VOC.shape == (256, 3) and len(np.unique(VOC, axis=0)) == 256 and len(voc_palette(7)) == 7


def test_colours_of_classes_and_probabilities():
    three = np.array([[1, 2, 3], [4, 5, 6], [7, 8, 9]], np.uint8)
    assert hex_of(colour_classes(np.array([[0, 2, 3, 254, 255]]), three)[0]) == "010203 070809 010203 070809 ffffff"
    assert colour_classes(np.array([[1.0]])).tolist() == [[[128, 0, 0]]]
    grey = colour_probability(np.array([[0, 0.5, 1, 255, -0.5, 1.2, 1.6]]))
    assert hex_of(grey[0]) == "000000 7f7f7f ffffff 7f7f7f 000000 ffffff 7f7f7f"


def test_colours_of_normals():
    vectors = np.array([[[1, -1, 0], [0, 0, 0], [255, 255, 255], [0, 0.6, -0.8], [1, -1, 0.1]]])
    assert hex_of(colour_normals(vectors)[0]) == "ff007f 000000 000000 7fcc19 ff008c"


def test_colours_of_depth_run_from_near_red_to_far_blue():
    depth = np.array([[0, 1, 2, 3, 255, -1, 254.9]])
    assert hex_of(colour_depth(depth[:, :5])[0]) == "000000 7a0403 a1fd3d 30123b 000000"
    assert not colour_depth(np.array([[0.0, 255.0, -1]])).any()
    assert hex_of(colour_depth(np.array([[2.0, 2.0, 0]]))[0]) == "7a0403 7a0403 000000"     # nothing to tell apart
    assert depth_range(np.arange(1.0, 102.0)[None]) == (3.0, 99.0)                       # 2nd and 98th percentile
    assert depth_range(depth) == pytest.approx((1.06, 239.786)) and depth_range(np.zeros((1, 2))) == (0.0, 0.0)
