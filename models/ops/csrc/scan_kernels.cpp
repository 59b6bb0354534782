// The selective scan along routes over a grid of tokens, forward and backward, on CPUs.
//
// Tokens lie as rows of channels in spatial order; a route only says which row comes next, so nothing is reordered in
// memory. Work is done by chunks of kChunk tokens and blocks of a few vectors of channels. The forward pass keeps the
// state before each chunk; the backward pass computes the states of one chunk at a time again from there, into a buffer
// that fits the first-level cache, and goes back through it.
//
// Tasks (batch, group of routes, block) run in parallel. Routes of a group share their input; a task runs them one after
// the other, so that their results add up in place. The gradients of B and C sum over the blocks of a route: blocks
// write partial sums for a window of tokens, which are then added in a fixed order. No result depends on the number of
// threads.
//
// Axes: b batch, t token, k route, c channel, n state. A sequence is one pair (b, k).

#include "scan_block.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <deque>
#include <tuple>

namespace scan {
namespace {

template <typename S>
std::tuple<Tensor, Tensor, Tensor> forward(const Call<S>& call, const Tensor& u, bool keep_chunk_states) {
  const auto options = call.A.options();
  // Half-precision results of several routes are added up in single precision.
  const Tensor y = at::empty(u.sizes(), call.routes_per_group > 1 ? options : u.options());
  const Tensor last = at::zeros({call.batch, call.num_routes, call.states, call.channels}, options);
  const Tensor chunk_states = keep_chunk_states
      ? at::empty({call.chunks, call.batch, call.num_routes, call.states, call.channels}, options)
      : at::empty({0}, options);
  const Rows y_rows(y, call.num_routes);
  call.for_each_task([&](int64_t b, int64_t first_route, int64_t end_route, int64_t first_block, int64_t end_block) {
    for (int64_t k = first_route; k < end_route; ++k) {
      std::deque<BlockScan<S>> scans;
      for (int64_t block = first_block; block < end_block; ++block) scans.emplace_back(call, b, k, block);
      for (int64_t chunk = 0; chunk < call.chunks; ++chunk) {
        for (BlockScan<S>& one : scans) {
          if (keep_chunk_states) one.write(one.state, chunk_states, one.chunk_index(chunk), call.states);
          one.forward(chunk, y_rows);
        }
      }
      for (const BlockScan<S>& one : scans) one.write(one.state, last, one.sequence, call.states);
    }
  });
  return {y.to(u.scalar_type()), last.transpose(2, 3).contiguous(), chunk_states};
}

// Adds the blocks' partial sums of one window, block after block, into the gradients of B and C.
template <typename S>
void sum_over_blocks(const Call<S>& call, int64_t first_chunk, int64_t num_chunks, const Tensor& partial_sums,
                     const Rows& grad_B, const Rows& grad_C) {
  const int64_t size = kChunk * call.padded_states, block_size = num_chunks * 2 * size;
  at::parallel_for(0, call.batch * call.num_routes * num_chunks, kReduceGrain, [&](int64_t begin, int64_t end) {
    std::vector<S> sums(2 * size);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t sequence = item / num_chunks, chunk = item % num_chunks, b = sequence / call.num_routes,
                    k = sequence % call.num_routes, start = (first_chunk + chunk) * kChunk;
      std::fill(sums.begin(), sums.end(), S(0));
      for (int64_t block = 0; block < call.blocks; ++block) {
        const S* partial =
            partial_sums.const_data_ptr<S>() + (sequence * call.blocks + block) * block_size + chunk * 2 * size;
        for (int64_t i = 0; i < 2 * size; ++i) sums[i] += partial[i];
      }
      int64_t token[kChunk];
      const int64_t length = std::min(kChunk, call.tokens - start);
      call.routes[k].tokens(start, length, token);
      for (int64_t t = 0; t < length; ++t) {
        grad_B.store(b, token[t], k, 0, call.states, sums.data() + t * call.padded_states, false);
        grad_C.store(b, token[t], k, 0, call.states, sums.data() + size + t * call.padded_states, false);
      }
    }
  });
}

// Chunks between two reductions of the gradients of B and C: as many as hold a quarter of the memory of delta.
template <typename S>
int64_t reduction_window(const Call<S>& call) {
  const int64_t sums_of_chunk = std::max<int64_t>(2 * kChunk * call.padded_states * call.blocks, 1);
  return std::clamp<int64_t>(call.tokens * call.channels / 4 / sums_of_chunk, 4, std::max<int64_t>(call.chunks, 4));
}

Tensor sum_over_batch(const Tensor& values) {
  Tensor total = at::zeros(values.sizes().slice(1), values.options());
  for (int64_t b = 0; b < values.size(0); ++b) total.add_(values[b]);
  return total;
}

template <typename S>
std::vector<Tensor> backward(const Call<S>& call, const Tensor& chunk_states, const Tensor& grad_y,
                             const Tensor& grad_last) {
  const auto options = call.A.options();
  const int64_t kept = call.chunks * call.batch * call.num_routes * call.states * call.channels;
  TORCH_CHECK(chunk_states.numel() == kept, "scan: ", chunk_states.numel(), " kept states where ", kept, " are needed");
  const auto dense_like = [](const Rows& rows) { return at::empty(rows.tensor.sizes(), rows.tensor.options()); };
  const Tensor grad_u = call.routes_per_group > 1 ? at::zeros(call.u.tensor.sizes(), options) : dense_like(call.u);
  const Tensor grad_delta = dense_like(call.delta), grad_B = dense_like(call.B), grad_C = dense_like(call.C);
  RunningGradients running;
  running.grad_state = grad_last.to(call.A.scalar_type()).transpose(2, 3).clone(at::MemoryFormat::Contiguous);
  running.A = at::zeros_like(running.grad_state);
  running.D = at::zeros({call.batch, call.num_routes, call.channels}, options);
  running.bias = at::zeros_like(running.D);
  const auto rows = [&](const Tensor& tensor) { return Rows(tensor, call.num_routes); };
  const Rows grad_y_rows = rows(grad_y), grad_u_rows = rows(grad_u), grad_delta_rows = rows(grad_delta);
  const Rows grad_B_rows = rows(grad_B), grad_C_rows = rows(grad_C);

  const int64_t size = 2 * kChunk * call.padded_states, sequences = call.batch * call.num_routes;
  const int64_t window = reduction_window(call);
  const Tensor partial_sums = at::empty({sequences * call.blocks * window * size}, options);
  for (int64_t end = call.chunks; end > 0; end -= window) {
    const int64_t begin = std::max<int64_t>(end - window, 0), num_chunks = end - begin;
    call.for_each_task([&](int64_t b, int64_t first_route, int64_t end_route, int64_t first_block, int64_t end_block) {
      for (int64_t k = first_route; k < end_route; ++k) {
        std::deque<BlockScanBackward<S>> scans;
        for (int64_t block = first_block; block < end_block; ++block) scans.emplace_back(call, b, k, block, running);
        for (int64_t chunk = end - 1; chunk >= begin; --chunk) {
          S* sums = partial_sums.data_ptr<S>() + (scans[0].sequence * call.blocks + first_block) * num_chunks * size;
          for (BlockScanBackward<S>& one : scans) {
            one.backward(chunk, chunk_states, grad_y_rows, grad_u_rows, grad_delta_rows, sums + (chunk - begin) * size);
            sums += num_chunks * size;
          }
        }
        for (const BlockScanBackward<S>& one : scans) one.save();
      }
    });
    sum_over_blocks(call, begin, num_chunks, partial_sums, grad_B_rows, grad_C_rows);
  }
  return {grad_u.to(call.u.type), grad_delta, sum_over_batch(running.A).transpose(1, 2).contiguous(), grad_B,
          grad_C, sum_over_batch(running.D), sum_over_batch(running.bias)};
}

template <typename F>
auto with_state_type(const Tensor& A, const F& run) {
  return A.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
}

// A decides the arithmetic: double for a double A, single otherwise. Shapes are checked by the caller.
std::tuple<Tensor, Tensor, Tensor> scan_forward(
    const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C, const OptionalTensor& D,
    const OptionalTensor& delta_bias, at::IntArrayRef routes, bool delta_softplus, bool keep_chunk_states) {
  return with_state_type(A, [&](auto zero) {
    const Call<decltype(zero)> call(u, delta, A, B, C, D, delta_bias, routes, delta_softplus);
    return forward(call, u, keep_chunk_states);
  });
}

// Gradients of u, delta, A, B, C, D, delta_bias; the last three without time axis in the arithmetic's type.
std::vector<Tensor> scan_backward(
    const Tensor& grad_y, const Tensor& grad_last, const Tensor& chunk_states, const Tensor& u, const Tensor& delta,
    const Tensor& A, const Tensor& B, const Tensor& C, const OptionalTensor& D, const OptionalTensor& delta_bias,
    at::IntArrayRef routes, bool delta_softplus) {
  return with_state_type(A, [&](auto zero) {
    const Call<decltype(zero)> call(u, delta, A, B, C, D, delta_bias, routes, delta_softplus);
    return backward(call, chunk_states, grad_y, grad_last);
  });
}

}  // namespace
}  // namespace scan

TORCH_LIBRARY(mtdp_scan, library) {
  library.def("forward(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? delta_bias, "
              "int[] routes, bool delta_softplus, bool keep_chunk_states) -> (Tensor, Tensor, Tensor)");
  library.def("backward(Tensor grad_y, Tensor grad_last, Tensor chunk_states, Tensor u, Tensor delta, Tensor A, "
              "Tensor B, Tensor C, Tensor? D, Tensor? delta_bias, int[] routes, bool delta_softplus) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(mtdp_scan, CPU, library) {
  library.impl("forward", &scan::scan_forward);
  library.impl("backward", &scan::scan_backward);
}
