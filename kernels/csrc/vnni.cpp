// A few rows of x in whole numbers: products of packed codes by vpdpbusd (AVX512-VNNI).
//
// Each segment of a row of x (at most 256 features of one group) is written as a step, 1/127 of its
// greatest value, times one byte or two: round(x / step), and what is left over in 1/254 of a step. Two
// bytes are as good as x itself: they are off by 2**-16 of the segment's greatest value, 12 times less
// than rounding y to bfloat16 costs, so this is the exact kernel's code where vdpbf16ps is slow (five
// times slower than vpdpbusd on processors that have AMX for it). One byte is the kernel `cpu-int8`.
//
// vpdpbusd multiplies four codes by four bytes. Of a word's codes it takes (j, j + n, j + 2n, j + 3n), n
// a quarter of its rows, which one shift and one mask put into four bytes. Sums are exact in int32; a
// segment's is s * step * (sum1 + sum2 / 254 - z * x's own).

#include "gemv.h"

#include <algorithm>
#include <cmath>

using namespace gptq;

#ifdef X86

#define VNNI_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni" WIDE)))

namespace {

constexpr float LEFT_OVER = 254;  // what a second byte counts: half a step is 127 of it
constexpr int MOST = 256 + 32;    // rows of a segment, filled up to whole units

// Round 16 numbers to whole ones and put them where a word's codes want them.
VNNI_TARGET INLINE __m512i whole(__m512 numbers, __m128i order, int8_t* to) {
  const __m512i rounded = _mm512_cvtps_epi32(numbers);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_shuffle_epi8(_mm512_cvtepi32_epi8(rounded), order));
  return rounded;
}

template <int BYTES>
VNNI_TARGET void split_row(const GptqLayer& layer, const void* x, int type, int64_t m, const Gathered& to) {
  const int rows = unit_rows(layer.bits), together = layer.bits == 3 ? 16 : rows, quarter = together / 4;
  alignas(16) int8_t place[16];
  for (int i = 0; i < 16; i++) place[i] = int8_t(i / together * together + i % together % 4 * quarter + i % together / 4);
  const __m128i order = _mm_load_si128(reinterpret_cast<const __m128i*>(place));
  int8_t* out = reinterpret_cast<int8_t*>(to.pairs + m * to.stride);
  const int32_t* row = layer.rows;
  const int64_t first = m * layer.in_features;
  for (int segment = 0; segment < layer.segments; segment++) {
    const int count = layer.segment_units[segment] * rows;
    alignas(64) float values[MOST];
    if (type == FLOAT32) {
      const float* from = static_cast<const float*>(x) + first;
      for (int i = 0; i < count; i++) values[i] = row[i] < 0 ? 0.0f : from[row[i]];
    } else {
      const uint16_t* from = static_cast<const uint16_t*>(x) + first;
      for (int i = 0; i < count; i++) values[i] = row[i] < 0 ? 0.0f : from_bfloat16(from[row[i]]);
    }
    for (int i = count; i % LANES; i++) values[i] = 0;
    __m512 greatest = _mm512_setzero_ps();
    __mmask16 odd = 0;
    for (int i = 0; i < count; i += LANES) {
      const __m512 value = _mm512_load_ps(values + i);
      odd |= _mm512_fpclass_ps_mask(value, 0x01 | 0x08 | 0x10 | 0x80);  // not a number, infinite
      greatest = _mm512_max_ps(greatest, _mm512_abs_ps(value));
    }
    const float most = _mm512_reduce_max_ps(greatest);
    // What is not finite is passed on by the step alone.
    const float step = odd ? NAN : most / 127.0f;
    const __m512 per = _mm512_set1_ps(odd || most / 127.0f == 0 ? 0.0f : 127.0f / most);
    __m512i sums = _mm512_setzero_si512(), rests = _mm512_setzero_si512();
    for (int i = 0; i < count; i += LANES) {
      const __m512 value = odd ? _mm512_setzero_ps() : _mm512_mul_ps(_mm512_load_ps(values + i), per);
      int8_t low[16], high[16];
      const __m512i rounded = whole(value, order, low);
      sums = _mm512_add_epi32(sums, rounded);
      if constexpr (BYTES == 2) {
        const __m512 left = _mm512_sub_ps(value, _mm512_cvtepi32_ps(rounded));
        rests = _mm512_add_epi32(rests, whole(_mm512_mul_ps(left, _mm512_set1_ps(LEFT_OVER)), order, high));
      }
      // Four bytes of the first kind, then the four of what is left over.
      const int there = std::min(LANES, count - i);
      for (int j = 0; j < there; j += 4, out += 4 * BYTES) {
        memcpy(out, low + j, 4);
        if constexpr (BYTES == 2) memcpy(out + 4, high + j, 4);
      }
    }
    to.steps[m * layer.segments + segment] = step;
    to.sums[m * layer.segments + segment] =
        float(_mm512_reduce_add_epi32(sums)) + float(_mm512_reduce_add_epi32(rests)) / LEFT_OVER;
    row += count;
  }
}

// M rows of x by one tile, C vectors of columns at once: y [M][COLUMNS]. Its loops are unrolled, or gcc
// keeps the sums in memory and stores them for every word.
template <int BITS, int BYTES, int M, int C>
VNNI_TARGET void multiply(const GptqLayer& layer, int64_t tile, int64_t m, const Gathered& from, float* y) {
  constexpr int per_word = BITS == 3 ? 3 : 1, fours = BITS == 3 ? 8 : 8 / BITS, width = BITS == 3 ? 2 : BITS;
  const __m512i mask = _mm512_set1_epi8(char((1 << width) - 1));
  const __m512i even = _mm512_set1_epi32(0x00040004), odd = _mm512_set1_epi32(0x04000400);
  for (int at_once = 0; at_once < COLUMNS / LANES; at_once += C) {
    const uint32_t* word = layer.words + tile * layer.units * per_word * COLUMNS + at_once * LANES;
    const uint32_t* x = from.pairs + m * from.stride;
    __m512 total[M][C];
#pragma GCC unroll 4
    for (int i = 0; i < M; i++)
#pragma GCC unroll 4
      for (int c = 0; c < C; c++) total[i][c] = _mm512_setzero_ps();
    for (int segment = 0; segment < layer.segments; segment++) {
      __m512i sum[M][C][BYTES];
#pragma GCC unroll 4
      for (int i = 0; i < M; i++)
#pragma GCC unroll 4
        for (int c = 0; c < C; c++)
#pragma GCC unroll 4
          for (int b = 0; b < BYTES; b++) sum[i][c][b] = _mm512_setzero_si512();
      for (int unit = 0; unit < layer.segment_units[segment]; unit++) {
#pragma GCC unroll 4
        for (int i = 0; i < per_word; i++)
#pragma GCC unroll 4
          for (int c = 0; c < C; c++)
            _mm_prefetch(reinterpret_cast<const char*>(word + (16 * per_word + i) * COLUMNS + c * LANES), _MM_HINT_T0);
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
              const int half = four / 4, j = four % 4, bit = 8 * half + j;
              codes[c] = _mm512_and_si512(_mm512_srli_epi32(v[half][c], 2 * j), mask);
              codes[c] = _mm512_ternarylogic_epi32(_mm512_rorv_epi32(v[2][c], _mm512_set1_epi32((bit + 30) % 32)), even, codes[c], 0xEA);
              codes[c] = _mm512_ternarylogic_epi32(_mm512_rorv_epi32(v[2][c], _mm512_set1_epi32((bit + 26) % 32)), odd, codes[c], 0xEA);
            } else {
              codes[c] = BITS == 8 ? v[0][c] : _mm512_and_si512(_mm512_srli_epi32(v[0][c], BITS * four), mask);
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
      const int64_t at = (tile * layer.groups + layer.segment_group[segment]) * COLUMNS + at_once * LANES;
#pragma GCC unroll 4
      for (int c = 0; c < C; c++) {
        __m512 scales, zeros;
        load_tables(layer, at + c * LANES, scales, zeros);
#pragma GCC unroll 4
        for (int i = 0; i < M; i++) {
          const int64_t which = (m + i) * layer.segments + segment;
          __m512 exact = _mm512_cvtepi32_ps(sum[i][c][0]);
          if constexpr (BYTES == 2)
            exact = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum[i][c][1]), _mm512_set1_ps(1 / LEFT_OVER), exact);
          exact = _mm512_fnmadd_ps(zeros, _mm512_set1_ps(from.sums[which]), exact);
          total[i][c] = _mm512_fmadd_ps(_mm512_mul_ps(scales, _mm512_set1_ps(from.steps[which])), exact, total[i][c]);
        }
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < M; i++)
#pragma GCC unroll 4
      for (int c = 0; c < C; c++) _mm512_storeu_ps(y + i * COLUMNS + (at_once + c) * LANES, total[i][c]);
  }
}

template <int BITS, int BYTES>
void multiply_rows(const GptqLayer& layer, int64_t tile, int64_t m, int count, const Gathered& x, float* y) {
  constexpr int C = BYTES == 2 ? 2 : 4;  // of three and four rows: their sums fill the registers
  if (count == 4) return multiply<BITS, BYTES, 4, C>(layer, tile, m, x, y);
  if (count == 3) return multiply<BITS, BYTES, 3, C>(layer, tile, m, x, y);
  if (count == 2) return multiply<BITS, BYTES, 2, 4>(layer, tile, m, x, y);
  multiply<BITS, BYTES, 1, 4>(layer, tile, m, x, y);
}

template <int BYTES>
void multiply_bits(const GptqLayer& layer, int64_t tile, int64_t m, int count, const Gathered& x, float* y) {
  switch (layer.bits) {
    case 2: return multiply_rows<2, BYTES>(layer, tile, m, count, x, y);
    case 3: return multiply_rows<3, BYTES>(layer, tile, m, count, x, y);
    case 4: return multiply_rows<4, BYTES>(layer, tile, m, count, x, y);
    default: return multiply_rows<8, BYTES>(layer, tile, m, count, x, y);
  }
}

}  // namespace

namespace gptq {

void split_row(const GptqLayer& layer, const void* x, int type, int64_t m, const Gathered& to) {
  if (to.isa == TWO_BYTES) return ::split_row<2>(layer, x, type, m, to);
  ::split_row<1>(layer, x, type, m, to);
}

void multiply_bytes(const GptqLayer& layer, int64_t tile, int64_t m, int count, const Gathered& x, float* y) {
  if (x.isa == TWO_BYTES) return ::multiply_bits<2>(layer, tile, m, count, x, y);
  ::multiply_bits<1>(layer, tile, m, count, x, y);
}

}  // namespace gptq

#endif
