"""The boundary score of the multi-task papers (ODS-F, "odsF"), without Matlab. Protocol and numbers: docs/boundary.md.

    counts = image_counts(prediction, [truth_boundary(label_map, "regions")], Protocol(max_dist=0.0075))
    totals = BoundaryTotals.empty(len(protocol.thresholds)); totals.add(counts); totals.scores(protocol.thresholds)

`python -m evaluation.boundary` scores a folder of pictures; `BoundaryBenchmark` is the same within an evaluation.
"""

from evaluation.boundary.benchmark import BoundaryBenchmark, BoundarySettings, TruthSource
from evaluation.boundary.protocol import Protocol, image_counts
from evaluation.boundary.scores import BoundaryTotals, average_precision, precision_recall_f
from evaluation.boundary.truth import TRUTH_KINDS, truth_boundary

__all__ = ["TRUTH_KINDS", "BoundaryBenchmark", "BoundarySettings", "BoundaryTotals", "Protocol", "TruthSource",
           "average_precision", "image_counts", "precision_recall_f", "truth_boundary"]
