// Strided inputs and contiguous outputs of any floating type, as the kernels see them, without torch headers.
#pragma once

#include <cstdint>
#include <cstring>

namespace dsd {

enum class Type : int { float32, bfloat16, float16, float64 };

// A four-dimensional tensor with strides in elements. For fewer dimensions the first strides stay 0.
struct Source {
  const void* data = nullptr;
  Type type = Type::float32;
  int64_t stride[4] = {0, 0, 0, 0};
};

namespace DSD_ISA {

inline float from_bfloat16(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// Rounds to nearest even. NaN keeps a mantissa bit, so that it does not become infinity.
inline uint16_t to_bfloat16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if (x != x) return uint16_t((bits >> 16) | 0x40);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float from_float16(uint16_t x) {
  // The exponent bits move to their place in float32. The multiplication corrects the exponent, also of subnormals.
  const uint32_t sign = uint32_t(x & 0x8000) << 16;
  uint32_t bits = uint32_t(x & 0x7fff) << 13;
  float value;
  memcpy(&value, &bits, 4);
  value *= 5.192296858534828e+33f;  // 2^112
  if ((x & 0x7c00) == 0x7c00) {
    bits |= 0x7f800000u;
    memcpy(&value, &bits, 4);
  }
  memcpy(&bits, &value, 4);
  bits |= sign;
  memcpy(&value, &bits, 4);
  return value;
}

// Reads `count` elements that are `stride` apart, and multiplies each by `factor`.
template <class T>
inline void read_run(const Source& source, int64_t offset, int64_t stride, int64_t count, T factor, T* out) {
  switch (source.type) {
    case Type::float32: {
      const float* p = static_cast<const float*>(source.data) + offset;
      for (int64_t i = 0; i < count; ++i) out[i] = T(p[i * stride]) * factor;
      break;
    }
    case Type::float64: {
      const double* p = static_cast<const double*>(source.data) + offset;
      for (int64_t i = 0; i < count; ++i) out[i] = T(p[i * stride]) * factor;
      break;
    }
    case Type::bfloat16: {
      const uint16_t* p = static_cast<const uint16_t*>(source.data) + offset;
      for (int64_t i = 0; i < count; ++i) out[i] = T(from_bfloat16(p[i * stride])) * factor;
      break;
    }
    case Type::float16: {
      const uint16_t* p = static_cast<const uint16_t*>(source.data) + offset;
      for (int64_t i = 0; i < count; ++i) out[i] = T(from_float16(p[i * stride])) * factor;
      break;
    }
  }
}

// Writes `count` contiguous elements, each multiplied by `factor`. float16 gradients are kept in float32.
template <class T>
inline void write_run(void* data, Type type, int64_t offset, int64_t count, T factor, const T* in) {
  if (type == Type::bfloat16) {
    uint16_t* p = static_cast<uint16_t*>(data) + offset;
    for (int64_t i = 0; i < count; ++i) p[i] = to_bfloat16(float(in[i] * factor));
  } else if (type == Type::float64) {
    double* p = static_cast<double*>(data) + offset;
    for (int64_t i = 0; i < count; ++i) p[i] = double(in[i] * factor);
  } else {
    float* p = static_cast<float*>(data) + offset;
    for (int64_t i = 0; i < count; ++i) p[i] = float(in[i] * factor);
  }
}

}  // namespace DSD_ISA
}  // namespace dsd
