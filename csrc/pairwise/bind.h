#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace dsd {

// Returns the loss and its gradient at the student (empty if not asked for), both final: `mean` divides by the number
// of sequences with a valid token. weights: (B, N) float64, contiguous; default: 1/n_b. relation: 0 cosine, 1 dot,
// 2 distance.
std::tuple<torch::stable::Tensor, torch::stable::Tensor> pairwise_alignment_cpu(
    torch::stable::Tensor student, torch::stable::Tensor teacher, std::optional<torch::stable::Tensor> mask,
    std::optional<torch::stable::Tensor> weights, int64_t relation, bool mean, bool gradient);

// Workspace of one thread for float32, in bytes.
int64_t pairwise_workspace_bytes(int64_t tokens, int64_t student_width, int64_t teacher_width);

}  // namespace dsd
