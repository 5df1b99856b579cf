// Hidden-state alignment on a CPU, forward and gradients in one pass over blocks of tokens.
//
// y = W h + b (y = h without projection), token weights w:
//   mse     L = Σ_t w_t ‖y − h_T‖²            g = 2 w (y − h_T)                     TinyBERT, Jiao et al. 2020, Eq. 8
//   cosine  L = Σ_t w_t (1 − cos(y, h_T))     g = −w (t̂ − cos · ŷ) / ‖y‖            DistilBERT, Sanh et al. 2019
// then dh = g W, dW = Σ_t g hᵀ, db = Σ_t g. Tokens are dealt out to shares in blocks; each share sums dW and db by
// itself and the sums are added in order, so results are reproducible.
#include "cpu.h"

#include "../common/gemm.h"

namespace dsd {
namespace DSD_ISA {
namespace {

constexpr int64_t TOKENS = 2 * BLOCK_ROWS;
// Terms of a product that stay in the first-level cache.
constexpr int64_t DEPTH_BLOCK = 128;
constexpr double SHORTEST = 1e-12;

template <class T>
struct Layout {
  int64_t width_s, width_t, rows_t;
  bool projected;

  explicit Layout(const HiddenArguments& a) {
    projected = a.projection.data != nullptr;
    width_s = round_up(a.student_width, TILE_COLUMNS<T>);
    width_t = round_up(a.teacher_width, TILE_COLUMNS<T>);
    // Output features as rows of dW.
    rows_t = round_up(a.teacher_width, TILE_ROWS);
  }
  int64_t stride_t() const { return larger(width_t, rows_t) + 64 / int64_t(sizeof(T)); }
  int64_t tokens() const { return projected ? TOKENS : TILE_ROWS; }
  int64_t elements() const {
    // Student block, its interleaved tiles (then dh), projected block (then g), one target.
    return tokens() * (2 * width_s + stride_t()) + width_t;
  }
  // W as columns for y = W h, and as rows for dh = g W.
  int64_t packed_elements(const HiddenArguments& a) const {
    return projected ? width_t * a.student_width + a.teacher_width * width_s : 0;
  }
  int64_t partial_elements(const HiddenArguments& a) const {
    return projected && (a.d_projection || a.d_bias) ? rows_t * width_s + stride_t() : 0;
  }
};

template <class T>
double dot(const T* x, const T* y, int64_t n) {
  Vec<T> sum{};
  int64_t i = 0;
  for (; i + lanes<T> <= n; i += lanes<T>) sum += load(x + i) * load(y + i);
  double total = double(sum_lanes<T>(sum));
  for (; i < n; ++i) total += double(x[i]) * double(y[i]);
  return total;
}

template <class T>
class Share {
 public:
  Share(const HiddenArguments& arguments, int64_t index, T* workspace) : a(arguments), layout(arguments), share(index) {
    hidden = workspace;
    tiles = hidden + layout.tokens() * layout.width_s;
    outputs = tiles + layout.tokens() * layout.width_s;
    target = outputs + layout.tokens() * layout.stride_t();
    columns = static_cast<const T*>(a.packed);
    rows = columns + layout.width_t * a.student_width;
    const int64_t size = layout.partial_elements(a);
    if (size) {
      d_matrix = static_cast<T*>(a.partial) + share * size;
      d_offset = d_matrix + layout.rows_t * layout.width_s;
      memset(d_matrix, 0, size_t(size) * sizeof(T));
    }
  }

  void run() {
    double value = 0;
    const int64_t step = layout.tokens();
    for (int64_t start = share * step; start < a.count; start += a.shares * step)
      value += block(start, smaller(start + step, a.count));
    a.values[share] = value;
  }

 private:
  double block(int64_t start, int64_t stop) {
    const int64_t n = stop - start, padded = round_up(n, TILE_ROWS), stride = layout.stride_t();
    T* projected = outputs;
    int64_t projected_stride = stride;
    for (int64_t i = 0; i < padded; ++i) {
      T* row = hidden + i * layout.width_s;
      if (i < n) read_run<T>(a.student, offset(a.student, a.valid[start + i]), a.student.stride[3], a.student_width, T(1), row);
      for (int64_t d = i < n ? a.student_width : 0; d < layout.width_s; ++d) row[d] = 0;
    }
    if (layout.projected)
      project(padded);
    else
      projected = hidden, projected_stride = layout.width_s;

    const bool gradient = a.d_student || d_matrix;
    double value = 0;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t token = a.valid[start + i];
      read_run<T>(a.teacher, offset(a.teacher, token), a.teacher.stride[3], a.teacher_width, T(1), target);
      T* y = projected + i * projected_stride;
      const T weight = a.weights ? T(a.weights[token]) : T(1);
      value += a.divergence == HiddenDivergence::mse ? squares(y, weight) : cosine(y, weight, gradient);
    }
    if (!gradient) return value;
    if (layout.projected) {
      for (int64_t i = n; i < padded; ++i) memset(outputs + i * stride, 0, size_t(stride) * sizeof(T));
      if (d_matrix) parameter_gradient(n);
      if (a.d_student) student_gradient(padded);
    }
    if (a.d_student) {
      const T* result = layout.projected ? tiles : hidden;
      for (int64_t i = 0; i < n; ++i)
        write_run<T>(a.d_student, a.d_student_type, a.valid[start + i] * a.student_width, a.student_width,
                     T(a.coefficient), result + i * layout.width_s);
    }
    return value;
  }

  int64_t offset(const Source& source, int64_t token) const {
    return token / a.tokens * source.stride[1] + token % a.tokens * source.stride[2];
  }

  // y = W h + b of the block, padded features 0.
  void project(int64_t padded) {
    const int64_t width = a.student_width, stride = layout.stride_t(), panel = TILE_COLUMNS<T>;
    interleave_rows(hidden, layout.width_s, padded, width, tiles);
    for (int64_t o = 0; o < layout.width_t; ++o)
      target[o] = 0;
    if (a.bias.data) read_run<T>(a.bias, 0, a.bias.stride[3], a.teacher_width, T(1), target);
    for (int64_t i = 0; i < padded; ++i) {
      memcpy(outputs + i * stride, target, size_t(layout.width_t) * sizeof(T));
      for (int64_t o = layout.width_t; o < stride; ++o) outputs[i * stride + o] = 0;
    }
    for (int64_t k = 0; k < width; k += DEPTH_BLOCK) {
      const int64_t depth = smaller(DEPTH_BLOCK, width - k);
      for (int64_t o = 0; o < layout.width_t; o += panel)
        for (int64_t i = 0; i < padded; i += TILE_ROWS)
          tile<T, true>(depth, tiles + i * width + k * TILE_ROWS, TILE_ROWS, 1, columns + o * width + k * panel, panel,
                        outputs + i * stride + o, stride);
    }
  }

  // Σ w (y − target)²; y becomes its gradient.
  double squares(T* y, T weight) const {
    Vec<T> sum{};
    T rest = 0;
    int64_t d = 0;
    for (; d + lanes<T> <= a.teacher_width; d += lanes<T>) {
      const Vec<T> difference = load(y + d) - load(target + d);
      sum += difference * difference;
      store(y + d, 2 * weight * difference);
    }
    for (; d < a.teacher_width; ++d) {
      const T difference = y[d] - target[d];
      rest += difference * difference;
      y[d] = 2 * weight * difference;
    }
    return double(weight) * double(sum_lanes<T>(sum) + rest);
  }

  double cosine(T* y, T weight, bool gradient) const {
    const int64_t n = a.teacher_width;
    const double norm_y = sqrt(dot(y, y, n)), norm_t = sqrt(dot(target, target, n));
    const double inverse_y = norm_y > SHORTEST ? 1 / norm_y : 0, inverse_t = norm_t > SHORTEST ? 1 / norm_t : 0;
    const double similarity = dot(y, target, n) * inverse_y * inverse_t;
    if (gradient) {
      const T along = T(weight * similarity * inverse_y * inverse_y), towards = T(-weight * inverse_y * inverse_t);
      for (int64_t d = 0; d < n; ++d) y[d] = along * y[d] + towards * target[d];
    }
    return double(weight) * (1 - similarity);
  }

  // dW += gᵀ h and db += Σ g over n tokens.
  void parameter_gradient(int64_t n) {
    const int64_t stride = layout.stride_t();
    if (a.d_projection)
      for (int64_t d = 0; d < layout.width_s; d += TILE_COLUMNS<T>)
        for (int64_t o = 0; o < layout.rows_t; o += TILE_ROWS)
          tile<T, true>(n, outputs + o, stride, 1, hidden + d, layout.width_s, d_matrix + o * layout.width_s + d,
                        layout.width_s);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t o = 0; o < a.teacher_width; ++o) d_offset[o] += outputs[i * stride + o];
  }

  // dh = g W, over the tiles, which are not needed any more.
  void student_gradient(int64_t padded) {
    const int64_t stride = layout.stride_t(), width = layout.width_s;
    for (int64_t o = 0; o < a.teacher_width; o += DEPTH_BLOCK) {
      const int64_t depth = smaller(DEPTH_BLOCK, a.teacher_width - o);
      for (int64_t d = 0; d < width; d += TILE_COLUMNS<T>)
        for (int64_t i = 0; i < padded; i += TILE_ROWS) {
          const T *left = outputs + i * stride + o, *right = rows + o * width + d;
          T* out = tiles + i * width + d;
          if (o > 0)
            tile<T, true>(depth, left, 1, stride, right, width, out, width);
          else
            tile<T, false>(depth, left, 1, stride, right, width, out, width);
        }
    }
  }

  const HiddenArguments& a;
  const Layout<T> layout;
  const int64_t share;
  T *hidden, *tiles, *outputs, *target, *d_matrix = nullptr, *d_offset = nullptr;
  const T *columns, *rows;
};

// One unit is a panel of output features.
template <class T>
void pack_panels(const HiddenArguments& a, int64_t first, int64_t last) {
  const Layout<T> layout(a);
  const int64_t panel = TILE_COLUMNS<T>, width = a.student_width;
  T* columns = static_cast<T*>(a.packed);
  T* rows = columns + layout.width_t * width;
  for (int64_t o = first * panel; o < last * panel; ++o) {
    T* column = columns + o / panel * panel * width + o % panel;
    if (o >= a.teacher_width) {
      for (int64_t d = 0; d < width; ++d) column[d * panel] = 0;
      continue;
    }
    T* row = rows + o * layout.width_s;
    read_run<T>(a.projection, o * a.projection.stride[2], a.projection.stride[3], width, T(1), row);
    for (int64_t d = width; d < layout.width_s; ++d) row[d] = 0;
    for (int64_t d = 0; d < width; ++d) column[d * panel] = row[d];
  }
}

template <class T>
void merge_shares(const HiddenArguments& a, int64_t first, int64_t last) {
  const Layout<T> layout(a);
  const int64_t size = layout.partial_elements(a);
  T* sums = static_cast<T*>(a.partial);
  for (int64_t o = first; o < last; ++o) {
    T *row = sums + o * layout.width_s, *offset = sums + layout.rows_t * layout.width_s + o;
    for (int64_t share = 1; share < a.shares; ++share) {
      for (int64_t d = 0; d < a.student_width; ++d) row[d] += row[share * size + d];
      *offset += offset[share * size];
    }
    if (a.d_projection)
      write_run<T>(a.d_projection, a.d_projection_type, o * a.student_width, a.student_width, T(a.coefficient), row);
    if (a.d_bias) write_run<T>(a.d_bias, a.d_bias_type, o, 1, T(a.coefficient), offset);
  }
}

int64_t workspace_bytes(const HiddenArguments& a, bool float64) {
  return float64 ? Layout<double>(a).elements() * 8 : Layout<float>(a).elements() * 4;
}
int64_t packed_elements(const HiddenArguments& a, bool float64) {
  return float64 ? Layout<double>(a).packed_elements(a) : Layout<float>(a).packed_elements(a);
}
int64_t partial_elements(const HiddenArguments& a, bool float64) {
  return float64 ? Layout<double>(a).partial_elements(a) : Layout<float>(a).partial_elements(a);
}
void pack(const HiddenArguments& a, bool float64, int64_t first, int64_t last) {
  float64 ? pack_panels<double>(a, first, last) : pack_panels<float>(a, first, last);
}
int64_t pack_units(const HiddenArguments& a, bool float64) {
  return float64 ? Layout<double>(a).width_t / TILE_COLUMNS<double> : Layout<float>(a).width_t / TILE_COLUMNS<float>;
}
void run(const HiddenArguments& a, bool float64, int64_t share, void* workspace) {
  if (float64)
    Share<double>(a, share, static_cast<double*>(workspace)).run();
  else
    Share<float>(a, share, static_cast<float*>(workspace)).run();
}
void merge(const HiddenArguments& a, bool float64, int64_t first, int64_t last) {
  float64 ? merge_shares<double>(a, first, last) : merge_shares<float>(a, first, last);
}

}  // namespace

extern const HiddenKernel hidden_kernel = {workspace_bytes, packed_elements, partial_elements, pack,
                                           pack_units,      run,             merge};

}  // namespace DSD_ISA
}  // namespace dsd
