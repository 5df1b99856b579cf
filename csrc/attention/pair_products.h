// Products of bfloat16 pairs: tiles of sums in registers, by dot products (AVX512_BF16) or by tile registers (AMX).
//
// Both instructions multiply pairs of neighbours along the summed axis and add to float32 sums, so operands are packed
// as pairs, one 32-bit word each, and padded with zeros to whole tiles.
#pragma once

#include "../common/gemm.h"

#ifdef __AVX512BF16__
#include <immintrin.h>

namespace dsd {
namespace DSD_ISA {

// Words along a summed axis of features, as many as a row of one tile register holds.
constexpr int64_t PAIR_DEPTH = 16;
constexpr int64_t PAIR_COLUMNS = 32;

#ifdef __AMX_BF16__

constexpr int64_t PAIR_ROWS = 32;

// The tile registers of one thread: eight registers of 16 rows of 64 bytes. They are released at the end, since other
// libraries (oneDNN) configure them for themselves.
class TileRegisters {
 public:
  TileRegisters() {
    alignas(64) uint8_t config[64] = {};
    config[0] = 1;  // palette
    for (int i = 0; i < 8; ++i) config[16 + 2 * i] = 64, config[48 + i] = 16;
    asm volatile("" ::: "memory");
    _tile_loadconfig(config);
  }
  ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

// c[r][:] (+)= Σ_k a[r·a_row + k] · b[k·b_step + :] for PAIR_ROWS × PAIR_COLUMNS sums; depth in words.
template <bool ACCUMULATE>
__attribute__((noinline)) void pair_tile(int64_t depth, const uint32_t* a, int64_t a_row, const uint32_t* b,
                                         int64_t b_step, float* c, int64_t c_row) {
  // GCC does not know that tile loads read memory, so this keeps it from moving stores to the operands behind them.
  asm volatile("" ::: "memory");
  const int64_t below = 16 * c_row;
  if (ACCUMULATE) {
    _tile_loadd(0, c, c_row * 4);
    _tile_loadd(1, c + 16, c_row * 4);
    _tile_loadd(2, c + below, c_row * 4);
    _tile_loadd(3, c + below + 16, c_row * 4);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t k = 0; k < depth; k += 16, a += 16, b += 16 * b_step) {
    _tile_loadd(4, a, a_row * 4);
    _tile_loadd(6, b, b_step * 4);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + 16, b_step * 4);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + 16 * a_row, a_row * 4);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, c_row * 4);
  _tile_stored(1, c + 16, c_row * 4);
  _tile_stored(2, c + below, c_row * 4);
  _tile_stored(3, c + below + 16, c_row * 4);
}

#else

constexpr int64_t PAIR_ROWS = 8;

struct TileRegisters {
  TileRegisters() {}
};

template <bool ACCUMULATE>
__attribute__((noinline)) void pair_tile(int64_t depth, const uint32_t* a, int64_t a_row, const uint32_t* b,
                                         int64_t b_step, float* c, int64_t c_row) {
  __m512 sum[8][2];
#pragma GCC unroll 8
  for (int64_t r = 0; r < 8; ++r)
#pragma GCC unroll 2
    for (int64_t v = 0; v < 2; ++v)
      sum[r][v] = ACCUMULATE ? _mm512_loadu_ps(c + r * c_row + v * 16) : _mm512_setzero_ps();
  for (int64_t k = 0; k < depth; ++k, ++a, b += b_step) {
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
    for (int64_t v = 0; v < 2; ++v) _mm512_storeu_ps(c + r * c_row + v * 16, sum[r][v]);
}

#endif  // __AMX_BF16__

// out[c][r] = in[r][c] for 16 × 16 words.
inline void transpose_words(const uint32_t* in, int64_t in_row, uint32_t* out, int64_t out_row) {
  __m512i r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(in + i * in_row);
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  // r[4g + c] now holds columns c, c + 4, c + 8, c + 12 of rows 4g … 4g + 3, one in each quarter.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512i a = _mm512_shuffle_i32x4(r[c], r[c + 4], 0x88), b = _mm512_shuffle_i32x4(r[c], r[c + 4], 0xdd);
    const __m512i d = _mm512_shuffle_i32x4(r[c + 8], r[c + 12], 0x88);
    const __m512i e = _mm512_shuffle_i32x4(r[c + 8], r[c + 12], 0xdd);
    _mm512_storeu_si512(out + c * out_row, _mm512_shuffle_i32x4(a, d, 0x88));
    _mm512_storeu_si512(out + (c + 4) * out_row, _mm512_shuffle_i32x4(b, e, 0x88));
    _mm512_storeu_si512(out + (c + 8) * out_row, _mm512_shuffle_i32x4(a, d, 0xdd));
    _mm512_storeu_si512(out + (c + 12) * out_row, _mm512_shuffle_i32x4(b, e, 0xdd));
  }
}

// Pairs element i of one vector with element i of another, as words: first the elements 0 … 15, then 16 … 31.
class Interleave {
 public:
  Interleave() {
    alignas(64) uint16_t low[32], high[32];
    for (int i = 0; i < 32; ++i) low[i] = uint16_t(i / 2 + i % 2 * 32), high[i] = uint16_t(low[i] + 16);
    low_ = _mm512_load_si512(low), high_ = _mm512_load_si512(high);
  }
  void operator()(__m512i even, __m512i odd, uint32_t* out) const {
    _mm512_storeu_si512(out, _mm512_permutex2var_epi16(even, low_, odd));
    _mm512_storeu_si512(out + 16, _mm512_permutex2var_epi16(even, high_, odd));
  }

 private:
  __m512i low_, high_;
};

}  // namespace DSD_ISA
}  // namespace dsd

#endif  // __AVX512BF16__
