// The two kernels of a call, compiled at run time for one kind of call: SCAN_U and SCAN_F, types of tokens and of what
// is projected from them; SCAN_LANES, lanes that share the states of a channel; SCAN_SOFTPLUS; SCAN_VECTOR, are rows such
// that 4 columns can be read at once; SCAN_THREADS of a block
// at most, and SCAN_FORWARD_BLOCKS and SCAN_BACKWARD_BLOCKS on a multiprocessor at least.
#include "scan_phases.h"

using Spec = scan::Spec<scan::SCAN_U, scan::SCAN_F, SCAN_LANES, SCAN_SOFTPLUS, SCAN_VECTOR>;
extern __shared__ float4 memory[];

extern "C" __global__ void __launch_bounds__(SCAN_THREADS, SCAN_FORWARD_BLOCKS)
scan_forward(const __grid_constant__ scan::Call call) {
  scan::run<Spec, false>(call, reinterpret_cast<float*>(memory));
}

extern "C" __global__ void __launch_bounds__(SCAN_THREADS, SCAN_BACKWARD_BLOCKS)
scan_backward(const __grid_constant__ scan::Call call) {
  scan::run<Spec, true>(call, reinterpret_cast<float*>(memory));
}
