"""The scan as PyTorch's own operator `scan`, which exporters know: a loop over the tokens, one step of all routes each.

For `--run_mode export`, where the recurrence has to be there in standard operators; ONNX has one of the same name. It
keeps one state, not one for every token. Routes are transposed and reversed maps, so that sizes may be left open, and
those of one order are arranged together, so that their number adds no operators.

Inside, tokens come first: (P, B, K, E) and (P, B, K, N).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.scan import scan

from models.ops.routes import Route
from models.ops.scan_args import ScanArgs
from models.ops.scan_choice import ScanBackend


def standard_scan(args: ScanArgs) -> tuple[Tensor, Tensor]:
    """Returns y, like u and in its dtype, and the last state (B, K, E, N) in the scan's dtype."""
    args, out_dtype, routes = args.to_scan_dtype(), args.u.dtype, args.routes
    u, step, B, C = (_along(x, routes) for x in (args.u, args.delta, args.B, args.C))
    if args.delta_bias is not None:
        step = step + args.delta_bias
    if args.delta_softplus:
        step = F.softplus(step)
    rate = args.A

    def advance(state: Tensor, token: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        step_t, u_t, B_t, C_t = token  # (B, K, E), (B, K, N)
        state = torch.exp(step_t[..., None] * rate) * state + (step_t * u_t)[..., None] * B_t[:, :, None]
        return state, (C_t[:, :, None] * state).sum(-1)

    first = step.new_zeros(*step.shape[1:], rate.shape[-1])  # (B, K, E, N)
    last, y = scan(advance, first, (step, u, B, C))
    if args.D is not None:
        y = y + args.D * u
    y = _ordered(y, routes, back=True).unflatten(2, (args.u.shape[2], -1)).sum(3)  # (P, B, G, E)
    return y.movedim(0, 1).to(out_dtype), last


def _along(x: Tensor, routes: Sequence[Route]) -> Tensor:
    """Rows (B, P, G, C) of groups of routes to (P, B, K, C), each in the order of its route."""
    rows = x.movedim(1, 0)  # (P, B, G, C)
    if x.shape[2] < len(routes):
        rows = rows.repeat_interleave(len(routes) // x.shape[2], dim=2)
    return _ordered(rows, routes)


def _ordered(rows: Tensor, routes: Sequence[Route], back: bool = False) -> Tensor:
    """Rows (P, B, K, C) in spatial order to the same along their routes, or back."""
    orders: list[Route] = []  # each once; a list, because sizes that are left open have no hash
    for route in routes:
        if route not in orders:
            orders.append(route)
    numbers = [[k for k, route in enumerate(routes) if route == order] for order in orders]
    parts = [_one_order(rows[:, :, own], order, back) for order, own in zip(orders, numbers, strict=True)]
    places = [k for own in numbers for k in own]
    return torch.cat(parts, dim=2)[:, :, [places.index(k) for k in range(len(routes))]]


def _one_order(rows: Tensor, route: Route, back: bool) -> Tensor:
    if back and route.reverse:
        rows = rows.flip(0)
    if route.by_column:
        shape = (route.columns, route.rows) if back else (route.rows, route.columns)
        rows = rows.unflatten(0, shape).transpose(0, 1).flatten(0, 1)
    return rows.flip(0) if route.reverse and not back else rows


STANDARD = ScanBackend(refusal=lambda needs: None, scan=standard_scan)
