// y[N] = x[K] @ W[N, K].T: one row of x by a weight that is not packed, rows [N][K] of float32 or
// bfloat16.
//
// A column's product is one chain of sums over K, a vector (of pairs' sums, where bfloat16 is
// multiplied as such) wide, added up at its end. Four columns are held at once, which hides the
// chain's latency: acc 4, x 1, weights from memory.

#pragma once

#include "vector_math.h"

#include <algorithm>

namespace gptq {

constexpr int COLUMNS_AT_ONCE = 4;

struct Dense {
  const void* weight;  // [n][k] of `type`
  int64_t k;
  int type, isa;
  // Whether x is multiplied as bfloat16.
  bool uses_bf16() const { return isa >= AVX512_BF16 && type == BFLOAT16; }
};

template <class V, int TYPE>
INLINE void dense_type(const void* weight, int64_t k, int64_t first, int count, const float* x,
                       float* y) {
  using floats = typename V::floats;
  const int64_t whole = k / V::LANES * V::LANES;
  for (int c = 0; c < count; c += COLUMNS_AT_ONCE) {
    int64_t row[COLUMNS_AT_ONCE];
    floats sum[COLUMNS_AT_ONCE];
    for (int i = 0; i < COLUMNS_AT_ONCE; i++) {
      row[i] = (first + std::min(c + i, count - 1)) * k;
      sum[i] = floats{};
    }
    for (int64_t at = 0; at < whole; at += V::LANES) {
      floats a;
      load<FLOAT32>(x, at, a);
      for (int i = 0; i < COLUMNS_AT_ONCE; i++) {
        floats w;
        load<TYPE>(weight, row[i] + at, w);
        sum[i] += a * w;
      }
    }
    for (int i = 0; i < COLUMNS_AT_ONCE && c + i < count; i++) {
      float tail = 0;
      for (int64_t at = whole; at < k; at++) tail += x[at] * load_number(weight, TYPE, row[i] + at);
      y[c + i] = reduce_add(sum[i]) + tail;
    }
  }
}

template <class V>
INLINE void dense_body(const void* weight, int64_t k, int64_t first, int count, const float* x,
                       int type, float* y) {
  if (type == FLOAT32) return dense_type<V, FLOAT32>(weight, k, first, count, x, y);
  dense_type<V, BFLOAT16>(weight, k, first, count, x, y);
}

#define DENSE(NAME, TARGET, V)                                                                    \
  TARGET inline void dense_##NAME(const void* w, int64_t k, int64_t first, int n, const float* x, \
                                  int type, float* y) {                                           \
    dense_body<V>(w, k, first, n, x, type, y);                                                    \
  }

DENSE(plain, , Narrow)
#ifdef X86
DENSE(avx2, AVX2_TARGET, Middle)
DENSE(avx512, AVX512_TARGET, Wide)
#endif

#ifdef X86
// Some columns of a bfloat16 weight by one row of bfloat16 x, with the processor's own products.
BF16_TARGET inline void dense_bfloat16(const uint16_t* weight, int64_t k, int64_t first, int count,
                                       const uint16_t* x, float* y) {
  const int64_t whole = k / 32 * 32;
  const __mmask32 tail = __mmask32((uint64_t(1) << (k - whole)) - 1);
  for (int c = 0; c < count; c += COLUMNS_AT_ONCE) {
    const uint16_t* row[COLUMNS_AT_ONCE];
    __m512 sum[COLUMNS_AT_ONCE];
    for (int i = 0; i < COLUMNS_AT_ONCE; i++) {
      row[i] = weight + (first + std::min(c + i, count - 1)) * k;
      sum[i] = _mm512_setzero_ps();
    }
    for (int64_t at = 0; at < whole; at += 32) {
      const __m512bh a = (__m512bh)_mm512_loadu_si512(x + at);
      for (int i = 0; i < COLUMNS_AT_ONCE; i++)
        sum[i] = _mm512_dpbf16_ps(sum[i], (__m512bh)_mm512_loadu_si512(row[i] + at), a);
    }
    if (tail) {
      const __m512bh a = (__m512bh)_mm512_maskz_loadu_epi16(tail, x + whole);
      for (int i = 0; i < COLUMNS_AT_ONCE; i++)
        sum[i] =
            _mm512_dpbf16_ps(sum[i], (__m512bh)_mm512_maskz_loadu_epi16(tail, row[i] + whole), a);
    }
    for (int i = 0; i < COLUMNS_AT_ONCE && c + i < count; i++)
      y[c + i] = _mm512_reduce_add_ps(sum[i]);
  }
}
#endif

// y [count] = columns `first` and on of x [k] * W; `x_bf16` is x in bfloat16, where the weight uses
// that. A column's product is the same whatever columns are beside it.
inline void dense(const Dense& w, int64_t first, int count, const float* x, const uint16_t* x_bf16,
                  float* y) {
#ifdef X86
  if (w.uses_bf16())
    return dense_bfloat16(static_cast<const uint16_t*>(w.weight), w.k, first, count, x_bf16, y);
#endif
  (void)x_bf16;
  DISPATCH(dense, w.isa, w.weight, w.k, first, count, x, w.type, y);
}

}  // namespace gptq
