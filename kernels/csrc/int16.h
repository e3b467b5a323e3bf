// What maddubs.cpp and gemm_int16.cpp share: how a segment of x becomes a step times whole numbers of
// 16 bits (AVX2).

#pragma once

#include "gemm_int16.h"
#include "integers.h"

#include <algorithm>

#ifdef X86

namespace gptq {

constexpr float GREATEST_INT16 = 32767;

AVX2_TARGET INLINE __m256i load_words(const uint32_t* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}

AVX2_TARGET INLINE int add_lanes(__m256i of) {
  __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(of), _mm256_extracti128_si256(of, 1));
  sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xb1)));
}

// The greatest magnitude of some numbers, whole vectors of them, or not-a-number where one of them is
// not finite.
AVX2_TARGET INLINE float find_greatest(const float* values, int count) {
  constexpr int L = Middle::LANES;
  const __m256 magnitude = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  __m256 greatest = _mm256_setzero_ps(), unordered = _mm256_setzero_ps();
  for (int i = 0; i < count; i += L) {
    const __m256 value = _mm256_and_ps(_mm256_load_ps(values + i), magnitude);
    greatest = _mm256_max_ps(greatest, value);
    unordered = _mm256_or_ps(unordered, _mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  }
  alignas(32) float lanes[L];
  _mm256_store_ps(lanes, greatest);
  const float found = *std::max_element(lanes, lanes + L);
  const bool finite = !_mm256_movemask_ps(unordered) && found <= 3.402823466e38f;
  return finite ? found : __builtin_nanf("");
}

// The step of a segment's whole numbers, and how many there are in one; none where all are zero or one
// of them is not finite, which is passed on by the step alone.
struct Step {
  float step, steps_of_one;
};

// Choose the step by which the greatest number becomes `greatest_whole`; `values` may be written.
AVX2_TARGET INLINE Step choose_step(float* values, int count, float greatest_whole) {
  float greatest = find_greatest(values, count);
  const float step = greatest / greatest_whole;
  if (greatest < TINY) {  // whose greatest_whole / greatest may be infinite
    for (int i = 0; i < count; i++) values[i] *= 1 / TINY;
    greatest *= 1 / TINY;
  }
  return {step, step > 0 ? greatest_whole / greatest : 0.0f};
}

// A segment in whole numbers: x = step * whole, nearly.
struct WholeSegment {
  float step;
  int sum;  // of the whole numbers
};

// Round `count` numbers, filled up with zeros to pairs of vectors; `values` may be written.
AVX2_TARGET INLINE WholeSegment round_to_int16(float* values, int count, int16_t* whole) {
  constexpr int L = Middle::LANES;
  const auto [step, steps_of_one] = choose_step(values, count, GREATEST_INT16);
  const bool some = steps_of_one > 0;
  const __m256 per = _mm256_set1_ps(steps_of_one);
  __m256i sums = _mm256_setzero_si256();
  for (int i = 0; i < count; i += 2 * L) {
    __m256i rounded[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    for (int part = 0; part < 2 && some; part++)
      rounded[part] = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_load_ps(values + i + part * L), per));
    sums = _mm256_add_epi32(sums, _mm256_add_epi32(rounded[0], rounded[1]));
    const __m256i packed = _mm256_packs_epi32(rounded[0], rounded[1]);
    _mm256_store_si256(reinterpret_cast<__m256i*>(whole + i),
                       _mm256_permute4x64_epi64(packed, 0xd8));
  }
  return {step, add_lanes(sums)};
}

// total + scales * step * (sums of codes by x, less zeros by the sum of x), of one segment of a row.
AVX2_TARGET INLINE __m256 add_segment(const PermutedActivations& x, int64_t segment, __m256 sums,
                                      __m256 scales, __m256 zeros, __m256 total) {
  sums = _mm256_fnmadd_ps(zeros, _mm256_set1_ps(x.sums[segment]), sums);
  return _mm256_fmadd_ps(_mm256_mul_ps(scales, _mm256_set1_ps(x.steps[segment])), sums, total);
}

// p.sums += steps * scales * sum, of a block.
AVX2_TARGET INLINE void scale_block(const BlockProduct& p,
                                    const __m256i (&sum)[BLOCK_ROWS][BLOCK_VECTORS]) {
  constexpr int L = Middle::LANES;
  const __m256 scale[BLOCK_VECTORS] = {_mm256_loadu_ps(p.scales), _mm256_loadu_ps(p.scales + L)};
#pragma GCC unroll 8
  for (int r = 0; r < BLOCK_ROWS; r++) {
    const __m256 step = _mm256_set1_ps(p.steps[r]);
#pragma GCC unroll 2
    for (int n = 0; n < BLOCK_VECTORS; n++) {
      float* to = p.sums + r * COLUMNS + n * L;
      const __m256 before = p.first ? _mm256_setzero_ps() : _mm256_load_ps(to);
      _mm256_store_ps(to, _mm256_fmadd_ps(_mm256_mul_ps(scale[n], step),
                                          _mm256_cvtepi32_ps(sum[r][n]), before));
    }
  }
}

INLINE uint32_t pair_of(int16_t low, int16_t high) {
  return uint16_t(low) | uint32_t(uint16_t(high)) << 16;
}

}  // namespace gptq

#endif
