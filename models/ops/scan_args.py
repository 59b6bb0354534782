"""The arguments of one selective scan: checked once, in one canonical form that every backend reads."""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class ScanArgs:
    """u, delta, z (B, D, L); A (D, N); B, C (B, G, N, L) or constant (D, N); D, delta_bias (D,)."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    delta_softplus: bool

    def __post_init__(self):
        _check(self)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensor arguments that are present, by name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    @property
    def scan_dtype(self) -> torch.dtype:
        """float32, or float64 when any input is float64: the recurrence never runs in half precision."""
        double = any(tensor.dtype == torch.float64 for tensor in self.tensors.values())
        return torch.float64 if double else torch.float32

    @property
    def groups(self) -> int:
        """Number of channel groups with B, C maps of their own (1 when both are constant)."""
        return next((m.shape[1] for m in (self.B, self.C) if m.dim() == 4), 1)

    def to_scan_dtype(self) -> "ScanArgs":
        dtype = self.scan_dtype
        return replace(self, **{name: value.to(dtype) for name, value in self.tensors.items()})


def _check(args: ScanArgs) -> None:
    """Raises ValueError naming the argument, its shape and the shape it should have."""
    if args.u.dim() != 3 or args.A.dim() != 2:
        raise ValueError(f"selective_scan needs u (B, D, L) and A (D, N), got u {tuple(args.u.shape)} "
                         f"and A {tuple(args.A.shape)}")
    batch, channels, length = args.u.shape
    state, groups = args.A.shape[1], args.groups
    if groups < 1 or channels % groups:
        raise ValueError(f"selective_scan: {groups} groups of B, C do not divide {channels} channels")
    varying, constant = (batch, groups, state, length), (channels, state)
    sequence, per_channel = (batch, channels, length), (channels,)
    allowed = {"u": [sequence], "delta": [sequence], "z": [sequence], "A": [constant], "D": [per_channel],
               "B": [varying, constant], "C": [varying, constant], "delta_bias": [per_channel]}
    for name, tensor in args.tensors.items():
        if tuple(tensor.shape) not in allowed[name]:
            raise ValueError(f"selective_scan: {name} has shape {tuple(tensor.shape)}, "
                             f"expected {' or '.join(map(str, allowed[name]))} for u {tuple(args.u.shape)}")
        if tensor.device != args.u.device:
            raise ValueError(f"selective_scan: {name} is on {tensor.device}, u on {args.u.device}")
        if not tensor.is_floating_point():
            raise ValueError(f"selective_scan: {name} has dtype {tensor.dtype}, expected floating point")
