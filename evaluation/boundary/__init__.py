"""The boundary score of the multi-task papers (ODS-F, "odsF"), without Matlab. Protocol and numbers: docs/boundary.md.

    from evaluation.boundary.protocol import Protocol, image_counts
    from evaluation.boundary.scores import BoundaryTotals
    from evaluation.boundary.truth import truth_boundary

    protocol = Protocol(max_dist=0.0075)
    totals = BoundaryTotals.empty(len(protocol.thresholds))
    totals.add(image_counts(prediction, [truth_boundary(label_map, "regions")], protocol))
    totals.scores(protocol.thresholds)

`python -m evaluation.boundary` scores a folder of pictures; `evaluator.BoundaryEvaluator` does so in an evaluation.
Everything that knows about boundaries is in this folder, but the training loss (losses/edge.py).
"""
