// What gptq_gemm does where there are no products of bfloat16.

#pragma once

#include "interface.h"

namespace gptq {

// y[i] = x @ W[i].T + bias of linears that read x alike, in whole numbers by AVX2: x and y of `type`.
// Returns 0, or 1 where memory is short.
int gemm_int16(const GptqLinear* const* linears, void* const* y, int count, const void* x,
               int64_t m, int type, int threads);

}  // namespace gptq
