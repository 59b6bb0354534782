// The scan of one block of channels along one route, chunk by chunk: forward, and back with gradients.
//
// Axes of buffers: t token of the chunk, v vector of channels of the block, n state, j state of a group of kStates.
// As in the literature h is the state, and grad_h its gradient; a sequence is one pair (b, k).
#pragma once

#include "scan_call.h"

#include <memory>
#include <new>
#include <utility>

namespace scan {

// Zeroed memory of vectors for one task, handed out piece by piece.
template <typename S>
class Workspace {
 public:
  explicit Workspace(int64_t vectors)
      : data_(static_cast<Vec<S>*>(::operator new(vectors * sizeof(Vec<S>), std::align_val_t(64)))), next_(data_) {
    std::memset(static_cast<void*>(data_), 0, vectors * sizeof(Vec<S>));
  }
  ~Workspace() { ::operator delete(data_, std::align_val_t(64)); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  Vec<S>* take(int64_t vectors) { return std::exchange(next_, next_ + vectors); }

 private:
  Vec<S>* data_;
  Vec<S>* next_;
};

// One route and one block of channels: its parameters, its state, and the inputs of the current chunk.
template <typename S>
struct BlockScan {
  const Call<S>& call;
  const int64_t b, k, sequence, first, count, vecs;  // channels first .. first + count - 1
  Workspace<S> memory;
  Vec<S>*A, *state, *D, *bias;                // (n, v), (n, v), (v), (v); A times log2(e)
  Vec<S>*u, *raw_step, *step, *step_u, *out;  // (t, v); raw_step: step before softplus, step_u: step * u
  S *B, *C;                                   // (t, n)
  int64_t token[kChunk], length = 0;

  BlockScan(const Call<S>& call_, int64_t b_, int64_t k_, int64_t block, int64_t extra_vectors = 0)
      : call(call_), b(b_), k(k_), sequence(b_ * call_.num_routes + k_), first(block * call_.vecs * kLanes<S>),
        count(std::min(call_.channels - first, call_.vecs * kLanes<S>)), vecs(call_.vecs),
        memory(vecs * (2 * call_.padded_states + 2 + 5 * kChunk) + 2 * vectors_of_B() + extra_vectors) {
    for (Vec<S>** rows : {&A, &state}) *rows = memory.take(vecs * call.padded_states);
    for (Vec<S>** row : {&D, &bias}) *row = memory.take(vecs);
    for (Vec<S>** rows : {&u, &raw_step, &step, &step_u, &out}) *rows = memory.take(vecs * kChunk);
    for (S** rows : {&B, &C}) *rows = reinterpret_cast<S*>(memory.take(vectors_of_B()));
    read(call.A, k, call.states, A);
    for (int64_t i = 0; i < vecs * call.states; ++i) A[i] *= kLog2E<S>;
    read(call.D, k, 1, D);
    read(call.bias, k, 1, bias);
  }

  int64_t chunk_index(int64_t chunk) const { return chunk * call.batch * call.num_routes + sequence; }

  int64_t vectors_of_B() const { return kChunk * call.padded_states / kLanes<S> + 1; }

  // The i-th (rows, c) matrix of a tensor to and from this block's vectors (rows, v).
  void read(const Tensor& tensor, int64_t i, int64_t rows, Vec<S>* target) const {
    const S* source = tensor.const_data_ptr<S>() + i * rows * call.channels + first;
    for (int64_t r = 0; r < rows; ++r) std::memcpy(target + r * vecs, source + r * call.channels, count * sizeof(S));
  }
  void write(const Vec<S>* source, const Tensor& tensor, int64_t i, int64_t rows) const {
    S* target = tensor.data_ptr<S>() + i * rows * call.channels + first;
    for (int64_t r = 0; r < rows; ++r) std::memcpy(target + r * call.channels, source + r * vecs, count * sizeof(S));
  }

  void load_rows(const Rows& rows, Vec<S>* target) const {
    for (int64_t t = 0; t < length; ++t)
      rows.load(b, token[t], k, first, count, vecs * kLanes<S>, reinterpret_cast<S*>(target + t * vecs));
  }
  void store_rows(const Vec<S>* source, const Rows& rows, bool add) const {
    for (int64_t t = 0; t < length; ++t)
      rows.store(b, token[t], k, first, count, reinterpret_cast<const S*>(source + t * vecs), add);
  }

  void load(int64_t chunk) {
    length = std::min(kChunk, call.tokens - chunk * kChunk);
    call.routes[k].tokens(chunk * kChunk, length, token);
    for (int64_t t = 0; t < length; ++t) {
      call.B.load(b, token[t], k, 0, call.states, call.padded_states, B + t * call.padded_states);
      call.C.load(b, token[t], k, 0, call.states, call.padded_states, C + t * call.padded_states);
    }
    load_rows(call.u, u);
    load_rows(call.delta, raw_step);
    for (int64_t t = 0; t < length; ++t) {
      for (int64_t v = 0; v < vecs; ++v) {
        const int64_t i = t * vecs + v;
        raw_step[i] += bias[v];
        step[i] = call.softplus ? softplus<S>(raw_step[i]) : raw_step[i];
        step_u[i] = step[i] * u[i];
      }
    }
  }

  void forward(int64_t chunk, const Rows& y) {
    load(chunk);
    for (int64_t t = 0; t < length; ++t)
      for (int64_t v = 0; v < vecs; ++v) out[t * vecs + v] = D[v] * u[t * vecs + v];
    for (int64_t v = 0; v < vecs; ++v)
      for (int64_t n = 0; n < call.padded_states; n += kStates) scan_states(v, n);
    store_rows(out, y, k % call.routes_per_group > 0);
  }

  // Moves states n .. n + kStates - 1 of vector v through the chunk and adds their share to `out`.
  void scan_states(int64_t v, int64_t n) {
    Vec<S> rate[kStates], h[kStates];
    for (int j = 0; j < kStates; ++j) rate[j] = A[(n + j) * vecs + v], h[j] = state[(n + j) * vecs + v];
    for (int64_t t = 0; t < length; ++t) {
      const int64_t i = t * vecs + v;
      const S *B_t = B + t * call.padded_states + n, *C_t = C + t * call.padded_states + n;
      const Vec<S> s = step[i], p = step_u[i];
      Vec<S> sum = out[i];
#pragma GCC unroll 4
      for (int j = 0; j < kStates; ++j) {
        h[j] = exp2<S>(s * rate[j]) * h[j] + p * B_t[j];
        sum += h[j] * C_t[j];
      }
      out[i] = sum;
    }
    for (int j = 0; j < kStates; ++j) state[(n + j) * vecs + v] = h[j];
  }
};

// What the backward pass carries from window to window, per batch item: (b, k, n, c) or (b, k, c).
struct RunningGradients {
  Tensor grad_state, A, D, bias;
};

// A block that computes the states of a chunk again and goes back through it.
template <typename S>
struct BlockScanBackward : BlockScan<S> {
  using Base = BlockScan<S>;
  using Base::A, Base::call, Base::sequence, Base::D, Base::length, Base::B, Base::C, Base::memory, Base::step_u,
      Base::raw_step, Base::state, Base::step, Base::u, Base::vecs;
  Vec<S>*grad_state, *grad_A, *grad_D, *grad_bias;  // (n, v), (n, v), (v), (v)
  Vec<S>*grad_y, *grad_step_u, *grad_step;          // (t, v)
  Vec<S>*states, *decays, *terms_B, *terms_C;       // (t, j): of kStates states; terms are summed over vectors
  const RunningGradients& running;

  BlockScanBackward(const Call<S>& call_, int64_t b_, int64_t k_, int64_t block, const RunningGradients& running_)
      : Base(call_, b_, k_, block, extra_vectors(call_)), running(running_) {
    for (Vec<S>** rows : {&grad_state, &grad_A}) *rows = memory.take(vecs * call.padded_states);
    for (Vec<S>** row : {&grad_D, &grad_bias}) *row = memory.take(vecs);
    for (Vec<S>** rows : {&grad_step_u, &grad_step}) *rows = memory.take(vecs * kChunk);
    for (Vec<S>** rows : {&states, &decays, &terms_B, &terms_C}) *rows = memory.take(kStates * (kChunk + 1));
    grad_y = this->out;
    this->read(running.grad_state, sequence, call.states, grad_state);
    this->read(running.A, sequence, call.states, grad_A);
    this->read(running.D, sequence, 1, grad_D);
    this->read(running.bias, sequence, 1, grad_bias);
  }

  static int64_t extra_vectors(const Call<S>& call) {
    return call.vecs * (2 * call.padded_states + 2 + 2 * kChunk) + 4 * kStates * (kChunk + 1);
  }

  void save() const {
    this->write(grad_state, running.grad_state, sequence, call.states);
    this->write(grad_A, running.A, sequence, call.states);
    this->write(grad_D, running.D, sequence, 1);
    this->write(grad_bias, running.bias, sequence, 1);
  }

  // `sums` receives this block's share of the gradients of B and C: that of B in (t, n), then that of C.
  void backward(int64_t chunk, const Tensor& chunk_states, const Rows& grad_y_rows, const Rows& grad_u_rows,
                const Rows& grad_delta_rows, S* sums) {
    this->load(chunk);
    this->load_rows(grad_y_rows, grad_y);
    std::fill(grad_step_u, grad_step_u + vecs * length, Vec<S>{});
    std::fill(grad_step, grad_step + vecs * length, Vec<S>{});
    this->read(chunk_states, this->chunk_index(chunk), call.states, state);
    for (int64_t n = 0; n < call.padded_states; n += kStates) {
      std::fill(terms_B, terms_B + kStates * length, Vec<S>{});
      std::fill(terms_C, terms_C + kStates * length, Vec<S>{});
      for (int64_t v = 0; v < vecs; ++v) {
        recompute_states(v, n);
        backward_states(v, n);
      }
      for (int64_t t = 0; t < length; ++t) {
        for (int j = 0; j < kStates; ++j) {
          sums[t * call.padded_states + n + j] = sum_lanes<S>(terms_B[t * kStates + j]);
          sums[(kChunk + t) * call.padded_states + n + j] = sum_lanes<S>(terms_C[t * kStates + j]);
        }
      }
    }
    finish_gradients();
    this->store_rows(grad_step_u, grad_u_rows, call.routes_per_group > 1);
    this->store_rows(grad_step, grad_delta_rows, false);
  }

  // States before each step and after the last, and the decay of each step.
  void recompute_states(int64_t v, int64_t n) {
    Vec<S> rate[kStates], h[kStates];
    for (int j = 0; j < kStates; ++j) {
      rate[j] = A[(n + j) * vecs + v];
      states[j] = h[j] = state[(n + j) * vecs + v];
    }
    for (int64_t t = 0; t < length; ++t) {
      const S* B_t = B + t * call.padded_states + n;
      const Vec<S> s = step[t * vecs + v], p = step_u[t * vecs + v];
#pragma GCC unroll 4
      for (int j = 0; j < kStates; ++j) {
        const Vec<S> decay = exp2<S>(s * rate[j]);
        h[j] = decay * h[j] + p * B_t[j];
        decays[t * kStates + j] = decay;
        states[(t + 1) * kStates + j] = h[j];
      }
    }
  }

  // grad_h_t = C_t grad_y_t + decay_{t+1} grad_h_{t+1}
  void backward_states(int64_t v, int64_t n) {
    Vec<S> rate[kStates], grad_h[kStates], sum_A[kStates] = {};
    for (int j = 0; j < kStates; ++j) rate[j] = A[(n + j) * vecs + v], grad_h[j] = grad_state[(n + j) * vecs + v];
    for (int64_t t = length - 1; t >= 0; --t) {
      const int64_t i = t * vecs + v;
      const S *B_t = B + t * call.padded_states + n, *C_t = C + t * call.padded_states + n;
      const Vec<S> grad_out = grad_y[i], s = step[i], p = step_u[i];
      Vec<S> sum_step_u = grad_step_u[i], sum_step = grad_step[i];
#pragma GCC unroll 4
      for (int j = 0; j < kStates; ++j) {
        const int64_t at = t * kStates + j;
        grad_h[j] += grad_out * C_t[j];
        terms_C[at] += grad_out * states[at + kStates];
        terms_B[at] += grad_h[j] * p;
        sum_step_u += grad_h[j] * B_t[j];
        grad_h[j] *= decays[at];
        const Vec<S> exponent = grad_h[j] * states[at];  // gradient of step * A
        sum_A[j] += exponent * s;
        sum_step += exponent * rate[j];
      }
      grad_step_u[i] = sum_step_u, grad_step[i] = sum_step;
    }
    for (int j = 0; j < kStates; ++j) {
      grad_state[(n + j) * vecs + v] = grad_h[j];
      grad_A[(n + j) * vecs + v] += sum_A[j];
    }
  }

  // From the gradients of step_u = step * u and of step to those of u and delta, in place.
  void finish_gradients() {
    for (int64_t v = 0; v < vecs; ++v) {
      Vec<S> sum_D{}, sum_bias{};
      for (int64_t t = 0; t < length; ++t) {
        const int64_t i = t * vecs + v;
        Vec<S> slope = grad_step[i] * kLn2<S> + grad_step_u[i] * u[i];  // rates were in units of log2(e)
        if (call.softplus) slope *= softplus_slope<S>(raw_step[i]);
        grad_step[i] = slope;
        grad_step_u[i] = grad_step_u[i] * step[i] + D[v] * grad_y[i];
        sum_D += grad_y[i] * u[i];
        sum_bias += slope;
      }
      grad_D[v] += sum_D, grad_bias[v] += sum_bias;
    }
  }
};

}  // namespace scan
