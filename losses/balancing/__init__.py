"""Loss balancing: how the tasks' losses become gradients. The table of schemes; `base.Balancing` is their contract."""

from collections.abc import Mapping, Sequence
from typing import Any

from utils.options import Options, parse
from utils.table import Table

BALANCING = Table("loss_scheme", {
    "weighted_sum": "losses.balancing.fixed:WeightedSum",
    "log": "losses.balancing.fixed:LogSum",
    "geometric_mean": "losses.balancing.fixed:GeometricMean",
    "uncertainty": "losses.balancing.learned:Uncertainty",
    "dwa": "losses.balancing.learned:DynamicWeightAverage",
    "famo": "losses.balancing.learned:FAMO",
    "gradnorm": "losses.balancing.gradients:GradNorm",
    "db_mtl": "losses.balancing.gradients:DualBalancing",
    "pcgrad": "losses.balancing.torchjd:PCGrad",
    "cagrad": "losses.balancing.torchjd:CAGrad",
    "nash_mtl": "losses.balancing.torchjd:NashMTL",
    "mgda": "losses.balancing.torchjd:MGDA",
    "imtl_g": "losses.balancing.torchjd:IMTLG",
    "aligned_mtl": "losses.balancing.torchjd:AlignedMTL",
    "upgrad": "losses.balancing.torchjd:UPGrad",
}, aliases={"gls": "geometric_mean"})           # the name of its paper


def build_balancing(scheme: str, tasks: Sequence[str], weights: Mapping[str, float],
                    options: Mapping[str, Any] | Options | None = None) -> Any:
    """The scheme of that name (a `base.Balancing`) for these tasks; `weights` names each of them.

    `options` are a plain mapping or have been parsed already.
    """
    if lacking := [task for task in tasks if task not in weights]:
        raise ValueError(f"loss_weights lacks {', '.join(lacking)}; given: {', '.join(weights) or '-'}")
    kind = BALANCING.load(scheme)
    parsed = options if isinstance(options, Options) else parse(kind.Config, options, "scheme_kwargs.")
    return kind(tasks, weights, parsed)
