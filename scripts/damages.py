"""The damages and strange forms of `damaged_files.py`: what a file of the rendered example data may become."""

import shutil
import struct
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from scipy.io import loadmat, savemat

IMAGE, SEMSEG, DEPTH = "NYUDv2/images/*.png", "NYUDv2/segmentation/*.png", "NYUDv2/depth/*.npy"
NORMALS, EDGE, SALIENCY = "*/normals*/*.png", "NYUDv2/edge/*.png", "PASCALContext/sal_distill/*.png"
VOC, PARTS, LABEL_MAP = "*/semseg/VOC12/*.png", "*/human_parts/*.mat", "*/pascal-context/trainval/*.mat"
CLASSES, ANY = f"{SEMSEG}|{VOC}", f"{IMAGE}|{SEMSEG}|{DEPTH}|{NORMALS}|{EDGE}|{SALIENCY}|*/JPEGImages/*.jpg|{PARTS}"
PICTURES = f"{IMAGE}|{CLASSES}|{NORMALS}|{EDGE}|{SALIENCY}"
LISTS = "*/gt_sets/*.txt|*/ImageSets/Context/*.txt"
Damage = Callable[[Path, np.random.Generator], object]


class Kind(NamedTuple):
    """files: patterns of the files it may befall. named: what messages must contain instead of the file's name."""

    files: str
    damage: Damage
    named: str = ""


def pixels(path: Path) -> np.ndarray:
    """As stored; of palettes the indices."""
    with Image.open(path) as image:
        return np.asarray(image)


def save(path: Path, array: np.ndarray, format: str = "PNG", **options) -> None:
    """Under this name whatever it is."""
    Image.fromarray(array).save(path, format=format, **options)


def change(path: Path, function: Callable[[np.ndarray], np.ndarray]) -> None:
    """Stores `function` of a picture's or an array's values."""
    if path.suffix == ".npy":
        np.save(path, function(np.load(path)), allow_pickle=True)
    else:
        save(path, function(pixels(path)))


def cut(path: Path, rng: np.random.Generator) -> None:
    """Only the first 5 to 95 % of the bytes."""
    content = path.read_bytes()
    path.write_bytes(content[:int(len(content) * rng.uniform(0.05, 0.95))])


def flip_bit(path: Path, rng: np.random.Generator) -> None:
    """One bit, behind the first 60 bytes."""
    content = bytearray(path.read_bytes())
    content[int(rng.integers(60, len(content) - 20))] ^= 1 << int(rng.integers(8))
    path.write_bytes(bytes(content))


def hole(path: Path, rng: np.random.Generator, value: float) -> None:
    """One pixel of a depth map gets `value`."""
    depth = np.load(path)
    depth[int(rng.integers(len(depth))), int(rng.integers(depth.shape[1]))] = value
    np.save(path, depth)


def animate(path: Path, rng: np.random.Generator) -> None:
    """A TIFF of two pictures."""
    label = Image.fromarray(pixels(path))
    label.save(path, format="TIFF", save_all=True, append_images=[label.point(lambda v: v // 2)])


def turn(path: Path, orientation: int, rotate: bool) -> None:
    """EXIF says how to turn it; with `rotate` its pixels are turned too."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    array = pixels(path)
    Image.fromarray(np.rot90(array) if rotate else array).save(path, exif=exif)


def write_png(path: Path, width: int, height: int, bits: int, colour: int, rows: bytes) -> None:
    """By hand, since Pillow writes no grey of 2 or 4 bits, and no lies."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks))


def bomb(path: Path, rng: np.random.Generator) -> None:
    """A PNG that says it has 3.6 thousand million pixels."""
    write_png(path, 60000, 60000, 8, 0, b"")


def grey_bits(path: Path, bits: int) -> None:
    """The same values as grey of fewer bits."""
    array = pixels(path)
    spread = np.unpackbits(array[..., None], axis=-1)[..., 8 - bits:].reshape(len(array), -1)
    write_png(path, array.shape[1], len(array), bits, 0, b"".join(b"\0" + np.packbits(row).tobytes() for row in spread))


def palette(path: Path, bits: int) -> None:
    """The same values as indices of random colours."""
    picture = Image.fromarray(pixels(path))
    picture.putpalette(np.random.default_rng(0).integers(0, 256, 3 * 2**bits, np.uint8).tobytes())
    picture.save(path, bits=bits)


def folder_instead(path: Path, rng: np.random.Generator) -> None:
    """A folder of the file's name."""
    path.unlink()
    path.mkdir()


def dangling(path: Path, rng: np.random.Generator) -> None:
    """A link to nothing."""
    path.unlink()
    path.symlink_to(path.with_name("nowhere"))


def other_key(path: Path, rng: np.random.Generator) -> None:
    content = {key: value for key, value in loadmat(path).items() if not key.startswith("_")}
    savemat(path, {"something": next(iter(content.values()))})


def other_struct(path: Path, rng: np.random.Generator) -> None:
    savemat(path, {"anno": {"boxes": np.zeros((3, 4))}})


def other_list(path: Path, rng: np.random.Generator) -> Path:
    return path.with_name("val.txt" if path.stem == "train" else "train.txt")


def listed_twice(path: Path, rng: np.random.Generator) -> None:
    path.write_text(path.read_text() + path.read_text().split()[0] + "\n")


def leaked_id(path: Path, rng: np.random.Generator) -> None:
    path.write_text(path.read_text() + other_list(path, rng).read_text().split()[0] + "\n")


def leaked_copy(path: Path, rng: np.random.Generator) -> None:
    """The last image of the folder, a test image, is the first."""
    images = sorted(path.parent.iterdir())
    shutil.copy(images[0], images[-1])


def unknown_id(path: Path, rng: np.random.Generator) -> None:
    path.write_text(path.read_text() + "no_such_image\n")


def lossless_jpeg(path: Path, rng: np.random.Generator) -> None:
    save(path, pixels(path), "JPEG", quality=95)


REFUSED: dict[str, Kind] = {
    "truncated": Kind(ANY, cut), "no bytes": Kind(ANY, lambda path, rng: path.write_bytes(b"")),
    "a web page under its name": Kind(ANY, lambda path, rng: path.write_text("<html>404 not found</html>")),
    "one bit flipped": Kind(PICTURES, flip_bit), "missing": Kind(ANY, lambda path, rng: path.unlink()),
    "a folder under its name": Kind(ANY, folder_instead), "a dangling link": Kind(ANY, dangling),
    "a picture of 60000 x 60000": Kind(PICTURES, bomb),
    "classes of 16 bits": Kind(CLASSES, lambda path, rng: change(path, lambda a: a.astype(np.uint16))),
    "classes as colours": Kind(CLASSES, lambda path, rng: change(path, lambda a: np.stack([a] * 3, -1))),
    "classes with alpha": Kind(CLASSES, lambda path, rng: save(path, np.stack([pixels(path)] * 2, -1))),
    "classes out of range": Kind(CLASSES, lambda path, rng: change(path, lambda a: np.where(
        np.arange(a.size).reshape(a.shape) == 7, np.uint8(rng.integers(41, 255)), a))),
    "classes as JPEG": Kind(CLASSES, lossless_jpeg), "classes as two pictures": Kind(CLASSES, animate),
    "labels of another aspect ratio": Kind(f"{CLASSES}|{EDGE}|{SALIENCY}|{NORMALS}",
                                           lambda path, rng: change(path, lambda a: a[:, :a.shape[1] * 2 // 3])),
    "labels turned by 90 degrees": Kind(f"{CLASSES}|{EDGE}|{DEPTH}",
                                        lambda path, rng: change(path, lambda a: np.ascontiguousarray(a.T))),
    "a label of one pixel": Kind(f"{CLASSES}|{EDGE}|{DEPTH}", lambda path, rng: change(path, lambda a: a[:1, :1])),
    "EXIF: turned, labels are not": Kind(IMAGE, lambda path, rng: turn(path, 6, True)),
    "EXIF: upside down": Kind(IMAGE, lambda path, rng: turn(path, 3, False)),
    "depth with NaN": Kind(DEPTH, partial(hole, value=np.nan)), "depth with infinity": Kind(DEPTH, partial(hole,
                                                                                            value=np.inf)),
    "negative depth": Kind(DEPTH, partial(hole, value=-1.0)),
    "depth in millimetres": Kind(DEPTH, lambda path, rng: change(path, lambda a: a * 1000)),
    "depth as objects": Kind(DEPTH, lambda path, rng: change(path, lambda a: a.astype(object))),
    "depth of three channels": Kind(DEPTH, lambda path, rng: change(path, lambda a: np.stack([a] * 3, -1))),
    "complex depth": Kind(DEPTH, lambda path, rng: change(path, lambda a: a.astype(complex))),
    "empty depth": Kind(DEPTH, lambda path, rng: change(path, lambda a: a[:0])),
    "normals that are a photograph": Kind(NORMALS, lambda path, rng: save(path, rng.integers(
        0, 256, pixels(path).shape, np.uint8))),
    "boundaries stored as 0 and 1": Kind(f"{EDGE}", lambda path, rng: change(path, lambda a: a // 255)),
    "saliency stored as 0 and 1": Kind(SALIENCY, lambda path, rng: change(path, lambda a: (a > 99).astype(np.uint8))),
    "boundaries inverted": Kind(EDGE, lambda path, rng: change(path, lambda a: 255 - a)),
    ".mat with another variable": Kind(f"{PARTS}|{LABEL_MAP}", other_key),
    ".mat with another structure": Kind(PARTS, other_struct),
    ".mat of version 7.3": Kind(f"{PARTS}|{LABEL_MAP}", lambda path, rng: path.write_bytes(
        b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM" + b"\x89HDF\r\n\x1a\n" * 40)),
    "an id twice in a list": Kind(LISTS, listed_twice), "an id in both lists": Kind("*/*/train.txt", leaked_id,
                                                                                    " of val is "),
    "a test image is a training image": Kind("*/images/*.png|*/JPEGImages/*.jpg", leaked_copy, " of val is "),
    "an id without an image": Kind(LISTS, unknown_id, "no_such_image"),
}


class Form(NamedTuple):
    """Another way to store the same. few: the file first gets values below this, so that they fit."""

    files: str
    rewrite: Callable[[Path], object]
    few: int = 0


HANDLED: dict[str, Form] = {
    "classes as grey of 1 bit": Form(CLASSES, partial(grey_bits, bits=1), 2),
    "classes as grey of 2 bits": Form(CLASSES, partial(grey_bits, bits=2), 4),
    "classes as grey of 4 bits": Form(CLASSES, partial(grey_bits, bits=4), 16),
    "classes as a palette of 4 bits": Form(CLASSES, partial(palette, bits=4), 16),
    "classes as a palette": Form(CLASSES, partial(palette, bits=8)),
    "a TIFF under its name": Form(PICTURES, lambda path: save(path, pixels(path), "TIFF")),
    "a BMP under its name": Form(f"{IMAGE}|{SEMSEG}|{EDGE}", lambda path: save(path, pixels(path), "BMP")),
    "an image with alpha": Form(IMAGE, lambda path: save(path, np.dstack([pixels(path), pixels(path)[..., :1]]))),
    "depth in big-endian order": Form(DEPTH, lambda path: change(path, lambda a: a.astype(">f4"))),
    "depth in double precision": Form(DEPTH, lambda path: change(path, lambda a: a.astype(float))),
    "depth in Fortran order": Form(DEPTH, lambda path: change(path, np.asfortranarray)),
    "a list with a byte-order mark": Form(LISTS, lambda path: path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())),
    "a list in UTF-16": Form(LISTS, lambda path: path.write_text(path.read_text(), encoding="utf-16")),
    "a list with Windows ends of lines": Form(LISTS, lambda path: path.write_bytes(
        path.read_bytes().replace(b"\n", b"\r\n"))),
}


def pick(root: Path, patterns: str, rng: np.random.Generator) -> Path:
    """A random file of a random one of these patterns."""
    patterns = patterns.split("|")
    files = sorted(root.glob(patterns[int(rng.integers(len(patterns)))]))
    return files[int(rng.integers(len(files)))]
