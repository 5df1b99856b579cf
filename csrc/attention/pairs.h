// Attention alignment of bfloat16 tensors with the processor's bfloat16 products (AVX512_BF16 or AMX).
//
// The inputs are bfloat16 already, so the scores are exact products. dS is rounded to bfloat16 before dQ and dK, as
// PyTorch does in bfloat16. Softmax and sums stay in float32. A block of queries walks its keys twice, a chunk at a
// time. The first walk finds products and exponentials, which are held at full width. The second finds dS of a chunk
// and adds its part of dQ and dK.
#pragma once

#include "heads.h"
#include "pair_products.h"
#include "pair_rows.h"
#include "rows.h"

namespace dsd {
namespace DSD_ISA {

#ifndef __AVX512BF16__

inline bool uses_pairs(const AttentionArguments&) { return false; }

#else

inline bool uses_pairs(const AttentionArguments& a) {
  return a.student_query.type == Type::bfloat16 && a.student_key.type == Type::bfloat16 &&
         a.teacher_query.type == Type::bfloat16 && a.teacher_key.type == Type::bfloat16;
}

// Sizes in words of 4 bytes. `depth`: pairs of features; `tile_width`, `row_width`: features of dQ and of dK.
struct PairLayout {
  int64_t columns, score_stride, depth_s, depth_t, tile_width, row_width, chunks;

  explicit PairLayout(const AttentionArguments& a) {
    columns = round_up(a.tokens, PAIR_COLUMNS);
    // One more cache line: rows a multiple of 4096 bytes apart would compete for the same cache sets.
    score_stride = columns + 16;
    depth_s = round_up((a.student_width + 1) / 2, PAIR_DEPTH);
    depth_t = round_up((a.teacher_width + 1) / 2, PAIR_DEPTH);
    tile_width = round_up(a.student_width, PAIR_COLUMNS);
    row_width = round_up(a.student_width, PAIR_ROWS);
    chunks = columns / KEY_CHUNK + 2;
  }
  int64_t scores() const { return BLOCK_ROWS * score_stride; }
  int64_t key_gradient() const { return columns * row_width; }
  int64_t d_query() const { return BLOCK_ROWS * tile_width; }
  int64_t row_sums() const { return BLOCK_ROWS * int64_t(sizeof(RowSums) / 4); }
  int64_t factors() const { return BLOCK_ROWS * chunks * int64_t(sizeof(ChunkFactors) / 4); }
  int64_t slope_rows() const { return BLOCK_ROWS * SLOPE_STRIDE; }
  int64_t slope_pairs() const { return BLOCK_ROWS / 2 * PAIR_STRIDE; }
  int64_t query() const { return BLOCK_ROWS * larger(depth_s, depth_t); }
  int64_t query_columns() const { return tile_width * BLOCK_ROWS / 2; }
  int64_t scratch() const { return BLOCK_ROWS / 2 * larger(tile_width, larger(depth_s, depth_t)); }
  int64_t elements() const {
    return 2 * scores() + key_gradient() + d_query() + row_sums() + factors() + slope_rows() + slope_pairs() +
           2 * query() + query_columns() + scratch() + columns * (depth_s + depth_t) + columns / 2 * tile_width;
  }

  // Strides of a chunk's dS: a row's pairs of keys, and a pair of rows at every key. One more cache line, as above.
  static constexpr int64_t SLOPE_STRIDE = KEY_CHUNK / 2 + 16, PAIR_STRIDE = KEY_CHUNK + 16;
};

class PairTask {
 public:
  PairTask(const AttentionArguments& arguments, void* workspace)
      : a(arguments), sight(arguments), layout(arguments), by(arguments) {
    float* next = static_cast<float*>(workspace);
    const auto take = [&next](int64_t words) {
      float* from = next;
      next += words;
      return from;
    };
    const auto words = [&take](int64_t count) { return reinterpret_cast<uint32_t*>(take(count)); };
    sums = reinterpret_cast<RowSums*>(take(layout.row_sums()));
    factors = reinterpret_cast<ChunkFactors*>(take(layout.factors()));
    scores_s = take(layout.scores());
    scores_t = take(layout.scores());
    own_d_key = take(layout.key_gradient());
    d_query = take(layout.d_query());
    slope_rows = words(layout.slope_rows());
    slope_pairs = words(layout.slope_pairs());
    panels_s = words(layout.columns * layout.depth_s);
    panels_t = words(layout.columns * layout.depth_t);
    key_pairs = words(layout.columns / 2 * layout.tile_width);
    query_s = words(layout.query());
    query_t = words(layout.query());
    query_columns = words(layout.query_columns());
    scratch = words(layout.scratch());
  }

  void begin(int64_t task, int64_t b, int64_t key_head, const int64_t* positions, int64_t count) {
    const int64_t columns = round_up(count, PAIR_COLUMNS);
    d_key = a.shares > 1 ? static_cast<float*>(a.key_gradients) + task * layout.key_gradient() : own_d_key;
    if (a.d_key) memset(d_key, 0, size_t(columns * layout.row_width) * 4);
    const int64_t base = b * a.student_key.stride[0] + key_head * a.student_key.stride[1];
    pack_panels(a.student_key, base, positions, count, columns, a.student_width, panels_s);
    if (a.d_query) pack_pairs(a.student_key, base, positions, count, columns, a.student_width, key_pairs);
  }

  void pack_teacher_key(int64_t b, int64_t head, const int64_t* positions, int64_t count) {
    pack_panels(a.teacher_key, b * a.teacher_key.stride[0] + head * a.teacher_key.stride[1], positions, count,
                round_up(count, PAIR_COLUMNS), a.teacher_width, panels_t);
  }

  void write_key(int64_t b, int64_t key_head, const int64_t* positions, int64_t count) {
    write_key_gradient(a, d_key, layout.row_width, float(a.coefficient * a.student_scale), b, key_head, positions,
                       count, reinterpret_cast<float*>(scratch));
  }

  double block(int64_t b, int64_t h, const int64_t* positions, int64_t count, int64_t start, int64_t stop) {
    if (a.divergence == Divergence::kl) return block<Divergence::kl>(b, h, positions, count, start, stop);
    if (a.divergence == Divergence::mse) return block<Divergence::mse>(b, h, positions, count, start, stop);
    return block<Divergence::score_mse>(b, h, positions, count, start, stop);
  }

 private:
  // The compared queries start … stop − 1: their `places` among the valid tokens, and the keys [first, last) that any
  // of them sees.
  struct Block {
    int64_t b, rows, padded_rows, count, first, last;
    const int64_t *positions, *places;
    const double* weights;
  };

  template <Divergence D>
  double block(int64_t b, int64_t h, const int64_t* positions, int64_t count, int64_t start, int64_t stop) {
    const int64_t *places = a.row_places + b * a.tokens + start, *own = a.row_positions + b * a.tokens + start;
    const int64_t rows = stop - start, end = places[rows - 1];
    const Block block = {b,
                         rows,
                         round_up(rows, PAIR_ROWS),
                         count,
                         sight.first(positions, count, places[0], places[0]) / PAIR_COLUMNS * PAIR_COLUMNS,
                         round_up(sight.last(positions, count, end, end + 1), PAIR_COLUMNS),
                         positions,
                         places,
                         a.row_weights ? a.row_weights + b * a.tokens + start : nullptr};
    const int64_t base_s = b * a.student_query.stride[0] + h * a.student_query.stride[1];
    const int64_t base_t = b * a.teacher_query.stride[0] + h * a.teacher_query.stride[1];
    pack_rows(a.student_query, base_s, own, rows, block.padded_rows, a.student_width, layout.depth_s,
              a.student_scale < 0, query_s);
    pack_rows(a.teacher_query, base_t, own, rows, block.padded_rows, a.teacher_width, layout.depth_t,
              a.teacher_scale < 0, query_t);

    PairFactors of_rows[BLOCK_ROWS] = {};
    double value = exponentials<D>(block, of_rows);
    const bool gradient = a.d_query || a.d_key;
    if (D == Divergence::kl && !gradient) return value;
    if (a.d_key) pack_query_columns(base_s, own, rows);
    for (int64_t from = block.first; from < block.last; from += KEY_CHUNK) {
      const int64_t to = smaller(from + KEY_CHUNK, block.last);
      value += slopes<D>(block, of_rows, from, to);
      if (a.d_query) query_gradient(block, from, to);
      if (a.d_key) key_gradient(block, from, to);
    }
    if (a.d_query)
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t row = (b * a.heads + h) * a.tokens + own[i];
        write_run<float>(a.d_query, a.d_query_type, row * a.student_width, a.student_width,
                         float(a.student_scale * a.coefficient), d_query + i * layout.tile_width);
      }
    return value;
  }

  // Reads the row at `offset` into 2 · words elements, with zeros after `width`.
  static void read_row(const Source& source, int64_t offset, int64_t width, int64_t words, uint32_t* out) {
    const uint16_t* from = static_cast<const uint16_t*>(source.data) + offset;
    uint16_t* to = reinterpret_cast<uint16_t*>(out);
    if (source.stride[3] == 1)
      memcpy(to, from, size_t(width) * 2);
    else
      for (int64_t d = 0; d < width; ++d) to[d] = from[d * source.stride[3]];
    memset(to + width, 0, size_t(2 * words - width) * 2);
  }

  // Keys as columns of feature pairs: out[panel][pair][32]; tokens beyond `count` are 0.
  void pack_panels(const Source& source, int64_t base, const int64_t* positions, int64_t count, int64_t columns,
                   int64_t width, uint32_t* out) const {
    const int64_t depth = round_up((width + 1) / 2, PAIR_DEPTH);
    for (int64_t j = 0; j < columns; j += 16) {
      pack_rows(source, base, positions + j, smaller(16, count - j), 16, width, depth, false, scratch);
      uint32_t* panel = out + j / PAIR_COLUMNS * PAIR_COLUMNS * depth + j % PAIR_COLUMNS;
      for (int64_t d = 0; d < depth; d += 16)
        transpose_words(scratch + d, depth, panel + d * PAIR_COLUMNS, PAIR_COLUMNS);
    }
  }

  // Rows of feature pairs, with zeros after `count`.
  static void pack_rows(const Source& source, int64_t base, const int64_t* positions, int64_t count, int64_t total,
                        int64_t width, int64_t depth, bool negative, uint32_t* out) {
    for (int64_t i = 0; i < total; ++i, out += depth) {
      if (i < count) {
        read_row(source, base + positions[i] * source.stride[2], width, depth, out);
        if (negative)
          for (int64_t d = 0; d < depth; ++d) out[d] ^= 0x80008000;
      } else {
        memset(out, 0, size_t(depth) * 4);
      }
    }
  }

  // Tokens 2i and 2i + 1 in one row of tile_width words, with zeros after `count` and `width`.
  void pack_pairs(const Source& source, int64_t base, const int64_t* positions, int64_t count, int64_t total,
                  int64_t width, uint32_t* out) const {
    const int64_t half = layout.tile_width / 2;
    uint32_t* rows = scratch;
    for (int64_t i = 0; i < total; i += 2, out += layout.tile_width) {
      pack_rows(source, base, positions + i, smaller(2, count - i), 2, width, half, false, rows);
      for (int64_t d = 0; d < half; d += 16)
        interleave(_mm512_loadu_si512(rows + d), _mm512_loadu_si512(rows + half + d), out + 2 * d);
    }
  }

  // Queries as columns of row pairs: query_columns[feature][pair of rows].
  void pack_query_columns(int64_t base, const int64_t* own, int64_t rows) {
    const int64_t width = layout.tile_width, step = 32;
    for (int64_t i = 0; i < rows; i += step) {
      uint32_t* pairs = reinterpret_cast<uint32_t*>(d_query);  // not in use until the first chunk of keys
      pack_pairs(a.student_query, base, own + i, rows - i, step, a.student_width, pairs);
      for (int64_t d = 0; d < width; d += 16)
        transpose_words(pairs + d, width, query_columns + d * BLOCK_ROWS / 2 + i / 2, BLOCK_ROWS / 2);
    }
  }

  // The end of the keys that any of the `height` rows from i on sees, rounded up to a tile's columns.
  int64_t end_of(const Block& block, int64_t i, int64_t height) const {
    if (!a.causal) return block.last;
    return smaller(block.last, round_up(block.places[smaller(i + height, block.rows) - 1] + 1, PAIR_COLUMNS));
  }

  static void products(const uint32_t* queries, const uint32_t* panels, int64_t depth, int64_t from, int64_t to,
                       int64_t stride, float* out) {
    for (int64_t j = from; j < to; j += PAIR_COLUMNS)
      pair_tile<false>(depth, queries, depth, panels + j * depth, PAIR_COLUMNS, out + (j - from), stride);
  }

  // Computes the exponentials of both models (products for score_mse) at full width, and their factors for each chunk
  // and each row. Returns the part of the value that is known by then.
  template <Divergence D>
  double exponentials(const Block& block, PairFactors* of_rows) const {
    int64_t row_first[BLOCK_ROWS], row_last[BLOCK_ROWS];
    int64_t seen_first = block.places[0], seen_last = block.places[0];
    for (int64_t i = 0; i < block.rows; ++i) {
      row_first[i] = seen_first = sight.first(block.positions, block.count, block.places[i], seen_first);
      row_last[i] = seen_last = sight.last(block.positions, block.count, block.places[i], seen_last);
    }
    const int64_t stride = layout.score_stride;
    for (int64_t from = block.first, chunk = 0; from < block.last; from += KEY_CHUNK, ++chunk)
      for (int64_t group = 0; group < block.padded_rows; group += PAIR_ROWS) {
        const int64_t to = smaller(from + KEY_CHUNK, end_of(block, group, PAIR_ROWS));
        if (to <= from) continue;
        float* s = scores_s + group * stride + (from - block.first);
        float* t = scores_t + group * stride + (from - block.first);
        products(query_s + group * layout.depth_s, panels_s, layout.depth_s, from, to, stride, s);
        products(query_t + group * layout.depth_t, panels_t, layout.depth_t, from, to, stride, t);
        for (int64_t i = group; i < smaller(group + PAIR_ROWS, block.rows); ++i, s += stride, t += stride) {
          const int64_t end = smaller(to, end_of(block, i / 2 * 2, 2));  // `slopes` reads pairs of rows
          if (end <= from) continue;
          sight.hide(block.b, block.positions, block.places[i], from, end, row_first[i], row_last[i], by.hidden_s,
                     by.hidden_t, s, t);
          if (D != Divergence::score_mse)
            add_chunk<D>(s, t, end - from, chunk == 0, by, sums[i], factors[i * layout.chunks + chunk]);
        }
      }
    double value = 0;
    for (int64_t i = 0; i < block.rows; ++i) {
      const double weight = block.weights ? block.weights[i] : 1;
      const int64_t width = end_of(block, i / 2 * 2, 2) - block.first;
      if (D != Divergence::score_mse)
        value += weight * finish_row<D>(sums[i], by, (width + KEY_CHUNK - 1) / KEY_CHUNK, factors + i * layout.chunks,
                                        &of_rows[i]);
      of_rows[i].times = float(weight);
    }
    return value;
  }

  // Computes dS of keys [from, to), as rows of key pairs and as rows of query pairs. Returns its part of the value.
  template <Divergence D>
  double slopes(const Block& block, const PairFactors* of_rows, int64_t from, int64_t to) const {
    const int64_t chunk = (from - block.first) / KEY_CHUNK;
    double value = 0;
    for (int64_t i = 0; i < block.padded_rows; i += 2) {
      const int64_t stop = smaller(to, end_of(block, i / PAIR_ROWS * PAIR_ROWS, PAIR_ROWS)) - from;
      const int64_t width = i < block.rows ? smaller(stop, end_of(block, i, 2) - from) : 0;
      uint32_t *upper = slope_rows + i * PairLayout::SLOPE_STRIDE, *lower = upper + PairLayout::SLOPE_STRIDE;
      uint32_t* pairs = slope_pairs + i / 2 * PairLayout::PAIR_STRIDE;
      const float *s = scores_s + i * layout.score_stride + (from - block.first), *s1 = s + layout.score_stride;
      const float *t = scores_t + i * layout.score_stride + (from - block.first), *t1 = t + layout.score_stride;
      // A row of padding has products of 0, so factors of 0 make its dS 0.
      ChunkFactors chunks[2] = {};
      for (int64_t r = 0; r < 2 && i + r < block.rows && width > 0; ++r) {
        if (D == Divergence::score_mse)
          chunks[r] = {_mm512_set1_ps(by.s), _mm512_set1_ps(by.t)};
        else
          chunks[r] = factors[(i + r) * layout.chunks + chunk];
      }
      const PairFactors f = of_rows[i], f1 = of_rows[i + 1];
      __m512 squares = _mm512_setzero_ps(), squares1 = squares;
      int64_t j = 0;
      for (; j < width; j += 32) {
        const auto slope = [j](const float* x, const float* y, const ChunkFactors& c, const PairFactors& f,
                               __m512& sq) {
          const __m512 low = pair_slope<D>(_mm512_loadu_ps(x + j), _mm512_loadu_ps(y + j), c, f, sq);
          const __m512 high = pair_slope<D>(_mm512_loadu_ps(x + j + 16), _mm512_loadu_ps(y + j + 16), c, f, sq);
          return (__m512i)_mm512_cvtne2ps_pbh(high, low);
        };
        const __m512i even = slope(s, t, chunks[0], f, squares), odd = slope(s1, t1, chunks[1], f1, squares1);
        _mm512_storeu_si512(upper + j / 2, even);
        _mm512_storeu_si512(lower + j / 2, odd);
        interleave(even, odd, pairs + j);
      }
      for (; j < stop; j += 32) {
        const __m512i zero = _mm512_setzero_si512();
        _mm512_storeu_si512(upper + j / 2, zero);
        _mm512_storeu_si512(lower + j / 2, zero);
        _mm512_storeu_si512(pairs + j, zero);
        _mm512_storeu_si512(pairs + j + 16, zero);
      }
      if (D != Divergence::kl)
        value += double(f.times) * double(_mm512_reduce_add_ps(squares)) +
                 double(f1.times) * double(_mm512_reduce_add_ps(squares1));
    }
    return value;
  }

  // dQ (+)= dS K over the keys of a chunk.
  void query_gradient(const Block& block, int64_t from, int64_t to) const {
    const int64_t width = layout.tile_width;
    for (int64_t i = 0; i < block.padded_rows; i += PAIR_ROWS) {
      const int64_t depth = (smaller(to, end_of(block, i, PAIR_ROWS)) - from) / 2;
      if (depth <= 0) continue;
      const uint32_t* left = slope_rows + i * PairLayout::SLOPE_STRIDE;
      for (int64_t d = 0; d < width; d += PAIR_COLUMNS) {
        const uint32_t* right = key_pairs + from / 2 * width + d;
        float* out = d_query + i * width + d;
        if (from == block.first)
          pair_tile<false>(depth, left, PairLayout::SLOPE_STRIDE, right, width, out, width);
        else
          pair_tile<true>(depth, left, PairLayout::SLOPE_STRIDE, right, width, out, width);
      }
    }
  }

  // dKᵀ += Qᵀ dS, a panel of keys at a time.
  void key_gradient(const Block& block, int64_t from, int64_t to) const {
    const int64_t pair_rows = PAIR_ROWS < 32 ? PAIR_ROWS : 32;
    int64_t group = 0;  // earlier rows see none of the panel's keys
    for (int64_t j = from; j < to; j += PAIR_COLUMNS) {
      while (end_of(block, group, pair_rows) <= j) group += pair_rows;
      for (int64_t d = 0; d < layout.row_width; d += PAIR_ROWS)
        pair_tile<true>((block.padded_rows - group) / 2, query_columns + d * BLOCK_ROWS / 2 + group / 2, BLOCK_ROWS / 2,
                        slope_pairs + group / 2 * PairLayout::PAIR_STRIDE + (j - from), PairLayout::PAIR_STRIDE,
                        d_key + j * layout.row_width + d * PAIR_COLUMNS, PAIR_COLUMNS);
    }
  }

  const AttentionArguments& a;
  const Sight sight;
  const PairLayout layout;
  const ScoreFactors by;
  const Interleave interleave;
  const TileRegisters registers;
  RowSums* sums;
  ChunkFactors* factors;
  float *scores_s, *scores_t, *own_d_key, *d_query, *d_key = nullptr;
  uint32_t *slope_rows, *slope_pairs, *panels_s, *panels_t, *key_pairs, *query_s, *query_t, *query_columns, *scratch;
};

#endif  // __AVX512BF16__

}  // namespace DSD_ISA
}  // namespace dsd
