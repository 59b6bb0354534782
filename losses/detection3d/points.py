"""The points of a detection head: where they lie in the image, and what their 13 numbers mean.

The head's output, which losses and decoding take, is a dictionary:

    levels            name -> a dictionary of one level, finest first, of B images and a grid h w:
        classes       (B, K, h, w) logits
        regression    (B, 13, h, w), see `REGRESSION`
        direction     (B, 6, h, w) logits: two half turns for each of three angles
        centerness    (B, 1, h, w) logits
        stride        (B,) float64, side of a cell in pixels of the network's image
    width             (B,) float64, of the network's image in pixels
    direction_offset  (B,) float64, angle at which the half turns begin

All other pixels are those of the frame that boxes and camera are given in: the same image at any resolution. Where a
point lies is computed in float64, because targets change where one lies on a limit.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

Output = Mapping[str, Any]

# Channels of "regression" in their order. offset: of the point from the projected centre, in strides; depth: m; size:
# length, width, height in m; rotation: three angles, modulo pi; box: distances from the point to the left, upper, right
# and lower side of the visible rectangle, in strides.
REGRESSION = {"offset": 2, "depth": 1, "size": 3, "rotation": 3, "box": 4}


class Points(NamedTuple):
    """What the levels predict, joined: P points of all levels, finest level first, each row by row."""

    classes: Tensor  # (B, P, K)
    regression: Tensor  # (B, P, 13)
    direction: Tensor  # (B, P, 3, 2)
    centerness: Tensor  # (B, P)


class Grid(NamedTuple):
    """The cells of all levels in one image. shapes: (h, w) of each level; strides (levels,) in pixels of the frame."""

    shapes: tuple[tuple[int, int], ...]
    strides: Tensor

    def points(self) -> Tensor:
        """(P, 2): x, y in pixels. The middle of a cell is rounded down, as published, also where strides are no whole
        numbers."""
        places = []
        for (height, width), stride in zip(self.shapes, self.strides, strict=True):
            y, x = (torch.arange(size, device=stride.device) * stride + half_of(stride) for size in (height, width))
            places.append(torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1).flatten(0, 1))
        return torch.cat(places)

    def stride_of_points(self) -> Tensor:
        """(P,) in pixels."""
        return torch.cat([stride.expand(h * w) for (h, w), stride in zip(self.shapes, self.strides, strict=True)])


def half_of(stride: Tensor) -> Tensor:
    return (stride / 2).floor()


def joined(output: Output) -> Points:
    """The levels' maps as points, at least in float32."""
    levels = list(output["levels"].values())
    maps = {name: torch.cat([rearrange(level[name], "b c h w -> b (h w) c") for level in levels], dim=1)
            for name in Points._fields}
    maps = {name: value.to(torch.promote_types(value.dtype, torch.float32)) for name, value in maps.items()}
    return Points(maps["classes"], maps["regression"], maps["direction"].unflatten(-1, (3, 2)),
                  maps["centerness"].squeeze(-1))


def grid_of(output: Output, image: int, frame_width: Tensor) -> Grid:
    """The cells in one image of the batch, whose frame is so many pixels wide."""
    levels = list(output["levels"].values())
    strides = torch.stack([level["stride"][image] for level in levels])
    # First times, then divided by: strides and widths that are whole numbers give whole numbers.
    return Grid(tuple(tuple(level["classes"].shape[-2:]) for level in levels),
                strides * frame_width.to(strides) / output["width"][image])
