// y[M, N] = x[M, K] @ W[N, K].T + bias for few rows of x and a packed W:
// w[n, k] = s[g, n] * (q[k, n] - z[g, n]). How W lies in memory is drawn in gemv.h.
//
// FLOAT32, here: codes become floats, zeros are subtracted, and the sum is in float32, without
// cancellation. INT16 and INT8: vnni.cpp, maddubs.cpp, neon.cpp. Many rows: gemm.cpp for bfloat16;
// for float32, gptq_unpack writes the weight of some tiles for another library, which multiplies
// faster than this one.

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
    word = (word >> (2 * (row % 16)) & 3) | (high >> third_bit(row) & 1) << 2;
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
#endif

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
  const int64_t from = m * linear.in_features;
  float* out = to.values + m * to.stride;
  for (int64_t i = 0; i < int64_t(linear.units) * unit_rows(linear.bits); i++)
    out[i] = linear.rows[i] < 0 ? 0.0f : load_number(x, type, from + linear.rows[i]);
}

}  // namespace gptq

namespace {

template <int BITS, int M>
void dispatch(const GptqLinear& linear, int64_t tile, int64_t m, const PermutedActivations& x,
              float* y) {
#ifdef X86
  if (x.isa >= AVX512)
    return tile_avx512<BITS, M>(linear, tile, x.values + m * x.stride, x.stride, y);
  if (x.isa >= AVX2) return tile_avx2<BITS, M>(linear, tile, x.values + m * x.stride, x.stride, y);
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
  if (x.integers() && has_vnni256(x.isa) && linear.bits < 8)
    return multiply_tile_vnni256(linear, tile, m, count, x, y);
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
  const float* bias = linear.bias ? linear.bias + first : nullptr;
  for (int c = 0; c < count; c++) {
    const float value = bias ? from[c] + bias[c] : from[c];
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
  if (isa >= AVX2) return unpack_avx2<BITS>(linear, tile, w, stride, type);
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
