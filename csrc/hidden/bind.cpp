// Hidden-state alignment as a torch operator: checks, chunks of tokens, two phases over threads.
#include "bind.h"

#include <algorithm>

#include "../common/binding.h"
#include "../common/dispatch.h"
#include "cpu.h"

namespace dsd {
namespace {

// Tokens of a block: enough to reuse every element of the projection, few enough to stay in the second-level cache.
constexpr int64_t LONGEST_BLOCK = 96;
// Least number of blocks between the phases: with fewer, the parameters' sums are too short for the cost of loading.
constexpr int64_t CHUNK_BLOCKS = 4;

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> hidden_alignment_cpu(Tensor student, Tensor teacher,
                                                                std::optional<Tensor> projection,
                                                                std::optional<Tensor> bias, std::optional<Tensor> mask,
                                                                std::optional<Tensor> weights, int64_t divergence,
                                                                bool mean, bool student_gradient,
                                                                bool projection_gradient, bool bias_gradient) {
  HiddenArguments a{};
  a.student = source_of("student", student, 3);
  a.teacher = source_of("teacher", teacher, 3);
  const int64_t batch = student.size(0);
  a.tokens = student.size(1), a.student_width = student.size(2), a.teacher_width = teacher.size(2);
  check_shape("teacher", teacher, {batch, a.tokens, a.teacher_width});
  a.weights = weights_of(weights, batch, a.tokens);
  check(divergence == 0 || divergence == 1, "divergence: expected 0 (mse) or 1 (cosine)");
  bool float64 = is_float64(student) || is_float64(teacher);
  if (projection) {
    a.projection = source_of("projection", *projection, 2);
    check_shape("projection", *projection, {a.teacher_width, a.student_width});
    float64 = float64 || is_float64(*projection);
  } else {
    check(a.student_width == a.teacher_width, "projection: expected one for unequal widths");
    check(!bias, "bias: expected none without a projection");
  }
  if (bias) {
    a.bias = source_of("bias", *bias, 1);
    check_shape("bias", *bias, {a.teacher_width});
    float64 = float64 || is_float64(*bias);
  }
  const ValidTokens valid(mask, batch, a.tokens);
  std::vector<int64_t> tokens;
  tokens.reserve(size_t(valid.total()));
  double weight = 0;
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t i = 0; i < valid.counts[size_t(b)]; ++i) {
      tokens.push_back(b * a.tokens + valid.positions[size_t(b * a.tokens + i)]);
      weight += a.weights ? a.weights[tokens.back()] : 1;
    }
  a.valid = tokens.data();
  a.count = int64_t(tokens.size());
  a.divergence = HiddenDivergence(divergence);
  const double divisor = weight * (a.divergence == HiddenDivergence::mse ? double(a.teacher_width) : 1.0);
  a.coefficient = mean && divisor > 0 ? 1 / divisor : 1;

  const bool nothing = a.count == 0;
  Tensor d_student = gradient_like(student, student_gradient, !valid.all || nothing);
  Tensor d_projection = gradient_like(projection ? *projection : student, projection && projection_gradient, nothing);
  Tensor d_bias = gradient_like(bias ? *bias : student, bias && bias_gradient, nothing);
  if (student_gradient) a.d_student = d_student.mutable_data_ptr();
  if (projection && projection_gradient) a.d_projection = d_projection.mutable_data_ptr();
  if (bias && bias_gradient) a.d_bias = d_bias.mutable_data_ptr();
  a.d_student_type = type_of("d_student", d_student);
  a.d_projection_type = type_of("d_projection", d_projection);
  a.d_bias_type = type_of("d_bias", d_bias);

  double total = 0;
  if (!nothing) {
    const HiddenKernel& kernel = DSD_SELECT(hidden_kernel);
    const int64_t size = float64 ? 8 : 4, threads = int64_t(torch::stable::get_num_threads());
    // Every thread gets a block, even if there are few tokens.
    a.block = std::min<int64_t>(LONGEST_BLOCK, ((a.count + threads - 1) / threads + 31) / 32 * 32);
    const int64_t blocks = (a.count + a.block - 1) / a.block;
    a.blocks = projection ? std::min(blocks, std::max<int64_t>(CHUNK_BLOCKS, threads)) : blocks;
    std::vector<double> values(size_t(blocks), 0.0);
    a.values = values.data();
    std::optional<Workspace> outputs, parameters;
    if (projection) {
      outputs.emplace(kernel.chunk_elements(a, float64) * size);
      a.outputs = outputs->get();
      if (const int64_t elements = kernel.parameter_elements(a, float64)) {
        parameters.emplace(elements * size);
        a.parameters = parameters->get();
        std::memset(a.parameters, 0, size_t(elements * size));
      }
    }
    const int64_t bytes = kernel.workspace_bytes(a, float64);
    for (a.chunk = 0; a.chunk < blocks; a.chunk += a.blocks) {
      torch::stable::parallel_for(a.chunk, std::min(a.chunk + a.blocks, blocks), 1, [&](int64_t first, int64_t last) {
        const Workspace workspace(bytes);
        kernel.tokens(a, float64, first, last, workspace.get());
      });
      if (a.d_projection || a.d_bias)
        torch::stable::parallel_for(0, kernel.parameter_units(a, float64), 1,
                                    [&](int64_t first, int64_t last) { kernel.parameters(a, float64, first, last); });
    }
    if (a.d_projection || a.d_bias)
      torch::stable::parallel_for(0, a.teacher_width, 16,
                                  [&](int64_t first, int64_t last) { kernel.finish(a, float64, first, last); });
    for (double value : values) total += value;
  }
  return {scalar_like(student, total * a.coefficient, float64), d_student, d_projection, d_bias};
}

int64_t hidden_workspace_bytes(int64_t student_width, int64_t teacher_width) {
  HiddenArguments a{};
  const char present = 0;
  a.projection.data = &present;
  a.student_width = student_width, a.teacher_width = teacher_width;
  a.block = LONGEST_BLOCK;
  return DSD_SELECT(hidden_kernel).workspace_bytes(a, false);
}

}  // namespace dsd
