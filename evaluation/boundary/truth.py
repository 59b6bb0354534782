"""Ground-truth boundaries: from label maps, from edge pictures, or given.

PASCAL's ground truth is the boundary between regions (Mottaghi et al., CVPR 2014; benchmark of Pont-Tuset and
Marques, "Supervised Evaluation of Image Segmentation and Object Proposal Techniques", PAMI 2016). It is not the label
that the networks are trained with: that one is the thinned Laplacian of the label map.
"""

from collections.abc import Callable

import numpy as np

from evaluation.boundary.matching import thin


def connected_components(label: np.ndarray) -> np.ndarray:
    """Numbers the 4-connected regions of equal value in an H x W map: int32 from 0, in no particular order."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components as components
    index = np.arange(label.size, dtype=np.int32).reshape(label.shape)
    right, below = label[:, 1:] == label[:, :-1], label[1:] == label[:-1]
    first = np.concatenate([index[:, :-1][right], index[:-1][below]])
    second = np.concatenate([index[:, 1:][right], index[1:][below]])
    graph = coo_array((np.ones(len(first), np.int8), (first, second)), shape=(label.size, label.size))
    return components(graph, directed=False)[1].reshape(label.shape)   # (H * W,) -> (H, W)


def region_outline(label: np.ndarray) -> np.ndarray:
    """True where an H x W map differs from its right, lower or lower-right neighbour; not thinned.

    The last row looks to the right only, the last column down only, and the last pixel is False.
    """
    outline = np.zeros(label.shape, bool)
    outline[:, :-1] |= label[:, :-1] != label[:, 1:]
    outline[:-1] |= label[:-1] != label[1:]
    outline[:-1, :-1] |= label[:-1, :-1] != label[1:, 1:]
    return outline


def _drawn(picture: np.ndarray) -> np.ndarray:
    values = np.unique(picture)
    if len(values) > 2 or (len(values) == 2 and values[0] != 0):
        raise ValueError(f"a boundary map has two values, 0 and another; this one has {len(values)} "
                         f"({', '.join(map(str, values[:4]))}{', ...' if len(values) > 4 else ''}): "
                         "is it a label map (kind 'regions')?")
    return picture != 0


_KINDS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "boundary": lambda picture: thin(_drawn(picture)),
    "regions": lambda label: thin(region_outline(connected_components(label))),
    "nyud": lambda picture: thin(region_outline(picture)),
    "bsds": _drawn,
}
TRUTH_KINDS = tuple(_KINDS)


def truth_boundary(raw: np.ndarray, kind: str) -> np.ndarray:
    """The boundary map, H x W bool, of a ground-truth map H x W of integers or bool.

    boundary: the non-zero pixels, thinned.
    regions: a label map; the boundaries between its 4-connected regions.
    nyud: an edge picture *read as if it were a label map*, so that a line two or more pixels wide becomes two lines.
        This is how the published figures on NYUD-v2 were made.
    bsds: the non-zero pixels as an annotator of BSDS drew them, one pixel wide.
    """
    if kind not in _KINDS:
        raise ValueError(f"unknown kind of ground truth {kind!r}; known: {', '.join(_KINDS)}")
    if raw.ndim != 2 or raw.size == 0 or raw.dtype.kind not in "biu":
        raise ValueError(f"a ground-truth map is H x W integers, this one has shape {raw.shape} of {raw.dtype}")
    return _KINDS[kind](raw)
