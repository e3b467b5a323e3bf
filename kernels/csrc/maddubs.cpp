// y[M, 64] = x[M, K] @ W[64, K].T in whole numbers, by vpmaddubsw (AVX2): what vnni.cpp does, for
// processors without vpdpbusd. x lies as there: of four rows, four first and four second bytes.
//
// vpmaddubsw multiplies 32 codes by signed bytes and adds pairs of products in 16 bits, which hold
// a few; vpmaddwd adds these to sums in 32 bits before they could overflow. A pair of codes of 8
// bits does not fit: by one byte of x they are taken as two nibbles, and by two bytes as 16 codes of
// 16 bits, which vpmaddwd multiplies by whole numbers of 16 bits (int16.h).
//
//   bits                        2     3     4     8
//   codes that one step takes   32    32    32    32, as two nibbles
//   largest pair                762   1778  3810  3810
//   steps of a unit             4     8     2     1
//   units added in 16 bits      8     2     4     8      32, 16, 8 and 8 steps: at most 30480
//
// Registers, of 16, one row by two bytes: sums in 16 bits 2 * C = 4, in 32 bits 4; codes and words
// 2 * C. More rows take a vector of columns at a time.

#include "int16.h"

using namespace gptq;

#ifdef X86

namespace {

constexpr int L = Middle::LANES;

// 16 whole numbers of one byte each, in the order in which a word's codes want them.
AVX2_TARGET INLINE __m128i to_bytes(__m256i first, __m256i second, __m128i order) {
  const __m256i pairs = _mm256_packs_epi32(first, second);
  const __m256i bytes = _mm256_packs_epi16(pairs, pairs);
  const __m128i in_order =
      _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
  return _mm_shuffle_epi8(in_order, order);
}

template <int BYTES>
AVX2_TARGET void quantize_segments(const GptqLinear& linear, const void* x, int type, int64_t m,
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
    alignas(32) float values[MAX_SEGMENT_ROWS];
    gather(x, type, row_of_x, row, count, 2 * L, values);
    const auto [step, steps_of_one] = choose_step(values, count, 127.0f);
    const bool some = steps_of_one > 0;
    const __m256 per = _mm256_set1_ps(steps_of_one), second = _mm256_set1_ps(SECOND_BYTE);
    __m256i sums = _mm256_setzero_si256(), rests = _mm256_setzero_si256();
    for (int i = 0; i < count; i += 2 * L) {
      __m256i rounded[2], rest[2];
      for (int half = 0; half < 2; half++) {
        const __m256 value =
            some ? _mm256_mul_ps(_mm256_load_ps(values + i + half * L), per) : _mm256_setzero_ps();
        rounded[half] = _mm256_cvtps_epi32(value);
        sums = _mm256_add_epi32(sums, rounded[half]);
        const __m256 left = _mm256_sub_ps(value, _mm256_cvtepi32_ps(rounded[half]));
        rest[half] = _mm256_cvtps_epi32(_mm256_mul_ps(left, second));
        if constexpr (BYTES == 2) rests = _mm256_add_epi32(rests, rest[half]);
      }
      // Four bytes of the first kind, then the four of what is left over.
      alignas(16) int8_t bytes[32];
      const __m128i low = to_bytes(rounded[0], rounded[1], order);
      if constexpr (BYTES == 2) {
        const __m128i high = to_bytes(rest[0], rest[1], order);
        _mm_store_si128(reinterpret_cast<__m128i*>(bytes), _mm_unpacklo_epi32(low, high));
        _mm_store_si128(reinterpret_cast<__m128i*>(bytes + 16), _mm_unpackhi_epi32(low, high));
      } else {
        _mm_store_si128(reinterpret_cast<__m128i*>(bytes), low);
      }
      const int there = std::min(2 * L, count - i) * BYTES;
      memcpy(out, bytes, there);
      out += there;
    }
    to.steps[m * linear.segments + segment] = step;
    to.sums[m * linear.segments + segment] =
        float(add_lanes(sums)) + float(add_lanes(rests)) / SECOND_BYTE;
    row += count;
  }
}

// For codes of 8 bits: whole numbers of 16 bits, in pairs of rows (0, 2) and (1, 3).
AVX2_TARGET void quantize_pairs(const GptqLinear& linear, const void* x, int type, int64_t m,
                                const PermutedActivations& to) {
  uint32_t* out = to.words + m * to.stride;
  const int32_t* row = linear.rows;
  alignas(32) float values[MAX_SEGMENT_ROWS];
  alignas(32) int16_t whole[MAX_SEGMENT_ROWS];
  for (int segment = 0; segment < linear.segments; segment++) {
    const int count = linear.segment_units[segment] * unit_rows(8);
    gather(x, type, m * linear.in_features, row, count, 2 * L, values);
    const WholeSegment found = round_to_int16(values, count, whole);
    to.steps[m * linear.segments + segment] = found.step;
    to.sums[m * linear.segments + segment] = float(found.sum);
    for (int i = 0; i < count; i += 4) {
      *out++ = pair_of(whole[i], whole[i + 2]);
      *out++ = pair_of(whole[i + 1], whole[i + 3]);
    }
    row += count;
  }
}

// M rows of x by one tile with codes of 8 bits, C vectors of columns at once: y [M][COLUMNS].
template <int M, int C>
AVX2_TARGET void multiply_pairs(const GptqLinear& linear, int64_t tile, int64_t m,
                                const PermutedActivations& from, float* y) {
  const __m256i even = _mm256_set1_epi32(0x00ff00ff);
  for (int first = 0; first < COLUMNS / L; first += C) {
    const uint32_t* word = linear.words + tile * linear.units * COLUMNS + first * L;
    const uint32_t* x = from.words + m * from.stride;
    const uint32_t* next = next_tile(linear, tile, 1, first * L);
    __m256 total[M][C];
    for (int i = 0; i < M; i++)
      for (int c = 0; c < C; c++) total[i][c] = _mm256_setzero_ps();
    for (int segment = 0; segment < linear.segments; segment++) {
      __m256i sum[M][C];
      for (int i = 0; i < M; i++)
        for (int c = 0; c < C; c++) sum[i][c] = _mm256_setzero_si256();
      for (int unit = 0; unit < linear.segment_units[segment]; unit++) {
        _mm_prefetch(reinterpret_cast<const char*>(word + 16 * COLUMNS), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(next), _MM_HINT_T1);
        __m256i low[C], high[C];
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) {
          const __m256i codes = load_words(word + c * L);
          low[c] = _mm256_and_si256(codes, even);
          high[c] = _mm256_and_si256(_mm256_srli_epi32(codes, 8), even);
        }
#pragma GCC unroll 4
        for (int i = 0; i < M; i++) {
          const __m256i a = _mm256_set1_epi32(int(x[i * from.stride])),
                        b = _mm256_set1_epi32(int(x[i * from.stride + 1]));
#pragma GCC unroll 4
          for (int c = 0; c < C; c++)
            sum[i][c] = _mm256_add_epi32(
                sum[i][c],
                _mm256_add_epi32(_mm256_madd_epi16(low[c], a), _mm256_madd_epi16(high[c], b)));
        }
        word += COLUMNS;
        next += C * L;
        x += 2;
      }
      const int64_t at =
          (tile * linear.groups + linear.segment_group[segment]) * COLUMNS + first * L;
      for (int c = 0; c < C; c++) {
        __m256 scales, zeros;
        load_tables(linear, at + c * L, scales, zeros);
        for (int i = 0; i < M; i++) {
          const int64_t which = (m + i) * linear.segments + segment;
          total[i][c] =
              add_segment(from, which, _mm256_cvtepi32_ps(sum[i][c]), scales, zeros, total[i][c]);
        }
      }
    }
    for (int i = 0; i < M; i++)
      for (int c = 0; c < C; c++) _mm256_storeu_ps(y + i * COLUMNS + (first + c) * L, total[i][c]);
  }
}

// M rows of x by one tile, C vectors of columns at once: y [M][COLUMNS].
template <int BITS, int BYTES, int M, int C>
AVX2_TARGET void multiply_columns(const GptqLinear& linear, int64_t tile, int64_t m,
                                  const PermutedActivations& from, float* y) {
  constexpr int per_word = BITS == 3 ? 3 : 1, fours = BITS == 3 ? 8 : 8 / BITS,
                width = BITS == 3   ? 2
                        : BITS == 8 ? 4
                                    : BITS,
                NIBBLES = BITS == 8 ? 2 : 1,
                UNITS = BITS == 3   ? 2
                        : BITS == 4 ? 4
                                    : 8;
  const __m256i mask = _mm256_set1_epi8(char((1 << width) - 1));
  for (int first = 0; first < COLUMNS / L; first += C) {
    const uint32_t* word = linear.words + tile * linear.units * per_word * COLUMNS + first * L;
    const uint32_t* x = from.words + m * from.stride;
    const uint32_t* next = next_tile(linear, tile, per_word, first * L);
    __m256 total[M][C];
    for (int i = 0; i < M; i++)
      for (int c = 0; c < C; c++) total[i][c] = _mm256_setzero_ps();
    for (int segment = 0; segment < linear.segments; segment++) {
      __m256i sum[M][C][BYTES];
      for (int i = 0; i < M; i++)
        for (int c = 0; c < C; c++)
          for (int b = 0; b < BYTES; b++) sum[i][c][b] = _mm256_setzero_si256();
      for (int begin = 0; begin < linear.segment_units[segment]; begin += UNITS) {
        const int units = std::min(UNITS, linear.segment_units[segment] - begin);
        __m256i part[M][C][BYTES][NIBBLES];  // of 16 bits
        for (int i = 0; i < M; i++)
          for (int c = 0; c < C; c++)
            for (int b = 0; b < BYTES; b++)
              for (int n = 0; n < NIBBLES; n++) part[i][c][b][n] = _mm256_setzero_si256();
        for (int unit = 0; unit < units; unit++) {
#pragma GCC unroll 4
          for (int i = 0; i < per_word; i++)
            _mm_prefetch(reinterpret_cast<const char*>(word + (16 * per_word + i) * COLUMNS),
                         _MM_HINT_T0);
          if constexpr (BITS >= 4)  // fewer take longer than memory
            _mm_prefetch(reinterpret_cast<const char*>(next), _MM_HINT_T1);
#pragma GCC unroll 8
          for (int at = 0; at < fours; at++) {
            __m256i codes[C][NIBBLES];
#pragma GCC unroll 4
            for (int c = 0; c < C; c++) {
              const uint32_t* of = word + c * L;
              if constexpr (BITS == 3) {
                const __m256i high = load_words(of + 2 * COLUMNS),
                              third = at >= 2 ? _mm256_srli_epi32(high, at - 2)
                                              : _mm256_slli_epi32(high, 2 - at),
                              low =
                                  _mm256_srli_epi32(load_words(of + at / 4 * COLUMNS), at % 4 * 2);
                codes[c][0] =
                    _mm256_or_si256(_mm256_and_si256(low, mask),
                                    _mm256_and_si256(third, _mm256_set1_epi32(0x04040404)));
              } else if constexpr (BITS == 8) {
                codes[c][0] = _mm256_and_si256(load_words(of + 0 * COLUMNS), mask);
                codes[c][1] =
                    _mm256_and_si256(_mm256_srli_epi32(load_words(of + 0 * COLUMNS), 4), mask);
              } else {
                codes[c][0] = _mm256_and_si256(
                    _mm256_srli_epi32(load_words(of + 0 * COLUMNS), BITS * at), mask);
              }
            }
#pragma GCC unroll 4
            for (int i = 0; i < M; i++)
#pragma GCC unroll 4
              for (int b = 0; b < BYTES; b++) {
                const __m256i a = _mm256_set1_epi32(int(x[i * from.stride + BYTES * at + b]));
#pragma GCC unroll 4
                for (int c = 0; c < C; c++)
#pragma GCC unroll 2
                  for (int n = 0; n < NIBBLES; n++)
                    part[i][c][b][n] =
                        _mm256_add_epi16(part[i][c][b][n], _mm256_maddubs_epi16(codes[c][n], a));
              }
          }
          word += per_word * COLUMNS;
          next += per_word * C * L;
          x += BYTES * fours;
        }
#pragma GCC unroll 4
        for (int i = 0; i < M; i++)
#pragma GCC unroll 4
          for (int c = 0; c < C; c++)
#pragma GCC unroll 4
            for (int b = 0; b < BYTES; b++)
#pragma GCC unroll 2
              for (int n = 0; n < NIBBLES; n++)
                sum[i][c][b] = _mm256_add_epi32(
                    sum[i][c][b],
                    _mm256_madd_epi16(part[i][c][b][n], _mm256_set1_epi16(n ? 16 : 1)));
      }
      const int64_t at =
          (tile * linear.groups + linear.segment_group[segment]) * COLUMNS + first * L;
      for (int c = 0; c < C; c++) {
        __m256 scales, zeros;
        load_tables(linear, at + c * L, scales, zeros);
        for (int i = 0; i < M; i++) {
          const int64_t which = (m + i) * linear.segments + segment;
          __m256 exact = _mm256_cvtepi32_ps(sum[i][c][0]);
          if constexpr (BYTES == 2)
            exact = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[i][c][1]),
                                    _mm256_set1_ps(1 / SECOND_BYTE), exact);
          total[i][c] = add_segment(from, which, exact, scales, zeros, total[i][c]);
        }
      }
    }
    for (int i = 0; i < M; i++)
      for (int c = 0; c < C; c++) _mm256_storeu_ps(y + i * COLUMNS + (first + c) * L, total[i][c]);
  }
}

struct Maddubs {
  template <int BYTES>
  static void quantize(const GptqLinear& linear, const void* x, int type, int64_t m,
                       const PermutedActivations& to) {
    if (BYTES == 2 && linear.bits == 8) return quantize_pairs(linear, x, type, m, to);
    quantize_segments<BYTES>(linear, x, type, m, to);
  }
  template <int BITS, int BYTES, int M>
  static void multiply(const GptqLinear& linear, int64_t tile, int64_t m,
                       const PermutedActivations& x, float* y) {
    constexpr int C = M == 1 ? 2 : 1;
    if constexpr (BITS == 8 && BYTES == 2)
      multiply_pairs<M, C>(linear, tile, m, x, y);
    else
      multiply_columns<BITS, BYTES, M, C>(linear, tile, m, x, y);
  }
};

}  // namespace

namespace gptq {

void quantize_activations_avx2(const GptqLinear& linear, const void* x, int type, int64_t m,
                               const PermutedActivations& to) {
  quantize_by<Maddubs>(linear, x, type, m, to);
}

void multiply_tile_maddubs(const GptqLinear& linear, int64_t tile, int64_t m, int count,
                           const PermutedActivations& x, float* y) {
  multiply_by<Maddubs>(linear, tile, m, count, x, y);
}

}  // namespace gptq

#endif
