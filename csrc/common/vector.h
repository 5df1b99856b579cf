// Vectors of the instruction set this file is compiled for.
//
// Every kernel source is compiled once for each instruction set, with DSD_ISA naming it and DSD_VECTOR_BYTES
// giving its register width. Everything lives in the namespace DSD_ISA: were an inline function shared between
// two builds, the linker would keep one of them, and the AVX-512 one does not run everywhere. For the same reason
// kernels use no templates of the standard library.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace dsd {
namespace DSD_ISA {

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(DSD_VECTOR_BYTES)));
  typedef int32_t integer __attribute__((vector_size(DSD_VECTOR_BYTES)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(DSD_VECTOR_BYTES)));
  typedef int64_t integer __attribute__((vector_size(DSD_VECTOR_BYTES)));
};
template <class T>
using Vec = typename VectorOf<T>::type;

template <class T>
constexpr int64_t lanes = DSD_VECTOR_BYTES / int64_t(sizeof(T));

// A score that stands for "no such key": its exponential is exactly 0, and differences of two stay finite.
template <class T>
constexpr T absent = sizeof(T) == 4 ? T(-1e30) : T(-1e300);

template <class T>
inline Vec<T> load(const T* p) {
  Vec<T> v;
  memcpy(&v, p, sizeof(v));
  return v;
}
template <class T>
inline void store(T* p, Vec<T> v) {
  memcpy(p, &v, sizeof(v));
}
template <class T>
inline Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}
template <class T>
inline Vec<T> maximum(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}
template <class T>
inline T sum_lanes(Vec<T> v) {
  T total = 0;
  for (int64_t i = 0; i < lanes<T>; ++i) total += v[i];
  return total;
}
template <class T>
inline T max_lanes(Vec<T> v) {
  T best = v[0];
  for (int64_t i = 1; i < lanes<T>; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

// exp(x) for x ≤ 0, relative error 1e-7; 0 below -87, where float32 has only subnormals left.
inline Vec<float> exp_nonpositive(Vec<float> x) {
  using V = Vec<float>;
  const V low = broadcast(-87.0f);
  const V clamped = x < low ? low : x;  // NaN stays
  // Adding 1.5·2^23 rounds to an integer, which then stands in the low bits of the sum.
  const V magic = broadcast(12582912.0f);
  const V shifted = clamped * 1.44269504088896341f + magic;
  const V n = shifted - magic;
  V r = clamped - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  V p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  typename VectorOf<float>::integer bits;
  memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits << 23) + (127 << 23);
  V scale;
  memcpy(&scale, &bits, sizeof(scale));
  return x < low ? V{} : p * scale;
}

inline Vec<double> exp_nonpositive(Vec<double> x) {
  for (int64_t i = 0; i < lanes<double>; ++i) x[i] = exp(x[i]);
  return x;
}

}  // namespace DSD_ISA
}  // namespace dsd
