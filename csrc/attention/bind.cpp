// Attention alignment as a torch operator: checks, counts, tasks over threads.
#include "bind.h"

#include <algorithm>

#include "../common/binding.h"
#include "../common/dispatch.h"
#include "cpu.h"

namespace dsd {
namespace {

constexpr int64_t UNLIMITED = int64_t(1) << 62;

// The number of pairs (query, key) that exist in one sequence.
int64_t count_pairs(const AttentionArguments& a, int64_t b) {
  const int64_t *positions = a.positions + b * a.tokens, count = a.counts[b];
  if (!a.segments && a.window >= a.tokens) return a.causal ? count * (count + 1) / 2 : count * count;
  int64_t pairs = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t last = a.causal ? i + 1 : count;
    for (int64_t j = 0; j < last; ++j) {
      const int64_t distance = positions[i] > positions[j] ? positions[i] - positions[j] : positions[j] - positions[i];
      const int64_t* labels = a.segments ? a.segments + b * a.tokens : nullptr;
      pairs += distance < a.window && (!labels || labels[positions[i]] == labels[positions[j]]);
    }
  }
  return pairs;
}

// The compared queries of each sequence, ascending, in the form that AttentionArguments needs. A query that is named
// twice has the sum of its weights. Queries that are masked or have weight 0 are left out.
struct ComparedRows {
  std::vector<int64_t> places, positions, counts;
  std::vector<double> weights;
  int64_t most = 0;  // largest count of any sequence

  ComparedRows(const std::optional<Tensor>& rows, const std::optional<Tensor>& row_weights, const ValidTokens& valid,
               int64_t batch, int64_t tokens)
      : places(size_t(batch * tokens)), positions(valid.positions), counts(valid.counts) {
    if (!rows) {
      for (int64_t b = 0; b < batch; ++b) std::iota(places.begin() + b * tokens, places.begin() + (b + 1) * tokens, 0);
      most = tokens;
      return;
    }
    const int64_t named = rows->dim() == 2 ? rows->size(1) : 0;
    check_shape("rows", *rows, {batch, named});
    check(rows->scalar_type() == ScalarType::Long && rows->is_contiguous(), "rows: expected contiguous int64");
    check(bool(row_weights), "row_weights: expected some beside rows");
    const double* given = weights_of(row_weights, batch, named);
    const int64_t* index = static_cast<const int64_t*>(rows->const_data_ptr());
    weights.resize(size_t(batch * tokens));
    std::vector<double> total(static_cast<size_t>(tokens), 0.0);
    for (int64_t b = 0; b < batch; ++b, index += named, given += named) {
      for (int64_t r = 0; r < named; ++r) {
        check(index[r] < tokens,
              "rows: got position " + std::to_string(index[r]) + ", expected less than N = " + std::to_string(tokens));
        if (index[r] >= 0) total[size_t(index[r])] += given[r];
      }
      int64_t count = 0;
      for (int64_t i = 0; i < valid.counts[size_t(b)]; ++i) {
        const int64_t position = valid.positions[size_t(b * tokens + i)];
        if (total[size_t(position)] == 0) continue;
        const size_t at = size_t(b * tokens + count++);
        places[at] = i, positions[at] = position, weights[at] = total[size_t(position)];
      }
      counts[size_t(b)] = count;
      most = std::max(most, count);
      std::fill(total.begin(), total.end(), 0.0);
    }
  }
};

// There is more than one share only if the heads do not fill the threads evenly.
int64_t shares_of(int64_t heads, int64_t threads, int64_t tokens) {
  if (heads == 0 || heads % threads == 0 || heads >= 4 * threads) return 1;
  const int64_t wanted = (2 * threads + heads - 1) / heads, blocks = (tokens + 63) / 64;
  return std::max<int64_t>(1, std::min(wanted, blocks));
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> attention_alignment_cpu(
    Tensor student_query, Tensor student_key, Tensor teacher_query, Tensor teacher_key, std::optional<Tensor> mask,
    std::optional<Tensor> segments, std::optional<Tensor> rows, std::optional<Tensor> row_weights, int64_t divergence,
    double student_scale, double teacher_scale, bool causal, int64_t window, bool mean, bool query_gradient,
    bool key_gradient) {
  AttentionArguments a{};
  a.student_query = source_of("student_query", student_query, 4);
  a.student_key = source_of("student_key", student_key, 4);
  a.teacher_query = source_of("teacher_query", teacher_query, 4);
  a.teacher_key = source_of("teacher_key", teacher_key, 4);
  a.batch = student_query.size(0), a.heads = student_query.size(1), a.tokens = student_query.size(2);
  a.student_width = student_query.size(3), a.teacher_width = teacher_query.size(3);
  a.student_kv_heads = student_key.size(1), a.teacher_kv_heads = teacher_key.size(1);
  check_shape("student_key", student_key, {a.batch, a.student_kv_heads, a.tokens, a.student_width});
  check_shape("teacher_query", teacher_query, {a.batch, a.heads, a.tokens, a.teacher_width});
  check_shape("teacher_key", teacher_key, {a.batch, a.teacher_kv_heads, a.tokens, a.teacher_width});
  check(a.heads == 0 || (a.student_kv_heads > 0 && a.heads % a.student_kv_heads == 0 && a.teacher_kv_heads > 0 &&
                         a.heads % a.teacher_kv_heads == 0),
        "student_key, teacher_key: expected head counts that divide H");
  check(divergence >= 0 && divergence <= 2, "divergence: expected 0 (kl), 1 (mse) or 2 (score_mse)");
  const ValidTokens valid(mask, a.batch, a.tokens);
  a.positions = valid.positions.data();
  a.counts = valid.counts.data();
  if (segments) {
    check_shape("segments", *segments, {a.batch, a.tokens});
    check(segments->scalar_type() == ScalarType::Long && segments->is_contiguous(),
          "segments: expected contiguous int64");
    a.segments = static_cast<const int64_t*>(segments->const_data_ptr());
  }
  const ComparedRows compared(rows, row_weights, valid, a.batch, a.tokens);
  a.row_places = compared.places.data();
  a.row_positions = compared.positions.data();
  a.row_counts = compared.counts.data();
  a.row_weights = rows ? compared.weights.data() : nullptr;
  a.divergence = Divergence(divergence);
  a.causal = causal;
  a.window = window < 0 ? UNLIMITED : window;
  a.student_scale = student_scale;
  a.teacher_scale = teacher_scale;

  int64_t count = valid.total();
  if (a.divergence != Divergence::kl && mean) {
    count = 0;
    for (int64_t b = 0; b < a.batch; ++b) count += count_pairs(a, b);
  }
  a.coefficient = mean && count > 0 && a.heads > 0 ? 1.0 / (double(count) * double(a.heads)) : 1.0;

  Tensor d_query = gradient_like(student_query, query_gradient, !valid.all || rows);
  Tensor d_key = gradient_like(student_key, key_gradient, !valid.all);
  if (query_gradient) a.d_query = d_query.mutable_data_ptr();
  if (key_gradient) a.d_key = d_key.mutable_data_ptr();
  a.d_query_type = type_of("d_query", d_query);
  a.d_key_type = type_of("d_key", d_key);

  const bool float64 =
      is_float64(student_query) || is_float64(student_key) || is_float64(teacher_query) || is_float64(teacher_key);
  const AttentionKernel& kernel = DSD_SELECT(attention_kernel);
  const int64_t key_heads = a.batch * a.student_kv_heads;
  a.shares = shares_of(key_heads, int64_t(torch::stable::get_num_threads()), compared.most);
  std::vector<double> values(size_t(key_heads * a.shares), 0.0);
  a.values = values.data();
  std::optional<Workspace> partial;
  if (a.shares > 1 && key_gradient) {
    const int64_t elements = kernel.key_gradient_elements(a, float64);
    partial.emplace(key_heads * a.shares * elements * (float64 ? 8 : 4));
    a.key_gradients = partial->get();
  }
  const int64_t bytes = kernel.workspace_bytes(a, float64);
  torch::stable::parallel_for(0, key_heads * a.shares, 1, [&](int64_t first, int64_t last) {
    const Workspace workspace(bytes);
    kernel.run(a, float64, first, last, workspace.get());
  });
  if (a.shares > 1 && key_gradient)
    torch::stable::parallel_for(0, key_heads, 1,
                                [&](int64_t first, int64_t last) { kernel.merge(a, float64, first, last); });
  double total = 0;
  for (double value : values) total += value;
  return {scalar_like(student_query, total * a.coefficient, float64), d_query, d_key};
}

int64_t attention_workspace_bytes(int64_t tokens, int64_t student_width, int64_t teacher_width) {
  AttentionArguments a{};
  a.tokens = tokens, a.student_width = student_width, a.teacher_width = teacher_width;
  return DSD_SELECT(attention_kernel).workspace_bytes(a, false);
}

}  // namespace dsd
