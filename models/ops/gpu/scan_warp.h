// What a warp does: it owns all states of some channels of one route and goes through chunks of tokens.
//
// A thread holds 4 states of 4 channels: lane = channel lane * S::lanes + state lane, where S::lanes lanes share the
// padded states of their channels. Rows of a chunk are brought to shared memory once, in the order of the walk, by lanes
// that take 4 columns of a row each, and are read from there four numbers at a time.
#pragma once

#include "scan_rows.h"

namespace scan {

template <class S>
struct Warp {
  using T = Tile<S>;
  using U = typename S::U;
  using F = typename S::F;
  // In which all lanes together handle the rows of a chunk, and its maps.
  static constexpr int iterations = kChunk / S::lanes, map_iterations = (kChunk + S::channel_lanes - 1) / S::channel_lanes;
  const Call& call;
  float* const tile;
  const int lane, first, b, k, g;  // first: channel
  const Rule rule;
  int i, j, whole, rest;  // outer and inner index of the lane's slot of a chunk; those of kChunk slots
  float A[4][4];          // of the thread's channels and states

  DEVICE Warp(const Call& call_, float* tile_, int b_, int k_, int first_)
      : call(call_), tile(tile_), lane(lane_index()), first(first_), b(b_), k(k_),
        g(k_ / (call_.routes / call_.groups)), rule(call_.rules[k_]) {
    load_states(call.A + (long long)k * call.channels * call.states, A);
    UNROLL
    for (int j = 0; j < 4; ++j)
      UNROLL
      for (int i = 0; i < 4; ++i) A[j][i] *= kLog2E;
  }

  // The thread's channels and states in the recurrence, the first of 4 each, and ..
  DEVICE int channel() const { return lane / S::lanes * 4; }
  DEVICE int state() const { return lane % S::lanes * 4; }
  // .. its row and columns in iteration `it` where lanes handle whole rows.
  DEVICE int row_of(int it) const { return it * S::lanes + lane / S::channel_lanes; }
  DEVICE int column() const { return lane % S::channel_lanes * 4; }

  DEVICE long long sequence() const { return (long long)b * call.routes + k; }
  DEVICE int length(int chunk) const { return min_of(kChunk, call.tokens - chunk * kChunk); }

  // Columns of a row of parameters (k, e); zero where they do not exist.
  DEVICE void parameters(const float* from, float (&to)[4]) const {
    UNROLL
    for (int j = 0; j < 4; ++j) {
      const int e = first + column() + j;
      to[j] = from && e < call.channels ? from[k * call.channels + e] : 0.0f;
    }
  }

  DEVICE Columns<S::vector> columns_of_u() const {
    return {call.u, b, g, first + column(), call.channels, sizeof(U)};
  }

  // Matrices (e, n) in memory to and from the thread's states; those that do not exist are zero.
  DEVICE void load_states(const float* from, float (&to)[4][4]) const {
    UNROLL
    for (int j = 0; j < 4; ++j) {
      const int e = first + channel() + j;
      const float* const row = from + (long long)e * call.states + state();
      if constexpr (S::vector) {
        if (e < call.channels && state() < call.states) {
          load4(row, to[j]);
        } else {
          to[j][0] = to[j][1] = to[j][2] = to[j][3] = 0;
        }
      } else {
        UNROLL
        for (int i = 0; i < 4; ++i) to[j][i] = e < call.channels && state() + i < call.states ? row[i] : 0.0f;
      }
    }
  }
  DEVICE void store_states(const float (&from)[4][4], float* to) const {
    UNROLL
    for (int j = 0; j < 4; ++j) {
      const int e = first + channel() + j;
      float* const row = to + (long long)e * call.states + state();
      if constexpr (S::vector) {
        if (e < call.channels && state() < call.states) store4_global(from[j], row);
      } else {
        UNROLL
        for (int i = 0; i < 4; ++i)
          if (e < call.channels && state() + i < call.states) row[i] = from[j][i];
      }
    }
  }

  // Before the first chunk of a walk.
  DEVICE void start(int chunk) {
    const int slot = chunk * kChunk + lane;
    i = slot / rule.inner, j = slot % rule.inner;
    whole = kChunk / rule.inner, rest = kChunk % rule.inner;
  }
  DEVICE void next(bool downwards) {
    if (downwards) {
      i -= whole, j -= rest;
      if (j < 0) j += rule.inner, --i;
    } else {
      i += whole, j += rest;
      if (j >= rule.inner) j -= rule.inner, ++i;
    }
  }

  DEVICE int token(int t, int turn) const { return reinterpret_cast<const int*>(tile + T::token)[turn * kChunk + t]; }

  // Sends for the rows of a chunk, in the order of the walk, to `place`, and notes their tokens in place `turn` of two.
  // Channels and states that do not exist receive what others have; A, grad_y and C are zero for them.
  template <bool WITH_U, bool WITH_B, bool WITH_C, bool WITH_Y>
  DEVICE void fetch(int chunk, int turn, int place) {
    const int count = length(chunk), t_of_lane = rule.reverse ? count - 1 - lane : lane;
    if (lane < count)
      reinterpret_cast<int*>(tile + T::token)[turn * kChunk + t_of_lane] = i * rule.outer_stride + j * rule.inner_stride;
    sync_warp();
    const Columns<S::vector> u = columns_of_u();
    const Columns<S::vector> y(call.grad_y, b, g, first + column(), call.channels, sizeof(U));
    const Columns<S::vector> delta(call.delta, b, k, first + column(), call.channels, sizeof(F));
    float* const rows = tile + place + 4 * lane;  // a lane reads what it has sent for, so that the order is its own
    UNROLL
    for (int x = 0; x < iterations; ++x) {
      const int number = token(min_of(row_of(x), count - 1), turn);
      delta.template send<F>(number, rows + 128 * x);
      if (WITH_U) u.template send<U>(number, rows + T::rows + 128 * x);
      if (WITH_Y) y.template send<U>(number, rows + 2 * T::rows + 128 * x);
    }
    const int n = lane % S::lanes * 4;
    const Columns<S::vector> B(call.B, b, k, n, call.states, sizeof(F)), C(call.C, b, k, n, call.states, sizeof(F));
    float* const maps = rows + (WITH_Y ? 3 : 2) * T::rows;
    UNROLL
    for (int x = 0; x < map_iterations; ++x) {
      const int t = x * S::channel_lanes + lane / S::lanes, number = token(min_of(t, count - 1), turn);
      if (WITH_B && t < kChunk) B.template send<F>(number, maps + 128 * x);
      if (WITH_C && t < kChunk) C.template send<F>(number, maps + T::maps + 128 * x);
    }
  }

  // Puts what has arrived into the tile: steps and the like. Behind the last token of a chunk that is not full, steps
  // and all else of rows are zero: such tokens change nothing.
  template <bool WITH_U, bool WITH_B, bool WITH_C, bool WITH_Y, bool WITH_SLOPE>
  DEVICE void settle(int chunk, int place) {
    const int count = length(chunk), n = lane % S::lanes * 4;
    const float* const rows = tile + place + 4 * lane;
    const float* const maps = rows + (WITH_Y ? 3 : 2) * T::rows;
    float bias[4];
    parameters(call.bias, bias);
    wait_for_copies();
    sync_warp();  // everybody has finished with the tile
    UNROLL
    for (int x = 0; x < map_iterations; ++x) {
      const int t = x * S::channel_lanes + lane / S::lanes;
      if (WITH_B && t < kChunk) store4(floats<F>(maps + 128 * x, true), tile + T::B + t * S::states + n);
      if (WITH_C && t < kChunk)
        store4(floats<F>(maps + T::maps + 128 * x, n < call.states), tile + T::C + t * S::states + n);
    }
    UNROLL
    for (int x = 0; x < iterations; ++x) {
      const int at = row_of(x) * S::channels + column();
      Packed<float> step = floats<F>(rows + 128 * x, true), step_u = step, slope = step;
      if (WITH_U) step_u = floats<U>(rows + T::rows + 128 * x, true);
      UNROLL
      for (int e = 0; e < 4; ++e) {
        const float raw = step.values[e] + bias[e];
        float w, value = raw;
        if (S::softplus) value = softplus(raw, w);
        slope.values[e] = 1;
        if (S::softplus && WITH_SLOPE) slope.values[e] = softplus_slope(raw, w);
        step.values[e] = value;
        step_u.values[e] *= step.values[e];
      }
      store4(step, tile + T::step + at);
      if (WITH_U) store4(step_u, tile + T::step_u + at);
      if (WITH_SLOPE) store4(slope, tile + T::slope + at);
      if (WITH_Y)
        store4(floats<U>(rows + 2 * T::rows + 128 * x, first + column() < call.channels), tile + T::grad_y + at);
    }
    if (count < kChunk) {
      sync_warp();
      ROLLED
      for (int at = count * S::channels + lane; at < T::rows; at += 32) {
        tile[T::step + at] = 0;
        if (WITH_U) tile[T::step_u + at] = 0;
        if (WITH_Y) tile[T::grad_y + at] = 0;
      }
    }
    sync_warp();
  }

  // Four numbers of some type; zero where they do not exist.
  template <typename Number>
  DEVICE Packed<float> floats(const Packed<Number>& from, bool exists) const {
    Packed<float> to;
    UNROLL
    for (int e = 0; e < 4; ++e) to.values[e] = exists ? to_float(from.values[e]) : 0.0f;
    return to;
  }
  template <typename Number>
  DEVICE Packed<float> floats(const float* from, bool exists) const {
    return floats(*reinterpret_cast<const Packed<Number>*>(from), exists);
  }

  DEVICE void channels_at(int rows, int t, float (&to)[4]) const { load4(tile + rows + t * S::channels + channel(), to); }
  DEVICE void states_at(int maps, int t, float (&to)[4]) const { load4(tile + maps + t * S::states + state(), to); }

  // h <- exp(step A) h + step u B
  DEVICE void advance(int t, float (&h)[4][4]) const {
    float step[4], step_u[4], B[4];
    channels_at(T::step, t, step), channels_at(T::step_u, t, step_u), states_at(T::B, t, B);
    UNROLL
    for (int j = 0; j < 4; ++j)
      UNROLL
      for (int i = 0; i < 4; ++i) h[j][i] = exp2_fast(A[j][i] * step[j]) * h[j][i] + step_u[j] * B[i];
  }

  // Sums over the thread's states, of each of its channels, to `shares` (state lane, e); and their sums over lanes.
  DEVICE void put_shares(const float (&part)[4], int shares) const {
    store4(part, tile + shares + lane % S::lanes * T::shares_of_lane + channel());
  }
  DEVICE void sum_shares(int shares, float (&sum)[4]) const {
    load4(tile + shares + column(), sum);
    UNROLL
    for (int x = 1; x < S::lanes; ++x) {
      float share[4];
      load4(tile + shares + x * T::shares_of_lane + column(), share);
      UNROLL
      for (int j = 0; j < 4; ++j) sum[j] += share[j];
    }
  }

  // Adds the rows of a chunk in the tile up, each lane those it handles; and what the lanes have of the same columns.
  DEVICE void add_rows(int rows, float (&sum)[4]) const {
    UNROLL
    for (int it = 0; it < iterations; ++it) {
      float row[4];
      load4(tile + rows + row_of(it) * S::channels + column(), row);
      UNROLL
      for (int j = 0; j < 4; ++j) sum[j] += row[j];
    }
  }
  DEVICE void store_column_sums(float (&sum)[4], float* to) const {
    UNROLL
    for (int j = 0; j < 4; ++j) {
      UNROLL
      for (int mask = S::channel_lanes; mask < 32; mask *= 2) sum[j] += shuffle_xor(sum[j], mask);
      const int e = first + column() + j;
      if (lane < S::channel_lanes && e < call.channels) to[e] = sum[j];
    }
  }

  // Rows first .. first + kChunk / 2 - 1 of results, those before `end`: `value(token, t, does it exist, row)` computes
  // one. It is added to what earlier routes of the group have left in `call.sums`, and left there for later ones or, by
  // the last of them, written to `result`; in float32 these are the same.
  template <class Value>
  DEVICE void put_rows(void* result, int first_row, int end, int turn, bool is_first, bool is_last, const Value& value) {
    const Columns<S::vector> sums(call.like_u(call.sums, sizeof(float)), b, g, first + column(), call.channels,
                                  sizeof(float));
    const Columns<S::vector> results(call.like_u(result, sizeof(U)), b, g, first + column(), call.channels, sizeof(U));
    constexpr int half = iterations < 2 ? 1 : iterations / 2, together = half < 2 ? half : 2;
    ROLLED
    for (int done = 0; done < half; done += together) {
      Packed<float> before[together];
      int number[together];
      UNROLL
      for (int x = 0; x < together; ++x) {
        number[x] = token(min_of(row_in_half(first_row, done + x), end - 1), turn);
        if (!is_first) before[x] = sums.template read<float>(number[x]);
      }
      UNROLL
      for (int x = 0; x < together; ++x) {
        const int t = row_in_half(first_row, done + x);
        const bool exists = t < end && row_of(done + x) < kChunk / 2;
        float row[4];
        value(number[x], t, exists, row);
        if (!is_first) {
          UNROLL
          for (int e = 0; e < 4; ++e) row[e] += before[x].values[e];
        }
        if (exists && (is_last || sizeof(U) == sizeof(float))) results.template write<U>(number[x], row);
        if (exists && !is_last && sizeof(U) != sizeof(float)) sums.template write<float>(number[x], row);
      }
    }
  }
  // Where lanes have more rows at once than there are in half a chunk, the others repeat the last.
  DEVICE int row_in_half(int first_row, int it) const { return first_row + min_of(row_of(it), kChunk / 2 - 1); }
};

}  // namespace scan
