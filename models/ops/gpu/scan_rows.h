// What the kernels are compiled for, where a warp keeps a chunk in shared memory, and rows in the memory of the card.
#pragma once

#include "scan_call.h"

namespace scan {

template <typename U_, typename F_, int LANES, bool SOFTPLUS, bool VECTOR>
struct Spec {
  using U = U_;  // type of u and y
  using F = F_;  // type of delta, B and C
  static constexpr int lanes = LANES, channel_lanes = 32 / LANES;
  static constexpr int channels = 4 * channel_lanes, states = 4 * LANES;
  static constexpr bool softplus = SOFTPLUS;
  static constexpr bool vector = VECTOR;  // are all rows and matrices such that 4 columns can be read at once?
};

// The shared memory of a warp, in floats: places of rows (t, e), maps (t, n) and token numbers of two chunks; then, of
// half a chunk, forward the shares in y of each lane's states (t, state lane, e), backward the states (t, j, lane, i);
// and where the next chunk arrives as it lies in memory: u, delta, grad_y, B and C. Backward this is where states will be.
template <class S>
struct Tile {
  static constexpr int rows = kChunk * S::channels, maps = kChunk * S::states;
  static constexpr int step = 0, step_u = rows, B = 2 * rows, C = B + maps, token = C + maps, shares = token + 2 * kChunk;
  static constexpr int shares_of_lane = S::channels + (S::lanes < 8 ? 32 / S::lanes : 4);  // no two in the same banks
  static constexpr int shares_of_token = S::lanes * shares_of_lane, states_of_token = 512;
  static constexpr int arriving_forward = shares + kChunk / 2 * shares_of_token;
  static constexpr int forward_floats = arriving_forward + 2 * rows + 2 * maps;
  static constexpr int slope = token + 2 * kChunk, grad_y = slope + rows, states = grad_y + rows;
  static constexpr int backward_floats = states + max_of(kChunk / 2 * states_of_token, 3 * rows + 2 * maps);
};

// Columns of rows that lie in memory, as a lane reads and writes them: 4 of them, as far as they exist.
template <bool VECTOR>
struct Columns {
  const char* data;
  int token;     // stride
  int existing;  // 0 to 4

  DEVICE Columns(const Rows& rows, int b, int r, int column, int columns, int size)
      : token(rows.token), existing(min_of(max_of(columns - column, 0), 4)) {
    data = rows.at(b, r) + (existing ? column : 0) * size;  // some that exist, where these do not
  }

  template <typename T>
  DEVICE Packed<T> read(int number) const {
    const char* const row = row_at(data, number, token);
    if constexpr (VECTOR) {
      return *reinterpret_cast<const Packed<T>*>(row);
    } else {
      Packed<T> four = {};
      UNROLL
      for (int j = 0; j < 4; ++j)
        if (j < existing) four.values[j] = reinterpret_cast<const T*>(row)[j];
      return four;
    }
  }

  // To shared memory; they are there after `wait_for_copies`.
  template <typename T>
  DEVICE void send(int number, float* to) const {
    if constexpr (VECTOR) {
      start_copy<sizeof(Packed<T>)>(row_at(data, number, token), to);
    } else {
      *reinterpret_cast<Packed<T>*>(to) = read<T>(number);
    }
  }

  template <typename T>
  DEVICE void write(int number, const float (&from)[4]) const {
    char* const row = const_cast<char*>(row_at(data, number, token));
    if constexpr (VECTOR) {
      Packed<T> four;
      UNROLL
      for (int j = 0; j < 4; ++j) from_float(from[j], four.values[j]);
      if (existing) *reinterpret_cast<Packed<T>*>(row) = four;
    } else {
      UNROLL
      for (int j = 0; j < 4; ++j)
        if (j < existing) from_float(from[j], reinterpret_cast<T*>(row)[j]);
    }
  }
};

}  // namespace scan
