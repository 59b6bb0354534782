// The threads of a GPU block, emulated on one thread of a CPU: each is a context of its own, which runs until it waits
// for others. A wait that the others never join is an error, as it would be a deadlock on a GPU.
#pragma once

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>

#define DEVICE inline
#define UNROLL
#define ROLLED
#define UNROLL_2

struct alignas(16) float4 {
  float x, y, z, w;
};

struct alignas(16) int4 {
  int x, y, z, w;
};

namespace scan {

enum class State { ready, at_warp, at_block, done };
struct Emulated {
  ucontext_t context;
  State state;
};

constexpr int kMaxThreads = 256, kStack = 64 * 1024;
inline Emulated threads[kMaxThreads];
inline ucontext_t scheduler;
inline int running, count_of_warps, block, count_of_blocks;
inline float slots[2][kMaxThreads];
inline int parity[kMaxThreads];

inline int thread_index() { return running; }
inline int lane_index() { return running % 32; }
inline int warp_index() { return running / 32; }
inline int num_warps() { return count_of_warps; }
inline int block_index() { return block; }
inline int num_blocks() { return count_of_blocks; }

inline void wait_at(State state) {
  threads[running].state = state;
  swapcontext(&threads[running].context, &scheduler);
}
inline void sync_warp() { wait_at(State::at_warp); }
inline void sync_block() { wait_at(State::at_block); }

inline float shuffle_xor(float x, int mask) {
  float* const slot = slots[parity[running] ^= 1];  // two in turn: nobody is two shuffles ahead
  slot[running] = x;
  sync_warp();
  return slot[running ^ mask];
}

inline float exp2_fast(float x) { return exp2f(x); }
inline float reciprocal(float x) { return 1 / x; }

// Runs `body` in all threads of a block; false where some wait for others that do not come.
inline bool run_block(void (*body)(), int warps) {
  static char* const stacks = static_cast<char*>(malloc(size_t(kMaxThreads) * kStack));
  count_of_warps = warps;
  const int count = 32 * warps;
  for (int i = 0; i < count; ++i) {
    getcontext(&threads[i].context);
    threads[i].context.uc_stack.ss_sp = stacks + size_t(i) * kStack;
    threads[i].context.uc_stack.ss_size = kStack;
    threads[i].context.uc_link = nullptr;
    makecontext(&threads[i].context, body, 0);
    threads[i].state = State::ready;
  }
  for (;;) {
    for (running = 0; running < count; ++running)
      if (threads[running].state == State::ready) swapcontext(&scheduler, &threads[running].context);
    bool progress = false, same = true;
    for (int warp = 0; warp < warps; ++warp) {
      const State state = threads[32 * warp].state;
      for (int i = 1; i < 32; ++i)
        if (threads[32 * warp + i].state != state) return false;
      same = same && state == threads[0].state;
      if (state == State::at_warp) {
        progress = true;
        for (int i = 0; i < 32; ++i) threads[32 * warp + i].state = State::ready;
      }
    }
    if (progress) continue;
    if (!same) return false;
    if (threads[0].state == State::done) return true;
    for (int i = 0; i < count; ++i) threads[i].state = State::ready;
  }
}

}  // namespace scan
