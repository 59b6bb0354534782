"""Split lists as people write them, and what a data set says of files that do not fit together."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.base import MultiTaskDataset
from data.datasets import DATASETS
from data.spec import LabelSpec
from data.splits import SplitGlob, SplitList, id_of, read_split_list
from tests.shared import ROOT
from utils.engine.config import load_config
from utils.engine.tasks import label_rules
from utils.files import class_table, read_classes, read_indices, read_uint8
from utils.options import ConfigError

IDS = ["a 1", "bücher/x", "c"]


@pytest.mark.parametrize("content", [
    "\n".join(IDS).encode(), "\r\n".join(IDS).encode(), "\r".join(IDS).encode() + b"\r",
    "\n".join(IDS).encode("utf-8-sig"),
    "\r\n".join(IDS).encode("utf-16"), ("\n\n  " + " \t\n".join(IDS) + "  \n\n").encode()])
def test_lists_of_every_system_are_read(tmp_path, content):
    (tmp_path / "list.txt").write_bytes(content)
    assert SplitList("list.txt").ids(tmp_path, "{id}.png") == IDS


@pytest.mark.parametrize(("content", "words"), [
    (b"a\nb\xfccher\n", r"list\.txt, line 2: byte 0xfc is no text in UTF-8 .*Windows-1252.*save the list as UTF-8"),
    (b"a\n\nb\na\n", r"list\.txt, line 4: 'a' is listed already in line 1; remove one"),
    ("a\nb\u200b\n".encode(), r"line 2: the id 'b\\u200b' holds the invisible character U\+200B"),
    (b"a\nb\tc\n", r"line 2: .* invisible character U\+0009"), (b"x\x00\n", r"line 1: .* U\+0000"),
    (b"a\n../../etc/x\n", r"line 2: '\.\./\.\./etc/x' leaves the data folder"), (b"/x\n", "line 1: '/x' leaves"),
    (b"\xff\xfea", r"line 1: byte 0x61 is no text in UTF-16")])
def test_what_is_no_list_is_refused_with_its_line(tmp_path, content, words):
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        read_split_list(tmp_path / "list.txt")


def write_pascal(root: Path, lines: str, size=(4, 6), label=None, names=("2008_1", "2008_2"), mode="L", **options):
    """A PASCAL-Context folder with semantic segmentation only."""
    folder = root / "PASCALContext"
    for sub in ("JPEGImages", "semseg/VOC12", "ImageSets/Context"):
        (folder / sub).mkdir(parents=True)
    for name in names:
        Image.fromarray(np.zeros((*size, 3), np.uint8)).save(folder / "JPEGImages" / f"{name}.jpg", **options)
        pixels = np.full(size, 3, np.uint8) if label is None else label
        Image.fromarray(pixels).convert(mode).save(folder / "semseg" / "VOC12" / f"{name}.png")
    (folder / "ImageSets" / "Context" / "train.txt").write_text(lines)
    return folder


def opened(root: Path, split: str = "train") -> MultiTaskDataset:
    return MultiTaskDataset(DATASETS.load("PASCALContext"), root, split, label_rules(["semseg"]))


@pytest.mark.parametrize(("lines", "words"), [
    ("2008_1  1\n2008_2 -1\n", r"JPEGImages/2008_1  1\.jpg.*more than one column, and '2008_1' alone is an image"),
    ("JPEGImages/2008_1.jpg\n", r"; '2008_1' is an image: an id has no folder and no ending$"),
    ("2008_9\n", r"missing in .*JPEGImages/2008_9\.jpg[^;]*$")])
def test_ids_that_are_no_images_are_explained(tmp_path, lines, words):
    write_pascal(tmp_path, lines)
    with pytest.raises(FileNotFoundError, match=words):
        opened(tmp_path)


def test_patterns_give_ids():
    assert id_of("a/b/x_y.png", "a/{id}_y.png") == "b/x" and id_of("a/x.JPG", "a/{id}.*") == "x"
    assert id_of("a/x_m.jpg", "a/{id}_n.*") is None and id_of("c/x.png", "a/{id}.png") is None


def test_found_images_are_sorted_and_shares_are_kept(tmp_path):
    for i in range(40):
        (tmp_path / f"p/{i % 3}").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"p/{i % 3}/{i}.png").touch()
    (tmp_path / "p" / "Thumbs.db").touch()
    every = SplitGlob("p/**/*").ids(tmp_path, "p/{id}.*")
    assert len(every) == 40 and every == sorted(every) and every[0] == "0/0"
    val = SplitGlob("p/**/*", (0, 0.25)).ids(tmp_path, "p/{id}.*")
    train = SplitGlob("p/**/*", (0.25, 1)).ids(tmp_path, "p/{id}.*")
    assert sorted(val + train) == every and 3 <= len(val) <= 17
    (tmp_path / "p" / "new.png").touch()
    assert set(SplitGlob("p/**/*", (0, 0.25)).ids(tmp_path, "p/{id}.*")) - {"new"} == set(val)
    with pytest.raises(ValueError, match=r"p/Thumbs\.db is among the images of the split .* \(p/\{id\}\.png\)"):
        SplitGlob("p/**/*").ids(tmp_path, "p/{id}.png")


# Labels --------------------------------------------------------------------------------------------------------------

STEPS = np.array([[0, 1, 1, 0], [1, 1, 0, 0]], np.uint8)


@pytest.mark.parametrize(("bits", "top"), [(1, 1), (2, 3), (4, 13), (8, 20)])
@pytest.mark.parametrize("palette", [False, True])
def test_class_indices_of_few_bits_are_what_is_stored(tmp_path, bits, top, palette):
    """A grey PNG of 4 bits spreads its values over 0..255 when it is shown: class 3 would become 51."""
    path = write_grey(tmp_path / "l.png", STEPS * top, bits, palette)
    with Image.open(path) as image:
        assert image.mode == ("P" if palette else "1" if bits == 1 else "L")
    np.testing.assert_array_equal(read_indices(path), STEPS * top)
    table = class_table({c: c for c in range(21)})
    np.testing.assert_array_equal(read_classes(path, table)[..., 0], STEPS * top)
    if not palette:                                        # a picture of values in 0..1 keeps its white
        assert read_uint8(path, 1).max() == (255 if bits < 8 and top == 2**bits - 1 else {4: 17, 8: 1}[bits] * top)


def write_grey(path: Path, pixels: np.ndarray, bits: int, palette: bool = False) -> Path:
    """A PNG of so many bits, made by hand: Pillow writes grey with 8 bits or 1."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = pixels.shape
    packed = [np.packbits(np.unpackbits(row[:, None], axis=1)[:, 8 - bits:].ravel()).tobytes() for row in pixels]
    colours = chunk(b"PLTE", bytes(3 * 2**bits)) if palette else b""
    header = struct.pack(">IIBBBBB", width, height, bits, 3 * palette, 0, 0, 0)
    content = zlib.compress(b"".join(b"\0" + row for row in packed))
    chunks = chunk(b"IHDR", header) + colours + chunk(b"IDAT", content) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    return path


@pytest.mark.parametrize(("size", "label", "words"), [
    ((40, 60), (60, 40), r"2008_1\.png is 60 x 40 \(height x width\), its image .*2008_1\.jpg 40 x 60 \(one of them is "
                         r"turned by 90 degrees: .*EXIF orientation\?\): they do not show the same"),
    ((40, 60), (40, 50), "40 x 50 .*, another aspect ratio: they do not show the same"),
    ((40, 60), (20, 30), None), ((41, 61), (20, 30), None), ((41, 61), (21, 30), None), ((40, 60), (81, 121), None),
    ((40, 60), (22, 30), "22 x 30 .* another aspect ratio")])
def test_a_label_shows_what_its_image_shows(tmp_path, size, label, words):
    write_pascal(tmp_path, "2008_1", size, np.zeros(label, np.uint8))
    if words is None:
        assert opened(tmp_path)[0]["semseg"].shape == (*size, 1)
        return
    with pytest.raises(ValueError, match=words):
        opened(tmp_path)[0]


# Experiments ---------------------------------------------------------------------------------------------------------

def test_a_void_that_labels_do_not_hold_is_refused():
    with pytest.raises(ConfigError, match=r"'ignore_index' must be 255, got 254: labels hold 255 where they are void"):
        load_config(ROOT / "configs" / "bim_nyud.yml", ["ignore_index=254"])


def test_a_model_is_scored_on_the_classes_it_was_trained_for():
    only = "task_dictionary={include_semseg: true}"
    with pytest.raises(ConfigError, match="semseg of PASCALContext is not that of NYUD: 21 outputs against 40;"):
        load_config(ROOT / "configs" / "bim_nyud.yml", [only, "val_db_name=PASCALContext"])
    depth = "task_dictionary={include_depth: true}"
    with pytest.raises(ConfigError, match="depth of Cityscapes is not that of NYUD: unit 'px' against 'm'"):
        load_config(ROOT / "configs" / "bim_nyud.yml", [depth, "val_db_name=Cityscapes"])
    cat, dog = (LabelSpec((), None, channels=2, classes=("sky", name)) for name in ("cat", "dog"))
    assert cat.difference(dog) == "class 1 is 'cat' against 'dog'" and not cat.difference(cat)
