"""Which class a thing has in each data set, how much it draws the eye, and the parts of a figure."""

from typing import NamedTuple


class Label(NamedTuple):
    """One row of the table below."""

    nyud: int           # 1..40
    pascal: int         # 0..20
    context: int        # id in the style of the 459 PASCAL-Context classes
    salience: float     # 0..1


# "glass" is what is seen through a window (sky): like "plant" its context id is outside the list of ids whose
# normals are valid, so that the mask of the PASCAL normals has something to remove.
LABELS = {
    "wall": Label(1, 0, 440, 0.0),
    "floor": Label(2, 0, 158, 0.0),
    "ceiling": Label(22, 0, 68, 0.0),
    "cabinet": Label(3, 0, 46, 0.2),
    "bed": Label(4, 0, 18, 0.45),
    "chair": Label(5, 9, 72, 0.5),
    "sofa": Label(6, 18, 368, 0.5),
    "table": Label(7, 11, 397, 0.45),
    "door": Label(8, 0, 115, 0.1),
    "window": Label(9, 0, 454, 0.0),
    "glass": Label(9, 0, 360, 0.0),
    "bookshelf": Label(10, 0, 349, 0.2),
    "picture": Label(11, 0, 287, 0.2),
    "counter": Label(12, 0, 101, 0.2),
    "blinds": Label(13, 0, 29, 0.0),
    "desk": Label(14, 0, 111, 0.3),
    "curtain": Label(16, 0, 105, 0.0),
    "dresser": Label(17, 0, 122, 0.25),
    "pillow": Label(18, 0, 290, 0.3),
    "mat": Label(20, 0, 250, 0.0),
    "books": Label(23, 0, 33, 0.1),
    "fridge": Label(24, 0, 319, 0.25),
    "tv": Label(25, 20, 427, 0.45),
    "paper": Label(26, 0, 275, 0.05),
    "box": Label(29, 0, 37, 0.4),
    "whiteboard": Label(30, 0, 30, 0.1),
    "person": Label(31, 15, 284, 1.0),
    "nightstand": Label(32, 0, 269, 0.2),
    "lamp": Label(35, 0, 232, 0.25),
    "bag": Label(37, 0, 9, 0.4),
    "bottle": Label(40, 5, 34, 0.5),
    "plant": Label(40, 16, 308, 0.55),
    "cat": Label(40, 8, 65, 0.9),
    "dog": Label(40, 12, 113, 0.9),
    "ball": Label(40, 0, 10, 0.5),
    "vase": Label(40, 0, 432, 0.3),
}
VOC_NAMES = {5: "bottle", 8: "cat", 9: "chair", 11: "diningtable", 12: "dog", 15: "person", 16: "pottedplant",
             18: "sofa", 20: "tvmonitor"}

# Parts of a figure in the order in which they are stored, and which of the six body parts of the human_parts task
# each belongs to. The part of a solid is a position here plus one.
BODY_PARTS = {
    "hair": 1, "head": 1, "neck": 2, "torso": 2, "luarm": 3, "ruarm": 3, "llarm": 4, "rlarm": 4, "lhand": 4, "rhand": 4,
    "luleg": 5, "ruleg": 5, "llleg": 6, "rlleg": 6, "lfoot": 6, "rfoot": 6,
}
PART_NAMES = tuple(BODY_PARTS)
