// y = x @ W.T + bias on a CPU, for a GPTQ weight that stays packed: w[n, k] = s[g, n] * (q[k, n] - z[g, n]).
//
// A plain C interface, loaded with ctypes: no Python and no torch header, so one library serves all of
// their versions. Everything is compiled for the plainest processor of its kind; functions for AVX2,
// AVX-512 and AVX512-BF16 carry a target attribute, and gptq_isa() says which of them may be called.
//
// Layout. Rows (the K of GPTQ) are sorted by group, and each group is filled up to whole units; a unit
// is what one word (three at 3 bits) holds for one column. Columns come in tiles of 64, the last one
// filled up. words[tile][unit][word][64], scales and zeros [tile][group][64]. `rows` says which feature
// of x each row multiplies, -1 for what fills up. A segment is at most 256 rows of one group: sums are
// scaled once a segment.
//
// Whole numbers. On processors with AMX, few rows of bfloat16 are taken in two bytes: vnni.cpp.
//
// bfloat16. A code q under the bits 0x4300 is the bfloat16 number 128 + q, so one shift and one vpternlog
// make pairs of weights of a word, and vdpbf16ps multiplies pairs: (j, j + half a word) at once. The
// segment's sum is then s * (sum - (128 + z) * sum(a)). An 8-bit code is taken as two nibbles, the
// upper one under 0x4500 as 2048 + 16 h. Products are exact; sums are float32.
//
// float32. Codes become floats, zeros are subtracted, and the sum is in float32: no cancellation.
//
// Many rows of x: in bfloat16, gemm.cpp. In float32 another library multiplies faster than this one;
// gptq_unpack writes the weight of some tiles, in x's own order, for it.

#include "gemv.h"

#ifdef _OPENMP
#include <omp.h>
#endif

using namespace gptq;

namespace {

constexpr int CHUNK = 64;  // rows of x that one piece of work takes

template <int BITS>
struct Unit {
  static constexpr int words = BITS == 3 ? 3 : 1;
  static constexpr int rows = BITS == 3 ? 32 : 32 / BITS;
};


}  // namespace

extern "C" {

// The best code this processor runs.
int gptq_isa() {
#ifdef X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return !__builtin_cpu_supports("avx512bf16")                      ? AVX512
           : gptq_amx() && __builtin_cpu_supports("avx512vnni") ? TWO_BYTES
                                                                      : BF16;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return AVX2;
#endif
  return PLAIN;
}

}  // extern "C"

namespace {

// One row's codes of 16 columns, from the words of their unit.
template <int BITS>
INLINE void load_codes(const uint32_t* words, int row, floats& codes) {
  uints word;
  if constexpr (BITS == 3) {
    uints high;
    memcpy(&word, words + row / 16 * COLUMNS, sizeof word);
    memcpy(&high, words + 2 * COLUMNS, sizeof high);
    const int bit = 8 * (row / 16) + row % 8 + (row % 16 >= 8 ? 16 : 0);
    word = (word >> (2 * (row % 16)) & 3) | (high >> bit & 1) << 2;
  } else {
    memcpy(&word, words, sizeof word);
    word = word >> (BITS * row) & ((1u << BITS) - 1);
  }
  ints code;
  memcpy(&code, &word, sizeof code);
  codes = __builtin_convertvector(code, floats);
}

// M rows of x by one tile in float32; x is [M][stride], in the order of `rows`. C vectors of columns
// are held at once.
template <int BITS, int M, int C>
INLINE void tile_float32(const GptqLayer& layer, int64_t tile, const float* x, int64_t stride, float* y) {
  constexpr int rows = Unit<BITS>::rows, per_word = Unit<BITS>::words;
  const uint32_t* words = layer.words + tile * layer.units * per_word * COLUMNS;
  for (int first = 0; first < COLUMNS / LANES; first += C) {
    floats total[M][C];
    for (int m = 0; m < M; m++)
      for (int c = 0; c < C; c++) total[m][c] = floats{};
    const uint32_t* word = words + first * LANES;
    const float* a = x;
    for (int segment = 0; segment < layer.segments; segment++) {
      const int64_t at = (tile * layer.groups + layer.segment_group[segment]) * COLUMNS + first * LANES;
      floats sum[M][C], zeros[C];
      for (int c = 0; c < C; c++) {
        load_zeros(layer, at + c * LANES, zeros[c]);
        for (int m = 0; m < M; m++) sum[m][c] = floats{};
      }
      for (int unit = 0; unit < layer.segment_units[segment]; unit++) {
#pragma GCC unroll 32
        for (int row = 0; row < rows; row++) {
          for (int c = 0; c < C; c++) {
            floats weight;
            load_codes<BITS>(word + c * LANES, row, weight);
            weight -= zeros[c];
            for (int m = 0; m < M; m++) sum[m][c] += a[m * stride + row] * weight;
          }
        }
        word += per_word * COLUMNS;
        a += rows;
      }
      for (int c = 0; c < C; c++) {
        floats scales;
        load_scales(layer, at + c * LANES, scales);
        for (int m = 0; m < M; m++) total[m][c] += scales * sum[m][c];
      }
    }
    for (int m = 0; m < M; m++)
      for (int c = 0; c < C; c++) memcpy(y + m * COLUMNS + (first + c) * LANES, &total[m][c], sizeof(floats));
  }
}

// One tile's weight, rounded once, into w [K][stride], in x's own order of features.
template <int BITS>
INLINE void unpack_tile(const GptqLayer& layer, int64_t tile, void* w, int64_t stride, int type) {
  constexpr int rows = Unit<BITS>::rows, per_word = Unit<BITS>::words, C = COLUMNS / LANES;
  const uint32_t* word = layer.words + tile * layer.units * per_word * COLUMNS;
  const int32_t* row = layer.rows;
  for (int segment = 0; segment < layer.segments; segment++) {
    const int64_t at = (tile * layer.groups + layer.segment_group[segment]) * COLUMNS;
    floats scales[C], zeros[C];
    for (int c = 0; c < C; c++) {
      load_scales(layer, at + c * LANES, scales[c]);
      load_zeros(layer, at + c * LANES, zeros[c]);
    }
    for (int unit = 0; unit < layer.segment_units[segment]; unit++) {
#pragma GCC unroll 32
      for (int i = 0; i < rows; i++) {
        if (row[i] < 0) continue;
        for (int c = 0; c < C; c++) {
          floats weight;
          load_codes<BITS>(word + c * LANES, i, weight);
          weight = (weight - zeros[c]) * scales[c];
          const int64_t to = row[i] * stride + c * LANES;
          if (type == FLOAT32) {
            memcpy(static_cast<float*>(w) + to, &weight, sizeof weight);
          } else {
            uints bits;
            memcpy(&bits, &weight, sizeof bits);
            bits = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
            const halves rounded = __builtin_convertvector(bits, halves);
            memcpy(static_cast<uint16_t*>(w) + to, &rounded, sizeof rounded);
          }
        }
      }
      word += per_word * COLUMNS;
      row += rows;
    }
  }
}

template <int BITS>
void unpack_plain(const GptqLayer& layer, int64_t tile, void* w, int64_t stride, int type) {
  unpack_tile<BITS>(layer, tile, w, stride, type);
}

template <int BITS, int M>
void tile_plain(const GptqLayer& layer, int64_t tile, const float* x, int64_t stride, float* y) {
  tile_float32<BITS, M, 1>(layer, tile, x, stride, y);
}

#ifdef X86
template <int BITS, int M>
AVX2_TARGET void tile_avx2(const GptqLayer& layer, int64_t tile, const float* x, int64_t stride, float* y) {
  tile_float32<BITS, M, 1>(layer, tile, x, stride, y);
}

template <int BITS, int M>
AVX512_TARGET void tile_avx512(const GptqLayer& layer, int64_t tile, const float* x, int64_t stride, float* y) {
  tile_float32<BITS, M, 4>(layer, tile, x, stride, y);
}

template <int BITS>
AVX2_TARGET void unpack_avx2(const GptqLayer& layer, int64_t tile, void* w, int64_t stride, int type) {
  unpack_tile<BITS>(layer, tile, w, stride, type);
}

template <int BITS>
AVX512_TARGET void unpack_avx512(const GptqLayer& layer, int64_t tile, void* w, int64_t stride, int type) {
  unpack_tile<BITS>(layer, tile, w, stride, type);
}

// M rows of x by C vectors of a tile's columns in bfloat16, from vector FIRST on; x is [M][stride] pairs, sums
// [M][segments]. Where one row waits for vdpbf16ps, and not for its weights to be unpacked as at 3 bits, two
// chains of sums hide the latency. More rows have the same two, so that a row's sums do not depend on the
// rows beside it: three and four then take half of the columns at a time, for which there are registers.
template <int BITS, int M, int C, int FIRST>
BF16_TARGET void columns_bfloat16(const GptqLayer& layer, int64_t tile, const uint32_t* x, int64_t stride,
                                  const float* sums, float* y) {
  constexpr int per_word = Unit<BITS>::words, pairs = Unit<BITS>::rows / 2, CHAINS = BITS == 3 ? 1 : 2;
  constexpr uint32_t mask = BITS == 2 || BITS == 3 ? 0x00030003 : 0x000f000f;
  constexpr float offset = BITS == 8 ? 128 + 2048 : 128;
  const __m512i low = _mm512_set1_epi32(mask), high = _mm512_set1_epi32(0x00040004);
  const __m512i base = _mm512_set1_epi32(0x43004300), upper = _mm512_set1_epi32(0x45004500);
  const uint32_t* word = layer.words + tile * layer.units * per_word * COLUMNS + FIRST * LANES;
  // The first of two halves fetches for both: what the second one reads is then in a cache.
  constexpr int fetched = FIRST == 0 ? COLUMNS / LANES : C;
  floats total[M][C];
  for (int m = 0; m < M; m++)
    for (int c = 0; c < C; c++) total[m][c] = floats{};
  for (int segment = 0; segment < layer.segments; segment++) {
    __m512 sum[CHAINS][M][C];
    for (int i = 0; i < CHAINS; i++)
      for (int m = 0; m < M; m++)
        for (int c = 0; c < C; c++) sum[i][m][c] = _mm512_setzero_ps();
    for (int unit = 0; unit < layer.segment_units[segment]; unit++) {
      for (int i = 0; i < per_word; i++)
        for (int c = 0; c < fetched; c++)
          _mm_prefetch(reinterpret_cast<const char*>(word + 1024 + i * COLUMNS + c * LANES), _MM_HINT_T0);
      __m512i v[per_word][C];
      for (int i = 0; i < per_word; i++)
        for (int c = 0; c < C; c++) v[i][c] = _mm512_loadu_si512(word + i * COLUMNS + c * LANES);
#pragma GCC unroll 16
      for (int pair = 0; pair < pairs; pair++) {
        __m512i w[C];
        for (int c = 0; c < C; c++) {
          if constexpr (BITS == 3) {
            const int half = pair / 8, j = pair % 8;
            w[c] = _mm512_ternarylogic_epi32(_mm512_srli_epi32(v[half][c], 2 * j), low, base, 0xEA);
            w[c] = _mm512_ternarylogic_epi32(_mm512_rorv_epi32(v[2][c], _mm512_set1_epi32((8 * half + j + 30) % 32)), high, w[c], 0xEA);
          } else {
            w[c] = _mm512_ternarylogic_epi32(_mm512_srli_epi32(v[0][c], BITS * pair), low, base, 0xEA);
          }
        }
        for (int m = 0; m < M; m++) {
          const __m512bh a = (__m512bh)_mm512_set1_epi32(x[m * stride + pair]);
          for (int c = 0; c < C; c++)
            sum[pair % CHAINS][m][c] = _mm512_dpbf16_ps(sum[pair % CHAINS][m][c], (__m512bh)w[c], a);
        }
        if constexpr (BITS == 8) {
          for (int c = 0; c < C; c++)
            w[c] = _mm512_ternarylogic_epi32(_mm512_srli_epi32(v[0][c], BITS * pair + 4), low, upper, 0xEA);
          for (int m = 0; m < M; m++) {
            const __m512bh a = (__m512bh)_mm512_set1_epi32(x[m * stride + pair]);
            for (int c = 0; c < C; c++)
              sum[(pair + 1) % CHAINS][m][c] = _mm512_dpbf16_ps(sum[(pair + 1) % CHAINS][m][c], (__m512bh)w[c], a);
          }
        }
      }
      word += per_word * COLUMNS;
      x += pairs;
    }
    const int64_t at = (tile * layer.groups + layer.segment_group[segment]) * COLUMNS + FIRST * LANES;
    for (int c = 0; c < C; c++) {
      __m512 scales, zeros;
      load_tables(layer, at + c * LANES, scales, zeros);
      zeros += offset;
      for (int m = 0; m < M; m++) {
        floats products = (floats)sum[0][m][c];
        if constexpr (CHAINS == 2) products += (floats)sum[1][m][c];
        total[m][c] += scales * (products - zeros * sums[m * layer.segments + segment]);
      }
    }
  }
  for (int m = 0; m < M; m++)
    for (int c = 0; c < C; c++) memcpy(y + m * COLUMNS + (FIRST + c) * LANES, &total[m][c], sizeof(floats));
}

// The same by a whole tile.
template <int BITS, int M>
BF16_TARGET void tile_bfloat16(const GptqLayer& layer, int64_t tile, const uint32_t* x, int64_t stride,
                               const float* sums, float* y) {
  constexpr int C = M <= 2 || BITS == 3 ? 4 : 2;
  columns_bfloat16<BITS, M, C, 0>(layer, tile, x, stride, sums, y);
  if constexpr (C == 2) columns_bfloat16<BITS, M, C, C>(layer, tile, x, stride, sums, y);
}
#endif

INLINE float feature(const void* x, int type, int64_t at) {
  if (type == FLOAT32) return static_cast<const float*>(x)[at];
  return from_bfloat16(static_cast<const uint16_t*>(x)[at]);
}

INLINE uint16_t rounded(const void* x, int type, int64_t at) {
  if (type == BFLOAT16) return static_cast<const uint16_t*>(x)[at];
  return to_bfloat16(static_cast<const float*>(x)[at]);
}

}  // namespace

namespace gptq {

// The words of one gathered row.
static int64_t stride_of(const GptqLayer& layer, int isa) {
  const int64_t padded = int64_t(layer.units) * unit_rows(layer.bits);
  return isa == ONE_BYTE ? padded / 4 : isa >= BF16 ? padded / 2 : padded;
}

size_t gathered_bytes(const GptqLayer& layer, int isa, int64_t m) {
  return size_t(m) * 4 * (stride_of(layer, isa) + 2 * layer.segments);
}

Gathered gathered_at(const GptqLayer& layer, int isa, int64_t m, void* memory) {
  const int64_t stride = stride_of(layer, isa);
  float* values = static_cast<float*>(memory);
  float* sums = values + m * stride;
  return {values, static_cast<uint32_t*>(memory), sums, sums + m * layer.segments, stride, isa};
}

void gather_row(const GptqLayer& layer, const void* x, int type, int64_t m, const Gathered& to) {
#ifdef X86
  if (to.isa > BF16) return split_row(layer, x, type, m, to);
#endif
  const int rows = unit_rows(layer.bits), half = layer.bits == 3 ? 8 : rows / 2;
  const int64_t from = m * layer.in_features;
  if (to.isa != BF16) {
    float* out = to.values + m * to.stride;
    for (int64_t i = 0; i < layer.units * rows; i++)
      out[i] = layer.rows[i] < 0 ? 0.0f : feature(x, type, from + layer.rows[i]);
    return;
  }
  uint32_t* out = to.pairs + m * to.stride;
  const int32_t* row = layer.rows;
  for (int segment = 0; segment < layer.segments; segment++) {
    float sum = 0;
    for (int half_units = layer.segment_units[segment] * (rows / (2 * half)); half_units > 0; half_units--) {
      for (int j = 0; j < half; j++) {
        const uint16_t a = row[j] < 0 ? 0 : rounded(x, type, from + row[j]);
        const uint16_t b = row[j + half] < 0 ? 0 : rounded(x, type, from + row[j + half]);
        *out++ = a | uint32_t(b) << 16;
        sum += from_bfloat16(a) + from_bfloat16(b);
      }
      row += 2 * half;
    }
    to.sums[m * layer.segments + segment] = sum;
  }
}

}  // namespace gptq

namespace {

template <int BITS, int M>
void multiply(const GptqLayer& layer, int64_t tile, int64_t m, const Gathered& x, float* y) {
#ifdef X86
  if (x.isa == BF16)
    return tile_bfloat16<BITS, M>(layer, tile, x.pairs + m * x.stride, x.stride, x.sums + m * layer.segments, y);
  if (x.isa == AVX512) return tile_avx512<BITS, M>(layer, tile, x.values + m * x.stride, x.stride, y);
  if (x.isa == AVX2) return tile_avx2<BITS, M>(layer, tile, x.values + m * x.stride, x.stride, y);
#endif
  tile_plain<BITS, M>(layer, tile, x.values + m * x.stride, x.stride, y);
}

template <int BITS>
void multiply_rows(const GptqLayer& layer, int64_t tile, int64_t m, int count, const Gathered& x, float* y) {
  if (count == 4) return multiply<BITS, 4>(layer, tile, m, x, y);
  if (count == 3) return multiply<BITS, 3>(layer, tile, m, x, y);
  if (count == 2) return multiply<BITS, 2>(layer, tile, m, x, y);
  multiply<BITS, 1>(layer, tile, m, x, y);
}

}  // namespace

namespace gptq {

void multiply_bits(const GptqLayer& layer, int64_t tile, int64_t m, int count, const Gathered& x, float* y) {
#ifdef X86
  if (x.isa > BF16) return multiply_bytes(layer, tile, m, count, x, y);
#endif
  switch (layer.bits) {
    case 2: return multiply_rows<2>(layer, tile, m, count, x, y);
    case 3: return multiply_rows<3>(layer, tile, m, count, x, y);
    case 4: return multiply_rows<4>(layer, tile, m, count, x, y);
    default: return multiply_rows<8>(layer, tile, m, count, x, y);
  }
}

void store(const GptqLayer& layer, int64_t tile, int64_t m, const float* from, void* y, int type) {
  const int64_t first = tile * COLUMNS, left = layer.out_features - first;
  const int count = left < COLUMNS ? int(left) : COLUMNS;
  const int64_t to = m * layer.out_features + first;
  for (int c = 0; c < count; c++) {
    const float value = layer.bias ? from[c] + layer.bias[first + c] : from[c];
    if (type == FLOAT32)
      static_cast<float*>(y)[to + c] = value;
    else
      static_cast<uint16_t*>(y)[to + c] = to_bfloat16(value);
  }
}

}  // namespace gptq

namespace {

template <int BITS>
void unpack(const GptqLayer& layer, int64_t tile, void* w, int64_t stride, int type, int isa) {
#ifdef X86
  if (isa >= AVX512) return unpack_avx512<BITS>(layer, tile, w, stride, type);
  if (isa == AVX2) return unpack_avx2<BITS>(layer, tile, w, stride, type);
#endif
  (void)isa;
  unpack_plain<BITS>(layer, tile, w, stride, type);
}

void unpack_bits(const GptqLayer& layer, int64_t tile, void* w, int64_t stride, int type, int isa) {
  switch (layer.bits) {
    case 2: return unpack<2>(layer, tile, w, stride, type, isa);
    case 3: return unpack<3>(layer, tile, w, stride, type, isa);
    case 4: return unpack<4>(layer, tile, w, stride, type, isa);
    default: return unpack<8>(layer, tile, w, stride, type, isa);
  }
}

thread_local Scratch scratch;

}  // namespace

extern "C" {

// y [m][N] = x [m][K] @ W.T + bias, both of `type`, by the code for `isa`, which this processor must
// run. Returns 0, or 1 where memory is short.
int gptq_matmul(const GptqLayer* layer, const void* x, void* y, int64_t m, int type, int isa, int threads) {
  if (m == 0) return 0;
  const int64_t tiles = (layer->out_features + COLUMNS - 1) / COLUMNS;
  const int64_t chunks = (m + CHUNK - 1) / CHUNK;
  void* memory = scratch.get(gathered_bytes(*layer, isa, m));
  if (!memory) return 1;
  const Gathered gathered = gathered_at(*layer, isa, m, memory);
  // A few rows are gathered by the caller: a barrier costs more, above all on a busy machine.
#pragma omp parallel for num_threads(threads) schedule(static) if (m > ROWS)
  for (int64_t row = 0; row < m; row++) gather_row(*layer, x, type, row, gathered);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t piece = 0; piece < tiles * chunks; piece++) {
    const int64_t tile = piece / chunks, first = piece % chunks * CHUNK;
    const int64_t last = first + CHUNK < m ? first + CHUNK : m;
    alignas(64) float sums[ROWS * COLUMNS];
    for (int64_t row = first; row < last; row += ROWS) {
      const int count = last - row < ROWS ? int(last - row) : ROWS;
      multiply_bits(*layer, tile, row, count, gathered, sums);
      for (int i = 0; i < count; i++) store(*layer, tile, row + i, sums + i * COLUMNS, y, type);
    }
  }
  return 0;
}

// The transposed weight of some tiles, w [K][tiles * 64] of `type`, rounded once.
void gptq_unpack(const GptqLayer* layer, int64_t first, int64_t tiles, void* w, int type, int isa, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t tile = 0; tile < tiles; tile++) {
    const int64_t offset = tile * COLUMNS * (type == FLOAT32 ? 4 : 2);
    unpack_bits(*layer, first + tile, static_cast<char*>(w) + offset, tiles * COLUMNS, type, isa);
  }
}

}  // extern "C"
