"""What label files of one's own data may hold, and how each kind is read: H x W x C float32, void as in `data.labels`.

Pictures of every kind that Pillow or OpenCV reads, NumPy arrays and Matlab variables (`utils.files.read_values`). A
file that holds something else than its data set says is refused by name, with what was found and what would be right.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np

from data.labels import VOID
from evaluation.boundary.thinning import thin
from utils.files import MAX_DEPTH_M, check_orientation, ranges, read_rgb, read_values


@dataclass(frozen=True)
class ImageFile:
    """A photograph, H x W x 3 uint8. exif: what a camera's note to turn the picture means for it; `refuse` asks."""

    exif: str = "refuse"

    def __call__(self, path: Path) -> np.ndarray:
        if self.exif == "refuse":
            check_orientation(path)
        return read_rgb(path, apply_exif=self.exif == "upright")


@dataclass(frozen=True)
class ClassFile:
    """Class indices. values: file value -> class or VOID; others are void where `other_is_void`, else refused."""

    values: Mapping[int, int]
    other_is_void: bool = False
    variable: str = ""

    def __call__(self, path: Path) -> np.ndarray:
        return self.translate(path, _integers(path, self.variable))

    def translate(self, path: Path, stored: np.ndarray) -> np.ndarray:
        """H x W integers -> H x W x 1 float32."""
        if stored.dtype in (np.uint8, np.uint16):
            table = _class_table(tuple(self.values.items()), VOID if self.other_is_void else np.nan)
            classes = _look_up(stored, table)
            if self.other_is_void or not np.isnan(classes.min()):
                return classes
        found, where = np.unique(stored, return_inverse=True)
        known = np.array([int(value) in self.values for value in found])
        if not known.all() and not self.other_is_void:
            raise ValueError(f"{path}: label value(s) {ranges(found[~known])} out of range; valid: "
                             f"{ranges(np.array(sorted(self.values)))}")
        classes = np.array([self.values.get(int(value), VOID) for value in found], np.float32)
        return classes[where].reshape(*stored.shape, 1)                # (H, W) -> (H, W, 1)


@dataclass(frozen=True)
class ColourFile(ClassFile):
    """Classes as colours: `values` has the colour's number, 65536 R + 256 G + B."""

    def __call__(self, path: Path) -> np.ndarray:
        rgb = read_rgb(path, apply_exif=False).astype(np.int64)
        stored = (rgb[..., 0] << 16) | (rgb[..., 1] << 8) | rgb[..., 2]
        found = np.unique(stored)
        unknown = [number for number in found.tolist() if number not in self.values]
        if unknown and not self.other_is_void:
            shown = ", ".join(str([n >> 16, n >> 8 & 255, n & 255]) for n in unknown[:5])
            raise ValueError(f"{path}: {len(unknown)} colour(s) belong to no class, among them {shown} (is the picture "
                             "a JPEG, or are its edges smoothed?)")
        return self.translate(path, stored)


@dataclass(frozen=True)
class DepthFile:
    """(stored + offset) * scale, in metres or, for disparities, in pixels; 0 where void or not strictly in `valid`.

    void: stored values without a depth; what is not finite is one of them where `nan_is_void`.
    """

    scale: float = 1.0
    offset: float = 0.0
    void: tuple[float, ...] = (0.0,)
    nan_is_void: bool = False
    valid: tuple[float, float] | None = None
    variable: str = ""

    def __call__(self, path: Path) -> np.ndarray:
        stored = _one_channel(path, read_values(path, self.variable))
        if stored.dtype.kind not in "fiu":
            raise ValueError(f"{path}: depth values must be real numbers, this file holds {stored.dtype}")
        small = stored.dtype in (np.uint8, np.uint16)
        depth = _look_up(stored, _depth_table(self))[..., 0] if small else self.convert(stored.astype(np.float64))
        low, high = depth.min(), depth.max()                           # NaN fails both comparisons below
        if not (low >= 0 and high < MAX_DEPTH_M):
            raise ValueError(f"{path}: values {low:g}..{high:g} after the unit's scale are outside "
                             f"[0, {MAX_DEPTH_M:g}); say which stored values are void (void, nan), which range is "
                             "valid, or another unit")
        return depth[..., None]                                        # (H, W) -> (H, W, 1)

    def convert(self, values: np.ndarray) -> np.ndarray:
        """Float64 numbers as stored -> float32."""
        missing = np.isin(values, self.void)
        if self.nan_is_void:
            missing |= ~np.isfinite(values)
        depth = np.where(missing, 0, (values + self.offset) * self.scale).astype(np.float32)
        if self.valid is not None:
            depth[(depth <= self.valid[0]) | (depth >= self.valid[1])] = 0          # NaN stays
        return depth


@dataclass(frozen=True)
class NormalsFile:
    """Unit vectors (x to the right); the zero vector where there is none.

    encoding: "rgb", 8-bit components 2 v / 255 - 1, or "vectors", numbers. axes: which stored component, with which
    sign, is x, y and z: (1, 2, 3) as stored, (1, -2, -3) with y and z turned round. void: the stored colour that stands
    for none.
    """

    encoding: str = "rgb"
    axes: tuple[int, int, int] = (1, 2, 3)
    void: tuple[int, int, int] | None = None
    variable: str = ""

    def __call__(self, path: Path) -> np.ndarray:
        stored = read_values(path, self.variable)
        if stored.ndim != 3 or stored.shape[2] != 3:
            raise ValueError(f"{path}: normals have three channels, found an array of {stored.shape}")
        if self.encoding == "rgb":
            if stored.dtype != np.uint8:
                raise ValueError(f"{path}: encoding rgb means 8-bit colours, found {stored.dtype}; encoding: vectors?")
            vectors = (2 * np.arange(256, dtype=np.float32) / 255 - 1)[stored]
            missing = None if self.void is None else (stored == np.array(self.void)).all(axis=-1)
        else:
            vectors = stored.astype(np.float32)
            missing = ~np.isfinite(vectors).all(axis=-1)
        if missing is not None:
            vectors[missing] = 0
        self._check_lengths(path, vectors)
        order = [abs(axis) - 1 for axis in self.axes]
        return vectors[..., order] * np.sign(self.axes).astype(np.float32)

    def _check_lengths(self, path: Path, vectors: np.ndarray) -> None:
        length = np.linalg.norm(vectors, axis=-1)
        length = length[length > 0]
        if length.size and not 0.9 < (middle := float(np.median(length))) < 1.1:
            raise ValueError(f"{path}: under encoding {self.encoding} the normals have a median length of "
                             f"{middle:.3g}, not 1")


@dataclass(frozen=True)
class MaskFile:
    """Stored value / full, in 0..1; with a threshold 1 above it, else 0. full: what means 1. void: a stored value."""

    full: float | None = None
    threshold: float | None = None
    void: float | None = None
    variable: str = ""

    def __call__(self, path: Path) -> np.ndarray:
        stored = _one_channel(path, read_values(path, self.variable, as_stored=self.full is not None))
        missing = np.zeros(stored.shape, bool) if self.void is None else stored == self.void
        full = self.full or {"b": 1, "f": 1, "u": 255 if stored.dtype.itemsize == 1 else 65535}.get(stored.dtype.kind)
        if full is None:
            raise ValueError(f"{path} holds {stored.dtype}: say which value means 1 (full: ...)")
        known = stored[~missing]
        if known.size and (known.min() < 0 or known.max() > full):
            raise ValueError(f"{path}: values {known.min():g}..{known.max():g} are outside 0..{full:g}, the value that "
                             "means 1; say another one (full: ...), or which value is void")
        if self.full is None and full > 1 and known.size and 0 < known.max() <= 1:
            raise ValueError(f"{path} holds no value but 0 and 1, and {full:g} means 1 by default; if it is 1 here, "
                             "say full: 1")
        share = stored.astype(np.float32) / np.float32(full)
        if self.threshold is not None:
            share = (share > self.threshold).astype(np.float32)
        return np.where(missing, np.float32(VOID), share)[..., None]   # (H, W) -> (H, W, 1)


@dataclass(frozen=True)
class RegionsFile:
    """Boundaries of a map of regions: where its Laplacian is not zero, thinned to one pixel; 0 or 1."""

    variable: str = ""

    def __call__(self, path: Path) -> np.ndarray:
        laplacian = cv2.Laplacian(_integers(path, self.variable).astype(np.float64), cv2.CV_64F)
        return thin(laplacian != 0).astype(np.float32)[..., None]


@dataclass(frozen=True)
class AnnotatorsFile:
    """Boundaries that several people drew, bit k of a pixel the k-th of them: 1 where at least the share `agree` of the
    people drew one, 0 where nobody did, void between. The highest bit of a file tells how many people there were.

    As for networks on BSDS since Liu et al., "Richer Convolutional Features for Edge Detection", CVPR 2017.
    """

    agree: float
    variable: str = ""

    def __call__(self, path: Path) -> np.ndarray:
        drawn = self.each(path)
        share = drawn.mean(axis=0, dtype=np.float32)
        label = np.where(share >= np.float32(self.agree), np.float32(1), np.float32(VOID))
        return np.where(share == 0, np.float32(0), label)[..., None]   # (H, W) -> (H, W, 1)

    def each(self, path: Path) -> np.ndarray:
        """What every one of them drew, G x H x W uint8; one empty map where nobody drew anything."""
        bits = _integers(path, self.variable)
        if bits.min() < 0:
            raise ValueError(f"{path}: bits of annotators are a whole number of at least 0, found {bits.min()}")
        people = max(1, int(bits.max()).bit_length())
        return np.stack([(bits >> person & 1).astype(np.uint8) for person in range(people)])


@dataclass(frozen=True)
class TruthFile:
    """Ground truth of the boundary score: as `read` sees boundaries, or the regions of a file, H x W integers; or what
    each annotator drew, G x H x W."""

    read: MaskFile | AnnotatorsFile | None = None
    variable: str = ""

    def __call__(self, path: Path) -> np.ndarray:
        if self.read is None:
            return _integers(path, self.variable)
        if isinstance(self.read, AnnotatorsFile):
            return self.read.each(path)
        return (self.read(path)[..., 0] == 1).astype(np.uint8)


@lru_cache(maxsize=32)
def _class_table(values: tuple[tuple[int, int], ...], other: float) -> np.ndarray:
    """The class of each number of 16 bits, `other` where it has none."""
    table = np.full(65536, other, np.float32)
    for value, index in values:
        if 0 <= value < len(table):
            table[value] = index
    return table


@lru_cache(maxsize=32)
def _depth_table(read: DepthFile) -> np.ndarray:
    """The depth of each number of 16 bits."""
    return read.convert(np.arange(65536, dtype=np.float64))


def _look_up(stored: np.ndarray, table: np.ndarray) -> np.ndarray:
    """table[stored] of 8 or 16 bits, H x W -> H x W x 1."""
    found = cv2.LUT(stored, table[:256]) if stored.dtype == np.uint8 else table[stored]
    return found[..., None]


def _integers(path: Path, variable: str) -> np.ndarray:
    """H x W whole numbers as stored, of any type."""
    stored = _one_channel(path, read_values(path, variable, as_stored=True))
    if stored.dtype.kind == "b":
        return stored.astype(np.uint8)
    if stored.dtype.kind == "f" and np.isfinite(stored).all() and (stored == np.round(stored)).all():
        return stored.astype(np.int64)
    if stored.dtype.kind not in "iu":
        raise ValueError(f"{path}: a map of classes or regions holds whole numbers, this one {stored.dtype}")
    return stored


def _one_channel(path: Path, stored: np.ndarray) -> np.ndarray:
    """(H, W) of an array H x W or H x W x 1."""
    if stored.ndim == 3 and stored.shape[2] == 1:
        stored = stored[..., 0]
    if stored.ndim != 2 or stored.size == 0:
        raise ValueError(f"{path}: expected one channel (H x W), found an array of {stored.shape}"
                         + (" (colours: is it meant to be looked at?)" if stored.ndim == 3 else ""))
    return stored
