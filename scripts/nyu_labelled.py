"""NYU-v2 from the container of its authors, `nyu_depth_v2_labeled.mat`: images, depth, 40 classes, normals, boundaries.

The frames are cropped to the 425 x 560 pixels in which the depth was measured. Normals and boundaries are computed here
and are not those of the archive that published results were trained on:
normals: 1/depth is linear in the pixel's position on a plane; its slopes are fitted by least squares over 11 x 11
pixels after a bilateral filter (which keeps jumps), and give the plane's normal exactly, see `normals_of`.
boundaries: where class or instance changes, thinned to one pixel.
"""

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image
from scipy.io import loadmat
from tqdm import tqdm

from evaluation.boundary.thinning import thin

CROP = np.s_[45:470, 40:600]                   # of 480 x 640
FOCAL, CENTRE = (518.86, 519.47), (325.58 - 40, 253.74 - 45)      # pixels (x, y), of the colour camera; after the crop
RADIUS = 5
CONTAINER, SPLITS, CLASSES = "nyu_depth_v2_labeled.mat", "splits.mat", "classMapping40.mat"


def write_frames(files: Sequence[Path], folder: Path) -> tuple[int, int]:
    """All frames of the container among `files`, and the split lists; those that are there stay: (new, kept) files.

    Nothing happens without the container. Raises FileNotFoundError where one of the other two files is missing.
    """
    named = {path.name: path for path in files}
    if CONTAINER not in named:
        return 0, 0
    if missing := [name for name in (SPLITS, CLASSES) if name not in named]:
        raise FileNotFoundError(f"{' and '.join(missing)} must lie beside {CONTAINER}; --list says where from")
    try:
        import h5py  # here: nothing else needs it
    except ImportError as error:
        raise ValueError(f"{CONTAINER} is an HDF5 file: install its reader with `pip install h5py`") from error
    mapping = np.concatenate([[0], loadmat(named[CLASSES])["mapClass"].ravel()]).astype(np.uint8)    # 894 -> 1..40
    splits, new = loadmat(named[SPLITS]), 0
    with h5py.File(named[CONTAINER]) as container:
        number = len(container["images"])
        for split, key in (("train", "trainNdxs"), ("val", "testNdxs")):
            ids = "".join(f"{int(i):04d}\n" for i in sorted(splits[key].ravel()) if i <= number)
            new += once(folder / "gt_sets" / f"{split}.txt", lambda path, ids=ids: path.write_text(ids))
        for i in tqdm(range(number), unit="frame", disable=None):
            frame = {key: np.asarray(container[key][i]) for key in ("images", "depths", "labels", "instances")}
            new += _write_frame(folder, f"{i + 1:04d}", frame, mapping)
    return new, 2 + 5 * number - new


def _write_frame(folder: Path, name: str, frame: dict[str, np.ndarray], mapping: np.ndarray) -> int:
    """How many of the five files are new. Matlab's axes are reversed: (3, W, H) and (W, H)."""
    depth = np.ascontiguousarray(frame["depths"].T[CROP], np.float32)
    labels, instances = frame["labels"].T[CROP], frame["instances"].T[CROP]
    classes = mapping[labels]
    regions = classes.astype(np.int64) * 256 + instances
    contents: dict[str, Callable[[], Any]] = {
        "images": lambda: np.ascontiguousarray(frame["images"].transpose(2, 1, 0)[CROP]),
        "segmentation": lambda: classes,
        "normals": lambda: np.rint((normals_of(depth) + 1) * 127.5).astype(np.uint8),
        "edge": lambda: boundaries_of(regions).astype(np.uint8) * 255,
    }
    new = [once(folder / key / f"{name}.png", lambda path, make=make: Image.fromarray(make()).save(path, format="PNG"))
           for key, make in contents.items()]
    return sum(new) + once(folder / "depth" / f"{name}.npy", lambda path: _save_array(path, depth))


def _save_array(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as file:                  # of a name, NumPy would make another one
        np.save(file, array)


def normals_of(depth_m: np.ndarray) -> np.ndarray:
    """Unit normals (H, W, 3) of a depth map (H, W) in metres: x right, y up, z towards the camera.

    On the plane n . P = d a pixel (u, v) has P = z ((u - cx) / fx, (v - cy) / fy, 1), so that q = 1 / z has the slopes
    n_x / (d fx) and n_y / (d fy), and q itself makes up the rest.
    """
    height, width = depth_m.shape
    inverse = 1 / np.maximum(depth_m.astype(np.float32), 0.1)
    smooth = cv2.bilateralFilter(inverse, 9, 0.02, 3)
    offsets = np.arange(-RADIUS, RADIUS + 1, dtype=np.float32)
    slope, level = offsets / (offsets**2).sum(), np.full(len(offsets), 1 / len(offsets), np.float32)
    along_x = cv2.sepFilter2D(smooth, cv2.CV_32F, slope, level, borderType=cv2.BORDER_REFLECT_101)
    along_y = cv2.sepFilter2D(smooth, cv2.CV_32F, level, slope, borderType=cv2.BORDER_REFLECT_101)
    v, u = np.indices((height, width), dtype=np.float32)
    rest = smooth - along_x * (u - CENTRE[0]) - along_y * (v - CENTRE[1])
    towards = np.stack([-FOCAL[0] * along_x, FOCAL[1] * along_y, rest], axis=-1)      # y up, z towards the camera
    return towards / np.linalg.norm(towards, axis=-1, keepdims=True)


def boundaries_of(regions: np.ndarray) -> np.ndarray:
    """Where a map of regions (H, W) changes, thinned; bool."""
    edge = np.zeros(regions.shape, bool)
    edge[:, 1:] |= regions[:, 1:] != regions[:, :-1]
    edge[1:] |= regions[1:] != regions[:-1]
    return thin(edge)


def once(path: Path, write: Callable[[Path], object]) -> bool:
    """Calls `write(temporary path)` and puts the file in its place, whole or not at all; False where it is there."""
    if path.exists():
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    os.close(handle)
    try:
        write(Path(name))
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return True
