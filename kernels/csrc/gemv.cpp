// y[M, N] = x[M, K] @ W[N, K].T + bias for few rows of x and a packed W:
// w[n, k] = s[g, n] * (q[k, n] - z[g, n]). How W lies in memory is drawn in gemv.h.
//
// BF16. A code q under the bits 0x4300 is the bfloat16 number 128 + q, so one shift and one
// vpternlogd make a pair of weights of each of 16 words, and vdpbf16ps multiplies pairs:
//
//   word    q7 q6 q5 q4 | q3 q2 q1 q0            4 bits, 8 rows
//   pair j  0x4300|q[j+4] , 0x4300|q[j]          word >> 4j & 0x000f000f | 0x43004300
//   x       a[j+4]        , a[j]
//
// A segment's sum is then s * (acc - (128 + z) * sum(a)). An 8-bit code is two nibbles, the upper
// one h under 0x4500 as 2048 + 16 h. Products are exact; sums are float32. Registers, of 32:
//
//   rows M                      1    2    3    4      at 3 bits  1   2   3   4
//   columns at a time          64   64   32   32                64  64  64  64
//   acc: chains * M * columns   8   16   12   16                 4   8  12  16
//   weights and words           8    8    4    4                16  16  16  16
//   x, masks                    3    3    3    3                 4   4   4   4
//
// FLOAT32. Codes become floats, zeros are subtracted, and the sum is in float32: no cancellation.
//
// INT16, INT8: vnni.cpp, maddubs.cpp. Many rows: gemm.cpp for bfloat16; for float32, gptq_unpack writes the
// weight of some tiles for another library, which multiplies faster than this one.

#include "gemv.h"
#include "team.h"

using namespace gptq;

namespace {

constexpr int CHUNK = 64;  // rows of x that one piece of work takes

// What one word, or three, hold for one column.
template <int BITS>
struct Unit {
  static constexpr int words = BITS == 3 ? 3 : 1;
  static constexpr int rows = BITS == 3 ? 32 : 32 / BITS;
};

// One row's codes of a vector of columns, from the words of their unit.
template <int BITS, class F>
INLINE void load_codes(const uint32_t* words, int row, F& codes) {
  using V = Vectors<sizeof(F)>;
  typename V::uints word;
  if constexpr (BITS == 3) {
    typename V::uints high;
    memcpy(&word, words + row / 16 * COLUMNS, sizeof word);
    memcpy(&high, words + 2 * COLUMNS, sizeof high);
    const int bit = 8 * (row / 16) + row % 8 + (row % 16 >= 8 ? 16 : 0);
    word = (word >> (2 * (row % 16)) & 3) | (high >> bit & 1) << 2;
  } else {
    memcpy(&word, words, sizeof word);
    word = word >> (BITS * row) & ((1u << BITS) - 1);
  }
  typename V::ints code;
  memcpy(&code, &word, sizeof code);
  codes = __builtin_convertvector(code, F);
}

// M rows of x by one tile in float32; x is [M][stride], in the order of `rows`. C vectors of
// columns are held at once.
template <class V, int BITS, int M, int C>
INLINE void tile_float32(const GptqLinear& linear, int64_t tile, const float* x, int64_t stride,
                         float* y) {
  using floats = typename V::floats;
  constexpr int LANES = V::LANES;
  constexpr int rows = Unit<BITS>::rows, per_word = Unit<BITS>::words;
  const uint32_t* words = linear.words + tile * linear.units * per_word * COLUMNS;
  for (int first = 0; first < COLUMNS / LANES; first += C) {
    floats total[M][C];
    for (int m = 0; m < M; m++)
      for (int c = 0; c < C; c++) total[m][c] = floats{};
    const uint32_t* word = words + first * LANES;
    const float* a = x;
    for (int segment = 0; segment < linear.segments; segment++) {
      const int64_t at =
          (tile * linear.groups + linear.segment_group[segment]) * COLUMNS + first * LANES;
      floats sum[M][C], zeros[C];
      for (int c = 0; c < C; c++) {
        load_zeros(linear, at + c * LANES, zeros[c]);
        for (int m = 0; m < M; m++) sum[m][c] = floats{};
      }
      for (int unit = 0; unit < linear.segment_units[segment]; unit++) {
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
        load_scales(linear, at + c * LANES, scales);
        for (int m = 0; m < M; m++) total[m][c] += scales * sum[m][c];
      }
    }
    for (int m = 0; m < M; m++)
      for (int c = 0; c < C; c++)
        memcpy(y + m * COLUMNS + (first + c) * LANES, &total[m][c], sizeof(floats));
  }
}

// One tile's weight, rounded once, into w [K][stride], in x's own order of features.
template <class V, int BITS>
INLINE void unpack_tile(const GptqLinear& linear, int64_t tile, void* w, int64_t stride, int type) {
  using floats = typename V::floats;
  using uints = typename V::uints;
  constexpr int LANES = V::LANES;
  constexpr int rows = Unit<BITS>::rows, per_word = Unit<BITS>::words, C = COLUMNS / LANES;
  const uint32_t* word = linear.words + tile * linear.units * per_word * COLUMNS;
  const int32_t* row = linear.rows;
  for (int segment = 0; segment < linear.segments; segment++) {
    const int64_t at = (tile * linear.groups + linear.segment_group[segment]) * COLUMNS;
    floats scales[C], zeros[C];
    for (int c = 0; c < C; c++) {
      load_scales(linear, at + c * LANES, scales[c]);
      load_zeros(linear, at + c * LANES, zeros[c]);
    }
    for (int unit = 0; unit < linear.segment_units[segment]; unit++) {
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
            const typename V::halves rounded = __builtin_convertvector(bits, typename V::halves);
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
void unpack_plain(const GptqLinear& linear, int64_t tile, void* w, int64_t stride, int type) {
  unpack_tile<Narrow, BITS>(linear, tile, w, stride, type);
}

template <int BITS, int M>
void tile_plain(const GptqLinear& linear, int64_t tile, const float* x, int64_t stride, float* y) {
  tile_float32<Narrow, BITS, M, (M == 1 ? 4 : 2)>(linear, tile, x, stride, y);
}

#ifdef X86
template <int BITS, int M>
AVX2_TARGET void tile_avx2(const GptqLinear& linear, int64_t tile, const float* x, int64_t stride,
                           float* y) {
  tile_float32<Middle, BITS, M, (M == 1 ? 4 : 2)>(linear, tile, x, stride, y);
}

template <int BITS, int M>
AVX512_TARGET void tile_avx512(const GptqLinear& linear, int64_t tile, const float* x,
                               int64_t stride, float* y) {
  tile_float32<Wide, BITS, M, 4>(linear, tile, x, stride, y);
}

template <int BITS>
AVX2_TARGET void unpack_avx2(const GptqLinear& linear, int64_t tile, void* w, int64_t stride,
                             int type) {
  unpack_tile<Middle, BITS>(linear, tile, w, stride, type);
}

template <int BITS>
AVX512_TARGET void unpack_avx512(const GptqLinear& linear, int64_t tile, void* w, int64_t stride,
                                 int type) {
  unpack_tile<Wide, BITS>(linear, tile, w, stride, type);
}

// M rows of x by C vectors of a tile's columns in bfloat16, from vector FIRST on; x is [M][stride]
// pairs, sums [M][segments]. Where one row waits for vdpbf16ps, and not for its weights to be
// unpacked as at 3 bits, two chains of sums hide the latency. More rows have the same two, so that
// a row's sums do not depend on the rows beside it: three and four then take half of the columns at
// a time, for which there are registers.
template <int BITS, int M, int C, int FIRST>
BF16_TARGET void columns_bfloat16(const GptqLinear& linear, int64_t tile, const uint32_t* x,
                                  int64_t stride, const float* sums, float* y) {
  constexpr int per_word = Unit<BITS>::words, pairs = Unit<BITS>::rows / 2,
                CHAINS = BITS == 3 ? 1 : 2;
  constexpr uint32_t mask = BITS == 2 || BITS == 3 ? 0x00030003 : 0x000f000f;
  constexpr float offset = BITS == 8 ? 128 + 2048 : 128;
  const __m512i low = _mm512_set1_epi32(mask), high = _mm512_set1_epi32(0x00040004);
  const __m512i base = _mm512_set1_epi32(0x43004300), upper = _mm512_set1_epi32(0x45004500);
  const uint32_t* word = linear.words + tile * linear.units * per_word * COLUMNS + FIRST * LANES;
  // The first of two halves fetches for both: what the second one reads is then in a cache.
  constexpr int fetched = FIRST == 0 ? COLUMNS / LANES : C;
  floats total[M][C];
  for (int m = 0; m < M; m++)
    for (int c = 0; c < C; c++) total[m][c] = floats{};
  for (int segment = 0; segment < linear.segments; segment++) {
    __m512 sum[CHAINS][M][C];
    for (int i = 0; i < CHAINS; i++)
      for (int m = 0; m < M; m++)
        for (int c = 0; c < C; c++) sum[i][m][c] = _mm512_setzero_ps();
    for (int unit = 0; unit < linear.segment_units[segment]; unit++) {
      for (int i = 0; i < per_word; i++)
        for (int c = 0; c < fetched; c++)
          _mm_prefetch(reinterpret_cast<const char*>(word + 1024 + i * COLUMNS + c * LANES),
                       _MM_HINT_T0);
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
            w[c] = _mm512_ternarylogic_epi32(
                _mm512_rorv_epi32(v[2][c], _mm512_set1_epi32((8 * half + j + 30) % 32)), high, w[c],
                0xEA);
          } else {
            w[c] =
                _mm512_ternarylogic_epi32(_mm512_srli_epi32(v[0][c], BITS * pair), low, base, 0xEA);
          }
        }
        for (int m = 0; m < M; m++) {
          const __m512bh a = (__m512bh)_mm512_set1_epi32(x[m * stride + pair]);
          for (int c = 0; c < C; c++)
            sum[pair % CHAINS][m][c] =
                _mm512_dpbf16_ps(sum[pair % CHAINS][m][c], (__m512bh)w[c], a);
        }
        if constexpr (BITS == 8) {
          for (int c = 0; c < C; c++)
            w[c] = _mm512_ternarylogic_epi32(_mm512_srli_epi32(v[0][c], BITS * pair + 4), low,
                                             upper, 0xEA);
          for (int m = 0; m < M; m++) {
            const __m512bh a = (__m512bh)_mm512_set1_epi32(x[m * stride + pair]);
            for (int c = 0; c < C; c++)
              sum[(pair + 1) % CHAINS][m][c] =
                  _mm512_dpbf16_ps(sum[(pair + 1) % CHAINS][m][c], (__m512bh)w[c], a);
          }
        }
      }
      word += per_word * COLUMNS;
      x += pairs;
    }
    const int64_t at =
        (tile * linear.groups + linear.segment_group[segment]) * COLUMNS + FIRST * LANES;
    for (int c = 0; c < C; c++) {
      __m512 scales, zeros;
      load_tables(linear, at + c * LANES, scales, zeros);
      zeros += offset;
      for (int m = 0; m < M; m++) {
        floats products = (floats)sum[0][m][c];
        if constexpr (CHAINS == 2) products += (floats)sum[1][m][c];
        total[m][c] += scales * (products - zeros * sums[m * linear.segments + segment]);
      }
    }
  }
  for (int m = 0; m < M; m++)
    for (int c = 0; c < C; c++)
      memcpy(y + m * COLUMNS + (FIRST + c) * LANES, &total[m][c], sizeof(floats));
}

// The same by a whole tile.
template <int BITS, int M>
BF16_TARGET void tile_bfloat16(const GptqLinear& linear, int64_t tile, const uint32_t* x,
                               int64_t stride, const float* sums, float* y) {
  constexpr int C = M <= 2 || BITS == 3 ? 4 : 2;
  columns_bfloat16<BITS, M, C, 0>(linear, tile, x, stride, sums, y);
  if constexpr (C == 2) columns_bfloat16<BITS, M, C, C>(linear, tile, x, stride, sums, y);
}
#endif

INLINE uint16_t rounded(const void* x, int type, int64_t at) {
  if (type == BFLOAT16) return static_cast<const uint16_t*>(x)[at];
  return to_bfloat16(static_cast<const float*>(x)[at]);
}

}  // namespace

namespace gptq {

// The words of one row of x.
static int64_t stride_of(const GptqLinear& linear, Activations kind) {
  const int64_t padded = int64_t(linear.units) * unit_rows(linear.bits);
  return kind == Activations::INT8      ? padded / 4
         : kind == Activations::FLOAT32 ? padded
                                        : padded / 2;
}

size_t permuted_bytes(const GptqLinear& linear, Activations kind, int64_t m) {
  return size_t(m) * 4 * (stride_of(linear, kind) + 2 * linear.segments);
}

PermutedActivations permuted_at(const GptqLinear& linear, int isa, Activations kind, int64_t m,
                                void* memory) {
  const int64_t stride = stride_of(linear, kind);
  float* values = static_cast<float*>(memory);
  float* sums = values + m * stride;
  return {values, static_cast<uint32_t*>(memory), sums, sums + m * linear.segments, stride, isa,
          kind};
}

void permute_activations(const GptqLinear& linear, const void* x, int type, int64_t m,
                         const PermutedActivations& to) {
#ifdef X86
  if (to.integers() && to.isa >= AVX512_VNNI) return quantize_activations(linear, x, type, m, to);
  if (to.integers()) return quantize_activations_avx2(linear, x, type, m, to);
#endif
#ifdef ARM
  if (to.integers()) return quantize_activations_neon(linear, x, type, m, to);
#endif
  const int rows = unit_rows(linear.bits), half = linear.bits == 3 ? 8 : rows / 2;
  const int64_t from = m * linear.in_features;
  if (to.kind == Activations::FLOAT32) {
    float* out = to.values + m * to.stride;
    for (int64_t i = 0; i < linear.units * rows; i++)
      out[i] = linear.rows[i] < 0 ? 0.0f : load_number(x, type, from + linear.rows[i]);
    return;
  }
  uint32_t* out = to.words + m * to.stride;
  const int32_t* row = linear.rows;
  for (int segment = 0; segment < linear.segments; segment++) {
    float sum = 0;
    for (int half_units = linear.segment_units[segment] * (rows / (2 * half)); half_units > 0;
         half_units--) {
      for (int j = 0; j < half; j++) {
        const uint16_t a = row[j] < 0 ? 0 : rounded(x, type, from + row[j]);
        const uint16_t b = row[j + half] < 0 ? 0 : rounded(x, type, from + row[j + half]);
        *out++ = a | uint32_t(b) << 16;
        sum += from_bfloat16(a) + from_bfloat16(b);
      }
      row += 2 * half;
    }
    to.sums[m * linear.segments + segment] = sum;
  }
}

}  // namespace gptq

namespace {

template <int BITS, int M>
void dispatch(const GptqLinear& linear, int64_t tile, int64_t m, const PermutedActivations& x,
              float* y) {
#ifdef X86
  if (x.kind == Activations::BF16)
    return tile_bfloat16<BITS, M>(linear, tile, x.words + m * x.stride, x.stride,
                                  x.sums + m * linear.segments, y);
  if (x.isa >= AVX512)
    return tile_avx512<BITS, M>(linear, tile, x.values + m * x.stride, x.stride, y);
  if (x.isa == AVX2) return tile_avx2<BITS, M>(linear, tile, x.values + m * x.stride, x.stride, y);
#endif
  tile_plain<BITS, M>(linear, tile, x.values + m * x.stride, x.stride, y);
}

template <int BITS>
void dispatch_rows(const GptqLinear& linear, int64_t tile, int64_t m, int count,
                   const PermutedActivations& x, float* y) {
  if (count == 4) return dispatch<BITS, 4>(linear, tile, m, x, y);
  if (count == 3) return dispatch<BITS, 3>(linear, tile, m, x, y);
  if (count == 2) return dispatch<BITS, 2>(linear, tile, m, x, y);
  dispatch<BITS, 1>(linear, tile, m, x, y);
}

}  // namespace

namespace gptq {

void multiply_tile(const GptqLinear& linear, int64_t tile, int64_t m, int count,
                   const PermutedActivations& x, float* y) {
#ifdef X86
  if (x.integers() && x.isa >= AVX512_VNNI) return multiply_tile_vnni(linear, tile, m, count, x, y);
  if (x.integers()) return multiply_tile_maddubs(linear, tile, m, count, x, y);
#endif
#ifdef ARM
  if (x.integers()) return multiply_tile_neon(linear, tile, m, count, x, y);
#endif
  switch (linear.bits) {
    case 2: return dispatch_rows<2>(linear, tile, m, count, x, y);
    case 3: return dispatch_rows<3>(linear, tile, m, count, x, y);
    case 4: return dispatch_rows<4>(linear, tile, m, count, x, y);
    default: return dispatch_rows<8>(linear, tile, m, count, x, y);
  }
}

void store_tile(const GptqLinear& linear, int64_t tile, int64_t m, const float* from, void* y,
                int type) {
  const int64_t first = tile * COLUMNS, left = linear.out_features - first;
  const int count = left < COLUMNS ? int(left) : COLUMNS;
  const int64_t to = m * linear.out_features + first;
  for (int c = 0; c < count; c++) {
    const float value = linear.bias ? from[c] + linear.bias[first + c] : from[c];
    if (type == FLOAT32)
      static_cast<float*>(y)[to + c] = value;
    else
      static_cast<uint16_t*>(y)[to + c] = to_bfloat16(value);
  }
}

}  // namespace gptq

namespace {

template <int BITS>
void unpack(const GptqLinear& linear, int64_t tile, void* w, int64_t stride, int type, int isa) {
#ifdef X86
  if (isa >= AVX512) return unpack_avx512<BITS>(linear, tile, w, stride, type);
  if (isa == AVX2) return unpack_avx2<BITS>(linear, tile, w, stride, type);
#endif
  (void)isa;
  unpack_plain<BITS>(linear, tile, w, stride, type);
}

void unpack_bits(const GptqLinear& linear, int64_t tile, void* w, int64_t stride, int type,
                 int isa) {
  switch (linear.bits) {
    case 2: return unpack<2>(linear, tile, w, stride, type, isa);
    case 3: return unpack<3>(linear, tile, w, stride, type, isa);
    case 4: return unpack<4>(linear, tile, w, stride, type, isa);
    default: return unpack<8>(linear, tile, w, stride, type, isa);
  }
}

thread_local Scratch scratch;

}  // namespace

extern "C" {

int gptq_gemv(const GptqLinear* linear, const void* x, void* y, int64_t m, int type, int isa,
              int activations, int threads) {
  if (m == 0) return 0;
  const int64_t tiles = (linear->out_features + COLUMNS - 1) / COLUMNS;
  const int64_t chunks = (m + CHUNK - 1) / CHUNK;
  const Activations kind = Activations(activations);
  void* memory = scratch.get(permuted_bytes(*linear, kind, m));
  if (!memory) return 1;
  const PermutedActivations permuted = permuted_at(*linear, isa, kind, m, memory);
  // A few rows are permuted by the caller: a barrier costs more, above all on a busy machine.
  parallel_for(m > ROWS ? threads : 1, m,
               [&](int64_t row) { permute_activations(*linear, x, type, row, permuted); });
  parallel_for(threads, tiles * chunks, [&](int64_t piece) {
    const int64_t tile = piece / chunks, first = piece % chunks * CHUNK;
    const int64_t last = first + CHUNK < m ? first + CHUNK : m;
    alignas(64) float sums[ROWS * COLUMNS];
    for (int64_t row = first; row < last; row += ROWS) {
      const int count = last - row < ROWS ? int(last - row) : ROWS;
      multiply_tile(*linear, tile, row, count, permuted, sums);
      for (int i = 0; i < count; i++)
        store_tile(*linear, tile, row + i, sums + i * COLUMNS, y, type);
    }
  });
  return 0;
}

void gptq_unpack(const GptqLinear* linear, int64_t first, int64_t tiles, void* w, int type, int isa,
                 int threads) {
  parallel_for(threads, tiles, [&](int64_t tile) {
    const int64_t offset = tile * COLUMNS * (type == FLOAT32 ? 4 : 2);
    unpack_bits(*linear, first + tile, static_cast<char*>(w) + offset, tiles * COLUMNS, type, isa);
  });
}

}  // extern "C"
