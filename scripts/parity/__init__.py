"""Comparison with published reference numbers ("golden" files): one module per kind, all in the table below.

How a check is added: one file and one row. The file offers `checks(folder)`, which recognises its reference files
by their content, never by their names, and yields one `Check` per case: a name, the files that it reads, and a
function that yields a `Measure` per compared quantity. Files that no check reads are listed as "not covered".

    base      a folder of reference files, measures and their bounds
    program   how this program's models, losses and meters are made
    case      a published model of toy size: a new one says in a `System` how its names map to ours
    compare   what is compared of such a case, and of the keys of a model of full size
"""

from utils.table import Table

FAMILIES = Table("family of references", {
    "selective_scan": "scripts.parity.scan:scan_checks",
    "ss2d": "scripts.parity.scan:route_checks",
    "metrics": "scripts.parity.metrics:checks",
    "losses": "scripts.parity.losses:checks",
    "outputs": "scripts.parity.scores:output_checks",
    "transforms": "scripts.parity.transforms:checks",
    "loaders": "scripts.parity.loaders:checks",
    "boundary": "scripts.parity.boundary:checks",
    "dcnv3": "scripts.parity.dcnv3:checks",
    "mtmamba": "scripts.parity.mtmamba:checks",
    "invpt": "scripts.parity.invpt:checks",
    "mlore": "scripts.parity.mlore:checks",
    "invpt_scores": "scripts.parity.scores:invpt_checks",
    "demt": "scripts.parity.demt:checks",
    "demt_scores": "scripts.parity.scores:demt_checks",
    "taskprompter": "scripts.parity.taskprompter:checks",
    "detection3d": "scripts.parity.detection3d:checks",
    "boxes3d_data": "scripts.parity.detection3d_data:checks",
    "detection3d_all": "scripts.parity.detection3d_model:checks",
    "taskdiffusion": "scripts.parity.taskdiffusion:checks",
    "bridgenet": "scripts.parity.bridgenet:checks",
})
