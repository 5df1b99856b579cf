// Rows of scores on the way to dS, for bfloat16: exponentials are taken a chunk of keys at a time, while the chunk's
// scores are in the first caches.
//
// Each of a vector's 16 lanes has its own softmax over every sixteenth key: it keeps its maximum so far, and sums
// relative to it. So no chunk needs a reduction across lanes, and sums are rescaled once a chunk (the online softmax of
// Milakov and Gimelshein 2018). `finish_row` joins the lanes. It also turns the maximum that each chunk used into the
// factor by which the chunk's exponentials become probabilities.
#pragma once

#include "pair_products.h"
#include "rows.h"

#ifdef __AVX512BF16__

namespace dsd {
namespace DSD_ISA {

// Chunks of 64 and 128 keys were slower, because there are more of them.
constexpr int64_t KEY_CHUNK = 256;

// 2^x for x ≤ 0, and 0 below -125: the polynomial of vector.h, which an instruction scales by a power of two. Lanes
// that become 0 are masked, since subnormal results take a hundred times as long.
inline __m512 exp2_scaled(__m512 x) {
  const __m512 magic = _mm512_set1_ps(12582912.0f);
  const __m512 whole = (x + magic) - magic, r = x - whole;
  __m512 p = _mm512_set1_ps(1.3264726299e-3f);
  p = p * r + 9.6715130100e-3f;
  p = p * r + 5.5507337491e-2f;
  p = p * r + 2.4022242079e-1f;
  p = p * r + 6.9314697759e-1f;
  p = p * r + 1.0f;
  return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(-125.0f), _CMP_GE_OQ), p, whole);
}

// Factors from raw products to scores in units of log 2 (raw scores for score_mse), and the products of hidden keys.
struct ScoreFactors {
  float s, t, hidden_s, hidden_t;

  // Queries are packed with the sign of their scale, so that the largest product is the largest score.
  explicit ScoreFactors(const AttentionArguments& a) {
    const bool raw = a.divergence == Divergence::score_mse;
    const double unit = score_unit(a);
    s = float(fabs(a.student_scale) * unit), t = float(fabs(a.teacher_scale) * unit);
    hidden_s = hidden_t = 0;
    if (raw) return;
    // With a scale of 0 hidden keys would count.
    s = s > 1e-30f ? s : 1e-30f, t = t > 1e-30f ? t : 1e-30f;
    hidden_s = -1e30f / (s > 1e-7f ? s : 1e-7f), hidden_t = -1e30f / (t > 1e-7f ? t : 1e-7f);
  }
};

// The sums of one row, lane by lane. mse: squares = Σ e_S², products = Σ e_S e_T; kl: products = Σ e_T (log2 e_T −
// log2 e_S).
struct RowSums {
  __m512 top_s, top_t, sum_s, sum_t, squares, products;
};

// The maxima of one chunk for both models; later the factors by which its exponentials become probabilities.
struct ChunkFactors {
  __m512 s, t;
};

// The numbers that turn a row's probabilities into dS: r = Σ P_S (P_S − P_T) of mse, and the row's weight.
struct PairFactors {
  float mean, times;
};

// Exponentials overwrite `width` products; width is a multiple of 16.
template <Divergence D>
inline void add_chunk(float* s, float* t, int64_t width, bool first, const ScoreFactors& by, RowSums& row,
                      ChunkFactors& chunk) {
  __m512 top_s = first ? _mm512_set1_ps(by.hidden_s) : row.top_s;
  __m512 top_t = first ? _mm512_set1_ps(by.hidden_t) : row.top_t;
  for (int64_t j = 0; j < width; j += 16) {
    top_s = _mm512_max_ps(top_s, _mm512_loadu_ps(s + j));
    top_t = _mm512_max_ps(top_t, _mm512_loadu_ps(t + j));
  }
  __m512 sum_s = _mm512_setzero_ps(), sum_t = sum_s, squares = sum_s, products = sum_s;
  if (!first) {
    const __m512 down_s = (row.top_s - top_s) * by.s, down_t = (row.top_t - top_t) * by.t;
    const __m512 less_s = exp2_scaled(down_s), less_t = exp2_scaled(down_t);
    sum_s = row.sum_s * less_s;
    sum_t = row.sum_t * less_t;
    if (D == Divergence::mse) {
      squares = row.squares * less_s * less_s;
      products = row.products * less_s * less_t;
    } else {
      products = (row.products + row.sum_t * (down_t - down_s)) * less_t;
    }
  }
  for (int64_t j = 0; j < width; j += 16) {
    const __m512 low_s = (_mm512_loadu_ps(s + j) - top_s) * by.s, low_t = (_mm512_loadu_ps(t + j) - top_t) * by.t;
    const __m512 e_s = exp2_scaled(low_s), e_t = exp2_scaled(low_t);
    sum_s += e_s;
    sum_t += e_t;
    if (D == Divergence::mse) {
      squares += e_s * e_s;
      products += e_s * e_t;
    } else {
      products += e_t * (low_t - low_s);
    }
    _mm512_storeu_ps(s + j, e_s);
    _mm512_storeu_ps(t + j, e_t);
  }
  row = {top_s, top_t, sum_s, sum_t, squares, products};
  chunk = {top_s, top_t};
}

// Returns the part of the row's value that is known now.
template <Divergence D>
inline double finish_row(const RowSums& row, const ScoreFactors& by, int64_t chunks, ChunkFactors* chunk,
                         PairFactors* factors) {
  const __m512 top_s = _mm512_set1_ps(_mm512_reduce_max_ps(row.top_s));
  const __m512 top_t = _mm512_set1_ps(_mm512_reduce_max_ps(row.top_t));
  const __m512 down_s = (row.top_s - top_s) * by.s, down_t = (row.top_t - top_t) * by.t;
  const __m512 less_s = exp2_scaled(down_s), less_t = exp2_scaled(down_t);
  const double z_s = _mm512_reduce_add_ps(row.sum_s * less_s), z_t = _mm512_reduce_add_ps(row.sum_t * less_t);
  double value = 0;
  factors->mean = 0;
  if (D == Divergence::mse) {
    const double squares = _mm512_reduce_add_ps(row.squares * less_s * less_s);
    const double products = _mm512_reduce_add_ps(row.products * less_s * less_t);
    factors->mean = float((squares / z_s - products / z_t) / z_s);
  } else {
    const double difference = _mm512_reduce_add_ps((row.products + row.sum_t * (down_t - down_s)) * less_t);
    value = LN_2 * difference / z_t - (log(z_t) - log(z_s));
  }
  const __m512 by_s = _mm512_set1_ps(float(1 / z_s)), by_t = _mm512_set1_ps(float(1 / z_t));
  for (int64_t c = 0; c < chunks; ++c) {
    chunk[c].s = exp2_scaled((chunk[c].s - top_s) * by.s) * by_s;
    chunk[c].t = exp2_scaled((chunk[c].t - top_t) * by.t) * by_t;
  }
  return value;
}

// dS of one vector; the value of mse and score_mse is added to `squares`.
template <Divergence D>
inline __m512 pair_slope(__m512 s, __m512 t, const ChunkFactors& by, const PairFactors& f, __m512& squares) {
  const __m512 p = s * by.s, difference = p - t * by.t;
  if (D == Divergence::kl) return difference * f.times;
  squares += difference * difference;
  if (D == Divergence::mse) return (p * (2 * f.times)) * (difference - f.mean);
  return difference * (2 * f.times);
}

}  // namespace DSD_ISA
}  // namespace dsd

#endif  // __AVX512BF16__
