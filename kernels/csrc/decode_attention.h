// Attention of a few new tokens of one sequence, over keys and values that are in the cache.
//
// A row is one query head of one token. The rows that share a head of keys and values are taken
// together, so each key and value is read once for all of them. Positions come in blocks; what a row
// has seen so far is its greatest score, the sum of its weights and its weighted sum of values, which
// are scaled down when a greater score turns up. Pieces of the positions, each seen by another thread,
// are merged the same way.

#pragma once

#include "vector_math.h"

#include <algorithm>

namespace gptq {

constexpr int BLOCK = 128;  // positions whose scores are held at once: with values, half of a first-level cache

// A processor's own prefetching ends with a page: asked for so far ahead, positions come half as fast again.
constexpr int AHEAD = 1024;

template <int TYPE>
INLINE void fetch(const void* from, int64_t at, int count) {
  constexpr int size = TYPE == FLOAT32 ? 4 : 2;
  for (int i = 0; i < count * size; i += 64) __builtin_prefetch(static_cast<const char*>(from) + at * size + i);
}

// Some rows, and a piece of the positions of one head of keys and values.
struct Sight {
  const float* q;           // [rows][dim], scaled
  const uint16_t* rounded;  // the same in bfloat16, or null: then keys are read as float32
  const void* keys;         // [position][dim], of the cache
  const void* values;
  int64_t first, last;    // positions of this piece
  const int64_t* starts;  // [rows] the positions that each row sees
  const int64_t* ends;
  int rows, dim;
  float* scores;  // [rows][BLOCK]
  float* most;    // [rows], filled here, as are the next two
  float* weight;  // [rows]
  float* y;       // [rows][dim]
};

template <int TYPE, int R>
INLINE void score(const float* q, const void* keys, int64_t from, int count, int dim, float* scores) {
  for (int p = 0; p < count; p++) {
    floats sum[R];
    for (int r = 0; r < R; r++) sum[r] = floats{};
    for (int i = 0; i < dim; i += LANES) {
      floats key;
      load<TYPE>(keys, (from + p) * dim + i, key);
      for (int r = 0; r < R; r++) {
        floats a;
        load<FLOAT32>(q, r * dim + i, a);
        sum[r] += a * key;
      }
    }
    for (int r = 0; r < R; r++) scores[r * BLOCK + p] = total(sum[r]);
  }
}

// R rows' weighted sums of V vectors of the values.
template <int TYPE, int R, int V>
INLINE void add_values(const float* weights, const void* values, int64_t from, int count, int dim, int at, float* y) {
  floats sum[R][V];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) load<FLOAT32>(y, r * dim + at + v * LANES, sum[r][v]);
  for (int p = 0; p < count; p++) {
    floats value[V];
    const int64_t here = (from + p) * dim + at;
    for (int v = 0; v < V; v++) load<TYPE>(values, here + v * LANES, value[v]);
    fetch<TYPE>(values, here + AHEAD, V * LANES);
    for (int r = 0; r < R; r++)
      for (int v = 0; v < V; v++) sum[r][v] += weights[r * BLOCK + p] * value[v];
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) memcpy(y + r * dim + at + v * LANES, &sum[r][v], sizeof(floats));
}

template <int TYPE, int R, int V>
INLINE void add_all_values(const float* weights, const void* values, int64_t from, int count, int dim, float* y) {
  int at = 0;
  for (; at + V * LANES <= dim; at += V * LANES) add_values<TYPE, R, V>(weights, values, from, count, dim, at, y);
  for (; at < dim; at += 2 * LANES) add_values<TYPE, R, 2>(weights, values, from, count, dim, at, y);
}

// Turn one row's scores of a block into weights; what was seen before is scaled to the new greatest.
INLINE void weigh(const Sight& s, int row, int64_t block, int count) {
  float* scores = s.scores + row * BLOCK;
  const int low = int(std::max<int64_t>(s.starts[row] - block, 0));
  const int high = int(std::min<int64_t>(s.ends[row] - block, count));
  const int padded = (count + LANES - 1) / LANES * LANES;
  if (low >= high) {
    memset(scores, 0, sizeof(float) * padded);
    return;
  }
  for (int i = 0; i < low; i++) scores[i] = -INFINITY;
  for (int i = high; i < padded; i++) scores[i] = -INFINITY;
  floats greatest;
  load<FLOAT32>(scores, 0, greatest);
  for (int i = LANES; i < padded; i += LANES) {
    floats other;
    load<FLOAT32>(scores, i, other);
    greatest = other > greatest ? other : greatest;
  }
  float most = s.most[row];
  for (int i = 0; i < LANES; i++) most = std::max(most, greatest[i]);
  const float factor = expf(s.most[row] - most);
  floats sum{};
  for (int i = 0; i < padded; i += LANES) {
    floats score;
    load<FLOAT32>(scores, i, score);
    floats e = score - most;
    exponential(e);
    e = score == -INFINITY ? floats{} : e;  // what this row does not see
    sum += e;
    memcpy(scores + i, &e, sizeof e);
  }
  s.weight[row] = s.weight[row] * factor + total(sum);
  s.most[row] = most;
  if (factor == 1.0f) return;
  float* y = s.y + int64_t(row) * s.dim;
  for (int i = 0; i < s.dim; i++) y[i] *= factor;
}

INLINE void begin(const Sight& s) {
  for (int row = 0; row < s.rows; row++) s.most[row] = -INFINITY, s.weight[row] = 0;
  memset(s.y, 0, sizeof(float) * s.rows * s.dim);
}

// What follows a block's scores. R rows at a time, V vectors of values: as many as there are registers for.
template <int TYPE, int R, int V>
INLINE void take_values(const Sight& s, int64_t block, int count) {
  for (int row = 0; row < s.rows; row++) weigh(s, row, block, count);
  int row = 0;
  const auto rest = [&]() { return s.rows - row; };
  const auto weights = [&]() { return s.scores + row * BLOCK; };
  const auto y = [&]() { return s.y + int64_t(row) * s.dim; };
  for (; rest() >= R; row += R) add_all_values<TYPE, R, V>(weights(), s.values, block, count, s.dim, y());
  if (R > 3 && rest() == 3) return add_all_values<TYPE, 3, V>(weights(), s.values, block, count, s.dim, y());
  if (R > 2 && rest() == 2) return add_all_values<TYPE, 2, V>(weights(), s.values, block, count, s.dim, y());
  if (rest()) add_all_values<TYPE, 1, V>(weights(), s.values, block, count, s.dim, y());
}

template <int TYPE, int R, int V>
INLINE void see_floats(const Sight& s) {
  begin(s);
  for (int64_t block = s.first; block < s.last; block += BLOCK) {
    const int count = int(std::min<int64_t>(BLOCK, s.last - block));
    int row = 0;
    for (; row + R <= s.rows; row += R)
      score<TYPE, R>(s.q + int64_t(row) * s.dim, s.keys, block, count, s.dim, s.scores + row * BLOCK);
    for (; row < s.rows; row++)
      score<TYPE, 1>(s.q + int64_t(row) * s.dim, s.keys, block, count, s.dim, s.scores + row * BLOCK);
    take_values<TYPE, R, V>(s, block, count);
  }
}

template <int R, int V>
INLINE void see_body(const Sight& s, int type) {
  if (type == FLOAT32) return see_floats<FLOAT32, R, V>(s);
  see_floats<BFLOAT16, R, V>(s);
}

#ifdef X86
// The sums of 16 vectors as one vector.
BF16_TARGET INLINE __m512 totals(const __m512* of) {
  __m512 pairs[8], fours[4], twos[2];
  for (int i = 0; i < 8; i++)
    pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(of[2 * i], of[2 * i + 1]), _mm512_unpackhi_ps(of[2 * i], of[2 * i + 1]));
  for (int i = 0; i < 4; i++) {
    const __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
    fours[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  for (int i = 0; i < 2; i++)
    twos[i] = _mm512_add_ps(_mm512_shuffle_f32x4(fours[2 * i], fours[2 * i + 1], 0x88),
                              _mm512_shuffle_f32x4(fours[2 * i], fours[2 * i + 1], 0xDD));
  return _mm512_add_ps(_mm512_shuffle_f32x4(twos[0], twos[1], 0x88),
                       _mm512_shuffle_f32x4(twos[0], twos[1], 0xDD));
}

// R rows' scores of a block, 16 sums at a time, with the processor's own products.
template <int R>
BF16_TARGET INLINE void score_bfloat16(const uint16_t* q, const uint16_t* keys, int count, int dim, float* scores) {
  constexpr int P = 16 / R;
  for (int p = 0; p < count; p += P) {
    const uint16_t* key[P];
    __m512 sum[16];
    for (int i = 0; i < P; i++) key[i] = keys + int64_t(std::min(p + i, count - 1)) * dim;
    fetch<BFLOAT16>(key[0], AHEAD, P * dim);
    for (int i = 0; i < 16; i++) sum[i] = _mm512_setzero_ps();
    for (int at = 0; at < dim; at += 32) {
      __m512bh a[R];
      for (int r = 0; r < R; r++) a[r] = (__m512bh)_mm512_loadu_si512(q + r * dim + at);
      for (int i = 0; i < P; i++) {
        const __m512bh b = (__m512bh)_mm512_loadu_si512(key[i] + at);
        for (int r = 0; r < R; r++) sum[r * P + i] = _mm512_dpbf16_ps(sum[r * P + i], a[r], b);
      }
    }
    alignas(64) float out[16];
    _mm512_store_ps(out, totals(sum));
    for (int r = 0; r < R; r++) memcpy(scores + r * BLOCK + p, out + r * P, sizeof(float) * P);
  }
}

BF16_TARGET static void see_bfloat16(const Sight& s) {
  begin(s);
  for (int64_t block = s.first; block < s.last; block += BLOCK) {
    const int count = int(std::min<int64_t>(BLOCK, s.last - block));
    const uint16_t* keys = static_cast<const uint16_t*>(s.keys) + block * s.dim;
    int row = 0;
    for (; s.rows - row >= 4; row += 4)
      score_bfloat16<4>(s.rounded + int64_t(row) * s.dim, keys, count, s.dim, s.scores + row * BLOCK);
    if (s.rows - row >= 2) {
      score_bfloat16<2>(s.rounded + int64_t(row) * s.dim, keys, count, s.dim, s.scores + row * BLOCK);
      row += 2;
    }
    if (row < s.rows)
      score_bfloat16<1>(s.rounded + int64_t(row) * s.dim, keys, count, s.dim, s.scores + row * BLOCK);
    take_values<BFLOAT16, 4, 4>(s, block, count);
  }
}
#endif

}  // namespace gptq
