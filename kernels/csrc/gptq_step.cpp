// One step of decoding a Llama-like model: its blocks and last norm, for a few new tokens of one sequence.
//
// What transformers does in some 20 operations a block is done here in one team of threads, which meet
// five times a block. Activations are float32 between products; keys and values are kept in the model's
// dtype. A block is
//
//   h = rms_norm(x);  q, k, v = projections of h;  q, k = rotary(rms_norm?(q, k))
//   x += o(softmax(scale * q @ keys.T, causal, within the window) @ values)
//   h = rms_norm(x);  x += down(silu(gate(h)) * up(h))
//
// A thread gathers what a projection reads by itself: it costs less than meeting once more.

#include "gptq_cpu.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <sched.h>

#ifdef _OPENMP
#include <omp.h>
#endif

using namespace gptq;

extern "C" {

// y = x @ W.T + bias: a packed layer, or rows [out_features][in_features] of the model's dtype.
struct GptqProjection {
  const GptqLayer* packed;  // or null
  const void* weight;       // where it is not packed
  const float* bias;        // of what is not packed, or null
  int32_t in_features;
  int32_t out_features;
  int32_t same_rows;  // as the projection before it: what was gathered for that one serves
};

struct GptqBlock {
  GptqProjection q, k, v, o, gate, up, down;
  const float* input_norm;  // [hidden]
  const float* inner_norm;  // [hidden]
  const float* q_norm;      // [head_dim], or null
  const float* k_norm;
  void* keys;  // [kv_heads][capacity][head_dim]
  void* values;
  int64_t capacity;
  int64_t window;  // positions a token sees, or 0 for all
};

struct GptqModel {
  int32_t blocks, hidden, heads, kv_heads, head_dim, inner;
  int32_t type;  // of weights, keys and values
  int32_t isa;
  float eps, scale;
  const float* norm;  // [hidden]
  const GptqBlock* block;
};

}  // extern "C"

namespace {

// Threads that wait for each other by spinning, and give way where one of them was put aside.
class Team {
 public:
  explicit Team(int threads) : threads_(threads) {}
  void meet() {
    const int round = round_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; spins++) {
      if (spins > 10000) sched_yield();
#ifdef X86
      else _mm_pause();
#endif
    }
  }

 private:
  std::atomic<int> arrived_{0}, round_{0};
  const int threads_;
};

template <int TYPE>
INLINE void load(const void* from, int64_t at, floats& to) {
  if constexpr (TYPE == FLOAT32) {
    memcpy(&to, static_cast<const float*>(from) + at, sizeof to);
  } else {
    halves raw;
    memcpy(&raw, static_cast<const uint16_t*>(from) + at, sizeof raw);
    const uints wide = __builtin_convertvector(raw, uints) << 16;
    memcpy(&to, &wide, sizeof to);
  }
}

INLINE float total(const floats& of) {
  float sum = 0;
  for (int i = 0; i < LANES; i++) sum += of[i];
  return sum;
}

// e**x to a few units in the last place, after Cephes; x at most 88.
INLINE void exponential(floats& x) {
  const floats least = floats{} - 87.0f;
  x = x < least ? least : x;
  const floats shifted = x * 1.44269504088896341f + 12582912.0f;  // rounds to an integer
  const floats n = shifted - 12582912.0f;
  const floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  ints power, bits;
  memcpy(&power, &shifted, sizeof power);
  memcpy(&bits, &p, sizeof bits);
  bits += (power - 0x4b400000) << 23;
  memcpy(&x, &bits, sizeof x);
}

INLINE void norm_body(const float* x, const float* weight, int64_t count, float eps, float* y) {
  floats squares{};
  for (int64_t i = 0; i < count; i += LANES) {
    floats value;
    load<FLOAT32>(x, i, value);
    squares += value * value;
  }
  const float factor = 1.0f / sqrtf(total(squares) / float(count) + eps);
  for (int64_t i = 0; i < count; i += LANES) {
    floats value, scale;
    load<FLOAT32>(x, i, value);
    load<FLOAT32>(weight, i, scale);
    value *= scale * factor;
    memcpy(y + i, &value, sizeof value);
  }
}

INLINE void silu_body(const float* gate, const float* up, int count, float* y) {
  for (int i = 0; i < count; i += LANES) {
    floats g, u;
    load<FLOAT32>(gate, i, g);
    load<FLOAT32>(up, i, u);
    floats e = -g;
    e = e > 88.0f ? floats{} + 88.0f : e;
    exponential(e);
    g = g / (1.0f + e) * u;
    memcpy(y + i, &g, sizeof g);
  }
}

// One head's attention for one token.
struct Sight {
  const float* q;        // [head_dim], scaled
  const void* keys;      // [..][head_dim] of the cache, of this head
  const void* values;
  const float* new_keys;  // [..][head_dim], those of this step
  const float* new_values;
  int64_t start, past, end;  // positions start..past are in the cache, past..end new
  int head_dim;
  float* scores;  // [end - start + LANES]
  float* y;       // [head_dim]
};

template <int TYPE, int V>
INLINE void see(const Sight& s, int vectors) {
  const int count = V ? V : vectors;
  const int dim = s.head_dim;
  floats q[V ? V : 16];
  for (int v = 0; v < count; v++) load<FLOAT32>(s.q, v * LANES, q[v]);
  float* score = s.scores;
  for (int64_t p = s.start; p < s.end; p++) {
    floats sum{};
    for (int v = 0; v < count; v++) {
      floats key;
      if (p < s.past) load<TYPE>(s.keys, p * dim + v * LANES, key);
      else load<FLOAT32>(s.new_keys, (p - s.past) * dim + v * LANES, key);
      sum += q[v] * key;
    }
    *score++ = total(sum);
  }
  const int64_t seen = s.end - s.start;
  float most = s.scores[0];
  for (int64_t i = 1; i < seen; i++) most = std::max(most, s.scores[i]);
  for (int64_t i = seen; i % LANES; i++) s.scores[i] = -INFINITY;
  floats weights{};
  for (int64_t i = 0; i < seen; i += LANES) {
    floats e;
    load<FLOAT32>(s.scores, i, e);
    e -= most;
    exponential(e);
    if (i + LANES > seen)
      for (int64_t j = seen - i; j < LANES; j++) e[j] = 0;
    weights += e;
    memcpy(s.scores + i, &e, sizeof e);
  }
  const float scale = 1.0f / total(weights);
  floats y[V ? V : 16];
  for (int v = 0; v < count; v++) y[v] = floats{};
  for (int64_t p = s.start; p < s.end; p++) {
    const float weight = s.scores[p - s.start];
    for (int v = 0; v < count; v++) {
      floats value;
      if (p < s.past) load<TYPE>(s.values, p * dim + v * LANES, value);
      else load<FLOAT32>(s.new_values, (p - s.past) * dim + v * LANES, value);
      y[v] += weight * value;
    }
  }
  for (int v = 0; v < count; v++) {
    y[v] *= scale;
    memcpy(s.y + v * LANES, &y[v], sizeof y[v]);
  }
}

INLINE void see_body(const Sight& s, int type) {
  const int vectors = s.head_dim / LANES;
  if (type == FLOAT32) {
    if (vectors == 4) return see<FLOAT32, 4>(s, vectors);
    if (vectors == 8) return see<FLOAT32, 8>(s, vectors);
    return see<FLOAT32, 0>(s, vectors);
  }
  if (vectors == 4) return see<BFLOAT16, 4>(s, vectors);
  if (vectors == 8) return see<BFLOAT16, 8>(s, vectors);
  see<BFLOAT16, 0>(s, vectors);
}

// Some columns of a weight that is not packed, by one row of x.
template <int TYPE>
INLINE void dense(const void* weight, int64_t k, int64_t first, int count, const float* x, float* y) {
  for (int c = 0; c < count; c++) {
    const int64_t row = (first + c) * k;
    floats sum{};
    int64_t i = 0;
    for (; i + LANES <= k; i += LANES) {
      floats a, w;
      load<FLOAT32>(x, i, a);
      load<TYPE>(weight, row + i, w);
      sum += a * w;
    }
    float rest = 0;
    for (; i < k; i++)
      rest += x[i] * (TYPE == FLOAT32 ? static_cast<const float*>(weight)[row + i]
                                      : from_bfloat16(static_cast<const uint16_t*>(weight)[row + i]));
    y[c] = total(sum) + rest;
  }
}

INLINE void dense_body(const void* weight, int64_t k, int64_t first, int count, const float* x, int type, float* y) {
  if (type == FLOAT32) return dense<FLOAT32>(weight, k, first, count, x, y);
  dense<BFLOAT16>(weight, k, first, count, x, y);
}

#define COMPILED(NAME, TARGET)                                                                          \
  TARGET void norm_##NAME(const float* x, const float* w, int64_t n, float eps, float* y) {             \
    norm_body(x, w, n, eps, y);                                                                         \
  }                                                                                                     \
  TARGET void silu_##NAME(const float* g, const float* u, int n, float* y) { silu_body(g, u, n, y); }   \
  TARGET void see_##NAME(const Sight& s, int type) { see_body(s, type); }                               \
  TARGET void dense_##NAME(const void* w, int64_t k, int64_t first, int n, const float* x, int type, float* y) { \
    dense_body(w, k, first, n, x, type, y);                                                             \
  }

COMPILED(plain, )
#ifdef X86
COMPILED(avx2, AVX2_TARGET)
COMPILED(avx512, AVX512_TARGET)
#define BEST(NAME, ISA, ...)                               \
  ((ISA) >= AVX512 ? NAME##_avx512(__VA_ARGS__)            \
   : (ISA) == AVX2 ? NAME##_avx2(__VA_ARGS__)              \
                   : NAME##_plain(__VA_ARGS__))
#else
#define BEST(NAME, ISA, ...) NAME##_plain(__VA_ARGS__)
#endif

#ifdef X86
// Some columns of a bfloat16 weight by one row of bfloat16 x, with the processor's own products.
BF16_TARGET void dense_bfloat16(const uint16_t* weight, int64_t k, int64_t first, int count, const uint16_t* x, float* y) {
  constexpr int TOGETHER = 4;
  const int64_t whole = k / 32 * 32;
  const __mmask32 rest = __mmask32((uint64_t(1) << (k - whole)) - 1);
  for (int c = 0; c < count; c += TOGETHER) {
    const uint16_t* row[TOGETHER];
    __m512 sum[TOGETHER];
    for (int i = 0; i < TOGETHER; i++) {
      row[i] = weight + (first + std::min(c + i, count - 1)) * k;
      sum[i] = _mm512_setzero_ps();
    }
    for (int64_t at = 0; at < whole; at += 32) {
      const __m512bh a = (__m512bh)_mm512_loadu_si512(x + at);
      for (int i = 0; i < TOGETHER; i++)
        sum[i] = _mm512_dpbf16_ps(sum[i], (__m512bh)_mm512_loadu_si512(row[i] + at), a);
    }
    if (rest) {
      const __m512bh a = (__m512bh)_mm512_maskz_loadu_epi16(rest, x + whole);
      for (int i = 0; i < TOGETHER; i++)
        sum[i] = _mm512_dpbf16_ps(sum[i], (__m512bh)_mm512_maskz_loadu_epi16(rest, row[i] + whole), a);
    }
    for (int i = 0; i < TOGETHER && c + i < count; i++) y[c + i] = _mm512_reduce_add_ps(sum[i]);
  }
}
#endif

int64_t tiles_of(const GptqProjection& p) { return (p.out_features + COLUMNS - 1) / COLUMNS; }

// What a thread has made ready for a projection.
struct Input {
  const float* x;  // [m][in_features]
  uint16_t* rounded;
  Gathered gathered;
};

int gather_isa(const GptqModel& model) { return model.type == FLOAT32 ? std::min(model.isa, int(AVX512)) : model.isa; }

size_t input_bytes(const GptqModel& model, const GptqProjection& p, int64_t m) {
  if (p.packed) return gathered_bytes(*p.packed, gather_isa(model), m);
  return size_t(m) * p.in_features * 2;
}

Input make_ready(const GptqModel& model, const GptqProjection& p, const float* x, int64_t m, void* memory) {
  Input in{x, nullptr, {}};
  if (p.packed) {
    in.gathered = gathered_at(*p.packed, gather_isa(model), m, memory);
    for (int64_t row = 0; row < m; row++) gather_row(*p.packed, x, FLOAT32, row, in.gathered);
  } else if (model.isa == BF16 && model.type == BFLOAT16) {
    in.rounded = static_cast<uint16_t*>(memory);
    for (int64_t i = 0; i < m * p.in_features; i++) in.rounded[i] = to_bfloat16(x[i]);
  }
  return in;
}

// One tile of a projection: y [m][COLUMNS]; gives the columns that count.
int project(const GptqModel& model, const GptqProjection& p, int64_t tile, int64_t m, const Input& in, float* y) {
  const int64_t first = tile * COLUMNS;
  const int count = int(std::min<int64_t>(COLUMNS, p.out_features - first));
  const float* bias = p.packed ? p.packed->bias : p.bias;
  if (p.packed) {
    for (int64_t row = 0; row < m; row += ROWS)
      multiply_bits(*p.packed, tile, row, int(std::min<int64_t>(ROWS, m - row)), in.gathered, y + row * COLUMNS);
  } else {
    for (int64_t row = 0; row < m; row++) {
#ifdef X86
      if (in.rounded) {
        dense_bfloat16(static_cast<const uint16_t*>(p.weight), p.in_features, first, count,
                       in.rounded + row * p.in_features, y + row * COLUMNS);
        continue;
      }
#endif
      BEST(dense, model.isa, p.weight, p.in_features, first, count, in.x + row * p.in_features, model.type, y + row * COLUMNS);
    }
  }
  if (bias)
    for (int64_t row = 0; row < m; row++)
      for (int c = 0; c < count; c++) y[row * COLUMNS + c] += bias[first + c];
  return count;
}

// Rotate a head by halves: x [head_dim], cos and sin [head_dim].
void rotate(float* x, const float* cos, const float* sin, int dim) {
  for (int i = 0; i < dim / 2; i++) {
    const float low = x[i], high = x[i + dim / 2];
    x[i] = low * cos[i] - high * sin[i];
    x[i + dim / 2] = high * cos[i + dim / 2] + low * sin[i + dim / 2];
  }
}

void keep(void* cache, int64_t at, const float* from, int count, int type) {
  if (type == FLOAT32) {
    memcpy(static_cast<float*>(cache) + at, from, sizeof(float) * count);
    return;
  }
  for (int i = 0; i < count; i++) static_cast<uint16_t*>(cache)[at + i] = to_bfloat16(from[i]);
}

// What the threads share, all float32.
struct Shared {
  float *x, *q, *k, *v, *seen, *inner;
};

struct Worker {
  const GptqModel& model;
  const Shared& shared;
  Team& team;
  const float *cos, *sin;
  int64_t past, m;
  int thread, threads;
  float* normed;       // [m][hidden]
  float* tile;         // [m][COLUMNS], twice
  float* key;          // [m][head_dim], and as many values
  float* scores;
  void* input;         // for make_ready

  int64_t from(int64_t count) const { return count * thread / threads; }
  int64_t to(int64_t count) const { return count * (thread + 1) / threads; }

  void norm(const float* weight) {
    for (int64_t row = 0; row < m; row++)
      BEST(norm, model.isa, shared.x + row * model.hidden, weight, model.hidden, model.eps, normed + row * model.hidden);
  }

  void attend(const GptqBlock& block) {
    const GptqProjection* parts[] = {&block.q, &block.k, &block.v};
    float* outs[] = {shared.q, shared.k, shared.v};
    const int64_t all = tiles_of(block.q) + tiles_of(block.k) + tiles_of(block.v);
    int64_t before = 0;
    Input in{};
    bool ready = false;
    for (int part = 0; part < 3; part++) {
      const GptqProjection& p = *parts[part];
      const int64_t count = tiles_of(p);
      if (!p.same_rows) ready = false;
      for (int64_t i = std::max(from(all) - before, int64_t(0)); i < std::min(to(all) - before, count); i++) {
        if (!ready) in = make_ready(model, p, normed, m, input);
        ready = true;
        const int columns = project(model, p, i, m, in, tile);
        for (int64_t row = 0; row < m; row++)
          memcpy(outs[part] + row * p.out_features + i * COLUMNS, tile + row * COLUMNS, sizeof(float) * columns);
      }
      before += count;
    }
    team.meet();
    const int dim = model.head_dim, each = model.heads / model.kv_heads;
    const int64_t q_stride = int64_t(model.heads) * dim, kv_stride = int64_t(model.kv_heads) * dim;
    float* value = key + m * dim;
    int made = -1;
    for (int64_t head = from(model.heads); head < to(model.heads); head++) {
      const int kv = int(head / each);
      if (kv != made) {
        for (int64_t row = 0; row < m; row++) {
          float* k = key + row * dim;
          memcpy(k, shared.k + row * kv_stride + kv * dim, sizeof(float) * dim);
          if (block.k_norm) BEST(norm, model.isa, k, block.k_norm, dim, model.eps, k);
          rotate(k, cos + row * dim, sin + row * dim, dim);
          memcpy(value + row * dim, shared.v + row * kv_stride + kv * dim, sizeof(float) * dim);
        }
        made = kv;
      }
      if (head % each == 0)  // whoever has the first head of a group keeps its keys and values
        for (int64_t row = 0; row < m; row++) {
          const int64_t at = (kv * block.capacity + past + row) * dim;
          keep(block.keys, at, key + row * dim, dim, model.type);
          keep(block.values, at, value + row * dim, dim, model.type);
        }
      for (int64_t row = 0; row < m; row++) {
        float* q = shared.q + row * q_stride + head * dim;
        if (block.q_norm) BEST(norm, model.isa, q, block.q_norm, dim, model.eps, q);
        rotate(q, cos + row * dim, sin + row * dim, dim);
        for (int i = 0; i < dim; i++) q[i] *= model.scale;
        const int64_t end = past + row + 1;
        const int64_t start = block.window ? std::max<int64_t>(0, end - block.window) : 0;
        const int64_t size = model.type == FLOAT32 ? 4 : 2, head_at = kv * block.capacity * dim * size;
        const Sight sight{q, static_cast<const char*>(block.keys) + head_at,
                          static_cast<const char*>(block.values) + head_at, key, value, start, past, end,
                          dim, scores, shared.seen + row * q_stride + head * dim};
        BEST(see, model.isa, sight, model.type);
      }
    }
    team.meet();
    add(block.o, shared.seen);
  }

  void feed(const GptqBlock& block) {
    norm(block.inner_norm);
    const int64_t count = tiles_of(block.gate);
    const size_t apart = (input_bytes(model, block.gate, m) + 63) / 64 * 64;
    if (from(count) < to(count)) {
      const Input gate = make_ready(model, block.gate, normed, m, input);
      const Input up = block.up.same_rows ? gate : make_ready(model, block.up, normed, m, static_cast<char*>(input) + apart);
      float* other = tile + m * COLUMNS;
      for (int64_t i = from(count); i < to(count); i++) {
        const int columns = project(model, block.gate, i, m, gate, tile);
        project(model, block.up, i, m, up, other);
        for (int64_t row = 0; row < m; row++) {
          BEST(silu, model.isa, tile + row * COLUMNS, other + row * COLUMNS, COLUMNS, tile + row * COLUMNS);
          memcpy(shared.inner + row * model.inner + i * COLUMNS, tile + row * COLUMNS, sizeof(float) * columns);
        }
      }
    }
    team.meet();
    add(block.down, shared.inner);
  }

  // x += projection of `of`.
  void add(const GptqProjection& p, const float* of) {
    const int64_t count = tiles_of(p);
    if (from(count) < to(count)) {
      const Input in = make_ready(model, p, of, m, input);
      for (int64_t i = from(count); i < to(count); i++) {
        const int columns = project(model, p, i, m, in, tile);
        for (int64_t row = 0; row < m; row++) {
          float* x = shared.x + row * model.hidden + i * COLUMNS;
          for (int c = 0; c < columns; c++) x[c] += tile[row * COLUMNS + c];
        }
      }
    }
    team.meet();
  }

  void run() {
    for (int i = 0; i < model.blocks; i++) {
      norm(model.block[i].input_norm);
      attend(model.block[i]);
      feed(model.block[i]);
    }
  }
};

// Hand out parts of one piece of memory, each on a line of the cache of its own.
struct Parts {
  char* memory;
  size_t used;
  template <typename T = float>
  T* take(size_t count, size_t size = sizeof(T)) {
    T* part = reinterpret_cast<T*>(memory + used);
    used += (count * size + 127) / 64 * 64;
    return part;
  }
};

thread_local Scratch step_scratch;

}  // namespace

extern "C" {

// Run the blocks and the last norm on `m` tokens after `past` ones: x and y [m][hidden] of the model's
// dtype; cos and sin [m][head_dim]. Keys and values are added to each block's. Returns 0, or 1 where
// memory is short.
int gptq_step(const GptqModel* model, const void* x, const float* cos, const float* sin, int64_t past, int64_t m,
              void* y, int threads) {
  const GptqModel& it = *model;
  size_t input = 0;
  for (int i = 0; i < it.blocks; i++) {
    const GptqBlock& block = it.block[i];
    for (const GptqProjection* p : {&block.q, &block.k, &block.v, &block.o, &block.gate, &block.down})
      input = std::max(input, input_bytes(it, *p, m) + 64 + (p == &block.gate ? input_bytes(it, block.up, m) : 0));
  }
  const size_t q_size = size_t(it.heads) * it.head_dim, kv_size = size_t(it.kv_heads) * it.head_dim;
  auto lay_out = [&](Parts& parts, Shared& shared, auto each) {
    shared.x = parts.take(m * it.hidden);
    shared.q = parts.take(m * q_size);
    shared.k = parts.take(m * kv_size);
    shared.v = parts.take(m * kv_size);
    shared.seen = parts.take(m * q_size);
    shared.inner = parts.take(m * it.inner);
    for (int thread = 0; thread < threads; thread++) {
      float* normed = parts.take(m * it.hidden);
      float* tile = parts.take(2 * m * COLUMNS);
      float* key = parts.take(2 * m * it.head_dim);
      float* scores = parts.take(past + m + LANES);
      each(thread, normed, tile, key, scores, parts.take<char>(input));
    }
  };
  Shared shared;
  Parts counted{nullptr, 0};
  lay_out(counted, shared, [](int, float*, float*, float*, float*, char*) {});
  void* memory = step_scratch.get(counted.used);
  if (!memory) return 1;
  Parts parts{static_cast<char*>(memory), 0};
  struct Own {
    float *normed, *tile, *key, *scores;
    char* input;
  };
  constexpr int MOST = 256;
  threads = std::min(threads, MOST);
  Own own[MOST];
  lay_out(parts, shared, [&](int thread, float* normed, float* tile, float* key, float* scores, char* memory) {
    own[thread] = {normed, tile, key, scores, memory};
  });
  for (int64_t i = 0; i < m * it.hidden; i++)
    shared.x[i] = it.type == FLOAT32 ? static_cast<const float*>(x)[i] : from_bfloat16(static_cast<const uint16_t*>(x)[i]);
  Team* team = nullptr;
#pragma omp parallel num_threads(threads)
  {
#ifdef _OPENMP
    const int thread = omp_get_thread_num(), count = omp_get_num_threads();
#else
    const int thread = 0, count = 1;
#endif
#pragma omp single
    team = new Team(count);
    const Own& mine = own[thread];
    Worker{it, shared, *team, cos, sin, past, m, thread, count, mine.normed, mine.tile, mine.key, mine.scores, mine.input}.run();
  }
  delete team;
  for (int64_t row = 0; row < m; row++) {
    float* normed = own[0].normed;
    BEST(norm, it.isa, shared.x + row * it.hidden, it.norm, it.hidden, it.eps, normed);
    keep(y, row * it.hidden, normed, it.hidden, it.type);
  }
  return 0;
}

// y [m][n] = x [m][k] @ weight [n][k].T, all of `type`: a few rows by a weight that is not packed.
int gptq_rows(const void* weight, const void* x, void* y, int64_t m, int64_t k, int64_t n, int type, int isa, int threads) {
  GptqModel model{};
  model.type = type;
  model.isa = isa;
  const GptqProjection p{nullptr, weight, nullptr, int32_t(k), int32_t(n), 0};
  float* values = static_cast<float*>(step_scratch.get(size_t(m) * k * 6));
  if (!values) return 1;
  for (int64_t i = 0; i < m * k; i++)
    values[i] = type == FLOAT32 ? static_cast<const float*>(x)[i] : from_bfloat16(static_cast<const uint16_t*>(x)[i]);
  const Input in = make_ready(model, p, values, m, values + m * k);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t tile = 0; tile < (n + COLUMNS - 1) / COLUMNS; tile++) {
    float sums[COLUMNS];
    for (int64_t row = 0; row < m; row++) {
      const Input one{in.x + row * k, in.rounded ? in.rounded + row * k : nullptr, {}};
      const int count = project(model, p, tile, 1, one, sums);
      keep(y, row * n + tile * COLUMNS, sums, count, type);
    }
  }
  return 0;
}

}  // extern "C"
