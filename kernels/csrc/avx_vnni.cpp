// y[M, 64] = x[M, K] @ W[64, K].T in whole numbers, by vpdpbusd on vectors of 32 bytes: what vnni.cpp
// does, for processors that have AVX-VNNI and no AVX-512; and many rows by vpdpwssd, as
// gemm_int16.cpp has them. One instruction does what takes AVX2 two, and sums of bytes need no 16
// bits on their way (maddubs.cpp).
//
// Codes of 8 bits are maddubs.cpp's: by pairs of rows one row of x takes less.
//
// AVX-VNNI and AVX-512 encode these products differently. Both are compiled, so that processors with
// AVX512-VNNI can run, and measure, what the others do.
//
// Registers, of 16, one row by two bytes: sums 2 * C = 8, codes C = 4, a mask, x; at 3 bits C is 2.

#include "gemm_int16.h"
#include "int16.h"

using namespace gptq;

#ifdef X86

namespace {

constexpr int L = Middle::LANES;

namespace vex {
#define VNNI256 __attribute__((target("avx2,fma,f16c,avxvnni")))
#define DPBUSD _mm256_dpbusd_avx_epi32
#define DPWSSD _mm256_dpwssd_avx_epi32
#include "vnni256.h"
#undef VNNI256
#undef DPBUSD
#undef DPWSSD
}  // namespace vex

namespace evex {
#define VNNI256 __attribute__((target("avx2,fma,f16c,avx512f,avx512vl,avx512vnni")))
#define DPBUSD _mm256_dpbusd_epi32
#define DPWSSD _mm256_dpwssd_epi32
#include "vnni256.h"
#undef VNNI256
#undef DPBUSD
#undef DPWSSD
}  // namespace evex

}  // namespace

namespace gptq {

void multiply_tile_vnni256(const GptqLinear& linear, int64_t tile, int64_t m, int count,
                           const PermutedActivations& x, float* y) {
  if (find_vnni256() == Vnni256::VEX)
    multiply_by<vex::Code>(linear, tile, m, count, x, y);
  else
    multiply_by<evex::Code>(linear, tile, m, count, x, y);
}

BlockFunction* block_function(int isa) {
  if (!has_vnni256(isa)) return multiply_block;
  return find_vnni256() == Vnni256::VEX ? vex::multiply_block : evex::multiply_block;
}

}  // namespace gptq

#endif
