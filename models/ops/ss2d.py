"""Selective scans with input-dependent parameters (S6), along any routes and along the four routes over a map.

The functions hold no parameters, so every block of the Mamba family can use them with its own names.
References: Gu and Dao, "Mamba", 2023 (S6); Liu et al., "VMamba", 2024 (the four routes).

Axes: those of `models.ops.scan_args`; H W grid of a map, D its channels.
Several maps of one size, each with routes and weights of its own (those of T tasks, say), are groups of one call.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.ops.routes import Route, four_routes
from models.ops.scan_args import project
from models.ops.selective_scan import scan_routes
from utils.precision import product_dtype


class S6Weights(NamedTuple):
    """Weights of K routes, stacked on the leading axis."""

    x_proj: Tensor  # (K, R + 2 N, E): to step-size features, B, C, in this order
    dt_proj_weight: Tensor  # (K, E, R)
    dt_proj_bias: Tensor  # (K, E)
    A_log: Tensor  # (K, E, N): A = -exp(A_log)
    D: Tensor  # (K, E)


def s6_scan(x: Tensor, weights: S6Weights, routes: Sequence[Route], source: Tensor | None = None) -> Tensor:
    """Scans tokens (B, P, G, E) along K routes, in one call; returns (B, P, G, E), for each group the sum of its K / G
    routes, which follow each other in `routes` and `weights`.

    Step sizes, B and C are computed from `source`, where it is given (cross scan): also (B, P, G, E), though it may
    have another number of groups, e.g. one that serves all routes.
    """
    if x.is_cuda and product_dtype(x, x.dtype).itemsize == 2:
        weights = aligned(weights)
    state, rank = weights.A_log.shape[-1], weights.dt_proj_weight.shape[-1]
    features = project(x if source is None else source, weights.x_proj)  # (B, P, K, R + 2 N)
    step_features, B, C = features.split((rank, state, state), dim=-1)
    return scan_routes(x, step_features, -torch.exp(weights.A_log), B, C, routes, D=weights.D,
                       delta_bias=weights.dt_proj_bias, delta_softplus=True, delta_weight=weights.dt_proj_weight)


def aligned(weights: S6Weights) -> S6Weights:
    """Zeros make the rank a multiple of 8, as tensor cores want rows of half precision."""
    rank = weights.dt_proj_weight.shape[-1]
    missing = -rank % 8
    if not missing:
        return weights
    x_proj = torch.cat((weights.x_proj[:, :rank], F.pad(weights.x_proj[:, rank:], (0, 0, missing, 0))), dim=1)
    return weights._replace(x_proj=x_proj, dt_proj_weight=F.pad(weights.dt_proj_weight, (0, missing)))


def ss2d_core(x: Tensor, weights: S6Weights, source: Tensor | None = None, window: int = 0) -> Tensor:
    """Four-route scan of a map (B, H, W, D) with weights of K = 4 routes; returns the sum of the routes.

    Routes: row by row, column by column, and the reverse of each. Step sizes, B and C are computed from
    the map `source` (default x). `window` > 0 visits the map in windows of that side; 0 is the whole map.
    Maps (B, H, W, G, D) are G maps with weights of K = 4 G routes, four for each; a source (B, H, W, D) serves all.
    """
    height, width = x.shape[1:3]
    tokens = [m if m is None else (m if m.dim() == 5 else m.unsqueeze(3)).flatten(1, 2) for m in (x, source)]
    if window:
        y = _window_scan(*tokens, weights, height, width, window)
    else:
        y = s6_scan(tokens[0], weights, four_routes(height, width) * tokens[0].shape[2], tokens[1])
    return y.reshape(x.shape)


def _window_scan(x: Tensor, source: Tensor | None, weights: S6Weights, height: int, width: int, window: int) -> Tensor:
    """No strides describe cut windows: the tokens are copied into window order, once by row and once by column."""
    rows = window_positions(height, width, window, x.device)
    columns = window_positions(width, height, window, x.device).view(width, height).T.flatten()
    total, line, groups = 0, Route(1, height * width), x.shape[2]
    for k, position in enumerate((rows, columns)):  # position of each pixel in route k; k + 2 is its reverse
        order = position.argsort()
        pairs = S6Weights(*(weight.unflatten(0, (groups, 4))[:, k::2].flatten(0, 1) for weight in weights))
        ordered = s6_scan(x[:, order], pairs, (line, line.reversed()) * groups,
                          None if source is None else source[:, order])
        total = total + ordered[:, position]
    return total


def window_positions(height: int, width: int, window: int, device: torch.device | None = None) -> Tensor:
    """Position of each pixel (H * W,), in raster order, when windows and the pixels inside go row by row.

    Windows at the right and lower borders are cut off there.
    """
    y = torch.arange(height, device=device)[:, None]
    x = torch.arange(width, device=device)[None]
    top, left = y // window * window, x // window * window
    rows_here, columns_here = (height - top).clamp(max=window), (width - left).clamp(max=window)
    position = top * width + rows_here * left + (y - top) * columns_here + (x - left)
    return position.flatten()
