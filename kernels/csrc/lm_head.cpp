// A model's head for a few rows of x: all its logits, or exactly those that may be the greatest.
//
// A head is read whole for each token, in a small model half of all that is read, while picking a token
// needs the greatest logits alone. So the weight's copy in 8 bits is read, whose product is off by at most
// |x| times a row's own error (the length of what rounding took off the row: Cauchy and Schwarz); whatever
// may yet be among the greatest is multiplied by the weight itself. No logit that is given is approximate.

#include "dense.h"
#include "heads.h"

#include <cmath>
#include <functional>

using namespace gptq;

namespace {

thread_local Scratch head_scratch;

constexpr float INFINITE = INFINITY;
constexpr float SPLIT = 1.7e-5f;       // of a segment's greatest x: what two bytes of it may be off by
constexpr float ROUNDED = 1.0f / 128;  // logits this near may be one once they are rounded to bfloat16

// Rows of x as `dense` wants them.
struct Rows {
  const float* x;
  const uint16_t* rounded;
};

Rows rows_of(const void* x, int64_t count, const Dense& weight, float* memory) {
  if (weight.type == FLOAT32) return {static_cast<const float*>(x), nullptr};
  const uint16_t* given = static_cast<const uint16_t*>(x);
  if (weight.rounds()) return {nullptr, given};
  for (int64_t i = 0; i < count; i++) memory[i] = from_bfloat16(given[i]);
  return {memory, nullptr};
}

void multiply_dense(const Dense& weight, const Rows& of, int64_t row, int64_t first, int count, float* y) {
  const int64_t at = row * weight.k;
  dense(weight, first, count, of.x ? of.x + at : nullptr, of.rounded ? of.rounded + at : nullptr, y);
}

// How far a row of x by the narrow copy may be off: length * a column's error + more.
struct Reach {
  float length, more;
};

Reach reach_of(const void* x, int64_t row, int64_t k, int type, float longest, bool split) {
  double squares = 0;
  float most = 0;
  for (int64_t i = row * k; i < (row + 1) * k; i++) {
    const float value = type == FLOAT32 ? static_cast<const float*>(x)[i] : from_bfloat16(static_cast<const uint16_t*>(x)[i]);
    squares += double(value) * value;
    most = std::max(most, std::fabs(value));
  }
  return {float(std::sqrt(squares) * (1 + 1e-6)), split ? SPLIT * most * std::sqrt(float(k)) * longest : 0.0f};
}

constexpr int GROUP = 64;                    // rows that share a scale
constexpr float ROUNDING = 4.0f / (1 << 24);  // what adding up in float32 may cost, of a length, for each row

// One column of the narrow copy, from a row of the weight; gives what a unit of x may be off by, and the row's length.
template <int TYPE>
INLINE void narrow_type(const void* weight, int64_t at, int64_t k, uint32_t* words, float* scales, float& error, float& length) {
  floats squares{}, off{};
  float longest = 0;
  for (int64_t first = 0; first < k; first += GROUP, scales += COLUMNS) {
    const int count = int(std::min<int64_t>(GROUP, k - first));
    alignas(64) float values[GROUP] = {};
    for (int i = 0; i < count; i += LANES) {
      if (count - i >= LANES) {
        floats value;
        load<TYPE>(weight, at + first + i, value);
        memcpy(values + i, &value, sizeof value);
        continue;
      }
      for (int j = i; j < count; j++)
        values[j] = TYPE == FLOAT32 ? static_cast<const float*>(weight)[at + first + j]
                                    : from_bfloat16(static_cast<const uint16_t*>(weight)[at + first + j]);
    }
    float most = 0;
    for (int i = 0; i < GROUP; i++) most = std::max(most, std::fabs(values[i]));
    const float scale = std::max(most / 127, 0x1p-126f), per = 1 / scale;
    longest = std::max(longest, most);
    *scales = scale;
    alignas(64) int32_t codes[GROUP];
    for (int i = 0; i < GROUP; i += LANES) {
      floats value;
      memcpy(&value, values + i, sizeof value);
      const floats shifted = value * per + 12582912.0f;  // rounds to an integer
      const floats left = (shifted - 12582912.0f) * scale - value;
      squares += value * value;
      off += left * left;
      ints code;
      memcpy(&code, &shifted, sizeof code);
      code -= 0x4b400000 - 128;
      memcpy(codes + i, &code, sizeof code);
    }
    for (int i = 0; i < count; i += 4, words += COLUMNS)
      *words = uint32_t(codes[i]) | uint32_t(codes[i + 1]) << 8 | uint32_t(codes[i + 2]) << 16 | uint32_t(codes[i + 3]) << 24;
  }
  length = std::sqrt(total(squares)) * 1.001f;
  // In the narrow product codes of up to 255 are added up before 128 is taken off.
  error = std::sqrt(total(off)) * 1.001f + ROUNDING * float(k) * (length + 2 * longest);
}

INLINE void narrow_body(const void* weight, int type, int64_t at, int64_t k, uint32_t* words, float* scales, float& error, float& length) {
  if (type == FLOAT32) return narrow_type<FLOAT32>(weight, at, k, words, scales, error, length);
  narrow_type<BFLOAT16>(weight, at, k, words, scales, error, length);
}

#define NARROW(NAME, TARGET)                                                                                     \
  TARGET void narrow_##NAME(const void* w, int type, int64_t at, int64_t k, uint32_t* words, float* scales, float& e, float& l) { \
    narrow_body(w, type, at, k, words, scales, e, l);                                                            \
  }

NARROW(plain, )
#ifdef X86
NARROW(avx2, AVX2_TARGET)
NARROW(avx512, AVX512_TARGET)
#endif

}  // namespace

extern "C" {

// Round a weight [n][k] of `type` to 8 bits with zeros of 128, k a multiple of 4, a scale for each 64 rows: words
// [tiles][k / 4][64], scales [tiles][groups][64]; errors and lengths [n] as gptq_likeliest wants them.
void gptq_narrow(const void* weight, int64_t n, int64_t k, uint32_t* words, float* scales, float* errors, float* lengths,
                 int type, int isa, int threads) {
  const int64_t groups = (k + GROUP - 1) / GROUP, tiles = (n + COLUMNS - 1) / COLUMNS;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t tile = 0; tile < tiles; tile++)
    for (int64_t column = tile * COLUMNS; column < std::min(n, (tile + 1) * COLUMNS); column++) {
      const int64_t c = column % COLUMNS;
      BEST(narrow, isa, weight, type, column * k, k, words + tile * (k / 4) * COLUMNS + c, scales + tile * groups * COLUMNS + c,
           errors[column], lengths[column]);
    }
}

// y [m][n] = x [m][k] @ weight [n][k].T, all of `type`. Returns 0, or 1 where memory is short.
int gptq_rows(const void* weight, const void* x, void* y, int64_t m, int64_t k, int64_t n, int type, int isa, int threads) {
  const Dense of{weight, k, type, isa};
  float* memory = static_cast<float*>(head_scratch.get(size_t(m) * k * 4));
  if (!memory) return 1;
  const Rows rows = rows_of(x, m * k, of, memory);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t tile = 0; tile < (n + COLUMNS - 1) / COLUMNS; tile++) {
    const int count = int(std::min<int64_t>(COLUMNS, n - tile * COLUMNS));
    float sums[COLUMNS];
    for (int64_t row = 0; row < m; row++) {
      multiply_dense(of, rows, row, tile * COLUMNS, count, sums);
      keep(y, row * n + tile * COLUMNS, sums, count, type);
    }
  }
  return 0;
}

// The same where a row's `wanted` greatest logits count, and what ties with the last of them: each of these is
// in y as gptq_rows has it, and elsewhere y may be minus infinity. `narrow` is the weight in 8 bits, `errors` [n]
// what a unit of x may be off by in each of its columns, `longest` the length of the weight's longest row.
// Columns that `aside` [m][n] marks, where it is not null, do not count among the wanted. Returns 0, 1 where
// memory is short, or 2 where this cannot tell: x is not finite, or more are wanted than there are tiles.
int gptq_likeliest(const GptqLayer* narrow, const float* errors, float longest, const void* weight, const void* x,
                   int64_t m, const int64_t* wanted, const uint8_t* aside, void* y, int type, int isa, int threads) {
  const int64_t k = narrow->in_features, n = narrow->out_features, tiles = (n + COLUMNS - 1) / COLUMNS;
  const Dense of{weight, k, type, isa};
  const int gather = type == FLOAT32 ? std::min(isa, int(AVX512)) : isa;
  char* gathered_memory;
  float* widened;
  float *sums, *least, *most;  // [tiles][m][COLUMNS]; [m][tiles]: the greatest that is sure, and that there may be
  float *from, *sorted;        // [m], [tiles]
  Reach* reach;                // [m]
  const auto lay_out = [&](void* memory) {
    Arena arena(memory);
    gathered_memory = arena.take<char>(gathered_bytes(*narrow, gather, m));
    widened = arena.take<float>(size_t(m) * k);
    sums = arena.take<float>(size_t(m) * tiles * COLUMNS);
    least = arena.take<float>(size_t(m) * tiles);
    most = arena.take<float>(size_t(m) * tiles);
    from = arena.take<float>(m);
    sorted = arena.take<float>(tiles);
    reach = arena.take<Reach>(m);
    return arena.used();
  };
  void* memory = head_scratch.get(lay_out(nullptr));
  if (!memory) return 1;
  lay_out(memory);
  const Rows rows = rows_of(x, m * k, of, widened);
  const Gathered gathered = gathered_at(*narrow, gather, m, gathered_memory);
  for (int64_t row = 0; row < m; row++) {
    gather_row(*narrow, x, type, row, gathered);
    reach[row] = reach_of(x, row, k, type, longest, gather > BF16);
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t tile = 0; tile < tiles; tile++) {
    const int64_t first = tile * COLUMNS;
    const int count = int(std::min<int64_t>(COLUMNS, n - first));
    for (int64_t row = 0; row < m; row += ROWS)
      multiply_bits(*narrow, tile, row, int(std::min<int64_t>(ROWS, m - row)), gathered, sums + (tile * m + row) * COLUMNS);
    for (int64_t row = 0; row < m; row++) {
      const float* sum = sums + (tile * m + row) * COLUMNS;
      const uint8_t* marks = aside ? aside + row * n + first : nullptr;
      float low = -INFINITE, high = -INFINITE;
      for (int c = 0; c < count; c++) {
        const float off = reach[row].length * errors[first + c] + reach[row].more;
        low = std::max(low, marks && marks[c] ? -INFINITE : sum[c] - off);
        high = std::max(high, sum[c] + off);
      }
      least[row * tiles + tile] = low;
      most[row * tiles + tile] = high;
    }
  }
  for (int64_t row = 0; row < m; row++) {
    if (wanted[row] > tiles) return 2;
    std::copy_n(least + row * tiles, tiles, sorted);
    float* last = sorted + (wanted[row] - 1);
    std::nth_element(sorted, last, sorted + tiles, std::greater<float>());
    from[row] = *last - std::fabs(*last) * ROUNDED;
    if (!std::isfinite(from[row]) || !std::isfinite(reach[row].length)) return 2;
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t tile = 0; tile < tiles; tile++) {
    const int64_t first = tile * COLUMNS;
    const int count = int(std::min<int64_t>(COLUMNS, n - first));
    for (int64_t row = 0; row < m; row++) {
      float out[COLUMNS];
      std::fill_n(out, COLUMNS, -INFINITE);
      if (most[row * tiles + tile] >= from[row]) {
        const float* sum = sums + (tile * m + row) * COLUMNS;
        for (int c = 0; c < count; c++)
          if (sum[c] + reach[row].length * errors[first + c] + reach[row].more >= from[row])
            multiply_dense(of, rows, row, first + c, 1, out + c);
      }
      keep(y, row * n + first, out, count, type);
    }
  }
  return 0;
}

}  // extern "C"
