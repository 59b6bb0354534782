"""Cityscapes (Cordts et al., CVPR 2016): 2975 + 500 street scenes of 1024 x 2048 pixels, two tasks, and in 3 D three.

Layout below `cityscapes/`: leftImg8bit, gtFine and disparity of the official packages, and gtBbox3d of Cityscapes 3D
(Gaehlert et al., arXiv 2006.07864). The network sees the image at half size, labels keep full size (in 3 D: full size,
and half), and there is no augmentation (`transforms.fixed_transform`).
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from data.boxes_file import VEHICLES, has_boxes, read_boxes
from data.boxes_label import Boxes3DLabel
from data.labels import DisparityLabel, MapLabel
from data.spec import DatasetSpec, LabelSpec, Source, read_image
from data.splits import SplitGlob
from utils.files import class_table, read_classes, read_indices, read_uint16

CLASS_NAMES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation",
    "terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)
COLOURS = (  # of the 19 classes, as the data set's authors draw them
    (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153), (250, 170, 30),
    (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60), (255, 0, 0), (0, 0, 142),
    (0, 0, 70), (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32))
TRAIN_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
# The published loader means the sky, train id 10, but compares *file* ids, where 10 is rail track and 23
# the sky. Kept, because published scores rest on it (pixels with disparity 0 are trained on, but not scored).
ZERO_DISPARITY_ID = 10
SEMSEG_TABLE = class_table({file_id: index for index, file_id in enumerate(TRAIN_IDS)}, other=255)
VOID_DISPARITY = 255.0                                                 # real disparities stay below 128


def read_disparity(path: Path, label_path: Path, void: float = VOID_DISPARITY) -> np.ndarray:
    """Disparity in pixels, H x W x 1: (v - 1) / 256 of the 16-bit file, `void` where v is 0 or 1.

    Pixels of file id `ZERO_DISPARITY_ID` get 0.
    """
    stored = read_uint16(path)
    label = read_indices(label_path)
    if label.shape != stored.shape:
        raise ValueError(f"{path} has (H, W) = {stored.shape}, its labels {label_path} {label.shape}")
    disparity = np.where(stored > 1, (stored.astype(np.float32) - 1) / 256, np.float32(void))
    disparity[label == ZERO_DISPARITY_ID] = 0
    return disparity[..., None]                                        # (H, W) -> (H, W, 1)


LABEL_IDS = "gtFine/{id}_gtFine_labelIds.png"

# "depth" is disparity in pixels. Ids are like "train/aachen/aachen_000000_000019".
Cityscapes = DatasetSpec(
    name="Cityscapes",
    folder="cityscapes",
    image=Source(("leftImg8bit/{id}_leftImg8bit.png",), read_image),
    labels={
        "semseg": LabelSpec((LABEL_IDS,), partial(read_classes, table=SEMSEG_TABLE), channels=19, classes=CLASS_NAMES,
                            colours=COLOURS),
        "depth": LabelSpec(("disparity/{id}_disparity.png", LABEL_IDS), read_disparity, unit="px",
                           valid_range=(0.0, 80.0), rules=DisparityLabel()),
    },
    splits={split: SplitGlob(f"leftImg8bit/{split}/*/*_leftImg8bit.png") for split in ("train", "val")},
    image_size=(512, 1024),
    label_size=(1024, 2048),
    output_name="{stem}",
)

# As MTMamba's program trains: where the disparity is invalid, the network is taught -1. No score counts it.
CityscapesMTMamba = replace(Cityscapes, name="CityscapesMTMamba", labels={
    **Cityscapes.labels, "depth": replace(Cityscapes.labels["depth"], read=partial(read_disparity, void=-1.0))})

# Training images without a vehicle are left out, as published.
Cityscapes3D = replace(Cityscapes, name="Cityscapes3D", image_size=(1024, 2048), label_size=(512, 1024), labels={
    **Cityscapes.labels,
    "det3d": LabelSpec(("gtBbox3d/{id}_gtBbox3d.json",), read_boxes, channels=len(VEHICLES), classes=VEHICLES,
                       informs=has_boxes, required=True)})

# As TaskPrompter's program reads it, which its released weights need: the quaternions' numbers in the wrong order, and
# of the labels the odd pixels.
Cityscapes3DTaskPrompter = replace(Cityscapes3D, name="Cityscapes3DTaskPrompter", labels={
    "semseg": replace(Cityscapes.labels["semseg"], rules=MapLabel(guides_crop=True, grid="centre")),
    "depth": replace(Cityscapes.labels["depth"], rules=DisparityLabel(grid="centre")),
    "det3d": replace(Cityscapes3D.labels["det3d"], read=partial(read_boxes, reading="original"),
                     rules=Boxes3DLabel(reading="original"))})
