// Vectors of floats or doubles as wide as the processor's registers, and the three functions a scan needs of them.
//
// GCC's vector types compile to whatever the machine has (AVX-512, AVX2, NEON, ...), so there is one source for all.
// Errors, over the arguments that occur: exp2 2 ulp, softplus and sigmoid 4 ulp, in both precisions.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace scan {

#if defined(__AVX512F__) && defined(__AVX512DQ__)
#define SCAN_AVX512 1
constexpr int kBytes = 64;
constexpr int kStates = 4;  // states that advance together in registers
#elif defined(__AVX__)
constexpr int kBytes = 32;
constexpr int kStates = 2;
#else
constexpr int kBytes = 16;
constexpr int kStates = 2;
#endif

template <typename S>
struct Simd;
template <>
struct Simd<float> {
  typedef float Vec __attribute__((vector_size(kBytes)));
  typedef int32_t Int __attribute__((vector_size(kBytes)));
};
template <>
struct Simd<double> {
  typedef double Vec __attribute__((vector_size(kBytes)));
  typedef int64_t Int __attribute__((vector_size(kBytes)));
};
template <typename S>
using Vec = typename Simd<S>::Vec;
template <typename S>
constexpr int kLanes = kBytes / sizeof(S);

template <typename S>
inline Vec<S> splat(S value) {
  return Vec<S>{} + value;
}

// (2^f - 1) / f on [-1/2, 1/2], interpolated at Chebyshev nodes: relative error of 2^f below 6e-9 and 9e-18.
template <typename S>
struct Exp2Series;
template <>
struct Exp2Series<float> {
  static constexpr float value[] = {0.693147188026228781f,   0.240226507605681269f,   0.0555035711421907782f,
                                    0.00961808255727785149f, 0.00133908633646712344f, 0.000154531629451206902f};
};
template <>
struct Exp2Series<double> {
  static constexpr double value[] = {
      0.693147180559945309,    0.240226506959100982,    0.0555041086648215943,    0.00961812910760688853,
      0.00133335581464169353,  0.000154035304417360502, 0.0000152527338298361184, 1.32154425879216897e-6,
      1.01780624458457735e-7,  7.0725859492692237e-9,   4.45496059818651835e-10};
};

template <typename S, int kTerms>
inline Vec<S> horner(Vec<S> x, const S (&coefficient)[kTerms]) {
  Vec<S> sum = splat(coefficient[kTerms - 1]);
#pragma GCC unroll 16
  for (int i = kTerms - 2; i >= 0; --i) sum = sum * x + coefficient[i];
  return sum;
}

// 2^x = 2^n 2^f with n the integer nearest to x, so that results near 1 (long memory) keep their last digit. Below the
// smallest normal number the result is 0.
template <typename S>
inline Vec<S> exp2(Vec<S> x) {
  constexpr bool single = std::is_same_v<S, float>;
#ifdef SCAN_AVX512
  constexpr int kNearest = 0;
  if constexpr (single) {
    const Vec<S> fraction = _mm512_reduce_ps(x, kNearest);
    return _mm512_scalef_ps(horner<S>(fraction, Exp2Series<S>::value) * fraction + S(1), x - fraction);
  } else {
    const Vec<S> fraction = _mm512_reduce_pd(x, kNearest);
    return _mm512_scalef_pd(horner<S>(fraction, Exp2Series<S>::value) * fraction + S(1), x - fraction);
  }
#else
  using Int = typename Simd<S>::Int;
  constexpr int mantissa = single ? 23 : 52;
  constexpr S magic = single ? S(12582912.0) : S(6755399441055744.0);  // 1.5 * 2^mantissa: adding it rounds
  constexpr S lowest = single ? S(-126) : S(-1022), highest = single ? S(128) : S(1024);
  const Vec<S> shifted = x + magic;  // its lowest bits hold n
  const Vec<S> fraction = x - (shifted - magic);
  const Vec<S> power = horner<S>(fraction, Exp2Series<S>::value) * fraction + S(1);
  const Vec<S> result = (Vec<S>)((Int)power + ((Int)shifted << mantissa));
  const Vec<S> high = x >= highest ? splat(std::numeric_limits<S>::infinity()) : result;
  return x < lowest ? Vec<S>{} : high;
#endif
}

template <typename S>
constexpr S kLog2E = S(1.44269504088896340736);
template <typename S>
constexpr S kLn2 = S(0.693147180559945309417);
constexpr double kSoftplusLinear = 20;  // PyTorch's softplus is the identity above this, with derivative 1

template <typename S>
inline Vec<S> absolute(Vec<S> x) {
  return x < S(0) ? -x : x;
}

// log(1 + e^x) = max(x, 0) + 2 atanh(r), r = e^-|x| / (2 + e^-|x|) <= 1/3, by the series of atanh.
template <typename S>
inline Vec<S> softplus(Vec<S> x) {
  constexpr int kTerms = std::is_same_v<S, float> ? 8 : 17;
  const Vec<S> power = exp2<S>(absolute<S>(x) * -kLog2E<S>);
  const Vec<S> ratio = power / (power + S(2)), square = ratio * ratio;
  Vec<S> sum = splat(S(1) / S(2 * kTerms - 1));
#pragma GCC unroll 17
  for (int i = kTerms - 2; i >= 0; --i) sum = sum * square + S(1) / S(2 * i + 1);
  const Vec<S> curved = (x < S(0) ? Vec<S>{} : x) + S(2) * ratio * sum;
  return x > S(kSoftplusLinear) ? x : curved;
}

// Derivative of softplus: 1 / (1 + e^-x), and 1 where softplus is the identity.
template <typename S>
inline Vec<S> softplus_slope(Vec<S> x) {
  const Vec<S> power = exp2<S>(absolute<S>(x) * -kLog2E<S>);
  const Vec<S> slope = (x < S(0) ? power : splat(S(1))) / (power + S(1));
  return x > S(kSoftplusLinear) ? splat(S(1)) : slope;
}

template <typename S>
inline S sum_lanes(Vec<S> x) {
  S lanes[kLanes<S>];
  std::memcpy(lanes, &x, sizeof(x));
#pragma GCC unroll 4
  for (int half = kLanes<S> / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// A step far in the past underflows; subnormal numbers would make it a hundred times slower, not more exact.
class FlushSubnormals {
#if defined(__x86_64__)
 public:
  FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushSubnormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
 public:
  ~FlushSubnormals() {}
#endif
};

}  // namespace scan
