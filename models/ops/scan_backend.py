"""What a backend of the scan has to say about itself; `models.ops.SCAN_BACKENDS` lists them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from models.ops.scan_args import ScanArgs


class ScanNeeds(NamedTuple):
    """What decides whether a backend can run a call."""

    device: str  # "cpu", "cuda", ...
    dtype: torch.dtype  # of the arithmetic
    num_states: int  # N
    state_gradient: bool  # will a gradient flow through the last state?


class Kernels(NamedTuple):
    """The two directions of the scan, for the operator `mtdp::scan`.

    forward(args, keep_chunk_states): y like u, the last state (B, K, E, N), and the states (chunks, B, K, N, E) before
        each chunk of tokens, or (0,) where they are not to be kept.
    backward(args, chunk_states, grad_y, grad_last): the gradients of u, delta, A, B, C, D, delta_bias.
    """

    forward: Callable[[ScanArgs, bool], tuple[Tensor, Tensor, Tensor]]
    backward: Callable[[ScanArgs, Tensor, Tensor, Tensor], tuple[Tensor, ...]]
    chunk_tokens: Callable[[torch.device], int]  # tokens between two states that are kept for the backward pass


@dataclass(frozen=True)
class ScanBackend:
    """Either `kernels` for our operator, or a differentiable `scan` of its own: ScanArgs to y and the last state."""

    refusal: Callable[[ScanNeeds], str | None]  # why it cannot run such a call, or None
    kernels: Kernels | None = None
    scan: Callable[[ScanArgs], tuple[Tensor, Tensor]] | None = None
    fastest_on: tuple[str, ...] = ()  # devices on which "auto" tries it
