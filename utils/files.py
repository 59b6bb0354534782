"""Reading single files: pictures, depth maps, 8-bit label maps, Matlab files. Errors name the file.

Pillow decodes everything but plain PNG files (`utils.png`): unlike OpenCV it refuses truncated files, keeps palette
indices and ignores the EXIF orientation unless asked. 8-bit label maps are translated by a table of 256 values (one
pass, exact); NaN in the table marks values that must not occur.
"""

import io
import os
import warnings
import zipfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageOps

from utils.png import check_whole, decode, png_content

DEPTH_UNITS = {"m": 1.0, "cm": 0.01, "mm": 0.001}
MAX_DEPTH_M = 255.0      # 255 marks void in every label, so a measured depth must stay below it
MAX_PIXELS = 178_956_970  # of a picture; what declares more, Pillow does not open
warnings.simplefilter("ignore", Image.DecompressionBombWarning)     # of half as many; those are read


def _decode(path: Path, apply_exif: bool = False, as_stored: bool = False,
            mode: str = "") -> tuple[np.ndarray, str]:
    """Pixels of a picture (palette indices stay indices), and its Pillow mode.

    Grey of 1, 2 or 4 bits comes spread over 0..255 (1 bit: False, True); `as_stored` undoes that, for class indices.
    mode: the Pillow mode to convert to; empty: the file's own.
    """
    try:
        if (content := png_content(path)) is not None:
            if not (apply_exif or mode) and (pixels := decode(content)) is not None:
                return pixels, "RGB" if pixels.ndim == 3 else "L"
            check_whole(content)
        with Image.open(path if content is None else io.BytesIO(content)) as image:
            if as_stored and (reason := _blurs(image)):
                raise ValueError(reason)
            step = _spread(image) if as_stored else 1
            image.load()
            if apply_exif:
                ImageOps.exif_transpose(image, in_place=True)
            picture = image.convert(mode) if mode else image
            return np.asarray(picture) // step if step > 1 else np.asarray(picture), picture.mode
    except FileNotFoundError:
        raise FileNotFoundError(f"file not found: {path}") from None
    except Exception as error:      # decoders raise whatever their parsing of a damaged file comes upon
        raise ValueError(f"cannot read {path}: {_why_not(path, error)}") from error


def _why_not(path: Path, error: Exception) -> str:
    """What to tell of a picture that could not be decoded."""
    if path.suffix.lower() in (".heic", ".heif"):
        return "Pillow does not know this format of phones; save it as JPEG or PNG"
    return f"{error}; the file is damaged or not a picture"


def _blurs(image: Image.Image) -> str:
    """Why an opened picture cannot hold class indices, or nothing."""
    if image.format in ("JPEG", "MPO"):
        return "class indices stored as JPEG are not those that were saved: its compression mixes neighbours"
    frames = getattr(image, "n_frames", 1)
    return f"it holds {frames} pictures, a label is one" if frames > 1 else ""


def declared_size(path: Path) -> tuple[int, int]:
    """(height, width) that the header of a photograph declares, as stored; no pixel is decoded.

    ValueError for what is no picture, has more than MAX_PIXELS, or holds several pictures, such as an animation. A
    JPEG's further pictures (previews, the other eye's view) do not count.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            frames = 1 if image.format in ("JPEG", "MPO") else getattr(image, "n_frames", 1)
    except FileNotFoundError:
        raise FileNotFoundError(f"file not found: {path}") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{path} declares more than {MAX_PIXELS / 1e6:.0f} megapixels, the most that are read; "
                         "make it smaller") from error
    except Exception as error:      # as in `_decode`
        raise ValueError(f"cannot read {path}: {_why_not(path, error)}") from error
    if frames > 1:
        raise ValueError(f"{path} holds {frames} pictures (an animation, or pages); save the one you mean as a file of "
                         "its own, or all as a video")
    return height, width


def exif_orientation(path: Path) -> int:
    """The EXIF orientation of a picture, 1 (upright) to 8; 1 where there is none. From 5 on width and height change."""
    try:
        with Image.open(path) as image:
            turn = image.getexif().get(0x0112, 1)
    except (OSError, SyntaxError, ValueError):             # a tag block that is none
        return 1
    return turn if turn in range(1, 9) else 1


def _spread(image: Image.Image) -> int:
    """By what Pillow multiplies the stored grey values of an opened picture: 85 or 17 for 2 or 4 bits."""
    layout = image.tile[0][3] if image.mode == "L" and image.tile else ""
    name = layout if isinstance(layout, str) else next((part for part in layout or () if isinstance(part, str)), "")
    return {"L;2": 85, "L;4": 17}.get(name.removesuffix("I"), 1)


def read_rgb(path: str | Path, apply_exif: bool = True) -> np.ndarray:
    """Any picture as H x W x 3 uint8 RGB.

    Grey is repeated, palettes are looked up, alpha is dropped, 16-bit values are rounded to 8 bits.
    `apply_exif` turns photographs upright; the training loaders keep the stored pixels because labels
    belong to those.
    """
    path = Path(path)
    pixels, mode = _decode(path, apply_exif)
    if mode == "RGB":
        return pixels
    if mode.startswith("I"):                                           # 16-bit grey: "I;16", "I;16B", old "I"
        if pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError(f"{path}: grey values {pixels.min()}..{pixels.max()} exceed 0..65535")
        grey = ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2)                   # (H, W) -> (H, W, 3)
    if mode == "F":
        raise ValueError(f"{path}: floating-point pictures have no defined white; store it with 8 or 16 bits")
    return _decode(path, apply_exif, mode="RGB")[0]


def read_depth(path: str | Path, unit: str) -> np.ndarray:
    """Depth map as H x W x 1 float32 in metres, 0 = no value.

    `unit` ("m", "cm" or "mm") is that of the stored numbers: `.npy` arrays H x W (or H x W x 1) of any real
    type, or single-channel pictures of 8 or 16 bits.
    """
    path = Path(path)
    if unit not in DEPTH_UNITS:
        raise ValueError(f"unknown depth unit {unit!r}; valid: {', '.join(DEPTH_UNITS)}")
    depth = _read_npy(path) if path.suffix == ".npy" else _decode(path)[0]
    if depth.ndim == 2:
        depth = depth[..., None]                                       # (H, W) -> (H, W, 1)
    if depth.ndim != 3 or depth.shape[2] != 1 or depth.size == 0:
        raise ValueError(f"{path}: a depth map has one channel (H x W), this array has shape {depth.shape}")
    if depth.dtype.kind not in "fiu":
        raise ValueError(f"{path}: depth values must be real numbers, this array holds {depth.dtype}")
    depth = depth.astype(np.float32, copy=False)
    if unit != "m":
        depth = depth * np.float32(DEPTH_UNITS[unit])
    low, high = depth.min(), depth.max()                               # NaN fails both comparisons below
    if not (low >= 0 and high < MAX_DEPTH_M):
        raise ValueError(f"{path}: depth {low:g}..{high:g} m is outside [0, {MAX_DEPTH_M:g}); "
                         f"0 marks a missing value, and the file was read in the unit {unit!r}")
    return depth


def _read_npy(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise FileNotFoundError(f"file not found: {path}") from None
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"cannot read {path}: {error}; damaged, or not a plain numpy array") from error


def _read_npz(path: Path, variable: str) -> np.ndarray:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            name = variable or (arrays.files[0] if len(arrays.files) == 1 else "")
            if name not in arrays.files:
                raise ValueError(f"it holds {', '.join(arrays.files)}; say which one (variable: ...)")
            return arrays[name]
    except FileNotFoundError:
        raise FileNotFoundError(f"file not found: {path}") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"cannot read {path}: {error}") from error


def read_uint8(path: Path, channels: int) -> np.ndarray:
    """8-bit map, H x W (one channel: grey or palette indices) or H x W x 3; 1 bit is 0 or 255."""
    pixels, mode = _decode(path)
    return _as_uint8(path, pixels.astype(np.uint8) * 255 if mode == "1" else pixels, mode, channels)


def read_indices(path: Path) -> np.ndarray:
    """Map of class indices, H x W uint8: the stored numbers, of grey or palette files of 1, 2, 4 or 8 bits."""
    pixels, mode = _decode(path, as_stored=True)
    return _as_uint8(path, pixels.astype(np.uint8) if mode == "1" else pixels, mode, 1)


def _as_uint8(path: Path, pixels: np.ndarray, mode: str, channels: int) -> np.ndarray:
    found = 1 if pixels.ndim == 2 else pixels.shape[2]
    if pixels.dtype != np.uint8 or found != channels:
        raise ValueError(f"{path}: expected {channels} channel(s) of 8 bits, "
                         f"found {found} of {pixels.dtype} (mode {mode})")
    return pixels


def read_uint16(path: Path) -> np.ndarray:
    """Single-channel 16-bit picture, H x W uint16."""
    pixels, mode = _decode(path)
    if not mode.startswith("I") or pixels.ndim != 2:
        raise ValueError(f"{path}: expected one channel of 16 bits, found mode {mode}, shape {pixels.shape}")
    return pixels.astype(np.uint16)


def read_values(path: Path, variable: str = "", as_stored: bool = False) -> np.ndarray:
    """What any file of a map holds, H x W or H x W x C of any type: a picture, or numbers.

    Pictures that Pillow reads, .exr, .hdr and .pic through OpenCV (colours as RGB), .npy, the array `variable` of .npz
    and .mat (the only one of an .npz needs no name). `as_stored` is for class indices (see `_decode`).
    """
    ending = path.suffix.lower()
    if ending == ".npy":
        return _read_npy(path)
    if ending == ".npz":
        return _read_npz(path, variable)
    if ending == ".mat":
        if not variable:
            raise ValueError(f"{path}: say which variable of the Matlab file holds the map (variable: ...)")
        return np.asarray(read_mat(path, variable))
    if ending in (".exr", ".hdr", ".pic"):
        os.environ.setdefault("OPENCV_IO_ENABLE_OPENEXR", "1")
        pixels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED) if path.is_file() else None
        if pixels is None:
            raise ValueError(f"cannot read {path}: it is missing, damaged, or this OpenCV was built without {ending}")
        return pixels[..., ::-1] if pixels.ndim == 3 else pixels       # BGR -> RGB
    return _decode(path, as_stored=as_stored)[0]


def check_orientation(path: Path) -> None:
    """ValueError for a photograph that asks to be turned before it is shown."""
    if (turn := exif_orientation(path)) != 1:
        raise ValueError(f"{path} carries EXIF orientation {turn}: say whether its labels belong to the stored pixels "
                         "(exif: stored) or to the upright picture (exif: upright)")


def read_table(path: Path, table: np.ndarray, channels: int = 1) -> np.ndarray:
    """8-bit map with every value v replaced by `table[v]`: H x W x channels float32.

    A map of one channel that holds 0 and 1 only was not stored as 0..255: a ValueError.
    """
    pixels = read_uint8(path, channels)
    if channels == 1 and pixels.max() == 1 and pixels.mean() > 0.01:
        raise ValueError(f"{path}: its values are 0 and 1, where 255 stands for 1; multiply them by 255")
    values = cv2.LUT(pixels, table)
    return values if channels > 1 else values[..., None]               # (H, W) -> (H, W, 1)


def read_classes(path: Path, table: np.ndarray) -> np.ndarray:
    """Map of class indices with every value v replaced by `table[v]`: H x W x 1 float32.

    A value whose table entry is NaN is a ValueError that lists the values found and the valid ones.
    """
    pixels = read_indices(path)
    label = cv2.LUT(pixels, table)
    invalid = np.isnan(table)
    if invalid.any() and np.isnan(label).any():
        raise ValueError(f"{path}: label value(s) {ranges(np.unique(pixels[np.isnan(label)]))} out of range; "
                         f"valid: {ranges(np.flatnonzero(~invalid))}")
    return label[..., None]                                            # (H, W) -> (H, W, 1)


def class_table(valid: dict[int, int], other: float = np.nan) -> np.ndarray:
    """Table for `read_classes`: file value -> class index; values that are not listed become `other`."""
    table = np.full(256, other, np.float32)
    for value, index in valid.items():
        table[value] = index
    return table


def read_mat(path: Path, variable: str) -> Any:
    """One variable of a Matlab file, structs as objects with attributes, 1 x 1 arrays unpacked."""
    from scipy.io import loadmat  # slow to import, and few data sets have such files
    from scipy.io.matlab import MatReadError
    try:
        content = loadmat(str(path), squeeze_me=True, struct_as_record=False, variable_names=[variable])
    except FileNotFoundError:
        raise FileNotFoundError(f"file not found: {path}") from None
    except (OSError, ValueError, TypeError, MatReadError, NotImplementedError) as error:
        raise ValueError(f"cannot read {path}: {error}; damaged, or not a Matlab v5 file") from error
    if variable not in content:
        raise ValueError(f"{path} has no variable {variable!r}")
    return content[variable]


def ranges(values: np.ndarray) -> str:
    """In words: '0..20, 255' for [0, 1, ..., 20, 255]."""
    runs = np.split(values, np.flatnonzero(np.diff(values) != 1) + 1)
    return ", ".join(f"{run[0]}..{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
