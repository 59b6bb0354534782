"""How many kernels a forward pass in training mode dispatches, part by part, and how many of them are scans.

Counted on the meta device, so nothing is allocated or run. Every operator below autograd that returns tensors counts
once, views apart: what a GPU's host has to launch. (Some operators launch several kernels, an allocation none.) DCNv3's
sampling is left out: on that device it does nothing.
"""

from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from utils.engine.build import model_from_config
from utils.engine.config import Config
from utils.meta import meta_device

PARTS = ("encoder", "neck", "decoder")  # of a model; what lies outside them are the heads
VIEWS = {"aten::_unsafe_view"}  # views that autograd does not know as such
SCAN = "mtdp::scan"


class KernelCounter(TorchDispatchMode):
    """Counts what is dispatched while it is active, by operator; `kernels["decoder"]` is a Counter."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.kernels: dict[str, Counter] = {name: Counter() for name in (*PARTS, "heads")}
        self.part = "heads"
        for name in PARTS:
            module = getattr(model, name)
            module.register_forward_pre_hook(lambda *_, name=name: self._enter(name))
            module.register_forward_hook(lambda *_: self._enter("heads"))

    def _enter(self, part: str) -> None:
        self.part = part

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = function(*args, **(kwargs or {}))
        is_view = function.is_view or function.name() in VIEWS
        if not is_view and any(isinstance(value, torch.Tensor) for value in tree_flatten(out)[0]):
            self.kernels[self.part][function.name()] += 1
        return out


def count_kernels(config: Config) -> dict[str, Counter]:
    """Of one image, part by part."""
    with meta_device():
        model = model_from_config(config).train()
        image = torch.empty(1, 3, *config.input_size)
    with KernelCounter(model) as counter:
        model(image)
    return counter.kernels


def kernel_rows(config: Config) -> list[tuple[str, str]]:
    """The table that `scripts/benchmark.py --count_kernels` prints."""
    kernels = count_kernels(config)
    rows = [(f"kernels, {part}", f"{found.total():,}") for part, found in kernels.items() if found]
    return [*rows, ("kernels, total", f"{sum(found.total() for found in kernels.values()):,}"),
            ("scans", f"{sum(found[SCAN] for found in kernels.values()):,}")]
