#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace dsd {

// Returns the weighted value of each token, (T) float32, and writes ∂(value · factor)/∂y to `gradient`. y, target:
// (T, D), rows contiguous; bias (D), weights (T), factor (): float32 and contiguous; gradient: (T, D) contiguous,
// float32 or bfloat16. divergence: 0 mse, 1 cosine. stream: the address of the CUDA stream, not used on a CPU. The
// caller asks torch for it in Python: the function that would return it here lies in a library that a torch without
// CUDA lacks, and that a torch with CUDA loads privately.
torch::stable::Tensor hidden_rows_cpu(torch::stable::Tensor y, torch::stable::Tensor target,
                                      std::optional<torch::stable::Tensor> bias, torch::stable::Tensor weights,
                                      torch::stable::Tensor factor, int64_t divergence,
                                      std::optional<torch::stable::Tensor> gradient, int64_t stream);
torch::stable::Tensor hidden_rows_cuda(torch::stable::Tensor y, torch::stable::Tensor target,
                                       std::optional<torch::stable::Tensor> bias, torch::stable::Tensor weights,
                                       torch::stable::Tensor factor, int64_t divergence,
                                       std::optional<torch::stable::Tensor> gradient, int64_t stream);

}  // namespace dsd
