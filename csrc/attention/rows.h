// One row of scores of both models, and which keys it sees.
#pragma once

#include "../common/gemm.h"
#include "cpu.h"

namespace dsd {
namespace DSD_ISA {

// Scores enter the softmax in units of log 2, so that a power of two replaces the exponential.
constexpr double LOG2_E = 1.4426950408889634, LN_2 = 0.6931471805599453;

// The numbers that turn a row of exponentials into dS.
template <class T>
struct RowFactors {
  T by_s, by_t;  // 1 / sum of the student's and teacher's exponentials
  T mean;        // mse: r = Σ P_S (P_S − P_T)
};

template <class T>
struct RowMaxima {
  T s, t;
};

template <class T>
RowMaxima<T> row_maxima(const T* s, const T* t, int64_t width) {
  // There are two maxima of each model, because a chain of one would wait for its latency at every step.
  Vec<T> s0 = broadcast(absent<T>), t0 = s0, s1 = s0, t1 = s0;
  for (int64_t j = 0; j < width; j += 2 * lanes<T>) {
    s0 = maximum<T>(s0, load(s + j));
    t0 = maximum<T>(t0, load(t + j));
    s1 = maximum<T>(s1, load(s + j + lanes<T>));
    t1 = maximum<T>(t1, load(t + j + lanes<T>));
  }
  return {max_lanes<T>(maximum<T>(s0, s1)), max_lanes<T>(maximum<T>(t0, t1))};
}

// Overwrites the scores with exponentials. Returns the row's KL.
template <class T>
double exponentials_kl(T* s, T* t, int64_t width, RowFactors<T>* factors) {
  const RowMaxima<T> top = row_maxima(s, t, width);
  Vec<T> sum_s{}, sum_t{}, difference{};
  for (int64_t j = 0; j < width; j += lanes<T>) {
    const Vec<T> low_s = load(s + j) - top.s, low_t = load(t + j) - top.t;
    const Vec<T> e_s = exp2_nonpositive(low_s), e_t = exp2_nonpositive(low_t);
    sum_s += e_s;
    sum_t += e_t;
    difference += e_t * (low_t - low_s);
    store(s + j, e_s);
    store(t + j, e_t);
  }
  const T z_s = sum_lanes<T>(sum_s), z_t = sum_lanes<T>(sum_t);
  *factors = {1 / z_s, 1 / z_t, 0};
  return LN_2 * double(sum_lanes<T>(difference)) / double(z_t) - (log(double(z_t)) - log(double(z_s)));
}

// Does the same for mse, whose value is found together with dS.
template <class T>
void exponentials_mse(T* s, T* t, int64_t width, RowFactors<T>* factors) {
  const RowMaxima<T> top = row_maxima(s, t, width);
  Vec<T> sum_s{}, sum_t{}, squares{}, products{};
  for (int64_t j = 0; j < width; j += lanes<T>) {
    const Vec<T> e_s = exp2_nonpositive(load(s + j) - top.s), e_t = exp2_nonpositive(load(t + j) - top.t);
    sum_s += e_s;
    sum_t += e_t;
    squares += e_s * e_s;
    products += e_s * e_t;
    store(s + j, e_s);
    store(t + j, e_t);
  }
  const double by_s = 1 / double(sum_lanes<T>(sum_s)), by_t = 1 / double(sum_lanes<T>(sum_t));
  const double mean = by_s * (by_s * double(sum_lanes<T>(squares)) - by_t * double(sum_lanes<T>(products)));
  *factors = {T(by_s), T(by_t), T(mean)};
}

// dS of one vector, from exponentials (scores for score_mse); the value of mse and score_mse is added to `squares`.
template <class T, Divergence D>
inline Vec<T> slope(Vec<T> s, Vec<T> t, const RowFactors<T>& f, Vec<T>& squares) {
  if (D == Divergence::kl) return s * f.by_s - t * f.by_t;
  if (D == Divergence::mse) {
    const Vec<T> p = s * f.by_s, difference = p - t * f.by_t;
    squares += difference * difference;
    return (p + p) * (difference - f.mean);
  }
  const Vec<T> difference = s - t;
  squares += difference * difference;
  return difference + difference;
}

// Computes exponentials and factors of a row. Returns the part of its value that is known by then.
template <class T, Divergence D>
double prepare_row(T* s, T* t, int64_t width, RowFactors<T>* factors) {
  if (D == Divergence::kl) return exponentials_kl(s, t, width, factors);
  if (D == Divergence::mse) exponentials_mse(s, t, width, factors);
  return 0;
}

// Returns the row's value; dS overwrites `s`.
template <class T, Divergence D>
double row(T* s, T* t, int64_t width, bool gradient) {
  RowFactors<T> factors{};
  const double value = prepare_row<T, D>(s, t, width, &factors);
  if (D == Divergence::kl && !gradient) return value;
  Vec<T> squares{};
  for (int64_t j = 0; j < width; j += lanes<T>) store(s + j, slope<T, D>(load(s + j), load(t + j), factors, squares));
  return value + double(sum_lanes<T>(squares));
}

// The keys that a query sees by causal order, window and segment, among the valid tokens of one sequence.
class Sight {
 public:
  explicit Sight(const AttentionArguments& arguments) : a(arguments) {}

  // The first key that query i sees. Ranges only move forward, so the search starts at the previous query's.
  int64_t first(const int64_t* positions, int64_t count, int64_t i, int64_t from) const {
    if (a.window >= a.tokens) return 0;
    int64_t j = from;
    while (j > 0 && positions[i] - positions[j - 1] < a.window) --j;
    while (j < count && positions[i] - positions[j] >= a.window) ++j;
    return j;
  }
  // The end of the keys that query i sees.
  int64_t last(const int64_t* positions, int64_t count, int64_t i, int64_t from) const {
    if (a.causal) return i + 1;
    if (a.window >= a.tokens) return count;
    int64_t j = larger(from, i + 1);
    while (j < count && positions[j] - positions[i] < a.window) ++j;
    return j;
  }

  // Of the scores of query i over keys [begin, end), sets those of keys that it does not see to hidden_s and hidden_t.
  template <class T>
  void hide(int64_t b, const int64_t* positions, int64_t i, int64_t begin, int64_t end, int64_t row_first,
            int64_t row_last, T hidden_s, T hidden_t, T* s, T* t) const {
    const auto set = [=](int64_t j) { s[j - begin] = hidden_s, t[j - begin] = hidden_t; };
    for (int64_t j = begin; j < smaller(row_first, end); ++j) set(j);
    for (int64_t j = larger(row_last, begin); j < end; ++j) set(j);
    if (!a.segments) return;
    const int64_t* segments = a.segments + b * a.tokens;
    const int64_t own = segments[positions[i]];
    for (int64_t j = larger(row_first, begin); j < smaller(row_last, end); ++j)
      if (segments[positions[j]] != own) set(j);
  }

 private:
  const AttentionArguments& a;
};

// Scores of the softmax are kept in units of log 2, raw ones as they are.
inline double score_unit(const AttentionArguments& a) { return a.divergence == Divergence::score_mse ? 1.0 : LOG2_E; }

}  // namespace DSD_ISA
}  // namespace dsd
