"""The selective scan written exactly as it is defined: one Python step per position, gradients by autograd.

This is the twin every fast backend is compared with, so it stays free of tricks.
Reference: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, algorithm 2.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.ops.scan_args import ScanArgs


def reference_scan(args: ScanArgs) -> tuple[Tensor, Tensor]:
    """Returns y (B, D, L) in u's dtype and the last state (B, D, N) in the scan's dtype."""
    args, out_dtype = args.to_scan_dtype(), args.u.dtype
    batch, channels, length = args.u.shape
    step = args.delta if args.delta_bias is None else args.delta + args.delta_bias[:, None]
    if args.delta_softplus:
        step = F.softplus(step)
    in_maps, out_maps = _per_step(args.B, length), _per_step(args.C, length)

    state = args.u.new_zeros(batch, channels, args.A.shape[1])
    outputs = []
    for t, (step_t, u_t) in enumerate(zip(step.unbind(-1), args.u.unbind(-1), strict=True)):  # (B, D) each
        b_t, c_t = _per_channel(in_maps[t], channels), _per_channel(out_maps[t], channels)
        decay = torch.exp(step_t[..., None] * args.A)  # (B, D, N): A is discretised exactly, B by Euler
        state = decay * state + (step_t * u_t)[..., None] * b_t
        outputs.append((c_t * state).sum(-1))
    y = torch.stack(outputs, dim=-1) if outputs else torch.zeros_like(args.u)  # (B, D, L)

    if args.D is not None:
        y = y + args.D[:, None] * args.u
    if args.z is not None:
        y = y * F.silu(args.z)
    return y.to(out_dtype), state


def _per_step(maps: Tensor, length: int) -> tuple[Tensor, ...]:
    """One map per step: (B, G, N), or always the same (D, N) where the map is constant in time."""
    return maps.unbind(-1) if maps.dim() == 4 else (maps,) * length


def _per_channel(map_t: Tensor, channels: int) -> Tensor:
    """(B, G, N) -> (B, D, N), group g serving the g-th contiguous run of channels; (D, N) stays."""
    return map_t.repeat_interleave(channels // map_t.shape[1], dim=1) if map_t.dim() == 3 else map_t
