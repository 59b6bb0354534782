"""Loss balancing: how the tasks' losses become gradients. The table of schemes; `base.Balancing` is their contract."""

from collections.abc import Mapping, Sequence
from typing import Any

from utils.options import parse
from utils.table import Table

BALANCING = Table("loss_scheme", {
    "weighted_sum": "losses.balancing.fixed:WeightedSum",
    "log": "losses.balancing.fixed:LogSum",
})


def build_balancing(scheme: str, tasks: Sequence[str], weights: Mapping[str, float],
                    options: Mapping[str, Any] | None = None) -> Any:
    """The scheme of that name (a `base.Balancing`) for these tasks; `weights` names each of them."""
    if lacking := [task for task in tasks if task not in weights]:
        raise ValueError(f"loss_weights lacks {', '.join(lacking)}; given: {', '.join(weights) or '-'}")
    kind = BALANCING.load(scheme)
    return kind(tasks, weights, parse(kind.Config, options, "scheme_kwargs."))
