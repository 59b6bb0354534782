"""Activation checkpointing: a block's activations are computed again in the backward pass instead of being kept.

Backbones and decoders say what that pays for in a class attribute `recomputed`: classes of their blocks, or names of
their own methods. A module keeps its class, its parameters and its place in the tree; the method of this one object is
replaced by one that recomputes. `copy.deepcopy` binds it to the copy.
Reference: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016.
"""

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def recompute_blocks(part: nn.Module) -> int:
    """Switches it on for the blocks of a backbone or decoder; returns their number, 0 if the part names none."""
    targets = [(module, "forward") for module in blocks_of(part)]
    targets += [(part, entry) for entry in part.recomputed if isinstance(entry, str)]
    for module, method in targets:
        setattr(module, method, types.MethodType(_recomputed(getattr(type(module), method)), module))
    return len(targets)


def blocks_of(part: nn.Module) -> list[nn.Module]:
    """The blocks of a backbone or decoder that are modules of their own, the outer ones first."""
    kinds = tuple(entry for entry in part.recomputed if not isinstance(entry, str))
    return [module for module in part.modules() if isinstance(module, kinds)]


@functools.cache
def _recomputed(original: Callable) -> Callable:
    """The method of a class, recomputed in training; one function for all objects, so that they compile alike."""
    def recomputed(self, *args, **kwargs):
        run = functools.partial(original, self, **kwargs)
        if not (self.training and torch.is_grad_enabled()):
            return run(*args)
        norms = [module for module in self.modules() if isinstance(module, _BatchNorm)]
        if not norms:
            return checkpoint(run, *args, use_reentrant=False)
        return checkpoint(run, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), _statistics_kept(norms)))

    return recomputed


@contextmanager
def _statistics_kept(norms: list[_BatchNorm]) -> Iterator[None]:
    """As in the first pass batch norms use the batch's statistics, which are not added to the running ones again."""
    before = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm, _, count in before:
        norm.momentum, norm.num_batches_tracked = 0.0, None if count is None else count.clone()
    try:
        yield
    finally:
        for norm, momentum, count in before:
            norm.momentum, norm.num_batches_tracked = momentum, count
