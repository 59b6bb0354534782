"""The selective scan written exactly as it is defined: one Python step per position, gradients by autograd.

Routes are applied by explicit permutation, before and after. This is the twin every fast backend is compared with, so
it stays free of tricks.
Reference: Gu and Dao, "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", 2023, algorithm 2.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.ops.routes import from_sequences, to_sequences
from models.ops.scan_args import ScanArgs
from models.ops.scan_choice import ScanBackend


def reference_scan(args: ScanArgs) -> tuple[Tensor, Tensor]:
    """Returns y, like u and in its dtype, and the last state (B, K, E, N) in the scan's dtype."""
    args, out_dtype = args.to_scan_dtype(), args.u.dtype
    u, delta, B, C = (to_sequences(x, args.routes) for x in (args.u, args.delta, args.B, args.C))
    step = delta if args.delta_bias is None else delta + args.delta_bias[..., None]  # (B, K, E, P)
    if args.delta_softplus:
        step = F.softplus(step)

    state = step.new_zeros(*step.shape[:3], args.A.shape[-1])  # (B, K, E, N)
    outputs = []
    for step_t, u_t, B_t, C_t in zip(*(x.unbind(-1) for x in (step, u, B, C)), strict=True):
        decay = torch.exp(step_t[..., None] * args.A)  # A is discretised exactly, B by Euler
        state = decay * state + (step_t * u_t)[..., None] * B_t[:, :, None]
        outputs.append((C_t[:, :, None] * state).sum(-1))
    y = torch.stack(outputs, dim=-1) if outputs else torch.zeros_like(u)  # (B, K, E, P)
    if args.D is not None:
        y = y + args.D[..., None] * u
    return from_sequences(y, args.routes, args.u.shape[2]).to(out_dtype), state


REFERENCE = ScanBackend(refusal=lambda needs: None, scan=reference_scan)
