"""NYUD-v2 (Silberman et al., ECCV 2012): 795 + 654 indoor frames of 425 x 560 pixels, four tasks.

Layout below `NYUDv2/`: images, segmentation, normals and edge as PNG, depth as .npy in metres, ids in
gt_sets/.
"""

from collections.abc import Mapping
from functools import partial
from typing import ClassVar

import numpy as np

from data.base import DatasetSpec, MultiTaskDataset, Source, read_image
from evaluation.boundary.settings import BoundaryTruth
from utils.files import class_table, read_depth, read_table, read_uint8

CLASS_NAMES = (
    "wall", "floor", "cabinet", "bed", "chair", "sofa", "table", "door", "window", "bookshelf", "picture",
    "counter", "blinds", "desk", "shelves", "curtain", "dresser", "pillow", "mirror", "floor mat",
    "clothes", "ceiling", "books", "refridgerator", "television", "paper", "towel", "shower curtain", "box",
    "whiteboard", "person", "night stand", "toilet", "sink", "lamp", "bathtub", "bag", "otherstructure",
    "otherfurniture", "otherprop",
)

# Files hold 0 = unlabelled, 1..40 = classes; labels are 0..39 and 255 = void.
SEMSEG_TABLE = class_table({0: 255} | {c + 1: c for c in range(40)})
UNIT_TABLE = np.arange(256, dtype=np.float32) / 255                   # 0..255 -> 0..1
NORMALS_TABLE = 2 * np.arange(256, dtype=np.float32) / 255 - 1     # 0..255 -> -1..1, never 0: nothing is void


class NYUD(MultiTaskDataset):
    """NYUD-v2 with semantic segmentation, depth (metres, 0 = missing), normals and boundaries."""

    spec = DatasetSpec(
        name="NYUD",
        folder="NYUDv2",
        tasks={"semseg": 40, "depth": 1, "normals": 3, "edge": 1},
        image_size=(448, 576),
        class_names={"semseg": CLASS_NAMES},
        boundary=BoundaryTruth(("edge/{id}.png",), partial(read_uint8, channels=1), kind="nyud", max_dist=0.011),
        split_file="gt_sets/{split}.txt",
    )
    sources: ClassVar[Mapping[str, Source]] = {
        "image": Source(("images/{id}.png",), read_image),
        "semseg": Source(("segmentation/{id}.png",), partial(read_table, table=SEMSEG_TABLE)),
        "depth": Source(("depth/{id}.npy",), partial(read_depth, unit="m")),
        "normals": Source(("normals/{id}.png",), partial(read_table, table=NORMALS_TABLE, channels=3)),
        "edge": Source(("edge/{id}.png",), partial(read_table, table=UNIT_TABLE)),
    }
