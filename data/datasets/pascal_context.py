"""PASCAL-Context (Mottaghi et al., CVPR 2014; parts: Chen et al., CVPR 2014): 4998 + 5105 photos, five tasks.

Layout below `PASCALContext/`: JPEGImages, semseg/VOC12 (or, where that has no file, semseg/pascal-context),
human_parts/*.mat, pascal-context/trainval/*.mat (459 classes), normals_distill, sal_distill,
ImageSets/Context. Saliency and normals are distilled from networks; boundaries come from the 459-class map.
Nothing is written into the data folder.
"""

from functools import partial
from pathlib import Path

import cv2
import numpy as np

from data.spec import DatasetSpec, LabelSpec, Source, read_image
from data.splits import listed
from evaluation.boundary.settings import BoundaryTruth
from evaluation.boundary.thinning import thin
from utils.files import class_table, read_classes, read_mat, read_table

CLASS_NAMES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)
PART_NAMES = ("background", "head", "torso", "upper arm", "lower arm", "upper leg", "lower leg")
PERSON = CLASS_NAMES.index("person")

PART_IDS = {part: index for index, parts in enumerate((
    "hair head lear rear lebrow rebrow leye reye mouth nose", "neck torso", "luarm ruarm",
    "llarm rlarm lhand rhand", "luleg ruleg", "llleg rlleg lfoot rfoot"), start=1) for part in parts.split()}

# PASCAL-Context ids of the classes that NYUD also names (and tvmonitor): the network behind the normals
# was trained indoors, so only these have trustworthy normals.
NORMALS_IDS = (
    3, 4, 6, 9, 10, 11, 13, 15, 17, 18, 22, 23, 29, 30, 33, 34, 36, 37, 38, 39, 41, 43, 46, 49, 50, 51, 53,
    55, 56, 59, 61, 62, 65, 66, 68, 69, 72, 73, 78, 83, 84, 85, 87, 88, 95, 96, 101, 104, 105, 107, 111,
    113, 115, 122, 124, 135, 141, 142, 143, 146, 150, 154, 157, 158, 159, 165, 172, 174, 181, 183, 184, 191,
    193, 195, 197, 199, 202, 213, 215, 216, 219, 220, 223, 225, 228, 230, 232, 233, 238, 239, 242, 243, 246,
    250, 251, 252, 255, 260, 261, 263, 269, 272, 273, 275, 281, 283, 284, 285, 286, 287, 288, 290, 291, 292,
    293, 295, 304, 307, 309, 310, 314, 315, 319, 323, 329, 330, 331, 336, 342, 345, 349, 350, 351, 352, 355,
    357, 368, 370, 371, 374, 379, 380, 383, 384, 397, 401, 403, 405, 407, 408, 411, 412, 413, 414, 417, 419,
    421, 423, 427, 429, 430, 432, 440, 441, 442, 443, 444, 446, 454, 457,
)
HAS_NORMALS = np.isin(np.arange(65536), NORMALS_IDS)

SEMSEG_TABLE = class_table({255: 255} | {c: c for c in range(21)})
SALIENCY_TABLE = (np.arange(256) >= 128).astype(np.float32)           # v / 255 > 0.5
NORMALS_TABLE = 2 * np.arange(256, dtype=np.float32) / 255 - 1


def read_label_map(path: Path) -> np.ndarray:
    """The 459-class map, H x W uint16."""
    label = np.asarray(read_mat(path, "LabelMap"))
    if label.ndim != 2:
        raise ValueError(f"{path}: LabelMap should be H x W, it has shape {label.shape}")
    return label.astype(np.uint16)


def read_edge(path: Path) -> np.ndarray:
    """Training boundaries: where the Laplacian of the label map is not zero, thinned; H x W x 1, 0 or 1."""
    laplacian = cv2.Laplacian(read_label_map(path).astype(np.float64), cv2.CV_64F)
    return thin(laplacian != 0).astype(np.float32)[..., None]          # (H, W) -> (H, W, 1)


def read_normals(path: Path, label_path: Path) -> np.ndarray:
    """Distilled normals, H x W x 3 in -1..1; the zero vector where the label map's class has none."""
    normals = read_table(path, NORMALS_TABLE, channels=3)
    label = read_label_map(label_path)
    if label.shape != normals.shape[:2]:
        raise ValueError(f"{path} has (H, W) = {normals.shape[:2]}, its mask {label_path} {label.shape}")
    return normals * HAS_NORMALS[label][..., None]


def _people(path: Path) -> tuple[list, tuple[int, int]]:
    """Person objects of a PASCAL-Part file in file order, and the (H, W) of its masks ((1, 1) if none)."""
    objects = np.atleast_1d(read_mat(path, "anno").objects)
    size = objects[0].mask.shape if len(objects) else (1, 1)
    return [o for o in objects if o.class_ind == PERSON], size


def has_people(path: Path) -> bool:
    """Whether any person of a PASCAL-Part file has a mask that is not empty."""
    return any(np.any(person.mask) for person in _people(path)[0])


def read_human_parts(path: Path) -> np.ndarray:
    """Six body parts and background, H x W x 1; all zero (then of any size) without people."""
    people, size = _people(path)
    label = np.zeros((*size, 1), np.float32)
    if not any(np.any(person.mask) for person in people):
        return label
    for person in people:
        for part in np.atleast_1d(person.parts):                       # later parts overwrite earlier ones
            if part.part_name not in PART_IDS:
                raise ValueError(f"{path}: unknown part {part.part_name!r}; known: {', '.join(PART_IDS)}")
            label[part.mask.astype(bool)] = PART_IDS[part.part_name]
    return label


LABEL_MAP = "pascal-context/trainval/{id}.mat"
TRUTH = BoundaryTruth((LABEL_MAP,), read_label_map, kind="regions", max_dist=0.0075,
                      published_list="ImageSets/Context/test_new.txt")

PASCALContext = DatasetSpec(
    name="PASCALContext",
    folder="PASCALContext",
    image=Source(("JPEGImages/{id}.jpg",), read_image),
    labels={
        "semseg": LabelSpec(("semseg/VOC12/{id}.png|semseg/pascal-context/{id}.png",),
                            partial(read_classes, table=SEMSEG_TABLE), channels=21, classes=CLASS_NAMES),
        "human_parts": LabelSpec(("human_parts/{id}.mat",), read_human_parts, channels=7, classes=PART_NAMES,
                                 informs=has_people),
        "sal": LabelSpec(("sal_distill/{id}.png",), partial(read_table, table=SALIENCY_TABLE), channels=2),
        "normals": LabelSpec(("normals_distill/{id}.png", LABEL_MAP), read_normals, channels=3),
        "edge": LabelSpec((LABEL_MAP,), read_edge, boundary=TRUTH),
    },
    splits=listed("ImageSets/Context/{split}.txt"),
    image_size=(512, 512),
)
