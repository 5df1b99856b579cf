// Attention alignment on a CPU: the kernel's arguments and the entry points of its builds.
#pragma once

#include "../common/source.h"

namespace dsd {

enum class Divergence : int { kl, mse, score_mse };

struct AttentionArguments {
  Source student_query, student_key, teacher_query, teacher_key;  // (B, H, N, D)
  int64_t batch, heads, student_kv_heads, teacher_kv_heads, tokens, student_width, teacher_width;
  // Valid tokens of each sequence, in order: positions[b · tokens + i], i < counts[b].
  const int64_t* positions;
  const int64_t* counts;
  // The compared queries, ascending: each one's place among the valid tokens, and its position, at b · tokens + i,
  // i < row_counts[b].
  const int64_t* row_places;
  const int64_t* row_positions;
  const int64_t* row_counts;
  const double* row_weights;  // factors of the rows' sums and gradients; null: 1
  const int64_t* segments;    // (B, N) or null
  Divergence divergence;
  bool causal;
  int64_t window;  // keys at distance < window count
  double student_scale, teacher_scale;
  double coefficient;  // factor of the gradients
  // Contiguous; null if no gradient is wanted. Beforehand d_query is zero at queries that are not compared, and d_key
  // is zero at masked tokens.
  void* d_query;
  void* d_key;
  Type d_query_type, d_key_type;
  // There is one task for each sequence, student key head and share of the query blocks.
  int64_t shares;
  double* values;       // one sum for each task
  void* key_gradients;  // shares > 1: workspace of key_gradient_elements(…) for each task
};

struct AttentionKernel {
  // Workspace of one thread, in bytes.
  int64_t (*workspace_bytes)(const AttentionArguments&, bool float64);
  int64_t (*key_gradient_elements)(const AttentionArguments&, bool float64);
  // Runs tasks first … last − 1 in one thread.
  void (*run)(const AttentionArguments&, bool float64, int64_t first, int64_t last, void* workspace);
  // Sums the shares of key heads first … last − 1 into d_key.
  void (*merge)(const AttentionArguments&, bool float64, int64_t first, int64_t last);
};

#define DSD_DECLARE(isa)                         \
  namespace isa {                                \
  extern const AttentionKernel attention_kernel; \
  }
DSD_DECLARE(portable)
DSD_DECLARE(avx2)
DSD_DECLARE(avx512)
DSD_DECLARE(avx512_bf16)
DSD_DECLARE(amx_bf16)
#undef DSD_DECLARE

}  // namespace dsd
