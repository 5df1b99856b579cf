#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace dsd {

// Returns the loss and its gradients at the student's query and key (empty where not asked for), all final: `mean`
// divides the loss and the gradients. divergence: 0 kl, 1 mse, 2 score_mse. window < 0: unlimited. segments: (B, N)
// int64. rows: (B, R) int64, the positions of the compared queries; a negative one names none. row_weights: (B, R)
// float64. Give both or neither.
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor> attention_alignment_cpu(
    torch::stable::Tensor student_query, torch::stable::Tensor student_key, torch::stable::Tensor teacher_query,
    torch::stable::Tensor teacher_key, std::optional<torch::stable::Tensor> mask,
    std::optional<torch::stable::Tensor> segments, std::optional<torch::stable::Tensor> rows,
    std::optional<torch::stable::Tensor> row_weights, int64_t divergence, double student_scale, double teacher_scale,
    bool causal, int64_t window, bool mean, bool query_gradient, bool key_gradient);

// Workspace of one thread for float32, in bytes.
int64_t attention_workspace_bytes(int64_t tokens, int64_t student_width, int64_t teacher_width);

}  // namespace dsd
