// Hidden-state alignment on a CPU: the kernel's arguments and the entry points of its builds.
#pragma once

#include "../common/source.h"

namespace dsd {

enum class HiddenDivergence : int { mse, cosine };

struct HiddenArguments {
  Source student, teacher;  // (B, N, D), axes 1 to 3 of the source
  Source projection, bias;  // (D_t, D_s) and (D_t); data is null if there is none
  int64_t tokens, student_width, teacher_width;
  // Valid tokens: sequence · N + position, `count` of them.
  const int64_t* valid;
  int64_t count;
  const double* weights;  // (B, N), or null for 1
  HiddenDivergence divergence;
  double coefficient;  // factor of the gradients
  // Contiguous; null if no gradient is wanted. Beforehand d_student is zero at masked tokens.
  void* d_student;
  void* d_projection;
  void* d_bias;
  Type d_student_type, d_projection_type, d_bias_type;
  // Tokens are distributed in blocks of `block` tokens (a multiple of 32). With a projection, a chunk of `blocks`
  // blocks passes the two phases at a time; its first block is number `chunk`.
  int64_t block, blocks, chunk;
  double* values;    // one sum for each block of all tokens
  void* outputs;     // chunk_elements(…): gradients at the projected student and the student packed, of one chunk
  void* parameters;  // parameter_elements(…): sums of the parameters' gradients, zero beforehand
};

struct HiddenKernel {
  // Workspace of one thread, in bytes.
  int64_t (*workspace_bytes)(const HiddenArguments&, bool float64);
  int64_t (*chunk_elements)(const HiddenArguments&, bool float64);
  int64_t (*parameter_elements)(const HiddenArguments&, bool float64);
  // Phase 1: value and student's gradient of blocks first … last − 1, counted over all chunks.
  void (*tokens)(const HiddenArguments&, bool float64, int64_t first, int64_t last, void* workspace);
  // Phase 2: the chunk's part of the parameters' gradients, units first … last − 1 of `parameter_units`.
  int64_t (*parameter_units)(const HiddenArguments&, bool float64);
  void (*parameters)(const HiddenArguments&, bool float64, int64_t first, int64_t last);
  // Writes the parameters' gradients of output features first … last − 1.
  void (*finish)(const HiddenArguments&, bool float64, int64_t first, int64_t last);
};

#define DSD_DECLARE(isa)                   \
  namespace isa {                          \
  extern const HiddenKernel hidden_kernel; \
  }
DSD_DECLARE(portable)
DSD_DECLARE(avx2)
DSD_DECLARE(avx512)
DSD_DECLARE(avx512_bf16)
DSD_DECLARE(amx_bf16)
#undef DSD_DECLARE

}  // namespace dsd
