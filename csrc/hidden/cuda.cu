// Hidden-state alignment of rows on a GPU. Memory bounds it, so each tensor is read once or written once.
//
// A warp owns a token. Each lane reads 8 neighbouring elements, which are 16 bytes in half precision. The loads of
// several tensors are under way before the first is used. Warp shuffles add the lanes' sums. For cosine the tensors are
// read twice, the second time from the cache.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "rows.h"

namespace dsd {
namespace {

constexpr int WARPS = 8;
constexpr int ELEMENTS = 8;  // elements of one lane at a time

__device__ float to_float(float x) { return x; }
__device__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ float to_float(__half x) { return __half2float(x); }

__device__ void store_value(float* out, float x) { *out = x; }
__device__ void store_value(__nv_bfloat16* out, float x) { *out = __float2bfloat16_rn(x); }

// 8 elements from an address that is a multiple of 16 bytes.
template <class T>
__device__ void load_vector(const T* from, float (&out)[ELEMENTS]) {
  constexpr int WORDS = ELEMENTS * sizeof(T) / 16;
  uint4 raw[WORDS];
#pragma unroll
  for (int i = 0; i < WORDS; ++i) raw[i] = __ldg(reinterpret_cast<const uint4*>(from) + i);
  const T* elements = reinterpret_cast<const T*>(raw);
#pragma unroll
  for (int i = 0; i < ELEMENTS; ++i) out[i] = to_float(elements[i]);
}

template <class T>
__device__ void store_vector(T* to, const float (&x)[ELEMENTS]) {
  constexpr int WORDS = ELEMENTS * sizeof(T) / 16;
  uint4 raw[WORDS];
  T* elements = reinterpret_cast<T*>(raw);
#pragma unroll
  for (int i = 0; i < ELEMENTS; ++i) store_value(elements + i, x[i]);
#pragma unroll
  for (int i = 0; i < WORDS; ++i) reinterpret_cast<uint4*>(to)[i] = raw[i];
}

__device__ float sum_of_warp(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

// VECTOR: width and strides are multiples of 8, addresses are multiples of 16 bytes. Otherwise a lane reads one element
// at a time.
template <class Y, class T, class G, bool VECTOR, bool COSINE>
__global__ void __launch_bounds__(WARPS * 32) hidden_rows(const HiddenRows rows) {
  const int64_t token = int64_t(blockIdx.x) * WARPS + threadIdx.x / 32;
  if (token >= rows.tokens) return;  // a whole warp at once
  const int lane = threadIdx.x % 32;
  const float weight = rows.weights[token];
  G* gradient = rows.gradient ? static_cast<G*>(rows.gradient) + token * rows.width : nullptr;
  constexpr int STEP = VECTOR ? 32 * ELEMENTS : 32;
  const int64_t width = rows.width, begin = lane * (VECTOR ? ELEMENTS : 1);
  if (weight == 0) {
    if (gradient) {
      const float zero[ELEMENTS] = {};
      for (int64_t d = begin; d < width; d += STEP) {
        if constexpr (VECTOR)
          store_vector(gradient + d, zero);
        else
          store_value(gradient + d, 0.f);
      }
    }
    if (lane == 0) rows.values[token] = 0;
    return;
  }
  const Y* y = static_cast<const Y*>(rows.y) + token * rows.y_stride;
  const T* target = static_cast<const T*>(rows.target) + token * rows.target_stride;
  const float factor = *rows.factor;

  RowSums sums;
  auto walk = [&](auto&& visit) {
#pragma unroll 2
    for (int64_t d = begin; d < width; d += STEP) {
      if constexpr (VECTOR) {
        float x[ELEMENTS], t[ELEMENTS];
        load_vector(y + d, x);
        load_vector(target + d, t);
        if (rows.bias) {
          float b[ELEMENTS];
          load_vector(rows.bias + d, b);
#pragma unroll
          for (int i = 0; i < ELEMENTS; ++i) x[i] += b[i];
        }
        visit(d, x, t);
      } else {
        float x[1] = {to_float(y[d]) + (rows.bias ? rows.bias[d] : 0.f)}, t[1] = {to_float(target[d])};
        visit(d, x, t);
      }
    }
  };
  auto write = [&](int64_t d, auto& x, auto& t, const RowResult& result) {
    if constexpr (VECTOR) {
      float g[ELEMENTS];
#pragma unroll
      for (int i = 0; i < ELEMENTS; ++i) g[i] = result.gradient(x[i], t[i], COSINE);
      store_vector(gradient + d, g);
    } else {
      store_value(gradient + d, result.gradient(x[0], t[0], COSINE));
    }
  };
  // The factor of mse needs no sum, so the same sweep writes its gradient.
  const RowResult early(sums, weight, factor, false);
  walk([&](int64_t d, auto& x, auto& t) {
    constexpr int COUNT = VECTOR ? ELEMENTS : 1;
#pragma unroll
    for (int i = 0; i < COUNT; ++i) sums.add(x[i], t[i], COSINE);
    if (!COSINE && gradient) write(d, x, t, early);
  });
  sums.first = sum_of_warp(sums.first);
  if (COSINE) {
    sums.squares_x = sum_of_warp(sums.squares_x);
    sums.squares_t = sum_of_warp(sums.squares_t);
  }
  const RowResult result(sums, weight, factor, COSINE);
  if (COSINE && gradient) walk([&](int64_t d, auto& x, auto& t) { write(d, x, t, result); });
  if (lane == 0) rows.values[token] = result.value;
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <class Y, class T, class G>
int launch(const HiddenRows& rows, cudaStream_t stream) {
  const bool vector = rows.width % ELEMENTS == 0 && rows.y_stride % ELEMENTS == 0 &&
                      rows.target_stride % ELEMENTS == 0 && aligned(rows.y) && aligned(rows.target) &&
                      aligned(rows.bias) && aligned(rows.gradient);
  const dim3 blocks(unsigned((rows.tokens + WARPS - 1) / WARPS)), threads(WARPS * 32);
  if (vector && rows.cosine)
    hidden_rows<Y, T, G, true, true><<<blocks, threads, 0, stream>>>(rows);
  else if (vector)
    hidden_rows<Y, T, G, true, false><<<blocks, threads, 0, stream>>>(rows);
  else if (rows.cosine)
    hidden_rows<Y, T, G, false, true><<<blocks, threads, 0, stream>>>(rows);
  else
    hidden_rows<Y, T, G, false, false><<<blocks, threads, 0, stream>>>(rows);
  return int(cudaGetLastError());
}

template <class Y, class G>
int by_target(const HiddenRows& rows, cudaStream_t stream) {
  switch (rows.target_type) {
    case RowType::bfloat16:
      return launch<Y, __nv_bfloat16, G>(rows, stream);
    case RowType::float16:
      return launch<Y, __half, G>(rows, stream);
    default:
      return launch<Y, float, G>(rows, stream);
  }
}

}  // namespace

int launch_hidden_rows(const HiddenRows& rows, void* stream) {
  if (rows.tokens == 0) return 0;
  const cudaStream_t on = static_cast<cudaStream_t>(stream);
  const bool narrow = rows.gradient && rows.gradient_type == RowType::bfloat16;
  switch (rows.y_type) {
    case RowType::bfloat16:
      return narrow ? by_target<__nv_bfloat16, __nv_bfloat16>(rows, on) : by_target<__nv_bfloat16, float>(rows, on);
    case RowType::float16:
      return by_target<__half, float>(rows, on);
    default:
      return narrow ? by_target<float, __nv_bfloat16>(rows, on) : by_target<float, float>(rows, on);
  }
}

}  // namespace dsd
