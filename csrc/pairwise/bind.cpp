// Pairwise alignment as a torch operator: checks, tasks over threads, the two phases of distances.
#include "bind.h"

#include <algorithm>

#include "../common/binding.h"
#include "../common/dispatch.h"
#include "cpu.h"

namespace dsd {

std::tuple<Tensor, Tensor> pairwise_alignment_cpu(Tensor student, Tensor teacher, std::optional<Tensor> mask,
                                                  std::optional<Tensor> weights, int64_t relation, bool mean,
                                                  bool gradient) {
  PairwiseArguments a{};
  a.student = source_of("student", student, 3);
  a.teacher = source_of("teacher", teacher, 3);
  a.batch = student.size(0), a.tokens = student.size(1);
  a.student_width = student.size(2), a.teacher_width = teacher.size(2);
  check_shape("teacher", teacher, {a.batch, a.tokens, a.teacher_width});
  check(relation >= 0 && relation <= 2, "relation: expected 0 (cosine), 1 (dot) or 2 (distance)");
  const ValidTokens valid(mask, a.batch, a.tokens);
  a.positions = valid.positions.data();
  a.counts = valid.counts.data();
  a.weights = weights_of(weights, a.batch, a.tokens);
  a.relation = Relation(relation);
  a.gradient = gradient;
  const int64_t used = std::count_if(valid.counts.begin(), valid.counts.end(), [](int64_t n) { return n > 0; });
  a.coefficient = mean && used > 0 ? 1.0 / double(used) : 1.0;

  Tensor d_student = gradient_like(student, gradient, !valid.all);
  a.d_student = gradient ? d_student.mutable_data_ptr() : nullptr;
  a.d_student_type = type_of("d_student", d_student);
  const bool float64 = is_float64(student) || is_float64(teacher);
  const PairwiseKernel& kernel = DSD_SELECT(pairwise_kernel);
  const int64_t threads = int64_t(torch::stable::get_num_threads()), blocks = (a.tokens + 63) / 64;
  const bool even = a.batch % threads == 0 || a.batch >= 4 * threads;
  a.shares = even || a.batch == 0 ? 1 : std::max<int64_t>(1, std::min((threads + a.batch - 1) / a.batch, blocks));
  const int64_t tasks = a.batch * a.shares;
  std::vector<double> values(size_t(tasks * FIGURES), 0.0);
  a.values = values.data();
  std::optional<Workspace> accumulators;
  if (a.shares > 1 && gradient) {
    accumulators.emplace(tasks * kernel.gradient_elements(a, float64) * (float64 ? 8 : 4));
    a.accumulators = accumulators->get();
  }
  const int64_t bytes = kernel.workspace_bytes(a, float64);
  const auto over = [&](int64_t count, auto step) {
    torch::stable::parallel_for(0, count, 1, [&](int64_t first, int64_t last) {
      const Workspace workspace(bytes);
      step(a, float64, first, last, workspace.get());
    });
  };

  std::vector<double> means(size_t(a.batch * 3), 1.0);
  a.means = means.data();
  if (a.shares > 1 && a.relation == Relation::distance) {
    over(tasks, kernel.measure);
    for (int64_t b = 0; b < a.batch; ++b) mean_distances(a, b);
  }
  over(tasks, kernel.run);
  if (a.shares > 1 && gradient) over(a.batch, kernel.finish);
  double total = 0;
  for (int64_t task = 0; task < tasks; ++task) total += values[size_t(task * FIGURES + LOSS)];
  return {scalar_like(student, total * a.coefficient, float64), d_student};
}

int64_t pairwise_workspace_bytes(int64_t tokens, int64_t student_width, int64_t teacher_width) {
  PairwiseArguments a{};
  a.tokens = tokens, a.student_width = student_width, a.teacher_width = teacher_width;
  a.shares = 1, a.gradient = true;
  return DSD_SELECT(pairwise_kernel).workspace_bytes(a, false);
}

}  // namespace dsd
