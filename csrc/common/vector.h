// Vectors of the instruction set this file is compiled for.
//
// Every kernel source is compiled once for each instruction set. DSD_ISA names the set, and DSD_VECTOR_BYTES is its
// register width. Everything lies in the namespace DSD_ISA: if two builds shared an inline function, the linker would
// keep only one of them, perhaps that of AVX-512, which does not run everywhere. For the same reason kernels use no
// templates of the standard library.
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
  typedef uint32_t integer __attribute__((vector_size(DSD_VECTOR_BYTES)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(DSD_VECTOR_BYTES)));
  typedef uint64_t integer __attribute__((vector_size(DSD_VECTOR_BYTES)));
};
template <class T>
using Vec = typename VectorOf<T>::type;

template <class T>
constexpr int64_t lanes = DSD_VECTOR_BYTES / int64_t(sizeof(T));

// The score of a key that does not exist. Its exponential is exactly 0; the difference of two such scores is finite.
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

// 2^x for x ≤ 0, with a relative error of 2e-7; 0 below -125, near the end of float32's normal numbers.
inline Vec<float> exp2_nonpositive(Vec<float> x) {
  using V = Vec<float>;
  // Adding 1.5·2^23 rounds x to an integer, which is then in the low bits of the sum.
  const V magic = broadcast(12582912.0f);
  const V shifted = x + magic;
  const V r = x - (shifted - magic);
  // 2^r for |r| ≤ 1/2. This polynomial is 1 at 0, and has the least maximal relative error of such polynomials, 9e-8
  // before rounding.
  V p = broadcast(1.3264726299e-3f);
  p = p * r + 9.6715130100e-3f;
  p = p * r + 5.5507337491e-2f;
  p = p * r + 2.4022242079e-1f;
  p = p * r + 6.9314697759e-1f;
  p = p * r + 1.0f;
  // The integer is added to the exponent.
  typename VectorOf<float>::integer bits, exponent;
  memcpy(&exponent, &shifted, sizeof(exponent));
  memcpy(&bits, &p, sizeof(bits));
  bits += exponent << 23;
  V value;
  memcpy(&value, &bits, sizeof(value));
  return x < broadcast(-125.0f) ? V{} : value;
}

inline Vec<double> exp2_nonpositive(Vec<double> x) {
  for (int64_t i = 0; i < lanes<double>; ++i) x[i] = exp2(x[i]);
  return x;
}

}  // namespace DSD_ISA
}  // namespace dsd
