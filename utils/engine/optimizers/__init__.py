"""The optimizers by name; a new one: a file with a class like those of `torch_optimizers`, and one entry here.

Beside the rows, `torch:NAME` is any class of torch.optim, `timm:NAME` any optimizer of timm.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from utils.libraries import names_in
from utils.options import nearest
from utils.table import Table


@dataclass(frozen=True)
class NamedEntry:
    """An optimizer of a library: who builds it, and its name there."""

    target: str
    defaults: dict[str, Any] = field(default_factory=dict)


def _family(library: str, target: str, files: str, pattern: str) -> Callable[[str], NamedEntry]:
    def entry(name: str) -> NamedEntry:
        known = [found for found in names_in(library, files, pattern) if found not in UNFIT]
        if name not in known:
            raise ValueError(f"{library} has no optimizer '{name}' for this; {nearest(name, known)}")
        return NamedEntry(target, {"name": name})

    return entry


# Their steps need more than gradients: the loss as a function, sparse gradients, matrices alone.
UNFIT = ("LBFGS", "SparseAdam", "Muon")
OPTIMIZERS = Table("optimizer", {
    "adam": "utils.engine.optimizers.torch_optimizers:Adam",
    "adamw": "utils.engine.optimizers.torch_optimizers:AdamW",
    "sgd": "utils.engine.optimizers.torch_optimizers:SGD",
}, families={
    "torch": _family("torch", "utils.engine.optimizers.named:TorchOptimizer", "optim/*.py",
                     r"^class (\w+)\(Optimizer\)"),
    "timm": _family("timm", "utils.engine.optimizers.named:TimmOptimizer", "optim/_optim_factory.py",
                    r"^ +name='(\w+)'"),
})
