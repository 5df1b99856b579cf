#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <tuple>

namespace dsd {

// Returns the loss and its gradients at student, projection and bias (empty where not asked for), all final: `mean`
// divides by the sum of weights over valid tokens, times D_t for mse. weights: (B, N) float64, contiguous; default: 1.
// divergence: 0 mse, 1 cosine.
std::tuple<torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor, torch::stable::Tensor>
hidden_alignment_cpu(torch::stable::Tensor student, torch::stable::Tensor teacher,
                     std::optional<torch::stable::Tensor> projection, std::optional<torch::stable::Tensor> bias,
                     std::optional<torch::stable::Tensor> mask, std::optional<torch::stable::Tensor> weights,
                     int64_t divergence, bool mean, bool student_gradient, bool projection_gradient,
                     bool bias_gradient);

// Workspace of one thread for float32, in bytes.
int64_t hidden_workspace_bytes(int64_t student_width, int64_t teacher_width);

}  // namespace dsd
