"""The necks that an experiment file may name: what stands between backbone and decoder.

A neck is an nn.Module with
    Config: the dataclass of its options, the `neck_kwargs` of an experiment file;
    __init__(channels, strides, config): of the backbone's maps. ValueError says why they do not fit;
    forward(list of those maps) -> list of maps, finest first;
    channels, strides: one entry per map that it returns.
A new neck is one file and one row of NECKS.
"""

from utils.table import Table

NECKS = Table("neck", {
    "none": "models.necks.none:NoNeck",
    "one_stride": "models.necks.one_stride:OneStride",
    "pyramid": "models.necks.pyramid:SimplePyramid",
})
