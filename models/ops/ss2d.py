"""Selective scans with input-dependent parameters (S6), along sequences and along the four routes over a map.

The functions hold no parameters, so every block of the Mamba family can use them with its own names.
References: Gu and Dao, "Mamba", 2023 (S6); Liu et al., "VMamba", 2024 (the four routes).

Axes: B batch, K routes with weights of their own, D channels, N state, R step-size rank, H W grid, L = H * W.
"""

from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from models.ops.selective_scan import selective_scan


class S6Weights(NamedTuple):
    """Weights of K routes, stacked on the leading axis."""

    x_proj: Tensor  # (K, R + 2 N, D): to step-size features, B, C, in this order
    dt_proj_weight: Tensor  # (K, D, R)
    dt_proj_bias: Tensor  # (K, D)
    A_log: Tensor  # (K, D, N): A = -exp(A_log)
    D: Tensor  # (K, D)


def s6_scan(sequences: Tensor, weights: S6Weights, source: Tensor | None = None) -> Tensor:
    """Scans K sequences (B, K, D, L), each with its own weights, in one call; returns (B, K, D, L).

    Step sizes, B and C are computed from `source`, of the same shape, where it is given (cross scan).
    """
    state, rank = weights.A_log.shape[-1], weights.dt_proj_weight.shape[-1]
    features = weights.x_proj @ (sequences if source is None else source)  # (B, K, R + 2 N, L)
    step_features, in_maps, out_maps = features.split((rank, state, state), dim=2)
    delta = weights.dt_proj_weight @ step_features  # (B, K, D, L); the bias is added inside the scan
    y = selective_scan(
        sequences.flatten(1, 2), delta.flatten(1, 2), -torch.exp(weights.A_log).flatten(0, 1), in_maps,
        out_maps, D=weights.D.flatten(), delta_bias=weights.dt_proj_bias.flatten(), delta_softplus=True)
    return y.unflatten(1, (sequences.shape[1], -1))  # (B, K D, L) -> (B, K, D, L)


def ss2d_core(x: Tensor, weights: S6Weights, source: Tensor | None = None, window: int = 0) -> Tensor:
    """Four-route scan of a map (B, D, H, W) with weights of K = 4 routes; returns the sum of the routes.

    Routes: row by row, column by column, and the reverse of each. Step sizes, B and C are computed from
    the map `source` (default x). `window` > 0 visits the map in windows of that side; 0 is the whole map.
    """
    height, width = x.shape[-2:]
    sequences = map_to_routes(x, window)
    y = s6_scan(sequences, weights, None if source is None else map_to_routes(source, window))
    return routes_to_map(y, height, width, window)


def map_to_routes(x: Tensor, window: int = 0) -> Tensor:
    """(B, D, H, W) -> (B, 4, D, L)."""
    height, width = x.shape[-2:]
    rows = rearrange(x, "b d h w -> b d (h w)")
    columns = rearrange(x, "b d h w -> b d (w h)")
    if window:
        rows = rows[..., window_positions(height, width, window, x.device).argsort()]
        columns = columns[..., window_positions(width, height, window, x.device).argsort()]
    forward = torch.stack((rows, columns), dim=1)  # (B, 2, D, L)
    return torch.cat((forward, forward.flip(-1)), dim=1)


def routes_to_map(y: Tensor, height: int, width: int, window: int = 0) -> Tensor:
    """(B, 4, D, L) -> (B, D, H, W): brings the four routes back to image order and adds them."""
    rows, columns = (y[:, :2] + y[:, 2:].flip(-1)).unbind(1)  # (B, D, L) each
    if window:
        rows = rows[..., window_positions(height, width, window, y.device)]
        columns = columns[..., window_positions(width, height, window, y.device)]
    # The column sequence is a (W, H) raster: reading it as (H, W) would go unnoticed on square maps only.
    return (rearrange(rows, "b d (h w) -> b d h w", h=height)
            + rearrange(columns, "b d (w h) -> b d h w", h=height))


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
