// logits[M, N] = x[M, K] @ W[N, K].T for a few rows of x: all of them, or exactly those that may be
// the greatest.
//
// A head is read whole for each token, in a small model half of all that is read, while picking a
// token needs the greatest logits alone. So the weight's copy in 8 bits is read, whose product is
// off by at most |x| times a row's own error (the length of what rounding took off the row: Cauchy
// and Schwarz); whatever may yet be among the greatest is multiplied by the weight itself:
//
//   1  sums[M, N] = x * copy, with the bounds of each: lower = sum - off, upper = sum + off
//   2  threshold = the k-th greatest of the tiles' greatest lower bounds, less what rounding joins
//   3  logits = x * W where upper >= threshold, else minus infinity
//
// No logit that is given is approximate. The copy is a packed linear (gemv.h) of 8 bits, zeros of
// 128, and a float32 scale for each 64 rows.

#include "dense.h"
#include "gemv.h"
#include "team.h"

#include <cmath>
#include <functional>

using namespace gptq;

namespace {

thread_local Scratch head_scratch;

constexpr float INFINITE = INFINITY;
constexpr float INT16_ERROR =
    1.7e-5f;  // of a segment's largest x: what two bytes of it may be off by
constexpr float ROUNDING_MARGIN =
    1.0f / 128;  // logits this near may be one once they are rounded to bfloat16

// Rows of x as `dense` wants them.
struct Rows {
  const float* x;
  const uint16_t* x_bf16;
};

Rows rows_of(const void* x, int64_t count, const Dense& weight, float* memory) {
  if (weight.type == FLOAT32) return {static_cast<const float*>(x), nullptr};
  const uint16_t* x_bf16 = static_cast<const uint16_t*>(x);
  if (weight.uses_bf16()) return {nullptr, x_bf16};
  for (int64_t i = 0; i < count; i++) memory[i] = from_bfloat16(x_bf16[i]);
  return {memory, nullptr};
}

void multiply_dense(const Dense& weight, const Rows& of, int64_t row, int64_t first, int count,
                    float* y) {
  const int64_t at = row * weight.k;
  dense(weight, first, count, of.x ? of.x + at : nullptr, of.x_bf16 ? of.x_bf16 + at : nullptr, y);
}

// How far a row of x by the copy may be off: factor * a column's error + constant.
struct ErrorBound {
  float factor, constant;
};

ErrorBound bound_of(const void* x, int64_t row, int64_t k, int type, float max_norm,
                    bool integers) {
  double squares = 0;
  float max_abs = 0;
  for (int64_t i = row * k; i < (row + 1) * k; i++) {
    const float value = load_number(x, type, i);
    squares += double(value) * value;
    max_abs = std::max(max_abs, std::fabs(value));
  }
  return {float(std::sqrt(squares) * (1 + 1e-6)),
          integers ? INT16_ERROR * max_abs * std::sqrt(float(k)) * max_norm : 0.0f};
}

constexpr int GROUP_SIZE = 64;  // rows that share a scale
constexpr float SUM_ERROR =
    4.0f / (1 << 24);  // what adding up in float32 may cost, of a length, for each row

// One column of the copy, from a row of the weight: what a unit of x may be off by, and the row's
// length.
template <class V, int TYPE>
INLINE void quantize_type(const void* weight, int64_t at, int64_t k, uint32_t* words, float* scales,
                          float& error, float& norm) {
  using floats = typename V::floats;
  floats squares{}, off{};
  float max_of_row = 0;
  for (int64_t first = 0; first < k; first += GROUP_SIZE, scales += COLUMNS) {
    const int count = int(std::min<int64_t>(GROUP_SIZE, k - first));
    alignas(64) float values[GROUP_SIZE] = {};
    for (int i = 0; i < count; i += V::LANES) {
      if (count - i >= V::LANES) {
        floats value;
        load<TYPE>(weight, at + first + i, value);
        memcpy(values + i, &value, sizeof value);
        continue;
      }
      for (int j = i; j < count; j++)
        values[j] = TYPE == FLOAT32
                        ? static_cast<const float*>(weight)[at + first + j]
                        : from_bfloat16(static_cast<const uint16_t*>(weight)[at + first + j]);
    }
    float max_abs = 0;
    for (int i = 0; i < GROUP_SIZE; i++) max_abs = std::max(max_abs, std::fabs(values[i]));
    const float scale = std::max(max_abs / 127, 0x1p-126f), per_step = 1 / scale;
    max_of_row = std::max(max_of_row, max_abs);
    *scales = scale;
    alignas(64) int32_t codes[GROUP_SIZE];
    for (int i = 0; i < GROUP_SIZE; i += V::LANES) {
      floats value;
      memcpy(&value, values + i, sizeof value);
      const floats shifted = value * per_step + 12582912.0f;  // rounds to an integer
      const floats rest = (shifted - 12582912.0f) * scale - value;
      squares += value * value;
      off += rest * rest;
      typename V::ints code;
      memcpy(&code, &shifted, sizeof code);
      code -= 0x4b400000 - 128;
      memcpy(codes + i, &code, sizeof code);
    }
    for (int i = 0; i < count; i += 4, words += COLUMNS)
      *words = uint32_t(codes[i]) | uint32_t(codes[i + 1]) << 8 | uint32_t(codes[i + 2]) << 16 |
               uint32_t(codes[i + 3]) << 24;
  }
  norm = std::sqrt(reduce_add(squares)) * 1.001f;
  // In the product by the copy, codes of up to 255 are added up before 128 is taken off.
  error = std::sqrt(reduce_add(off)) * 1.001f + SUM_ERROR * float(k) * (norm + 2 * max_of_row);
}

template <class V>
INLINE void quantize_body(const void* weight, int type, int64_t at, int64_t k, uint32_t* words,
                          float* scales, float& error, float& norm) {
  if (type == FLOAT32) return quantize_type<V, FLOAT32>(weight, at, k, words, scales, error, norm);
  quantize_type<V, BFLOAT16>(weight, at, k, words, scales, error, norm);
}

#define QUANTIZE(NAME, TARGET, V)                                                              \
  TARGET void quantize_##NAME(const void* w, int type, int64_t at, int64_t k, uint32_t* words, \
                              float* scales, float& error, float& norm) {                      \
    quantize_body<V>(w, type, at, k, words, scales, error, norm);                              \
  }

QUANTIZE(plain, , Narrow)
#ifdef X86
QUANTIZE(avx2, AVX2_TARGET, Middle)
QUANTIZE(avx512, AVX512_TARGET, Wide)
#endif

}  // namespace

extern "C" {

void gptq_quantize_head(const void* weight, int64_t n, int64_t k, uint32_t* words, float* scales,
                        float* errors, float* norms, int type, int isa, int threads) {
  const int64_t groups = (k + GROUP_SIZE - 1) / GROUP_SIZE, tiles = (n + COLUMNS - 1) / COLUMNS;
  parallel_for(threads, tiles, [&](int64_t tile) {
    for (int64_t column = tile * COLUMNS; column < std::min(n, (tile + 1) * COLUMNS); column++) {
      const int64_t c = column % COLUMNS;
      DISPATCH(quantize, isa, weight, type, column * k, k, words + tile * (k / 4) * COLUMNS + c,
               scales + tile * groups * COLUMNS + c, errors[column], norms[column]);
    }
  });
}

int gptq_head(const void* weight, const void* x, void* y, int64_t m, int64_t k, int64_t n, int type,
              int isa, int threads) {
  const Dense of{weight, k, type, isa};
  float* memory = static_cast<float*>(head_scratch.get(size_t(m) * k * 4));
  if (!memory) return 1;
  const Rows rows = rows_of(x, m * k, of, memory);
  parallel_for(threads, (n + COLUMNS - 1) / COLUMNS, [&](int64_t tile) {
    const int count = int(std::min<int64_t>(COLUMNS, n - tile * COLUMNS));
    float sums[COLUMNS];
    for (int64_t row = 0; row < m; row++) {
      multiply_dense(of, rows, row, tile * COLUMNS, count, sums);
      store_as(y, row * n + tile * COLUMNS, sums, count, type);
    }
  });
  return 0;
}

int gptq_top_logits(const GptqLinear* quantized, const float* errors, float max_norm,
                    const void* weight, const void* x, int64_t m, const int64_t* counts,
                    const uint8_t* excluded, void* y, int type, int isa, int activations,
                    int threads) {
  const int64_t k = quantized->in_features, n = quantized->out_features,
                tiles = (n + COLUMNS - 1) / COLUMNS;
  const Dense of{weight, k, type, isa};
  const Activations kind = activations_for(type, isa, activations);
  char* permuted_memory;
  float* widened;             // [M][K]
  float* sums;                // [tiles][M][COLUMNS], by the copy
  float *lower, *upper;       // [M][tiles]: the greatest logit of a tile is between them
  float *threshold, *sorted;  // [M], [tiles]
  ErrorBound* bounds;         // [M]
  const auto lay_out = [&](void* memory) {
    Arena arena(memory);
    permuted_memory = arena.take<char>(permuted_bytes(*quantized, kind, m));
    widened = arena.take<float>(size_t(m) * k);
    sums = arena.take<float>(size_t(m) * tiles * COLUMNS);
    lower = arena.take<float>(size_t(m) * tiles);
    upper = arena.take<float>(size_t(m) * tiles);
    threshold = arena.take<float>(m);
    sorted = arena.take<float>(tiles);
    bounds = arena.take<ErrorBound>(m);
    return arena.used();
  };
  void* memory = head_scratch.get(lay_out(nullptr));
  if (!memory) return 1;
  lay_out(memory);
  const Rows rows = rows_of(x, m * k, of, widened);
  const PermutedActivations permuted = permuted_at(*quantized, isa, kind, m, permuted_memory);
  for (int64_t row = 0; row < m; row++) {
    permute_activations(*quantized, x, type, row, permuted);
    bounds[row] = bound_of(x, row, k, type, max_norm, permuted.integers());
  }
  parallel_for(threads, tiles, [&](int64_t tile) {
    const int64_t first = tile * COLUMNS;
    const int count = int(std::min<int64_t>(COLUMNS, n - first));
    for (int64_t row = 0; row < m; row += ROWS)
      multiply_tile(*quantized, tile, row, int(std::min<int64_t>(ROWS, m - row)), permuted,
                    sums + (tile * m + row) * COLUMNS);
    for (int64_t row = 0; row < m; row++) {
      const float* sum = sums + (tile * m + row) * COLUMNS;
      const uint8_t* marks = excluded ? excluded + row * n + first : nullptr;
      float low = -INFINITE, high = -INFINITE;
      for (int c = 0; c < count; c++) {
        const float off = bounds[row].factor * errors[first + c] + bounds[row].constant;
        low = std::max(low, marks && marks[c] ? -INFINITE : sum[c] - off);
        high = std::max(high, sum[c] + off);
      }
      lower[row * tiles + tile] = low;
      upper[row * tiles + tile] = high;
    }
  });
  for (int64_t row = 0; row < m; row++) {
    if (counts[row] > tiles) return 2;
    std::copy_n(lower + row * tiles, tiles, sorted);
    float* kth = sorted + (counts[row] - 1);
    std::nth_element(sorted, kth, sorted + tiles, std::greater<float>());
    threshold[row] = *kth - std::fabs(*kth) * ROUNDING_MARGIN;
    if (!std::isfinite(threshold[row]) || !std::isfinite(bounds[row].factor)) return 2;
  }
  parallel_for(threads, tiles, [&](int64_t tile) {
    const int64_t first = tile * COLUMNS;
    const int count = int(std::min<int64_t>(COLUMNS, n - first));
    for (int64_t row = 0; row < m; row++) {
      float out[COLUMNS];
      std::fill_n(out, COLUMNS, -INFINITE);
      if (upper[row * tiles + tile] >= threshold[row]) {
        const float* sum = sums + (tile * m + row) * COLUMNS;
        for (int c = 0; c < count; c++)
          if (sum[c] + bounds[row].factor * errors[first + c] + bounds[row].constant >=
              threshold[row])
            multiply_dense(of, rows, row, first + c, 1, out + c);
      }
      store_as(y, row * n + first, out, count, type);
    }
  });
  return 0;
}

}  // extern "C"
