// The kernels of models/ops/gpu on the CPU, block by block, phase by phase. Compiled for one kind of call at a time.
#include "scan_call.h"

namespace scan {

inline float from_bits(unsigned bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}
inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return from_bits(unsigned(x.bits) << 16); }
inline float to_float(Half x) {
  _Float16 half;
  memcpy(&half, &x.bits, 2);
  return half;
}
inline void from_float(float x, float& y) { y = x; }
inline void from_float(float x, BFloat16& y) {
  unsigned bits;
  memcpy(&bits, &x, 4);
  y.bits = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to the nearest, ties to even
}
inline void from_float(float x, Half& y) {
  const _Float16 half = x;
  memcpy(&y.bits, &half, 2);
}
template <int BYTES>
inline void start_copy(const char* from, float* to) {
  memcpy(to, from, BYTES);
}
inline void wait_for_copies() {}
inline void store4_global(const float (&from)[4], float* to) { memcpy(to, from, 16); }
}  // namespace scan

#include "scan_phases.h"

namespace scan {
using S = Spec<SCAN_U, SCAN_F, SCAN_LANES, SCAN_SOFTPLUS, SCAN_VECTOR>;

const Call* call;
int phase;
float* shared;
bool backward;

void body() {
  if (backward) {
    run_phase<S, true>(*call, shared, phase);
  } else {
    run_phase<S, false>(*call, shared, phase);
  }
  wait_at(State::done);
}
}  // namespace scan

extern "C" int bytes_of_call() { return sizeof(scan::Call); }
extern "C" int shared_bytes(int back) {
  return 4 * (back ? scan::Tile<scan::S>::backward_floats : scan::Tile<scan::S>::forward_floats);
}

// 0, or: 1 where threads waited for others in vain, 2 where a block wrote behind its shared memory.
extern "C" int emulate(const void* call, int back, int blocks, int warps) {
  using namespace scan;
  scan::call = static_cast<const Call*>(call);
  backward = back, count_of_blocks = blocks;
  const int size = shared_bytes(back) * warps / 4, guard = 1024;
  shared = static_cast<float*>(aligned_alloc(16, (size + guard) * 4));
  int status = 0;
  for (phase = begin_phase(*scan::call); phase < end_phase(*scan::call); ++phase) {
    for (block = 0; block < blocks; ++block) {
      for (int i = 0; i < size + guard; ++i) shared[i] = NAN;  // what is read must have been written
      if (!run_block(&body, warps)) status = 1;
      for (int i = size; i < size + guard; ++i)
        if (!isnan(shared[i])) status = 2;
    }
  }
  free(shared);
  return status;
}
