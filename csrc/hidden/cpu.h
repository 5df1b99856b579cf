// Hidden-state alignment on a CPU: what the kernel is told and the entry points of its builds.
#pragma once

#include "../common/source.h"

namespace dsd {

enum class HiddenDivergence : int { mse, cosine };

struct HiddenArguments {
  Source student, teacher;  // (B, N, D), axes 1 to 3 of the source
  Source projection, bias;  // (D_t, D_s) and (D_t); data null without
  int64_t tokens, student_width, teacher_width;
  // Valid tokens: sequence · N + position, `count` of them.
  const int64_t* valid;
  int64_t count;
  const double* weights;  // (B, N), or null for 1
  HiddenDivergence divergence;
  double coefficient;  // of the gradients
  // Contiguous, d_student zero at masked tokens beforehand; null where no gradient is wanted.
  void* d_student;
  void* d_projection;
  void* d_bias;
  Type d_student_type, d_projection_type, d_bias_type;
  int64_t shares;
  double* values;  // one sum for each share
  void* packed;    // packed_elements(…): the projection, ready to multiply
  void* partial;   // partial_elements(…) for each share: its part of the parameters' gradients
};

struct HiddenKernel {
  int64_t (*workspace_bytes)(const HiddenArguments&, bool float64);
  int64_t (*packed_elements)(const HiddenArguments&, bool float64);
  int64_t (*partial_elements)(const HiddenArguments&, bool float64);
  // Packs panels first … last − 1 of the projection's output features, of `pack_units` in all.
  void (*pack)(const HiddenArguments&, bool float64, int64_t first, int64_t last);
  int64_t (*pack_units)(const HiddenArguments&, bool float64);
  void (*run)(const HiddenArguments&, bool float64, int64_t share, void* workspace);
  // Sums the shares' gradients of output features first … last − 1.
  void (*merge)(const HiddenArguments&, bool float64, int64_t first, int64_t last);
};

#define DSD_DECLARE(isa)                   \
  namespace isa {                          \
  extern const HiddenKernel hidden_kernel; \
  }
DSD_DECLARE(portable)
DSD_DECLARE(avx2)
DSD_DECLARE(avx512)
DSD_DECLARE(avx512_bf16)
#undef DSD_DECLARE

}  // namespace dsd
