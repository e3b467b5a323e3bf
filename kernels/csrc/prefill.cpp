// A prompt through the blocks of a Llama-like model, in bfloat16: decode_step.cpp's blocks, for many tokens.
//
// Products are gptq_gemm's, one call for the layers that read x alike. What stands between them is done
// here in one pass each: x stays float32 from block to block, all else is bfloat16, as transformers has it.
// Feed-forward layers take so many rows at a time that what they make stays small.
//
// Attention turns everything so that a vector holds 16 tokens' values: scores [key][token] are keys as they
// lie by queries turned once, weights [key][token] are summed and scaled without leaving their place, and
// what is seen [feature][token] is values, turned once for each head of them, by weights. So a softmax never
// adds up the lanes of a vector, and all three products are those of blocks (bf16_blocks.h).

#include "bf16_blocks.h"
#include "heads.h"

#include <algorithm>
#include <type_traits>

#ifdef _OPENMP
#include <omp.h>
#endif

using namespace gptq;

#ifdef X86

namespace {

constexpr int TOKENS = 2 * LANES;  // of a task: two vectors
constexpr int KEYS = 128;          // whose scores are held at once, 16 kilobytes of them
constexpr int64_t NO_KEY = 32;     // keys come in whole blocks of values, filled up with zeros

thread_local Scratch task_scratch;

BF16_TARGET INLINE __m256i rounded(__m512 value) { return (__m256i)_mm512_cvtneps_pbh(value); }

BF16_TARGET INLINE __m512 widened(const uint16_t* from) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))), 16));
}

// x += added, then its norm, rounded: one token.
BF16_TARGET void add_norm(float* x, const uint16_t* added, const float* weight, int64_t size, float eps, uint16_t* y) {
  __m512 squares = _mm512_setzero_ps();
  for (int64_t i = 0; i < size; i += LANES) {
    __m512 value = _mm512_loadu_ps(x + i);
    if (added) {
      value = _mm512_add_ps(value, widened(added + i));
      _mm512_storeu_ps(x + i, value);
    }
    squares = _mm512_fmadd_ps(value, value, squares);
  }
  const __m512 factor = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(squares) / float(size) + eps));
  for (int64_t i = 0; i < size; i += LANES) {
    const __m512 value = _mm512_mul_ps(_mm512_loadu_ps(x + i), factor);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(y + i), rounded(_mm512_mul_ps(value, _mm512_loadu_ps(weight + i))));
  }
}

// gate = silu(gate) * up: one token, the last vector maybe short.
BF16_TARGET void gate_by(uint16_t* gate, const uint16_t* up, int64_t size) {
  for (int64_t i = 0; i < size; i += LANES) {
    const __mmask16 mask = size - i >= LANES ? 0xffff : __mmask16((1u << (size - i)) - 1);
    const auto wide = [&](const uint16_t* from) __attribute__((always_inline, target("avx512f,avx512bw,avx512vl"))) {
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from + i)), 16));
    };
    const __m512 g = wide(gate), u = wide(up);
    floats e = (floats)_mm512_min_ps(_mm512_sub_ps(_mm512_setzero_ps(), g), _mm512_set1_ps(88.0f));
    exponential(e);
    const __m512 y = _mm512_mul_ps(_mm512_div_ps(g, _mm512_add_ps(_mm512_set1_ps(1.0f), (__m512)e)), u);
    _mm256_mask_storeu_epi16(gate + i, mask, rounded(y));
  }
}

// A head of one token: its norm, where it has one, and its rotation.
BF16_TARGET void turn_head(const uint16_t* from, const float* norm, float eps, const float* cos, const float* sin, int dim, uint16_t* to) {
  alignas(64) float values[16 * LANES];
  __m512 squares = _mm512_setzero_ps();
  for (int i = 0; i < dim; i += LANES) {
    const __m512 value = widened(from + i);
    _mm512_store_ps(values + i, value);
    squares = _mm512_fmadd_ps(value, value, squares);
  }
  if (norm) {
    const __m512 factor = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(squares) / float(dim) + eps));
    for (int i = 0; i < dim; i += LANES) {
      const __m512 value = _mm512_mul_ps(_mm512_mul_ps(_mm512_load_ps(values + i), factor), _mm512_loadu_ps(norm + i));
      _mm512_store_ps(values + i, value);
    }
  }
  const int half = dim / 2;
  for (int i = 0; i < half; i += LANES) {
    const __m512 low = _mm512_load_ps(values + i), high = _mm512_loadu_ps(values + half + i);
    const __m512 a = _mm512_fmsub_ps(low, _mm512_loadu_ps(cos + i), _mm512_mul_ps(high, _mm512_loadu_ps(sin + i)));
    const __m512 b = _mm512_fmadd_ps(high, _mm512_loadu_ps(cos + half + i), _mm512_mul_ps(low, _mm512_loadu_ps(sin + half + i)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), rounded(a));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + half + i), rounded(b));
  }
}

// Up to 16 rows [dim] of bfloat16 as blocks [dim / 32][16 pairs][16 rows]: what stands on the right of a product.
BF16_TARGET void turn_rows(const uint16_t* from, int64_t apart, int rows, int dim, uint32_t* to) {
  for (int at = 0; at < dim; at += 2 * PAIRS, to += BLOCK) {
    __m512i v[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) v[i] = i < rows ? _mm512_loadu_si512(from + i * apart + at) : _mm512_setzero_si512();
    transpose(v);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) _mm512_store_si512(to + i * LANES, v[i]);
  }
}

// 16 keys [dim] as blocks [dim / 32][16 keys][16 pairs], the last ones of nothing.
BF16_TARGET void lay_keys(const uint16_t* from, int rows, int dim, uint32_t* to) {
  for (int at = 0; at < dim; at += 2 * PAIRS, to += BLOCK)
    for (int i = 0; i < 16; i++)
      _mm512_store_si512(to + i * PAIRS, i < rows ? _mm512_loadu_si512(from + int64_t(i) * dim + at) : _mm512_setzero_si512());
}

// 32 values [dim] as blocks of [16 features][16 pairs of values], `apart` from one 16 features to the next.
BF16_TARGET void turn_values(const uint16_t* from, int rows, int dim, int64_t apart, uint32_t* to) {
  alignas(64) uint16_t order[32];
  for (int i = 0; i < 16; i++) order[2 * i] = uint16_t(i), order[2 * i + 1] = uint16_t(16 + i);
  const __m512i interleave = _mm512_load_si512(order);
  for (int at = 0; at < dim; at += LANES, to += apart) {
    __m512i v[16];
#pragma GCC unroll 16
    for (int pair = 0; pair < 16; pair++) {
      const auto half = [&](int row) __attribute__((always_inline, target("avx512f"))) {
        return row < rows ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + int64_t(row) * dim + at)) : _mm256_setzero_si256();
      };
      v[pair] = _mm512_permutexvar_epi16(interleave, _mm512_inserti64x4(_mm512_castsi256_si512(half(2 * pair)), half(2 * pair + 1), 1));
    }
    transpose(v);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) _mm512_store_si512(to + i * PAIRS, v[i]);
  }
}

// What the tasks of a block's attention share.
struct Attention {
  const uint16_t* q;       // [token][heads][dim], rotated
  const uint32_t* keys;    // [kv_heads][keys / 16][dim / 32] blocks
  const uint32_t* values;  // [kv_heads][dim / 16][keys / 32] blocks
  uint16_t* y;             // [token][heads][dim]
  int64_t past, tokens, keys_held, window;
  int heads, kv_heads, dim;
  float scale;
  bool amx;
};

// What a task works in.
struct Desk {
  uint32_t* q;        // [2][dim / 32] blocks
  float* scores;      // [KEYS / 16][2] blocks
  uint32_t* weights;  // [2][KEYS / 32] blocks
  float* seen;        // [dim / 16][2] blocks

  // Lay it out in `memory`, and count the bytes that takes.
  size_t lay_out(int dim, void* memory) {
    Arena arena(memory);
    q = arena.take<uint32_t>(2 * dim / 32 * BLOCK);
    scores = arena.take<float>(KEYS / 16 * 2 * BLOCK);
    weights = arena.take<uint32_t>(2 * KEYS / 32 * BLOCK);
    seen = arena.take<float>(dim / 16 * 2 * BLOCK);
    return arena.used();
  }
};

// Turn one vector of tokens' scores of some keys into weights; give the factor of what was seen before.
BF16_TARGET __m512 weigh(const float* scores, int keys, int64_t first, __m512i last, __m512i before, bool all, float scale,
                         __m512& most, __m512& sum, uint32_t* weights) {
  const __m512 nothing = _mm512_set1_ps(-INFINITY), scales = _mm512_set1_ps(scale);
  const auto seen = [&](int key) __attribute__((always_inline, target("avx512f"))) {
    const __m512i at = _mm512_set1_epi32(int(first + key));
    return _mm512_kand(_mm512_cmple_epi32_mask(at, last), _mm512_cmpgt_epi32_mask(at, before));
  };
  const auto place = [](int key) { return key / LANES * 2 * BLOCK + key % LANES * LANES; };
  __m512 greatest[4] = {nothing, nothing, nothing, nothing};
  for (int key = 0; key < keys; key += 4)
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      const __m512 score = _mm512_load_ps(scores + place(key + i));
      greatest[i] = all ? _mm512_max_ps(greatest[i], score) : _mm512_mask_max_ps(greatest[i], seen(key + i), greatest[i], score);
    }
  const __m512 found = _mm512_max_ps(_mm512_max_ps(greatest[0], greatest[1]), _mm512_max_ps(greatest[2], greatest[3]));
  const __m512 now = _mm512_max_ps(most, _mm512_mul_ps(found, scales));
  // A token that has seen nothing yet has nothing to compare with: its weights are of 0, and masked.
  const __m512 base = _mm512_mask_blend_ps(_mm512_cmp_ps_mask(now, nothing, _CMP_EQ_OQ), now, _mm512_setzero_ps());
  floats factor = (floats)_mm512_sub_ps(most, base);
  exponential(factor);
  alignas(64) uint16_t order[32];
  for (int i = 0; i < 16; i++) order[2 * i] = uint16_t(i), order[2 * i + 1] = uint16_t(16 + i);
  const __m512i interleave = _mm512_load_si512(order);
  __m512 total = _mm512_setzero_ps();
  for (int key = 0; key < keys; key += 2) {
    __m512 pair[2];
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
      floats e = (floats)_mm512_fmsub_ps(_mm512_load_ps(scores + place(key + i)), scales, base);
      exponential(e);
      pair[i] = all ? (__m512)e : _mm512_maskz_mov_ps(seen(key + i), (__m512)e);
      total = _mm512_add_ps(total, pair[i]);
    }
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(pair[1], pair[0]);
    _mm512_store_si512(weights + key / 2 * LANES, _mm512_permutexvar_epi16(interleave, both));
  }
  sum = _mm512_fmadd_ps(sum, (__m512)factor, total);
  most = now;
  return (__m512)factor;
}

// What 32 tokens of one head see.
BF16_TARGET void attend(const Attention& a, int head, int64_t token, const Desk& desk) {
  const int depth = a.dim / 32, tokens = int(std::min<int64_t>(TOKENS, a.tokens - token));
  const int64_t kv = head / (a.heads / a.kv_heads), apart = int64_t(a.heads) * a.dim;
  const uint16_t* q = a.q + token * apart + int64_t(head) * a.dim;
  const int64_t end = a.past + token + tokens, first_token = a.past + token;
  const int64_t start = a.window ? std::max<int64_t>(0, first_token + 1 - a.window) / KEYS * KEYS : 0;
  __m512i last[2], before[2];
  __m512 most[2], sum[2];
  for (int v = 0; v < 2; v++) {
    turn_rows(q + v * LANES * apart, apart, std::clamp(tokens - v * LANES, 0, LANES), a.dim, desk.q + v * depth * BLOCK);
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    last[v] = _mm512_min_epi32(_mm512_add_epi32(_mm512_set1_epi32(int(first_token) + v * LANES), lane), _mm512_set1_epi32(int(end - 1)));
    before[v] = a.window ? _mm512_sub_epi32(last[v], _mm512_set1_epi32(int(a.window))) : _mm512_set1_epi32(-1);
    most[v] = _mm512_set1_ps(-INFINITY);
    sum[v] = _mm512_setzero_ps();
  }
  const int64_t chunks = a.keys_held / 32;
  for (int64_t key = start; key < end; key += KEYS) {
    const int keys = int(std::min<int64_t>(KEYS, round_up(end - key, NO_KEY)));
    const uint32_t* held = a.keys + (kv * a.keys_held + key) / 16 * depth * BLOCK;
    for (int at = 0; at < keys; at += 32)
      multiply_run({held + at / 16 * depth * BLOCK, depth * BLOCK, desk.q, depth * BLOCK, desk.scores + at / 16 * 2 * BLOCK, 2 * BLOCK,
                    depth, true, nullptr, 0},
                   2, LANES, a.amx);
    const bool whole = key + keys - 1 <= first_token && (!a.window || key > end - 1 - a.window);
    for (int v = 0; v < 2; v++) {
      const __m512 factor = weigh(desk.scores + v * BLOCK, keys, key, last[v], before[v], whole, a.scale, most[v], sum[v],
                                  desk.weights + v * keys / 32 * BLOCK);
      if (key == start || _mm512_cmp_ps_mask(factor, _mm512_set1_ps(1.0f), _CMP_NEQ_UQ) == 0) continue;
      for (int feature = 0; feature < a.dim; feature++) {
        float* at = desk.seen + (feature / LANES * 2 + v) * BLOCK + feature % LANES * LANES;
        _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), factor));
      }
    }
    for (int feature = 0; feature < a.dim; feature += 32)
      multiply_run({a.values + ((kv * a.dim + feature) / 16 * chunks + key / 32) * BLOCK, chunks * BLOCK, desk.weights, keys / 32 * BLOCK,
                    desk.seen + feature / 16 * 2 * BLOCK, 2 * BLOCK, keys / 32, key == start, nullptr, 0},
                   2, LANES, a.amx);
  }
  for (int v = 0; v < 2; v++) {
    const __m512 share = _mm512_div_ps(_mm512_set1_ps(1.0f), sum[v]);
    const int count = std::clamp(tokens - v * LANES, 0, LANES);
    for (int feature = 0; feature < a.dim; feature += LANES) {
      __m512i lines[16];
      const float* from = desk.seen + (feature / LANES * 2 + v) * BLOCK;
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) lines[i] = _mm512_castps_si512(_mm512_mul_ps(_mm512_load_ps(from + i * LANES), share));
      transpose(lines);
      uint16_t* to = a.y + (token + v * LANES) * apart + int64_t(head) * a.dim + feature;
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++)
        if (i < count) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i * apart), rounded(_mm512_castsi512_ps(lines[i])));
    }
  }
}

// What a prompt works in: bfloat16 but for x.
struct Room {
  float* x;                                      // [tokens][hidden]
  uint16_t *normed, *q, *k, *v, *seen, *made;    // [tokens][...]; `made` is what is added to x
  uint16_t *gate, *up;                           // [MOST_ROWS][inner]
  uint32_t *keys, *values;                       // Attention's

  // Lay it out in `memory`, and count the bytes that takes.
  size_t lay_out(const GptqModel& it, int64_t tokens, int64_t keys_held, void* memory) {
    Arena arena(memory);
    const auto take = [&](auto*& part, size_t count) {
      part = arena.take<std::remove_pointer_t<std::remove_reference_t<decltype(part)>>>(count);
    };
    const size_t q_size = size_t(it.heads) * it.head_dim, kv_size = size_t(it.kv_heads) * it.head_dim;
    const size_t rows = size_t(std::min(tokens, MOST_ROWS));
    take(x, tokens * it.hidden);
    take(normed, tokens * it.hidden);
    take(q, tokens * q_size);
    take(k, tokens * kv_size);
    take(v, tokens * kv_size);
    take(seen, tokens * q_size);
    take(made, tokens * it.hidden);
    take(gate, rows * it.inner);
    take(up, rows * it.inner);
    take(keys, keys_held * kv_size / 2);
    take(values, keys_held * kv_size / 2);
    return arena.used();
  }
};

// Multiply what `count` projections read: those that read it alike in one call.
int project(const GptqProjection* const* parts, uint16_t* const* outs, int count, const uint16_t* x, int64_t m, int amx, int threads) {
  for (int first = 0; first < count;) {
    const GptqLayer* layers[3];
    void* y[3];
    int together = 0;
    do {
      layers[together] = parts[first]->packed;
      y[together++] = outs[first++];
    } while (first < count && parts[first]->same_rows);
    if (gptq_gemm(layers, y, together, x, m, amx, threads)) return 1;
  }
  return 0;
}

struct Prompt {
  const GptqModel& model;
  const Room& room;
  const float *cos, *sin;
  int64_t past, tokens, keys_held;
  int amx, threads;

  void norm(const uint16_t* added, const float* weight, int64_t from, int64_t to, uint16_t* y) const {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = from; row < to; row++)
      add_norm(room.x + row * model.hidden, added ? added + row * model.hidden : nullptr, weight, model.hidden, model.eps, y + row * model.hidden);
  }

  // Rotate queries and keys, keep keys and values, and lay them out for products.
  void arrange(const GptqBlock& block, const GptqCache& cache) const {
    const int dim = model.head_dim;
    uint16_t *keys = static_cast<uint16_t*>(cache.keys), *values = static_cast<uint16_t*>(cache.values);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t row = 0; row < tokens; row++) {
      for (int head = 0; head < model.heads; head++) {
        uint16_t* q = room.q + (row * model.heads + head) * dim;
        turn_head(q, block.q_norm, model.eps, cos + row * dim, sin + row * dim, dim, q);
      }
      for (int head = 0; head < model.kv_heads; head++) {
        const int64_t from = (row * model.kv_heads + head) * dim, to = (head * cache.capacity + past + row) * dim;
        turn_head(room.k + from, block.k_norm, model.eps, cos + row * dim, sin + row * dim, dim, keys + to);
        memcpy(values + to, room.v + from, size_t(dim) * 2);
      }
    }
    const int64_t blocks = keys_held / 32, end = past + tokens;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < model.kv_heads * blocks; i++) {
      const int64_t head = i / blocks, block_of = i % blocks, from = (head * cache.capacity + block_of * 32) * dim;
      const int count = int(std::clamp<int64_t>(end - block_of * 32, 0, 32));
      uint32_t* to = room.keys + (head * blocks + block_of) * 2 * (dim / 32) * BLOCK;
      lay_keys(keys + from, std::min(count, 16), dim, to);
      lay_keys(keys + from + 16 * dim, std::max(count - 16, 0), dim, to + dim / 32 * BLOCK);
      turn_values(values + from, count, dim, blocks * BLOCK, room.values + (head * (dim / 16) * blocks + block_of) * BLOCK);
    }
  }

  int see(const GptqBlock& block) const {
    const Attention a{room.q, room.keys, room.values, room.seen, past, tokens, keys_held, block.window, model.heads, model.kv_heads,
                      model.head_dim, model.scale, amx != 0};
    const int64_t parts = round_up<int64_t>(tokens, TOKENS) / TOKENS;
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
      Desk desk;
      void* memory = task_scratch.get(desk.lay_out(a.dim, nullptr));
      desk.lay_out(a.dim, memory);
      if (!memory) {
#pragma omp atomic write
        failed = 1;
      }
#ifdef MATRIX_UNIT
      if (amx) begin_tiles(LANES, LANES);
#endif
      // The last tokens see most: they begin, so that no thread is left with a long one.
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < parts * model.heads; task++)
        if (memory) attend(a, int(task % model.heads), (parts - 1 - task / model.heads) * TOKENS, desk);
#ifdef MATRIX_UNIT
      if (amx) end_tiles();
#endif
    }
    return failed;
  }

  int run(int index, const GptqCache& cache) const {
    const GptqBlock& block = model.block[index];
    norm(index == 0 ? nullptr : room.made, block.input_norm, 0, tokens, room.normed);
    const GptqProjection* reads[] = {&block.q, &block.k, &block.v};
    uint16_t* outs[] = {room.q, room.k, room.v};
    if (project(reads, outs, 3, room.normed, tokens, amx, threads)) return 1;
    arrange(block, cache);
    if (see(block)) return 1;
    const GptqProjection* o[] = {&block.o};
    uint16_t* made[] = {room.made};
    if (project(o, made, 1, room.seen, tokens, amx, threads)) return 1;
    norm(room.made, block.inner_norm, 0, tokens, room.normed);
    for (int64_t row = 0; row < tokens; row += MOST_ROWS) {
      const int64_t rows = std::min(MOST_ROWS, tokens - row);
      const GptqProjection *feed[] = {&block.gate, &block.up}, *down[] = {&block.down};
      uint16_t *both[] = {room.gate, room.up}, *out[] = {room.made + row * model.hidden};
      if (project(feed, both, 2, room.normed + row * model.hidden, rows, amx, threads)) return 1;
#pragma omp parallel for num_threads(threads) schedule(static)
      for (int64_t i = 0; i < rows; i++) gate_by(room.gate + i * model.inner, room.up + i * model.inner, model.inner);
      if (project(down, out, 1, room.gate, rows, amx, threads)) return 1;
    }
    return 0;
  }
};

BF16_TARGET void widen(const uint16_t* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i++) to[i] = from_bfloat16(from[i]);
}

}  // namespace

#endif

extern "C" {

// Run the blocks and the last norm on the new tokens of one sequence, as gptq_step does, for a model whose
// layers are all packed, in bfloat16, on a processor with AVX512-BF16. Returns 0, or 1 where memory is short.
int gptq_prompt(const GptqModel* model, const void* x, const float* cos, const float* sin, const GptqSequence* sequence, void* y,
                int amx, int threads) {
#ifdef X86
  const int64_t past = sequence->past, m = sequence->tokens;
  const int64_t keys_held = round_up(past + m, NO_KEY);
  Room room;
  Scratch scratch;  // given back at the end: it may be large
  void* memory = scratch.get(room.lay_out(*model, m, keys_held, nullptr));
  if (!memory) return 1;
  room.lay_out(*model, m, keys_held, memory);
  widen(static_cast<const uint16_t*>(x), m * model->hidden, room.x);
  const Prompt prompt{*model, room, cos, sin, past, m, keys_held, amx, threads};
  for (int i = 0; i < model->blocks; i++)
    if (prompt.run(i, sequence->caches[i])) return 1;
  prompt.norm(room.made, model->norm, 0, m, static_cast<uint16_t*>(y));
  return 0;
#else
  (void)model, (void)x, (void)cos, (void)sin, (void)sequence, (void)y, (void)amx, (void)threads;
  return 1;
#endif
}

}  // extern "C"
