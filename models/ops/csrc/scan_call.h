// The arguments of one call of the scan: rows in spatial order, routes over them, and how the work is cut into tasks.
//
// Axes: b batch, t token, k route, c channel, n state. S is the type of the arithmetic, float or double.
#pragma once

#include "scan_simd.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <optional>
#include <vector>

namespace scan {

using at::ScalarType;
using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kChunk = 64;                 // tokens between two kept states; CHUNK_TOKENS in Python says the same
constexpr int64_t kMinVecs = 3, kMaxVecs = 8;  // width of a block of channels
constexpr int64_t kWantedBlocks = 8;           // blocks get narrower rather than fewer than this in a call
constexpr int64_t kReduceGrain = 32;           // chunks whose sums over blocks are worth a thread

// Position p visits token (p / inner) * outer_stride + (p % inner) * inner_stride, counted from the end if reversed.
struct Route {
  int64_t outer, inner, outer_stride, inner_stride, reversed;

  // The tokens at positions begin .. begin + count - 1.
  void tokens(int64_t begin, int64_t count, int64_t* out) const {
    const int64_t position = reversed ? outer * inner - 1 - begin : begin;
    int64_t i = position / inner, j = position % inner;
    for (int64_t n = 0; n < count; ++n) {
      out[n] = i * outer_stride + j * inner_stride;
      if (reversed && j-- == 0) j = inner - 1, --i;
      if (!reversed && ++j == inner) j = 0, ++i;
    }
  }
};

// Rows of a (batch, tokens, routes or groups of routes, columns) tensor of any floating type, read and written as S.
struct Rows {
  Tensor tensor;
  char* data;
  ScalarType type;
  int64_t size, batch, token, group, routes_per_group;

  Rows(const Tensor& source, int64_t num_routes) : tensor(source.stride(3) == 1 ? source : source.contiguous()) {
    data = static_cast<char*>(tensor.data_ptr());
    type = tensor.scalar_type();
    size = tensor.element_size();
    batch = tensor.stride(0) * size;
    token = tensor.stride(1) * size;
    group = tensor.stride(2) * size;
    routes_per_group = num_routes / tensor.size(2);
  }

  char* at(int64_t b, int64_t t, int64_t k, int64_t first) const {
    return data + b * batch + t * token + k / routes_per_group * group + first * size;
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
  bool softplus;
  int64_t batch, tokens, num_routes, channels, states;
  int64_t groups, routes_per_group;  // routes of a group read the same rows of u and add their results up
  int64_t padded_states, chunks, vecs, blocks;

  Call(const Tensor& u_, const Tensor& delta_, const Tensor& A_, const Tensor& B_, const Tensor& C_,
       const OptionalTensor& D_, const OptionalTensor& bias_, at::IntArrayRef flat_routes, bool softplus_)
      : u(u_, A_.size(0)), delta(delta_, A_.size(0)), B(B_, A_.size(0)), C(C_, A_.size(0)), softplus(softplus_) {
    batch = delta_.size(0), tokens = delta_.size(1), num_routes = delta_.size(2), channels = delta_.size(3);
    states = A_.size(2);
    groups = u_.size(2), routes_per_group = num_routes / groups;
    const auto type = c10::CppTypeToScalarType<S>::value;
    A = A_.to(type).transpose(1, 2).contiguous();
    const auto zeros = [&] { return at::zeros({num_routes, channels}, A.options()); };
    D = D_ ? D_->to(type).contiguous() : zeros();
    bias = bias_ ? bias_->to(type).contiguous() : zeros();
    TORCH_CHECK(static_cast<int64_t>(flat_routes.size()) == 5 * num_routes, "scan: five numbers for each route");
    for (int64_t k = 0; k < num_routes; ++k) {
      const int64_t* r = flat_routes.data() + 5 * k;
      TORCH_CHECK(r[0] * r[1] == tokens, "scan: a route of ", r[0] * r[1], " positions over ", tokens, " tokens");
      routes.push_back({r[0], r[1], r[2], r[3], r[4]});
    }
    padded_states = (states + kStates - 1) / kStates * kStates;
    chunks = (tokens + kChunk - 1) / kChunk;
    cut_channels();
  }

  // Scans that may run side by side; the routes of a group run one after the other.
  int64_t parallel_scans() const { return batch * groups; }

  // Blocks of equal width, a function of the shape alone: sums over channels are taken block by block.
  void cut_channels() {
    const int64_t all = (channels + kLanes<S> - 1) / kLanes<S>;
    const int64_t width = std::clamp<int64_t>(all * parallel_scans() / kWantedBlocks, kMinVecs, kMaxVecs);
    blocks = (all + width - 1) / width;
    vecs = blocks ? (all + blocks - 1) / blocks : 1;
  }

  // run(b, routes begin .. end - 1, blocks begin .. end - 1) for every task. A task has as many blocks as the number of
  // threads allows, since rows are then read once; results do not depend on it.
  template <typename F>
  void for_each_task(const F& run) const {
    const int64_t threads = at::get_num_threads(), wanted = threads == 1 ? 1 : 2 * threads;
    const int64_t scans = parallel_scans();
    const int64_t parts = std::clamp<int64_t>(wanted / std::max<int64_t>(scans, 1), 1, std::max<int64_t>(blocks, 1));
    at::parallel_for(0, scans * parts, 1, [&](int64_t begin, int64_t end) {
      const FlushSubnormals guard;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t scan = task / parts, part = task % parts;
        const int64_t first_block = part * blocks / parts, end_block = (part + 1) * blocks / parts;
        const int64_t first_route = scan % groups * routes_per_group;
        run(scan / groups, first_route, first_route + routes_per_group, first_block, end_block);
      }
    });
  }
};

}  // namespace scan
