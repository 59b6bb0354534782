"""What the benchmarks of the scan compare: single scans, and SS2D and BI-Scan as the literature formulates them, where
the map is stacked, transposed and flipped into sequences and the results of their scans are brought back and added.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from models.decoders.bim import BIScan
from models.ops.routes import Route
from models.ops.selective_scan import scan_routes, selective_scan
from models.ops.ss2d import S6Weights

LENGTH, CHANNELS, STATE = 4032, 384, 16  # a map of 56 x 72 cells, or four of 28 x 36


def with_gradients(forward: Callable[..., Tensor], leaves: list[Tensor]) -> Callable[[], object]:
    """A run of forward and backward pass, with gradients of all leaves, which from now on ask for them."""
    for leaf in leaves:
        leaf.requires_grad_()

    def run():
        y = forward(*leaves)
        return torch.autograd.grad(y, leaves, torch.ones_like(y))
    return run


def without_gradients(forward: Callable[..., Tensor], leaves: list[Tensor]) -> Callable[[], object]:
    return torch.inference_mode()(lambda: forward(*leaves))


PASSES = {"forward": without_gradients, "forward + backward": with_gradients}


def scan_inputs(length: int = LENGTH, channels: int = CHANNELS, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """u, delta, A, B, C, D, delta_bias of `scan_routes`, in the range a trained block has."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    A = -torch.arange(1, STATE + 1) * torch.exp(0.3 * draw(1, channels, STATE))
    return [x.to(dtype) for x in (draw(1, length, 1, channels), draw(1, length, 1, channels), A,
                                  draw(1, length, 1, STATE), draw(1, length, 1, STATE), draw(1, channels),
                                  draw(1, channels) - 4)]


def scan_with(backend: str) -> Callable[..., Tensor]:
    def forward(u, delta, A, B, C, D, bias):
        return scan_routes(u, delta, A, B, C, [Route(1, u.shape[1])], D, bias, True, backend=backend)
    return forward


def parallel_scan() -> Callable[..., Tensor] | None:
    """The scan by the package mambapy (MIT), where it is installed."""
    try:
        from mambapy.pscan import pscan
    except ImportError:
        return None

    def forward(u, delta, A, B, C, D, bias):
        u, step, B, C = u[:, :, 0], F.softplus(delta[:, :, 0] + bias), B[:, :, 0], C[:, :, 0]
        states = pscan(torch.exp(step[..., None] * A[0]), (step * u)[..., None] * B[:, :, None])  # (B, L, D, N)
        return ((states @ C[..., None]).squeeze(-1) + D * u).unsqueeze(2)
    return forward


def usual_ss2d(x: Tensor, weights: S6Weights, scan: Callable[..., Tensor] = selective_scan) -> Tensor:
    """(B, H, W, D) -> (B, H, W, D), by copies in scan order, channels first."""
    height, width = x.shape[1:3]
    rows, columns = rearrange(x, "b h w d -> b d (h w)"), rearrange(x, "b h w d -> b d (w h)")
    forward = torch.stack((rows, columns), dim=1)  # (B, 2, D, L)
    y = usual_scan(torch.cat((forward, forward.flip(-1)), dim=1), weights, scan)
    rows, columns = (y[:, :2] + y[:, 2:].flip(-1)).unbind(1)
    return rearrange(rows, "b d (h w) -> b h w d", h=height) + rearrange(columns, "b d (w h) -> b h w d", h=height)


def usual_scan(sequences: Tensor, weights: S6Weights, scan: Callable[..., Tensor] = selective_scan) -> Tensor:
    """(B, K, D, L) -> (B, K, D, L): projections and one grouped scan over sequences."""
    state, rank = weights.A_log.shape[-1], weights.dt_proj_weight.shape[-1]
    features = weights.x_proj @ sequences
    step_features, B, C = features.split((rank, state, state), dim=2)
    delta = weights.dt_proj_weight @ step_features
    y = scan(sequences.flatten(1, 2), delta.flatten(1, 2), -torch.exp(weights.A_log).flatten(0, 1), B, C,
             weights.D.flatten(), None, weights.dt_proj_bias.flatten(), True)
    return y.unflatten(1, sequences.shape[1:3])


def usual_ss2d_channels_last(x: Tensor, weights: S6Weights) -> Tensor:
    """The same copies as rows of channels, which suits our kernels better than any sequence."""
    height, width = x.shape[1:3]
    forward = torch.stack((x.flatten(1, 2), x.transpose(1, 2).flatten(1, 2)), dim=2)  # (B, L, 2, D)
    sequences = torch.cat((forward, forward.flip(1)), dim=2)
    state, rank = weights.A_log.shape[-1], weights.dt_proj_weight.shape[-1]
    features = torch.einsum("blkd,kfd->blkf", sequences, weights.x_proj)
    step_features, B, C = features.split((rank, state, state), dim=-1)
    delta = torch.einsum("blkr,kdr->blkd", step_features, weights.dt_proj_weight)
    y = scan_routes(sequences, delta, -torch.exp(weights.A_log), B, C, [Route(1, height * width)] * 4,
                    weights.D, weights.dt_proj_bias, True)
    rows, columns = (y[:, :, :2] + y[:, :, 2:].flip(1)).unbind(2)
    return rows.unflatten(1, (height, width)) + columns.unflatten(1, (width, height)).transpose(1, 2)


def usual_bi_scan(module: BIScan, feat: Tensor, scan: Callable[..., Tensor] = selective_scan) -> Tensor:
    """(B, H, W, T, D) -> (B, H, W, T, D), by copies in scan order."""
    height, tasks = feat.shape[1], feat.shape[3]
    forward, backward = rearrange(feat, "b h w t d -> b d (t h w)").chunk(2, dim=1)
    halves = torch.stack((forward, backward.flip(-1)), dim=1)  # (B, 2, D / 2, T L)
    halves = usual_scan(halves, module.pair("tf"), scan)
    halves = rearrange(halves, "b k d (t q) -> b k d (q t)", t=tasks)
    halves = usual_scan(halves, module.pair("pf"), scan)
    both = torch.cat((halves[:, 0], halves[:, 1].flip(-1)), dim=1)
    return rearrange(both, "b d (h w t) -> b h w t d", h=height, t=tasks)
