"""Files of every kind, what is wrong with each of the broken ones, and which file of a data set is read."""

import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from scipy.io.matlab import MatReadError

from data.base import MultiTaskDataset
from data.datasets import DATASETS
from data.labels import MapLabel
from data.spec import find_folder
from utils.engine.tasks import label_rules
from utils.files import class_table, read_classes, read_depth, read_mat, read_rgb, read_table, read_uint8, read_uint16


def rules(*names: str):
    return label_rules(names)


def save(path: Path, array: np.ndarray, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array, **options)
    else:
        Image.fromarray(array).save(path, **options)
    return path


# Pictures ------------------------------------------------------------------------------------------------------------

def test_16_bits_are_rounded_to_8(tmp_path):
    grey = np.array([[0, 128, 129, 385, 386, 65535]], np.uint16)
    rgb = read_rgb(save(tmp_path / "deep.png", grey))
    assert rgb.tolist() == [[[v] * 3 for v in (0, 0, 1, 1, 2, 255)]] and rgb.dtype == np.uint8


def test_alpha_is_dropped_and_palettes_are_looked_up(tmp_path):
    assert read_rgb(save(tmp_path / "a.png", np.array([[[10, 20, 30, 0]]], np.uint8))).tolist() == [[[10, 20, 30]]]
    indexed = Image.fromarray(np.array([[1, 0]], np.uint8), "L")
    indexed.putpalette([1, 2, 3, 40, 50, 60])
    indexed.save(tmp_path / "p.png")
    assert read_rgb(tmp_path / "p.png").tolist() == [[[40, 50, 60], [1, 2, 3]]]
    assert read_uint8(tmp_path / "p.png", 1).tolist() == [[1, 0]]      # a label keeps the indices


def test_grey_photographs_are_turned_upright_too(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3                                       # half a turn
    path = save(tmp_path / "a.png", np.array([[1, 2]], np.uint8), exif=exif)
    assert read_rgb(path)[0, :, 0].tolist() == [2, 1]
    assert read_rgb(str(path), apply_exif=False)[0, :, 0].tolist() == [1, 2]
    assert read_uint8(path, 1).tolist() == [[1, 2]]


@pytest.mark.parametrize(("low", "high", "refused"), [(0, 65535, False), (-1, 5, True), (0, 65536, True)])
def test_32_bit_grey_must_fit_into_16(tmp_path, low, high, refused):
    path = save(tmp_path / "a.tif", np.array([[low, high]], np.int32))
    if refused:
        with pytest.raises(ValueError, match=rf"a\.tif: grey values {low}\.\.{high} exceed 0\.\.65535"):
            read_rgb(path)
    else:
        assert read_rgb(path)[0, :, 1].tolist() == [0, 255]


def test_floating_point_pictures_are_refused(tmp_path):
    path = save(tmp_path / "a.tif", np.zeros((2, 2), np.float32))
    with pytest.raises(ValueError, match=r"a\.tif: floating-point pictures have no defined white"):
        read_rgb(path)


@pytest.mark.parametrize("error", [OSError, SyntaxError, ValueError])
def test_every_way_of_being_damaged_is_one_sentence(tmp_path, monkeypatch, error):
    def broken(*args, **kwargs):
        raise error("broken chunk")
    monkeypatch.setattr(Image, "open", broken)
    (tmp_path / "a.png").write_bytes(b"anything")
    with pytest.raises(ValueError, match=r"^cannot read .*a\.png: broken chunk; the file is damaged or not a picture$"):
        read_rgb(tmp_path / "a.png")


@pytest.mark.parametrize("read", [read_rgb, lambda path: read_depth(path, "m"), lambda path: read_uint8(path, 1),
                                  lambda path: read_mat(path, "anno")])
@pytest.mark.parametrize("name", ["absent.png", "absent.npy"])
def test_an_absent_file_is_not_found(tmp_path, read, name):
    with pytest.raises(FileNotFoundError, match=f"^file not found: .*{name}$"):
        read(tmp_path / name)


def test_label_pictures(tmp_path):
    assert read_uint8(save(tmp_path / "b.png", np.array([[True, False]])), 1).tolist() == [[255, 0]]
    colours = save(tmp_path / "c.png", np.array([[[1, 2, 3]]], np.uint8))
    assert read_uint8(colours, 3).tolist() == [[[1, 2, 3]]]
    deep = save(tmp_path / "d.png", np.array([[1, 300]], np.uint16))
    assert read_uint16(deep).tolist() == [[1, 300]] and read_uint16(deep).dtype == np.uint16
    for read, words in ((lambda: read_uint8(deep, 1), "expected 1 channel.s. of 8 bits, found 1 of uint16"),
                        (lambda: read_uint8(colours, 1), "expected 1 channel.s. of 8 bits, found 3 of uint8"),
                        (lambda: read_uint16(colours), "one channel of 16 bits, found mode RGB"),
                        (lambda: read_uint16(tmp_path / "b.png"), "one channel of 16 bits, found mode 1")):
        with pytest.raises(ValueError, match=words):
            read()


def test_tables_translate_every_value(tmp_path):
    table = class_table({3: 0, 5: 1, 255: 255}, other=9)
    assert np.flatnonzero(table != 9).tolist() == [3, 5, 255] and table.dtype == np.float32 and len(table) == 256
    path = save(tmp_path / "l.png", np.array([[3, 5, 255, 4]], np.uint8))
    assert read_classes(path, table).tolist() == read_table(path, table).tolist() == [[[0], [1], [255], [9]]]
    with pytest.raises(ValueError, match=r"l\.png: label value\(s\) 3\.\.5, 255 out of range; valid: 7, 9\.\.10$"):
        read_classes(path, class_table({7: 0, 9: 1, 10: 2}))


# Depth ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("name", "stored", "unit", "metres"), [
    ("d.png", np.array([[0, 250]], np.uint8), "cm", [0, 2.5]),
    ("d.png", np.array([[0, 1500]], np.uint16), "mm", [0, 1.5]),
    ("d.npy", np.array([[0, 3]], np.int64), "m", [0, 3]), ("d.npy", np.array([[[0], [2]]], np.float16), "m", [0, 2]),
    ("d.npy", np.array([[0.5, 254.9]]), "m", [0.5, 254.9])])
def test_depth_in_metres(tmp_path, name, stored, unit, metres):
    depth = read_depth(str(save(tmp_path / name, stored)), unit)
    assert depth.shape == (1, 2, 1) and depth.dtype == np.float32
    assert depth[0, :, 0].tolist() == pytest.approx(metres, rel=1e-6)


@pytest.mark.parametrize(("stored", "words"), [
    (np.array([[1.0, 255.0]]), r"depth 1\.\.255 m is outside \[0, 255\); 0 marks a missing value, .* unit 'm'"),
    (np.array([[-0.001, 1.0]]), r"depth -0\.001\.\.1 m is outside"), (np.array([[np.nan, 1]]), "depth nan..nan m"),
    (np.array([[1, np.inf]]), r"depth 1\.\.inf m"), (np.zeros((2, 3, 2)), r"one channel \(H x W\), .* \(2, 3, 2\)"),
    (np.zeros(3), r"shape \(3,\)"), (np.zeros((0, 3)), r"shape \(0, 3, 1\)"), (np.zeros((1, 2, 3, 1)), "one channel"),
    (np.zeros((2, 2), bool), "real numbers, this array holds bool"), (np.zeros((2, 2), complex), "holds complex128")])
def test_what_is_no_depth_is_refused(tmp_path, stored, words):
    with pytest.raises(ValueError, match=f"d.npy: .*{words}"):
        read_depth(save(tmp_path / "d.npy", stored), "m")


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY\x01\x00", b"no array at all"])
def test_a_damaged_array_is_named(tmp_path, content):
    (tmp_path / "d.npy").write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot read .*d\.npy: .*; damaged, or not a plain numpy array"):
        read_depth(tmp_path / "d.npy", "m")


def test_arrays_of_objects_are_not_unpickled(tmp_path):
    path = save(tmp_path / "d.npy", np.array([[None]]), allow_pickle=True)
    with pytest.raises(ValueError, match="cannot read .*not a plain numpy array"):
        read_depth(path, "m")


# Matlab --------------------------------------------------------------------------------------------------------------

def test_matlab_structs_have_attributes(tmp_path):
    savemat(tmp_path / "a.mat", {"anno": {"name": "cat", "size": np.array([[3]])}, "other": np.zeros((2, 2))})
    anno = read_mat(tmp_path / "a.mat", "anno")
    assert (anno.name, anno.size) == ("cat", 3)
    with pytest.raises(ValueError, match=r"a\.mat has no variable 'LabelMap'"):
        read_mat(tmp_path / "a.mat", "LabelMap")


@pytest.mark.parametrize("error", [OSError, ValueError, TypeError, MatReadError, NotImplementedError])
def test_damaged_matlab_files_are_named(tmp_path, monkeypatch, error):
    def broken(*args, **kwargs):
        raise error("broken header")
    monkeypatch.setattr("scipy.io.loadmat", broken)
    with pytest.raises(ValueError, match=r"cannot read .*a\.mat: broken header; damaged, or not a Matlab v5 file"):
        read_mat(tmp_path / "a.mat", "anno")


# Folders -------------------------------------------------------------------------------------------------------------

def pascal(root: Path, number: int = 7) -> Path:
    """A PASCAL-Context folder with semantic segmentation only; the even ids have it in VOC12."""
    folder = root / "PASCALContext"
    ids = [f"2008_00000{i}" for i in range(number)]
    for i, name in enumerate(ids):
        save(folder / "JPEGImages" / f"{name}.jpg", np.full((4, 6, 3), 10 * i, np.uint8))
        save(folder / "semseg" / ("pascal-context" if i % 2 else "VOC12") / f"{name}.png",
             np.full((2, 3), i, np.uint8))
    (folder / "ImageSets" / "Context").mkdir(parents=True)
    (folder / "ImageSets" / "Context" / "train.txt").write_text("\n".join(ids) + "\n")
    return folder


def opened(root: Path, transform=None, split: str = "train"):
    return MultiTaskDataset(DATASETS.load("PASCALContext"), root, split, rules("semseg"), transform)


def test_the_first_file_that_exists_is_read(tmp_path):
    folder = pascal(tmp_path)
    save(folder / "semseg" / "pascal-context" / "2008_000002.png", np.full((2, 3), 20, np.uint8))
    dataset = opened(tmp_path)
    assert [dataset.load(name)["semseg"].max() for name in dataset.ids] == list(range(7))
    assert [path.parent.name for name in dataset.ids[:2] for path in dataset.paths("semseg", name)] == [
        "VOC12", "pascal-context"]


def test_a_sample_before_its_transform(tmp_path):
    pascal(tmp_path)
    sample = opened(tmp_path)[3]
    assert list(sample) == ["image", "semseg", "meta"] and sample["meta"] == {"name": "2008_000003", "size": (4, 6)}
    assert sample["image"].shape == (4, 6, 3) and sample["semseg"].shape == (4, 6, 1)      # brought to the image's size
    assert len(opened(tmp_path)) == 7


def test_the_seed_of_a_transform_is_the_given_one_or_the_index(tmp_path):
    pascal(tmp_path)
    dataset = opened(tmp_path, lambda sample, rng: (sample["meta"]["name"], rng.random()))
    assert dataset[5] == ("2008_000005", random.Random(5).random())
    assert dataset[(5, 77)] == ("2008_000005", random.Random(77).random())


@pytest.mark.parametrize("absent", [1, 5, 6])
def test_missing_files_are_counted_and_five_are_shown(tmp_path, absent):
    folder = pascal(tmp_path)
    for i in range(absent):
        next(folder.glob(f"semseg/*/2008_00000{i}.png")).unlink()
    with pytest.raises(FileNotFoundError) as error:
        opened(tmp_path)
    shown = ", ".join(f"semseg/pascal-context/2008_00000{i}.png" for i in range(min(absent, 5)))
    assert str(error.value) == (f"{absent} file(s) of split 'train' (7 images) missing in {folder}: {shown}"
                                + (" and 1 more" if absent == 6 else "")
                                + "; partial_labels.missing=allow trains and scores with the labels that are there")


def test_missing_folders_are_missing_files(tmp_path):
    folder = pascal(tmp_path, 2)
    (folder / "JPEGImages").rename(folder / "moved")
    with pytest.raises(FileNotFoundError, match=r"^2 file\(s\) .*: JPEGImages/2008_000000.jpg, JPEGImages/2008_000001"):
        opened(tmp_path)


def test_folders_are_found_below_the_root_or_are_it(tmp_path, monkeypatch):
    spec, folder = DATASETS.load("PASCALContext"), pascal(tmp_path)
    assert find_folder(tmp_path, spec) == find_folder(str(folder), spec) == folder
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_folder("~", spec) == folder
    inner = folder / "PASCALContext"
    inner.mkdir()
    assert find_folder(folder, spec) == inner              # the folder below comes first
    with pytest.raises(FileNotFoundError, match=r"data folder not found: .*semseg/PASCALContext \(set db_root"):
        find_folder(folder / "semseg", spec)
    with pytest.raises(FileNotFoundError, match=r"data folder not found: .*elsewhere/PASCALContext/PASCALContext"):
        find_folder(tmp_path / "elsewhere" / "PASCALContext", spec)


def test_labels_are_resized_by_their_rule():
    label = np.array([[[0.0], [8.0]]], np.float32)
    assert MapLabel().fit(label, (2, 4))[..., 0].tolist() == [[0, 0, 8, 8]] * 2
    assert MapLabel(interp="cubic").fit(label, (1, 2)) is label                    # already of the image's size
    cubic = MapLabel(interp="cubic").fit(label, (1, 4))
    assert cubic.shape == (1, 4, 1) and 0 < cubic[0, 1, 0] < 4 < cubic[0, 2, 0] < 8


def test_cityscapes_lists_its_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"folder of the images not found: .*leftImg8bit/train"):
        (tmp_path / "cityscapes").mkdir()
        MultiTaskDataset(DATASETS.load("Cityscapes"), tmp_path, "train", {})
    for name in ("bonn/b_2", "aachen/a_1", "bonn/b_1"):
        path = tmp_path / "cityscapes" / "leftImg8bit" / "train" / f"{name}_leftImg8bit.png"
        save(path, np.zeros((2, 2, 3), np.uint8))
    dataset = MultiTaskDataset(DATASETS.load("Cityscapes"), tmp_path, "train", {})
    assert dataset.ids == ["train/aachen/a_1", "train/bonn/b_1", "train/bonn/b_2"]
    assert dataset[0]["meta"]["name"] == "a_1_leftImg8bit"
