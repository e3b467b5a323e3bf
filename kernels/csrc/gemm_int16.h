// What gptq_gemm does where there are no products of bfloat16.

#pragma once

#include "interface.h"
#include "simd.h"

namespace gptq {

// y[i] = x @ W[i].T + bias of linears that read x alike, in whole numbers: x and y of `type`.
// Returns 0, or 1 where memory is short.
int gemm_int16(const GptqLinear* const* linears, void* const* y, int count, const void* x,
               int64_t m, int type, int isa, int threads);

#ifdef X86
constexpr int BLOCK_ROWS = 6, BLOCK_VECTORS = 2, PANEL_COLUMNS = BLOCK_VECTORS * Middle::LANES;

// What a block of x is multiplied by, and how that is scaled.
struct BlockProduct {
  const uint32_t* x;      // [pairs][rows]
  const uint32_t* panel;  // [pairs][vectors]
  int pairs;
  const float* scales;  // [vectors]
  const float* steps;   // [rows]
  float* sums;          // [rows][COLUMNS]
  bool first;           // of the segments: sums begin at nothing
};

// sums += steps * scales * (x * panel), by vpmaddwd.
using BlockFunction = void(const BlockProduct&);
BlockFunction multiply_block;

// The one for an instruction set: by vpdpwssd where there is AVX-VNNI (avx_vnni.cpp).
BlockFunction* block_function(int isa);
#endif

}  // namespace gptq
