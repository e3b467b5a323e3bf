// Few rows of x by one tile of a packed linear: y[M, 64] = x[M, K] @ W[64, K].T, M up to 4.
//
// How a packed linear lies in memory (bits 2, 3, 4 and 8; a checkpoint's 5 to 7 are widened to 8):
//
//   tile     64 columns, as many as the registers of one product; the last one is filled up
//   unit     what one word holds for one column, or three words at 3 bits:
//              bits        2    3    4    8
//              rows       16   32    8    4
//              words       1    3    1    1
//   segment  rows of one group, 256 at most, in whole units: its sum is scaled once
//
//   words    uint32  [tile][unit][word of the unit][64]
//   scales   float   [tile][group][64]      float16 or float32
//   zeros    uint8   [tile][group][64]
//   rows     int32   [unit][row of the unit]  the feature of x that a row multiplies, or -1
//
// Rows are sorted by group, and each group is filled up to whole units. A code of `bits` bits
// stands at bit `bits * row` of its word; at 3 bits
//
//   word 0   low two bits of rows 0 to 15   at bit 2 * row
//   word 1   low two bits of rows 16 to 31  at bit 2 * (row - 16)
//   word 2   high bits              at bit third_bit(row): those of rows j, j + 4, j + 8 and j + 12 of
//                                   a half, which are multiplied together, at one bit of each byte

#pragma once

#include "interface.h"
#include "scratch.h"
#include "simd.h"

namespace gptq {

constexpr int COLUMNS = 64;            // of a tile
constexpr int ROWS = 4;                // of x, multiplied at once
constexpr int64_t PREFILL_ROWS = 512;  // of a long x at a time: their sums stay in a core's cache

// The rows that a unit holds for one column.
INLINE int unit_rows(int bits) { return bits == 3 ? 32 : 32 / bits; }

// At 3 bits, where the high bit of a unit's row stands.
constexpr int third_bit(int row) { return row % 16 / 4 * 8 + row / 16 * 4 + row % 4; }

// What x of `type` is multiplied as. A processor with products of bfloat16 has models in bfloat16,
// and float32 where a user asks for that: it is then float32.
INLINE Activations activations_for(int type, int isa, int activations) {
  const bool exact = type == FLOAT32 && isa >= AVX512_BF16;
  return exact ? Activations::FLOAT32 : Activations(activations);
}

// Zeros and scales of a vector of columns, from the first of them in [tile][group][64].
template <class F>
INLINE void load_zeros(const GptqLinear& linear, int64_t at, F& zeros) {
  typename Vectors<sizeof(F)>::bytes raw;
  memcpy(&raw, linear.zeros + at, sizeof raw);
  zeros = __builtin_convertvector(raw, F);
}

template <class F>
INLINE void load_scales(const GptqLinear& linear, int64_t at, F& scales) {
  using V = Vectors<sizeof(F)>;
  using uints = typename V::uints;
  if (linear.float_scales) {
    memcpy(&scales, static_cast<const float*>(linear.scales) + at, sizeof scales);
    return;
  }
  // A float16's exponent and mantissa, read as a float32's, are 2**112 too small; exact below
  // normal.
  typename V::halves raw;
  memcpy(&raw, static_cast<const uint16_t*>(linear.scales) + at, sizeof raw);
  const uints half = __builtin_convertvector(raw, uints);
  const uints magnitude = (half & 0x7fff) << 13;
  const uints sign = (half & 0x8000) << 16;
  F value;
  memcpy(&value, &magnitude, sizeof value);
  value *= 0x1p112f;
  uints bits;
  memcpy(&bits, &value, sizeof bits);
  bits |= sign;
  memcpy(&scales, &bits, sizeof scales);
}

#ifdef X86
// The same by the processor's own conversions, where gcc 12 takes the other ones apart.
AVX2_TARGET INLINE void load_tables(const GptqLinear& linear, int64_t at, __m256& scales,
                                    __m256& zeros) {
  const __m128i raw = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(linear.zeros + at));
  zeros = _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(raw));
  if (linear.float_scales)
    scales = _mm256_loadu_ps(static_cast<const float*>(linear.scales) + at);
  else
    scales = _mm256_cvtph_ps(_mm_loadu_si128(
        reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(linear.scales) + at)));
}

AVX512_TARGET INLINE void load_tables(const GptqLinear& linear, int64_t at, __m512& scales,
                                      __m512& zeros) {
  const __m128i raw = _mm_loadu_si128(reinterpret_cast<const __m128i*>(linear.zeros + at));
  zeros = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(raw));
  if (linear.float_scales)
    scales = _mm512_loadu_ps(static_cast<const float*>(linear.scales) + at);
  else
    scales = _mm512_cvtph_ps(_mm256_loadu_si256(
        reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(linear.scales) + at)));
}
#endif

// x as the tiles read it: rows in the order of `rows`, each [stride] words. One of
//
//   FLOAT32      float  [unit][row]
//   INT16, INT8  bytes  [unit][four]      of rows (j, j + n, j + 2n, j + 3n), n a fourth of a word,
//                                         with each segment's sum and step (vnni.cpp)
struct PermutedActivations {
  float* values;
  uint32_t* words;
  float* sums;   // [M][segments]
  float* steps;  // [M][segments]
  int64_t stride;
  int isa;
  Activations kind;
  bool integers() const { return kind == Activations::INT16 || kind == Activations::INT8; }
};

// The bytes that `m` rows take, and where they lie in such memory.
size_t permuted_bytes(const GptqLinear& linear, Activations kind, int64_t m);
PermutedActivations permuted_at(const GptqLinear& linear, int isa, Activations kind, int64_t m,
                                void* memory);

// Write row `m` of x into its place.
void permute_activations(const GptqLinear& linear, const void* x, int type, int64_t m,
                         const PermutedActivations& to);

// Multiply `count` (1 to ROWS) rows from row `m` on by one tile: y [count][COLUMNS]. A row's
// numbers are the same whatever rows are beside it.
void multiply_tile(const GptqLinear& linear, int64_t tile, int64_t m, int count,
                   const PermutedActivations& x, float* y);

// Write a tile's sums [COLUMNS] as row `m` of y, with the bias.
void store_tile(const GptqLinear& linear, int64_t tile, int64_t m, const float* sums, void* y,
                int type);

#ifdef X86
// The same for whole numbers: vnni.cpp, avx_vnni.cpp and, without VNNI, maddubs.cpp.
void quantize_activations(const GptqLinear& linear, const void* x, int type, int64_t m,
                          const PermutedActivations& to);
void multiply_tile_vnni(const GptqLinear& linear, int64_t tile, int64_t m, int count,
                        const PermutedActivations& x, float* y);
void quantize_activations_avx2(const GptqLinear& linear, const void* x, int type, int64_t m,
                               const PermutedActivations& to);
void multiply_tile_vnni256(const GptqLinear& linear, int64_t tile, int64_t m, int count,
                           const PermutedActivations& x, float* y);
void multiply_tile_maddubs(const GptqLinear& linear, int64_t tile, int64_t m, int count,
                           const PermutedActivations& x, float* y);
#endif
#ifdef ARM
// The same, neon.cpp.
void quantize_activations_neon(const GptqLinear& linear, const void* x, int type, int64_t m,
                               const PermutedActivations& to);
void multiply_tile_neon(const GptqLinear& linear, int64_t tile, int64_t m, int count,
                        const PermutedActivations& x, float* y);
#endif

}  // namespace gptq
