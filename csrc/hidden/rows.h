// Hidden-state alignment of rows: a kernel's arguments, and the arithmetic that GPU and host share.
//
// With x = y + b of one token, its target t and its weight w:
//   mse     value w Σ (x − t)²,         g = 2 w (x − t)                       TinyBERT, Jiao et al. 2020, Eq. 8
//   cosine  value w (1 − cos(x, t)),    g = −w (t̂ − cos · x̂) / ‖x‖            DistilBERT, Sanh et al. 2019
// g is multiplied by `factor` before it is rounded. A vector shorter than 1e-12 has cosine 0.
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define DSD_SHARED __host__ __device__ inline
#else
#define DSD_SHARED inline
#endif

namespace dsd {

enum class RowType : int { float32, bfloat16, float16 };

struct HiddenRows {
  const void* y;         // (tokens, width), rows `y_stride` elements apart
  const void* target;    // (tokens, width), rows `target_stride` elements apart
  const float* bias;     // (width), or null
  const float* weights;  // (tokens); a token of weight 0 is never read
  const float* factor;   // one element
  float* values;         // (tokens)
  void* gradient;        // (tokens, width) contiguous float32 or bfloat16, or null
  int64_t tokens, width, y_stride, target_stride;
  RowType y_type, target_type, gradient_type;
  bool cosine;
};

// Sums over one row: Σ (x − t)² for mse; Σ xt, Σ x², Σ t² for cosine.
struct RowSums {
  float first = 0, squares_x = 0, squares_t = 0;

  DSD_SHARED void add(float x, float t, bool cosine) {
    if (cosine) {
      first += x * t;
      squares_x += x * x;
      squares_t += t * t;
    } else {
      first += (x - t) * (x - t);
    }
  }
};

// g = along · x − towards · t for cosine, along · (x − t) for mse.
struct RowResult {
  float value, along, towards;

  DSD_SHARED RowResult(const RowSums& sums, float weight, float factor, bool cosine) {
    const float scale = weight * factor;
    if (!cosine) {
      value = weight * sums.first;
      along = towards = 2 * scale;
      return;
    }
    const float norm_x = sqrtf(sums.squares_x), norm_t = sqrtf(sums.squares_t);
    const float inverse_x = norm_x > 1e-12f ? 1 / norm_x : 0, inverse_t = norm_t > 1e-12f ? 1 / norm_t : 0;
    const float similarity = sums.first * inverse_x * inverse_t;
    value = weight * (1 - similarity);
    along = scale * similarity * inverse_x * inverse_x;
    towards = scale * inverse_x * inverse_t;
  }

  DSD_SHARED float gradient(float x, float t, bool cosine) const {
    return cosine ? along * x - towards * t : along * (x - t);
  }
};

// Launches the kernel on the device of the stream. Returns cudaError_t as int: 0 if the launch succeeded.
int launch_hidden_rows(const HiddenRows& rows, void* stream);

}  // namespace dsd
