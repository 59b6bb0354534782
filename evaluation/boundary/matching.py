"""Thinning, and maximum matching of predicted with true boundary pixels; two backends with equal results.

`compiled` is matching.cpp with its headers, built on first use. `scipy` needs no compiler: the thinning of
`evaluation.boundary.thinning` and SciPy's `maximum_flow` (Dinic), which on unit capacities is the method of Hopcroft
and Karp. SciPy's own `maximum_bipartite_matching` finds the same number, but can take more
than a minute for a single map where predicted and true pixels are about equally many. The SciPy backend is the
fallback, and what the compiled one is tested against.
"""

import functools
import logging
from pathlib import Path
from types import ModuleType

import numpy as np
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import maximum_flow, min_weight_full_bipartite_matching

from evaluation.boundary.thinning import thin as plain_thin
from utils.extension import load_extension

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "compiled", "scipy")
SOURCES = tuple(Path(__file__).with_name(name) for name in ("matching.cpp", "matcher.h", "assignment.h",
                                                            "thinning.h"))
COST_PER_PIXEL = 100                 # costs of the published matcher are whole hundredths of a pixel


@functools.cache
def _compiled() -> ModuleType | None:
    module, reason = load_extension("boundary_matching", SOURCES)
    if module is None:
        logger.warning("boundary score: SciPy, no compiled code, some thirty times slower: %s", reason)
    return module


def pick_backend(wanted: str = "auto") -> str:
    """"compiled" or "scipy". The compiled backend is built here if need be; asking for it in vain is a ValueError."""
    if wanted not in BACKENDS:
        raise ValueError(f"unknown backend {wanted!r}; known: {', '.join(BACKENDS)}")
    if wanted == "scipy" or (wanted == "auto" and _compiled() is None):
        return "scipy"
    if _compiled() is None:
        raise ValueError("backend 'compiled' was asked for, but it could not be built (see the warning above)")
    return "compiled"


def thin(mask: np.ndarray, backend: str = "auto") -> np.ndarray:
    """Thins an H x W boolean mask to lines one pixel wide, to convergence; outside counts as False."""
    if pick_backend(backend) == "compiled":
        return _compiled().thin(np.ascontiguousarray(mask, bool))
    return plain_thin(mask)


def count_levels(levels: np.ndarray, truth: np.ndarray, num: int, distance: float,
                 backend: str = "auto") -> np.ndarray:
    """Matched pairs and pixels of the thinned prediction at `num` thresholds, (num, 2) int64.

    levels (H, W): how many of the thresholds each pixel passes, counted from the lowest, so that the map at threshold
    k is `levels > k`. truth (H, W) bool. A pixel of each may pair if they are at most `distance` pixels apart.
    """
    assert levels.shape == truth.shape, f"levels {levels.shape}, truth {truth.shape}"
    if pick_backend(backend) == "compiled":
        return _compiled().count_levels(np.ascontiguousarray(levels, np.int16), np.ascontiguousarray(truth, bool),
                                        num, distance)
    counts = np.zeros((num, 2), np.int64)
    for k in range(num):
        lines = thin(levels > k, "scipy")
        counts[k] = (match(lines, truth, distance, "scipy") >= 0).sum(), lines.sum()
    return counts


def count_annotators(levels: np.ndarray, truths: np.ndarray, num: int, distance: float,
                     backend: str = "auto") -> np.ndarray:
    """cntR, cntP, pixels of the thinned prediction and cost at `num` thresholds, (num, 4) int64; truths (G, H, W) bool.

    Each ground truth is matched by itself, for the most pairs and then the least distance. cntR adds up the pairs; cntP
    counts a predicted pixel once if any ground truth matches it; the cost sums distances in hundredths of a pixel.
    levels, num, distance: see `count_levels`.
    """
    assert levels.shape == truths.shape[1:], f"levels {levels.shape}, truths {truths.shape}"
    if pick_backend(backend) == "compiled":
        return _compiled().count_annotators(np.ascontiguousarray(levels, np.int16), np.ascontiguousarray(truths, bool),
                                            num, distance)
    counts = np.zeros((num, 4), np.int64)
    for k in range(num):
        if k and not (levels == k).any():                              # the same map as at the threshold below
            counts[k] = counts[k - 1]
            continue
        lines = thin(levels > k, "scipy")
        partners = np.stack([cheapest_match(lines, truth, distance, "scipy") for truth in truths])
        matched = partners >= 0
        counts[k] = matched.sum(), matched.any(axis=0).sum(), lines.sum(), sum(map(matching_cost, partners))
    return counts


def matching_cost(partners: np.ndarray) -> int:
    """Sum of the distances in a map of partners (H, W), each rounded to hundredths of a pixel."""
    there = np.stack(np.unravel_index(partners[partners >= 0], partners.shape), axis=1)
    return int(np.rint(COST_PER_PIXEL * np.hypot(*(np.argwhere(partners >= 0) - there).T)).sum())


def match(prediction: np.ndarray, truth: np.ndarray, distance: float, backend: str = "auto") -> np.ndarray:
    """A maximum matching of two H x W masks: for each pixel of `prediction` its partner's flat index in `truth`.

    -1 where there is none; int32 (H, W). Which of the maximum matchings it is depends on the backend.
    """
    if pick_backend(backend) == "compiled":
        return _compiled().match(np.ascontiguousarray(prediction, bool), np.ascontiguousarray(truth, bool), distance)
    graph = candidates(prediction, truth, distance)[2].tocoo()
    num, total = graph.shape[0], sum(graph.shape)                      # vertices: source, pixels, truths, sink
    row = np.concatenate([np.zeros(num, np.int32), 1 + graph.row, np.arange(num, total, dtype=np.int32) + 1])
    column = np.concatenate([np.arange(num, dtype=np.int32) + 1, 1 + num + graph.col,
                             np.full(total - num, total + 1, np.int32)])
    network = csr_array((np.ones(len(row), np.int32), (row, column)), shape=(total + 2, total + 2))
    flow = maximum_flow(network, 0, total + 1, method="dinic").flow.tocoo()
    used = (flow.data > 0) & (flow.row > 0) & (flow.row <= num)        # each leads from a pixel to a truth
    chosen = np.full(num, -1)
    chosen[flow.row[used] - 1] = flow.col[used] - 1 - num
    return _partners(prediction, truth, chosen)


def cheapest_match(prediction: np.ndarray, truth: np.ndarray, distance: float, backend: str = "auto") -> np.ndarray:
    """Like `match`, and of all maximum matchings one with the least sum of distances, each rounded to 1/100 pixel.

    Where several have the same sum, which of them it is depends on the backend. In SciPy's terms:
    The cost of leaving a pixel alone is a hundred times the largest distance. Each pixel gets a stand-in on the other
    side, which it takes when it stays alone; stand-ins of a matched pair pair up. So a full assignment always exists.
    """
    if pick_backend(backend) == "compiled":
        return _compiled().cheapest_match(np.ascontiguousarray(prediction, bool), np.ascontiguousarray(truth, bool),
                                          distance)
    pixels, truths, graph = candidates(prediction, truth, distance)
    row, column = graph.nonzero()
    live_row, row = np.unique(row, return_inverse=True)                # pixels without any candidate drop out
    live_column, column = np.unique(column, return_inverse=True)
    chosen = np.full(len(pixels), -1)
    if len(row):
        n, m = len(live_row), len(live_column)
        offset = pixels[live_row][row] - truths[live_column][column]   # (edges, 2)
        cost = np.rint(COST_PER_PIXEL * np.hypot(*offset.T))
        alone = np.ceil(100 * COST_PER_PIXEL * distance)
        i, j = np.arange(n), np.arange(m)
        # rows: n pixels, m stand-ins of truths; columns: m truths, n stand-ins of pixels
        rows = np.concatenate([row, i, n + j, n + column])
        columns = np.concatenate([column, m + i, j, m + row])
        costs = np.concatenate([cost, np.full(n + m + len(row), alone)]) + 1   # SciPy takes zeros for absent edges
        found = min_weight_full_bipartite_matching(csr_array((costs, (rows, columns)), shape=(n + m, n + m)))[1][:n]
        chosen[live_row] = np.where(found < m, live_column[np.minimum(found, m - 1)], -1)
    return _partners(prediction, truth, chosen)


def candidates(prediction: np.ndarray, truth: np.ndarray, distance: float) -> tuple[np.ndarray, np.ndarray, csr_array]:
    """(P, 2) and (T, 2) coordinates of the set pixels, and the (P, T) matrix with 1 where a pair is close enough."""
    pixels, truths = np.argwhere(prediction), np.argwhere(truth)
    radius = int(min(distance, max(truth.shape)))
    index = np.full(np.add(truth.shape, 2 * radius), -1, np.int32)     # number of each truth pixel, in a frame of -1
    index[tuple(truths.T + radius)] = np.arange(len(truths))
    dy, dx = np.mgrid[-radius:radius + 1, -radius:radius + 1]
    inside = dy**2 + dx**2 <= distance**2
    near = np.stack([dy[inside], dx[inside]], axis=1)                  # (offsets, 2)
    near = near[np.argsort((near**2).sum(axis=1), kind="stable")] + radius         # nearest first
    if not len(pixels) or not len(truths):
        return pixels, truths, csr_array((len(pixels), len(truths)), dtype=np.int8)
    found = [index[tuple((pixels + offset).T)] for offset in near]     # offsets x (P,)
    row, column = zip(*((np.flatnonzero(f >= 0), f[f >= 0]) for f in found), strict=True)
    row, column = np.concatenate(row), np.concatenate(column)
    graph = coo_array((np.ones(len(row), np.int8), (row, column)), shape=(len(pixels), len(truths)))
    return pixels, truths, graph.tocsr()


def _partners(prediction: np.ndarray, truth: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Numbers of truth pixels (P,) -> map of their flat indices, (H, W) int32."""
    partners = np.full(prediction.shape, -1, np.int32)
    flat = np.append(np.flatnonzero(truth), -1).astype(np.int32)       # the last entry is "none"
    partners[prediction] = flat[chosen]
    return partners
