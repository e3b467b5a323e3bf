// Vectors, the targets that functions are compiled for, and conversions of numbers.
//
// Everything is compiled for the plainest processor of its kind; functions for AVX2, AVX-512 and
// AVX512-BF16 carry a target attribute, and gptq_isa() tells which of them may be called.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#define X86 1
#if defined(__clang__)
#include <immintrin.h>
#else
// gcc 12 takes what this header leaves undefined on purpose for a mistake:
// https://gcc.gnu.org/PR105593
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif
#endif

#if defined(__aarch64__)
#define ARM 1
#include <arm_neon.h>
#if defined(__clang__)
#define DOT_TARGET __attribute__((target("dotprod")))
#define I8MM_TARGET __attribute__((target("dotprod,i8mm")))
#else
#define DOT_TARGET __attribute__((target("arch=armv8.2-a+dotprod")))  // as its intrinsics have it
#define I8MM_TARGET __attribute__((target("arch=armv8.2-a+dotprod+i8mm")))
#endif
#endif

#if defined(__clang__)
#define WIDE ""
#else
#define WIDE ",prefer-vector-width=512"  // unknown to clang, which obeys the vectors' own width
#endif
#define AVX512_FLAGS "avx512f,avx512bw,avx512vl,avx512dq"
#define AVX2_TARGET __attribute__((target("avx2,fma,f16c")))
#define AVX512_TARGET __attribute__((target(AVX512_FLAGS WIDE)))
#define BF16_TARGET __attribute__((target(AVX512_FLAGS ",avx512bf16" WIDE)))
#define VNNI_TARGET __attribute__((target(AVX512_FLAGS ",avx512vnni" WIDE)))
#if defined(X86) && defined(__linux__)
#define MATRIX_UNIT 1  // there may be one: AMX
#define AMX_TARGET __attribute__((target("amx-tile,amx-bf16," AVX512_FLAGS ",avx512bf16" WIDE)))
#endif
#define INLINE static inline __attribute__((always_inline))

// The best of what was compiled: NAME_avx512, NAME_avx2 or NAME_plain.
#ifdef X86
#define DISPATCH(NAME, ISA, ...)                \
  ((ISA) >= AVX512 ? NAME##_avx512(__VA_ARGS__) \
   : (ISA) >= AVX2 ? NAME##_avx2(__VA_ARGS__)   \
                   : NAME##_plain(__VA_ARGS__))
#else
#define DISPATCH(NAME, ISA, ...) ((void)(ISA), NAME##_plain(__VA_ARGS__))
#endif

namespace gptq {

// Vectors of some size, of numbers of 4 bytes, and of as many of 2 and 1 bytes: gcc takes vectors
// that are wider than the processor's apart, in memory.
template <int BYTES>
struct Vectors {
  static constexpr int LANES = BYTES / 4;
  typedef float floats __attribute__((vector_size(BYTES)));
  typedef int32_t ints __attribute__((vector_size(BYTES)));
  typedef uint32_t uints __attribute__((vector_size(BYTES)));
  typedef uint16_t halves __attribute__((vector_size(BYTES / 2)));
  typedef uint8_t bytes __attribute__((vector_size(BYTES / 4)));
};

// Those of AVX-512, AVX2, and of SSE2 and NEON, which need no flag.
using Wide = Vectors<64>;
using Middle = Vectors<32>;
using Narrow = Vectors<16>;

// Code for AVX-512 alone says no more.
constexpr int LANES = Wide::LANES;
typedef Wide::floats floats;
typedef Wide::ints ints;
typedef Wide::uints uints;
typedef Wide::halves halves;

// Instruction sets: AVX_VNNI is AVX2 with products of bytes (vpdpbusd), and AVX512_VNNI is AVX512 with
// them; AVX512_BF16 has those of bfloat16 (vdpbf16ps) too. On ARM, DOTPROD is NEON with products of
// bytes (sdot), and I8MM has those of small matrices of bytes (smmla) too.
enum Isa {
  PLAIN = 0,
  AVX2 = 1,
  DOTPROD = 1,
  AVX_VNNI = 2,
  I8MM = 2,
  AVX512 = 3,
  AVX512_VNNI = 4,
  AVX512_BF16 = 5
};

#ifdef X86
// How this processor encodes products of bytes on 32 bytes: as AVX-VNNI does, as AVX-512 does, or not
// at all (cpu_features.cpp).
enum class Vnni256 { NONE, VEX, EVEX };
Vnni256 find_vnni256();

inline bool has_vnni256(int isa) { return isa == AVX_VNNI && find_vnni256() != Vnni256::NONE; }
#endif

// What x is multiplied as: FLOAT32 by any code, INT16 and INT8 by vpdpbusd (AVX512-VNNI), vpmaddubsw
// (AVX2) or sdot (ARM). INT16 is nearer to x than bfloat16 is; INT8 rounds x.
enum class Activations { FLOAT32 = 0, INT16 = 1, INT8 = 2 };

// The dtype of x, y and of weights that are not packed. Keys and values may be INT8.
enum Type { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2 };

constexpr int64_t size_of(int type) { return type == FLOAT32 ? 4 : type == BFLOAT16 ? 2 : 1; }

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

// Round to nearest, ties to even; not-a-number stays one.
INLINE uint16_t to_bfloat16(float value) {
  const uint32_t bits = as_bits(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

INLINE float from_bfloat16(uint16_t value) { return as_float(uint32_t(value) << 16); }

// Element `at` of a tensor of `type`.
INLINE float load_number(const void* from, int type, int64_t at) {
  if (type == FLOAT32) return static_cast<const float*>(from)[at];
  return from_bfloat16(static_cast<const uint16_t*>(from)[at]);
}

}  // namespace gptq
