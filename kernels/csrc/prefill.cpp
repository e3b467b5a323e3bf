// A prompt through a model in bfloat16: decode_step.cpp's decoder layers, for many tokens of one
// sequence.
//
// Products are gptq_gemm's, one call for the linears that read x alike. What stands between them is
// done here in one pass each: x stays float32 from layer to layer, all else is bfloat16, as
// transformers has it. The feed-forward part takes PREFILL_ROWS rows at a time, so that its gate and up
// stay small.
//
// Attention is transposed, so that a vector holds 16 tokens' values and a softmax never adds up the
// lanes of one. A task is 32 tokens of one head, and goes through the keys by KEYS_AT_ONCE, as in
// FlashAttention:
//
//   scores[keys, 32]    = K[keys, D] * q.T[D, 32]              K in blocks [16 keys][16 pairs]
//   weights[keys, 32]   = e**(scale * scores - running_max)    rounded to bfloat16
//   acc[D, 32]         += V.T[D, keys] * weights[keys, 32]     V in blocks [16 features][16 pairs]
//
// All three are products of blocks (bf16_blocks.h). Keys and values are brought into blocks once
// for all tasks:
//
//   keys     [kv head][keys / 16][D / 32]    blocks, where 16 features are left filled up
//   values   [kv head][D / 16][keys / 32]    blocks

#include "bf16_blocks.h"
#include "dense.h"
#include "gemv.h"
#include "mixture.h"
#include "team.h"
#include "vector_math.h"

#include <algorithm>
#include <type_traits>

using namespace gptq;

#ifdef X86

namespace {

constexpr int TOKENS_PER_TASK = 2 * LANES;  // two vectors
constexpr int KEYS_AT_ONCE = 128;           // whose scores are held, 16 kilobytes of them
constexpr int64_t KEY_MULTIPLE = 32;  // keys come in whole blocks of values, filled up with zeros

thread_local Scratch task_scratch;

BF16_TARGET INLINE __m256i to_bf16(__m512 value) { return (__m256i)_mm512_cvtneps_pbh(value); }

BF16_TARGET INLINE __m512 load_bf16(const uint16_t* from) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(
      _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))), 16));
}

// 16 numbers of a tensor of `type`.
BF16_TARGET INLINE __m512 load_as(const void* from, int type, int64_t at) {
  if (type == FLOAT32) return _mm512_loadu_ps(static_cast<const float*>(from) + at);
  return load_bf16(static_cast<const uint16_t*>(from) + at);
}

// 16 numbers of float32 or bfloat16.
BF16_TARGET INLINE __m512 load_row(const float* from) { return _mm512_loadu_ps(from); }
BF16_TARGET INLINE __m512 load_row(const uint16_t* from) { return load_bf16(from); }

// What a norm takes off each number of a row, and multiplies it by before its weight.
struct RowNorm {
  __m512 mean, factor;
};

// X is float or uint16_t.
template <class X>
BF16_TARGET INLINE RowNorm measure_row(const NormArgs& norm, const X* x) {
  const float count = float(norm.count);
  __m512 mean = _mm512_setzero_ps(), squares = _mm512_setzero_ps();
  if (norm.kind == Norm::LAYER) {
    for (int64_t i = 0; i < norm.count; i += LANES) mean = _mm512_add_ps(mean, load_row(x + i));
    mean = _mm512_set1_ps(_mm512_reduce_add_ps(mean) / count);
  }
  for (int64_t i = 0; i < norm.count; i += LANES) {
    const __m512 value = _mm512_sub_ps(load_row(x + i), mean);
    squares = _mm512_fmadd_ps(value, value, squares);
  }
  return {mean, _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(squares) / count + norm.eps))};
}

BF16_TARGET INLINE __m512 apply_norm(const NormArgs& norm, const RowNorm& row, __m512 x,
                                     int64_t at) {
  const __m512 weight =
      _mm512_add_ps(load_as(norm.weight, norm.type, at), _mm512_set1_ps(norm.offset()));
  x = _mm512_mul_ps(_mm512_mul_ps(_mm512_sub_ps(x, row.mean), row.factor), weight);
  return norm.bias ? _mm512_add_ps(x, load_as(norm.bias, norm.type, at)) : x;
}

// x += scale * norm?(added): one token.
BF16_TARGET void add_row(const NormArgs& norm, const uint16_t* added, float scale, float* x) {
  const __m512 scales = _mm512_set1_ps(scale);
  const RowNorm row = norm.weight ? measure_row(norm, added) : RowNorm{};
  for (int64_t i = 0; i < norm.count; i += LANES) {
    __m512 value = load_bf16(added + i);
    if (norm.weight) value = apply_norm(norm, row, value, i);
    _mm512_storeu_ps(x + i, _mm512_fmadd_ps(scales, value, _mm512_loadu_ps(x + i)));
  }
}

// y = norm?(x), rounded: one token. X is float or uint16_t.
template <class X>
BF16_TARGET void norm_row(const NormArgs& norm, const X* x, uint16_t* y) {
  const RowNorm row = norm.weight ? measure_row(norm, x) : RowNorm{};
  for (int64_t i = 0; i < norm.count; i += LANES) {
    __m512 value = load_row(x + i);
    if (norm.weight) value = apply_norm(norm, row, value, i);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(y + i), to_bf16(value));
  }
}

// gate = activation(gate) * up, or what is activated alone where `up` is null: one token, the last
// vector maybe short.
BF16_TARGET void activate_multiply(uint16_t* gate, const uint16_t* up, const Gate& by,
                                   int64_t size) {
  for (int64_t i = 0; i < size; i += LANES) {
    const __mmask16 mask = size - i >= LANES ? 0xffff : __mmask16((1u << (size - i)) - 1);
    const auto wide = [&](const uint16_t* from) __attribute__((
                          always_inline, target("avx512f,avx512bw,avx512vl"))) {
      return _mm512_castsi512_ps(
          _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from + i)), 16));
    };
    floats g = (floats)wide(gate);
    activate(g, by);
    if (up) {
      floats u = (floats)wide(up);
      multiply_up(g, u, by);
    }
    _mm256_mask_storeu_epi16(gate + i, mask, to_bf16((__m512)g));
  }
}

// How a head of one token is rotated: the first `dim` numbers of it, or none.
struct Rotation {
  const float *cos, *sin;  // [dim]
  int dim;
  bool neighbours;
};

// A head of one token [norm.count]: its norm, where it has one, and its rotation.
BF16_TARGET void rotate_head(const uint16_t* from, const NormArgs& norm, const Rotation& rotation,
                             uint16_t* to) {
  alignas(64) float values[16 * LANES];
  const int dim = int(norm.count);
  if (norm.weight) {
    const RowNorm row = measure_row(norm, from);
    for (int i = 0; i < dim; i += LANES)
      _mm512_store_ps(values + i, apply_norm(norm, row, load_bf16(from + i), i));
  } else {
    for (int i = 0; i < dim; i += LANES) _mm512_store_ps(values + i, load_bf16(from + i));
  }
  const auto [cos, sin, rotated, neighbours] = rotation;
  const int half = rotated / 2;
  const bool whole = half % LANES == 0 && !neighbours;
  if (!whole) rotate(values, cos, sin, rotated, neighbours);
  for (int i = 0; whole && i < half; i += LANES) {
    const __m512 low = _mm512_load_ps(values + i), high = _mm512_loadu_ps(values + half + i);
    const __m512 a = _mm512_fmsub_ps(low, _mm512_loadu_ps(cos + i),
                                     _mm512_mul_ps(high, _mm512_loadu_ps(sin + i)));
    const __m512 b = _mm512_fmadd_ps(high, _mm512_loadu_ps(cos + half + i),
                                     _mm512_mul_ps(low, _mm512_loadu_ps(sin + half + i)));
    _mm512_store_ps(values + i, a);
    _mm512_storeu_ps(values + half + i, b);
  }
  for (int i = 0; i < dim; i += LANES)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), to_bf16(_mm512_load_ps(values + i)));
}

// Blocks that hold a head's features, 32 in each.
int64_t depth_of(int dim) { return (dim + 31) / 32; }

// 32 features of a head from `at` on, or the last 16 and zeros.
BF16_TARGET INLINE __m512i load_features(const uint16_t* from, int at, int dim) {
  return at + 32 <= dim ? _mm512_loadu_si512(from + at) : load_16_bf16(from + at);
}

// Up to 16 rows [dim] of bfloat16 as blocks [dim / 32][16 pairs][16 rows]: what stands on the right
// of a product.
BF16_TARGET void pack_queries(const uint16_t* from, int64_t stride, int rows, int dim,
                              uint32_t* to) {
  for (int at = 0; at < dim; at += 2 * PAIRS, to += AMX_BLOCK) {
    __m512i v[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++)
      v[i] = i < rows ? load_features(from + i * stride, at, dim) : _mm512_setzero_si512();
    transpose(v);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) _mm512_store_si512(to + i * LANES, v[i]);
  }
}

// 16 keys [dim] as blocks [dim / 32][16 keys][16 pairs], filled up with zeros.
BF16_TARGET void pack_keys(const uint16_t* from, int rows, int dim, uint32_t* to) {
  for (int at = 0; at < dim; at += 2 * PAIRS, to += AMX_BLOCK)
    for (int i = 0; i < 16; i++)
      _mm512_store_si512(to + i * PAIRS, i < rows ? load_features(from + int64_t(i) * dim, at, dim)
                                                  : _mm512_setzero_si512());
}

// 32 values [dim] as blocks of [16 features][16 pairs of values], `stride` from one 16 features to
// the next.
BF16_TARGET void pack_values(const uint16_t* from, int rows, int dim, int64_t stride,
                             uint32_t* to) {
  alignas(64) uint16_t order[32];
  for (int i = 0; i < 16; i++) order[2 * i] = uint16_t(i), order[2 * i + 1] = uint16_t(16 + i);
  const __m512i interleave = _mm512_load_si512(order);
  for (int at = 0; at < dim; at += LANES, to += stride) {
    __m512i v[16];
#pragma GCC unroll 16
    for (int pair = 0; pair < 16; pair++) {
      const auto half = [&](int row) __attribute__((always_inline, target("avx512f"))) {
        return row < rows ? _mm256_loadu_si256(
                                reinterpret_cast<const __m256i*>(from + int64_t(row) * dim + at))
                          : _mm256_setzero_si256();
      };
      v[pair] = _mm512_permutexvar_epi16(
          interleave,
          _mm512_inserti64x4(_mm512_castsi256_si512(half(2 * pair)), half(2 * pair + 1), 1));
    }
    transpose(v);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) _mm512_store_si512(to + i * PAIRS, v[i]);
  }
}

// What the tasks of a layer's attention share.
struct AttentionArgs {
  const uint16_t* q;       // [token][heads][dim], rotated
  const uint32_t* keys;    // [kv_heads][keys / 16][dim / 32] blocks
  const uint32_t* values;  // [kv_heads][dim / 16][keys / 32] blocks
  uint16_t* y;             // [token][heads][dim]
  int64_t past, tokens, keys_held, window;
  int heads, kv_heads, dim;
  float scale, softcap;
  const void* sinks;  // [heads] of sinks_type, or null
  int sinks_type;
  bool amx;
};

// Where a key's 16 scores are among those of a task's first or second 16 tokens.
constexpr int score_place(int key) { return key / LANES * 2 * AMX_BLOCK + key % LANES * LANES; }

// What a task works in.
struct TaskBuffers {
  uint32_t* q;        // [2][dim / 32] blocks
  float* scores;      // [KEYS_AT_ONCE / 16][2] blocks
  uint32_t* weights;  // [2][KEYS_AT_ONCE / 32] blocks
  float* acc;         // [dim / 16][2] blocks

  // Lay it out in `memory`, and count the bytes that takes.
  size_t lay_out(int dim, void* memory) {
    Arena arena(memory);
    q = arena.take<uint32_t>(2 * depth_of(dim) * AMX_BLOCK);
    scores = arena.take<float>(KEYS_AT_ONCE / 16 * 2 * AMX_BLOCK);
    weights = arena.take<uint32_t>(2 * KEYS_AT_ONCE / 32 * AMX_BLOCK);
    acc = arena.take<float>(dim / 16 * 2 * AMX_BLOCK);
    return arena.used();
  }
};

// Cap 16 tokens' scores of some keys, once scaled.
BF16_TARGET void cap_scores(float* scores, int keys, float scale, float softcap) {
  for (int key = 0; key < keys; key++) {
    float* at = scores + score_place(key);
    floats score = (floats)_mm512_mul_ps(_mm512_load_ps(at), _mm512_set1_ps(scale));
    cap(score, softcap);
    _mm512_store_ps(at, (__m512)score);
  }
}

// Turn 16 tokens' scores of some keys into weights; return the factor that scales their acc to the
// new maximum. A token attends to the keys after `first_key` up to `last_key`, or to all of these
// where they are `whole`.
BF16_TARGET __m512 softmax_update(const float* scores, int keys, int64_t first, __m512i last_key,
                                  __m512i first_key, bool whole, float scale, __m512& running_max,
                                  __m512& row_sum, uint32_t* weights) {
  const __m512 lowest = _mm512_set1_ps(-INFINITY), scales = _mm512_set1_ps(scale);
  const auto attends = [&](int key) __attribute__((always_inline, target("avx512f"))) {
    const __m512i at = _mm512_set1_epi32(int(first + key));
    return _mm512_kand(_mm512_cmple_epi32_mask(at, last_key),
                       _mm512_cmpgt_epi32_mask(at, first_key));
  };
  __m512 lane_max[4] = {lowest, lowest, lowest, lowest};
  for (int key = 0; key < keys; key += 4)
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      const __m512 score = _mm512_load_ps(scores + score_place(key + i));
      lane_max[i] = whole ? _mm512_max_ps(lane_max[i], score)
                          : _mm512_mask_max_ps(lane_max[i], attends(key + i), lane_max[i], score);
    }
  const __m512 block_max = _mm512_max_ps(_mm512_max_ps(lane_max[0], lane_max[1]),
                                         _mm512_max_ps(lane_max[2], lane_max[3]));
  const __m512 new_max = _mm512_max_ps(running_max, _mm512_mul_ps(block_max, scales));
  // A token that attends to none of the keys so far has no maximum: its weights are masked.
  const __m512 base = _mm512_mask_blend_ps(_mm512_cmp_ps_mask(new_max, lowest, _CMP_EQ_OQ), new_max,
                                           _mm512_setzero_ps());
  floats factor = (floats)_mm512_sub_ps(running_max, base);
  exponential(factor);
  alignas(64) uint16_t order[32];
  for (int i = 0; i < 16; i++) order[2 * i] = uint16_t(i), order[2 * i + 1] = uint16_t(16 + i);
  const __m512i interleave = _mm512_load_si512(order);
  __m512 total = _mm512_setzero_ps();
  for (int key = 0; key < keys; key += 2) {
    __m512 pair[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
      floats e =
          (floats)_mm512_fmsub_ps(_mm512_load_ps(scores + score_place(key + i)), scales, base);
      exponential(e);
      pair[i] = whole ? (__m512)e : _mm512_maskz_mov_ps(attends(key + i), (__m512)e);
      total = _mm512_add_ps(total, pair[i]);
    }
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(pair[1], pair[0]);
    _mm512_store_si512(weights + key / 2 * LANES, _mm512_permutexvar_epi16(interleave, both));
  }
  row_sum = _mm512_fmadd_ps(row_sum, (__m512)factor, total);
  running_max = new_max;
  return (__m512)factor;
}

// Attention of 32 tokens of one head.
BF16_TARGET void attend(const AttentionArgs& a, int head, int64_t token,
                        const TaskBuffers& buffers) {
  const int64_t depth = depth_of(a.dim);
  const int tokens = int(std::min<int64_t>(TOKENS_PER_TASK, a.tokens - token));
  const int64_t kv = head / (a.heads / a.kv_heads), stride = int64_t(a.heads) * a.dim;
  const uint16_t* q = a.q + token * stride + int64_t(head) * a.dim;
  const int64_t end = a.past + token + tokens, first_token = a.past + token;
  const int64_t start =
      a.window ? std::max<int64_t>(0, first_token + 1 - a.window) / KEYS_AT_ONCE * KEYS_AT_ONCE : 0;
  __m512i last_key[2], first_key[2];
  __m512 running_max[2], row_sum[2];
  for (int v = 0; v < 2; v++) {
    pack_queries(q + v * LANES * stride, stride, std::clamp(tokens - v * LANES, 0, LANES), a.dim,
                 buffers.q + v * depth * AMX_BLOCK);
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    last_key[v] =
        _mm512_min_epi32(_mm512_add_epi32(_mm512_set1_epi32(int(first_token) + v * LANES), lane),
                         _mm512_set1_epi32(int(end - 1)));
    first_key[v] = a.window ? _mm512_sub_epi32(last_key[v], _mm512_set1_epi32(int(a.window)))
                            : _mm512_set1_epi32(-1);
    // A sink is a score before all others, of a key without a value.
    running_max[v] = _mm512_set1_ps(a.sinks ? load_number(a.sinks, a.sinks_type, head) : -INFINITY);
    row_sum[v] = _mm512_set1_ps(a.sinks ? 1.0f : 0.0f);
  }
  const int64_t chunks = a.keys_held / 32;
  for (int64_t key = start; key < end; key += KEYS_AT_ONCE) {
    const int keys = int(std::min<int64_t>(KEYS_AT_ONCE, round_up(end - key, KEY_MULTIPLE)));
    const uint32_t* block = a.keys + (kv * a.keys_held + key) / 16 * depth * AMX_BLOCK;
    for (int at = 0; at < keys; at += 32)
      multiply_blocks(
          {block + at / 16 * depth * AMX_BLOCK, depth * AMX_BLOCK, buffers.q, depth * AMX_BLOCK,
           buffers.scores + at / 16 * 2 * AMX_BLOCK, 2 * AMX_BLOCK, depth, true, nullptr, 0},
          2, LANES, a.amx);
    const bool whole = key + keys - 1 <= first_token && (!a.window || key > end - 1 - a.window);
    for (int v = 0; v < 2; v++) {
      if (a.softcap != 0) cap_scores(buffers.scores + v * AMX_BLOCK, keys, a.scale, a.softcap);
      const __m512 correction =
          softmax_update(buffers.scores + v * AMX_BLOCK, keys, key, last_key[v], first_key[v],
                         whole, a.softcap != 0 ? 1.0f : a.scale, running_max[v], row_sum[v],
                         buffers.weights + v * keys / 32 * AMX_BLOCK);
      if (key == start || _mm512_cmp_ps_mask(correction, _mm512_set1_ps(1.0f), _CMP_NEQ_UQ) == 0)
        continue;
      for (int feature = 0; feature < a.dim; feature++) {
        float* at = buffers.acc + (feature / LANES * 2 + v) * AMX_BLOCK + feature % LANES * LANES;
        _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), correction));
      }
    }
    for (int feature = 0; feature < a.dim; feature += 32) {
      const int features = std::min(a.dim - feature, 32);
      multiply_blocks({a.values + ((kv * a.dim + feature) / 16 * chunks + key / 32) * AMX_BLOCK,
                       chunks * AMX_BLOCK, buffers.weights, keys / 32 * AMX_BLOCK,
                       buffers.acc + feature / 16 * 2 * AMX_BLOCK, 2 * AMX_BLOCK, keys / 32,
                       key == start, nullptr, 0},
                      features / 16, LANES, a.amx);
    }
  }
  for (int v = 0; v < 2; v++) {
    const __m512 share = _mm512_div_ps(_mm512_set1_ps(1.0f), row_sum[v]);
    const int count = std::clamp(tokens - v * LANES, 0, LANES);
    for (int feature = 0; feature < a.dim; feature += LANES) {
      __m512i lines[16];
      const float* from = buffers.acc + (feature / LANES * 2 + v) * AMX_BLOCK;
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++)
        lines[i] = _mm512_castps_si512(_mm512_mul_ps(_mm512_load_ps(from + i * LANES), share));
      transpose(lines);
      uint16_t* to = a.y + (token + v * LANES) * stride + int64_t(head) * a.dim + feature;
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++)
        if (i < count)
          _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i * stride),
                              to_bf16(_mm512_castsi512_ps(lines[i])));
    }
  }
}

// What a prompt works in: bfloat16 but for x.
struct PromptBuffers {
  float* x;                 // [tokens][hidden]
  uint16_t* normed;         // [tokens][hidden]
  uint16_t *q, *k, *v;      // [tokens][heads][head_dim], [tokens][kv_heads][head_dim] twice
  uint16_t* turns;          // [PREFILL_ROWS][heads][3][head_dim], where they are projected in turns
  uint16_t* attention;      // [tokens][heads][head_dim]
  uint16_t* delta;          // [tokens][hidden], what is added to x
  uint16_t *gate, *up;      // [PREFILL_ROWS][the most columns of a gate]
  uint32_t *keys, *values;  // blocks
  // Of a mixture of experts.
  uint16_t *gathered, *answers;  // [PREFILL_ROWS][hidden], what an expert reads and answers
  float* sums;                   // [tokens][hidden], of the answers
  float* scores;                 // [tokens][experts], of the router
  float* shared_weight;          // [tokens], of the expert that all tokens have
  Routes routes;

  // Lay it out in `memory`, and count the bytes that takes.
  size_t lay_out(const GptqModel& model, int64_t tokens, int64_t keys_held, void* memory) {
    Arena arena(memory);
    const auto take = [&](auto*& part, size_t count) {
      part = arena.take<std::remove_pointer_t<std::remove_reference_t<decltype(part)>>>(count);
    };
    const size_t q_size = size_t(model.heads) * model.head_dim,
                 kv_size = size_t(model.kv_heads) * model.head_dim;
    const size_t rows = size_t(std::min(tokens, PREFILL_ROWS));
    take(x, tokens * model.hidden);
    take(normed, tokens * model.hidden);
    take(q, tokens * q_size);
    take(k, tokens * kv_size);
    take(v, tokens * kv_size);
    take(attention, tokens * q_size);
    take(delta, tokens * model.hidden);
    size_t columns = 0, turns_size = 0;
    GptqMixture largest{};
    for (int i = 0; i < model.layers; i++) {
      const GptqDecoderLayer& layer = model.layer[i];
      columns = std::max(columns, size_t(layer.gate.out_features));
      if (!layer.k.out_features) turns_size = 3 * q_size;
      if (!layer.mixture) continue;
      const GptqMixture& mixture = *layer.mixture;
      const int end = mixture.experts + mixture.shared;
      for (int at = 0; at < end; at++)
        columns = std::max(columns, size_t(mixture.expert[at].gate.out_features));
      largest.experts = std::max(largest.experts, mixture.experts);
      largest.top_k = std::max(largest.top_k, mixture.top_k);
    }
    const bool mixed = largest.experts > 0;
    take(turns, rows * turns_size);
    take(gate, rows * columns);
    take(up, rows * columns);
    take(gathered, mixed ? rows * model.hidden : 0);
    take(answers, mixed ? rows * model.hidden : 0);
    take(sums, mixed ? tokens * model.hidden : 0);
    take(scores, tokens * largest.experts);
    take(shared_weight, mixed ? tokens : 0);
    routes.lay_out(arena, largest, mixed ? tokens : 0);
    take(keys, keys_held * model.kv_heads * depth_of(model.head_dim) * PAIRS);
    take(values, keys_held * kv_size / 2);
    return arena.used();
  }
};

// outs[i] = x * parts[i] for `count` projections: those that read x alike in one call.
int project_all(const GptqModel&, const GptqProjection* const* parts, uint16_t* const* outs,
                int count, const uint16_t* x, int64_t m, int amx, int threads) {
  for (int first = 0; first < count;) {
    const GptqLinear* linears[3];
    void* y[3];
    int alike = 0;
    do {
      linears[alike] = parts[first]->packed;
      y[alike++] = outs[first++];
    } while (first < count && parts[first]->same_rows);
    if (gptq_gemm(linears, y, alike, x, m, BFLOAT16, AVX512_BF16, amx, threads)) return 1;
  }
  return 0;
}

// The same for so few rows that unpacking panels does not pay.
int project_few(const GptqModel& model, const GptqProjection* const* parts, uint16_t* const* outs,
                int count, const uint16_t* x, int64_t m, int, int threads) {
  for (int i = 0; i < count; i++)
    if (gptq_gemv(parts[i]->packed, x, outs[i], m, BFLOAT16, model.isa, model.activations, threads))
      return 1;
  return 0;
}

BF16_TARGET void widen(const uint16_t* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i++) to[i] = from_bfloat16(from[i]);
}

BF16_TARGET void narrow(const float* from, int64_t count, uint16_t* to) {
  for (int64_t i = 0; i < count; i += LANES)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), to_bf16(_mm512_loadu_ps(from + i)));
}

// One head of a position, into a cache in 8 bits.
void keep_int8(const uint16_t* from, int dim, int64_t place, void* codes, float* scales) {
  float wide[16 * LANES];
  widen(from, dim, wide);
  scales[place] = quantize(wide, dim, MAX_INT8, static_cast<int8_t*>(codes) + place * dim);
}

// `count` positions of a head from a cache in 8 bits, rounded: to [count][dim].
BF16_TARGET void read_int8(const void* codes, const float* scales, int64_t place, int count,
                           int dim, uint16_t* to) {
  for (int row = 0; row < count; row++)
    for (int i = 0; i < dim; i += LANES) {
      const int8_t* from = static_cast<const int8_t*>(codes) + (place + row) * dim + i;
      const __m512i whole =
          _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
      const __m512 value =
          _mm512_mul_ps(_mm512_cvtepi32_ps(whole), _mm512_set1_ps(scales[place + row]));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + row * dim + i), to_bf16(value));
    }
}

BF16_TARGET void add_scaled(const uint16_t* from, float scale, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += LANES)
    _mm512_storeu_ps(to + i, _mm512_fmadd_ps(load_bf16(from + i), _mm512_set1_ps(scale),
                                             _mm512_loadu_ps(to + i)));
}

struct Prefill {
  const GptqModel& model;
  const PromptBuffers& buffers;
  const float *cos, *sin;
  int64_t past, tokens, keys_held;
  int amx, threads;

  NormArgs args(const GptqNorm& norm, int64_t size) const {
    return {norm.weight, norm.bias, model.parameter_type, Norm(model.norm_kind), size, model.eps};
  }

  // x += what the last part added, normed by `before`, or nothing where that is null; y = norm(x).
  void add_and_norm(const GptqNorm* before, const GptqNorm& norm, uint16_t* y) const {
    parallel_for(threads, tokens, [&](int64_t row) {
      const int64_t at = row * model.hidden;
      if (before)
        add_row(args(*before, model.hidden), buffers.delta + at, model.residual, buffers.x + at);
      norm_row(args(norm, model.hidden), buffers.x + at, y + at);
    });
  }

  void add_delta(const GptqNorm& norm) const {
    parallel_for(threads, tokens, [&](int64_t row) {
      const int64_t at = row * model.hidden;
      add_row(args(norm, model.hidden), buffers.delta + at, model.residual, buffers.x + at);
    });
  }

  Rotation rotation(const GptqDecoderLayer& layer, int64_t row) const {
    if (layer.angles < 0) return {nullptr, nullptr, 0, false};
    const int64_t at = (layer.angles * tokens + row) * model.rotary_dim;
    return {cos + at, sin + at, model.rotary_dim, model.neighbours != 0};
  }

  // The norm of all heads of one token.
  void norm_heads(const GptqNorm& norm, uint16_t* all, int heads, int64_t row) const {
    const int64_t size = int64_t(heads) * model.head_dim;
    norm_row(args(norm, size), all + row * size, all + row * size);
  }

  // Rotate queries and keys, write keys and values into the cache, and bring those of it into
  // blocks.
  void fill_cache(const GptqDecoderLayer& layer, const GptqKvCache& cache) const {
    const int dim = model.head_dim;
    uint16_t *keys = static_cast<uint16_t*>(cache.keys),
             *values = static_cast<uint16_t*>(cache.values);
    parallel_for(threads, tokens, [&](int64_t row) {
      const Rotation angles = rotation(layer, row);
      GptqNorm q_norm = layer.q_norm, k_norm = layer.k_norm;
      if (model.all_heads) {
        norm_heads(q_norm, buffers.q, model.heads, row);
        norm_heads(k_norm, buffers.k, model.kv_heads, row);
        q_norm = k_norm = {};
      }
      for (int head = 0; head < model.heads; head++) {
        uint16_t* q = buffers.q + (row * model.heads + head) * dim;
        rotate_head(q, args(q_norm, dim), angles, q);
      }
      for (int head = 0; head < model.kv_heads; head++) {
        const int64_t from = (row * model.kv_heads + head) * dim,
                      place = head * cache.capacity + past + row;
        if (cache.key_scales) {
          rotate_head(buffers.k + from, args(k_norm, dim), angles, buffers.k + from);
          keep_int8(buffers.k + from, dim, place, cache.keys, cache.key_scales);
          keep_int8(buffers.v + from, dim, place, cache.values, cache.value_scales);
          continue;
        }
        rotate_head(buffers.k + from, args(k_norm, dim), angles, keys + place * dim);
        memcpy(values + place * dim, buffers.v + from, size_t(dim) * 2);
      }
    });
    const int64_t blocks = keys_held / 32, end = past + tokens;
    parallel_for(threads, model.kv_heads * blocks, [&](int64_t i) {
      const int64_t head = i / blocks, chunk = i % blocks,
                    place = head * cache.capacity + chunk * 32;
      const int count = int(std::clamp<int64_t>(end - chunk * 32, 0, 32));
      uint16_t widened[2][32 * 16 * LANES];  // of a cache in 8 bits
      const uint16_t *key = keys + place * dim, *value = values + place * dim;
      if (cache.key_scales) {
        read_int8(cache.keys, cache.key_scales, place, count, dim, widened[0]);
        read_int8(cache.values, cache.value_scales, place, count, dim, widened[1]);
        key = widened[0], value = widened[1];
      }
      uint32_t* to = buffers.keys + (head * blocks + chunk) * 2 * depth_of(dim) * AMX_BLOCK;
      pack_keys(key, std::min(count, 16), dim, to);
      pack_keys(key + 16 * dim, std::max(count - 16, 0), dim, to + depth_of(dim) * AMX_BLOCK);
      pack_values(value, count, dim, blocks * AMX_BLOCK,
                  buffers.values + (head * (dim / 16) * blocks + chunk) * AMX_BLOCK);
    });
  }

  int attend_all(const GptqDecoderLayer& layer) const {
    const AttentionArgs a{
        buffers.q,      buffers.keys, buffers.values, buffers.attention, past,
        tokens,         keys_held,    layer.window,   model.heads,       model.kv_heads,
        model.head_dim, model.scale,  model.softcap,  layer.sinks,       model.parameter_type,
        amx != 0};
    const int64_t parts = round_up<int64_t>(tokens, TOKENS_PER_TASK) / TOKENS_PER_TASK;
    std::atomic<int> failed{0};
    std::atomic<int64_t> next{0};
    const auto attend_some = [&](Chunks& chunks) {
      TaskBuffers task_buffers;
      void* memory = task_scratch.get(task_buffers.lay_out(a.dim, nullptr));
      task_buffers.lay_out(a.dim, memory);
      if (!memory) failed = 1;
#ifdef MATRIX_UNIT
      if (amx) configure_tiles(LANES, LANES);
#endif
      do
        for (int64_t task = chunks.begin; memory && task < chunks.end; task++)
          attend(a, int(task % model.heads), (parts - 1 - task / model.heads) * TOKENS_PER_TASK,
                 task_buffers);
      while (chunks.next());
#ifdef MATRIX_UNIT
      if (amx) release_tiles();
#endif
    };
    // The last tokens attend to the most keys: they begin, so that no thread is left with a long
    // task.
    together(threads, Meet::BARRIER,
             [&](Together& all) { all.share_in_order(parts * model.heads, next, attend_some); });
    return failed;
  }

  // q, k and v; those that are projected in turns are parted, some tokens at a time.
  int project_heads(const GptqDecoderLayer& layer) const {
    const GptqProjection* reads[] = {&layer.q, &layer.k, &layer.v};
    uint16_t *outs[] = {buffers.q, buffers.k, buffers.v}, *turns[] = {buffers.turns};
    if (layer.k.out_features)
      return project_all(model, reads, outs, 3, buffers.normed, tokens, amx, threads);
    const int64_t heads = model.heads, dim = model.head_dim;
    for (int64_t first = 0; first < tokens; first += PREFILL_ROWS) {
      const int64_t rows = std::min(PREFILL_ROWS, tokens - first);
      const uint16_t* x = buffers.normed + first * model.hidden;
      if (project_all(model, reads, turns, 1, x, rows, amx, threads)) return 1;
      parallel_for(threads, rows, [&](int64_t row) {
        for (int64_t i = 0; i < 3 * heads; i++)
          memcpy(outs[i % 3] + ((first + row) * heads + i / 3) * dim,
                 buffers.turns + (row * 3 * heads + i) * dim, size_t(dim) * 2);
      });
    }
    return 0;
  }

  int run(int index, const GptqKvCache& cache) const {
    const GptqDecoderLayer& layer = model.layer[index];
    add_and_norm(index ? &model.layer[index - 1].output_norm : nullptr, layer.input_norm,
                 buffers.normed);
    if (project_heads(layer)) return 1;
    fill_cache(layer, cache);
    if (attend_all(layer)) return 1;
    const GptqProjection* o[] = {&layer.o};
    uint16_t* delta[] = {buffers.delta};
    if (project_all(model, o, delta, 1, buffers.attention, tokens, amx, threads)) return 1;
    if (model.parallel) {
      add_and_norm(nullptr, layer.feed_forward_norm, buffers.normed);
      add_delta(layer.attention_norm);
    } else {
      add_and_norm(&layer.attention_norm, layer.feed_forward_norm, buffers.normed);
    }
    if (layer.mixture) return run_experts(*layer.mixture);
    for (int64_t row = 0; row < tokens; row += PREFILL_ROWS) {
      const int64_t at = row * model.hidden, rows = std::min(PREFILL_ROWS, tokens - row);
      if (feed_forward({layer.gate, layer.up, layer.down}, buffers.normed + at, rows, project_all,
                       buffers.delta + at))
        return 1;
    }
    return 0;
  }

  // y [rows][hidden] of x [rows][hidden], for up to PREFILL_ROWS rows, by `project`.
  int feed_forward(const GptqExpert& part, const uint16_t* x, int64_t rows,
                   decltype(project_all)* project, uint16_t* y) const {
    const GptqProjection *feed[] = {&part.gate, &part.up}, *down[] = {&part.down};
    uint16_t *both[] = {buffers.gate, buffers.up}, *out[] = {y};
    const int64_t columns = part.gate.out_features;
    const bool gated = part.up.out_features > 0;
    if (project(model, feed, both, gated ? 2 : 1, x, rows, amx, threads)) return 1;
    const Gate by{Activation(model.activation), model.swiglu_alpha, model.swiglu_limit};
    parallel_for(threads, rows, [&](int64_t i) {
      activate_multiply(buffers.gate + i * columns, gated ? buffers.up + i * columns : nullptr, by,
                        columns);
    });
    return project(model, down, out, 1, buffers.gate, rows, amx, threads);
  }

  // delta = what each token's experts answer.
  int run_experts(const GptqMixture& mixture) const {
    route(mixture);
    const int end = mixture.experts + mixture.shared;
    for (int i = 0; i < end; i++)
      for (int64_t at = buffers.routes.first[i]; at < buffers.routes.first[i + 1];
           at += PREFILL_ROWS)
        if (run_expert(mixture.expert[i], at,
                       std::min(PREFILL_ROWS, buffers.routes.first[i + 1] - at)))
          return 1;
    parallel_for(threads, tokens, [&](int64_t row) {
      narrow(buffers.sums + row * model.hidden, model.hidden, buffers.delta + row * model.hidden);
    });
    return 0;
  }

  // The experts of each token, of whose answers no sum has anything yet.
  void route(const GptqMixture& mixture) const {
    Routes routes = buffers.routes;
    const int isa = std::min<int>(model.isa, AVX512);  // float32: a rounded score may choose others
    parallel_for(threads, tokens, [&](int64_t row) {
      float* x = buffers.sums + row * model.hidden;
      widen(buffers.normed + row * model.hidden, model.hidden, x);
      float* scores = buffers.scores + row * mixture.experts;
      dense({mixture.router, model.hidden, mixture.router_type, isa}, 0, mixture.experts, x,
            nullptr, scores);
      routes.choose(mixture, row, scores);
      buffers.shared_weight[row] = 1;
      if (mixture.shared_gate) {
        float score;
        dense({mixture.shared_gate, model.hidden, model.parameter_type, isa}, 0, 1, x, nullptr,
              &score);
        buffers.shared_weight[row] = 1.0f / (1.0f + expf(-score));
      }
      memset(x, 0, sizeof(float) * model.hidden);
    });
    routes.sort(mixture, tokens, buffers.shared_weight);
  }

  // sums += an expert's answers for some of its rows, from the route `at` on.
  int run_expert(const GptqExpert& expert, int64_t at, int64_t rows) const {
    const size_t size = size_t(model.hidden);
    const int32_t* row = buffers.routes.row + at;
    const float* weight = buffers.routes.weight + at;
    parallel_for(threads, rows, [&](int64_t i) {
      memcpy(buffers.gathered + i * size, buffers.normed + row[i] * size, 2 * size);
    });
    const auto project = rows < gptq_gemm_from(BFLOAT16, model.isa, model.activations, amx)
                             ? project_few
                             : project_all;
    if (feed_forward(expert, buffers.gathered, rows, project, buffers.answers)) return 1;
    parallel_for(threads, rows, [&](int64_t i) {
      add_scaled(buffers.answers + i * size, weight[i], model.hidden, buffers.sums + row[i] * size);
    });
    return 0;
  }
};

}  // namespace

#endif

extern "C" {

int gptq_prefill(const GptqModel* model, const void* x, const float* cos, const float* sin,
                 const GptqSequence* sequence, void* y, int amx, int threads) {
#ifdef X86
  const int64_t past = sequence->past, m = sequence->tokens;
  const int64_t keys_held = round_up(past + m, KEY_MULTIPLE);
  PromptBuffers buffers;
  Scratch scratch;  // given back at the end: it may be large
  void* memory = scratch.get(buffers.lay_out(*model, m, keys_held, nullptr));
  if (!memory) return 1;
  buffers.lay_out(*model, m, keys_held, memory);
  widen(static_cast<const uint16_t*>(x), m * model->hidden, buffers.x);
  const Prefill prefill{*model, buffers, cos, sin, past, m, keys_held, amx, threads};
  for (int i = 0; i < model->layers; i++)
    if (prefill.run(i, sequence->caches[i])) return 1;
  const GptqNorm* last = model->layers ? &model->layer[model->layers - 1].output_norm : nullptr;
  prefill.add_and_norm(last, model->norm, static_cast<uint16_t*>(y));
  return 0;
#else
  (void)model, (void)x, (void)cos, (void)sin, (void)sequence, (void)y, (void)amx, (void)threads;
  return 1;
#endif
}

}  // extern "C"
