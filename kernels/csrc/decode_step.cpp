// One step of decoding a Llama-like model: its blocks and last norm, for a few new tokens of some sequences.
//
// What transformers does in some 20 operations a block is done here in one team of threads, which meet
// five times a block. Activations are float32 between products; keys and values are kept in the model's
// dtype. A block is
//
//   h = rms_norm(x);  q, k, v = projections of h;  q, k = rotary(rms_norm?(q, k))
//   x += o(softmax(scale * q @ keys.T, causal, within the window) @ values)
//   h = rms_norm(x);  x += down(silu(gate(h)) * up(h))
//
// A thread gathers what a projection reads by itself: it costs less than meeting once more. Positions
// are shared out evenly, in the order of the sequences and their heads of keys and values; a thread's
// piece of a head may be only some of its positions, and who reads what was seen merges the pieces for
// itself. A token's numbers are the same whatever other tokens are in the step, but for that merging.

#include "decode_attention.h"
#include "dense.h"
#include "heads.h"

#include <atomic>
#include <sched.h>

#ifdef _OPENMP
#include <omp.h>
#endif

using namespace gptq;

namespace {

// Threads that wait for each other by spinning, and give way where one of them was put aside.
class Team {
 public:
  // How many they are: told before the first one waits.
  void begin(int threads) { threads_ = threads; }
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
  int threads_ = 1;
};

#define COMPILED(NAME, TARGET, R, V)                                                                    \
  TARGET void norm_##NAME(const float* x, const float* w, int64_t n, float eps, float* y) {             \
    norm_body(x, w, n, eps, y);                                                                         \
  }                                                                                                     \
  TARGET void silu_##NAME(const float* g, const float* u, int n, float* y) { silu_body(g, u, n, y); }   \
  TARGET void see_##NAME(const Sight& s, int type) { see_body<R, V>(s, type); }

COMPILED(plain, , 2, 2)
#ifdef X86
COMPILED(avx2, AVX2_TARGET, 2, 2)
COMPILED(avx512, AVX512_TARGET, 4, 4)
#endif

int64_t tiles_of(const GptqProjection& p) { return (p.out_features + COLUMNS - 1) / COLUMNS; }

int columns_of(const GptqProjection& p, int64_t tile) {
  return int(std::min<int64_t>(COLUMNS, p.out_features - tile * COLUMNS));
}

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
  } else if (model.isa >= BF16 && model.type == BFLOAT16) {
    in.rounded = static_cast<uint16_t*>(memory);
    for (int64_t i = 0; i < m * p.in_features; i++) in.rounded[i] = to_bfloat16(x[i]);
  }
  return in;
}

// One tile of a projection: y [m][COLUMNS]; gives the columns that count.
int project(const GptqModel& model, const GptqProjection& p, int64_t tile, int64_t m, const Input& in, float* y) {
  const int64_t first = tile * COLUMNS;
  const int count = columns_of(p, tile);
  const float* bias = p.packed ? p.packed->bias : p.bias;
  if (p.packed) {
    for (int64_t row = 0; row < m; row += ROWS)
      multiply_bits(*p.packed, tile, row, int(std::min<int64_t>(ROWS, m - row)), in.gathered, y + row * COLUMNS);
  } else {
    for (int64_t row = 0; row < m; row++) {
      const int64_t at = row * p.in_features;
      dense({p.weight, p.in_features, model.type, model.isa}, first, count, in.x + at, in.rounded ? in.rounded + at : nullptr, y + row * COLUMNS);
    }
  }
  if (bias)
    for (int64_t row = 0; row < m; row++)
      for (int c = 0; c < count; c++) y[row * COLUMNS + c] += bias[first + c];
  return count;
}

// What the threads share, all float32.
struct Shared {
  float *x, *q, *k, *v, *inner;
  float *most, *weight, *seen;  // of each piece: [rows], [rows] and [rows][head_dim]
};

// The positions that new tokens of one sequence see, in one head of keys and values.
struct Unit {
  const GptqSequence* sequence;
  int head;
  int64_t row;     // of the sequence's first token
  int64_t first;   // position
  int64_t offset;  // of its positions among those of all units
  int64_t length() const { return sequence->past + sequence->tokens - first; }
};

struct Own {
  float *normed;  // [m][hidden]
  float *tile;    // [m][COLUMNS], twice
  float *merged;  // [m][heads][head_dim], what was seen
  float *q;       // [rows][head_dim], of one head of keys and values
  uint16_t* rounded;
  int64_t *starts, *ends;  // [rows]
  float* scores;           // [rows][BLOCK]
  char* input;             // for make_ready
  Unit* units;             // [sequences * kv_heads]
  int64_t* cuts;           // [threads + 1]
};

struct Worker : Own {
  const GptqModel& model;
  const Shared& shared;
  Team& team;
  const float *cos, *sin;
  const GptqSequence* sequences;
  int64_t count, m, most_rows;  // sequences, tokens, and rows of a unit
  int thread, threads;
  int64_t units_held = 0;

  const Unit& last_unit() const { return units[units_held - 1]; }

  // A thread's share of what is to be done.
  int64_t from(int64_t all) const { return all * thread / threads; }
  int64_t to(int64_t all) const { return all * (thread + 1) / threads; }

  void norm(const float* weight) {
    for (int64_t row = 0; row < m; row++)
      BEST(norm, model.isa, shared.x + row * model.hidden, weight, model.hidden, model.eps, normed + row * model.hidden);
  }

  void attend(int index) {
    const GptqBlock& block = model.block[index];
    const GptqProjection* parts[] = {&block.q, &block.k, &block.v};
    float* outs[] = {shared.q, shared.k, shared.v};
    const int64_t all = tiles_of(block.q) + tiles_of(block.k) + tiles_of(block.v);
    int64_t before = 0;
    Input in{};
    bool ready = false;
    for (int i = 0; i < 3; i++) {
      const GptqProjection& p = *parts[i];
      const int64_t tiles = tiles_of(p);
      if (!p.same_rows) ready = false;
      const int64_t begin = std::max(from(all) - before, int64_t(0)), end = std::min(to(all) - before, tiles);
      if (begin < end && !ready) in = make_ready(model, p, normed, m, input);
      ready = ready || begin < end;
      for (int64_t at = begin; at < end; at++) {
        const int columns = project(model, p, at, m, in, tile);
        for (int64_t row = 0; row < m; row++)
          memcpy(outs[i] + row * p.out_features + at * COLUMNS, tile + row * COLUMNS, sizeof(float) * columns);
      }
      before += tiles;
    }
    team.meet();
    list_units(block);
    const int64_t begin = cut(thread), end = cut(thread + 1);
    for (int64_t i = 0; i < units_held; i++) {
      const Unit& unit = units[i];
      const int64_t low = std::max(begin - unit.offset, int64_t(0)), high = std::min(end - unit.offset, unit.length());
      if (low < high) look(block, unit, unit.sequence->caches[index], i, unit.first + low, unit.first + high);
    }
    team.meet();
    merge();
    add(block.o, merged);
  }

  void list_units(const GptqBlock& block) {
    units_held = 0;
    int64_t row = 0, offset = 0;
    for (int64_t i = 0; i < count; i++) {
      const GptqSequence& it = sequences[i];
      const int64_t first = block.window ? std::max<int64_t>(0, it.past + 1 - block.window) : 0;
      for (int head = 0; head < model.kv_heads; head++) {
        units[units_held++] = {&it, head, row, first, offset};
        offset += last_unit().length();
      }
      row += it.tokens;
    }
  }

  // Where a thread's share of all units' positions begins; new positions of a unit stay together.
  int64_t cut(int of) const {
    const int64_t all = last_unit().offset + last_unit().length(), at = all * of / threads;
    if (at == all) return all;
    const Unit* after = std::upper_bound(units, units + units_held, at, [](int64_t value, const Unit& it) { return value < it.offset; });
    const Unit& unit = *(after - 1);
    return std::min(at, unit.offset + unit.length() - unit.sequence->tokens);
  }

  // Attention over some positions of one unit.
  void look(const GptqBlock& block, const Unit& unit, const GptqCache& cache, int64_t number, int64_t begin, int64_t end) {
    const int dim = model.head_dim, each = model.heads / model.kv_heads;
    const int64_t q_stride = int64_t(model.heads) * dim, kv_stride = int64_t(model.kv_heads) * dim;
    const int64_t head_at = unit.head * cache.capacity * dim, past = unit.sequence->past, tokens = unit.sequence->tokens;
    if (end == past + tokens) {  // whoever sees the last position keeps the new keys and values
      for (int64_t i = 0; i < tokens; i++) {
        const int64_t row = unit.row + i;
        float* k = shared.k + row * kv_stride + unit.head * dim;
        if (block.k_norm) BEST(norm, model.isa, k, block.k_norm, dim, model.eps, k);
        rotate(k, cos + row * dim, sin + row * dim, dim);
        keep(cache.keys, head_at + (past + i) * dim, k, dim, model.type);
        keep(cache.values, head_at + (past + i) * dim, shared.v + row * kv_stride + unit.head * dim, dim, model.type);
      }
    }
    const bool rounds = model.isa >= BF16 && model.type == BFLOAT16;
    const int64_t rows = each * tokens;
    for (int64_t i = 0; i < rows; i++) {
      const int64_t row = unit.row + i % tokens;
      float* to = q + i * dim;
      memcpy(to, shared.q + row * q_stride + (unit.head * each + i / tokens) * dim, sizeof(float) * dim);
      if (block.q_norm) BEST(norm, model.isa, to, block.q_norm, dim, model.eps, to);
      rotate(to, cos + row * dim, sin + row * dim, dim);
      for (int d = 0; d < dim; d++) to[d] *= model.scale;
      if (rounds) keep(rounded, i * dim, to, dim, BFLOAT16);
      ends[i] = past + i % tokens + 1;
      starts[i] = block.window ? std::max<int64_t>(0, ends[i] - block.window) : 0;
    }
    const int64_t size = model.type == FLOAT32 ? 4 : 2, piece = (thread + number) * most_rows;
    const Sight sight{q, rounded, static_cast<const char*>(cache.keys) + head_at * size,
                      static_cast<const char*>(cache.values) + head_at * size, begin, end, starts, ends, int(rows), dim,
                      scores, shared.most + piece, shared.weight + piece, shared.seen + piece * dim};
#ifdef X86
    if (rounds) return see_bfloat16(sight);
#endif
    BEST(see, model.isa, sight, model.type);
  }

  // Put the pieces of each unit together: merged [m][heads][head_dim].
  void merge() {
    const int dim = model.head_dim, each = model.heads / model.kv_heads;
    for (int of = 0; of <= threads; of++) cuts[of] = cut(of);
    int first = 0;  // the thread that has a unit's first piece
    for (int64_t number = 0; number < units_held; number++) {
      const Unit& unit = units[number];
      const int64_t tokens = unit.sequence->tokens;
      while (cuts[first + 1] <= unit.offset) first++;
      int last = first;
      while (cuts[last + 1] < unit.offset + unit.length()) last++;
      for (int64_t i = 0; i < each * tokens; i++) {
        float* to = merged + ((unit.row + i % tokens) * model.heads + unit.head * each + i / tokens) * dim;
        const auto at = [&](int of) { return (of + number) * most_rows + i; };
        float most = -INFINITY, sum = 0;
        for (int of = first; of <= last; of++)
          if (cuts[of] < cuts[of + 1]) most = std::max(most, shared.most[at(of)]);
        for (int of = first; of <= last; of++) {
          if (cuts[of] == cuts[of + 1]) continue;  // more threads than positions
          const float factor = expf(shared.most[at(of)] - most), *seen = shared.seen + at(of) * dim;
          sum += shared.weight[at(of)] * factor;
          for (int d = 0; d < dim; d++) to[d] = (of == first ? 0 : to[d]) + factor * seen[d];
        }
        for (int d = 0; d < dim; d++) to[d] /= sum;
      }
      first = last;
    }
  }

  void feed(const GptqBlock& block) {
    norm(block.inner_norm);
    const int64_t count = tiles_of(block.gate);
    const size_t apart = (input_bytes(model, block.gate, m) + 63) / 64 * 64;
    if (from(count) < to(count)) {
      const Input gate = make_ready(model, block.gate, normed, m, input);
      const Input up = block.up.same_rows ? gate : make_ready(model, block.up, normed, m, input + apart);
      float* other = tile + m * COLUMNS;
      for (int64_t at = from(count); at < to(count); at++) {
        const int columns = project(model, block.gate, at, m, gate, tile);
        project(model, block.up, at, m, up, other);
        for (int64_t row = 0; row < m; row++) {
          float* values = tile + row * COLUMNS;
          BEST(silu, model.isa, values, other + row * COLUMNS, COLUMNS, values);
          memcpy(shared.inner + row * model.inner + at * COLUMNS, values, sizeof(float) * columns);
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
      for (int64_t at = from(count); at < to(count); at++) {
        const int columns = project(model, p, at, m, in, tile);
        for (int64_t row = 0; row < m; row++) {
          float* x = shared.x + row * model.hidden + at * COLUMNS;
          for (int c = 0; c < columns; c++) x[c] += tile[row * COLUMNS + c];
        }
      }
    }
    team.meet();
  }

  void run() {
    for (int i = 0; i < model.blocks; i++) {
      norm(model.block[i].input_norm);
      attend(i);
      feed(model.block[i]);
    }
  }
};

thread_local Scratch step_scratch;

}  // namespace

extern "C" {

// Run the blocks and the last norm on the new tokens of `count` sequences, one after the other: x and y
// [tokens][hidden] of the model's dtype; cos and sin [tokens][head_dim]. Keys and values are added to the
// sequences'. Returns 0, or 1 where memory is short.
int gptq_step(const GptqModel* model, const void* x, const float* cos, const float* sin, const GptqSequence* sequences,
              int64_t count, void* y, int threads) {
  const GptqModel& it = *model;
  int64_t m = 0, most = 0;
  for (int64_t i = 0; i < count; i++) m += sequences[i].tokens, most = std::max(most, sequences[i].tokens);
  Shared shared;
  size_t input = 0;
  for (int i = 0; i < it.blocks; i++) {
    const GptqBlock& block = it.block[i];
    for (const GptqProjection* p : {&block.q, &block.k, &block.v, &block.o, &block.gate, &block.down})
      input = std::max(input, input_bytes(it, *p, m) + 64 + (p == &block.gate ? input_bytes(it, block.up, m) : 0));
  }
  constexpr int MOST = 256;
  threads = std::min(threads, MOST);
  const size_t q_size = size_t(it.heads) * it.head_dim, kv_size = size_t(it.kv_heads) * it.head_dim;
  const size_t rows = it.heads / it.kv_heads * most, pieces = it.kv_heads * count + threads;
  Own own[MOST];
  const auto lay_out = [&](void* memory) {
    Arena arena(memory);
    const auto take = [&](size_t floats) { return arena.take<float>(floats); };
    shared.x = take(m * it.hidden);
    shared.q = take(m * q_size);
    shared.k = take(m * kv_size);
    shared.v = take(m * kv_size);
    shared.inner = take(m * it.inner);
    shared.most = take(pieces * rows);
    shared.weight = take(pieces * rows);
    shared.seen = take(pieces * rows * it.head_dim);
    for (int thread = 0; thread < threads; thread++) {
      Own& mine = own[thread];
      mine.normed = take(m * it.hidden);
      mine.tile = take(2 * m * COLUMNS);
      mine.merged = take(m * q_size);
      mine.q = take(rows * it.head_dim);
      mine.rounded = arena.take<uint16_t>(rows * it.head_dim);
      mine.starts = arena.take<int64_t>(rows);
      mine.ends = arena.take<int64_t>(rows);
      mine.scores = take(rows * BLOCK);
      mine.input = arena.take<char>(input);
      mine.units = arena.take<Unit>(size_t(it.kv_heads) * count);
      mine.cuts = arena.take<int64_t>(threads + 1);
    }
    return arena.used();
  };
  void* memory = step_scratch.get(lay_out(nullptr));
  if (!memory) return 1;
  lay_out(memory);
  for (int64_t i = 0; i < m * it.hidden; i++)
    shared.x[i] = it.type == FLOAT32 ? static_cast<const float*>(x)[i] : from_bfloat16(static_cast<const uint16_t*>(x)[i]);
  Team team;
#pragma omp parallel num_threads(threads)
  {
#ifdef _OPENMP
    const int thread = omp_get_thread_num(), together = omp_get_num_threads();
#else
    const int thread = 0, together = 1;
#endif
#pragma omp single
    team.begin(together);
    Worker{own[thread], it, shared, team, cos, sin, sequences, count, m, int64_t(rows), thread, together}.run();
  }
  for (int64_t row = 0; row < m; row++) {
    float* normed = own[0].normed;
    BEST(norm, it.isa, shared.x + row * it.hidden, it.norm, it.hidden, it.eps, normed);
    keep(y, row * it.hidden, normed, it.hidden, it.type);
  }
  return 0;
}

}  // extern "C"
