"""Networks without numbers: built where nothing is allocated, and no initial weights are drawn."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

DRAWING = frozenset(("uniform_", "normal_", "trunc_normal_", "erfinv_", "mul_", "add_", "clamp_", "fill_", "zero_"))


class _NothingDrawn(TorchFunctionMode):
    """What makes initial weights in place does nothing to tensors that hold none; it would take most of the time."""

    def __torch_function__(self, function: Callable, types: Sequence[type], args: Sequence = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if getattr(function, "__name__", "") in DRAWING:
            filled = args[0] if args else kwargs.get("tensor")          # torch.nn.init names it
            if isinstance(filled, Tensor) and filled.is_meta:
                return filled
        return function(*args, **kwargs)


@contextmanager
def meta_device() -> Iterator[None]:
    """Whatever is built inside has shapes and nothing else."""
    with torch.device("meta"), _NothingDrawn():
        yield
