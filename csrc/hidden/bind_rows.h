#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace dsd {

// Weighted value of each token, (T) float32; ∂(value · factor)/∂y into `gradient`. y, target: (T, D), rows contiguous;
// bias (D), weights (T), factor (): float32 and contiguous; gradient: (T, D) contiguous, float32 or bfloat16.
// divergence: 0 mse, 1 cosine. stream: the address of the CUDA stream, which the caller asks torch for in Python: the
// function that would give it here lies in a library that a torch without CUDA lacks and that others load privately.
// It is not used on a CPU.
torch::stable::Tensor hidden_rows_cpu(torch::stable::Tensor y, torch::stable::Tensor target,
                                      std::optional<torch::stable::Tensor> bias, torch::stable::Tensor weights,
                                      torch::stable::Tensor factor, int64_t divergence,
                                      std::optional<torch::stable::Tensor> gradient, int64_t stream);
torch::stable::Tensor hidden_rows_cuda(torch::stable::Tensor y, torch::stable::Tensor target,
                                       std::optional<torch::stable::Tensor> bias, torch::stable::Tensor weights,
                                       torch::stable::Tensor factor, int64_t divergence,
                                       std::optional<torch::stable::Tensor> gradient, int64_t stream);

}  // namespace dsd
