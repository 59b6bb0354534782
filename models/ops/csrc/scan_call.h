// The arguments of one call of the scan: rows in spatial order, routes over them, and how the work is cut into tasks.
#pragma once

#include "scan_simd.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <vector>

namespace scan {

using at::ScalarType;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kChunk = 32;    // tokens between two kept states; Python counts on it
constexpr int64_t kMaxVecs = 8;   // most vectors in a block of channels
constexpr int64_t kMinTasks = 8;  // blocks get smaller rather than fewer than this
constexpr int64_t kCacheLine = 64;

// Position p visits token (p / inner) * outer_stride + (p % inner) * inner_stride, counted from the end if reversed.
struct Route {
  int64_t outer, inner, outer_stride, inner_stride, reversed;

  int64_t token(int64_t position) const {
    if (reversed) position = outer * inner - 1 - position;
    return position / inner * outer_stride + position % inner * inner_stride;
  }
};

// Rows of a (batch, tokens, groups, columns) tensor of any floating type, read and written as S.
struct Rows {
  Tensor tensor;
  char* data;
  ScalarType type;
  int64_t size, batch, token, group;

  explicit Rows(const Tensor& source) : tensor(source.stride(3) == 1 ? source : source.contiguous()) {
    data = static_cast<char*>(tensor.data_ptr());
    type = tensor.scalar_type();
    size = tensor.element_size();
    batch = tensor.stride(0) * size;
    token = tensor.stride(1) * size;
    group = tensor.size(2) == 1 ? 0 : tensor.stride(2) * size;  // one group serves all routes
  }

  char* at(int64_t b, int64_t t, int64_t k, int64_t first) const {
    return data + b * batch + t * token + k * group + first * size;
  }

  template <typename F>
  void with_type(const F& run) const {
    switch (type) {
      case ScalarType::Float: return run(float{});
      case ScalarType::Double: return run(double{});
      case ScalarType::BFloat16: return run(at::BFloat16{});
      case ScalarType::Half: return run(at::Half{});
      default: TORCH_CHECK(false, "scan: unsupported type ", type);
    }
  }

  // Asks for a row that will be read soon; rows of a route may lie far apart, where hardware does not guess.
  void prefetch(int64_t b, int64_t t, int64_t k, int64_t first, int64_t count) const {
    const char* row = at(b, t, k, first);
    for (int64_t offset = 0; offset < count * size; offset += kCacheLine) __builtin_prefetch(row + offset);
  }

  // Columns first .. first + count - 1 into out[0 .. padded - 1], zeros behind them.
  template <typename S>
  void load(int64_t b, int64_t t, int64_t k, int64_t first, int64_t count, int64_t padded, S* out) const {
    with_type([&](auto zero) {
      using T = decltype(zero);
      const T* row = reinterpret_cast<const T*>(at(b, t, k, first));
      if constexpr (std::is_same_v<S, T>) {
        std::memcpy(out, row, count * sizeof(S));
      } else {
        for (int64_t i = 0; i < count; ++i) out[i] = static_cast<S>(row[i]);
      }
    });
    for (int64_t i = count; i < padded; ++i) out[i] = S(0);
  }

  template <typename S>
  void store(int64_t b, int64_t t, int64_t k, int64_t first, int64_t count, const S* in, bool add) const {
    with_type([&](auto zero) {
      using T = decltype(zero);
      T* row = reinterpret_cast<T*>(at(b, t, k, first));
      if (add) {
        for (int64_t i = 0; i < count; ++i) row[i] = static_cast<T>(static_cast<S>(row[i]) + in[i]);
      } else if constexpr (std::is_same_v<S, T>) {
        std::memcpy(row, in, count * sizeof(S));
      } else {
        for (int64_t i = 0; i < count; ++i) row[i] = static_cast<T>(in[i]);
      }
    });
  }
};

// One call: its arguments, sizes and the way it is cut into tasks.
template <typename S>
struct Call {
  Rows u, delta, B, C;
  Tensor A, D, bias;  // (k, n, c), (k, c), (k, c) as S
  std::vector<Route> routes;
  bool softplus, shared;
  int64_t batch, tokens, groups, channels, states;
  int64_t padded_states, chunks, vecs, blocks;

  Call(const Tensor& u_, const Tensor& delta_, const Tensor& A_, const Tensor& B_, const Tensor& C_,
       const OptionalTensor& D_, const OptionalTensor& bias_, at::IntArrayRef flat_routes, bool softplus_)
      : u(u_), delta(delta_), B(B_), C(C_), softplus(softplus_) {
    batch = delta_.size(0), tokens = delta_.size(1), groups = delta_.size(2), channels = delta_.size(3);
    states = A_.size(2);
    shared = u_.size(2) == 1 && groups > 1;
    const auto type = c10::CppTypeToScalarType<S>::value;
    A = A_.to(type).transpose(1, 2).contiguous();
    const auto zeros = [&] { return at::zeros({groups, channels}, A.options()); };
    D = D_ ? D_->to(type).contiguous() : zeros();
    bias = bias_ ? bias_->to(type).contiguous() : zeros();
    for (int64_t k = 0; k < groups; ++k) {
      const int64_t* r = flat_routes.data() + 5 * k;
      routes.push_back({r[0], r[1], r[2], r[3], r[4]});
    }
    padded_states = (states + kStates - 1) / kStates * kStates;
    chunks = (tokens + kChunk - 1) / kChunk;
    cut_channels();
  }

  // Blocks of equal size, small enough for some parallelism; a function of the shape alone, as are all results.
  void cut_channels() {
    const int64_t all = (channels + kLanes<S> - 1) / kLanes<S>;
    const int64_t chains = batch * (shared ? 1 : groups);
    const int64_t wanted = std::clamp<int64_t>(all * chains / kMinTasks, 1, kMaxVecs);
    blocks = (all + wanted - 1) / wanted;
    vecs = blocks ? (all + blocks - 1) / blocks : 1;
  }

  int64_t tasks() const { return batch * (shared ? 1 : groups) * blocks; }

  // run(b, first route, one past the last route, block) for every task.
  template <typename F>
  void for_each_task(const F& run) const {
    at::parallel_for(0, tasks(), 1, [&](int64_t begin, int64_t end) {
      const FlushSubnormals guard;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t block = task % blocks, chain = task / blocks;
        if (shared) {
          run(chain, int64_t{0}, groups, block);
        } else {
          run(chain / groups, chain % groups, chain % groups + 1, block);
        }
      }
    });
  }
};

}  // namespace scan
