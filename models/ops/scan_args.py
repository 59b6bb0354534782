"""The arguments of one scan call: checked once, in one canonical form that every backend reads.

Axes, in all files of the scan: B batch, P tokens or positions of a route, K routes, each with parameters of its own, G
groups of K / G consecutive routes that read the same tokens, E channels of a route, N state, R rank of the step size.
(B, C and D are also names of parameters, as in the literature.)
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.ops.routes import Route
from utils.precision import product_dtype

TILE, BUSY_BLOCKS = 64, 512  # side of a part of a matrix product's result; parts that keep a GPU busy


class ScanArgs(NamedTuple):
    """Tokens in spatial order, rows of channels; parameters per route."""

    u: Tensor  # (B, P, G, E): the routes of a group read the same tokens, and their results are added up
    delta: Tensor  # (B, P, K, E): step size before bias and softplus; (B, P, K, R) with delta_weight
    A: Tensor  # (K, E, N)
    B: Tensor  # (B, P, K, N)
    C: Tensor  # (B, P, K, N)
    D: Tensor | None  # (K, E)
    delta_bias: Tensor | None  # (K, E)
    delta_weight: Tensor | None  # (K, E, R): brings step sizes of low rank to the channels
    routes: tuple[Route, ...]
    delta_softplus: bool
    delta_is_scratch: bool = False  # may the backward pass write over delta?

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensor arguments that are present, by name."""
        return {name: value for name, value in self._asdict().items() if isinstance(value, Tensor)}

    @property
    def routes_per_group(self) -> int:
        return len(self.routes) // self.u.shape[2]

    @property
    def scan_dtype(self) -> torch.dtype:
        """float32, or float64 when any input is float64: the recurrence never runs in half precision."""
        double = any(tensor.dtype == torch.float64 for tensor in self.tensors.values())
        return torch.float64 if double else torch.float32

    def with_full_delta(self) -> "ScanArgs":
        """The same scan with step sizes for all channels, in place of those of low rank."""
        if self.delta_weight is None:
            return self
        return self._replace(delta=project(self.delta, self.delta_weight.to(self.delta.dtype)), delta_weight=None,
                             delta_is_scratch=True)

    def to_scan_dtype(self) -> "ScanArgs":
        return self._replace(**{name: value.to(self.scan_dtype) for name, value in self.tensors.items()})


def project(x: Tensor, weight: Tensor) -> Tensor:
    """Rows (B, P, G, E) with weights (K, F, E) of K routes, K / G for each group, to (B, P, K, F)."""
    routes, features, _ = weight.shape
    weight = weight.unflatten(0, (x.shape[2], -1)).flatten(1, 2)  # (G, K / G F, E)
    if x.is_cuda and not torch.compiler.is_compiling():
        dtype = product_dtype(x, x.dtype)
        return Projection.apply(x.to(dtype), weight.to(dtype)).unflatten(3, (-1, features)).flatten(2, 3)
    if x.shape[2] == 1:
        return F.linear(x.squeeze(2), weight[0]).unflatten(2, (routes, features))
    return torch.einsum("bpge,gfe->bpgf", x, weight).unflatten(3, (-1, features)).flatten(2, 3)


class Projection(torch.autograd.Function):
    """(B, P, G, E), (G, F, E) -> (B, P, G, F) as a GPU likes it: no copies, and no long sum in few blocks."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return rows_by_weights(x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return (rows_by_weights(grad, weight.mT) if wanted[0] else None,
                sum_of_products(grad, x).to(weight.dtype) if wanted[1] else None)


def rows_by_weights(x: Tensor, weight: Tensor) -> Tensor:
    """(B, P, G, E), (G, F, E) -> (B, P, G, F), written where it belongs."""
    out = x.new_empty(*x.shape[:3], weight.shape[1])
    torch.bmm(x.flatten(0, 1).transpose(0, 1), weight.mT, out=out.flatten(0, 1).transpose(0, 1))
    return out


def sum_of_products(left: Tensor, right: Tensor) -> Tensor:
    """(B, P, G, F) and (B, P, G, E) to (G, F, E), summed over tokens, piece by piece and then in float32 or better.

    One product with so long a sum and so small a result would leave most of a GPU idle. A piece is every n-th token, so
    that pieces and groups are one axis of the tensors as they lie.
    """
    groups, tokens = left.shape[2], left.shape[0] * left.shape[1]
    tiles = groups * -(-left.shape[3] // TILE) * -(-right.shape[3] // TILE)
    pieces = max(n for n in range(1, max(1, BUSY_BLOCKS // tiles) + 1) if tokens % n == 0)
    left, right = (x.reshape(tokens // pieces, pieces * groups, x.shape[3]).transpose(0, 1) for x in (left, right))
    parts = torch.bmm(left.mT, right).unflatten(0, (pieces, groups))
    return parts.sum(0, dtype=torch.promote_types(parts.dtype, torch.float32))


def check_scan(args: ScanArgs) -> None:
    """Raises ValueError naming the argument, its shape and the shape it should have."""
    if args.delta.dim() != 4 or args.A.dim() != 3:
        raise ValueError(f"scan needs delta (B, P, K, E) and A (K, E, N), got delta {tuple(args.delta.shape)} "
                         f"and A {tuple(args.A.shape)}")
    batch, tokens, num_routes, rank = args.delta.shape
    channels, state = rank if args.delta_weight is None else args.A.shape[1], args.A.shape[2]
    groups = args.u.shape[2] if args.u.dim() == 4 else 0
    if groups < 1 or num_routes % groups or tuple(args.u.shape) != (batch, tokens, groups, channels):
        raise ValueError(f"scan: u has shape {tuple(args.u.shape)}, expected ({batch}, {tokens}, G, {channels}) with G "
                         f"groups that divide {num_routes} routes, for delta {tuple(args.delta.shape)}")
    per_state, per_channel = (batch, tokens, num_routes, state), (num_routes, channels)
    expected = {"u": tuple(args.u.shape), "delta": (*per_state[:3], rank), "A": (*per_channel, state), "B": per_state,
                "C": per_state, "D": per_channel, "delta_bias": per_channel, "delta_weight": (*per_channel, rank)}
    for name, tensor in args.tensors.items():
        if tuple(tensor.shape) != expected[name]:
            raise ValueError(f"scan: {name} has shape {tuple(tensor.shape)}, expected {expected[name]} for delta "
                             f"{tuple(args.delta.shape)}")
        check_tensor(name, tensor, args.delta)
    if len(args.routes) != num_routes or any(route.length != tokens for route in args.routes):
        raise ValueError(f"scan: {num_routes} parameters over {tokens} tokens need as many routes of that length, got "
                         f"{', '.join(f'{r.rows} x {r.columns}' for r in args.routes) or 'none'}")


def check_tensor(name: str, tensor: Tensor, like: Tensor) -> None:
    """Raises ValueError where the tensor is on another device than `like` or not of a floating type."""
    if tensor.device != like.device:
        raise ValueError(f"scan: {name} is on {tensor.device}, other arguments on {like.device}")
    if not tensor.is_floating_point():
        raise ValueError(f"scan: {name} has dtype {tensor.dtype}, expected floating point")
