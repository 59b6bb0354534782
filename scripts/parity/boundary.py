"""Boundary score: ground truth, suppression, thinning, counts at every threshold, and scores of sets of images.

Everything is asked to be equal, the suppressed maps bit for bit, but the matches: the reference matcher is random and
loses some. Its numbers are a range; where the maximum numbers of matches were stored beside them, these are asked for.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from evaluation.boundary.matching import match, thin
from evaluation.boundary.protocol import Protocol, image_counts
from evaluation.boundary.scores import BoundaryTotals, precision_recall_f
from evaluation.boundary.suppression import suppress
from evaluation.boundary.truth import connected_components, region_outline, truth_boundary
from scripts.parity.base import Arrays, Check, Folder, Measure, Options, absolute_error

KINDS = {"labelmap": "regions", "seg_list": "regions", "edge_png": "nyud"}
SCORES = {"ods": "odsF", "ois": "oisF", "ap": "ap", "ods_threshold": "threshold"}
RUN_TOLERANCE = 0.0012                 # of a score, against single runs of the random reference
SEVERAL_TOLERANCE = 0.005              # the same with several annotators, where the reference's runs differ by as much
CASE = {"pred", "gt_raw", "gt_kind", "max_dist", "nms", "counts_lo", "counts_hi", "exact_matches"}


def checks(folder: Folder) -> Iterator[Check]:
    for path, keys in folder.arrays.items():
        if keys >= CASE:
            yield Check(path.stem, frozenset({path}), partial(_case, np.load(path)))
        elif "thin_in_0" in keys:
            yield Check(path.stem, frozenset({path}), partial(_steps, np.load(path)))
        elif "thresholds" in keys and any(key.endswith("/exact_matches") for key in keys):
            yield Check(path.stem, frozenset({path}), partial(_plain, folder, np.load(path)))
    for table, content in folder.tables.items():
        if isinstance(content, dict) and all(isinstance(g, dict) and {"cases", "run0"} <= g.keys()
                                             for g in content.values()):
            for name, group in content.items():
                yield Check(f"{table.stem}/{name}", frozenset({table}), partial(_group, folder, group))


def _truths(data: Arrays) -> list[np.ndarray]:
    raw = data["gt_raw"]
    return [truth_boundary(label, KINDS[str(data["gt_kind"])]) for label in (raw if raw.ndim == 3 else raw[None])]


def _case(data: Arrays, options: Options) -> Iterator[Measure]:
    protocol, truths = Protocol(float(data["max_dist"])), _truths(data)
    counts, stored = image_counts(data["pred"], truths, protocol), data["counts"]
    yield Measure("thresholds", absolute_error(protocol.thresholds, data["thresholds"]), 1e-15)
    yield Measure("ground truth", absolute_error(np.stack(truths), data["gt_boundary"]), 0.0)
    yield Measure("suppressed map", _pixels_that_differ(data["pred"], data["nms"]), 0.0)
    yield Measure("sumR", absolute_error(counts[:, 1], stored[:, 1]), 0.0)
    yield Measure("sumP", absolute_error(counts[:, 3], stored[:, 3]), 0.0)
    if len(truths) == 1:
        for name, column in (("cntR", 0), ("cntP", 2)):
            yield Measure(name, absolute_error(counts[:, column], data["exact_matches"]), 0.0)
        best_run = data["counts_runs"][:, :, 0].max(0)
        yield Measure("matches below a reference run", _outside(counts[:, 0], best_run, np.inf), 0.0)
        yield from _one_matching(data, truths[0])
    else:
        for name, column in (("cntR", 0), ("cntP", 2)):
            low, high = (data[f"counts_{end}"][:, column] for end in ("lo", "hi"))
            yield Measure(f"{name} outside the reference's range", _outside(counts[:, column], low, high + 1), 0.0)
    yield Measure("P, R, F", absolute_error(np.stack(precision_recall_f(stored), 1)[:, [2, 0, 1]], data["fpr"]), 1e-6)


def _pixels_that_differ(picture: np.ndarray, suppressed: np.ndarray) -> int:
    return int((suppress((picture / 255).astype(np.float32)) != suppressed).sum())


def _outside(values: np.ndarray, low: np.ndarray, high: np.ndarray) -> float:
    """How far the values leave the range, at most."""
    return float(np.maximum(low - values, values - high).max(initial=0))


def _one_matching(data: Arrays, truth: np.ndarray) -> Iterator[Measure]:
    """At one threshold: pairs within the distance, nothing twice, and as many as the maximum."""
    lines, k = data["match_pred_thin"], int(data["match_threshold_index"])
    found = match(lines, truth, float(data["dist_px"]))
    pixels, partners = np.argwhere(found >= 0), found[found >= 0]
    offset = pixels - np.stack(np.unravel_index(partners, truth.shape), axis=1)        # (pairs, 2)
    yield Measure("distance of a pair", np.hypot(*offset.T).max(initial=0), float(data["dist_px"]))
    yield Measure("partners taken twice", len(partners) - len(np.unique(partners)), 0.0)
    yield Measure("number of pairs", abs(len(partners) - int(data["exact_matches"][k])), 0.0)


def _steps(data: Arrays, options: Options) -> Iterator[Measure]:
    for name in data:
        kind, _, number = name.rpartition("_")
        if kind == "thin_in":
            yield Measure(f"thin {number}", absolute_error(thin(data[name]), data[f"thin_out_{number}"]), 0.0)
        elif kind == "seg_in":
            label = data[name]
            ours, theirs = connected_components(label), data[f"seg_components_{number}"]
            both = len(np.unique(np.stack([ours.ravel(), theirs.ravel()]), axis=1)[0])  # the numbering is arbitrary
            yield Measure(f"components {number}", abs(both - len(np.unique(ours))) + abs(both - len(np.unique(theirs))))
            yield Measure(f"outline {number}", absolute_error(region_outline(ours), data[f"seg_bmap_{number}"]), 0.0)
            yield Measure(f"raw outline {number}",
                          absolute_error(region_outline(label), data[f"seg_bmap_raw_{number}"]), 0.0)
        elif kind == "nms_pred":
            yield Measure(f"suppressed map {number}", _pixels_that_differ(data[name], data[f"nms_out_{number}"]), 0.0)


def _plain(folder: Folder, data: Arrays, options: Options) -> Iterator[Measure]:
    """The protocol without suppression."""
    for name in {key.rpartition("/")[0] for key in data if "/" in key}:
        case = np.load(_file(folder, name))
        counts = image_counts(case["pred"], _truths(case), Protocol(float(case["max_dist"]), "plain"))
        yield Measure(f"{name} matches", absolute_error(counts[:, 0], data[f"{name}/exact_matches"]), 0.0)
        yield Measure(f"{name} sumR, sumP", absolute_error(counts[:, [1, 3]], data[f"{name}/counts"][:, [1, 3]]), 0.0)


def _group(folder: Folder, group: dict, options: Options) -> Iterator[Measure]:
    """Scores of a set: the whole chain against exact matching, and against every run of the reference."""
    cases = [np.load(_file(folder, name)) for name in group["cases"]]
    thresholds = cases[0]["thresholds"]
    totals = BoundaryTotals.empty(len(thresholds))
    for case in cases:
        totals.add(image_counts(case["pred"], _truths(case), Protocol(float(case["max_dist"]))))
    ours = totals.scores(thresholds)
    for key, value in group.get("exact_matching", {}).items():
        if key in SCORES:
            yield Measure(f"{key}, exact matching", abs(ours[SCORES[key]] - value), 1e-12)
    for key in ("ods", "ois", "ap"):
        error = max(abs(ours[SCORES[key]] - value) for value in group["over_runs"][key])
        yield Measure(f"{key}, reference runs", error,
                      RUN_TOLERANCE if "exact_matching" in group else SEVERAL_TOLERANCE)


def _file(folder: Folder, name: str) -> Path:
    return next(path for path in folder.arrays if path.stem == name)
