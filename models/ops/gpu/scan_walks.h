// The way of a warp through a span of a route, forward and back with gradients, from its true state.
#pragma once

#include "scan_warp.h"

namespace scan {

// A task of a block: a span of a group or of a route, and a block of channels, of which a warp has some.
template <class S>
struct Task {
  int first, block, span, row, b;  // row: group or route

  DEVICE Task(const Call& call, int task, int rows) {
    block = task % call.blocks, task /= call.blocks;
    span = task % call.spans, task /= call.spans;
    row = task % rows, b = task / rows;
    first = (block * num_warps() + warp_index()) * S::channels;
  }
};

DEVICE int first_chunk(const Call& call, int span) { return span * call.span_chunks; }
DEVICE int end_chunk(const Call& call, int span) { return min_of((span + 1) * call.span_chunks, call.chunks); }

// The span of a route by one warp: y, kept states and, behind the last token, the last state.
template <class S>
DEVICE void forward_walk(const Call& call, Warp<S>& warp, int span, bool is_first, bool is_last) {
  const int begin = first_chunk(call, span), end = end_chunk(call, span), reverse = warp.rule.reverse;
  const long long matrix = warp.sequence() * call.channels * call.states;
  const long long matrices = (long long)call.batch * call.routes * call.channels * call.states;
  using T = Tile<S>;
  float h[4][4] = {};
  const Columns<S::vector> columns_of_u = warp.columns_of_u();
  if (call.spans > 1) warp.load_states(call.span_states + span * matrices + matrix, h);
  warp.start(reverse ? end - 1 : begin);
  warp.template fetch<true, true, true, false>(reverse ? end - 1 : begin, 0, T::arriving_forward);
  ROLLED
  for (int count = 0; count < end - begin; ++count) {
    const int chunk = reverse ? end - 1 - count : begin + count, length = warp.length(chunk);
    const int turn = count % 2;
    warp.template settle<true, true, true, false, false>(chunk, T::arriving_forward);
    if (count + 1 < end - begin) {
      warp.next(reverse);
      warp.template fetch<true, true, true, false>(reverse ? chunk - 1 : chunk + 1, 1 - turn, T::arriving_forward);
    }
    if (call.chunk_states) warp.store_states(h, call.chunk_states + chunk * matrices + matrix);
    ROLLED
    for (int first = 0; first < length; first += kChunk / 2) {
      UNROLL_2
      for (int i = 0; i < kChunk / 2; ++i) {
        float C[4], y[4];
        warp.advance(first + i, h);
        warp.states_at(T::C, first + i, C);
        UNROLL
        for (int j = 0; j < 4; ++j)
          y[j] = h[j][0] * C[0] + h[j][1] * C[1] + h[j][2] * C[2] + h[j][3] * C[3];
        warp.put_shares(y, T::shares + i * T::shares_of_token);
      }
      sync_warp();
      float D[4];
      warp.parameters(call.D, D);
      warp.put_rows(call.y, first, length, turn, is_first, is_last, [&](int token, int t, bool, float (&y)[4]) {
        const Packed<float> u = warp.floats(columns_of_u.template read<typename S::U>(token), true);
        warp.sum_shares(T::shares + (t - first) * T::shares_of_token, y);
        UNROLL
        for (int j = 0; j < 4; ++j) y[j] += D[j] * u.values[j];
      });
      sync_warp();
    }
  }
  if (reverse ? begin == 0 : end == call.chunks) warp.store_states(h, call.last_state + matrix);
}

// Sums of the gradients of B and C over the warps of a block, from their tiles to memory.
template <class S>
DEVICE void put_map_gradients(const Call& call, float* memory, const Task<S>& task, const Warp<S>& warp, int length,
                              int turn) {
  using T = Tile<S>;
  sync_block();
  ROLLED
  for (int i = thread_index(); i < length * 2 * S::lanes; i += num_warps() * 32) {
    const int t = i / (2 * S::lanes), which = i / S::lanes % 2, n = i % S::lanes * 4;
    const float* const from = memory + T::B + which * T::maps + t * S::states + n;
    float sum[4];
    load4(from, sum);
    ROLLED
    for (int w = 1; w < num_warps(); ++w) {
      float more[4];
      load4(from + w * T::backward_floats, more);
      UNROLL
      for (int x = 0; x < 4; ++x) sum[x] += more[x];
    }
    const long long row =
        (((long long)task.block * call.batch + warp.b) * call.tokens + warp.token(t, turn)) * call.routes + warp.k;
    float* const to = (which ? call.grad_C : call.grad_B) + row * call.states + n;
    if constexpr (S::vector) {
      if (n < call.states) store4_global(sum, to);
    } else {
      UNROLL
      for (int x = 0; x < 4; ++x)
        if (n + x < call.states) to[x] = sum[x];
    }
  }
  sync_block();
}

// What a warp carries back through a route: the gradient of the state, and sums for parameters.
template <class S>
struct Gradients {
  float state[4][4], A[4][4], D[4], bias[4];  // the last two of columns of rows
};

// Back through half a chunk from token `first` on, whose states before each token are in the tile; `h` is the state
// behind the last. Gradients of B and C take their places, sums for the rows those of the states.
template <class S>
DEVICE void back_through(Warp<S>& warp, int first, float (&h)[4][4], Gradients<S>& grads) {
  using T = Tile<S>;
  constexpr int levels = log2_of(S::channel_lanes), halved = levels < 3 ? levels : 3;
  ROLLED
  for (int i = kChunk / 2 - 1; i >= 0; --i) {
    const int t = first + i, states = T::states + i * T::states_of_token;
    float step[4], step_u[4], grad_y[4], B[4], C[4];
    warp.channels_at(T::step, t, step), warp.channels_at(T::step_u, t, step_u), warp.channels_at(T::grad_y, t, grad_y);
    warp.states_at(T::B, t, B), warp.states_at(T::C, t, C);
    float maps[2 * 4] = {}, grad_step_u[4] = {}, grad_step[4] = {};
    UNROLL
    for (int j = 0; j < 4; ++j) {
      float before[4];
      load4(warp.tile + states + (j * 32 + warp.lane) * 4, before);
      UNROLL
      for (int n = 0; n < 4; ++n) {
        float grad = grads.state[j][n] + C[n] * grad_y[j];
        maps[n] += grad * step_u[j];
        maps[4 + n] += h[j][n] * grad_y[j];
        grad_step_u[j] += grad * B[n];
        grad *= exp2_fast(warp.A[j][n] * step[j]);
        const float exponent = grad * before[n];  // gradient of step * A
        grads.A[j][n] += exponent * step[j];
        grad_step[j] += exponent * warp.A[j][n];
        grads.state[j][n] = grad;
        h[j][n] = before[n];
      }
    }
    sum_over_lanes<2 * 4, levels>(maps, S::lanes, warp.lane);
    sync_warp();  // everybody has read the token's B, C and states
    const int channel_lane = warp.lane / S::lanes;
    if (S::channel_lanes <= 8 || channel_lane < 8) {
      UNROLL
      for (int x = 0; x < 2 * 4 >> halved; ++x) {
        const int v = x << halved | (channel_lane & ((1 << halved) - 1));
        warp.tile[T::B + v / 4 * T::maps + t * S::states + warp.state() + v % 4] = maps[x];
      }
    }
    warp.put_shares(grad_step_u, states);
    warp.put_shares(grad_step, states + T::shares_of_token);
  }
}

// Gradients of u and delta of the same tokens.
template <class S>
DEVICE void put_row_gradients(const Call& call, Warp<S>& warp, int first, int length, int turn, const float (&D)[4],
                              Gradients<S>& grads, bool is_first, bool is_last) {
  using T = Tile<S>;
  using F = typename S::F;
  const Columns<S::vector> columns_of_u = warp.columns_of_u();
  const Columns<S::vector> grad_delta(call.grad_delta, warp.b, warp.k, warp.first + warp.column(), call.channels, sizeof(F));
  sync_warp();
  warp.put_rows(call.grad_u, first, length, turn, is_first, is_last, [&](int token, int t, bool exists, float (&grad_u)[4]) {
    const int shares = T::states + (t - first) * T::states_of_token, at = t * S::channels + warp.column();
    float grad_step_u[4], grad[4], grad_y[4], step[4], slope[4];
    const Packed<float> u = warp.floats(columns_of_u.template read<typename S::U>(token), true);
    warp.sum_shares(shares, grad_step_u), warp.sum_shares(shares + T::shares_of_token, grad);
    load4(warp.tile + T::grad_y + at, grad_y);
    load4(warp.tile + T::step + at, step), load4(warp.tile + T::slope + at, slope);
    UNROLL
    for (int j = 0; j < 4; ++j) {
      grad[j] = (grad[j] * kLn2 + grad_step_u[j] * u.values[j]) * slope[j];
      grads.D[j] += exists ? grad_y[j] * u.values[j] : 0.0f;
      grads.bias[j] += exists ? grad[j] : 0.0f;
      grad_u[j] = grad_step_u[j] * step[j] + D[j] * grad_y[j];
    }
    if (exists) grad_delta.template write<F>(token, grad);
  });
  sync_warp();
}

// The span of a route by one warp, from its end: the states again, half a chunk at a time, and back through them.
template <class S>
DEVICE void backward_walk(const Call& call, Warp<S>& warp, float* memory, const Task<S>& task, bool is_first,
                          bool is_last) {
  constexpr int kHalf = kChunk / 2;
  const int begin = first_chunk(call, task.span), end = end_chunk(call, task.span), reverse = warp.rule.reverse;
  const long long matrix = warp.sequence() * call.channels * call.states;
  const long long matrices = (long long)call.batch * call.routes * call.channels * call.states;
  Gradients<S> grads = {};
  float D[4];
  warp.parameters(call.D, D);
  warp.load_states(call.spans > 1 ? call.span_states + task.span * matrices + matrix : call.grad_last + matrix,
                   grads.state);
  float h[4][4];
  warp.start(reverse ? begin : end - 1);
  warp.template fetch<true, true, true, true>(reverse ? begin : end - 1, 0, Tile<S>::states);
  warp.load_states(call.chunk_states + (reverse ? begin : end - 1) * matrices + matrix, h);
  ROLLED
  for (int count = 0; count < end - begin; ++count) {
    const int chunk = reverse ? begin + count : end - 1 - count, length = warp.length(chunk), turn = count % 2;
    warp.template settle<true, true, true, true, true>(chunk, Tile<S>::states);
    UNROLL_2
    for (int t = 0; t < kHalf; ++t) warp.advance(t, h);
    ROLLED
    for (int first = kHalf; first >= 0; first -= kHalf) {
      if (first == 0) warp.load_states(call.chunk_states + chunk * matrices + matrix, h);
      UNROLL_2
      for (int i = 0; i < kHalf; ++i) {
        UNROLL
        for (int j = 0; j < 4; ++j)
          store4(h[j], warp.tile + Tile<S>::states + i * Tile<S>::states_of_token + (j * 32 + warp.lane) * 4);
        warp.advance(first + i, h);
      }
      back_through(warp, first, h, grads);
      put_row_gradients(call, warp, first, length, turn, D, grads, is_first, is_last);
    }
    if (count + 1 < end - begin) {  // to where the states were
      const int following = reverse ? chunk + 1 : chunk - 1;
      warp.next(!reverse);
      warp.template fetch<true, true, true, true>(following, 1 - turn, Tile<S>::states);
      warp.load_states(call.chunk_states + following * matrices + matrix, h);
    }
    put_map_gradients(call, memory, task, warp, length, turn);
  }
  const long long at = (task.span * (long long)call.batch * call.routes + warp.sequence()) * call.channels;
  warp.store_states(grads.A, call.grad_A + at * call.states);
  warp.store_column_sums(grads.D, call.grad_D + at);
  warp.store_column_sums(grads.bias, call.grad_bias + at);
}

}  // namespace scan
