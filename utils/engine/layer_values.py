"""How large the numbers are that every layer puts out: where they grow before one is not finite any more."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

LISTED = 20             # layers in a report


@torch.no_grad()
def largest_values(model: nn.Module, look: Callable[[], None]) -> dict[str, float]:
    """Layer -> the largest magnitude in what it puts out while `look` runs the model, in the order in which layers end.

    nan where it holds one. A layer that runs more than once counts by its largest. Compiled parts run uncompiled: they
    have no layers.
    """
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Callable:
        def note(_module: nn.Module, _args: tuple, out: object) -> None:
            tensors = [x for x in tree_leaves(out) if isinstance(x, Tensor) and x.is_floating_point() and x.numel()]
            for largest in (x.abs().amax().float() for x in tensors):
                found[name] = torch.maximum(found[name], largest) if name in found else largest
        return note

    hooks = [module.register_forward_hook(hook(name)) for name, module in model.named_modules() if name]
    try:
        with torch.compiler.set_stance("force_eager"):
            look()
    finally:
        for one in hooks:
            one.remove()
    return {name: value.item() for name, value in found.items()}


def first_not_finite(values: dict[str, float]) -> str | None:
    """Of `largest_values`: the first layer that puts out a number that is not finite."""
    return next((name for name, value in values.items() if not math.isfinite(value)), None)


def largest_finite(values: dict[str, float]) -> dict[str, float]:
    """The layers with the largest numbers that are finite, the largest first."""
    finite = {name: value for name, value in values.items() if math.isfinite(value)}
    return dict(sorted(finite.items(), key=lambda item: -item[1])[:LISTED])


@contextmanager
def leaving_no_trace(model: nn.Module, device: torch.device) -> Iterator[None]:
    """A forward pass inside changes neither running statistics nor the random numbers that come."""
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(buffers[name])
