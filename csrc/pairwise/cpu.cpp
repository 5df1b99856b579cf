// Pairwise alignment on a CPU: the upper triangle of the relation matrices, a block of rows at a time.
//
//   cosine, dot  L = Σ_ij w_i w_j Δ_ij², Δ = R_S − R_T, R = U Uᵀ        dU_i = 4 Σ_j w_i w_j Δ_ij u_j
//   distance     L = Σ_ij w_i w_j ℓ(d_S/μ_S − d_T/μ_T), ℓ smooth-L1     RKD-D, Park et al. 2019, Eq. 6–8
//                dx_i = 2 Σ_j [w_i w_j ℓ' / μ − A / (μ² P)] (x_i − x_j) / d_ij,  A = Σ w w ℓ' d, P positive pairs
//
// A block of rows is compared with every later token once. The pair (i, j) adds to both gradients, so each relation is
// computed once instead of twice. Distances come from ‖x‖² + ‖y‖² − 2xy of centred vectors; where that cancels, they
// come from x − y, so that equal vectors are at distance 0. Tasks are shares of a sequence's blocks, and each has its
// own accumulators.
#include "cpu.h"

#include "../common/gemm.h"

namespace dsd {
namespace DSD_ISA {
namespace {

// Number of features, and of tokens, of a panel that stay in the first-level cache.
constexpr int64_t DEPTH_BLOCK = 128;
constexpr double SHORTEST = 1e-12;

// Squared distances below this share of ‖x‖² + ‖y‖² are computed from the differences x − y.
constexpr double CLOSE = 1.0 / 64;

template <class T>
struct Layout {
  int64_t rows, score_stride, width_s, width_t, own_gradient;

  explicit Layout(const PairwiseArguments& a) {
    rows = round_up(a.tokens, TILE_COLUMNS<T>) + round_up(BLOCK_ROWS, TILE_COLUMNS<T>);
    score_stride = rows + 64 / int64_t(sizeof(T));
    // A feature of ones follows the student's features: its products are the row sums that distances need.
    width_s = round_up(a.student_width + (a.relation == Relation::distance), TILE_COLUMNS<T>);
    width_t = round_up(a.teacher_width, TILE_COLUMNS<T>);
    own_gradient = a.gradient && a.shares == 1 ? gradient_elements(a) : 0;
  }
  int64_t gradient_elements(const PairwiseArguments& a) const {
    return rows * width_s * (a.relation == Relation::distance ? 2 : 1);
  }
  int64_t elements() const {
    return 2 * rows * (width_s + width_t) + BLOCK_ROWS * larger(width_s, width_t) + 2 * BLOCK_ROWS * score_stride +
           4 * rows + width_s + width_t + own_gradient;
  }
};

template <class T>
T dot(const T* x, const T* y, int64_t n) {
  Vec<T> sum{};
  int64_t i = 0;
  for (; i + lanes<T> <= n; i += lanes<T>) sum += load(x + i) * load(y + i);
  T total = sum_lanes<T>(sum);
  for (; i < n; ++i) total += x[i] * y[i];
  return total;
}

template <class T>
T squared_distance(const T* x, const T* y, int64_t n) {
  Vec<T> sum{};
  int64_t i = 0;
  for (; i + lanes<T> <= n; i += lanes<T>) {
    const Vec<T> difference = load(x + i) - load(y + i);
    sum += difference * difference;
  }
  T total = sum_lanes<T>(sum);
  for (; i < n; ++i) total += (x[i] - y[i]) * (x[i] - y[i]);
  return total;
}

// 1/‖x‖, 0 for a vector without direction.
template <class T>
T inverse_norm(const T* x, int64_t n) {
  const double norm = sqrt(double(dot(x, x, n)));
  return norm > SHORTEST ? T(1 / norm) : T(0);
}

template <class T>
class Task {
 public:
  Task(const PairwiseArguments& arguments, T* workspace) : a(arguments), layout(arguments) {
    rows_s = workspace;
    rows_t = rows_s + layout.rows * layout.width_s;
    panels_s = rows_t + layout.rows * layout.width_t;
    panels_t = panels_s + layout.rows * layout.width_s;
    tiles = panels_t + layout.rows * layout.width_t;
    scores_s = tiles + BLOCK_ROWS * larger(layout.width_s, layout.width_t);
    scores_t = scores_s + BLOCK_ROWS * layout.score_stride;
    weights = scores_t + BLOCK_ROWS * layout.score_stride;
    inverse = weights + layout.rows;
    squares_s = inverse + layout.rows;
    squares_t = squares_s + layout.rows;
    mean = squares_t + layout.rows;
    own_gradient = mean + larger(layout.width_s, layout.width_t);
  }

  // Processes a share of a sequence; if it is the only share, also the gradient.
  void run(int64_t task, bool measure_only) {
    b = task / a.shares;
    share = task % a.shares;
    count = a.counts[b];
    figures = a.values + task * FIGURES;
    const bool whole = a.shares == 1;
    read(a.student, a.student_width, layout.width_s, rows_s, true);
    read(a.teacher, a.teacher_width, layout.width_t, rows_t, false);
    pack(rows_s, a.student_width, layout.width_s, panels_s);
    pack(rows_t, a.teacher_width, layout.width_t, panels_t);
    if (a.relation == Relation::distance && (whole || measure_only)) {
      blocks(true);
      if (measure_only) return;
      mean_distances(a, b);
    }
    for (int64_t i = 0; i < layout.rows; ++i)
      weights[i] = i >= count  ? T(0)
                   : a.weights ? T(a.weights[b * a.tokens + a.positions[b * a.tokens + i]])
                               : T(1) / T(count);
    const int64_t size = layout.gradient_elements(a);
    gradient = nullptr;
    if (a.gradient) {
      gradient = whole ? own_gradient : static_cast<T*>(a.accumulators) + task * size;
      memset(gradient, 0, size_t(size) * sizeof(T));
    }
    blocks(false);
    if (whole && a.gradient) write_gradient(gradient);
  }

  // Computes the gradient of one sequence from the sums of its shares.
  void finish(int64_t sequence) {
    b = sequence;
    count = a.counts[b];
    const int64_t size = layout.gradient_elements(a);
    T* sums = static_cast<T*>(a.accumulators) + b * a.shares * size;
    for (int64_t other = 1; other < a.shares; ++other)
      for (int64_t i = 0; i < size; ++i) sums[i] += sums[other * size + i];
    read(a.student, a.student_width, layout.width_s, rows_s, true);
    write_gradient(sums);
  }

 private:
  void blocks(bool measure_only) {
    for (int64_t k = 0, start = 0; start < count; ++k, start += BLOCK_ROWS) {
      // Earlier blocks are compared with more tokens, so shares take blocks in turn, forwards and then backwards.
      const int64_t turn = k % a.shares, taker = k / a.shares % 2 ? a.shares - 1 - turn : turn;
      if (taker == share) block(start, smaller(start + BLOCK_ROWS, count), measure_only);
    }
  }

  void write_gradient(T* sums) {
    for (int64_t i = 0; i < count; ++i) {
      T *x = rows_s + i * layout.width_s, *g = sums + i * layout.width_s;
      if (a.relation == Relation::distance) {
        distance_gradient(x, g, g + layout.rows * layout.width_s);
      } else if (a.relation == Relation::cosine) {
        // Only the part of the gradient that is orthogonal to the unit vector changes its direction.
        const T along = dot(g, x, a.student_width);
        for (int64_t d = 0; d < a.student_width; ++d) g[d] = (g[d] - along * x[d]) * inverse[i];
      }
      const int64_t row = (b * a.tokens + a.positions[b * a.tokens + i]) * a.student_width;
      const double factor = a.coefficient * (a.relation == Relation::distance ? 2 : 4);
      write_run<T>(a.d_student, a.d_student_type, row, a.student_width, T(factor), g);
    }
  }

  // g becomes Σ_j pull_ij (x_i − x_j) of the slopes divided by μ, minus that of the directions times A / (μ² P).
  void distance_gradient(const T* x, T* g, const T* directions) const {
    double slope = 0;
    for (int64_t k = 0; k < a.shares; ++k) slope += a.values[(b * a.shares + k) * FIGURES + SLOPE];
    const double mu = a.means[b * 3], positive = a.means[b * 3 + 2];
    const T by_slope = T(1 / mu), by_direction = T(slope / (mu * mu * positive));
    const int64_t ones = a.student_width;
    for (int64_t d = 0; d < a.student_width; ++d)
      g[d] = (g[ones] * x[d] - g[d]) * by_slope - (directions[ones] * x[d] - directions[d]) * by_direction;
  }

  // Reads the valid tokens as rows: unit vectors for cosine, centred vectors for distance.
  void read(const Source& source, int64_t width, int64_t padded, T* rows, bool student) {
    for (int64_t i = 0; i < layout.rows; ++i) {
      T* row = rows + i * padded;
      if (i < count)
        read_run<T>(source, b * source.stride[1] + a.positions[b * a.tokens + i] * source.stride[2], source.stride[3],
                    width, T(1), row);
      const int64_t from = i < count ? width : 0;
      for (int64_t d = from; d < padded; ++d) row[d] = 0;
      if (a.relation == Relation::cosine && i < count) {
        const T scale = inverse_norm(row, width);
        for (int64_t d = 0; d < width; ++d) row[d] *= scale;
        if (student) inverse[i] = scale;
      }
      if (a.relation == Relation::distance && student && i < count) row[width] = 1;
    }
    if (a.relation == Relation::distance) {
      centre(rows, width, padded);
      T* squares = student ? squares_s : squares_t;
      for (int64_t i = 0; i < count; ++i) squares[i] = dot(rows + i * padded, rows + i * padded, width);
    }
  }

  // Centring does not change distances, and differences of sums then lose less precision.
  void centre(T* rows, int64_t width, int64_t padded) const {
    for (int64_t d = 0; d < width; ++d) mean[d] = 0;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t d = 0; d < width; ++d) mean[d] += rows[i * padded + d];
    const T share = T(1) / T(larger(count, 1));
    for (int64_t d = 0; d < width; ++d) mean[d] *= share;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t d = 0; d < width; ++d) rows[i * padded + d] -= mean[d];
  }

  // Rows as columns: panels[panel][d][TILE_COLUMNS].
  void pack(const T* rows, int64_t width, int64_t padded, T* panels) const {
    const int64_t panel = TILE_COLUMNS<T>;
    // A few features at a time, so that the columns being written stay in the cache.
    for (int64_t j = 0; j < layout.rows; j += panel)
      for (int64_t from = 0; from < width; from += 16)
        for (int64_t c = 0; c < panel; ++c)
          for (int64_t d = from; d < smaller(from + 16, width); ++d)
            panels[j * width + d * panel + c] = rows[(j + c) * padded + d];
  }

  void block(int64_t start, int64_t stop, bool measure_only) {
    const int64_t panel = TILE_COLUMNS<T>, rows = stop - start, padded_rows = round_up(rows, TILE_ROWS);
    const int64_t first = start / panel * panel, last = round_up(count, panel);
    relate(rows_s, layout.width_s, a.student_width, panels_s, start, padded_rows, first, last, scores_s);
    relate(rows_t, layout.width_t, a.teacher_width, panels_t, start, padded_rows, first, last, scores_t);
    for (int64_t i = 0; i < rows; ++i) {
      T *s = scores_s + i * layout.score_stride + (start - first), *t = scores_t + (s - scores_s);
      const int64_t own = stop - start, later = count - stop;
      if (a.relation == Relation::distance) {
        distances(s, start + i, start, own + later, rows_s, layout.width_s, a.student_width, squares_s);
        distances(t, start + i, start, own + later, rows_t, layout.width_t, a.teacher_width, squares_t);
        if (measure_only) {
          measure(s, own, 1, SUM_S), measure(s + own, later, 2, SUM_S);
          measure(t, own, 1, SUM_T), measure(t + own, later, 2, SUM_T);
          continue;
        }
        compare_distances(s, t, weights + start, weights[start + i], own, 1);
        compare_distances(s + own, t + own, weights + stop, weights[start + i], later, 2);
      } else {
        compare(s, t, weights + start, weights[start + i], own, 1);
        compare(s + own, t + own, weights + stop, weights[start + i], later, 2);
      }
    }
    if (!gradient) return;
    accumulate(scores_s, gradient, start, rows, first);
    if (a.relation == Relation::distance)
      accumulate(scores_t, gradient + layout.rows * layout.width_s, start, rows, first);
  }

  // Computes the scalar products of a block of rows with the tokens first … last − 1.
  void relate(const T* rows, int64_t padded, int64_t width, const T* panels, int64_t start, int64_t padded_rows,
              int64_t first, int64_t last, T* scores) const {
    interleave_rows(rows + start * padded, padded, padded_rows, width, tiles);
    for (int64_t k = 0; k < width; k += DEPTH_BLOCK) {
      const int64_t depth = smaller(DEPTH_BLOCK, width - k);
      for (int64_t j = first; j < last; j += TILE_COLUMNS<T>)
        for (int64_t i = 0; i < padded_rows; i += TILE_ROWS) {
          const T *left = tiles + i * width + k * TILE_ROWS, *right = panels + j * width + k * TILE_COLUMNS<T>;
          T* out = scores + i * layout.score_stride + (j - first);
          if (k > 0)
            tile<T, true>(depth, left, TILE_ROWS, 1, right, TILE_COLUMNS<T>, out, layout.score_stride);
          else
            tile<T, false>(depth, left, TILE_ROWS, 1, right, TILE_COLUMNS<T>, out, layout.score_stride);
        }
    }
  }

  // Turns x, the scalar products of token i with n tokens from `start` on, into distances.
  void distances(T* x, int64_t i, int64_t start, int64_t n, const T* rows, int64_t padded, int64_t width,
                 const T* squares) const {
    const T own = squares[i];
    for (int64_t j = 0; j < n; ++j) x[j] = own + squares[start + j] - 2 * x[j];
    for (int64_t j = 0; j < n; ++j)
      if (!(x[j] > T(CLOSE) * (own + squares[start + j])))
        x[j] = squared_distance(rows + i * padded, rows + (start + j) * padded, width);
    for (int64_t j = 0; j < n; ++j) x[j] = std::sqrt(x[j]);
  }

  void measure(const T* d, int64_t n, double times, int64_t figure) {
    double sum = 0;
    int64_t positive = 0;
    for (int64_t j = 0; j < n; ++j) sum += double(d[j]), positive += d[j] > 0;
    figures[figure] += times * sum;
    figures[figure + 1] += times * double(positive);
  }

  // Adds Σ_j w_i w_j Δ², where each pair counts `times`; w_i w_j Δ overwrites s.
  void compare(T* s, const T* t, const T* w, T own, int64_t n, double times) {
    Vec<T> sum{};
    T rest = 0;
    int64_t j = 0;
    for (; j + lanes<T> <= n; j += lanes<T>) {
      const Vec<T> difference = load(s + j) - load(t + j), weighted = own * load(w + j) * difference;
      sum += weighted * difference;
      store(s + j, weighted);
    }
    for (; j < n; ++j) {
      const T difference = s[j] - t[j], weighted = own * w[j] * difference;
      rest += weighted * difference;
      s[j] = weighted;
    }
    figures[LOSS] += times * double(sum_lanes<T>(sum) + rest);
  }

  // Adds the smooth-L1 of distances; slope / d overwrites s, and 1 / d overwrites t.
  void compare_distances(T* s, T* t, const T* w, T own, int64_t n, double times) {
    const T by_s = T(1 / a.means[b * 3]), by_t = T(1 / a.means[b * 3 + 1]);
    Vec<T> losses{}, slopes{};
    T loss_rest = 0, slope_rest = 0;
    int64_t j = 0;
    for (; j + lanes<T> <= n; j += lanes<T>) {
      const Vec<T> d = load(s + j), difference = d * by_s - load(t + j) * by_t;
      const Vec<T> one = broadcast(T(1));
      Vec<T> slope = difference > one ? one : difference;
      slope = slope < -one ? -one : slope;
      const Vec<T> weighted = own * load(w + j) * slope, inverse_distance = d > 0 ? 1 / d : Vec<T>{};
      losses += weighted * (difference - slope / 2);
      slopes += weighted * d;
      store(s + j, weighted * inverse_distance);
      store(t + j, inverse_distance);
    }
    for (; j < n; ++j) {
      const T d = s[j], difference = d * by_s - t[j] * by_t;
      const T slope = difference > 1 ? T(1) : difference < -1 ? T(-1) : difference;
      const T weighted = own * w[j] * slope, inverse_distance = d > 0 ? 1 / d : T(0);
      loss_rest += weighted * (difference - slope / 2);
      slope_rest += weighted * d;
      s[j] = weighted * inverse_distance;
      t[j] = inverse_distance;
    }
    figures[LOSS] += times * double(sum_lanes<T>(losses) + loss_rest);
    figures[SLOPE] += times * double(sum_lanes<T>(slopes) + slope_rest);
  }

  // sums_i += Σ_{j ≥ start} pull_ij x_j for the block's rows, sums_j += Σ_i pull_ij x_i for tokens after it.
  void accumulate(T* pulls, T* sums, int64_t start, int64_t rows, int64_t first) const {
    const int64_t width = layout.width_s, stride = layout.score_stride, padded_rows = round_up(rows, TILE_ROWS);
    const int64_t stop = start + rows, end = smaller(count + TILE_ROWS, layout.rows);
    // Clears what tiles cover but the block does not own: earlier tokens, tokens after the last, rows after the last.
    for (int64_t i = 0; i < padded_rows; ++i) {
      T* row = pulls + i * stride;
      for (int64_t j = first; j < (i < rows ? start : end); ++j) row[j - first] = 0;
      for (int64_t j = count; j < end; ++j) row[j - first] = 0;
    }
    for (int64_t j = first; j < count; j += DEPTH_BLOCK) {
      const int64_t depth = smaller(DEPTH_BLOCK, count - j);
      for (int64_t d = 0; d < width; d += TILE_COLUMNS<T>)
        for (int64_t i = 0; i < padded_rows; i += TILE_ROWS)
          tile<T, true>(depth, pulls + i * stride + (j - first), 1, stride, rows_s + j * width + d, width,
                        sums + (start + i) * width + d, width);
    }
    for (int64_t d = 0; d < width; d += TILE_COLUMNS<T>)
      for (int64_t j = stop; j < count; j += TILE_ROWS)
        tile<T, true>(rows, pulls + (j - first), stride, 1, rows_s + start * width + d, width, sums + j * width + d,
                      width);
  }

  const PairwiseArguments& a;
  const Layout<T> layout;
  int64_t b = 0, count = 0, share = 0;
  double* figures = nullptr;
  T *rows_s, *rows_t, *panels_s, *panels_t, *tiles, *scores_s, *scores_t, *weights, *inverse, *squares_s, *squares_t;
  T *mean, *own_gradient, *gradient = nullptr;
};

template <class T>
void run_tasks(const PairwiseArguments& a, int64_t first, int64_t last, void* workspace, bool measure_only) {
  Task<T> task(a, static_cast<T*>(workspace));
  for (int64_t i = first; i < last; ++i) task.run(i, measure_only);
}
template <class T>
void finish_sequences(const PairwiseArguments& a, int64_t first, int64_t last, void* workspace) {
  Task<T> task(a, static_cast<T*>(workspace));
  for (int64_t b = first; b < last; ++b) task.finish(b);
}

int64_t workspace_bytes(const PairwiseArguments& a, bool float64) {
  return float64 ? Layout<double>(a).elements() * 8 : Layout<float>(a).elements() * 4;
}
int64_t gradient_elements(const PairwiseArguments& a, bool float64) {
  return float64 ? Layout<double>(a).gradient_elements(a) : Layout<float>(a).gradient_elements(a);
}
void measure(const PairwiseArguments& a, bool float64, int64_t first, int64_t last, void* workspace) {
  float64 ? run_tasks<double>(a, first, last, workspace, true) : run_tasks<float>(a, first, last, workspace, true);
}
void run(const PairwiseArguments& a, bool float64, int64_t first, int64_t last, void* workspace) {
  float64 ? run_tasks<double>(a, first, last, workspace, false) : run_tasks<float>(a, first, last, workspace, false);
}
void finish(const PairwiseArguments& a, bool float64, int64_t first, int64_t last, void* workspace) {
  float64 ? finish_sequences<double>(a, first, last, workspace) : finish_sequences<float>(a, first, last, workspace);
}

}  // namespace

extern const PairwiseKernel pairwise_kernel = {workspace_bytes, gradient_elements, measure, run, finish};

}  // namespace DSD_ISA
}  // namespace dsd
