// The arguments of one call of the scan on a GPU, as Python packs them, and what a thread computes with alone.
//
// The same source is compiled for GPUs, at run time, and by tests for a CPU, where the threads of a block are emulated.
// Axes: b image, k route, g group of consecutive routes, e channel, n state, t token of a chunk.
#pragma once

#ifdef __CUDACC__
#define DEVICE __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define ROLLED _Pragma("unroll 1")
#define UNROLL_2 _Pragma("unroll 2")

namespace scan {
DEVICE int thread_index() { return threadIdx.x; }
DEVICE int lane_index() { return threadIdx.x % 32; }
DEVICE int warp_index() { return threadIdx.x / 32; }
DEVICE int num_warps() { return blockDim.x / 32; }
DEVICE int block_index() { return blockIdx.x; }
DEVICE int num_blocks() { return gridDim.x; }
DEVICE void sync_warp() { __syncwarp(); }
DEVICE void sync_block() { __syncthreads(); }
DEVICE float shuffle_xor(float x, int mask) { return __shfl_xor_sync(~0u, x, mask); }
}  // namespace scan
#else
#include "emulator.h"
#endif

namespace scan {

constexpr int kChunk = 16;      // tokens between two kept states; CHUNK_TOKENS in Python says the same
constexpr int kMaxRoutes = 128;
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// A tensor (b, token, k or g, column); columns lie side by side.
struct Rows {
  const char* data;
  long long batch, row;  // strides in bytes
  int token, unused;

  DEVICE const char* at(int b, int r) const { return data + b * batch + r * row; }
};

// Slot q of an order is token q / inner * outer_stride + q % inner * inner_stride; a reversed route begins at the last.
struct Rule {
  int inner, outer_stride, inner_stride, reverse;
};

struct Call {
  Rows u, delta, B, C, grad_y, grad_delta;
  const float *A, *D, *bias;         // (k, e, n), (k, e), (k, e); the last two may be absent
  const float* grad_last;            // (b, k, e, n)
  void *y, *grad_u;                  // (b, token, g, e)
  float* sums;                       // (b, token, g, e): y or grad_u while routes of a group are added up
  float *chunk_states, *last_state;  // (chunk, b, k, e, n) or absent; (b, k, e, n)
  float *grad_B, *grad_C;            // (block of channels, b, token, k, n)
  float *grad_A, *grad_D, *grad_bias;  // (span, b, k, e, n), (span, b, k, e), (span, b, k, e)
  unsigned* barrier;                 // zero
  float *span_states, *step_sums;    // (span, b, k, e, n), (span, b, k, e)
  int batch, tokens, routes, groups, channels, states;
  int chunks, span_chunks, spans, blocks, rounds, unused;
  Rule rules[kMaxRoutes];
  unsigned char round_of[kMaxRoutes];  // of a route, with the following flags

  // Rows (b, token, g, e) without gaps, of numbers of so many bytes.
  DEVICE Rows like_u(void* data, int size) const {
    const int row = channels * size, token = groups * row;
    return {static_cast<char*>(data), (long long)tokens * token, row, token, 0};
  }
};
constexpr int kFirstOfGroup = 64, kLastOfGroup = 128;

using Float = float;
struct Half {
  unsigned short bits;
};
struct BFloat16 {
  unsigned short bits;
};

#ifdef __CUDACC__
DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// From global to shared memory while the thread goes on.
template <int BYTES>
DEVICE void start_copy(const char* from, float* to) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(unsigned(__cvta_generic_to_shared(to))), "l"(from),
               "n"(BYTES)
               : "memory");
}
DEVICE void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
DEVICE void store4_global(const float (&from)[4], float* to) {  // which the compiler would take apart
  asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "f"(from[0]), "f"(from[1]),
               "f"(from[2]), "f"(from[3])
               : "memory");
}
DEVICE float to_float(float x) { return x; }
DEVICE float to_float(BFloat16 x) { return __uint_as_float(unsigned(x.bits) << 16); }
DEVICE float to_float(Half x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
DEVICE void from_float(float x, float& y) { y = x; }
DEVICE void from_float(float x, BFloat16& y) { asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }
DEVICE void from_float(float x, Half& y) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x)); }
#endif

// log(1 + e^x) = max(x, 0) + log1p(w), w = e^-|x|, by a polynomial that keeps the relative error of small results
// below 2e-7; above 20 it is x, as in PyTorch, because w is then below the last digit.
DEVICE float softplus(float x, float& w) {
  constexpr float c[9] = {1.0f, -0.49999648332595825f, 0.3332132399082184f, -0.24857163429260254f,
                          0.1915365308523178f, -0.13753797113895416f, 0.07920446991920471f, -0.0300657507032156f,
                          0.005364812910556793f};
  w = exp2_fast(-kLog2E * fabsf(x));
  float sum = c[8];
  UNROLL
  for (int i = 7; i >= 0; --i) sum = sum * w + c[i];
  return fmaxf(x, 0.0f) + sum * w;
}

// Its derivative 1 / (1 + e^-x), from the same w.
DEVICE float softplus_slope(float x, float w) {
  const float one = reciprocal(1.0f + w);
  return x < 0 ? w * one : one;
}

DEVICE int min_of(int a, int b) { return a < b ? a : b; }
DEVICE constexpr int max_of(int a, int b) { return a > b ? a : b; }

DEVICE const char* row_at(const char* rows, int token, int stride) { return rows + (long long)token * stride; }

template <typename T>
struct alignas(4 * sizeof(T)) Packed {
  T values[4];
};

DEVICE void load4(const float* from, float (&to)[4]) {
  const Packed<float> four = *reinterpret_cast<const Packed<float>*>(from);
  UNROLL
  for (int j = 0; j < 4; ++j) to[j] = four.values[j];
}
DEVICE void store4(const float (&from)[4], float* to) {
  Packed<float> four;
  UNROLL
  for (int j = 0; j < 4; ++j) four.values[j] = from[j];
  *reinterpret_cast<Packed<float>*>(to) = four;
}

DEVICE void store4(const Packed<float>& from, float* to) { *reinterpret_cast<Packed<float>*>(to) = from; }

// Sums of COUNT values over 2^LEVELS lanes whose numbers differ in the bits from `first_mask` on. Each level halves
// the values that a lane carries: afterwards v[x] is the sum of value (x << h | lane / first_mask % 2^h), where
// h = min(LEVELS, log2 COUNT).
template <int COUNT, int LEVELS>
DEVICE void sum_over_lanes(float (&v)[COUNT], int first_mask, int lane) {
  int count = COUNT;
  UNROLL
  for (int level = 0; level < LEVELS; ++level) {
    const int mask = first_mask << level;
    if (count > 1) {
      count /= 2;
      UNROLL
      for (int x = 0; x < COUNT / 2; ++x) {
        if (x < count) {
          const bool upper = lane & mask;
          const float mine = upper ? v[2 * x + 1] : v[2 * x], other = upper ? v[2 * x] : v[2 * x + 1];
          v[x] = mine + shuffle_xor(other, mask);
        }
      }
    } else {
      v[0] += shuffle_xor(v[0], mask);
    }
  }
}

DEVICE constexpr int log2_of(int x) { return x <= 1 ? 0 : 1 + log2_of(x / 2); }

}  // namespace scan
