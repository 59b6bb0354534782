"""Scan orders as index rules: which token of a grid a scan visits at which position.

Features are never reordered to be scanned. They stay rows of channels in spatial order, and a `Route` says in closed
form where the next row is: two nested strides and a direction. Rows, columns and their reverses of a map are routes,
and so are the orders of several tasks' maps: with the T tasks' tokens as a (T, L) grid, row by row is "task-first"
and column by column is "position-first".
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Route(NamedTuple):
    """An order of all tokens of a (rows, columns) grid that is stored row by row."""

    rows: int
    columns: int
    by_column: bool = False
    reverse: bool = False

    @property
    def length(self) -> int:
        return self.rows * self.columns

    @property
    def is_raster(self) -> bool:
        """Does the route visit the tokens as they are stored?"""
        return not self.by_column and not self.reverse

    @property
    def index_rule(self) -> tuple[int, int, int, int, int]:
        """(outer, inner, outer stride, inner stride, reverse): position p visits token
        p // inner * outer_stride + p % inner * inner_stride, counted from the end if reversed."""
        if self.by_column:
            return self.columns, self.rows, 1, self.columns, int(self.reverse)
        return self.rows, self.columns, self.columns, 1, int(self.reverse)

    def reversed(self) -> "Route":
        return self._replace(reverse=not self.reverse)

    def tokens(self, device: torch.device | None = None) -> Tensor:
        """The token at each position, (length,)."""
        outer, inner, outer_stride, inner_stride, reverse = self.index_rule
        first, second = torch.arange(outer, device=device), torch.arange(inner, device=device)
        tokens = (first[:, None] * outer_stride + second * inner_stride).flatten()
        return tokens.flip(0) if reverse else tokens


def four_routes(height: int, width: int) -> tuple[Route, Route, Route, Route]:
    """Row by row, column by column, and the reverse of each."""
    rows, columns = Route(height, width), Route(height, width, by_column=True)
    return rows, columns, rows.reversed(), columns.reversed()


def to_sequences(x: Tensor, routes: Sequence[Route]) -> Tensor:
    """Rows of C columns, (B, P, G, C) with G groups of consecutive routes, to (B, K, C, P): a copy for each route."""
    parts = []
    for k, route in enumerate(routes):
        rows = x[:, :, k * x.shape[2] // len(routes)]  # (B, P, C)
        parts.append(rows if route.is_raster else rows[:, route.tokens(x.device)])
    return torch.stack(parts, dim=1).mT


def from_sequences(y: Tensor, routes: Sequence[Route], groups: int) -> Tensor:
    """Sequences (B, K, C, P) back to spatial order, and the routes of each group added up: (B, P, G, C)."""
    parts = [y[:, k].mT if route.is_raster else y[:, k].mT[:, route.tokens(y.device).argsort()]
             for k, route in enumerate(routes)]
    share = len(routes) // groups
    return torch.stack([sum(parts[k + 1:k + share], start=parts[k]) for k in range(0, len(routes), share)], dim=2)
