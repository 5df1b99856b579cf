// Attention alignment of bfloat16 tensors with the processor's bfloat16 dot products (AVX512_BF16).
//
// The instruction multiplies pairs of neighbours along the summed axis and adds both to a float32 sum: twice the
// products of a float32 one. Operands are therefore packed as pairs, one 32-bit word each. The inputs are bfloat16
// already, so the scores are exact products; dS is rounded to bfloat16 before dQ and dK, as PyTorch does in
// bfloat16. Softmax and sums stay in float32.
#pragma once

#include "heads.h"
#include "rows.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace dsd {
namespace DSD_ISA {

#ifndef __AVX512BF16__

inline bool uses_pairs(const AttentionArguments&) { return false; }

#else

inline bool uses_pairs(const AttentionArguments& a) {
  return a.student_query.type == Type::bfloat16 && a.student_key.type == Type::bfloat16 &&
         a.teacher_query.type == Type::bfloat16 && a.teacher_key.type == Type::bfloat16;
}

// As `tile` of gemm.h with pairs: c[r][:] (+)= Σ_k a[k·a_step + r·a_row] · b[k·b_step + :], times `factor`.
template <bool ACCUMULATE>
__attribute__((noinline)) void tile_pairs(int64_t depth, const uint32_t* a, int64_t a_step, int64_t a_row,
                                          const uint32_t* b, int64_t b_step, float* c, int64_t c_row, float factor) {
  __m512 sum[8][2];
#pragma GCC unroll 8
  for (int64_t r = 0; r < 8; ++r)
#pragma GCC unroll 2
    for (int64_t v = 0; v < 2; ++v)
      sum[r][v] = ACCUMULATE ? _mm512_loadu_ps(c + r * c_row + v * 16) : _mm512_setzero_ps();
  for (int64_t k = 0; k < depth; ++k, a += a_step, b += b_step) {
    const __m512bh right0 = (__m512bh)_mm512_loadu_si512(b), right1 = (__m512bh)_mm512_loadu_si512(b + 16);
#pragma GCC unroll 8
    for (int64_t r = 0; r < 8; ++r) {
      const __m512bh left = (__m512bh)_mm512_set1_epi32(int(a[r * a_row]));
      sum[r][0] = _mm512_dpbf16_ps(sum[r][0], left, right0);
      sum[r][1] = _mm512_dpbf16_ps(sum[r][1], left, right1);
    }
  }
#pragma GCC unroll 8
  for (int64_t r = 0; r < 8; ++r)
#pragma GCC unroll 2
    for (int64_t v = 0; v < 2; ++v)
      _mm512_storeu_ps(c + r * c_row + v * 16, ACCUMULATE ? sum[r][v] : sum[r][v] * factor);
}

struct PairLayout {
  int64_t columns, score_stride, depth_s, depth_t, tile_width, row_width;

  explicit PairLayout(const AttentionArguments& a) {
    columns = round_up(a.tokens, 32);
    // One more cache line: rows a multiple of 4096 bytes apart would compete for the same cache sets.
    score_stride = columns + 16;
    depth_s = (a.student_width + 1) / 2, depth_t = (a.teacher_width + 1) / 2;
    tile_width = round_up(a.student_width, 32);
    row_width = round_up(a.student_width, 8);
  }
  int64_t scratch() const { return round_up(larger(tile_width, 2 * larger(depth_s, depth_t)), 32); }
  int64_t query_words() const { return BLOCK_ROWS * larger(depth_s, depth_t); }
  // In words of 4 bytes.
  int64_t elements() const {
    return 2 * query_words() + BLOCK_ROWS / 2 * row_width + 2 * BLOCK_ROWS * score_stride +
           columns * (depth_s + depth_t) + columns / 2 * tile_width + columns * row_width + BLOCK_ROWS * tile_width +
           scratch();
  }
};

class PairTask {
 public:
  PairTask(const AttentionArguments& arguments, void* workspace) : a(arguments), sight(arguments), layout(arguments) {
    scores_s = static_cast<float*>(workspace);
    scores_t = scores_s + BLOCK_ROWS * layout.score_stride;
    own_d_key = scores_t + BLOCK_ROWS * layout.score_stride;
    d_query = own_d_key + layout.columns * layout.row_width;
    scratch = d_query + BLOCK_ROWS * layout.tile_width;
    panels_s = reinterpret_cast<uint32_t*>(scratch + layout.scratch());
    panels_t = panels_s + layout.columns * layout.depth_s;
    key_pairs = panels_t + layout.columns * layout.depth_t;
    query_s = key_pairs + layout.columns / 2 * layout.tile_width;
    query_t = query_s + layout.query_words();
    query_pairs = query_t + layout.query_words();
  }

  void begin(int64_t task, int64_t b, int64_t key_head, const int64_t* positions, int64_t count) {
    const int64_t columns = round_up(count, 32), elements = layout.columns * layout.row_width;
    d_key = a.shares > 1 ? static_cast<float*>(a.key_gradients) + task * elements : own_d_key;
    if (a.d_key) memset(d_key, 0, size_t(columns * layout.row_width) * 4);
    const int64_t base = b * a.student_key.stride[0] + key_head * a.student_key.stride[1];
    pack_panels(a.student_key, base, positions, count, columns, a.student_width, panels_s);
    if (a.d_query)
      pack_pairs(a.student_key, base, positions, count, columns, a.student_width, layout.tile_width, key_pairs);
  }

  void pack_teacher_key(int64_t b, int64_t head, const int64_t* positions, int64_t count) {
    pack_panels(a.teacher_key, b * a.teacher_key.stride[0] + head * a.teacher_key.stride[1], positions, count,
                round_up(count, 32), a.teacher_width, panels_t);
  }

  void write_key(int64_t b, int64_t key_head, const int64_t* positions, int64_t count) {
    write_key_gradient(a, d_key, layout.row_width, float(a.coefficient * a.student_scale), b, key_head, positions,
                       count, scratch);
  }

  double block(int64_t b, int64_t h, const int64_t* positions, int64_t count, int64_t start, int64_t stop) {
    const int64_t rows = stop - start, padded_rows = round_up(rows, 8);
    const int64_t *places = a.row_places + b * a.tokens + start, *own = a.row_positions + b * a.tokens + start;
    const double* weights = a.row_weights ? a.row_weights + b * a.tokens + start : nullptr;
    const int64_t first = sight.first(positions, count, places[0], places[0]) / 32 * 32;
    const int64_t last = round_up(sight.last(positions, count, places[rows - 1], places[rows - 1] + 1), 32);
    const int64_t base_s = b * a.student_query.stride[0] + h * a.student_query.stride[1];
    const int64_t base_t = b * a.teacher_query.stride[0] + h * a.teacher_query.stride[1];
    pack_rows(a.student_query, base_s, own, rows, padded_rows, a.student_width, query_s);
    pack_rows(a.teacher_query, base_t, own, rows, padded_rows, a.teacher_width, query_t);
    const double unit = score_unit(a);
    scores(query_s, panels_s, layout.depth_s, first, last, padded_rows, float(a.student_scale * unit), scores_s);
    scores(query_t, panels_t, layout.depth_t, first, last, padded_rows, float(a.teacher_scale * unit), scores_t);

    double value;
    if (a.divergence == Divergence::kl)
      value = slopes<Divergence::kl>(b, positions, count, places, weights, rows, padded_rows, first, last);
    else if (a.divergence == Divergence::mse)
      value = slopes<Divergence::mse>(b, positions, count, places, weights, rows, padded_rows, first, last);
    else
      value = slopes<Divergence::score_mse>(b, positions, count, places, weights, rows, padded_rows, first, last);

    if (a.d_query) {
      query_gradient(first, last, padded_rows);
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t row = (b * a.heads + h) * a.tokens + own[i];
        write_run<float>(a.d_query, a.d_query_type, row * a.student_width, a.student_width,
                         float(a.student_scale * a.coefficient), d_query + i * layout.tile_width);
      }
    }
    if (a.d_key) {
      pack_pairs(a.student_query, base_s, own, rows, padded_rows, a.student_width, layout.row_width, query_pairs);
      key_gradient(first, last, padded_rows);
    }
    return value;
  }

 private:
  static uint16_t at(const Source& source, int64_t offset) { return static_cast<const uint16_t*>(source.data)[offset]; }
  // Features 2d and 2d + 1 of the row at `offset`; the last one of an odd width is alone.
  static uint32_t feature_pair(const Source& source, int64_t offset, int64_t d, int64_t width) {
    const int64_t step = source.stride[3];
    const uint32_t low = at(source, offset + 2 * d * step);
    return 2 * d + 1 < width ? low | uint32_t(at(source, offset + (2 * d + 1) * step)) << 16 : low;
  }

  // Keys as columns of feature pairs: out[panel][pair][32]; tokens beyond `count` are 0.
  static void pack_panels(const Source& source, int64_t base, const int64_t* positions, int64_t count, int64_t columns,
                          int64_t width, uint32_t* out) {
    const int64_t depth = (width + 1) / 2;
    for (int64_t j = 0; j < columns; ++j) {
      uint32_t* column = out + j / 32 * 32 * depth + j % 32;
      const int64_t offset = j < count ? base + positions[j] * source.stride[2] : 0;
      for (int64_t d = 0; d < depth; ++d) column[d * 32] = j < count ? feature_pair(source, offset, d, width) : 0;
    }
  }

  // Rows of feature pairs, zeros behind `count`.
  static void pack_rows(const Source& source, int64_t base, const int64_t* positions, int64_t count, int64_t total,
                        int64_t width, uint32_t* out) {
    const int64_t depth = (width + 1) / 2;
    for (int64_t i = 0; i < total; ++i, out += depth) {
      const int64_t offset = i < count ? base + positions[i] * source.stride[2] : 0;
      for (int64_t d = 0; d < depth; ++d) out[d] = i < count ? feature_pair(source, offset, d, width) : 0;
    }
  }

  // Tokens 2i and 2i + 1 in one row of `padded` words; zeros behind `count` and `width`.
  static void pack_pairs(const Source& source, int64_t base, const int64_t* positions, int64_t count, int64_t total,
                         int64_t width, int64_t padded, uint32_t* out) {
    const int64_t step = source.stride[3];
    for (int64_t i = 0; i < total; i += 2, out += padded) {
      for (int64_t d = 0; d < padded; ++d) out[d] = 0;
      if (i < count) {
        const int64_t offset = base + positions[i] * source.stride[2];
        for (int64_t d = 0; d < width; ++d) out[d] = at(source, offset + d * step);
      }
      if (i + 1 < count) {
        const int64_t offset = base + positions[i + 1] * source.stride[2];
        for (int64_t d = 0; d < width; ++d) out[d] |= uint32_t(at(source, offset + d * step)) << 16;
      }
    }
  }

  void scores(const uint32_t* queries, const uint32_t* panels, int64_t depth, int64_t first, int64_t last, int64_t rows,
              float factor, float* out) const {
    for (int64_t j = first; j < last; j += 32)
      for (int64_t i = 0; i < rows; i += 8)
        tile_pairs<false>(depth, queries + i * depth, 1, depth, panels + j * depth, 32,
                          out + i * layout.score_stride + (j - first), layout.score_stride, factor);
  }

  // Value of the rows. Leaves dS twice, each over scores that have been read: as rows of key pairs in scores_s,
  // and as rows of query pairs in every other row of scores_t.
  template <Divergence D>
  double slopes(int64_t b, const int64_t* positions, int64_t count, const int64_t* places, const double* weights,
                int64_t rows, int64_t padded_rows, int64_t first, int64_t last) const {
    const int64_t width = last - first;
    const bool gradient = a.d_query || a.d_key;
    int64_t row_first = places[0], row_last = places[0];
    double value = 0;
    // Key j of the even row beside key j of the odd one, keys 0 to 15 and 16 to 31.
    alignas(64) uint16_t low[32], high[32];
    for (int i = 0; i < 32; ++i) low[i] = uint16_t(i / 2 + i % 2 * 32), high[i] = uint16_t(low[i] + 16);
    const __m512i even = _mm512_load_si512(low), odd = _mm512_load_si512(high);
    for (int64_t i = 0; i < padded_rows; i += 2) {
      float *s = scores_s + i * layout.score_stride, *t = scores_t + i * layout.score_stride;
      // A row of padding has scores 0; factors 0 make its dS 0.
      RowFactors<float> factors[2] = {};
      double weight[2] = {1, 1};
      for (int64_t r = 0; r < 2 && i + r < rows; ++r) {
        if (weights) weight[r] = weights[i + r];
        float *row_s = s + r * layout.score_stride, *row_t = t + r * layout.score_stride;
        row_first = sight.first(positions, count, places[i + r], row_first);
        row_last = sight.last(positions, count, places[i + r], row_last);
        sight.hide(b, positions, places[i + r], first, last, row_first, row_last, row_s, row_t);
        value += weight[r] * prepare_row<float, D>(row_s, row_t, width, &factors[r]);
      }
      if (D == Divergence::kl && !gradient) continue;
      float *s1 = s + layout.score_stride, *t1 = t + layout.score_stride;
      Vec<float> squares[2] = {};
      const float times[2] = {float(weight[0]), float(weight[1])};
      for (int64_t j = 0; j < width; j += 32) {
        const auto of = [&](const float* x, const float* y, int64_t r) {
          return (__m512)(slope<float, D>(load(x), load(y), factors[r], squares[r]) * times[r]);
        };
        const __m512 a0 = of(s + j, t + j, 0), a1 = of(s + j + 16, t + j + 16, 0);
        const __m512 b0 = of(s1 + j, t1 + j, 1), b1 = of(s1 + j + 16, t1 + j + 16, 1);
        const __m512i upper = (__m512i)_mm512_cvtne2ps_pbh(a1, a0), lower = (__m512i)_mm512_cvtne2ps_pbh(b1, b0);
        _mm512_storeu_si512(s + j / 2, upper);
        _mm512_storeu_si512(s1 + j / 2, lower);
        _mm512_storeu_si512(t + j, _mm512_permutex2var_epi16(upper, even, lower));
        _mm512_storeu_si512(t + j + 16, _mm512_permutex2var_epi16(upper, odd, lower));
      }
      for (int r = 0; r < 2; ++r) value += weight[r] * double(sum_lanes<float>(squares[r]));
    }
    return value;
  }

  // dQ = dS K, keys in blocks that stay in the cache.
  void query_gradient(int64_t first, int64_t last, int64_t rows) const {
    constexpr int64_t block = 256;
    const int64_t width = layout.tile_width;
    for (int64_t j = first; j < last; j += block) {
      const int64_t depth = smaller(block, last - j) / 2;
      for (int64_t d = 0; d < width; d += 32)
        for (int64_t i = 0; i < rows; i += 8) {
          const float* left = scores_s + i * layout.score_stride + (j - first) / 2;
          const uint32_t* right = key_pairs + j / 2 * width + d;
          float* out = d_query + i * width + d;
          const auto* words = reinterpret_cast<const uint32_t*>(left);
          if (j == first)
            tile_pairs<false>(depth, words, 1, layout.score_stride, right, width, out, width, 1);
          else
            tile_pairs<true>(depth, words, 1, layout.score_stride, right, width, out, width, 1);
        }
    }
  }

  // dKᵀ += Qᵀ dS, a panel of keys at a time.
  void key_gradient(int64_t first, int64_t last, int64_t rows) const {
    const int64_t width = layout.row_width;
    for (int64_t j = first; j < last; j += 32)
      for (int64_t d = 0; d < width; d += 8)
        tile_pairs<true>(rows / 2, query_pairs + d, width, 1, reinterpret_cast<const uint32_t*>(scores_t + (j - first)),
                         2 * layout.score_stride, d_key + j * width + d * 32, 32, 1);
  }

  const AttentionArguments& a;
  const Sight sight;
  const PairLayout layout;
  float *scores_s, *scores_t, *own_d_key, *d_query, *scratch, *d_key = nullptr;
  uint32_t *panels_s, *panels_t, *key_pairs, *query_s, *query_t, *query_pairs;
};

#endif  // __AVX512BF16__

}  // namespace DSD_ISA
}  // namespace dsd
