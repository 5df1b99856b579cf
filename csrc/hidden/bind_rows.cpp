// Alignment of rows of hidden states as a torch operator. The CPU version does the same arithmetic as the GPU one, one
// element at a time. It is slow: it exists so that formulas, types and arguments are tested where there is no GPU.
#include "bind_rows.h"

#include "../common/binding.h"
#include "cpu.h"
#include "rows.h"

namespace dsd {
namespace {

RowType row_type(const char* name, const Tensor& x) {
  switch (type_of(name, x)) {
    case Type::bfloat16:
      return RowType::bfloat16;
    case Type::float16:
      return RowType::float16;
    case Type::float32:
      return RowType::float32;
    default:
      check(false, std::string(name) + ": expected float32, bfloat16 or float16");
      return RowType::float32;
  }
}

void check_float32(const char* name, const Tensor& x) {
  check(x.scalar_type() == ScalarType::Float && x.is_contiguous(), std::string(name) + ": expected contiguous float32");
}

// Fills all of `rows`. Returns the tensor of `values`, which the caller must keep.
Tensor arguments_of(HiddenRows& rows, const Tensor& y, const Tensor& target, const std::optional<Tensor>& bias,
                    const Tensor& weights, const Tensor& factor, int64_t divergence,
                    const std::optional<Tensor>& gradient) {
  check(y.dim() == 2, "y: got shape " + shape_of(y) + ", expected (T, D)");
  rows.tokens = y.size(0), rows.width = y.size(1);
  check_shape("target", target, {rows.tokens, rows.width});
  check_shape("weights", weights, {rows.tokens});
  check_float32("weights", weights);
  check_float32("factor", factor);
  check(rows.width < 2 || (y.stride(1) == 1 && target.stride(1) == 1), "y, target: expected contiguous rows");
  check(divergence == 0 || divergence == 1, "divergence: expected 0 (mse) or 1 (cosine)");
  rows.y = y.const_data_ptr(), rows.target = target.const_data_ptr();
  rows.y_type = row_type("y", y), rows.target_type = row_type("target", target);
  rows.y_stride = y.stride(0), rows.target_stride = target.stride(0);
  rows.bias = nullptr;
  if (bias) {
    check_shape("bias", *bias, {rows.width});
    check_float32("bias", *bias);
    rows.bias = static_cast<const float*>(bias->const_data_ptr());
  }
  rows.weights = static_cast<const float*>(weights.const_data_ptr());
  rows.factor = static_cast<const float*>(factor.const_data_ptr());
  rows.gradient = nullptr, rows.gradient_type = RowType::float32;
  if (gradient) {
    check_shape("gradient", *gradient, {rows.tokens, rows.width});
    rows.gradient = gradient->mutable_data_ptr(), rows.gradient_type = row_type("gradient", *gradient);
    check(gradient->is_contiguous() && rows.gradient_type != RowType::float16,
          "gradient: expected contiguous float32 or bfloat16");
    check(rows.gradient_type == RowType::float32 || rows.y_type != RowType::float16,
          "gradient: expected float32 beside a float16 y");
  }
  rows.cosine = HiddenDivergence(divergence) == HiddenDivergence::cosine;
  Tensor values = torch::stable::new_empty(weights, std::vector<int64_t>{rows.tokens}, ScalarType::Float);
  rows.values = static_cast<float*>(values.mutable_data_ptr());
  return values;
}

float element(const void* data, RowType type, int64_t index) {
  if (type == RowType::float32) return static_cast<const float*>(data)[index];
  const uint16_t bits = static_cast<const uint16_t*>(data)[index];
  return type == RowType::bfloat16 ? DSD_ISA::from_bfloat16(bits) : DSD_ISA::from_float16(bits);
}

void run_row(const HiddenRows& rows, int64_t token) {
  const float weight = rows.weights[token], factor = *rows.factor;
  const auto x = [&](int64_t d) {
    return element(rows.y, rows.y_type, token * rows.y_stride + d) + (rows.bias ? rows.bias[d] : 0.f);
  };
  const auto t = [&](int64_t d) { return element(rows.target, rows.target_type, token * rows.target_stride + d); };
  RowSums sums;
  for (int64_t d = 0; weight != 0 && d < rows.width; ++d) sums.add(x(d), t(d), rows.cosine);
  const RowResult result(sums, weight, factor, rows.cosine);
  rows.values[token] = weight != 0 ? result.value : 0;
  for (int64_t d = 0; rows.gradient && d < rows.width; ++d) {
    const float g = weight != 0 ? result.gradient(x(d), t(d), rows.cosine) : 0;
    const int64_t at = token * rows.width + d;
    if (rows.gradient_type == RowType::float32)
      static_cast<float*>(rows.gradient)[at] = g;
    else
      static_cast<uint16_t*>(rows.gradient)[at] = DSD_ISA::to_bfloat16(g);
  }
}

}  // namespace

Tensor hidden_rows_cpu(Tensor y, Tensor target, std::optional<Tensor> bias, Tensor weights, Tensor factor,
                       int64_t divergence, std::optional<Tensor> gradient, int64_t) {
  HiddenRows rows;
  Tensor values = arguments_of(rows, y, target, bias, weights, factor, divergence, gradient);
  for (int64_t token = 0; token < rows.tokens; ++token) run_row(rows, token);
  return values;
}

#ifdef DSD_CUDA
Tensor hidden_rows_cuda(Tensor y, Tensor target, std::optional<Tensor> bias, Tensor weights, Tensor factor,
                        int64_t divergence, std::optional<Tensor> gradient, int64_t stream) {
  HiddenRows rows;
  Tensor values = arguments_of(rows, y, target, bias, weights, factor, divergence, gradient);
  const int error = launch_hidden_rows(rows, reinterpret_cast<void*>(stream));
  check(error == 0, "hidden_rows: the launch failed with CUDA error " + std::to_string(error));
  return values;
}
#endif

}  // namespace dsd
