// Products of blocks of bfloat16, by the processor's matrix unit (AMX) or by vdpbf16ps.
//
// A block is 16 rows of 16 pairs of bfloat16, a kilobyte, and what one instruction of the matrix unit takes:
// x [16 rows][16 pairs], a weight [16 pairs][16 columns], sums [16 rows][16 columns] of float32.

#pragma once

#include "gemv.h"

#if defined(X86) && defined(__linux__)
#define MATRIX_UNIT 1
#define AMX_TARGET __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16" WIDE)))
#endif

namespace gptq {

constexpr int PAIRS = 16;             // of a block
constexpr int BLOCK = PAIRS * LANES;  // uint32 or float of a block: a kilobyte

#ifdef X86
// Transpose 16 vectors of 16 lanes.
BF16_TARGET INLINE void transpose(__m512i (&v)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4)
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      v[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
      v[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
    }
#pragma GCC unroll 2
  for (int i = 0; i < 16; i += 8)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      t[i + j] = _mm512_shuffle_i32x4(v[i + j], v[i + j + 4], 0x88);
      t[i + j + 4] = _mm512_shuffle_i32x4(v[i + j], v[i + j + 4], 0xdd);
    }
#pragma GCC unroll 8
  for (int j = 0; j < 8; j++) {
    v[j] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88);
    v[j + 8] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0xdd);
  }
}

// What multiplies one run of depth: sums [2][2] blocks += x [2][..] blocks by a panel of two vectors.
struct Run {
  const uint32_t* x;   // the first of two rows of blocks; the second `x_apart` on
  int64_t x_apart;
  const uint32_t* panel;  // two vectors of columns, `panel_apart` apart
  int64_t panel_apart;
  float* sums;  // [row][vector] blocks, rows `sums_apart` apart
  int64_t sums_apart;
  int64_t depth;
  bool first;  // sums begin at nothing
  const char* ahead;  // to be fetched, so many lines beside each block of depth
  int lines;
};

template <int R>
BF16_TARGET inline void multiply_pairs(const Run& run, int rows_of_last) {
  constexpr int EIGHT = 8;
  for (int r = 0; r < R; r++) {
    const int rows = r == R - 1 ? rows_of_last : LANES;
    for (int row = 0; row < rows; row += EIGHT) {
      float* to = run.sums + r * run.sums_apart + row * LANES;
      __m512 sum[EIGHT][2];
      for (int i = 0; i < EIGHT; i++)
        for (int c = 0; c < 2; c++) sum[i][c] = run.first ? _mm512_setzero_ps() : _mm512_load_ps(to + i * LANES + c * BLOCK);
      const uint32_t *x = run.x + r * run.x_apart + row * PAIRS, *w = run.panel;
      for (int64_t block = 0; block < run.depth; block++) {
        for (int pair = 0; pair < PAIRS; pair++) {
          const __m512bh w0 = (__m512bh)_mm512_load_si512(w + pair * LANES);
          const __m512bh w1 = (__m512bh)_mm512_load_si512(w + run.panel_apart + pair * LANES);
#pragma GCC unroll 8
          for (int i = 0; i < EIGHT; i++) {
            const __m512bh a = (__m512bh)_mm512_set1_epi32(int(x[i * PAIRS + pair]));
            sum[i][0] = _mm512_dpbf16_ps(sum[i][0], w0, a);
            sum[i][1] = _mm512_dpbf16_ps(sum[i][1], w1, a);
          }
        }
        x += BLOCK;
        w += BLOCK;
      }
      for (int i = 0; i < EIGHT; i++)
        for (int c = 0; c < 2; c++) _mm512_store_ps(to + i * LANES + c * BLOCK, sum[i][c]);
    }
  }
}

#ifdef MATRIX_UNIT
struct __attribute__((packed)) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0 to 3 are sums, 4 and 5 x, 6 and 7 weights; the second row of blocks may be short.
AMX_TARGET inline void begin_tiles(int first_rows, int second_rows) {
  TileConfig config;
  for (int tile = 0; tile < 8; tile++) {
    config.row_bytes[tile] = 64;
    config.rows[tile] = LANES;
  }
  config.rows[0] = config.rows[1] = config.rows[4] = uint8_t(first_rows);
  config.rows[2] = config.rows[3] = config.rows[5] = uint8_t(second_rows);
  __asm__ volatile("" : : "r"(&config) : "memory");  // gcc 12's _tile_loadconfig says it reads 8 bytes of it
  _tile_loadconfig(&config);
}

AMX_TARGET inline void end_tiles() { _tile_release(); }

AMX_TARGET inline void multiply_tiles_1(const Run& run) {
  if (run.first) {
    _tile_zero(0);
    _tile_zero(1);
  } else {
    _tile_loadd(0, run.sums, 64);
    _tile_loadd(1, run.sums + BLOCK, 64);
  }
  const uint32_t *x = run.x, *w = run.panel;
  for (int64_t block = 0; block < run.depth; block++, x += BLOCK, w += BLOCK) {
    _tile_stream_loadd(4, x, 64);
    _tile_loadd(6, w, 64);
    _tile_loadd(7, w + run.panel_apart, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
  }
  _tile_stored(0, run.sums, 64);
  _tile_stored(1, run.sums + BLOCK, 64);
}

AMX_TARGET inline void multiply_tiles_2(const Run& run) {
  float* below = run.sums + run.sums_apart;
  if (run.first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, run.sums, 64);
    _tile_loadd(1, run.sums + BLOCK, 64);
    _tile_loadd(2, below, 64);
    _tile_loadd(3, below + BLOCK, 64);
  }
  const char* ahead = run.ahead;
  const uint32_t *x = run.x, *w = run.panel;
  for (int64_t block = 0; block < run.depth; block++, x += BLOCK, w += BLOCK) {
    for (int line = 0; line < run.lines; line++, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T1);
    _tile_loadd(6, w, 64);
    _tile_stream_loadd(4, x, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, w + run.panel_apart, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_stream_loadd(5, x + run.x_apart, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, run.sums, 64);
  _tile_stored(1, run.sums + BLOCK, 64);
  _tile_stored(2, below, 64);
  _tile_stored(3, below + BLOCK, 64);
}
#endif

inline void multiply_run(const Run& run, int blocks, int rows_of_last, bool amx) {
#ifdef MATRIX_UNIT
  if (amx) return blocks == 2 ? multiply_tiles_2(run) : multiply_tiles_1(run);
#endif
  (void)amx;
  return blocks == 2 ? multiply_pairs<2>(run, rows_of_last) : multiply_pairs<1>(run, rows_of_last);
}
#endif

}  // namespace gptq
