// Rows of x rounded to 8 bits, by packed layers: y = x @ W.T + bias with integer products (AVX512-VNNI).
//
// The weight is as exact as ever; x is rounded, each segment of each row (at most 256 features of one
// group) to 127 steps of its own greatest value. vpdpbusd multiplies four codes by four of those at once:
// of a word's codes it takes (j, j + n, j + 2n, j + 3n), n a quarter of its rows, which one shift and one
// mask put into four bytes. A segment's sum, exact in int32, is then s * t * (sum - z * sum(a)), t the step.

#include "gptq_cpu.h"

#include <algorithm>
#include <cmath>

#ifdef _OPENMP
#include <omp.h>
#endif

using namespace gptq;

#ifdef X86

#define VNNI_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni" WIDE)))

namespace {

constexpr int CHUNK = 64;  // rows of x that one piece of work takes

// Rows of x, rounded: four bytes for each product of four, and each segment's step and sum.
struct Rounded {
  int32_t* fours;  // [m][stride]
  float* steps;    // [m][segments]
  float* sums;     // [m][segments], in steps
  int64_t stride;
};

size_t bytes_of(const GptqLayer& layer, int64_t m) {
  return size_t(m) * (size_t(layer.units) * unit_rows(layer.bits) + 8 * size_t(layer.segments));
}

// Round row `m` of x; in the order the words are taken apart.
VNNI_TARGET void round_row(const GptqLayer& layer, const uint16_t* x, int64_t m, const Rounded& to) {
  const int rows = unit_rows(layer.bits), whole = layer.bits == 3 ? 16 : rows, quarter = whole / 4;
  int8_t* out = reinterpret_cast<int8_t*>(to.fours + m * to.stride);
  const int32_t* row = layer.rows;
  x += m * layer.in_features;
  for (int segment = 0; segment < layer.segments; segment++) {
    const int count = layer.segment_units[segment] * rows;
    float values[256 + 32];
    float most = 0;
    bool finite = true;
    for (int i = 0; i < count; i++) {
      values[i] = row[i] < 0 ? 0.0f : from_bfloat16(x[row[i]]);
      finite &= std::isfinite(values[i]);
      most = std::max(most, std::fabs(values[i]));
    }
    if (!finite) std::fill(values, values + count, 0.0f);  // the step alone passes it on
    const float step = finite ? most / 127.0f : NAN, per = finite && most > 0 ? 127.0f / most : 0.0f;
    int sum = 0;
    for (int first = 0; first < count; first += whole)
      for (int j = 0; j < quarter; j++)
        for (int b = 0; b < 4; b++) {
          const int value = int(std::nearbyint(values[first + j + b * quarter] * per));
          *out++ = int8_t(value);
          sum += value;
        }
    to.steps[m * layer.segments + segment] = step;
    to.sums[m * layer.segments + segment] = float(sum);
    row += count;
  }
}

// M rows of x by one tile: y [M][COLUMNS].
template <int BITS, int M>
VNNI_TARGET void multiply(const GptqLayer& layer, int64_t tile, int64_t m, const Rounded& from, float* y) {
  constexpr int per_word = BITS == 3 ? 3 : 1, fours = BITS == 3 ? 8 : 8 / BITS, C = COLUMNS / LANES;
  constexpr int width = BITS == 3 ? 2 : BITS;
  const __m512i mask = _mm512_set1_epi8(char((1 << width) - 1));
  const __m512i even = _mm512_set1_epi32(0x00040004), odd = _mm512_set1_epi32(0x04000400);
  const uint32_t* word = layer.words + tile * layer.units * per_word * COLUMNS;
  const int32_t* x = from.fours + m * from.stride;
  __m512 total[M][C];
  for (int i = 0; i < M; i++)
    for (int c = 0; c < C; c++) total[i][c] = _mm512_setzero_ps();
  for (int segment = 0; segment < layer.segments; segment++) {
    __m512i sum[M][C];
    for (int i = 0; i < M; i++)
      for (int c = 0; c < C; c++) sum[i][c] = _mm512_setzero_si512();
    for (int unit = 0; unit < layer.segment_units[segment]; unit++) {
      for (int i = 0; i < 4 * per_word; i++)
        _mm_prefetch(reinterpret_cast<const char*>(word + 1024 + 16 * i), _MM_HINT_T0);
      __m512i v[per_word][C];
      for (int i = 0; i < per_word; i++)
        for (int c = 0; c < C; c++) v[i][c] = _mm512_loadu_si512(word + i * COLUMNS + c * LANES);
#pragma GCC unroll 8
      for (int four = 0; four < fours; four++) {
        __m512i codes[C];
        for (int c = 0; c < C; c++) {
          if constexpr (BITS == 3) {
            const int half = four / 4, j = four % 4, bit = 8 * half + j;
            codes[c] = _mm512_and_si512(_mm512_srli_epi32(v[half][c], 2 * j), mask);
            codes[c] = _mm512_ternarylogic_epi32(_mm512_rorv_epi32(v[2][c], _mm512_set1_epi32((bit + 30) % 32)), even, codes[c], 0xEA);
            codes[c] = _mm512_ternarylogic_epi32(_mm512_rorv_epi32(v[2][c], _mm512_set1_epi32((bit + 26) % 32)), odd, codes[c], 0xEA);
          } else {
            codes[c] = _mm512_and_si512(_mm512_srli_epi32(v[0][c], BITS * four), mask);
          }
        }
        for (int i = 0; i < M; i++) {
          const __m512i a = _mm512_set1_epi32(x[i * from.stride + four]);
          for (int c = 0; c < C; c++) sum[i][c] = _mm512_dpbusd_epi32(sum[i][c], codes[c], a);
        }
      }
      word += per_word * COLUMNS;
      x += fours;
    }
    const int64_t at = (tile * layer.groups + layer.segment_group[segment]) * COLUMNS;
    for (int c = 0; c < C; c++) {
      floats zeros, scales;
      load_zeros(layer, at + c * LANES, zeros);
      load_scales(layer, at + c * LANES, scales);
      for (int i = 0; i < M; i++) {
        const int64_t which = (m + i) * layer.segments + segment;
        const __m512 exact = _mm512_fnmadd_ps((__m512)zeros, _mm512_set1_ps(from.sums[which]), _mm512_cvtepi32_ps(sum[i][c]));
        total[i][c] = _mm512_fmadd_ps(_mm512_mul_ps((__m512)scales, _mm512_set1_ps(from.steps[which])), exact, total[i][c]);
      }
    }
  }
  for (int i = 0; i < M; i++)
    for (int c = 0; c < C; c++) _mm512_storeu_ps(y + i * COLUMNS + c * LANES, total[i][c]);
}

template <int BITS>
void multiply_rows(const GptqLayer& layer, int64_t tile, int64_t m, int count, const Rounded& from, float* y) {
  if (count == 4) return multiply<BITS, 4>(layer, tile, m, from, y);
  if (count == 3) return multiply<BITS, 3>(layer, tile, m, from, y);
  if (count == 2) return multiply<BITS, 2>(layer, tile, m, from, y);
  multiply<BITS, 1>(layer, tile, m, from, y);
}

void multiply_bits(const GptqLayer& layer, int64_t tile, int64_t m, int count, const Rounded& from, float* y) {
  switch (layer.bits) {
    case 2: return multiply_rows<2>(layer, tile, m, count, from, y);
    case 3: return multiply_rows<3>(layer, tile, m, count, from, y);
    case 4: return multiply_rows<4>(layer, tile, m, count, from, y);
    default: return multiply_rows<8>(layer, tile, m, count, from, y);
  }
}

thread_local Scratch scratch;

}  // namespace

#endif

extern "C" {

// y [m][N] = x [m][K] @ W.T + bias, both bfloat16, x rounded to 8 bits. The processor must have
// AVX512-VNNI. Returns 0, or 1 where memory is short.
int gptq_int8(const GptqLayer* layer, const void* x, void* y, int64_t m, int threads) {
#ifdef X86
  const int64_t tiles = (layer->out_features + COLUMNS - 1) / COLUMNS, chunks = (m + CHUNK - 1) / CHUNK;
  char* memory = static_cast<char*>(scratch.get(bytes_of(*layer, m)));
  if (!memory) return m != 0;
  const int64_t stride = int64_t(layer->units) * unit_rows(layer->bits) / 4;
  float* steps = reinterpret_cast<float*>(memory + m * stride * 4);
  const Rounded rounded{reinterpret_cast<int32_t*>(memory), steps, steps + m * layer->segments, stride};
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < m; row++) round_row(*layer, static_cast<const uint16_t*>(x), row, rounded);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t piece = 0; piece < tiles * chunks; piece++) {
    const int64_t tile = piece / chunks, first = piece % chunks * CHUNK, last = std::min(first + CHUNK, m);
    alignas(64) float sums[ROWS * COLUMNS];
    for (int64_t row = first; row < last; row += ROWS) {
      const int count = int(std::min<int64_t>(ROWS, last - row));
      multiply_bits(*layer, tile, row, count, rounded, sums);
      for (int i = 0; i < count; i++) store(*layer, tile, row + i, sums + i * COLUMNS, y, BFLOAT16);
    }
  }
  return 0;
#else
  (void)layer, (void)x, (void)y, (void)m, (void)threads;
  return 1;
#endif
}

}  // extern "C"
