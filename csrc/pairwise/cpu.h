// Pairwise alignment on a CPU: the kernel's arguments and the entry points of its builds.
#pragma once

#include "../common/source.h"

namespace dsd {

enum class Relation : int { cosine, dot, distance };

struct PairwiseArguments {
  Source student, teacher;  // (B, N, D), axes 1 to 3 of the source
  int64_t batch, tokens, student_width, teacher_width;
  // Valid tokens of each sequence, in order: positions[b · tokens + i], i < counts[b].
  const int64_t* positions;
  const int64_t* counts;
  const double* weights;  // (B, N), or null for 1 / counts[b]
  Relation relation;
  bool gradient;
  double coefficient;  // factor of the gradient
  void* d_student;     // contiguous, zero at masked tokens beforehand
  Type d_student_type;
  int64_t shares;  // tasks for each sequence; with one, `run` also does the work of `measure` and `finish`
  // For each task: loss; for distances also the sum and number of positive ones (student, teacher), and Σ slope·d.
  double* values;
  void* accumulators;  // with several shares: gradient_elements(…) for each task
  // Distances only, for each sequence: mean positive distance of student and of teacher, and how many the student has.
  double* means;
};

// The indices of one task's numbers in `values`.
enum : int64_t { LOSS, SUM_S, COUNT_S, SUM_T, COUNT_T, SLOPE, FIGURES };

// Fills `means` of one sequence from its tasks' sums; 1 where no distance is positive.
static inline void mean_distances(const PairwiseArguments& a, int64_t b) {
  double sums[FIGURES] = {};
  for (int64_t share = 0; share < a.shares; ++share)
    for (int64_t f = 0; f < FIGURES; ++f) sums[f] += a.values[(b * a.shares + share) * FIGURES + f];
  double* means = a.means + b * 3;
  means[0] = sums[COUNT_S] > 0 ? sums[SUM_S] / sums[COUNT_S] : 1;
  means[1] = sums[COUNT_T] > 0 ? sums[SUM_T] / sums[COUNT_T] : 1;
  means[2] = sums[COUNT_S] > 1 ? sums[COUNT_S] : 1;
}

struct PairwiseKernel {
  int64_t (*workspace_bytes)(const PairwiseArguments&, bool float64);
  int64_t (*gradient_elements)(const PairwiseArguments&, bool float64);
  // Sums of distances (before `means` is known), for tasks first … last − 1.
  void (*measure)(const PairwiseArguments&, bool float64, int64_t first, int64_t last, void* workspace);
  // Loss and accumulated gradients of tasks first … last − 1.
  void (*run)(const PairwiseArguments&, bool float64, int64_t first, int64_t last, void* workspace);
  // Gradients of sequences first … last − 1 from their tasks' accumulators.
  void (*finish)(const PairwiseArguments&, bool float64, int64_t first, int64_t last, void* workspace);
};

#define DSD_DECLARE(isa)                       \
  namespace isa {                              \
  extern const PairwiseKernel pairwise_kernel; \
  }
DSD_DECLARE(portable)
DSD_DECLARE(avx2)
DSD_DECLARE(avx512)
DSD_DECLARE(avx512_bf16)
DSD_DECLARE(amx_bf16)
#undef DSD_DECLARE

}  // namespace dsd
