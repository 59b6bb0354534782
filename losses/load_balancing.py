"""Load balancing of mixture-of-experts gates: keeps a router from always choosing the same few experts.

Squared coefficient of variation of the experts' mean gate (Shazeer et al., ICLR 2017), as used by MLoRE (Yang
et al., CVPR 2024) over all tasks of a routing layer.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def load_balancing_loss(layers: Iterable[Sequence[Tensor]]) -> Tensor:
    """Sum over routing layers of (std / mean)^2 of the experts' average gate; 0-dim, not weighted.

    layers: per routing layer the gate probabilities of every task, each (B, E) or (B, E, 1, 1) with E
    experts. The average runs over tasks and samples together, the standard deviation is the unbiased one over
    experts.
    """
    terms = []
    for gates in layers:
        stacked = torch.cat([gate.flatten(1) for gate in gates])       # (T*B, E)
        if stacked.shape[1] < 2:
            raise ValueError(f"load balancing needs at least 2 experts, got gates {tuple(gates[0].shape)}")
        load = stacked.to(torch.promote_types(stacked.dtype, torch.float32)).mean(0)   # (E,)
        terms.append(load.var() / load.mean().square())
    if not terms:
        raise ValueError("load balancing needs the gates of at least one routing layer, got none")
    return torch.stack(terms).sum()
