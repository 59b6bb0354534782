"""Comparison with published reference numbers: one module per kind of reference, all in the table below.

A module offers `checks(folder)`, which recognises its files by their content and yields one `Check` per case.
A new kind is a new module and a row. `base` and `models` hold what they share.
"""

from scripts.parity import (
    boundary,
    bridgenet,
    dcnv3,
    demt,
    demt_scores,
    invpt,
    invpt_scores,
    loaders,
    losses,
    metrics,
    mlore,
    mtmamba,
    outputs,
    scan,
    ss2d,
    taskprompter,
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
    "mlore": mlore.checks,
    "invpt_scores": invpt_scores.checks,
    "demt": demt.checks,
    "demt_scores": demt_scores.checks,
    "taskprompter": taskprompter.checks,
    "bridgenet": bridgenet.checks,
}
