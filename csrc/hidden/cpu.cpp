// Hidden-state alignment on a CPU, forward and gradients in one walk over the tokens.
//
// y = W h + b (y = h without projection), token weights w:
//   mse     L = Σ_t w_t ‖y − h_T‖²            g = 2 w (y − h_T)                     TinyBERT, Jiao et al. 2020, Eq. 8
//   cosine  L = Σ_t w_t (1 − cos(y, h_T))     g = −w (t̂ − cos · ŷ) / ‖y‖            DistilBERT, Sanh et al. 2019
// then dh = g W, dW = Σ_t g hᵀ, db = Σ_t g.
//
// With a projection a chunk of tokens passes two phases. In the first, each thread takes blocks of tokens and computes
// y, g and dh; it reads W where it lies. In the second, each thread takes parts of dW, over all tokens of the chunk, so
// that dW exists once and not once for each thread. Nothing is added across threads, so the results do not depend on
// the number of threads.
#include "cpu.h"

#include "../common/gemm.h"

namespace dsd {
namespace DSD_ISA {
namespace {

// Rows of W that are packed at a time for dh.
constexpr int64_t DEPTH_BLOCK = 64;
// Output features of one unit of dW.
constexpr int64_t UNIT_TILES = 16;
constexpr double SHORTEST = 1e-12;

template <class T>
constexpr Type type_of_element = sizeof(T) == 4 ? Type::float32 : Type::float64;

template <class T>
struct Layout {
  int64_t width_s, rows_t, block_rows, stride;
  bool projected, by_projection;

  explicit Layout(const HiddenArguments& a) {
    projected = a.projection.data != nullptr;
    by_projection = a.d_projection;
    width_s = round_up(a.student_width, TILE_COLUMNS<T>);
    rows_t = round_up(a.teacher_width, TILE_ROWS);
    block_rows = round_up(a.block, TILE_ROWS);
    // One more cache line: rows a multiple of 4096 bytes apart would compete for the same cache sets.
    stride = round_up(rows_t, 64 / int64_t(sizeof(T))) + 64 / int64_t(sizeof(T));
  }
  // In order: student as columns, dh, rows of W for y and for dh, a tile of y, a target, bias, a row of the student.
  int64_t elements(const HiddenArguments& a) const {
    const int64_t rows = 2 * rows_t + 2 * width_s;
    if (!projected) return rows;
    return a.block * width_s + block_rows * width_s + TILE_ROWS * width_s + DEPTH_BLOCK * width_s +
           TILE_ROWS * TILE_COLUMNS<T> + rows;
  }
  // For each block: g as rows, and if dW is wanted the student as panels of features.
  int64_t block_elements(const HiddenArguments& a) const {
    return block_rows * stride + (by_projection ? a.block * width_s : 0);
  }
  bool direct(const HiddenArguments& a) const {
    return a.d_projection_type == type_of_element<T> && width_s == a.student_width && rows_t == a.teacher_width;
  }
  // The sums of db, and those of dW unless the result itself can hold them.
  int64_t parameter_elements(const HiddenArguments& a) const {
    if (!projected || !(a.d_projection || a.d_bias)) return 0;
    return rows_t + (a.d_projection && !direct(a) ? rows_t * width_s : 0);
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

inline int64_t offset_of(const HiddenArguments& a, const Source& source, int64_t token) {
  return token / a.tokens * source.stride[1] + token % a.tokens * source.stride[2];
}

// Returns Σ (y − target)²; g = factor · (y − target), which may overwrite y.
template <class T>
double squares(const T* y, const T* target, int64_t n, T factor, T* g) {
  Vec<T> sum{};
  T rest = 0;
  int64_t d = 0;
  for (; d + lanes<T> <= n; d += lanes<T>) {
    const Vec<T> difference = load(y + d) - load(target + d);
    sum += difference * difference;
    if (g) store(g + d, factor * difference);
  }
  for (; d < n; ++d) {
    const T difference = y[d] - target[d];
    rest += difference * difference;
    if (g) g[d] = factor * difference;
  }
  return double(sum_lanes<T>(sum) + rest);
}

// Returns 1 − cos(y, target); g = factor · its gradient.
template <class T>
double cosine(const T* y, const T* target, int64_t n, double factor, T* g) {
  const double norm_y = sqrt(dot(y, y, n)), norm_t = sqrt(dot(target, target, n));
  const double inverse_y = norm_y > SHORTEST ? 1 / norm_y : 0, inverse_t = norm_t > SHORTEST ? 1 / norm_t : 0;
  const double similarity = dot(y, target, n) * inverse_y * inverse_t;
  if (g) {
    const T along = T(factor * similarity * inverse_y * inverse_y), towards = T(-factor * inverse_y * inverse_t);
    for (int64_t d = 0; d < n; ++d) g[d] = along * y[d] + towards * target[d];
  }
  return 1 - similarity;
}

template <class T>
class Blocks {
 public:
  Blocks(const HiddenArguments& arguments, T* workspace) : a(arguments), layout(arguments) {
    target = workspace;
    bias = target + layout.rows_t;
    row = bias + layout.rows_t;
    result = row + layout.width_s;
    if (!layout.projected) return;
    columns = result + layout.width_s;
    d_hidden = columns + a.block * layout.width_s;
    matrix_rows = d_hidden + layout.block_rows * layout.width_s;
    matrix_panels = matrix_rows + TILE_ROWS * layout.width_s;
    product = matrix_panels + DEPTH_BLOCK * layout.width_s;
    for (int64_t o = 0; o < layout.rows_t; ++o) bias[o] = 0;
    if (a.bias.data) read_run<T>(a.bias, 0, a.bias.stride[3], a.teacher_width, T(1), bias);
  }

  void run(int64_t index) {
    const int64_t start = index * a.block, stop = smaller(start + a.block, a.count);
    a.values[index] = layout.projected ? projected(index, start, stop) : plain(start, stop);
  }

 private:
  // Returns the value of one token; g, if wanted, includes the coefficient already.
  double compare(int64_t token, const T* y, const T* wanted, T* g) const {
    const double weight = a.weights ? a.weights[token] : 1.0, factor = weight * a.coefficient;
    if (a.divergence == HiddenDivergence::mse) return weight * squares<T>(y, wanted, a.teacher_width, T(2 * factor), g);
    return weight * cosine<T>(y, wanted, a.teacher_width, factor, g);
  }

  // Returns the row in the source itself if it can be read there, else a copy of it in `copy`.
  const T* row_of(const Source& source, int64_t token, int64_t width, T* copy) const {
    const int64_t offset = offset_of(a, source, token);
    if (source.type == type_of_element<T> && source.stride[3] == 1) return static_cast<const T*>(source.data) + offset;
    read_run<T>(source, offset, source.stride[3], width, T(1), copy);
    return copy;
  }

  double plain(int64_t start, int64_t stop) {
    const bool direct = a.d_student && a.d_student_type == type_of_element<T>;
    double value = 0;
    for (int64_t i = start; i < stop; ++i) {
      const int64_t token = a.valid[i], at = token * a.student_width;
      const T* y = row_of(a.student, token, a.student_width, row);
      const T* wanted = row_of(a.teacher, token, a.teacher_width, target);
      T* g = direct ? static_cast<T*>(a.d_student) + at : a.d_student ? result : nullptr;
      value += compare(token, y, wanted, g);
      if (a.d_student && !direct) write_run<T>(a.d_student, a.d_student_type, at, a.student_width, T(1), result);
    }
    return value;
  }

  double projected(int64_t index, int64_t start, int64_t stop) {
    const int64_t n = stop - start, panel = TILE_COLUMNS<T>;
    T* outputs = static_cast<T*>(a.outputs) + (index - a.chunk) * layout.block_elements(a);
    T* features = outputs + layout.block_rows * layout.stride;
    const int64_t padded = round_up(n, panel);
    for (int64_t i = 0; i < padded; ++i) {
      if (i < n)
        read_run<T>(a.student, offset_of(a, a.student, a.valid[start + i]), a.student.stride[3], a.student_width, T(1),
                    row);
      for (int64_t d = i < n ? a.student_width : 0; d < layout.width_s; ++d) row[d] = 0;
      T* column = columns + i / panel * panel * a.student_width + i % panel;
      for (int64_t d = 0; d < a.student_width; ++d) column[d * panel] = row[d];
      if (a.d_projection && i < n)
        for (int64_t d = 0; d < layout.width_s; d += panel)
          memcpy(features + d * a.block + i * panel, row + d, size_t(panel) * sizeof(T));
    }
    project(n, padded, outputs);

    const bool gradient = a.d_student || a.d_projection || a.d_bias;
    double value = 0;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t token = a.valid[start + i];
      const T* wanted = row_of(a.teacher, token, a.teacher_width, target);
      T* y = outputs + i * layout.stride;
      value += compare(token, y, wanted, gradient ? y : nullptr);
    }
    if (a.d_student) {
      const int64_t rows = round_up(n, TILE_ROWS);
      for (int64_t i = n; i < rows; ++i) memset(outputs + i * layout.stride, 0, size_t(layout.stride) * sizeof(T));
      student_gradient(rows, outputs);
      for (int64_t i = 0; i < n; ++i)
        write_run<T>(a.d_student, a.d_student_type, a.valid[start + i] * a.student_width, a.student_width, T(1),
                     d_hidden + i * layout.width_s);
    }
    return value;
  }

  // y = W h + b; features beyond the teacher's width are 0. The rows of a tile are features, so W needs no packing.
  void project(int64_t n, int64_t padded, T* outputs) {
    const int64_t width = a.student_width, panel = TILE_COLUMNS<T>;
    const bool readable = a.projection.type == type_of_element<T> && a.projection.stride[3] == 1;
    for (int64_t o = 0; o < layout.rows_t; o += TILE_ROWS) {
      const int64_t present = smaller(TILE_ROWS, a.teacher_width - o);
      const T* left = static_cast<const T*>(a.projection.data) + o * a.projection.stride[2];
      int64_t left_row = a.projection.stride[2];
      if (!readable || present < TILE_ROWS) {
        left = matrix_rows, left_row = width;
        for (int64_t r = 0; r < TILE_ROWS; ++r)
          if (r < present)
            read_run<T>(a.projection, (o + r) * a.projection.stride[2], a.projection.stride[3], width, T(1),
                        matrix_rows + r * width);
          else
            memset(matrix_rows + r * width, 0, size_t(width) * sizeof(T));
      }
      for (int64_t i = 0; i < padded; i += panel) {
        tile<T, false>(width, left, 1, left_row, columns + i * width, panel, product, panel);
        const int64_t last = smaller(panel, n - i);
        for (int64_t t = 0; t < last; ++t)
          for (int64_t r = 0; r < TILE_ROWS; ++r)
            outputs[(i + t) * layout.stride + o + r] = product[r * panel + t] + bias[o + r];
      }
    }
  }

  // dh = g W, for DEPTH_BLOCK rows of W at a time, as panels of features.
  void student_gradient(int64_t rows, const T* outputs) {
    const int64_t width = layout.width_s, panel = TILE_COLUMNS<T>;
    for (int64_t o = 0; o < a.teacher_width; o += DEPTH_BLOCK) {
      const int64_t depth = smaller(DEPTH_BLOCK, a.teacher_width - o);
      for (int64_t k = 0; k < depth; ++k) {
        read_run<T>(a.projection, (o + k) * a.projection.stride[2], a.projection.stride[3], a.student_width, T(1), row);
        for (int64_t d = a.student_width; d < width; ++d) row[d] = 0;
        for (int64_t d = 0; d < width; d += panel)
          memcpy(matrix_panels + d * DEPTH_BLOCK + k * panel, row + d, size_t(panel) * sizeof(T));
      }
      for (int64_t d = 0; d < width; d += panel)
        for (int64_t i = 0; i < rows; i += TILE_ROWS) {
          const T *left = outputs + i * layout.stride + o, *right = matrix_panels + d * DEPTH_BLOCK;
          T* out = d_hidden + i * width + d;
          if (o > 0)
            tile<T, true>(depth, left, 1, layout.stride, right, panel, out, width);
          else
            tile<T, false>(depth, left, 1, layout.stride, right, panel, out, width);
        }
    }
  }

  const HiddenArguments& a;
  const Layout<T> layout;
  T *target, *bias, *row, *result;
  T *columns = nullptr, *d_hidden = nullptr, *matrix_rows = nullptr, *matrix_panels = nullptr, *product = nullptr;
};

// A unit is a panel of input features and UNIT_TILES tiles of output features.
template <class T>
int64_t count_units(const HiddenArguments& a) {
  const Layout<T> layout(a);
  const int64_t parts = (layout.rows_t + UNIT_TILES * TILE_ROWS - 1) / (UNIT_TILES * TILE_ROWS);
  return parts * (a.d_projection ? layout.width_s / TILE_COLUMNS<T> : 1);
}

template <class T>
void sum_units(const HiddenArguments& a, int64_t first, int64_t last) {
  const Layout<T> layout(a);
  const int64_t panel = TILE_COLUMNS<T>, part = UNIT_TILES * TILE_ROWS, parts = (layout.rows_t + part - 1) / part;
  const bool direct = layout.direct(a);
  T* d_bias = static_cast<T*>(a.parameters);
  T* d_matrix = direct ? static_cast<T*>(a.d_projection) : d_bias + layout.rows_t;
  for (int64_t unit = first; unit < last; ++unit) {
    const int64_t d = unit / parts * panel, from = unit % parts * part, to = smaller(from + part, layout.rows_t);
    for (int64_t index = a.chunk; index < a.chunk + a.blocks && index * a.block < a.count; ++index) {
      const int64_t n = smaller(a.block, a.count - index * a.block);
      const T* outputs = static_cast<const T*>(a.outputs) + (index - a.chunk) * layout.block_elements(a);
      const T* features = outputs + layout.block_rows * layout.stride + d * a.block;
      for (int64_t o = from; a.d_projection && o < to; o += TILE_ROWS) {
        T* out = d_matrix + o * layout.width_s + d;
        if (index == 0)
          tile<T, false>(n, outputs + o, layout.stride, 1, features, panel, out, layout.width_s);
        else
          tile<T, true>(n, outputs + o, layout.stride, 1, features, panel, out, layout.width_s);
      }
      if (a.d_bias && d == 0)
        for (int64_t i = 0; i < n; ++i)
          for (int64_t o = from; o < to; ++o) d_bias[o] += outputs[i * layout.stride + o];
    }
  }
}

template <class T>
void write_parameters(const HiddenArguments& a, int64_t first, int64_t last) {
  const Layout<T> layout(a);
  const T* d_bias = static_cast<const T*>(a.parameters);
  const T* d_matrix = d_bias + layout.rows_t;
  if (a.d_bias) write_run<T>(a.d_bias, a.d_bias_type, first, last - first, T(1), d_bias + first);
  if (!a.d_projection || layout.direct(a)) return;
  for (int64_t o = first; o < last; ++o)
    write_run<T>(a.d_projection, a.d_projection_type, o * a.student_width, a.student_width, T(1),
                 d_matrix + o * layout.width_s);
}

template <class T>
void run_blocks(const HiddenArguments& a, int64_t first, int64_t last, void* workspace) {
  Blocks<T> blocks(a, static_cast<T*>(workspace));
  for (int64_t index = first; index < last; ++index) blocks.run(index);
}

int64_t workspace_bytes(const HiddenArguments& a, bool float64) {
  return float64 ? Layout<double>(a).elements(a) * 8 : Layout<float>(a).elements(a) * 4;
}
int64_t chunk_elements(const HiddenArguments& a, bool float64) {
  return a.blocks * (float64 ? Layout<double>(a).block_elements(a) : Layout<float>(a).block_elements(a));
}
int64_t parameter_elements(const HiddenArguments& a, bool float64) {
  return float64 ? Layout<double>(a).parameter_elements(a) : Layout<float>(a).parameter_elements(a);
}
void tokens(const HiddenArguments& a, bool float64, int64_t first, int64_t last, void* workspace) {
  float64 ? run_blocks<double>(a, first, last, workspace) : run_blocks<float>(a, first, last, workspace);
}
int64_t parameter_units(const HiddenArguments& a, bool float64) {
  return float64 ? count_units<double>(a) : count_units<float>(a);
}
void parameters(const HiddenArguments& a, bool float64, int64_t first, int64_t last) {
  float64 ? sum_units<double>(a, first, last) : sum_units<float>(a, first, last);
}
void finish(const HiddenArguments& a, bool float64, int64_t first, int64_t last) {
  float64 ? write_parameters<double>(a, first, last) : write_parameters<float>(a, first, last);
}

}  // namespace

extern const HiddenKernel hidden_kernel = {workspace_bytes, chunk_elements, parameter_elements, tokens, parameter_units,
                                           parameters,      finish};

}  // namespace DSD_ISA
}  // namespace dsd
