"""Triton kernels of the scan. One program scans a span of a route for one block of channels.

Spans run in parallel: first every span from a zero state (`span_kernel`), then the short scan over spans
(`scan_over_spans_kernel`), then every span again from its true first state (`forward_kernel`, `backward_kernel`). A
tile is (N, E), states by channels, so that a thread owns whole channels, sums over the state stay inside it, and rows
of channels are read as they lie in memory. The order is an index rule, followed step by step; nothing is permuted.
There are no atomics: programs that share a sum write their part of it, and the parts are added in a fixed order.

The same source runs on CUDA and, with TRITON_INTERPRET=1, on a CPU. The dtype of A, float32 or float64, is that of the
arithmetic. A is multiplied by log2(e) beforehand: decay = exp2(A * step).

Axes: b image of the batch, k route (with its parameters), g group of consecutive routes that share u and y, t token of
    a chunk, e channel, n state.
    E channels and N states of a tile, the latter padded to a power of two; (i, j) outer and inner index of a position.
Terms: chunk: CHUNK positions of a route; the state before each is kept for the backward pass.
    span: some chunks; sequence: one pair (b, k); all states are stored as (.., sequence, n, e).
Arguments, tuples of `models.ops.scan_triton`:
    Rows: address and strides of a tensor (b, token, k or g, columns). Inputs: the scan's tensors. Widths: routes,
    groups, channels, states. What changes with the image size alone (`tokens`, `span`) and `route`, the number of the
    launched route in each group, are plain arguments, because only those can be kept from being compiled in.

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
def start_at(routes, k, position):
    """(i, j) of the position on route k, the strides of i and j, the number of j and the direction, 1 or -1."""
    outer, inner = tl.load(routes + 5 * k), tl.load(routes + 5 * k + 1)
    reverse = tl.load(routes + 5 * k + 4)
    q = tl.where(reverse != 0, outer * inner - 1 - position, position)
    return q // inner, q % inner, tl.load(routes + 5 * k + 2), tl.load(routes + 5 * k + 3), inner, 1 - 2 * reverse


@triton.jit
def next_position(i, j, inner, direction):
    """The next (i, j); with the direction negated, the one before."""
    j += direction
    over, under = (j == inner).to(tl.int64), (j < 0).to(tl.int64)
    j = tl.where(over != 0, 0, tl.where(under != 0, inner - 1, j))
    return i + over - under, j


@triton.jit
def addresses(rows, b, token, k, columns):
    return rows.data + b * rows.batch + token * rows.token + k * rows.route + columns


@triton.jit
def load_row(rows, b, token, k, columns, exist, dtype: tl.constexpr):
    """Columns of the token's row, zero where they do not exist."""
    return tl.load(addresses(rows, b, token, k, columns), exist, 0.0).to(dtype)


@triton.jit
def load_step(delta, b, token, k, e, bias, e_exists, dtype: tl.constexpr, SOFTPLUS: tl.constexpr):
    """Step sizes of a token and their slope; zero for channels that do not exist, so that nothing happens there."""
    step = load_row(delta, b, token, k, e, e_exists, dtype) + bias
    slope = tl.full(step.shape, 1.0, dtype)
    if SOFTPLUS:
        step, slope = softplus_and_slope(step)
    return tl.where(e_exists, step, 0.0), slope


@triton.jit
def block_of_channels(index, widths, N: tl.constexpr, E: tl.constexpr):
    """Numbers e and n of a block, which of them and of their pairs exist, and the places of the pairs in (n, e)."""
    e, n = index * E + tl.arange(0, E), tl.arange(0, N)
    e_exists, n_exists = e < widths.channels, n < widths.states
    return (e, n, e_exists, n_exists, n_exists[:, None] & e_exists[None, :],
            n[:, None] * widths.channels + e[None, :])


@triton.jit(do_not_specialize=["tokens", "span"])
def span_kernel(inputs, grad_y, last_states, step_sums, widths, tokens, span, SOFTPLUS: tl.constexpr,
                BACK: tl.constexpr, N: tl.constexpr, E: tl.constexpr):
    """State behind each span that began with zero, and the sum of its steps; or, with BACK, the gradient of the state
    before each span if that of the state behind it is zero."""
    index, b = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64) // widths.routes
    k = tl.program_id(2) % widths.routes
    g = k // (widths.routes // widths.groups)
    e, n, e_exists, n_exists, both_exist, tile = block_of_channels(tl.program_id(1), widths, N, E)
    dtype: tl.constexpr = inputs.A.dtype.element_ty
    A = tl.load(inputs.A + (k * widths.states + n[:, None]) * widths.channels + e[None, :], both_exist, 0.0)
    bias = tl.load(inputs.bias + k * widths.channels + e, e_exists, 0.0)
    begin = index * span
    end = tl.minimum(begin + span, tokens)
    first = begin
    if BACK:
        first = end - 1
    i, j, outer_stride, inner_stride, inner, direction = start_at(inputs.routes, k, first)
    if BACK:
        direction = -direction
    state, step_sum = tl.zeros((N, E), dtype), tl.zeros((E,), dtype)
    for _ in range(begin, end):
        token = i * outer_stride + j * inner_stride
        step, _slope = load_step(inputs.delta, b, token, k, e, bias, e_exists, dtype, SOFTPLUS)
        decay = tl.exp2(A * step[None, :])
        if BACK:
            C = load_row(inputs.C, b, token, k, n, n_exists, dtype)
            state = decay * (state + C[:, None] * load_row(grad_y, b, token, g, e, e_exists, dtype)[None, :])
        else:
            B = load_row(inputs.B, b, token, k, n, n_exists, dtype)
            step_u = step * load_row(inputs.u, b, token, g, e, e_exists, dtype)
            state = decay * state + B[:, None] * step_u[None, :]
        step_sum += step
        i, j = next_position(i, j, inner, direction)
    sequence = index * tl.num_programs(2) + tl.program_id(2)
    tl.store(last_states + sequence * widths.states * widths.channels + tile, state, both_exist)
    tl.store(step_sums + sequence * widths.channels + e, step_sum, e_exists)


@triton.jit(do_not_specialize=["spans"])
def scan_over_spans_kernel(A, states, step_sums, initial, widths, spans, BACK: tl.constexpr, N: tl.constexpr,
                           E: tl.constexpr):
    """Replaces what `span_kernel` found in `states` by the true state before each span; with BACK by the gradient of
    the state behind it."""
    sequence, sequences = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    e, n, e_exists, n_exists, both_exist, tile = block_of_channels(tl.program_id(0), widths, N, E)
    size = widths.states * widths.channels
    A = tl.load(A + tl.program_id(1) % widths.routes * size + tile, both_exist, 0.0)
    state = tl.load(initial + sequence * size + tile, both_exist, 0.0)
    for count in range(spans):
        index = count
        if BACK:
            index = spans - 1 - count
        here = index * sequences + sequence
        from_zero = tl.load(states + here * size + tile, both_exist, 0.0)
        tl.store(states + here * size + tile, state, both_exist)
        step_sum = tl.load(step_sums + here * widths.channels + e, e_exists, 0.0)
        state = tl.exp2(A * step_sum[None, :]) * state + from_zero


@triton.jit(do_not_specialize=["tokens", "span", "route"])
def forward_kernel(inputs, first_states, y, chunk_states, last_state, widths, tokens, span, route,
                   SOFTPLUS: tl.constexpr, KEEP: tl.constexpr, ADD: tl.constexpr, CHUNK: tl.constexpr,
                   N: tl.constexpr, E: tl.constexpr):
    """y of a span from its first state, the states before its chunks if KEEP and, behind the last span, the last state.
    With ADD, y is added to what another route has left there."""
    index, b = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64) // widths.groups
    g = tl.program_id(2) % widths.groups
    k = g * (widths.routes // widths.groups) + route
    sequences = tl.num_programs(2) // widths.groups * widths.routes
    sequence, size = b * widths.routes + k, widths.states * widths.channels
    e, n, e_exists, n_exists, both_exist, tile = block_of_channels(tl.program_id(1), widths, N, E)
    dtype: tl.constexpr = inputs.A.dtype.element_ty
    A = tl.load(inputs.A + k * size + tile, both_exist, 0.0)
    bias = tl.load(inputs.bias + k * widths.channels + e, e_exists, 0.0)
    D = tl.load(inputs.D + k * widths.channels + e, e_exists, 0.0)
    state = tl.load(first_states + (index * sequences + sequence) * size + tile, both_exist, 0.0)
    begin = index * span
    end = tl.minimum(begin + span, tokens)
    i, j, outer_stride, inner_stride, inner, direction = start_at(inputs.routes, k, begin)
    for position in range(begin, end):
        if KEEP:  # noqa: SIM102 (the outer condition is decided by the compiler)
            if position % CHUNK == 0:
                chunk = position // CHUNK * sequences + sequence
                tl.store(chunk_states + chunk * size + tile, state, both_exist)
        token = i * outer_stride + j * inner_stride
        step, _slope = load_step(inputs.delta, b, token, k, e, bias, e_exists, dtype, SOFTPLUS)
        u = load_row(inputs.u, b, token, g, e, e_exists, dtype)
        B = load_row(inputs.B, b, token, k, n, n_exists, dtype)
        C = load_row(inputs.C, b, token, k, n, n_exists, dtype)
        state = tl.exp2(A * step[None, :]) * state + B[:, None] * (step * u)[None, :]
        out = tl.sum(C[:, None] * state, 0) + D * u
        target = addresses(y, b, token, g, e)
        if ADD:
            out += tl.load(target, e_exists, 0.0).to(dtype)
        tl.store(target, out.to(y.data.dtype.element_ty), e_exists)
        i, j = next_position(i, j, inner, direction)
    if end == tokens:
        tl.store(last_state + sequence * size + tile, state, both_exist)


@triton.jit
def recompute_states(inputs, state, A, bias, b, k, g, start, length, block, scratch, slab, dtype: tl.constexpr,
                     SOFTPLUS: tl.constexpr, SIZE: tl.constexpr):
    """Writes the state before each token of a chunk to `scratch`, (t, n, e); returns (i, j) behind the chunk."""
    e, n, e_exists, n_exists, _both_exist, _tile = block
    i, j, outer_stride, inner_stride, inner, direction = start
    for t in range(length):
        tl.store(scratch + t * SIZE + slab, state)
        token = i * outer_stride + j * inner_stride
        step, _slope = load_step(inputs.delta, b, token, k, e, bias, e_exists, dtype, SOFTPLUS)
        step_u = step * load_row(inputs.u, b, token, g, e, e_exists, dtype)
        B = load_row(inputs.B, b, token, k, n, n_exists, dtype)
        state = tl.exp2(A * step[None, :]) * state + B[:, None] * step_u[None, :]
        i, j = next_position(i, j, inner, direction)
    return i, j


@triton.jit
def backward_step(inputs, grad_y, grads, grad_state, sums, parameters, b, k, g, token, state_before, part, widths,
                  block, dtype: tl.constexpr, SOFTPLUS: tl.constexpr, ADD: tl.constexpr):
    """Back through one token: writes the gradients of its u, delta and, as row `part` of grads.B_C, of its B and C.

    From the gradient of the state behind the token to that of the state before it (which lies at the addresses
    `state_before`). Returned are that gradient and the sums, the token's share in the gradients of A (without their
    factor ln 2), D and the bias added.
    """
    e, n, e_exists, n_exists, _both_exist, _tile = block
    A, D, bias = parameters
    sum_A, sum_D, sum_bias = sums
    step, slope = load_step(inputs.delta, b, token, k, e, bias, e_exists, dtype, SOFTPLUS)
    u = load_row(inputs.u, b, token, g, e, e_exists, dtype)
    B = load_row(inputs.B, b, token, k, n, n_exists, dtype)
    C = load_row(inputs.C, b, token, k, n, n_exists, dtype)
    grad_out = load_row(grad_y, b, token, g, e, e_exists, dtype)
    decay = tl.exp2(A * step[None, :])
    decayed = decay * tl.load(state_before)
    grad_state += C[:, None] * grad_out[None, :]
    tl.store(grads.B_C + 2 * part * widths.states + n, tl.sum(grad_state * (step * u)[None, :], 1), n_exists)
    state = decayed + B[:, None] * (step * u)[None, :]
    tl.store(grads.B_C + (2 * part + 1) * widths.states + n, tl.sum(state * grad_out[None, :], 1), n_exists)
    grad_step_u = tl.sum(grad_state * B[:, None], 0)
    grad_exponent = grad_state * decayed  # of step * A
    sum_A += grad_exponent * step[None, :]
    grad_step = (tl.sum(grad_exponent * A, 0) * LN2 + grad_step_u * u) * slope
    sum_bias += grad_step
    sum_D += grad_out * u
    tl.store(addresses(grads.delta, b, token, k, e), grad_step.to(grads.delta.data.dtype.element_ty), e_exists)
    target, grad_u = addresses(grads.u, b, token, g, e), grad_step_u * step + D * grad_out
    if ADD:
        grad_u += tl.load(target, e_exists, 0.0).to(dtype)
    tl.store(target, grad_u.to(grads.u.data.dtype.element_ty), e_exists)
    return decay * grad_state, sum_A, sum_D, sum_bias


@triton.jit(do_not_specialize=["tokens", "span", "route"])
def backward_kernel(inputs, chunk_states, grad_last_states, grad_y, grads, scratch, widths, tokens, span, route,
                    SOFTPLUS: tl.constexpr, ADD: tl.constexpr, CHUNK: tl.constexpr, N: tl.constexpr, E: tl.constexpr):
    """All gradients of a span, chunk by chunk from its end: the states again, from the one before the chunk, into
    `scratch`, then back through it by grad_state_p = C_p grad_y_p + exp(step_{p+1} A) grad_state_{p+1}."""
    index, b = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64) // widths.groups
    g = tl.program_id(2) % widths.groups
    k = g * (widths.routes // widths.groups) + route
    images = tl.num_programs(2) // widths.groups
    sequence, sequences, size = b * widths.routes + k, images * widths.routes, widths.states * widths.channels
    block_index = tl.program_id(1)
    block = block_of_channels(block_index, widths, N, E)
    e, n, e_exists, n_exists, both_exist, tile = block
    slab = n[:, None] * E + tl.arange(0, E)[None, :]
    scratch += ((index * tl.num_programs(1) + block_index) * tl.num_programs(2) + tl.program_id(2)) * CHUNK * N * E
    dtype: tl.constexpr = inputs.A.dtype.element_ty
    A = tl.load(inputs.A + k * size + tile, both_exist, 0.0)
    bias = tl.load(inputs.bias + k * widths.channels + e, e_exists, 0.0)
    D = tl.load(inputs.D + k * widths.channels + e, e_exists, 0.0)
    here = index * sequences + sequence
    grad_state = tl.load(grad_last_states + here * size + tile, both_exist, 0.0)
    sum_A, sum_D, sum_bias = tl.zeros((N, E), dtype), tl.zeros((E,), dtype), tl.zeros((E,), dtype)
    span_begin = index * span
    span_end = tl.minimum(span_begin + span, tokens)
    chunks = (span_end - span_begin + CHUNK - 1) // CHUNK
    parts = (block_index.to(tl.int64) * images + b) * tokens  # rows of grads.B_C: (block, b, token, k, B or C, n)
    for count in range(chunks):
        begin = span_begin + (chunks - 1 - count) * CHUNK
        length = tl.minimum(span_end - begin, CHUNK).to(tl.int32)
        start = start_at(inputs.routes, k, begin)
        _i, _j, outer_stride, inner_stride, inner, direction = start
        state = tl.load(chunk_states + (begin // CHUNK * sequences + sequence) * size + tile, both_exist, 0.0)
        i, j = recompute_states(inputs, state, A, bias, b, k, g, start, length, block, scratch, slab, dtype,
                                SOFTPLUS, N * E)
        tl.debug_barrier()
        for back in range(length):
            i, j = next_position(i, j, inner, -direction)
            token = i * outer_stride + j * inner_stride
            grad_state, sum_A, sum_D, sum_bias = backward_step(
                inputs, grad_y, grads, grad_state, (sum_A, sum_D, sum_bias), (A, D, bias), b, k, g, token,
                scratch + (length - 1 - back) * N * E + slab, (parts + token) * widths.routes + k, widths, block, dtype,
                SOFTPLUS, ADD)
        tl.debug_barrier()
    tl.store(grads.A + here * size + tile, sum_A, both_exist)
    tl.store(grads.D + here * widths.channels + e, sum_D, e_exists)
    tl.store(grads.bias + here * widths.channels + e, sum_bias, e_exists)
