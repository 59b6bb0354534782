"""NYUD-v2 (Silberman et al., ECCV 2012): 795 + 654 indoor frames of 425 x 560 pixels, four tasks.

Layout below `NYUDv2/`: images, segmentation, normals and edge as PNG, depth as .npy in metres, ids in
gt_sets/.
"""

from functools import partial

import numpy as np

from data.spec import DatasetSpec, LabelSpec, Source, read_image
from data.splits import listed
from evaluation.boundary.settings import BoundaryTruth
from utils.files import class_table, read_classes, read_depth, read_table, read_uint8

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


TRUTH = BoundaryTruth(("edge/{id}.png",), partial(read_uint8, channels=1), kind="nyud", max_dist=0.011)

NYUD = DatasetSpec(
    name="NYUD",
    folder="NYUDv2",
    image=Source(("images/{id}.png",), read_image),
    labels={
        "semseg": LabelSpec(("segmentation/{id}.png",), partial(read_classes, table=SEMSEG_TABLE), channels=40,
                            classes=CLASS_NAMES),
        "depth": LabelSpec(("depth/{id}.npy",), partial(read_depth, unit="m"), unit="m"),
        "normals": LabelSpec(("normals/{id}.png",), partial(read_table, table=NORMALS_TABLE, channels=3), channels=3),
        "edge": LabelSpec(("edge/{id}.png",), partial(read_table, table=UNIT_TABLE), boundary=TRUTH),
    },
    splits=listed("gt_sets/{split}.txt"),
    image_size=(448, 576),
)
