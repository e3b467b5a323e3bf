// Attention of a few new tokens of one sequence over its cache:
// y[R, D] = softmax(q[R, D] @ K[P, D].T) @ V[P, D].
//
// A row is one query head of one new token. The rows that share a head of keys and values are taken
// together, so each key and value is read once for all of them. Keys and values lie as
//
//   keys, values  [kv head][position][head_dim]   of the model's dtype, or in 8 bits
//
// Of latent attention they are the same rows: a key is a latent and what is rotated beside it, and
// its value is the latent.
//
// In 8 bits a position has a scale for its key and one for its value: scores are multiplied by the
// first, and weights by the second before they meet the values.
//
// and positions are gone through in blocks of KV_BLOCK, as in FlashAttention: with each block a row
// keeps
//
//   running_max  its greatest score so far
//   row_sum      the sum of e**(score - running_max)
//   acc          the sum of e**(score - running_max) * value   [value_dim]
//
// and scales the last two by e**(old - new) when a greater score turns up. Segments of positions,
// attended to by different threads, are merged the same way (decode_step.cpp).
//
// A lane's word has one number of float32, two of bfloat16 or four codes, and whole words are loaded
// (load_words): so q, where it is multiplied as float32, and acc lie in HeadOrder.
//
// Registers, of 32 (AVX-512): scores in bfloat16 16 acc of R rows by 16 / R keys; values 16 acc of
// 4 rows by 4 vectors. Of 16 (AVX2, SSE2): 4 rows by 2 vectors.

#pragma once

#include "vector_math.h"

#include <algorithm>

namespace gptq {

// Positions whose scores are held at once: with their values half of a first-level cache.
constexpr int KV_BLOCK = 128;

constexpr int MAX_HEAD_DIM = 1024;  // of keys: a latent's, and 256 of others

// A processor's own prefetching ends with a page: asked for so far ahead, positions come half as
// fast again.
constexpr int PREFETCH_AHEAD = 1024;

template <int TYPE>
constexpr int IN_A_WORD = 4 / size_of(TYPE);

// Words of some lanes as as many vectors as a word has numbers: the first has every word's first.
template <int TYPE, class F>
INLINE void load_words(const void* from, int64_t at, F* to) {
  using V = Vectors<sizeof(F)>;
  typename V::uints words;
  memcpy(&words, static_cast<const char*>(from) + at * size_of(TYPE), sizeof words);
  if constexpr (TYPE == FLOAT32) {
    memcpy(to, &words, sizeof words);
  } else if constexpr (TYPE == BFLOAT16) {
    const typename V::uints first = words << 16, second = words & 0xffff0000;
    memcpy(to, &first, sizeof first);
    memcpy(to + 1, &second, sizeof second);
  } else {
    typename V::ints codes;
    memcpy(&codes, &words, sizeof codes);
    for (int i = 0; i < 4; i++) to[i] = __builtin_convertvector((codes << (24 - 8 * i)) >> 24, F);
  }
}

// How the numbers of a head lie: of a run of words, first each word's first number.
struct HeadOrder {
  int in_a_word, lanes;

  // Of keys and values of `type`, for the widest vectors that whole runs of both fill.
  static HeadOrder of(int type, int isa, int dim, int value_dim) {
    const int in_a_word = 4 / int(size_of(type));
    int lanes = Narrow::LANES;
#ifdef X86
    if (isa >= AVX2) lanes = isa >= AVX512 ? Wide::LANES : Middle::LANES;
#else
    (void)isa;
#endif
    while ((dim | value_dim) % (in_a_word * lanes)) lanes /= 2;  // all are powers of two
    return {in_a_word, lanes};
  }

  // Bring a head into this order, or back.
  template <bool BACK>
  void apply(const float* from, int dim, float* to) const {
    for (int run = 0; run < dim; run += in_a_word * lanes)
      for (int i = 0; i < in_a_word; i++)
        for (int lane = 0; lane < lanes; lane++) {
          const int own = run + lane * in_a_word + i, place = run + i * lanes + lane;
          to[BACK ? own : place] = from[BACK ? place : own];
        }
  }
};

template <int TYPE>
INLINE void prefetch(const void* from, int64_t at, int count) {
  for (int i = 0; i < count * size_of(TYPE); i += 64)
    __builtin_prefetch(static_cast<const char*>(from) + at * size_of(TYPE) + i);
}

// Some rows, and a range of the positions of one head of keys and values.
struct AttentionArgs {
  const float* q;           // [rows][dim], scaled, in HeadOrder, for keys read as float32
  const uint16_t* q_bf16;   // the same in its own order, for keys in bfloat16
  const int16_t* q_int16;   // the same, for keys in 8 bits
  const float* q_scales;    // [rows], of q_int16
  const void* keys;         // [position][dim], of the cache
  const void* values;       // [position][dim], of each the first value_dim
  const float* key_scales;  // [position], of a cache in 8 bits
  const float* value_scales;
  int64_t begin, end;        // positions of this range
  const int64_t* row_begin;  // [rows] the positions that each row attends to
  const int64_t* row_end;
  int rows, dim, value_dim;
  float softcap;       // of scores, or 0
  float* scores;       // [rows][KV_BLOCK]
  float* running_max;  // [rows], written, as are the next two
  float* row_sum;      // [rows]
  float* acc;          // [rows][value_dim], in HeadOrder
  // What whole runs of keys and values fill: runs are powers of two.
  int runs() const { return dim | value_dim; }
};

// scores[R, count] = q[R, dim] * keys[count, dim].T
template <class V, int TYPE, int R>
INLINE void score(const float* q, const void* keys, int64_t from, int count, int dim,
                  float* scores) {
  using floats = typename V::floats;
  for (int p = 0; p < count; p++) {
    floats sum[R];
    for (int r = 0; r < R; r++) sum[r] = floats{};
    for (int i = 0; i < dim; i += IN_A_WORD<TYPE> * V::LANES) {
      floats key[IN_A_WORD<TYPE>];
      load_words<TYPE>(keys, (from + p) * dim + i, key);
      for (int k = 0; k < IN_A_WORD<TYPE>; k++)
        for (int r = 0; r < R; r++) {
          floats a;
          load<FLOAT32>(q, r * dim + i + k * V::LANES, a);
          sum[r] += a * key[k];
        }
    }
    for (int r = 0; r < R; r++) scores[r * KV_BLOCK + p] = reduce_add(sum[r]);
  }
}

// acc[R, N vectors from `at` on] += weights[R, count] * values[count, the same]
template <class V, int TYPE, int R, int N>
INLINE void add_values(const float* weights, const void* values, int64_t from, int count, int dim,
                       int value_dim, int at, float* acc) {
  using floats = typename V::floats;
  floats sum[R][N];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < N; v++) load<FLOAT32>(acc, r * value_dim + at + v * V::LANES, sum[r][v]);
  for (int p = 0; p < count; p++) {
    floats value[N];
    const int64_t here = (from + p) * dim + at;
    for (int v = 0; v < N; v += IN_A_WORD<TYPE>)
      load_words<TYPE>(values, here + v * V::LANES, value + v);
    prefetch<TYPE>(values, here + PREFETCH_AHEAD, N * V::LANES);
    for (int r = 0; r < R; r++)
      for (int v = 0; v < N; v++) sum[r][v] += weights[r * KV_BLOCK + p] * value[v];
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < N; v++)
      memcpy(acc + r * value_dim + at + v * V::LANES, &sum[r][v], sizeof(floats));
}

template <class V, int TYPE, int R, int N>
INLINE void add_all_values(const AttentionArgs& args, const float* weights, int64_t from, int count,
                           float* acc) {
  const int dim = args.dim, value_dim = args.value_dim;
  int at = 0;
  for (; at + N * V::LANES <= value_dim; at += N * V::LANES)
    add_values<V, TYPE, R, N>(weights, args.values, from, count, dim, value_dim, at, acc);
  for (; at < value_dim; at += IN_A_WORD<TYPE> * V::LANES)
    add_values<V, TYPE, R, IN_A_WORD<TYPE>>(weights, args.values, from, count, dim, value_dim, at,
                                            acc);
}

// Turn one row's scores of a block into weights, and scale its sum and acc to the new maximum.
template <class V>
INLINE void softmax_update(const AttentionArgs& args, int row, int64_t block, int count) {
  using floats = typename V::floats;
  float* scores = args.scores + row * KV_BLOCK;
  const int low = int(std::max<int64_t>(args.row_begin[row] - block, 0));
  const int high = int(std::min<int64_t>(args.row_end[row] - block, count));
  const int padded = (count + V::LANES - 1) / V::LANES * V::LANES;
  if (low >= high) {
    memset(scores, 0, sizeof(float) * padded);
    return;
  }
  for (int i = 0; args.softcap != 0 && i < padded; i += V::LANES) {
    floats score;
    load<FLOAT32>(scores, i, score);
    cap(score, args.softcap);
    memcpy(scores + i, &score, sizeof score);
  }
  for (int i = 0; i < low; i++) scores[i] = -INFINITY;
  for (int i = high; i < padded; i++) scores[i] = -INFINITY;
  floats lane_max;
  load<FLOAT32>(scores, 0, lane_max);
  for (int i = V::LANES; i < padded; i += V::LANES) {
    floats other;
    load<FLOAT32>(scores, i, other);
    lane_max = other > lane_max ? other : lane_max;
  }
  const float old_max = args.running_max[row];
  float new_max = old_max;
  for (int i = 0; i < V::LANES; i++) new_max = std::max(new_max, lane_max[i]);
  const float correction = expf(old_max - new_max);
  floats sum{};
  for (int i = 0; i < padded; i += V::LANES) {
    floats score;
    load<FLOAT32>(scores, i, score);
    floats e = score - new_max;
    exponential(e);
    e = score == -INFINITY ? floats{} : e;  // what this row does not attend to
    sum += e;
    memcpy(scores + i, &e, sizeof e);
  }
  args.row_sum[row] = args.row_sum[row] * correction + reduce_add(sum);
  args.running_max[row] = new_max;
  if (correction == 1.0f) return;
  float* acc = args.acc + int64_t(row) * args.value_dim;
  for (int i = 0; i < args.value_dim; i++) acc[i] *= correction;
}

// of[count] *= scales[count]
INLINE void scale_block(const float* scales, int count, float* of) {
  for (int i = 0; i < count; i++) of[i] *= scales[i];
}

INLINE void reset(const AttentionArgs& args) {
  for (int row = 0; row < args.rows; row++)
    args.running_max[row] = -INFINITY, args.row_sum[row] = 0;
  memset(args.acc, 0, sizeof(float) * args.rows * args.value_dim);
}

// What follows a block's scores. R rows at a time, N vectors of values: as many as there are
// registers for.
template <class V, int TYPE, int R, int N>
INLINE void softmax_and_values(const AttentionArgs& args, int64_t block, int count) {
  for (int row = 0; row < args.rows; row++) {
    softmax_update<V>(args, row, block, count);
    if (TYPE == INT8) scale_block(args.value_scales + block, count, args.scores + row * KV_BLOCK);
  }
  int row = 0;
  const auto left = [&]() { return args.rows - row; };
  const auto weights = [&]() { return args.scores + row * KV_BLOCK; };
  const auto acc = [&]() { return args.acc + int64_t(row) * args.value_dim; };
  for (; left() >= R; row += R) add_all_values<V, TYPE, R, N>(args, weights(), block, count, acc());
  if (R > 3 && left() == 3)
    return add_all_values<V, TYPE, 3, N>(args, weights(), block, count, acc());
  if (R > 2 && left() == 2)
    return add_all_values<V, TYPE, 2, N>(args, weights(), block, count, acc());
  if (left()) add_all_values<V, TYPE, 1, N>(args, weights(), block, count, acc());
}

template <class V, int TYPE, int R, int N>
INLINE void attend_type(const AttentionArgs& args) {
  reset(args);
  for (int64_t block = args.begin; block < args.end; block += KV_BLOCK) {
    const int count = int(std::min<int64_t>(KV_BLOCK, args.end - block));
    int row = 0;
    for (; row + R <= args.rows; row += R)
      score<V, TYPE, R>(args.q + int64_t(row) * args.dim, args.keys, block, count, args.dim,
                        args.scores + row * KV_BLOCK);
    for (; row < args.rows; row++)
      score<V, TYPE, 1>(args.q + int64_t(row) * args.dim, args.keys, block, count, args.dim,
                        args.scores + row * KV_BLOCK);
    for (row = 0; TYPE == INT8 && row < args.rows; row++)
      scale_block(args.key_scales + block, count, args.scores + row * KV_BLOCK);
    softmax_and_values<V, TYPE, R, N>(args, block, count);
  }
}

// By vectors that whole runs of a head fill, as HeadOrder has them. ACC vectors of sums are held.
template <class V, int TYPE, int ACC>
INLINE void attend_runs(const AttentionArgs& args) {
  constexpr int N = ACC == 16 ? 4 : std::max(2, IN_A_WORD<TYPE>);
  if constexpr (V::LANES > Narrow::LANES)
    if (args.runs() % (IN_A_WORD<TYPE> * V::LANES))
      return attend_runs<Vectors<2 * V::LANES>, TYPE, ACC>(args);
  attend_type<V, TYPE, ACC / N, N>(args);
}

template <class V, int ACC>
INLINE void attend_body(const AttentionArgs& args, int type) {
  if (type == FLOAT32) return attend_runs<V, FLOAT32, ACC>(args);
  if (type == INT8) return attend_runs<V, INT8, ACC>(args);
  attend_runs<V, BFLOAT16, ACC>(args);
}

#ifdef X86
// By AVX-512's vectors, or by half of one where runs do not fill it.
template <int TYPE>
INLINE void softmax_and_values_wide(const AttentionArgs& args, int64_t block, int count) {
  if (args.runs() % (IN_A_WORD<TYPE> * Wide::LANES) == 0)
    softmax_and_values<Wide, TYPE, 4, 4>(args, block, count);
  else
    softmax_and_values<Middle, TYPE, 4, 4>(args, block, count);
}

// The sums of 16 vectors as one vector.
AVX512_TARGET INLINE __m512 reduce_add_16(const __m512* of) {
  __m512 pairs[8], fours[4], twos[2];
  for (int i = 0; i < 8; i++)
    pairs[i] = _mm512_add_ps(_mm512_unpacklo_ps(of[2 * i], of[2 * i + 1]),
                             _mm512_unpackhi_ps(of[2 * i], of[2 * i + 1]));
  for (int i = 0; i < 4; i++) {
    const __m512d a = _mm512_castps_pd(pairs[2 * i]), b = _mm512_castps_pd(pairs[2 * i + 1]);
    fours[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)),
                             _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
  }
  for (int i = 0; i < 2; i++)
    twos[i] = _mm512_add_ps(_mm512_shuffle_f32x4(fours[2 * i], fours[2 * i + 1], 0x88),
                            _mm512_shuffle_f32x4(fours[2 * i], fours[2 * i + 1], 0xDD));
  return _mm512_add_ps(_mm512_shuffle_f32x4(twos[0], twos[1], 0x88),
                       _mm512_shuffle_f32x4(twos[0], twos[1], 0xDD));
}

// R rows' scores of a block, 16 sums at a time, with the processor's own products.
template <int R>
BF16_TARGET INLINE void score_bfloat16(const uint16_t* q, const uint16_t* keys, int count, int dim,
                                       float* scores) {
  constexpr int P = 16 / R;
  const int whole = dim / 32 * 32;
  for (int p = 0; p < count; p += P) {
    const uint16_t* key[P];
    __m512 sum[16];
    for (int i = 0; i < P; i++) key[i] = keys + int64_t(std::min(p + i, count - 1)) * dim;
    prefetch<BFLOAT16>(key[0], PREFETCH_AHEAD, P * dim);
    for (int i = 0; i < 16; i++) sum[i] = _mm512_setzero_ps();
    for (int at = 0; at < whole; at += 32) {
      __m512bh a[R];
      for (int r = 0; r < R; r++) a[r] = (__m512bh)_mm512_loadu_si512(q + r * dim + at);
      for (int i = 0; i < P; i++) {
        const __m512bh b = (__m512bh)_mm512_loadu_si512(key[i] + at);
        for (int r = 0; r < R; r++) sum[r * P + i] = _mm512_dpbf16_ps(sum[r * P + i], a[r], b);
      }
    }
    if (whole < dim) {
      __m512bh a[R];
      for (int r = 0; r < R; r++) a[r] = (__m512bh)load_16_bf16(q + r * dim + whole);
      for (int i = 0; i < P; i++) {
        const __m512bh b = (__m512bh)load_16_bf16(key[i] + whole);
        for (int r = 0; r < R; r++) sum[r * P + i] = _mm512_dpbf16_ps(sum[r * P + i], a[r], b);
      }
    }
    alignas(64) float out[16];
    _mm512_store_ps(out, reduce_add_16(sum));
    for (int r = 0; r < R; r++) memcpy(scores + r * KV_BLOCK + p, out + r * P, sizeof(float) * P);
  }
}

BF16_TARGET static void attend_bfloat16(const AttentionArgs& args) {
  reset(args);
  for (int64_t block = args.begin; block < args.end; block += KV_BLOCK) {
    const int count = int(std::min<int64_t>(KV_BLOCK, args.end - block));
    const uint16_t* keys = static_cast<const uint16_t*>(args.keys) + block * args.dim;
    int row = 0;
    for (; args.rows - row >= 4; row += 4)
      score_bfloat16<4>(args.q_bf16 + int64_t(row) * args.dim, keys, count, args.dim,
                        args.scores + row * KV_BLOCK);
    if (args.rows - row >= 2) {
      score_bfloat16<2>(args.q_bf16 + int64_t(row) * args.dim, keys, count, args.dim,
                        args.scores + row * KV_BLOCK);
      row += 2;
    }
    if (row < args.rows)
      score_bfloat16<1>(args.q_bf16 + int64_t(row) * args.dim, keys, count, args.dim,
                        args.scores + row * KV_BLOCK);
    softmax_and_values_wide<BFLOAT16>(args, block, count);
  }
}

// R rows' scores of a block of keys in 8 bits, 16 sums at a time: q in 16 bits, whole products.
template <int R>
AVX512_TARGET INLINE void score_int8(const int16_t* q, const float* q_scales, const int8_t* keys,
                                     int count, int dim, float* scores) {
  constexpr int P = 16 / R;
  for (int p = 0; p < count; p += P) {
    const int8_t* key[P];
    __m512i sum[16];
    for (int i = 0; i < P; i++) key[i] = keys + int64_t(std::min(p + i, count - 1)) * dim;
    prefetch<INT8>(key[0], PREFETCH_AHEAD, P * dim);
    for (int i = 0; i < 16; i++) sum[i] = _mm512_setzero_si512();
    for (int at = 0; at < dim; at += 32) {
      __m512i a[R];
      for (int r = 0; r < R; r++) a[r] = _mm512_loadu_si512(q + r * dim + at);
      for (int i = 0; i < P; i++) {
        const __m512i b =
            _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(key[i] + at)));
        for (int r = 0; r < R; r++)
          sum[r * P + i] = _mm512_add_epi32(sum[r * P + i], _mm512_madd_epi16(a[r], b));
      }
    }
    __m512 sums[16];
    for (int i = 0; i < 16; i++) sums[i] = _mm512_cvtepi32_ps(sum[i]);
    alignas(64) float out[16];
    _mm512_store_ps(out, reduce_add_16(sums));
    for (int r = 0; r < R; r++)
      for (int i = 0; i < P; i++) scores[r * KV_BLOCK + p + i] = out[r * P + i] * q_scales[r];
  }
}

AVX512_TARGET static void attend_int8(const AttentionArgs& args) {
  reset(args);
  for (int64_t block = args.begin; block < args.end; block += KV_BLOCK) {
    const int count = int(std::min<int64_t>(KV_BLOCK, args.end - block));
    const int8_t* keys = static_cast<const int8_t*>(args.keys) + block * args.dim;
    int row = 0;
    const auto left = [&]() { return args.rows - row; };
    const auto q = [&]() { return args.q_int16 + int64_t(row) * args.dim; };
    const auto scores = [&]() { return args.scores + row * KV_BLOCK; };
    for (; left() >= 4; row += 4)
      score_int8<4>(q(), args.q_scales + row, keys, count, args.dim, scores());
    for (; left() >= 2; row += 2)
      score_int8<2>(q(), args.q_scales + row, keys, count, args.dim, scores());
    if (left()) score_int8<1>(q(), args.q_scales + row, keys, count, args.dim, scores());
    for (row = 0; row < args.rows; row++) scale_block(args.key_scales + block, count, scores());
    softmax_and_values_wide<INT8>(args, block, count);
  }
}
#endif

}  // namespace gptq
