// Conversions between torch's stable ABI and the kernels' plain structures.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdlib>
#include <memory>
#include <new>
#include <numeric>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "source.h"

namespace dsd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_of(const Tensor& x) {
  std::ostringstream out;
  out << '(';
  for (int64_t i = 0; i < x.dim(); ++i) out << (i ? ", " : "") << x.size(i);
  out << ')';
  return out.str();
}

inline void check(bool condition, const std::string& message) { STD_TORCH_CHECK(condition, message); }

inline Type type_of(const char* name, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Type::float32;
    case ScalarType::BFloat16:
      return Type::bfloat16;
    case ScalarType::Half:
      return Type::float16;
    case ScalarType::Double:
      return Type::float64;
    default:
      check(false, std::string(name) + ": expected float32, bfloat16, float16 or float64");
      return Type::float32;
  }
}

// Returns `x` as a Source; its axes are the last of the Source's four.
inline Source source_of(const char* name, const Tensor& x, int64_t dimensions) {
  check(x.dim() == dimensions,
        std::string(name) + ": got shape " + shape_of(x) + ", expected " + std::to_string(dimensions) + " axes");
  check(x.is_cpu(), std::string(name) + ": expected a CPU tensor");
  Source source;
  source.data = x.const_data_ptr();
  source.type = type_of(name, x);
  for (int64_t i = 0; i < dimensions; ++i) source.stride[4 - dimensions + i] = x.stride(i);
  return source;
}

inline void check_shape(const char* name, const Tensor& x, const std::vector<int64_t>& expected) {
  bool same = x.dim() == int64_t(expected.size());
  for (size_t i = 0; same && i < expected.size(); ++i) same = x.size(int64_t(i)) == expected[i];
  if (same) return;
  std::ostringstream out;
  out << name << ": got shape " << shape_of(x) << ", expected (";
  for (size_t i = 0; i < expected.size(); ++i) out << (i ? ", " : "") << expected[i];
  check(false, out.str() + ")");
}

// Token weights (B, N), or null.
inline const double* weights_of(const std::optional<Tensor>& weights, int64_t batch, int64_t tokens) {
  if (!weights) return nullptr;
  check_shape("weights", *weights, {batch, tokens});
  check(weights->scalar_type() == ScalarType::Double && weights->is_contiguous(),
        "weights: expected contiguous float64");
  return static_cast<const double*>(weights->const_data_ptr());
}

inline bool is_float64(const Tensor& x) { return x.scalar_type() == ScalarType::Double; }

// Gradients of float16 tensors stay in float32 until backward has applied the loss scale.
inline ScalarType gradient_type(const Tensor& x) {
  return x.scalar_type() == ScalarType::Half ? ScalarType::Float : x.scalar_type();
}

// A gradient with the shape of `x`, zero if `zeroed`; an empty tensor if none is wanted.
inline Tensor gradient_like(const Tensor& x, bool wanted, bool zeroed) {
  std::vector<int64_t> sizes = {0};
  if (wanted) sizes.assign(x.sizes().begin(), x.sizes().end());
  return zeroed ? torch::stable::new_zeros(x, sizes, gradient_type(x))
                : torch::stable::new_empty(x, sizes, gradient_type(x));
}

inline Tensor scalar_like(const Tensor& x, double value, bool float64) {
  Tensor out = torch::stable::new_empty(x, std::vector<int64_t>{}, float64 ? ScalarType::Double : ScalarType::Float);
  if (float64)
    *static_cast<double*>(out.mutable_data_ptr()) = value;
  else
    *static_cast<float*>(out.mutable_data_ptr()) = float(value);
  return out;
}

// Cache-line aligned memory of one thread, freed when its scope ends.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) : memory_(std::aligned_alloc(64, size_t((bytes + 63) / 64 * 64 + 64))) {
    if (!memory_) throw std::bad_alloc();
  }
  ~Workspace() { std::free(memory_); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  void* get() const { return memory_; }

 private:
  void* memory_;
};

// Valid tokens of each sequence in order: positions[b · tokens + i], i < counts[b].
struct ValidTokens {
  std::vector<int64_t> positions, counts;
  bool all = true;

  ValidTokens(const std::optional<Tensor>& mask, int64_t batch, int64_t tokens)
      : positions(size_t(batch * tokens)), counts(size_t(batch), tokens) {
    if (!mask) {
      for (int64_t b = 0; b < batch; ++b)
        std::iota(positions.begin() + b * tokens, positions.begin() + (b + 1) * tokens, 0);
      return;
    }
    check_shape("mask", *mask, {batch, tokens});
    check(mask->scalar_type() == ScalarType::Bool, "mask: expected bool");
    const bool* valid = static_cast<const bool*>(mask->const_data_ptr());
    for (int64_t b = 0; b < batch; ++b) {
      int64_t count = 0;
      for (int64_t i = 0; i < tokens; ++i)
        if (valid[b * mask->stride(0) + i * mask->stride(1)]) positions[size_t(b * tokens + count++)] = i;
      counts[size_t(b)] = count;
      all = all && count == tokens;
    }
  }
  int64_t total() const { return std::accumulate(counts.begin(), counts.end(), int64_t(0)); }
};

}  // namespace dsd
