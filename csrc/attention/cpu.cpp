// Attention alignment on a CPU, forward and gradients in one pass.
//
// For one head, S = scale · Q Kᵀ of both models and P = softmax(S) over the keys that a query sees:
//   kl         L = Σ P_T (log P_T − log P_S)     dS = P_S − P_T                 MiniLM, Wang et al. 2020, Eq. 4
//   mse        L = Σ (P_S − P_T)²                dS = 2 P_S (P_S − P_T − r), r = Σ_j P_S (P_S − P_T)
//   score_mse  L = Σ (S_S − S_T)²                dS = 2 (S_S − S_T)             TinyBERT, Jiao et al. 2020, Eq. 7
// then dQ = scale · dS K and dK = scale · dSᵀ Q.
//
// A task owns one key head of one sequence (or a share of its query blocks), so nothing is added atomically and
// results are reproducible. A block of queries holds its scores at full width: the softmax is exact, and dS overwrites
// it. Each block takes four products, and nothing is computed twice. Masked tokens are left out when the tensors are
// packed, so padding costs nothing. Causal order and windows shorten the range of keys of a block.
#include "cpu.h"

#include "../common/gemm.h"
#include "heads.h"
#include "pairs.h"
#include "rows.h"

namespace dsd {
namespace DSD_ISA {
namespace {

// Keys for one block of dQ: their rows stay in the first-level cache while all query tiles use them.
constexpr int64_t KEY_BLOCK = 128;

template <class T>
struct Layout {
  int64_t columns, score_stride;
  int64_t student_tile_width, student_row_width, teacher_width;
  int64_t query_elements, score_elements, student_panel_elements, teacher_panel_elements, row_elements;
  int64_t scratch_elements;
  int64_t key_gradient_elements, d_query_elements;

  explicit Layout(const AttentionArguments& a) {
    columns = round_up(a.tokens, TILE_COLUMNS<T>);
    // One more cache line: rows a multiple of 4096 bytes apart would compete for the same cache sets.
    score_stride = columns + 64 / int64_t(sizeof(T));
    student_tile_width = round_up(a.student_width, TILE_COLUMNS<T>);
    student_row_width = round_up(a.student_width, TILE_ROWS);
    teacher_width = a.teacher_width;
    query_elements = BLOCK_ROWS * larger(student_row_width, teacher_width);
    score_elements = BLOCK_ROWS * score_stride;
    student_panel_elements = columns * a.student_width;
    teacher_panel_elements = columns * teacher_width;
    row_elements = columns * student_tile_width;
    key_gradient_elements = columns * student_row_width;
    d_query_elements = BLOCK_ROWS * student_tile_width;
    scratch_elements = round_up(TILE_ROWS * larger(student_row_width, teacher_width), TILE_COLUMNS<T>);
  }
  int64_t elements() const {
    return 3 * query_elements + 2 * score_elements + student_panel_elements + teacher_panel_elements + row_elements +
           key_gradient_elements + d_query_elements + scratch_elements;
  }
};

// Keys as columns: out[panel][d][TILE_COLUMNS]; tokens beyond `count` are 0.
template <class T>
void pack_panels(const Source& key, int64_t base, const int64_t* positions, int64_t count, int64_t columns,
                 int64_t width, T* out, T* row) {
  const int64_t panel = TILE_COLUMNS<T>;
  for (int64_t j = 0; j < columns; ++j) {
    T* column = out + (j / panel) * panel * width + j % panel;
    if (j < count) {
      read_run<T>(key, base + positions[j] * key.stride[2], key.stride[3], width, T(1), row);
      for (int64_t d = 0; d < width; ++d) column[d * panel] = row[d];
    } else {
      for (int64_t d = 0; d < width; ++d) column[d * panel] = 0;
    }
  }
}

// The rows of `positions`, multiplied by `factor`, `padded` elements apart, with zeros after them.
template <class T>
void pack_rows(const Source& source, int64_t base, const int64_t* positions, int64_t count, int64_t total,
               int64_t width, int64_t padded, T factor, T* out) {
  for (int64_t i = 0; i < total; ++i, out += padded) {
    if (i < count) {
      read_run<T>(source, base + positions[i] * source.stride[2], source.stride[3], width, factor, out);
      for (int64_t d = width; d < padded; ++d) out[d] = 0;
    } else {
      for (int64_t d = 0; d < padded; ++d) out[d] = 0;
    }
  }
}

// The factor of the summed key gradients. Queries are packed with their scale in units of log 2, in pairs.h without it.
inline double key_factor(const AttentionArguments& a) {
  return uses_pairs(a) ? a.coefficient * a.student_scale : a.coefficient / score_unit(a);
}

template <class T>
class Task {
 public:
  Task(const AttentionArguments& arguments, T* workspace) : a(arguments), sight(arguments), layout(arguments) {
    query = workspace;
    query_tiles = query + layout.query_elements;
    teacher_tiles = query_tiles + layout.query_elements;
    scores_s = teacher_tiles + layout.query_elements;
    scores_t = scores_s + layout.score_elements;
    panels_s = scores_t + layout.score_elements;
    panels_t = panels_s + layout.student_panel_elements;
    key_rows = panels_t + layout.teacher_panel_elements;
    own_d_key = key_rows + layout.row_elements;
    d_query = own_d_key + layout.key_gradient_elements;
    scratch = d_query + layout.d_query_elements;
  }

  void begin(int64_t task, int64_t b, int64_t key_head, const int64_t* positions, int64_t count) {
    const int64_t columns = round_up(count, TILE_COLUMNS<T>);
    d_key = a.shares > 1 ? static_cast<T*>(a.key_gradients) + task * layout.key_gradient_elements : own_d_key;
    if (a.d_key) memset(d_key, 0, size_t(columns * layout.student_row_width) * sizeof(T));
    const int64_t base = b * a.student_key.stride[0] + key_head * a.student_key.stride[1];
    pack_panels<T>(a.student_key, base, positions, count, columns, a.student_width, panels_s, scratch);
    if (a.d_query)
      pack_rows<T>(a.student_key, base, positions, count, columns, a.student_width, layout.student_tile_width, T(1),
                   key_rows);
  }

  void pack_teacher_key(int64_t b, int64_t head, const int64_t* positions, int64_t count) {
    const int64_t base = b * a.teacher_key.stride[0] + head * a.teacher_key.stride[1];
    pack_panels<T>(a.teacher_key, base, positions, count, round_up(count, TILE_COLUMNS<T>), a.teacher_width, panels_t,
                   scratch);
  }

  void write_key(int64_t b, int64_t key_head, const int64_t* positions, int64_t count) {
    write_key_gradient<T>(a, d_key, layout.student_row_width, T(key_factor(a)), b, key_head, positions, count, scratch);
  }

  // Processes the compared queries start … stop − 1.
  double block(int64_t b, int64_t h, const int64_t* positions, int64_t count, int64_t start, int64_t stop) {
    const int64_t rows = stop - start, padded_rows = round_up(rows, TILE_ROWS);
    const int64_t *places = a.row_places + b * a.tokens + start, *own = a.row_positions + b * a.tokens + start;
    const double* weights = a.row_weights ? a.row_weights + b * a.tokens + start : nullptr;
    // The range of keys that any query of the block sees, widened to whole panels.
    const int64_t panel = TILE_COLUMNS<T>;
    const int64_t first = sight.first(positions, count, places[0], places[0]) / panel * panel;
    const int64_t last = round_up(sight.last(positions, count, places[rows - 1], places[rows - 1] + 1), panel);
    const int64_t width = last - first;

    const Source& source = a.student_query;
    pack_rows<T>(source, b * source.stride[0] + h * source.stride[1], own, rows, padded_rows, a.student_width,
                 layout.student_row_width, T(a.student_scale * score_unit(a)), query);
    interleave_rows(query, layout.student_row_width, padded_rows, a.student_width, query_tiles);
    product_of_scores(query_tiles, panels_s, a.student_width, places, first, last, rows, scores_s);
    pack_teacher(b, h, own, rows, padded_rows);
    product_of_scores(teacher_tiles, panels_t, a.teacher_width, places, first, last, rows, scores_t);

    const bool gradient = a.d_query || a.d_key;
    double value = 0;
    int64_t row_first = places[0], row_last = places[0];
    for (int64_t i = 0; i < rows; ++i) {
      T *s = scores_s + i * layout.score_stride, *t = scores_t + i * layout.score_stride;
      row_first = sight.first(positions, count, places[i], row_first);
      row_last = sight.last(positions, count, places[i], row_last);
      sight.hide(b, positions, places[i], first, last, row_first, row_last, absent<T>, absent<T>, s, t);
      double of_row;
      if (a.divergence == Divergence::kl)
        of_row = row<T, Divergence::kl>(s, t, width, gradient);
      else if (a.divergence == Divergence::mse)
        of_row = row<T, Divergence::mse>(s, t, width, gradient);
      else
        of_row = row<T, Divergence::score_mse>(s, t, width, gradient);
      value += weights ? weights[i] * of_row : of_row;
      if (weights && gradient)
        for (int64_t j = 0; j < width; j += lanes<T>) store(s + j, load(s + j) * T(weights[i]));
    }
    if (!gradient) return value;
    for (int64_t i = rows; i < padded_rows; ++i)
      memset(scores_s + i * layout.score_stride, 0, size_t(width) * sizeof(T));

    if (a.d_query) {
      query_gradient(places, first, last, rows);
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t row = (b * a.heads + h) * a.tokens + own[i];
        write_run<T>(a.d_query, a.d_query_type, row * a.student_width, a.student_width,
                     T(a.student_scale * a.coefficient), d_query + i * layout.student_tile_width);
      }
    }
    if (a.d_key) key_gradient(places, first, last, rows, padded_rows);
    return value;
  }

 private:
  void pack_teacher(int64_t b, int64_t h, const int64_t* positions, int64_t rows, int64_t padded_rows) {
    const Source& source = a.teacher_query;
    const int64_t base = b * source.stride[0] + h * source.stride[1];
    for (int64_t i = 0; i < padded_rows; i += TILE_ROWS) {
      const int64_t present = larger(0, smaller(TILE_ROWS, rows - i));
      pack_rows<T>(source, base, positions + i, present, TILE_ROWS, a.teacher_width, a.teacher_width,
                   T(a.teacher_scale * score_unit(a)), scratch);
      interleave_rows(scratch, a.teacher_width, TILE_ROWS, a.teacher_width, teacher_tiles + i * a.teacher_width);
    }
  }

  // The end of the keys that any of the TILE_ROWS rows from i on sees by causal order, at most `last`.
  int64_t end_of_tile(const int64_t* places, int64_t i, int64_t rows, int64_t last) const {
    return a.causal ? smaller(last, places[smaller(i + TILE_ROWS, rows) - 1] + 1) : last;
  }

  // If causal order leaves no pair of a tile, its scores are not written here, because `hide` writes them.
  void product_of_scores(const T* tiles, const T* panels, int64_t depth, const int64_t* places, int64_t first,
                         int64_t last, int64_t rows, T* scores) const {
    const int64_t panel = TILE_COLUMNS<T>;
    for (int64_t j = first; j < last; j += panel)
      for (int64_t i = 0; i < rows; i += TILE_ROWS)
        if (j < end_of_tile(places, i, rows, last))
          tile<T, false>(depth, tiles + i * depth, TILE_ROWS, 1, panels + j * depth, panel,
                         scores + i * layout.score_stride + (j - first), layout.score_stride);
  }

  // dQ = dS K, keys in blocks that stay in the cache.
  void query_gradient(const int64_t* places, int64_t first, int64_t last, int64_t rows) const {
    const int64_t width = layout.student_tile_width;
    for (int64_t j = first; j < last; j += KEY_BLOCK) {
      for (int64_t d = 0; d < width; d += TILE_COLUMNS<T>)
        for (int64_t i = 0; i < rows; i += TILE_ROWS) {
          const int64_t depth = smaller(KEY_BLOCK, end_of_tile(places, i, rows, last) - j);
          if (depth <= 0) continue;
          const T* left = scores_s + i * layout.score_stride + (j - first);
          T* out = d_query + i * width + d;
          if (j == first)
            tile<T, false>(depth, left, 1, layout.score_stride, key_rows + j * width + d, width, out, width);
          else
            tile<T, true>(depth, left, 1, layout.score_stride, key_rows + j * width + d, width, out, width);
        }
    }
  }

  // dKᵀ += Qᵀ dS, a panel of keys at a time.
  void key_gradient(const int64_t* places, int64_t first, int64_t last, int64_t rows, int64_t padded_rows) const {
    const int64_t panel = TILE_COLUMNS<T>, width = layout.student_row_width;
    int64_t from = 0;  // earlier rows see none of the panel's keys
    for (int64_t j = first; j < last; j += panel) {
      while (a.causal && from < rows && places[from] < j) ++from;
      for (int64_t d = 0; d < width; d += TILE_ROWS)
        tile<T, true>(padded_rows - from, query + from * width + d, width, 1,
                      scores_s + from * layout.score_stride + (j - first), layout.score_stride,
                      d_key + j * width + d * panel, panel);
    }
  }

  const AttentionArguments& a;
  const Sight sight;
  const Layout<T> layout;
  T *query, *query_tiles, *teacher_tiles, *scores_s, *scores_t, *panels_s, *panels_t, *key_rows, *own_d_key;
  T *d_query, *d_key, *scratch;
};

template <class T>
void run_tasks(const AttentionArguments& a, int64_t first, int64_t last, void* workspace) {
  Task<T> task(a, static_cast<T*>(workspace));
  for (int64_t i = first; i < last; ++i) run_task(a, task, i);
}

// elements, row_width: the size of one share's key gradients, and the features of their columns.
template <class T>
void merge_shares(const AttentionArguments& a, int64_t first, int64_t last, int64_t elements, int64_t row_width) {
  T row[1024];
  const int64_t panel = TILE_COLUMNS<T>;
  for (int64_t head = first; head < last; ++head) {
    const int64_t b = head / a.student_kv_heads;
    const T* parts = static_cast<const T*>(a.key_gradients) + head * a.shares * elements;
    for (int64_t j = 0; j < a.counts[b]; ++j) {
      const int64_t column = (j / panel) * panel * row_width + j % panel;
      const int64_t out = (head * a.tokens + a.positions[b * a.tokens + j]) * a.student_width;
      for (int64_t from = 0; from < a.student_width; from += 1024) {
        const int64_t length = smaller(1024, a.student_width - from);
        for (int64_t d = 0; d < length; ++d) {
          row[d] = 0;
          for (int64_t share = 0; share < a.shares; ++share)
            row[d] += parts[share * elements + column + (from + d) * panel];
        }
        write_run<T>(a.d_key, a.d_key_type, out + from, length, T(key_factor(a)), row);
      }
    }
  }
}

int64_t workspace_bytes(const AttentionArguments& a, bool float64) {
#ifdef __AVX512BF16__
  if (uses_pairs(a)) return PairLayout(a).elements() * 4;
#endif
  return float64 ? Layout<double>(a).elements() * 8 : Layout<float>(a).elements() * 4;
}
int64_t key_gradient_elements(const AttentionArguments& a, bool float64) {
#ifdef __AVX512BF16__
  if (uses_pairs(a)) return PairLayout(a).key_gradient();
#endif
  return float64 ? Layout<double>(a).key_gradient_elements : Layout<float>(a).key_gradient_elements;
}
void run(const AttentionArguments& a, bool float64, int64_t first, int64_t last, void* workspace) {
#ifdef __AVX512BF16__
  if (uses_pairs(a)) {
    PairTask task(a, workspace);
    for (int64_t i = first; i < last; ++i) run_task(a, task, i);
    return;
  }
#endif
  float64 ? run_tasks<double>(a, first, last, workspace) : run_tasks<float>(a, first, last, workspace);
}
void merge(const AttentionArguments& a, bool float64, int64_t first, int64_t last) {
  const int64_t elements = key_gradient_elements(a, float64);
#ifdef __AVX512BF16__
  if (uses_pairs(a)) return merge_shares<float>(a, first, last, elements, PairLayout(a).row_width);
#endif
  float64 ? merge_shares<double>(a, first, last, elements, Layout<double>(a).student_row_width)
          : merge_shares<float>(a, first, last, elements, Layout<float>(a).student_row_width);
}

}  // namespace

extern const AttentionKernel attention_kernel = {workspace_bytes, key_gradient_elements, run, merge};

}  // namespace DSD_ISA
}  // namespace dsd
