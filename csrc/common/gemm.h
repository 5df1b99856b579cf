// The matrix product of all kernels, in register tiles of ROWS × COLUMNS. Operands are packed so that all tiles are
// whole.
//
// Buffers are padded with zeros to whole tiles, which costs a little work but no branches.
#pragma once

#include "vector.h"

namespace dsd {
namespace DSD_ISA {

// With AVX-512, 16 of 32 registers hold sums, otherwise 12 of 16.
constexpr int64_t TILE_ROWS = DSD_VECTOR_BYTES == 64 ? 8 : 6;
constexpr int64_t TILE_VECTORS = 2;
template <class T>
constexpr int64_t TILE_COLUMNS = TILE_VECTORS * lanes<T>;

// Rows of the blocks in which kernels walk over tokens: whole tiles.
constexpr int64_t BLOCK_ROWS = DSD_VECTOR_BYTES == 64 ? 64 : 66;

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

// c[r][:] (+)= Σ_k a[k·a_step + r·a_row] · b[k·b_step + :] for TILE_ROWS × TILE_COLUMNS elements.
// It is never inlined: inside a large function GCC keeps other values in registers and spills the sums at every step.
template <class T, bool ACCUMULATE>
__attribute__((noinline)) void tile(int64_t depth, const T* a, int64_t a_step, int64_t a_row, const T* b,
                                    int64_t b_step, T* c, int64_t c_row) {
  Vec<T> sum[TILE_ROWS][TILE_VECTORS];
#pragma GCC unroll 8
  for (int64_t r = 0; r < TILE_ROWS; ++r)
#pragma GCC unroll 2
    for (int64_t v = 0; v < TILE_VECTORS; ++v) sum[r][v] = ACCUMULATE ? load(c + r * c_row + v * lanes<T>) : Vec<T>{};
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> right[TILE_VECTORS];
#pragma GCC unroll 2
    for (int64_t v = 0; v < TILE_VECTORS; ++v) right[v] = load(b + k * b_step + v * lanes<T>);
    const T* left = a + k * a_step;
#pragma GCC unroll 8
    for (int64_t r = 0; r < TILE_ROWS; ++r) {
      const Vec<T> x = broadcast(left[r * a_row]);
#pragma GCC unroll 2
      for (int64_t v = 0; v < TILE_VECTORS; ++v) sum[r][v] += x * right[v];
    }
  }
#pragma GCC unroll 8
  for (int64_t r = 0; r < TILE_ROWS; ++r)
#pragma GCC unroll 2
    for (int64_t v = 0; v < TILE_VECTORS; ++v) store(c + r * c_row + v * lanes<T>, sum[r][v]);
}

// Rows (count × width, `stride` apart) interleaved by TILE_ROWS: out[group][k][TILE_ROWS]; missing rows are 0.
template <class T>
inline void interleave_rows(const T* rows, int64_t stride, int64_t count, int64_t width, T* out) {
  for (int64_t first = 0; first < count; first += TILE_ROWS, out += TILE_ROWS * width)
    for (int64_t r = 0; r < TILE_ROWS; ++r) {
      if (first + r < count) {
        const T* row = rows + (first + r) * stride;
        for (int64_t k = 0; k < width; ++k) out[k * TILE_ROWS + r] = row[k];
      } else {
        for (int64_t k = 0; k < width; ++k) out[k * TILE_ROWS + r] = 0;
      }
    }
}

}  // namespace DSD_ISA
}  // namespace dsd
