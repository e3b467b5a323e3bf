// acc[16, 16] += x[16, 32] * W[32, 16] in blocks of bfloat16, by the processor's matrix unit (AMX)
// or by vdpbf16ps.
//
// A block is a kilobyte, what one tile register of the matrix unit holds, and what one tdpbf16ps
// takes:
//
//   x      [16 rows][16 pairs]      of neighbouring features, or of those that a word pairs
//   W      [16 pairs][16 columns]   the same pairs
//   acc    [16 rows][16 columns]    float32
//
// A panel is two vectors of columns, 32, and `depth` blocks deep. Products take two rows of blocks
// of x and a panel at once, in AMX's eight tile registers:
//
//             W: tmm6   tmm7
//   x: tmm4   tmm0      tmm1      each block of x and of W is loaded once for two products
//      tmm5   tmm2      tmm3
//
// vdpbf16ps holds 8 rows by 32 columns: acc 16, W 2, of 32 registers; x is broadcast from memory.

#pragma once

#include "simd.h"

namespace gptq {

constexpr int PAIRS = 16;                 // of a block
constexpr int AMX_BLOCK = PAIRS * LANES;  // uint32 or float of a block: a kilobyte

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

// sums [rows of blocks, 1 or 2][2] blocks += x [the same][depth] blocks * panel [depth][2] blocks.
struct PanelProduct {
  const uint32_t* x;  // the first row of blocks; the second one `x_stride` on
  int64_t x_stride;
  const uint32_t* panel;  // the first vector of columns; the second one `panel_stride` on
  int64_t panel_stride;
  float* sums;  // [row][vector] blocks, rows `sums_stride` apart
  int64_t sums_stride;
  int64_t depth;
  bool first;            // sums begin at nothing
  const char* prefetch;  // to be fetched, so many lines beside each block of depth
  int lines;
};

template <int R>
BF16_TARGET inline void dpbf16_blocks(const PanelProduct& p, int rows_of_last) {
  constexpr int ROWS_AT_ONCE = 8;
  for (int r = 0; r < R; r++) {
    const int rows = r == R - 1 ? rows_of_last : LANES;
    for (int row = 0; row < rows; row += ROWS_AT_ONCE) {
      float* to = p.sums + r * p.sums_stride + row * LANES;
      __m512 sum[ROWS_AT_ONCE][2];
      for (int i = 0; i < ROWS_AT_ONCE; i++)
        for (int c = 0; c < 2; c++)
          sum[i][c] =
              p.first ? _mm512_setzero_ps() : _mm512_load_ps(to + i * LANES + c * AMX_BLOCK);
      const uint32_t *x = p.x + r * p.x_stride + row * PAIRS, *w = p.panel;
      for (int64_t block = 0; block < p.depth; block++) {
        for (int pair = 0; pair < PAIRS; pair++) {
          const __m512bh w0 = (__m512bh)_mm512_load_si512(w + pair * LANES);
          const __m512bh w1 = (__m512bh)_mm512_load_si512(w + p.panel_stride + pair * LANES);
#pragma GCC unroll 8
          for (int i = 0; i < ROWS_AT_ONCE; i++) {
            const __m512bh a = (__m512bh)_mm512_set1_epi32(int(x[i * PAIRS + pair]));
            sum[i][0] = _mm512_dpbf16_ps(sum[i][0], w0, a);
            sum[i][1] = _mm512_dpbf16_ps(sum[i][1], w1, a);
          }
        }
        x += AMX_BLOCK;
        w += AMX_BLOCK;
      }
      for (int i = 0; i < ROWS_AT_ONCE; i++)
        for (int c = 0; c < 2; c++) _mm512_store_ps(to + i * LANES + c * AMX_BLOCK, sum[i][c]);
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
AMX_TARGET inline void configure_tiles(int first_rows, int second_rows) {
  TileConfig config;
  for (int tile = 0; tile < 8; tile++) {
    config.row_bytes[tile] = 64;
    config.rows[tile] = LANES;
  }
  config.rows[0] = config.rows[1] = config.rows[4] = uint8_t(first_rows);
  config.rows[2] = config.rows[3] = config.rows[5] = uint8_t(second_rows);
  __asm__ volatile(""
                   :
                   : "r"(&config)
                   : "memory");  // gcc 12's _tile_loadconfig says it reads 8 bytes of it
  _tile_loadconfig(&config);
}

AMX_TARGET inline void release_tiles() { _tile_release(); }

AMX_TARGET inline void amx_1x2(const PanelProduct& p) {
  if (p.first) {
    _tile_zero(0);
    _tile_zero(1);
  } else {
    _tile_loadd(0, p.sums, 64);
    _tile_loadd(1, p.sums + AMX_BLOCK, 64);
  }
  const uint32_t *x = p.x, *w = p.panel;
  for (int64_t block = 0; block < p.depth; block++, x += AMX_BLOCK, w += AMX_BLOCK) {
    _tile_stream_loadd(4, x, 64);
    _tile_loadd(6, w, 64);
    _tile_loadd(7, w + p.panel_stride, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
  }
  _tile_stored(0, p.sums, 64);
  _tile_stored(1, p.sums + AMX_BLOCK, 64);
}

AMX_TARGET inline void amx_2x2(const PanelProduct& p) {
  float* below = p.sums + p.sums_stride;
  if (p.first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, p.sums, 64);
    _tile_loadd(1, p.sums + AMX_BLOCK, 64);
    _tile_loadd(2, below, 64);
    _tile_loadd(3, below + AMX_BLOCK, 64);
  }
  const char* prefetch = p.prefetch;
  const uint32_t *x = p.x, *w = p.panel;
  for (int64_t block = 0; block < p.depth; block++, x += AMX_BLOCK, w += AMX_BLOCK) {
    for (int line = 0; line < p.lines; line++, prefetch += 64) _mm_prefetch(prefetch, _MM_HINT_T1);
    _tile_loadd(6, w, 64);
    _tile_stream_loadd(4, x, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, w + p.panel_stride, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_stream_loadd(5, x + p.x_stride, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, p.sums, 64);
  _tile_stored(1, p.sums + AMX_BLOCK, 64);
  _tile_stored(2, below, 64);
  _tile_stored(3, below + AMX_BLOCK, 64);
}
#endif

inline void multiply_blocks(const PanelProduct& p, int blocks, int rows_of_last, bool amx) {
#ifdef MATRIX_UNIT
  if (amx) return blocks == 2 ? amx_2x2(p) : amx_1x2(p);
#endif
  (void)amx;
  return blocks == 2 ? dpbf16_blocks<2>(p, rows_of_last) : dpbf16_blocks<1>(p, rows_of_last);
}
#endif

}  // namespace gptq
