"""Which class a thing has in each data set, how much it draws the eye, and the parts of a figure."""

import csv
from pathlib import Path
from typing import NamedTuple


class Label(NamedTuple):
    """One row of labels.csv."""

    nyud: int           # 1..40
    pascal: int         # 0..20
    context: int        # id in the style of the 459 PASCAL-Context classes
    salience: float     # 0..1


# "glass" is what is seen through a window (sky): like "plant" its context id is outside the list of ids whose
# normals are valid, so that the mask of the PASCAL normals has something to remove.
with Path(__file__).with_suffix(".csv").open(newline="", encoding="ascii") as table:
    LABELS = {name: Label(int(nyud), int(pascal), int(context), float(salience))
              for name, nyud, pascal, context, salience in list(csv.reader(table))[1:]}
VOC_NAMES = {5: "bottle", 8: "cat", 9: "chair", 11: "diningtable", 12: "dog", 15: "person", 16: "pottedplant",
             18: "sofa", 20: "tvmonitor"}

# Parts of a figure in the order in which they are stored, and which of the six body parts of the human_parts task
# each belongs to. The part of a solid is a position here plus one.
BODY_PARTS = {
    "hair": 1, "head": 1, "neck": 2, "torso": 2, "luarm": 3, "ruarm": 3, "llarm": 4, "rlarm": 4, "lhand": 4, "rhand": 4,
    "luleg": 5, "ruleg": 5, "llleg": 6, "rlleg": 6, "lfoot": 6, "rfoot": 6,
}
PART_NAMES = tuple(BODY_PARTS)
