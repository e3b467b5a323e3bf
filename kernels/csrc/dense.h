// Products of a weight that is not packed by one row of x.

#pragma once

#include "vector_math.h"

#include <algorithm>

// The best of what was compiled: NAME_avx512, NAME_avx2 or NAME_plain.
#ifdef X86
#define BEST(NAME, ISA, ...)                               \
  ((ISA) >= AVX512 ? NAME##_avx512(__VA_ARGS__)            \
   : (ISA) == AVX2 ? NAME##_avx2(__VA_ARGS__)              \
                   : NAME##_plain(__VA_ARGS__))
#else
#define BEST(NAME, ISA, ...) NAME##_plain(__VA_ARGS__)
#endif

namespace gptq {

struct Dense {
  const void* weight;  // [n][k] of `type`
  int64_t k;
  int type, isa;
  // Whether x is multiplied as bfloat16.
  bool rounds() const { return isa >= BF16 && type == BFLOAT16; }
};

template <int TYPE>
INLINE void dense_type(const void* weight, int64_t k, int64_t first, int count, const float* x, float* y) {
  for (int c = 0; c < count; c++) {
    const int64_t row = (first + c) * k;
    floats sum{};
    int64_t i = 0;
    for (; i + LANES <= k; i += LANES) {
      floats a, w;
      load<FLOAT32>(x, i, a);
      load<TYPE>(weight, row + i, w);
      sum += a * w;
    }
    float rest = 0;
    for (; i < k; i++)
      rest += x[i] * (TYPE == FLOAT32 ? static_cast<const float*>(weight)[row + i]
                                      : from_bfloat16(static_cast<const uint16_t*>(weight)[row + i]));
    y[c] = total(sum) + rest;
  }
}

INLINE void dense_body(const void* weight, int64_t k, int64_t first, int count, const float* x, int type, float* y) {
  if (type == FLOAT32) return dense_type<FLOAT32>(weight, k, first, count, x, y);
  dense_type<BFLOAT16>(weight, k, first, count, x, y);
}

#define DENSE(NAME, TARGET)                                                                                  \
  TARGET inline void dense_##NAME(const void* w, int64_t k, int64_t first, int n, const float* x, int type, float* y) { \
    dense_body(w, k, first, n, x, type, y);                                                                  \
  }

DENSE(plain, )
#ifdef X86
DENSE(avx2, AVX2_TARGET)
DENSE(avx512, AVX512_TARGET)
#endif

#ifdef X86
// Some columns of a bfloat16 weight by one row of bfloat16 x, with the processor's own products.
BF16_TARGET inline void dense_bfloat16(const uint16_t* weight, int64_t k, int64_t first, int count, const uint16_t* x, float* y) {
  constexpr int TOGETHER = 4;
  const int64_t whole = k / 32 * 32;
  const __mmask32 rest = __mmask32((uint64_t(1) << (k - whole)) - 1);
  for (int c = 0; c < count; c += TOGETHER) {
    const uint16_t* row[TOGETHER];
    __m512 sum[TOGETHER];
    for (int i = 0; i < TOGETHER; i++) {
      row[i] = weight + (first + std::min(c + i, count - 1)) * k;
      sum[i] = _mm512_setzero_ps();
    }
    for (int64_t at = 0; at < whole; at += 32) {
      const __m512bh a = (__m512bh)_mm512_loadu_si512(x + at);
      for (int i = 0; i < TOGETHER; i++)
        sum[i] = _mm512_dpbf16_ps(sum[i], (__m512bh)_mm512_loadu_si512(row[i] + at), a);
    }
    if (rest) {
      const __m512bh a = (__m512bh)_mm512_maskz_loadu_epi16(rest, x + whole);
      for (int i = 0; i < TOGETHER; i++)
        sum[i] = _mm512_dpbf16_ps(sum[i], (__m512bh)_mm512_maskz_loadu_epi16(rest, row[i] + whole), a);
    }
    for (int i = 0; i < TOGETHER && c + i < count; i++) y[c + i] = _mm512_reduce_add_ps(sum[i]);
  }
}
#endif

// y [count] = rows of the weight from `first` on, by x [k]; `rounded` is x in bfloat16, for a weight that
// rounds. A row's product is the same whatever rows are asked for beside it.
inline void dense(const Dense& of, int64_t first, int count, const float* x, const uint16_t* rounded, float* y) {
#ifdef X86
  if (of.rounds()) return dense_bfloat16(static_cast<const uint16_t*>(of.weight), of.k, first, count, rounded, y);
#endif
  BEST(dense, of.isa, of.weight, of.k, first, count, x, of.type, y);
}

}  // namespace gptq
