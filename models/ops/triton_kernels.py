"""Triton kernels of the scan: one program walks a span of a route over one block of channels.

A tile is (N, E): states by channels, so that a thread owns whole channels, sums over the state stay inside it, and rows
of channels are read as they lie in memory. The order is an index rule, stepped along; nothing is permuted. Spans run in
parallel: first every span from a zero state (`span_ends`), then the short scan over spans (`join_spans`), then every
span again from its true entry (`walk_forward`, `walk_backward`). There are no atomics: programs that share a sum write
their part of it, and the parts are added in a fixed order.

The same source runs on CUDA and, with TRITON_INTERPRET=1, on a CPU. The dtype of A, float32 or float64, is that of the
arithmetic. A is multiplied by log2(e) beforehand.

Reference: Gu and Dao, "Mamba", 2023, section 3.3; Dao and Gu, "Mamba-2", 2024, section 6 (chunks of time in parallel).
"""

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def softplus_and_slope(x):
    """log(1 + exp(x)) and its derivative; above 20 the identity and 1, as in PyTorch."""
    small = tl.exp(-tl.abs(x))
    z = small / (2 + small)  # log1p(small) = 2 atanh(z), as a series: z <= 1/3
    square, total = z * z, z * 0
    if x.dtype == tl.float64:
        for i in tl.static_range(18):
            total = total * square + 1.0 / (35 - 2 * i)
    else:
        for i in tl.static_range(8):
            total = total * square + 1.0 / (15 - 2 * i)
    soft = tl.maximum(x, 0.0) + 2 * z * total
    slope = tl.where(x >= 0, 1 / (1 + small), small / (1 + small))
    soft = tl.where(x != x, x, soft)  # NaN goes on
    return tl.where(x > 20, x, soft), tl.where(x > 20, 1.0, slope)


@triton.jit
def enter(routes, k, position):
    """Row and column of the position on route k, its strides, its row length and its direction."""
    outer, inner = tl.load(routes + 5 * k), tl.load(routes + 5 * k + 1)
    reverse = tl.load(routes + 5 * k + 4)
    q = tl.where(reverse != 0, outer * inner - 1 - position, position)
    return q // inner, q % inner, tl.load(routes + 5 * k + 2), tl.load(routes + 5 * k + 3), inner, 1 - 2 * reverse


@triton.jit
def advance(i, j, inner, direction):
    """The next row and column; with the direction negated, the one before."""
    j += direction
    over, under = (j == inner).to(tl.int64), (j < 0).to(tl.int64)
    j = tl.where(over != 0, 0, tl.where(under != 0, inner - 1, j))
    return i + over - under, j


@triton.jit
def load_step(delta, bias, offset, inside, dtype: tl.constexpr, SOFTPLUS: tl.constexpr):
    """Step sizes of one token and their slope; zero outside the channels, so that nothing happens there."""
    step = tl.load(delta + offset, inside, 0.0).to(dtype) + bias
    slope = tl.full(step.shape, 1.0, dtype)
    if SOFTPLUS:
        step, slope = softplus_and_slope(step)
    return tl.where(inside, step, 0.0), slope


@triton.jit(do_not_specialize=["tokens", "span"])
def span_ends(u, delta, A, B, bias, routes, ends, step_sums, grad_y, u_b, u_t, u_k, d_b, d_t, d_k, m_b, m_t, m_k, g_b,
              g_t, g_k, tokens, groups, channels, states, span, SOFTPLUS: tl.constexpr, BACK: tl.constexpr,
              N: tl.constexpr, E: tl.constexpr):
    """State behind each span that began with zero, and the sum of its steps; or, with BACK, the adjoint before each
    span behind which it is zero (`B` is then C, and `grad_y` takes the place of step * u)."""
    index, b, k = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64) // groups, tl.program_id(2) % groups
    e, n = tl.program_id(1) * E + tl.arange(0, E), tl.arange(0, N)
    inside, kept = e < channels, n < states
    both = kept[:, None] & inside[None, :]
    dtype: tl.constexpr = A.dtype.element_ty
    a = tl.load(A + (k * states + n[:, None]) * channels + e[None, :], both, 0.0)
    bias_row = tl.load(bias + k * channels + e, inside, 0.0)
    begin = index * span
    end = tl.minimum(begin + span, tokens)
    first = begin
    if BACK:
        first = end - 1
    i, j, outer_stride, inner_stride, inner, direction = enter(routes, k, first)
    if BACK:
        direction = -direction
    state, total = tl.zeros((N, E), dtype), tl.zeros((E,), dtype)
    for _ in range(begin, end):
        token = i * outer_stride + j * inner_stride
        step, _slope = load_step(delta, bias_row, b * d_b + token * d_t + k * d_k + e, inside, dtype, SOFTPLUS)
        row = tl.load(B + b * m_b + token * m_t + k * m_k + n, kept, 0.0).to(dtype)
        decay = tl.exp2(a * step[None, :])
        if BACK:
            out = tl.load(grad_y + b * g_b + token * g_t + k * g_k + e, inside, 0.0).to(dtype)
            state = decay * (state + row[:, None] * out[None, :])
        else:
            push = step * tl.load(u + b * u_b + token * u_t + k * u_k + e, inside, 0.0).to(dtype)
            state = decay * state + row[:, None] * push[None, :]
        total += step
        i, j = advance(i, j, inner, direction)
    chain = index * tl.num_programs(2) + tl.program_id(2)
    tl.store(ends + (chain * states + n[:, None]) * channels + e[None, :], state, both)
    tl.store(step_sums + chain * channels + e, total, inside)


@triton.jit(do_not_specialize=["spans"])
def join_spans(A, ends, step_sums, initial, spans, groups, channels, states, BACK: tl.constexpr, N: tl.constexpr,
               E: tl.constexpr):
    """Replaces what `span_ends` found by what enters each span: span after span, or with BACK from the last one."""
    chain, chains, k = tl.program_id(1).to(tl.int64), tl.num_programs(1), tl.program_id(1) % groups
    e, n = tl.program_id(0) * E + tl.arange(0, E), tl.arange(0, N)
    both = (n < states)[:, None] & (e < channels)[None, :]
    tile = n[:, None] * channels + e[None, :]
    a = tl.load(A + k * states * channels + tile, both, 0.0)
    state = tl.load(initial + chain * states * channels + tile, both, 0.0)
    for count in range(spans):
        index = count
        if BACK:
            index = spans - 1 - count
        here = index * chains + chain
        local = tl.load(ends + here * states * channels + tile, both, 0.0)
        tl.store(ends + here * states * channels + tile, state, both)
        total = tl.load(step_sums + here * channels + e, e < channels, 0.0)
        state = tl.exp2(a * total[None, :]) * state + local


@triton.jit(do_not_specialize=["tokens", "span", "first_group"])
def walk_forward(u, delta, A, B, C, D, bias, routes, starts, y, entries, last_state, u_b, u_t, u_k, d_b, d_t, d_k, B_b,
                 B_t, B_k, C_b, C_t, C_k, y_b, y_t, y_k, tokens, groups, channels, states, span, first_group,
                 launched_groups, SOFTPLUS: tl.constexpr, KEEP: tl.constexpr, ADD: tl.constexpr, CHUNK: tl.constexpr,
                 N: tl.constexpr, E: tl.constexpr):
    """y of a span from its true entry, the states entering its chunks and, behind the last span, the last state."""
    index, b = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64) // launched_groups
    k = first_group + tl.program_id(2) % launched_groups
    chain, chains = b * groups + k, tl.num_programs(2) // launched_groups * groups
    e, n = tl.program_id(1) * E + tl.arange(0, E), tl.arange(0, N)
    inside, kept = e < channels, n < states
    both = kept[:, None] & inside[None, :]
    tile = n[:, None] * channels + e[None, :]
    dtype: tl.constexpr = A.dtype.element_ty
    a = tl.load(A + k * states * channels + tile, both, 0.0)
    bias_row, skip = tl.load(bias + k * channels + e, inside, 0.0), tl.load(D + k * channels + e, inside, 0.0)
    state = tl.load(starts + (index * chains + chain) * states * channels + tile, both, 0.0)
    begin = index * span
    end = tl.minimum(begin + span, tokens)
    i, j, outer_stride, inner_stride, inner, direction = enter(routes, k, begin)
    for position in range(begin, end):
        if KEEP:  # noqa: SIM102 (the outer condition is decided by the compiler)
            if position % CHUNK == 0:
                entry = (position // CHUNK * chains + chain) * states * channels
                tl.store(entries + entry + tile, state, both)
        token = i * outer_stride + j * inner_stride
        step, _slope = load_step(delta, bias_row, b * d_b + token * d_t + k * d_k + e, inside, dtype, SOFTPLUS)
        x = tl.load(u + b * u_b + token * u_t + k * u_k + e, inside, 0.0).to(dtype)
        in_map = tl.load(B + b * B_b + token * B_t + k * B_k + n, kept, 0.0).to(dtype)
        out_map = tl.load(C + b * C_b + token * C_t + k * C_k + n, kept, 0.0).to(dtype)
        state = tl.exp2(a * step[None, :]) * state + in_map[:, None] * (step * x)[None, :]
        out = tl.sum(out_map[:, None] * state, 0) + skip * x
        target = y + b * y_b + token * y_t + k * y_k + e
        if ADD:
            out += tl.load(target, inside, 0.0).to(dtype)
        tl.store(target, out.to(y.dtype.element_ty), inside)
        i, j = advance(i, j, inner, direction)
    if end == tokens:
        tl.store(last_state + chain * states * channels + tile, state, both)


@triton.jit(do_not_specialize=["tokens", "span", "first_group"])
def walk_backward(u, delta, A, B, C, D, bias, routes, entries, exits, grad_y, grad_u, grad_delta, grad_maps, grad_A,
                  grad_D, grad_bias, scratch, u_b, u_t, u_k, d_b, d_t, d_k, B_b, B_t, B_k, C_b, C_t, C_k, g_b, g_t, g_k,
                  gu_b, gu_t, gu_k, gd_b, gd_t, gd_k, tokens, groups, channels, states, span, first_group,
                  launched_groups, SOFTPLUS: tl.constexpr, ADD: tl.constexpr, CHUNK: tl.constexpr, N: tl.constexpr,
                  E: tl.constexpr):
    """All gradients of a span, chunk by chunk from its end: states again from the entry of the chunk, into `scratch`,
    then the adjoints g_p = C_p grad_y_p + exp(s_{p+1} A) g_{p+1} back through it."""
    index, b = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64) // launched_groups
    k = first_group + tl.program_id(2) % launched_groups
    batch = tl.num_programs(2) // launched_groups
    chain, chains = b * groups + k, batch * groups
    block = tl.program_id(1)
    e, n = block * E + tl.arange(0, E), tl.arange(0, N)
    inside, kept = e < channels, n < states
    both = kept[:, None] & inside[None, :]
    tile = n[:, None] * channels + e[None, :]
    slab = n[:, None] * E + tl.arange(0, E)[None, :]
    scratch += ((index * tl.num_programs(1) + block) * tl.num_programs(2) + tl.program_id(2)) * CHUNK * N * E
    dtype: tl.constexpr = A.dtype.element_ty
    a = tl.load(A + k * states * channels + tile, both, 0.0)
    bias_row, skip = tl.load(bias + k * channels + e, inside, 0.0), tl.load(D + k * channels + e, inside, 0.0)
    carry = tl.load(exits + (index * chains + chain) * states * channels + tile, both, 0.0)
    sum_A, sum_D, sum_bias = tl.zeros((N, E), dtype), tl.zeros((E,), dtype), tl.zeros((E,), dtype)
    span_begin = index * span
    span_end = tl.minimum(span_begin + span, tokens)
    chunks = (span_end - span_begin + CHUNK - 1) // CHUNK
    parts = (block.to(tl.int64) * batch + b) * tokens  # rows of grad_maps: (block, b, token, k, B or C, n)
    for count in range(chunks):
        begin = span_begin + (chunks - 1 - count) * CHUNK
        length = tl.minimum(span_end - begin, CHUNK).to(tl.int32)
        i, j, outer_stride, inner_stride, inner, direction = enter(routes, k, begin)
        state = tl.load(entries + (begin // CHUNK * chains + chain) * states * channels + tile, both, 0.0)
        for t in range(length):
            tl.store(scratch + t * N * E + slab, state)
            token = i * outer_stride + j * inner_stride
            step, _slope = load_step(delta, bias_row, b * d_b + token * d_t + k * d_k + e, inside, dtype, SOFTPLUS)
            push = step * tl.load(u + b * u_b + token * u_t + k * u_k + e, inside, 0.0).to(dtype)
            in_map = tl.load(B + b * B_b + token * B_t + k * B_k + n, kept, 0.0).to(dtype)
            state = tl.exp2(a * step[None, :]) * state + in_map[:, None] * push[None, :]
            i, j = advance(i, j, inner, direction)
        tl.debug_barrier()
        for back in range(length):
            i, j = advance(i, j, inner, -direction)
            token = i * outer_stride + j * inner_stride
            step, slope = load_step(delta, bias_row, b * d_b + token * d_t + k * d_k + e, inside, dtype, SOFTPLUS)
            x = tl.load(u + b * u_b + token * u_t + k * u_k + e, inside, 0.0).to(dtype)
            in_map = tl.load(B + b * B_b + token * B_t + k * B_k + n, kept, 0.0).to(dtype)
            out_map = tl.load(C + b * C_b + token * C_t + k * C_k + n, kept, 0.0).to(dtype)
            out = tl.load(grad_y + b * g_b + token * g_t + k * g_k + e, inside, 0.0).to(dtype)
            decayed = tl.exp2(a * step[None, :])
            before = decayed * tl.load(scratch + (length - 1 - back) * N * E + slab)
            adjoint = carry + out_map[:, None] * out[None, :]
            part = (parts + token) * groups + k
            tl.store(grad_maps + 2 * part * states + n, tl.sum(adjoint * (step * x)[None, :], 1), kept)
            state = before + in_map[:, None] * (step * x)[None, :]
            tl.store(grad_maps + (2 * part + 1) * states + n, tl.sum(state * out[None, :], 1), kept)
            grad_push = tl.sum(adjoint * in_map[:, None], 0)
            exponent = adjoint * before  # gradient of step * A
            sum_A += exponent * step[None, :]
            grad_step = (tl.sum(exponent * a, 0) * LN2 + grad_push * x) * slope
            sum_bias += grad_step
            sum_D += out * x
            tl.store(grad_delta + b * gd_b + token * gd_t + k * gd_k + e, grad_step.to(grad_delta.dtype.element_ty),
                     inside)
            target = grad_u + b * gu_b + token * gu_t + k * gu_k + e
            grad_x = grad_push * step + skip * out
            if ADD:
                grad_x += tl.load(target, inside, 0.0).to(dtype)
            tl.store(target, grad_x.to(grad_u.dtype.element_ty), inside)
            carry = decayed * adjoint
        tl.debug_barrier()
    here = index * chains + chain
    tl.store(grad_A + here * states * channels + tile, sum_A, both)
    tl.store(grad_D + here * channels + e, sum_D, inside)
    tl.store(grad_bias + here * channels + e, sum_bias, inside)
