#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace dsd {

// Weighted value of each token, (T) float32; ∂(value · factor)/∂y into `gradient`. y, target: (T, D), rows contiguous;
// bias (D), weights (T), factor (): float32 and contiguous; gradient: (T, D) contiguous, float32 or bfloat16.
// divergence: 0 mse, 1 cosine.
torch::stable::Tensor hidden_rows_cpu(torch::stable::Tensor y, torch::stable::Tensor target,
                                      std::optional<torch::stable::Tensor> bias, torch::stable::Tensor weights,
                                      torch::stable::Tensor factor, int64_t divergence,
                                      std::optional<torch::stable::Tensor> gradient);
torch::stable::Tensor hidden_rows_cuda(torch::stable::Tensor y, torch::stable::Tensor target,
                                       std::optional<torch::stable::Tensor> bias, torch::stable::Tensor weights,
                                       torch::stable::Tensor factor, int64_t divergence,
                                       std::optional<torch::stable::Tensor> gradient);

}  // namespace dsd
