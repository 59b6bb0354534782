// The phases of a call. Blocks work through the tasks of a phase; between phases all blocks wait for each other.
//
// forward: each span from a zero state; the states before spans, one after the other; each span again, from its state.
// backward: the same with the gradient of the state, from the other end. Where the card is full without spans there is
// one span, and the first two phases are left out. The last phase has rounds: in a round every group scans those of its
// routes that read the tokens of a span in the same or the opposite order, one after the other; what routes of a group
// share is thus written by one warp at a time, in a fixed order.
#pragma once

#include "scan_walks.h"

namespace scan {

// State behind each span that began with zero, and the sum of its steps; or, with BACK, the gradient of the state before
// each span if that of the state behind it is zero.
template <class S, bool BACK>
DEVICE void scan_span(const Call& call, float* memory, int index) {
  const Task<S> task(call, index, call.routes);
  Warp<S> warp(call, memory, task.b, task.row, task.first);
  const bool downwards = bool(warp.rule.reverse) != BACK;
  const int begin = first_chunk(call, task.span), end = end_chunk(call, task.span);
  float h[4][4] = {}, sum[4] = {};
  constexpr int place = BACK ? Tile<S>::states : Tile<S>::arriving_forward;
  warp.start(downwards ? end - 1 : begin);
  warp.template fetch<!BACK, !BACK, BACK, BACK>(downwards ? end - 1 : begin, 0, place);
  ROLLED
  for (int count = 0; count < end - begin; ++count) {
    const int chunk = downwards ? end - 1 - count : begin + count;
    warp.template settle<!BACK, !BACK, BACK, BACK, false>(chunk, place);
    if (count + 1 < end - begin) {
      warp.next(downwards);
      warp.template fetch<!BACK, !BACK, BACK, BACK>(downwards ? chunk - 1 : chunk + 1, 0, place);
    }
    warp.add_rows(Tile<S>::step, sum);
    UNROLL_2
    for (int i = 0; i < kChunk; ++i) {
      const int t = BACK ? kChunk - 1 - i : i;
      if (!BACK) {
        warp.advance(t, h);
      } else {
        float step[4], grad_y[4], C[4];
        warp.channels_at(Tile<S>::step, t, step), warp.channels_at(Tile<S>::grad_y, t, grad_y), warp.states_at(Tile<S>::C, t, C);
        UNROLL
        for (int j = 0; j < 4; ++j)
          UNROLL
          for (int n = 0; n < 4; ++n)
            h[j][n] = exp2_fast(warp.A[j][n] * step[j]) * (h[j][n] + C[n] * grad_y[j]);
      }
    }
  }
  const long long at = (task.span * (long long)call.batch * call.routes + warp.sequence()) * call.channels;
  warp.store_states(h, call.span_states + at * call.states);
  warp.store_column_sums(sum, call.step_sums + at);
}

// Replaces what `scan_span` found by the true state before each span; with BACK, by the gradient of that behind it.
template <bool BACK>
DEVICE void scan_over_spans(const Call& call, int thread, int threads) {
  const long long size = (long long)call.batch * call.routes * call.channels * call.states;
  for (long long i = thread; i < size; i += threads) {
    const long long sequence_e = i / call.states, k_e = sequence_e % ((long long)call.routes * call.channels);
    const float A = call.A[k_e * call.states + i % call.states] * kLog2E;
    const bool reverse = call.rules[k_e / call.channels].reverse;
    float state = BACK ? call.grad_last[i] : 0.0f;
    constexpr int kAhead = 8;  // loads that are under way together
    for (int done = 0; done < call.spans; done += kAhead) {
      float from_zero[kAhead], step_sum[kAhead];
      long long at[kAhead];
      UNROLL
      for (int x = 0; x < kAhead; ++x) {
        const int count = min_of(done + x, call.spans - 1), span = reverse != BACK ? call.spans - 1 - count : count;
        at[x] = span * size + i;
        from_zero[x] = call.span_states[at[x]];
        step_sum[x] = call.step_sums[span * (size / call.states) + sequence_e];
      }
      UNROLL
      for (int x = 0; x < kAhead; ++x) {
        if (done + x < call.spans) {
          call.span_states[at[x]] = state;
          state = exp2_fast(A * step_sum[x]) * state + from_zero[x];
        }
      }
    }
  }
}

// The routes of a group that belong to a round, over one span.
template <class S, bool BACK>
DEVICE void scan_group(const Call& call, float* memory, int index, int round) {
  const Task<S> task(call, index, call.groups);
  const int routes = call.routes / call.groups;
  float* const own = memory + warp_index() * (BACK ? Tile<S>::backward_floats : Tile<S>::forward_floats);
  ROLLED
  for (int k = task.row * routes; k < (task.row + 1) * routes; ++k) {
    const int flags = call.round_of[k];
    if (flags % kFirstOfGroup != round) continue;
    Warp<S> warp(call, own, task.b, k, task.first);
    if constexpr (BACK) {
      backward_walk(call, warp, memory, task, flags & kFirstOfGroup, flags & kLastOfGroup);
    } else {
      forward_walk(call, warp, task.span, flags & kFirstOfGroup, flags & kLastOfGroup);
    }
  }
}

constexpr int kFirstRound = 2;  // the number of the phase

DEVICE int begin_phase(const Call& call) { return call.spans > 1 ? 0 : kFirstRound; }
DEVICE int end_phase(const Call& call) { return kFirstRound + call.rounds; }

template <class S, bool BACK>
DEVICE void run_phase(const Call& call, float* memory, int phase) {
  if (phase == 1) return scan_over_spans<BACK>(call, block_index() * num_warps() * 32 + thread_index(),
                                               num_blocks() * num_warps() * 32);
  const int tasks = call.batch * (phase == 0 ? call.routes : call.groups) * call.spans * call.blocks;
  ROLLED
  for (int task = block_index(); task < tasks; task += num_blocks()) {
    if (phase == 0) {
      scan_span<S, BACK>(call, memory + warp_index() * (BACK ? Tile<S>::backward_floats : Tile<S>::forward_floats), task);
    } else {
      scan_group<S, BACK>(call, memory, task, phase - kFirstRound);
    }
  }
}

#ifdef __CUDACC__
// Waits until all blocks have come here for the n-th time. All of them run at once: the launch is a cooperative one.
DEVICE void wait_for_all_blocks(unsigned* arrived, unsigned n) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    atomicAdd(arrived, 1);
    while (*reinterpret_cast<volatile unsigned*>(arrived) < n * gridDim.x) {}
    __threadfence();
  }
  __syncthreads();
}

template <class S, bool BACK>
DEVICE void run(const Call& call, float* memory) {
  const int begin = begin_phase(call), end = end_phase(call);
  ROLLED
  for (int phase = begin; phase < end; ++phase) {
    run_phase<S, BACK>(call, memory, phase);
    if (phase + 1 < end) wait_for_all_blocks(call.barrier, phase + 1 - begin);
  }
}
#endif

}  // namespace scan
