"""Triton kernels of layer norms, alone and times the SiLU of a gate: every map is read once and written once.

A program holds whole rows, so that a row's sums stay inside it. There are no atomics: in the backward pass a program
takes every n-th block of rows of one task and writes its part of the gradients of scale and shift; the parts are added
in a fixed order. Arithmetic is in float32, whatever the maps are stored in. The same source runs on CUDA and, with
TRITON_INTERPRET=1, on a CPU.

Axes: t task, i row of a task, c channel. WIDTH channels of a tile, padded to a power of two; ROWS rows.
Arguments: Map, of `models.ops.norms`: address and strides of a tensor (t, i, c) whose channels lie side by side.
Reference: Ba et al., "Layer Normalization", 2016.
"""

import triton
import triton.language as tl


@triton.jit
def place(rows, t, i, c):
    return rows.data + t * rows.task + i[:, None] * rows.row + c[None, :]


@triton.jit
def normed(x, scale, shift, t, i, c, exist, eps, CHANNELS: tl.constexpr):
    """Rows, scaled and shifted, and their mean and the inverse of their deviation."""
    value = tl.load(place(x, t, i, c), exist, 0.0).to(tl.float32)
    centre = tl.sum(value, 1) / CHANNELS
    value = tl.where(exist, value - centre[:, None], 0.0)
    inverse = 1 / tl.sqrt(tl.sum(value * value, 1) / CHANNELS + eps)
    factor = tl.load(scale + t * CHANNELS + c, c < CHANNELS, 0.0).to(tl.float32)
    addend = tl.load(shift + t * CHANNELS + c, c < CHANNELS, 0.0).to(tl.float32)
    value = value * inverse[:, None] * factor[None, :] + addend[None, :]
    return value, centre, inverse


@triton.jit
def norm_kernel(x, gate, scale, shift, out, mean, rstd, rows, eps, GATED: tl.constexpr, CHANNELS: tl.constexpr,
                WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """out = (x - mean) * rstd * scale + shift, times gate * sigmoid(gate) if GATED; mean and rstd (t, i)."""
    t, c = tl.program_id(1).to(tl.int64), tl.arange(0, WIDTH)
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exist = (i < rows)[:, None] & (c < CHANNELS)[None, :]
    value, centre, inverse = normed(x, scale, shift, t, i, c, exist, eps, CHANNELS)
    if GATED:
        opened = tl.load(place(gate, t, i, c), exist, 0.0).to(tl.float32)
        value = value * opened / (1 + tl.exp(-opened))
    tl.store(place(out, t, i, c), value, exist)
    tl.store(mean + t * rows + i, centre, i < rows)
    tl.store(rstd + t * rows + i, inverse, i < rows)


@triton.jit
def norm_backward_kernel(grad, x, gate, scale, shift, mean, rstd, grad_x, grad_gate, parts, rows, GATED: tl.constexpr,
                         CHANNELS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Gradients of x and gate, and a part (program, 2, t, c) of those of scale and shift."""
    t, c = tl.program_id(1).to(tl.int64), tl.arange(0, WIDTH)
    factor = tl.load(scale + t * CHANNELS + c, c < CHANNELS, 0.0).to(tl.float32)[None, :]
    addend = tl.load(shift + t * CHANNELS + c, c < CHANNELS, 0.0).to(tl.float32)[None, :]
    sum_scale, sum_shift = tl.zeros((ROWS, WIDTH), tl.float32), tl.zeros((ROWS, WIDTH), tl.float32)
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        i = first + tl.arange(0, ROWS).to(tl.int64)
        exist = (i < rows)[:, None] & (c < CHANNELS)[None, :]
        slope = tl.load(place(grad, t, i, c), exist, 0.0).to(tl.float32)
        normed = tl.load(place(x, t, i, c), exist, 0.0).to(tl.float32)
        inverse = tl.load(rstd + t * rows + i, i < rows, 0.0)[:, None]
        normed = (normed - tl.load(mean + t * rows + i, i < rows, 0.0)[:, None]) * inverse
        if GATED:
            opened = tl.load(place(gate, t, i, c), exist, 0.0).to(tl.float32)
            share = 1 / (1 + tl.exp(-opened))
            value = slope * (normed * factor + addend) * share * (1 + opened * (1 - share))
            tl.store(place(grad_gate, t, i, c), value, exist)
            slope = slope * opened * share
        normed = tl.where(exist, normed, 0.0)
        sum_scale += slope * normed
        sum_shift += slope
        slope = slope * factor
        along = tl.sum(slope * normed, 1)[:, None] / CHANNELS
        value = (slope - tl.sum(slope, 1)[:, None] / CHANNELS - normed * along) * inverse
        tl.store(place(grad_x, t, i, c), value, exist)
    part = tl.program_id(0) * 2 * tl.num_programs(1) + t
    tl.store(parts + part * CHANNELS + c, tl.sum(sum_scale, 0), c < CHANNELS)
    tl.store(parts + (part + tl.num_programs(1)) * CHANNELS + c, tl.sum(sum_shift, 0), c < CHANNELS)


@triton.jit
def norm_product_kernel(x, scale, shift, weight, bias, out, mean, rstd, rows, eps, OUTPUTS: tl.constexpr,
                        CHANNELS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """The normed rows times weight (t, output, c), plus bias (t, output): out (t, i, output). Only that is stored."""
    t, c = tl.program_id(1).to(tl.int64), tl.arange(0, WIDTH)
    i = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exist = (i < rows)[:, None] & (c < CHANNELS)[None, :]
    value, centre, inverse = normed(x, scale, shift, t, i, c, exist, eps, CHANNELS)
    for output in tl.static_range(OUTPUTS):
        row = t * OUTPUTS + output
        share = tl.load(weight + row * CHANNELS + c, c < CHANNELS, 0.0).to(tl.float32)
        total = tl.sum(value * share[None, :], 1) + tl.load(bias + row).to(tl.float32)
        tl.store(out + (t * rows + i) * OUTPUTS + output, total, i < rows)
    tl.store(mean + t * rows + i, centre, i < rows)
    tl.store(rstd + t * rows + i, inverse, i < rows)


@triton.jit
def add_output(grad, weight, i, t, c, rows, normed, slope, total, OUTPUT: tl.constexpr, OUTPUTS: tl.constexpr,
               CHANNELS: tl.constexpr):
    """What one output adds to the gradient of the normed rows, and to its sum of their products with its own."""
    if OUTPUT < OUTPUTS:
        own = tl.load(grad + (t * rows + i) * OUTPUTS + OUTPUT, i < rows, 0.0).to(tl.float32)[:, None]
        share = tl.load(weight + (t * OUTPUTS + OUTPUT) * CHANNELS + c, c < CHANNELS, 0.0).to(tl.float32)
        slope += own * share[None, :]
        total += own * normed
    return slope, total


@triton.jit
def store_sum(totals, total, t, c, OUTPUT: tl.constexpr, OUTPUTS: tl.constexpr, CHANNELS: tl.constexpr):
    if OUTPUT < OUTPUTS:
        row = (tl.program_id(0) * tl.num_programs(1) + t) * OUTPUTS + OUTPUT
        tl.store(totals + row * CHANNELS + c, tl.sum(total, 0), c < CHANNELS)


@triton.jit
def norm_product_backward_kernel(grad, x, scale, weight, mean, rstd, grad_x, totals, rows, OUTPUTS: tl.constexpr,
                                 CHANNELS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):
    """Gradient of x from that of up to 4 outputs (t, i, output), and a part (program, t, output, c) of the sums of
    products of these with the rows as they are before scale and shift, of which all other gradients are made."""
    t, c = tl.program_id(1).to(tl.int64), tl.arange(0, WIDTH)
    factor = tl.load(scale + t * CHANNELS + c, c < CHANNELS, 0.0).to(tl.float32)[None, :]
    zeros = tl.zeros((ROWS, WIDTH), tl.float32)
    total0, total1, total2, total3 = zeros, zeros, zeros, zeros
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        i = first + tl.arange(0, ROWS).to(tl.int64)
        exist = (i < rows)[:, None] & (c < CHANNELS)[None, :]
        normed = tl.load(place(x, t, i, c), exist, 0.0).to(tl.float32)
        inverse = tl.load(rstd + t * rows + i, i < rows, 0.0)[:, None]
        normed = (normed - tl.load(mean + t * rows + i, i < rows, 0.0)[:, None]) * inverse
        normed = tl.where(exist, normed, 0.0)
        slope = tl.zeros((ROWS, WIDTH), tl.float32)
        slope, total0 = add_output(grad, weight, i, t, c, rows, normed, slope, total0, 0, OUTPUTS, CHANNELS)
        slope, total1 = add_output(grad, weight, i, t, c, rows, normed, slope, total1, 1, OUTPUTS, CHANNELS)
        slope, total2 = add_output(grad, weight, i, t, c, rows, normed, slope, total2, 2, OUTPUTS, CHANNELS)
        slope, total3 = add_output(grad, weight, i, t, c, rows, normed, slope, total3, 3, OUTPUTS, CHANNELS)
        slope = slope * factor
        along = tl.sum(slope * normed, 1)[:, None] / CHANNELS
        value = (slope - tl.sum(slope, 1)[:, None] / CHANNELS - normed * along) * inverse
        tl.store(place(grad_x, t, i, c), value, exist)
    store_sum(totals, total0, t, c, 0, OUTPUTS, CHANNELS)
    store_sum(totals, total1, t, c, 1, OUTPUTS, CHANNELS)
    store_sum(totals, total2, t, c, 2, OUTPUTS, CHANNELS)
    store_sum(totals, total3, t, c, 3, OUTPUTS, CHANNELS)
