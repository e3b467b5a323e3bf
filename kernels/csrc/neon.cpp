// y[M, 64] = x[M, K] @ W[64, K].T in whole numbers, by sdot (NEON with dotprod): what vnni.cpp does,
// on ARM. x lies as there: of four rows, four first and four second bytes.
//
// sdot multiplies four signed bytes by four, and adds to 32 bits. Codes of 2, 3 and 4 bits are
// signed bytes as they are; those of 8 bits are taken less 128, as their zeros are.
//
// Processors with i8mm take two rows of x and two columns at once: smmla multiplies 2 x 8 bytes by
// 8 x 2, twice what sdot does. Of eight rows of the weight, two columns lie beside each other where
// two vectors of four codes a column are zipped.
//
//   smmla   x    row 0: of (j ...), of (j + 1 ...)    row 1: the same
//           w    column 0: codes of j, of j + 1       column 1: the same
//           sums row 0 by columns 0, 1; row 1 by columns 0, 1
//
// Registers, of 32, two bytes: sums 2 * M * C = 16 for M = 1, 2 and 4, 12 for 3; codes C, 8 at most.
// Of pairs of rows: sums 16, codes 4, x 2.

#include "integers.h"

#include <cmath>

using namespace gptq;

#ifdef ARM

namespace {

constexpr int L = Narrow::LANES;

// 16 whole numbers of one byte each, in the order in which a word's codes want them.
DOT_TARGET INLINE int8x16_t to_bytes(const int32x4_t* of, uint8x16_t order) {
  const int16x8_t low = vcombine_s16(vmovn_s32(of[0]), vmovn_s32(of[1])),
                  high = vcombine_s16(vmovn_s32(of[2]), vmovn_s32(of[3]));
  return vqtbl1q_s8(vcombine_s8(vmovn_s16(low), vmovn_s16(high)), order);
}

template <int BYTES>
DOT_TARGET void quantize_segments(const GptqLinear& linear, const void* x, int type, int64_t m,
                                  const PermutedActivations& to) {
  const int rows = unit_rows(linear.bits);
  int8_t place[16];
  order_bytes(linear.bits, place);
  const uint8x16_t order = vreinterpretq_u8_s8(vld1q_s8(place));
  int8_t* out = reinterpret_cast<int8_t*>(to.words + m * to.stride);
  const int32_t* row = linear.rows;
  const int64_t row_of_x = m * linear.in_features;
  for (int segment = 0; segment < linear.segments; segment++) {
    const int count = linear.segment_units[segment] * rows;
    float values[MAX_SEGMENT_ROWS];
    gather(x, type, row_of_x, row, count, 4 * L, values);
    float32x4_t max_lanes = vdupq_n_f32(0);
    uint32x4_t below = vdupq_n_u32(0xffffffff);
    for (int i = 0; i < count; i += L) {
      const float32x4_t value = vabsq_f32(vld1q_f32(values + i));
      below = vandq_u32(below, vcltq_f32(value, vdupq_n_f32(INFINITY)));  // false for not-a-number
      max_lanes = vmaxq_f32(max_lanes, value);
    }
    float max_abs = vmaxvq_f32(max_lanes);
    const bool finite = vminvq_u32(below) != 0;
    // What is not finite is passed on by the step alone.
    const float step = finite ? max_abs / 127.0f : NAN;
    if (finite && max_abs < TINY) {  // whose 127 / max_abs may be infinite
      for (int i = 0; i < count; i++) values[i] *= 1 / TINY;
      max_abs *= 1 / TINY;
    }
    const float per = finite && step > 0 ? 127.0f / max_abs : 0.0f;
    int32x4_t sums = vdupq_n_s32(0), rests = vdupq_n_s32(0);
    for (int i = 0; i < count; i += 4 * L) {
      int32x4_t rounded[4], rest[4];
      for (int part = 0; part < 4; part++) {
        const float32x4_t value =
            finite ? vmulq_n_f32(vld1q_f32(values + i + part * L), per) : vdupq_n_f32(0);
        rounded[part] = vcvtnq_s32_f32(value);
        sums = vaddq_s32(sums, rounded[part]);
        const float32x4_t left = vsubq_f32(value, vcvtq_f32_s32(rounded[part]));
        rest[part] = vcvtnq_s32_f32(vmulq_n_f32(left, SECOND_BYTE));
        if constexpr (BYTES == 2) rests = vaddq_s32(rests, rest[part]);
      }
      // Four bytes of the first kind, then the four of what is left over.
      int8_t bytes[32];
      const int8x16_t low = to_bytes(rounded, order);
      if constexpr (BYTES == 2) {
        const int32x4_t first = vreinterpretq_s32_s8(low),
                        second = vreinterpretq_s32_s8(to_bytes(rest, order));
        vst1q_s8(bytes, vreinterpretq_s8_s32(vzip1q_s32(first, second)));
        vst1q_s8(bytes + 16, vreinterpretq_s8_s32(vzip2q_s32(first, second)));
      } else {
        vst1q_s8(bytes, low);
      }
      const int there = std::min(4 * L, count - i) * BYTES;
      memcpy(out, bytes, there);
      out += there;
    }
    to.steps[m * linear.segments + segment] = step;
    to.sums[m * linear.segments + segment] =
        float(vaddvq_s32(sums)) + float(vaddvq_s32(rests)) / SECOND_BYTE;
    row += count;
  }
}

// total + scales * step * (sums of codes by x, its second bytes' among them, less zeros by the sum of
// x), of one segment of a row.
DOT_TARGET INLINE float32x4_t add_segment(const PermutedActivations& x, int64_t segment,
                                          float32x4_t sums, float32x4_t seconds, float32x4_t scales,
                                          float32x4_t zeros, float32x4_t total) {
  sums = vfmaq_n_f32(sums, seconds, 1 / SECOND_BYTE);
  sums = vfmsq_n_f32(sums, zeros, x.sums[segment]);
  return vfmaq_f32(total, vmulq_n_f32(scales, x.steps[segment]), sums);
}

// Four codes of each of four columns, as bytes: those that one word of x is multiplied by.
template <int BITS>
DOT_TARGET INLINE int8x16_t take_codes(const uint32_t* word, int at) {
  uint32x4_t codes;
  if constexpr (BITS == 3) {
    const uint32x4_t high = vld1q_u32(word + 2 * COLUMNS),
                     third = (at >= 2 ? high >> (at - 2) : high << (2 - at)) & 0x04040404u;
    codes = (vld1q_u32(word + at / 4 * COLUMNS) >> (at % 4 * 2) & 0x03030303u) | third;
  } else if constexpr (BITS == 8) {
    codes = vld1q_u32(word) ^ 0x80808080u;
  } else {
    codes = vld1q_u32(word) >> (BITS * at) & (BITS == 2 ? 0x03030303u : 0x0f0f0f0fu);
  }
  return vreinterpretq_s8_u32(codes);
}

// M rows of x by one tile, C vectors of columns at once: y [M][COLUMNS].
template <int BITS, int BYTES, int M, int C>
DOT_TARGET void multiply_columns(const GptqLinear& linear, int64_t tile, int64_t m,
                                 const PermutedActivations& from, float* y) {
  constexpr int per_word = BITS == 3 ? 3 : 1, fours = BITS == 3 ? 8 : 8 / BITS;
  for (int first = 0; first < COLUMNS / L; first += C) {
    const uint32_t* word = linear.words + tile * linear.units * per_word * COLUMNS + first * L;
    const uint32_t* x = from.words + m * from.stride;
    float32x4_t total[M][C];
    for (int i = 0; i < M; i++)
      for (int c = 0; c < C; c++) total[i][c] = vdupq_n_f32(0);
    for (int segment = 0; segment < linear.segments; segment++) {
      int32x4_t sum[M][C][BYTES];
      for (int i = 0; i < M; i++)
        for (int c = 0; c < C; c++)
          for (int b = 0; b < BYTES; b++) sum[i][c][b] = vdupq_n_s32(0);
      for (int unit = 0; unit < linear.segment_units[segment]; unit++) {
        for (int i = 0; i < per_word; i++)
          for (int c = 0; c < C; c += 64 / (4 * L))
            __builtin_prefetch(word + (16 * per_word + i) * COLUMNS + c * L);
#pragma GCC unroll 8
        for (int at = 0; at < fours; at++) {
          int8x16_t codes[C];
#pragma GCC unroll 8
          for (int c = 0; c < C; c++) codes[c] = take_codes<BITS>(word + c * L, at);
#pragma GCC unroll 4
          for (int i = 0; i < M; i++)
#pragma GCC unroll 2
            for (int b = 0; b < BYTES; b++) {
              const int8x16_t a =
                  vreinterpretq_s8_u32(vdupq_n_u32(x[i * from.stride + BYTES * at + b]));
#pragma GCC unroll 8
              for (int c = 0; c < C; c++) sum[i][c][b] = vdotq_s32(sum[i][c][b], codes[c], a);
            }
        }
        word += per_word * COLUMNS;
        x += BYTES * fours;
      }
      const int64_t at =
          (tile * linear.groups + linear.segment_group[segment]) * COLUMNS + first * L;
      for (int c = 0; c < C; c++) {
        Narrow::floats scales, zeros;
        load_scales(linear, at + c * L, scales);
        load_zeros(linear, at + c * L, zeros);
        if constexpr (BITS == 8) zeros -= 128.0f;
        for (int i = 0; i < M; i++)
          total[i][c] =
              add_segment(from, (m + i) * linear.segments + segment, vcvtq_f32_s32(sum[i][c][0]),
                          BYTES == 2 ? vcvtq_f32_s32(sum[i][c][BYTES - 1]) : vdupq_n_f32(0),
                          (float32x4_t)scales, (float32x4_t)zeros, total[i][c]);
      }
    }
    for (int i = 0; i < M; i++)
      for (int c = 0; c < C; c++) vst1q_f32(y + i * COLUMNS + (first + c) * L, total[i][c]);
  }
}

// Two or four rows of x by one tile, as pairs; M of them are stored. Codes of up to 4 bits.
template <int BITS, int BYTES, int M, int C>
I8MM_TARGET void multiply_pairs(const GptqLinear& linear, int64_t tile, int64_t m,
                                const PermutedActivations& from, float* y) {
  constexpr int per_word = BITS == 3 ? 3 : 1, fours = BITS == 3 ? 8 : 8 / BITS, PAIRS = (M + 1) / 2;
  for (int first = 0; first < COLUMNS / L; first += C) {
    const uint32_t* word = linear.words + tile * linear.units * per_word * COLUMNS + first * L;
    const uint32_t* x[2 * PAIRS];
    for (int i = 0; i < 2 * PAIRS; i++) x[i] = from.words + (m + std::min(i, M - 1)) * from.stride;
    float32x4_t total[M][C];
    for (int i = 0; i < M; i++)
      for (int c = 0; c < C; c++) total[i][c] = vdupq_n_f32(0);
    for (int segment = 0; segment < linear.segments; segment++) {
      int32x4_t sum[PAIRS][C][2][BYTES];
      for (int i = 0; i < PAIRS; i++)
        for (int c = 0; c < C; c++)
          for (int half = 0; half < 2; half++)
            for (int b = 0; b < BYTES; b++) sum[i][c][half][b] = vdupq_n_s32(0);
      for (int unit = 0; unit < linear.segment_units[segment]; unit++) {
        for (int i = 0; i < per_word; i++)
          for (int c = 0; c < C; c += 64 / (4 * L))
            __builtin_prefetch(word + (16 * per_word + i) * COLUMNS + c * L);
#pragma GCC unroll 4
        for (int at = 0; at < fours; at += 2) {
          int8x16_t rows[PAIRS][BYTES];
#pragma GCC unroll 2
          for (int i = 0; i < PAIRS; i++) {
            if constexpr (BYTES == 2) {
              const uint32x4_t above = vld1q_u32(x[2 * i] + 2 * at),
                               below = vld1q_u32(x[2 * i + 1] + 2 * at);
              rows[i][0] = vreinterpretq_s8_u32(vuzp1q_u32(above, below));
              rows[i][1] = vreinterpretq_s8_u32(vuzp2q_u32(above, below));
            } else {
              rows[i][0] = vreinterpretq_s8_u32(
                  vcombine_u32(vld1_u32(x[2 * i] + at), vld1_u32(x[2 * i + 1] + at)));
            }
          }
#pragma GCC unroll 4
          for (int c = 0; c < C; c++) {
            const int32x4_t one = vreinterpretq_s32_s8(take_codes<BITS>(word + c * L, at)),
                            other = vreinterpretq_s32_s8(take_codes<BITS>(word + c * L, at + 1));
            const int8x16_t columns[2] = {vreinterpretq_s8_s32(vzip1q_s32(one, other)),
                                          vreinterpretq_s8_s32(vzip2q_s32(one, other))};
#pragma GCC unroll 2
            for (int i = 0; i < PAIRS; i++)
#pragma GCC unroll 2
              for (int half = 0; half < 2; half++)
#pragma GCC unroll 2
                for (int b = 0; b < BYTES; b++)
                  sum[i][c][half][b] = vmmlaq_s32(sum[i][c][half][b], rows[i][b], columns[half]);
          }
        }
        word += per_word * COLUMNS;
        for (int i = 0; i < 2 * PAIRS; i++) x[i] += BYTES * fours;
      }
      const int64_t at =
          (tile * linear.groups + linear.segment_group[segment]) * COLUMNS + first * L;
      for (int c = 0; c < C; c++) {
        Narrow::floats scales, zeros;
        load_scales(linear, at + c * L, scales);
        load_zeros(linear, at + c * L, zeros);
        for (int i = 0; i < M; i++) {
          const auto row = [&](int b) {
            const int64x2_t left = vreinterpretq_s64_s32(sum[i / 2][c][0][b]),
                            right = vreinterpretq_s64_s32(sum[i / 2][c][1][b]);
            return vcvtq_f32_s32(
                vreinterpretq_s32_s64(i % 2 ? vzip2q_s64(left, right) : vzip1q_s64(left, right)));
          };
          total[i][c] = add_segment(from, (m + i) * linear.segments + segment, row(0),
                                    BYTES == 2 ? row(BYTES - 1) : vdupq_n_f32(0),
                                    (float32x4_t)scales, (float32x4_t)zeros, total[i][c]);
        }
      }
    }
    for (int i = 0; i < M; i++)
      for (int c = 0; c < C; c++) vst1q_f32(y + i * COLUMNS + (first + c) * L, total[i][c]);
  }
}

struct Neon {
  template <int BYTES>
  static void quantize(const GptqLinear& linear, const void* x, int type, int64_t m,
                       const PermutedActivations& to) {
    quantize_segments<BYTES>(linear, x, type, m, to);
  }
  template <int BITS, int BYTES, int M>
  static void multiply(const GptqLinear& linear, int64_t tile, int64_t m,
                       const PermutedActivations& x, float* y) {
    constexpr int C = M == 1 ? 8 : M == 2 ? 4 : 2;
    if constexpr (M > 1 && BITS < 8)
      if (x.isa >= I8MM) return multiply_pairs<BITS, BYTES, M, C>(linear, tile, m, x, y);
    multiply_columns<BITS, BYTES, M, C>(linear, tile, m, x, y);
  }
};

}  // namespace

namespace gptq {

void quantize_activations_neon(const GptqLinear& linear, const void* x, int type, int64_t m,
                               const PermutedActivations& to) {
  quantize_by<Neon>(linear, x, type, m, to);
}

void multiply_tile_neon(const GptqLinear& linear, int64_t tile, int64_t m, int count,
                        const PermutedActivations& x, float* y) {
  multiply_by<Neon>(linear, tile, m, count, x, y);
}

}  // namespace gptq

#endif
