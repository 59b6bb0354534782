"""Edge orientation and non-maximum suppression (Dollar and Zitnick, "Fast Edge Detection Using Structured Forests",
PAMI 2015): what the boundary benchmark does to a probability map before it is thresholded.

Decisions at a comparison depend on the last bit of the numbers compared. So the arithmetic is that of the published
tool, in single precision and in its order, and the suppressed maps of the reference set are equal bit for bit. Only the
angle functions are evaluated in double precision and rounded: the C libraries' single-precision ones differ among each
other.
"""

import numpy as np

RADIUS = 4                        # of the triangle filter [1 2 3 4 5 4 3 2 1] / 25
TOLERANCE = np.float32(1.01)      # a pixel survives if no neighbour across the edge is 1 % stronger
BORDER = 5                        # width of the damped frame
PI, EPSILON = np.float32(np.pi), np.float32(1e-5)


def orientation(edges: np.ndarray) -> np.ndarray:
    """Angle of the edges' normal in a float32 H x W map, float32 radians in [0, pi]; arbitrary where it is flat."""
    smooth = smoothed(edges)
    d_x, d_y = _slope(smooth, 1), _slope(smooth, 0)
    d_xx, d_xy, d_yy = _slope(d_x, 1), _slope(d_y, 1), _slope(d_y, 0)
    angle = np.arctan((d_yy * np.sign(-d_xy) / (d_xx + EPSILON)).astype(np.float64)).astype(np.float32)
    return np.mod(angle, PI)


def smoothed(edges: np.ndarray) -> np.ndarray:
    """The triangle filter of a float32 H x W map along x, with the scale of both axes, then along y."""
    along_x = _running_triangle(edges.T, np.float32(1 / (RADIUS + 1) ** 4)).T
    return _running_triangle(along_x, np.float32(1))


def _running_triangle(values: np.ndarray, scale: np.float32) -> np.ndarray:
    """Triangle filter along the first axis, the border mirrored with its pixel, as two running sums in float32.

    The second difference of a triangle has three terms. `scale` is applied to the slope before the second sum.
    """
    before, n = RADIUS + 1, len(values)
    padded = np.pad(values, ((before, RADIUS), (0, 0)), mode="symmetric")
    head = np.cumsum(padded[before:2 * before], axis=0)                # the triangle at 0 lies half beyond the border
    first = np.float32(2) * np.cumsum(head, axis=0)[-1] - head[-1]
    second = padded[:n - 1] + padded[2 * before:] - np.float32(2) * padded[before:before + n - 1]
    slope = np.cumsum(second, axis=0)
    return np.cumsum(np.concatenate([scale * first[None], scale * slope]), axis=0)


def suppress(edges: np.ndarray) -> np.ndarray:
    """Keeps the ridges of a float32 H x W map in [0, 1], sets the rest to 0, and damps the five border pixels."""
    height, width = edges.shape
    rows, columns = np.nonzero(edges > 0)
    value, angle = edges[rows, columns], orientation(edges)[rows, columns].astype(np.float64)  # (N,): positive pixels
    across, down = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    keep = np.ones(len(value), bool)
    for side in (np.float32(-1), np.float32(1)):
        beside = _bilinear(edges, columns.astype(np.float32) + side * across, rows.astype(np.float32) + side * down)
        keep &= value * TOLERANCE >= beside
    ridges = np.zeros_like(edges)
    ridges[rows[keep], columns[keep]] = value[keep]
    frame = min(BORDER, width // 2, height // 2)
    for lines in (ridges.T, ridges):                                   # columns, then rows
        for k in range(frame):
            lines[[k, len(lines) - 1 - k]] *= np.float32(k / frame)
    return ridges


def _slope(values: np.ndarray, axis: int) -> np.ndarray:
    """Central differences, one-sided at the border; 0 along a side of one pixel."""
    return np.zeros_like(values) if values.shape[axis] < 2 else np.gradient(values, axis=axis)


def _bilinear(values: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Interpolated values (H, W) at points (N,), which are moved into the map where they lie outside."""
    height, width = values.shape
    x = np.clip(x, np.float32(0), np.float32(max(width - 1.001, 0)))
    y = np.clip(y, np.float32(0), np.float32(max(height - 1.001, 0)))
    left, top = x.astype(np.intp), y.astype(np.intp)
    right, below = np.minimum(left + 1, width - 1), np.minimum(top + 1, height - 1)
    dx, dy = x - left.astype(np.float32), y - top.astype(np.float32)
    return ((1 - dx) * (1 - dy) * values[top, left] + dx * (1 - dy) * values[top, right]
            + (1 - dx) * dy * values[below, left] + dx * dy * values[below, right])
