"""Comparison with published reference numbers: one module per kind of reference, all in the table below.

A module offers `checks(folder)`, which recognises its files by their content and yields one `Check` per case.
A new kind is a new module and a row.
"""

from scripts.parity import (
    boundary,
    bridgenet,
    dcnv3,
    invpt,
    invpt_scores,
    loaders,
    losses,
    metrics,
    mtmamba,
    outputs,
    scan,
    ss2d,
    transforms,
)

FAMILIES = {
    "selective_scan": scan.checks,
    "ss2d": ss2d.checks,
    "metrics": metrics.checks,
    "losses": losses.checks,
    "outputs": outputs.checks,
    "transforms": transforms.checks,
    "loaders": loaders.checks,
    "boundary": boundary.checks,
    "dcnv3": dcnv3.checks,
    "mtmamba": mtmamba.checks,
    "invpt": invpt.checks,
    "invpt_scores": invpt_scores.checks,
    "bridgenet": bridgenet.checks,
}
