// y[M, 64] = x[M, K] @ W[64, K].T in whole numbers, by vpdpbusd (AVX512-VNNI): gemv.cpp's tiles.
//
// Each segment of a row of x (at most 256 features of one group) is written as a step, 1/127 of its
// largest magnitude, times one byte or two: round(x / step), and what is left over in 1/254 of a
// step. Two bytes (INT16) are as good as x itself: they are off by 2**-16 of the segment's largest
// magnitude, 12 times less than rounding y to bfloat16 costs, so this is the code of the exact kernel,
// as vdpbf16ps is no faster, and five times slower on processors that have AMX in its place. One
// byte (INT8) is the kernel `cpu-int8`.
//
// vpdpbusd multiplies four codes by four bytes. Of a word's codes it takes (j, j + n, j + 2n, j +
// 3n), n a quarter of its rows, which one shift and one mask put into four bytes:
//
//   word   q7 q6 q5 q4 q3 q2 q1 q0          4 bits, 8 rows, n = 2
//   j = 0  .. q6 .. q4 .. q2 .. q0          word & 0x0f0f0f0f
//   j = 1  .. q7 .. q5 .. q3 .. q1          word >> 4 & 0x0f0f0f0f
//   x      first bytes of (j, j + n, j + 2n, j + 3n), then the second bytes of the same
//
// Sums are exact in int32; a segment adds s * step * (acc1 + acc2 / 254 - z * sum(x)) to y.
//
// Registers, of 32, two bytes: acc 2 * M * columns / 16 = 8, 16, 12, 16 for M = 1, 2, 3, 4, of 64
// columns, or 32 where M > 2; codes and words 4 to 16; x is broadcast from memory.

#include "integers.h"

#include <algorithm>
#include <cmath>

using namespace gptq;

#ifdef X86

namespace {

// Round 16 numbers to whole ones and put them where a word's codes want them.
VNNI_TARGET INLINE __m512i round_and_store(__m512 numbers, __m128i order, int8_t* to) {
  const __m512i rounded = _mm512_cvtps_epi32(numbers);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm_shuffle_epi8(_mm512_cvtepi32_epi8(rounded), order));
  return rounded;
}

template <int BYTES>
VNNI_TARGET void quantize_segments(const GptqLinear& linear, const void* x, int type, int64_t m,
                                   const PermutedActivations& to) {
  const int rows = unit_rows(linear.bits);
  alignas(16) int8_t place[16];
  order_bytes(linear.bits, place);
  const __m128i order = _mm_load_si128(reinterpret_cast<const __m128i*>(place));
  int8_t* out = reinterpret_cast<int8_t*>(to.words + m * to.stride);
  const int32_t* row = linear.rows;
  const int64_t row_of_x = m * linear.in_features;
  for (int segment = 0; segment < linear.segments; segment++) {
    const int count = linear.segment_units[segment] * rows;
    alignas(64) float values[MAX_SEGMENT_ROWS];
    gather(x, type, row_of_x, row, count, LANES, values);
    __m512 max_lanes = _mm512_setzero_ps();
    __mmask16 not_finite = 0;
    for (int i = 0; i < count; i += LANES) {
      const __m512 value = _mm512_load_ps(values + i);
      not_finite |=
          _mm512_fpclass_ps_mask(value, 0x01 | 0x08 | 0x10 | 0x80);  // not a number, infinite
      max_lanes = _mm512_max_ps(max_lanes, _mm512_abs_ps(value));
    }
    float max_abs = _mm512_reduce_max_ps(max_lanes);
    // What is not finite is passed on by the step alone.
    const float step = not_finite ? NAN : max_abs / 127.0f;
    if (!not_finite && max_abs < TINY) {  // whose 127 / max_abs may be infinite
      for (int i = 0; i < count; i += LANES)
        _mm512_store_ps(values + i,
                        _mm512_mul_ps(_mm512_load_ps(values + i), _mm512_set1_ps(1 / TINY)));
      max_abs *= 1 / TINY;
    }
    const __m512 per = _mm512_set1_ps(not_finite || step == 0 ? 0.0f : 127.0f / max_abs);
    __m512i sums = _mm512_setzero_si512(), rests = _mm512_setzero_si512();
    for (int i = 0; i < count; i += LANES) {
      const __m512 value =
          not_finite ? _mm512_setzero_ps() : _mm512_mul_ps(_mm512_load_ps(values + i), per);
      int8_t low[16], high[16];
      const __m512i rounded = round_and_store(value, order, low);
      sums = _mm512_add_epi32(sums, rounded);
      if constexpr (BYTES == 2) {
        const __m512 left = _mm512_sub_ps(value, _mm512_cvtepi32_ps(rounded));
        rests = _mm512_add_epi32(
            rests, round_and_store(_mm512_mul_ps(left, _mm512_set1_ps(SECOND_BYTE)), order, high));
      }
      // Four bytes of the first kind, then the four of what is left over.
      const int there = std::min(LANES, count - i);
      for (int j = 0; j < there; j += 4, out += 4 * BYTES) {
        memcpy(out, low + j, 4);
        if constexpr (BYTES == 2) memcpy(out + 4, high + j, 4);
      }
    }
    to.steps[m * linear.segments + segment] = step;
    to.sums[m * linear.segments + segment] =
        float(_mm512_reduce_add_epi32(sums)) + float(_mm512_reduce_add_epi32(rests)) / SECOND_BYTE;
    row += count;
  }
}

// M rows of x by one tile, C vectors of columns at once: y [M][COLUMNS]. Its loops are unrolled, or
// gcc keeps the sums in memory and stores them for every word.
template <int BITS, int BYTES, int M, int C>
VNNI_TARGET void multiply_columns(const GptqLinear& linear, int64_t tile, int64_t m,
                                  const PermutedActivations& from, float* y) {
  constexpr int per_word = BITS == 3 ? 3 : 1, fours = BITS == 3 ? 8 : 8 / BITS,
                width = BITS == 3 ? 2 : BITS;
  const __m512i mask = _mm512_set1_epi8(char((1 << width) - 1));
  const __m512i third = _mm512_set1_epi32(0x04040404);
  for (int first = 0; first < COLUMNS / LANES; first += C) {
    const uint32_t* word = linear.words + tile * linear.units * per_word * COLUMNS + first * LANES;
    const uint32_t* x = from.words + m * from.stride;
    const uint32_t* next = next_tile(linear, tile, per_word, first * LANES);
    __m512 total[M][C];
#pragma GCC unroll 4
    for (int i = 0; i < M; i++)
#pragma GCC unroll 4
      for (int c = 0; c < C; c++) total[i][c] = _mm512_setzero_ps();
    for (int segment = 0; segment < linear.segments; segment++) {
      __m512i sum[M][C][BYTES];
#pragma GCC unroll 4
      for (int i = 0; i < M; i++)
#pragma GCC unroll 4
        for (int c = 0; c < C; c++)
#pragma GCC unroll 4
          for (int b = 0; b < BYTES; b++) sum[i][c][b] = _mm512_setzero_si512();
      for (int unit = 0; unit < linear.segment_units[segment]; unit++) {
#pragma GCC unroll 4
        for (int i = 0; i < per_word; i++)
#pragma GCC unroll 4
          for (int c = 0; c < C; c++) {
            _mm_prefetch(
                reinterpret_cast<const char*>(word + (16 * per_word + i) * COLUMNS + c * LANES),
                _MM_HINT_T0);
            _mm_prefetch(reinterpret_cast<const char*>(next + (i * C + c) * LANES), _MM_HINT_T1);
          }
        next += per_word * C * LANES;
        __m512i v[per_word][C];
#pragma GCC unroll 4
        for (int i = 0; i < per_word; i++)
#pragma GCC unroll 4
          for (int c = 0; c < C; c++) v[i][c] = _mm512_loadu_si512(word + i * COLUMNS + c * LANES);
#pragma GCC unroll 8
        for (int four = 0; four < fours; four++) {
          __m512i codes[C];
#pragma GCC unroll 4
          for (int c = 0; c < C; c++) {
            if constexpr (BITS == 3) {
              codes[c] = _mm512_and_si512(_mm512_srli_epi32(v[four / 4][c], 2 * (four % 4)), mask);
              codes[c] = _mm512_ternarylogic_epi32(
                  _mm512_rorv_epi32(v[2][c], _mm512_set1_epi32((four + 30) % 32)), third, codes[c],
                  0xEA);
            } else {
              codes[c] = BITS == 8
                             ? v[0][c]
                             : _mm512_and_si512(_mm512_srli_epi32(v[0][c], BITS * four), mask);
            }
          }
#pragma GCC unroll 4
          for (int i = 0; i < M; i++)
#pragma GCC unroll 4
            for (int b = 0; b < BYTES; b++) {
              const __m512i a = _mm512_set1_epi32(int(x[i * from.stride + BYTES * four + b]));
#pragma GCC unroll 4
              for (int c = 0; c < C; c++)
                sum[i][c][b] = _mm512_dpbusd_epi32(sum[i][c][b], codes[c], a);
            }
        }
        word += per_word * COLUMNS;
        x += BYTES * fours;
      }
      const int64_t at =
          (tile * linear.groups + linear.segment_group[segment]) * COLUMNS + first * LANES;
#pragma GCC unroll 4
      for (int c = 0; c < C; c++) {
        __m512 scales, zeros;
        load_tables(linear, at + c * LANES, scales, zeros);
#pragma GCC unroll 4
        for (int i = 0; i < M; i++) {
          const int64_t which = (m + i) * linear.segments + segment;
          __m512 exact = _mm512_cvtepi32_ps(sum[i][c][0]);
          if constexpr (BYTES == 2)
            exact = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[i][c][1]),
                                    _mm512_set1_ps(1 / SECOND_BYTE), exact);
          exact = _mm512_fnmadd_ps(zeros, _mm512_set1_ps(from.sums[which]), exact);
          total[i][c] = _mm512_fmadd_ps(_mm512_mul_ps(scales, _mm512_set1_ps(from.steps[which])),
                                        exact, total[i][c]);
        }
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < M; i++)
#pragma GCC unroll 4
      for (int c = 0; c < C; c++)
        _mm512_storeu_ps(y + i * COLUMNS + (first + c) * LANES, total[i][c]);
  }
}

struct Vnni {
  template <int BYTES>
  static void quantize(const GptqLinear& linear, const void* x, int type, int64_t m,
                       const PermutedActivations& to) {
    quantize_segments<BYTES>(linear, x, type, m, to);
  }
  template <int BITS, int BYTES, int M>
  static void multiply(const GptqLinear& linear, int64_t tile, int64_t m,
                       const PermutedActivations& x, float* y) {
    constexpr int C = BYTES == 2 && M > 2 ? 2 : 4;  // their sums fill the registers
    multiply_columns<BITS, BYTES, M, C>(linear, tile, m, x, y);
  }
};

}  // namespace

namespace gptq {

void quantize_activations(const GptqLinear& linear, const void* x, int type, int64_t m,
                          const PermutedActivations& to) {
  quantize_by<Vnni>(linear, x, type, m, to);
}

void multiply_tile_vnni(const GptqLinear& linear, int64_t tile, int64_t m, int count,
                        const PermutedActivations& x, float* y) {
  multiply_by<Vnni>(linear, tile, m, count, x, y);
}

}  // namespace gptq

#endif
