// What the files of the CPU library share; gemv.cpp says how a layer lies in memory.

#pragma once

#include "scratch.h"
#include "interface.h"

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#define X86 1
#if defined(__clang__)
#include <immintrin.h>
#else
// gcc 12 takes what this header leaves undefined on purpose for a mistake: https://gcc.gnu.org/PR105593
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif
#endif

#if defined(__clang__)
#define WIDE ""
#else
#define WIDE ",prefer-vector-width=512"  // which clang does not know; it obeys the vectors' own width
#endif
#define AVX2_TARGET __attribute__((target("avx2,fma")))
#define AVX512_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq" WIDE)))
#define BF16_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16" WIDE)))
#define INLINE static inline __attribute__((always_inline))

namespace gptq {

constexpr int COLUMNS = 64;  // of a tile
constexpr int LANES = 16;    // of a vector: 64 bytes of int32 or float
constexpr int ROWS = 4;      // of x, multiplied at once
constexpr int64_t MOST_ROWS = 512;  // of a long x at a time: their sums stay in a core's cache

typedef float floats __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));
typedef uint32_t uints __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32)));
typedef uint8_t bytes __attribute__((vector_size(16)));

// TWO_BYTES is BF16 with x in whole numbers where that is faster, ONE_BYTE what `cpu-int8` asks for.
enum Isa { PLAIN = 0, AVX2 = 1, AVX512 = 2, BF16 = 3, TWO_BYTES = 4, ONE_BYTE = 5 };
enum Type { FLOAT32 = 0, BFLOAT16 = 1 };

INLINE float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

INLINE uint32_t as_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

// The rows that a unit of packed words holds for one column.
INLINE int unit_rows(int bits) { return bits == 3 ? 32 : 32 / bits; }

// Zeros and scales of 16 columns, from the first of them in [tiles][groups][64].
INLINE void load_zeros(const GptqLayer& layer, int64_t at, floats& zeros) {
  bytes raw;
  memcpy(&raw, layer.zeros + at, sizeof raw);
  zeros = __builtin_convertvector(raw, floats);
}

INLINE void load_scales(const GptqLayer& layer, int64_t at, floats& scales) {
  if (layer.float_scales) {
    memcpy(&scales, static_cast<const float*>(layer.scales) + at, sizeof scales);
    return;
  }
  // A float16's exponent and mantissa, read as a float32's, are 2**112 too small; exact below normal.
  halves raw;
  memcpy(&raw, static_cast<const uint16_t*>(layer.scales) + at, sizeof raw);
  const uints half = __builtin_convertvector(raw, uints);
  const uints magnitude = (half & 0x7fff) << 13;
  const uints sign = (half & 0x8000) << 16;
  floats value;
  memcpy(&value, &magnitude, sizeof value);
  value *= 0x1p112f;
  uints bits;
  memcpy(&bits, &value, sizeof bits);
  bits |= sign;
  memcpy(&scales, &bits, sizeof scales);
}

#ifdef X86
// The same by AVX-512's own conversions, where gcc 12 takes the other ones apart.
AVX512_TARGET INLINE void load_tables(const GptqLayer& layer, int64_t at, __m512& scales, __m512& zeros) {
  zeros = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(layer.zeros + at))));
  if (layer.float_scales)
    scales = _mm512_loadu_ps(static_cast<const float*>(layer.scales) + at);
  else
    scales = _mm512_cvtph_ps(_mm256_loadu_si256(
        reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(layer.scales) + at)));
}
#endif

// Round to nearest, ties to even; not-a-number stays one.
INLINE uint16_t to_bfloat16(float value) {
  const uint32_t bits = as_bits(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

INLINE float from_bfloat16(uint16_t value) { return as_float(uint32_t(value) << 16); }

// x as the tiles read it: in the order of `rows`, as float32, as pairs of bfloat16 with their sums, or as
// bytes with their steps and sums.
struct Gathered {
  float* values;
  uint32_t* pairs;
  float* sums;
  float* steps;
  int64_t stride;
  int isa;
};

// Lay out the memory of `m` gathered rows, and say how many bytes it takes.
size_t gathered_bytes(const GptqLayer& layer, int isa, int64_t m);
Gathered gathered_at(const GptqLayer& layer, int isa, int64_t m, void* memory);

// Gather row `m` of x.
void gather_row(const GptqLayer& layer, const void* x, int type, int64_t m, const Gathered& to);

#ifdef X86
// The same of x in bytes, vnni.cpp.
void split_row(const GptqLayer& layer, const void* x, int type, int64_t m, const Gathered& to);
void multiply_bytes(const GptqLayer& layer, int64_t tile, int64_t m, int count, const Gathered& x, float* y);
#endif

// Write a tile's sums [COLUMNS] as row `m` of y, with the bias.
void store(const GptqLayer& layer, int64_t tile, int64_t m, const float* from, void* y, int type);

// Multiply `count` (1 to ROWS) gathered rows from row `m` on by one tile: y [count][COLUMNS].
void multiply_bits(const GptqLayer& layer, int64_t tile, int64_t m, int count, const Gathered& x, float* y);

}  // namespace gptq
