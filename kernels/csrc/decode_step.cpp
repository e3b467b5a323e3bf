// One decoding step of a model: its decoder layers and last norm, for a few new tokens of some
// sequences. What a layer is made of is in interface.h.
//
// What transformers does in some 20 operations a layer is done here in one team of threads, which
// meet five times a layer. Activations are float32 between products; keys and values are kept in
// the model's dtype. With M tokens, H the hidden size and F the intermediate one, a layer is
//
//   h[M, H] = norm?(x);  q, k, v = h * Wq, h * Wk, h * Wv                         barrier
//   q, k = rotary?(norm?(q, k));  keys, values += k, v
//   segments of softmax(scale * q * keys.T, causal, within the window) * values   barrier
//   delta[M, H] = merged segments * Wo                                            barrier
//   x += norm?(delta)                                      after h, where both parts are parallel
//   h[M, H] = norm?(x);  gated[M, F] = activation(h * Wgate) * (h * Wup)?         barrier
//   delta[M, H] = gated * Wdown                                                   barrier
//   x += norm?(delta)
//
// Latent attention (GptqLatent) makes the queries where q_a is, brings them to where the latents are,
// attends to latents, and brings each head's answer back: up to three pieces of work more.
//
// A mixture of experts shares out its router's columns first, then one thread chooses the experts,
// and they meet twice more; then the tiles of all experts that have rows are one after the other.
//
// Each thread that has a chunk of a piece of work makes x and h for itself, and permutes what a
// projection reads: it costs less than meeting once more. Who has the first chunk keeps x for the
// pieces that follow, in the other one of two places, since others may still read the last.
// Positions are shared out evenly, in the order of the sequences and their heads of keys and
// values, a segment at a time; who reads the attention merges the segments for itself:
//
//   sequence, kv head   0,0                    0,1                    1,0       1,1       2,0 ...
//   segments            ........ ........ .... ........ ........ .... ........  ........  .......
//   threads             |      0      |       1       |       2       |       3    ...
//
// Where a segment begins goes by the position alone. So a token's numbers are the same to the last
// bit whatever other tokens are in the step, of its sequence or of others, and by any number of
// threads.

#include "decode_attention.h"
#include "dense.h"
#include "gemv.h"
#include "mixture.h"
#include "team.h"

#include <algorithm>

using namespace gptq;

namespace {

// The code for each instruction set; ACC vectors of sums are what its registers hold.
#define COMPILED(NAME, TARGET, V, ACC)                                                            \
  TARGET void norm_##NAME(const NormArgs& norm, const float* x, float* y) {                       \
    norm_body<V>(norm, x, y);                                                                     \
  }                                                                                               \
  TARGET void activate_multiply_##NAME(const float* gate, const float* up, const Gate& by, int n, \
                                       float* y) {                                                \
    activate_multiply_body<V>(gate, up, by, n, y);                                                \
  }                                                                                               \
  TARGET void attend_##NAME(const AttentionArgs& args, int type) {                                \
    attend_body<V, ACC>(args, type);                                                              \
  }

COMPILED(plain, , Narrow, 8)
#ifdef X86
COMPILED(avx2, AVX2_TARGET, Middle, 8)
COMPILED(avx512, AVX512_TARGET, Wide, 16)
#endif

void norm_row(const GptqModel& model, const GptqNorm& norm, const float* x, int64_t size,
              float* y) {
  const NormArgs args{norm.weight,           norm.bias, model.parameter_type,
                      Norm(model.norm_kind), size,      model.eps};
  DISPATCH(norm, model.isa, args, x, y);
}

int experts_of(const GptqMixture& mixture) { return mixture.experts + mixture.shared; }

int64_t tiles_of(const GptqProjection& p) { return (p.out_features + COLUMNS - 1) / COLUMNS; }

int columns_of(const GptqProjection& p, int64_t tile) {
  return int(std::min<int64_t>(COLUMNS, p.out_features - tile * COLUMNS));
}

bool uses_bf16(const GptqModel& model) {
  return model.isa >= AVX512_BF16 && model.type == BFLOAT16;
}

// How wide a value is in the cache: a latent is a part of its key.
int cached_value_dim(const GptqModel& model) {
  return model.latent_dim ? model.latent_dim : model.head_dim;
}

int cache_type(const GptqModel& model, const GptqKvCache& cache) {
  return cache.key_scales ? int(INT8) : model.type;
}

// What queries are multiplied as: FLOAT32, BFLOAT16, or INT8 for 16 bits by keys in 8.
Type query_type(const GptqModel& model, const GptqKvCache& cache) {
  if (cache.key_scales) return model.isa >= AVX512 && model.head_dim % 32 == 0 ? INT8 : FLOAT32;
  return uses_bf16(model) ? BFLOAT16 : FLOAT32;
}

Activations activations_of(const GptqModel& model) {
  return activations_for(model.type, model.isa, model.activations);
}

bool reads_q_a(const GptqDecoderLayer& layer) {
  return layer.latent && layer.latent->q_a.out_features;
}

// What makes queries of h, or what they are made of.
const GptqProjection& first_projection(const GptqDecoderLayer& layer) {
  return reads_q_a(layer) ? layer.latent->q_a : layer.q;
}

int64_t latent_tiles(const GptqModel& model) { return (model.latent_dim + COLUMNS - 1) / COLUMNS; }

// x as a projection reads it, made by the thread that multiplies.
struct Input {
  const float* x;  // [M][in_features]
  uint16_t* x_bf16;
  PermutedActivations permuted;
};

size_t input_bytes(const GptqModel& model, const GptqProjection& p, int64_t m) {
  if (p.packed) return permuted_bytes(*p.packed, activations_of(model), m);
  return size_t(m) * p.in_features * 2;
}

Input prepare_input(const GptqModel& model, const GptqProjection& p, const float* x, int64_t m,
                    void* memory) {
  Input in{x, nullptr, {}};
  if (p.packed) {
    in.permuted = permuted_at(*p.packed, model.isa, activations_of(model), m, memory);
    for (int64_t row = 0; row < m; row++)
      permute_activations(*p.packed, x, FLOAT32, row, in.permuted);
  } else if (uses_bf16(model)) {
    in.x_bf16 = static_cast<uint16_t*>(memory);
    for (int64_t i = 0; i < m * p.in_features; i++) in.x_bf16[i] = to_bfloat16(x[i]);
  }
  return in;
}

// y [M][COLUMNS] = one tile of a projection; returns how many of its columns there are.
int project_tile(const GptqModel& model, const GptqProjection& p, int64_t tile, int64_t m,
                 const Input& in, float* y) {
  const int64_t at = tile * COLUMNS;
  const int count = columns_of(p, tile);
  if (p.packed) {
    for (int64_t row = 0; row < m; row += ROWS)
      multiply_tile(*p.packed, tile, row, int(std::min<int64_t>(ROWS, m - row)), in.permuted,
                    y + row * COLUMNS);
  } else {
    for (int64_t row = 0; row < m; row++) {
      const int64_t from = row * p.in_features;
      dense({p.weight, p.in_features, model.type, model.isa}, at, count, in.x + from,
            in.x_bf16 ? in.x_bf16 + from : nullptr, y + row * COLUMNS);
    }
  }
  const void* bias = p.packed ? p.packed->bias : p.bias;
  const int type = p.packed ? FLOAT32 : model.parameter_type;
  if (bias)
    for (int c = 0; c < count; c++) {
      const float added = load_number(bias, type, at + c);
      for (int64_t row = 0; row < m; row++) y[row * COLUMNS + c] += added;
    }
  return count;
}

// What all threads read, each writing its share.
struct SharedBuffers {
  float* x[2];       // [M][hidden], before and after what was added to it last
  float* delta;      // [M][hidden], what is added to x
  float *q, *k, *v;  // [M][heads][head_dim], [M][kv_heads][head_dim] twice
  // Of latent attention.
  float* q_a;          // [M][columns of q_a]
  float* queries;      // [M][heads][plain_dim + rotary_dim], before they are brought to the latents
  float* attended;     // [M][heads][value_dim]
  float* gated;        // [M][intermediate], or one expert's rows after the other's
  float* running_max;  // [segments][rows], of the attention over each segment of positions
  float* row_sum;      // [segments][rows]
  float* acc;          // [segments][rows][head_dim], or of a latent
  // Of a mixture of experts.
  float* normed;         // [M][hidden], what it reads
  float* logits;         // [M][experts], of the router
  float* shared_weight;  // [M], of the expert that all rows have
  Routes routes;
};

// Segments of positions are whole blocks. Later ones are longer, so that a long sequence has few to
// merge; the shortest let few positions be shared out.
struct SegmentSize {
  int64_t from;   // position
  int64_t size;   // positions of each
  int64_t index;  // of the first
};
constexpr SegmentSize SEGMENTS[] = {{0, KV_BLOCK, 0}, {1024, 256, 8}, {4096, 1024, 20}};

// The segment that a position is of.
int64_t segment_of(int64_t position) {
  int at = 0;
  while (at < 2 && position >= SEGMENTS[at + 1].from) at++;
  return SEGMENTS[at].index + (position - SEGMENTS[at].from) / SEGMENTS[at].size;
}

// The first position of a segment.
int64_t begin_of(int64_t segment) {
  int at = 0;
  while (at < 2 && segment >= SEGMENTS[at + 1].index) at++;
  return SEGMENTS[at].from + (segment - SEGMENTS[at].index) * SEGMENTS[at].size;
}

// The positions that new tokens of one sequence attend to in one head of keys and values.
struct KvSpan {
  const GptqSequence* sequence;
  int head;
  int64_t row;      // of the sequence's first token among those of the step
  int64_t first;    // position, of a whole block
  int64_t offset;   // of its positions among those of all spans
  int64_t segment;  // its first one among those of all spans
  int64_t end() const { return sequence->past + sequence->tokens; }
  int64_t length() const { return end() - first; }
  int64_t segments() const { return segment_of(end() - 1) - segment_of(first) + 1; }
};

struct ThreadBuffers {
  float* x;              // [M][hidden]
  float* normed;         // [M][hidden]
  float* added;          // [hidden], of delta, normed
  float* tile;           // [2][M][COLUMNS]
  float* attention;      // [M][heads][head_dim], its segments merged
  float *all_q, *all_k;  // [M][heads][head_dim], [M][kv_heads][head_dim], normed as one
  float* q;              // [rows][head_dim], of one head of keys and values
  uint16_t* q_bf16;
  int16_t* q_int16;
  float* q_scales;               // [rows]
  float* q_a;                    // [M][columns of q_a], normed
  int64_t *row_begin, *row_end;  // [rows]
  float* scores;                 // [rows][KV_BLOCK]
  char* input;                   // for prepare_input
  float* gathered;               // [M][hidden], an expert's rows
  KvSpan* spans;                 // [sequences * kv_heads]
};

// What one thread does of a step: chunks of its pieces of work, in buffers of its own.
struct Worker : ThreadBuffers {
  const GptqModel& model;
  const SharedBuffers& shared;
  const float *cos, *sin;
  const GptqSequence* sequences;
  int64_t count, m, max_rows;  // sequences, tokens, and rows of a span
  int64_t span_count = 0;
  float *rows_of_q = nullptr, *rows_of_k = nullptr;

  const KvSpan& last_span() const { return spans[span_count - 1]; }

  // y = norm(x), or x where there is none.
  void apply_norm(const GptqNorm& norm, const float* from, int64_t size, float* to) const {
    if (norm.weight) return norm_row(model, norm, from, size, to);
    if (from != to) memcpy(to, from, sizeof(float) * size);
  }

  void norm_x(const GptqNorm& norm) {
    for (int64_t row = 0; row < m; row++)
      apply_norm(norm, x + row * model.hidden, model.hidden, normed + row * model.hidden);
  }

  // x = what it was, of the two that are kept.
  void take_x(int kept) { memcpy(x, shared.x[kept], sizeof(float) * m * model.hidden); }

  // x += norm(delta).
  void add_delta(const GptqNorm& norm) {
    for (int64_t row = 0; row < m; row++) {
      float* to = x + row * model.hidden;
      apply_norm(norm, shared.delta + row * model.hidden, model.hidden, added);
      for (int i = 0; i < model.hidden; i++) to[i] += model.residual * added[i];
    }
  }

  // By who has the first chunk, for the pieces that follow.
  void keep(const Chunks& chunks, const float* of, float* to) const {
    if (chunks.begin == 0) memcpy(to, of, sizeof(float) * m * model.hidden);
  }

  // Queries, keys and values: tiles of all three, one after the other.
  void project_heads(int index, Chunks& chunks) {
    const GptqDecoderLayer& layer = model.layer[index];
    take_x(0);
    if (index > 0) add_delta(model.layer[index - 1].output_norm);
    norm_x(layer.input_norm);
    const GptqProjection* parts[] = {&first_projection(layer), &layer.k, &layer.v};
    float* outs[] = {shared.q, shared.k, shared.v};
    if (layer.latent) outs[0] = reads_q_a(layer) ? shared.q_a : shared.queries;
    Input in{};
    int ready = -1;  // the part that `in` is for
    do {
      keep(chunks, x, shared.x[1]);
      int64_t before = 0;
      for (int i = 0; i < 3; i++) {
        const GptqProjection& p = *parts[i];
        const int64_t tiles = tiles_of(p);
        const int64_t begin = std::max(chunks.begin - before, int64_t(0)),
                      end = std::min(chunks.end - before, tiles);
        before += tiles;
        if (begin >= end) continue;
        int alike = i;  // the first part that reads x as this one
        while (alike > 0 && parts[alike]->same_rows) alike--;
        if (ready != alike) in = prepare_input(model, p, normed, m, input);
        ready = alike;
        if (layer.k.out_features)
          project_tiles(p, begin, end, in, outs[i]);
        else
          project_turns(p, begin, end, in, outs);
      }
    } while (chunks.next());
  }

  // The queries of latent attention, from what their first projection made.
  void project_queries(const GptqDecoderLayer& layer, Chunks& chunks) const {
    const int64_t size = layer.latent->q_a.out_features;
    for (int64_t row = 0; row < m; row++)
      norm_latent(layer.latent->q_norm, shared.q_a + row * size, size, q_a + row * size);
    const Input in = prepare_input(model, layer.q, q_a, m, input);
    do project_tiles(layer.q, chunks.begin, chunks.end, in, shared.queries);
    while (chunks.next());
  }

  void norm_latent(const GptqNorm& norm, const float* from, int64_t size, float* to) const {
    const NormArgs args{norm.weight,           norm.bias, model.parameter_type,
                        Norm(model.norm_kind), size,      model.latent_eps};
    DISPATCH(norm, model.isa, args, from, to);
  }

  // Bring queries to where the latents are; an item is a tile of a head's latent. What is rotated
  // stays as wide as it is, behind.
  void bring_queries(const GptqDecoderLayer& layer, Chunks& chunks) const {
    const int64_t plain = model.plain_dim, width = plain + model.rotary_dim,
                  tiles = latent_tiles(model);
    const Dense to_keys{layer.latent->to_keys, plain, model.type, model.isa};
    uint16_t bf16[MAX_HEAD_DIM];
    do
      for (int64_t item = chunks.begin; item < chunks.end; item++) {
        const int64_t head = item / tiles, first = item % tiles * COLUMNS;
        const int count = int(std::min<int64_t>(COLUMNS, model.latent_dim - first));
        for (int64_t row = 0; row < m; row++) {
          const float* from = shared.queries + (row * model.heads + head) * width;
          float* to = shared.q + (row * model.heads + head) * model.head_dim;
          if (to_keys.uses_bf16()) store_as(bf16, 0, from, plain, BFLOAT16);
          dense(to_keys, head * model.latent_dim + first, count, from, bf16, to + first);
          if (first > 0) continue;
          memcpy(to + model.latent_dim, from + plain, sizeof(float) * model.rotary_dim);
          rotate_head(layer, row, to + model.latent_dim);
        }
      }
    while (chunks.next());
  }

  // Values of what heads attended to; an item is a head.
  void bring_answers(const GptqDecoderLayer& layer, Chunks& chunks) {
    list_spans(layer);
    const int64_t dim = model.latent_dim, size = model.value_dim;
    const Dense to_values{layer.latent->to_values, dim, model.type, model.isa};
    uint16_t bf16[MAX_HEAD_DIM];
    float latent[MAX_HEAD_DIM];
    do
      for (int64_t head = chunks.begin; head < chunks.end; head++)
        for (int64_t of = 0; of < span_count; of++)
          for (int64_t token = 0; token < spans[of].sequence->tokens; token++) {
            merge_row(layer, spans[of], head * spans[of].sequence->tokens + token, latent);
            if (to_values.uses_bf16()) store_as(bf16, 0, latent, dim, BFLOAT16);
            dense(to_values, head * size, int(size), latent, bf16,
                  shared.attended + ((spans[of].row + token) * model.heads + head) * size);
          }
    while (chunks.next());
  }

  // Some tiles of y [M][out_features].
  void project_tiles(const GptqProjection& p, int64_t begin, int64_t end, const Input& in,
                     float* y) const {
    for (int64_t at = begin; at < end; at++) {
      const int columns = project_tile(model, p, at, m, in, tile);
      for (int64_t row = 0; row < m; row++)
        memcpy(y + row * p.out_features + at * COLUMNS, tile + row * COLUMNS,
               sizeof(float) * columns);
    }
  }

  // Some tiles of heads of queries, keys and values in turns: outs are three of [M][heads][head_dim].
  void project_turns(const GptqProjection& p, int64_t begin, int64_t end, const Input& in,
                     float* const* outs) const {
    const int64_t dim = model.head_dim, size = model.heads * dim;
    for (int64_t at = begin; at < end; at++) {
      const int64_t first = at * COLUMNS, last = first + project_tile(model, p, at, m, in, tile);
      for (int64_t column = first, next; column < last; column = next) {
        const int64_t head = column / dim;
        next = std::min((head + 1) * dim, last);
        float* to = outs[head % 3] + head / 3 * dim + column % dim;
        for (int64_t row = 0; row < m; row++)
          memcpy(to + row * size, tile + row * COLUMNS + column - first,
                 sizeof(float) * (next - column));
      }
    }
  }

  // Attention: a chunk is one thread's share of all positions, or several.
  void attend(int index, Chunks& chunks) {
    const GptqDecoderLayer& layer = model.layer[index];
    norm_all_heads(layer);
    list_spans(layer);
    const int64_t all = last_span().offset + last_span().length();
    do {
      const int64_t begin = all * chunks.begin / chunks.threads,
                    end = all * chunks.end / chunks.threads;
      for (int64_t i = 0; i < span_count; i++)
        if (spans[i].offset < end && begin < spans[i].offset + spans[i].length())
          attend_span(layer, spans[i], spans[i].sequence->caches[index], begin, end);
    } while (chunks.next());
  }

  void project_attention(const GptqDecoderLayer& layer, Chunks& chunks) {
    if (layer.latent) return project_delta(layer.o, shared.attended, chunks);
    list_spans(layer);
    merge_segments(layer);
    project_delta(layer.o, attention, chunks);
  }

  // Queries and keys, normed over all heads of a token where the model does that.
  void norm_all_heads(const GptqDecoderLayer& layer) {
    rows_of_q = shared.q, rows_of_k = shared.k;
    if (!model.all_heads) return;
    const int64_t q_size = int64_t(model.heads) * model.head_dim,
                  kv_size = int64_t(model.kv_heads) * model.head_dim;
    for (int64_t row = 0; row < m; row++) {
      apply_norm(layer.q_norm, shared.q + row * q_size, q_size, all_q + row * q_size);
      apply_norm(layer.k_norm, shared.k + row * kv_size, kv_size, all_k + row * kv_size);
    }
    rows_of_q = all_q, rows_of_k = all_k;
  }

  void list_spans(const GptqDecoderLayer& layer) {
    span_count = 0;
    int64_t row = 0, offset = 0, segment = 0;
    for (int64_t i = 0; i < count; i++) {
      const GptqSequence& sequence = sequences[i];
      const int64_t first =
          layer.window ? std::max<int64_t>(0, sequence.past + 1 - layer.window) : 0;
      for (int head = 0; head < model.kv_heads; head++) {
        spans[span_count++] = {&sequence, head, row, first / KV_BLOCK * KV_BLOCK, offset, segment};
        offset += last_span().length();
        segment += last_span().segments();
      }
      row += sequence.tokens;
    }
  }

  // Attention over those segments of a span whose middle is from `begin` to `end` in all positions.
  void attend_span(const GptqDecoderLayer& layer, const KvSpan& span, const GptqKvCache& cache,
                   int64_t begin, int64_t end) {
    bool prepared = false;
    const int64_t number = segment_of(span.first);
    for (int64_t i = 0; i < span.segments(); i++) {
      const int64_t low = std::max(begin_of(number + i), span.first),
                    high = std::min(begin_of(number + i + 1), span.end()),
                    middle = span.offset + (low + high) / 2 - span.first;
      if (middle < begin || middle >= end) continue;
      if (!prepared) prepare_queries(layer, span, cache);
      prepared = true;
      keep_new(layer, span, cache, low, high);
      attend_segment(span, cache, span.segment + i, low, high);
    }
  }

  // New keys and values of some positions, into the cache.
  void keep_new(const GptqDecoderLayer& layer, const KvSpan& span, const GptqKvCache& cache,
                int64_t begin, int64_t end) {
    const int dim = model.head_dim;
    const int64_t stride = int64_t(model.kv_heads) * dim, past = span.sequence->past;
    for (int64_t at = std::max(begin, past); at < end; at++) {
      const int64_t row = span.row + at - past, place = span.head * cache.capacity + at,
                    to = place * dim;
      float *k = rows_of_k + row * stride + span.head * dim,
            *v = shared.v + row * stride + span.head * dim;
      if (layer.latent) {
        norm_latent(layer.latent->kv_norm, k, model.latent_dim, k);
        rotate_head(layer, row, k + model.latent_dim);
        store_as(cache.keys, to, k, dim, model.type);
        continue;
      }
      if (!model.all_heads) apply_norm(layer.k_norm, k, dim, k);
      rotate_head(layer, row, k);
      if (cache.key_scales) {
        cache.key_scales[place] = quantize(k, dim, MAX_INT8, static_cast<int8_t*>(cache.keys) + to);
        cache.value_scales[place] =
            quantize(v, dim, MAX_INT8, static_cast<int8_t*>(cache.values) + to);
        continue;
      }
      store_as(cache.keys, to, k, dim, model.type);
      store_as(cache.values, to, v, dim, model.type);
    }
  }

  // q and what it attends to, a row for each query head of each new token.
  void prepare_queries(const GptqDecoderLayer& layer, const KvSpan& span,
                       const GptqKvCache& cache) {
    const int dim = model.head_dim, group = model.heads / model.kv_heads;
    const int64_t q_stride = int64_t(model.heads) * dim, past = span.sequence->past,
                  tokens = span.sequence->tokens;
    const int64_t rows = group * tokens;
    const Type type = query_type(model, cache);
    const HeadOrder order =
        HeadOrder::of(cache_type(model, cache), model.isa, dim, cached_value_dim(model));
    for (int64_t i = 0; i < rows; i++) {
      const int64_t row = span.row + i % tokens;
      float* to = q + i * dim;
      memcpy(to, rows_of_q + row * q_stride + (span.head * group + i / tokens) * dim,
             sizeof(float) * dim);
      if (!layer.latent) {  // else it is rotated already
        if (!model.all_heads) apply_norm(layer.q_norm, to, dim, to);
        rotate_head(layer, row, to);
      }
      for (int d = 0; d < dim; d++) to[d] *= model.scale;
      if (type == INT8) {
        q_scales[i] = quantize(to, dim, MAX_INT16, q_int16 + i * dim);
      } else if (type == BFLOAT16) {
        store_as(q_bf16, i * dim, to, dim, BFLOAT16);
      } else {
        float own[MAX_HEAD_DIM];
        memcpy(own, to, sizeof(float) * dim);
        order.apply<false>(own, dim, to);
      }
      row_end[i] = past + i % tokens + 1;
      row_begin[i] = layer.window ? std::max<int64_t>(0, row_end[i] - layer.window) : 0;
    }
  }

  // Attention over one segment, which is `number` of all.
  void attend_segment(const KvSpan& span, const GptqKvCache& cache, int64_t number, int64_t begin,
                      int64_t end) {
    const int dim = model.head_dim;
    const int type = cache_type(model, cache);
    const int64_t head_at = span.head * cache.capacity, bytes = head_at * dim * size_of(type),
                  rows = model.heads / model.kv_heads * span.sequence->tokens,
                  segment = number * max_rows;
    const AttentionArgs args{q,
                             q_bf16,
                             q_int16,
                             q_scales,
                             static_cast<const char*>(cache.keys) + bytes,
                             static_cast<const char*>(cached_values(cache)) + bytes,
                             type == INT8 ? cache.key_scales + head_at : nullptr,
                             type == INT8 ? cache.value_scales + head_at : nullptr,
                             begin,
                             end,
                             row_begin,
                             row_end,
                             int(rows),
                             dim,
                             cached_value_dim(model),
                             model.softcap,
                             scores,
                             shared.running_max + segment,
                             shared.row_sum + segment,
                             shared.acc + segment * cached_value_dim(model)};
#ifdef X86
    const Type queries = query_type(model, cache);
    if (queries == INT8) return attend_int8(args);
    if (queries == BFLOAT16) return attend_bfloat16(args);
#endif
    DISPATCH(attend, model.isa, args, type);
  }

  void rotate_head(const GptqDecoderLayer& layer, int64_t row, float* head) const {
    if (layer.angles < 0) return;
    const int64_t at = (layer.angles * m + row) * model.rotary_dim;
    rotate(head, cos + at, sin + at, model.rotary_dim, model.neighbours != 0);
    if (model.neighbours != 2) return;
    float seconds[MAX_HEAD_DIM / 2];
    const int half = model.rotary_dim / 2;
    for (int i = 0; i < half; i++) {
      seconds[i] = head[2 * i + 1];
      head[i] = head[2 * i];
    }
    memcpy(head + half, seconds, sizeof(float) * half);
  }

  const void* cached_values(const GptqKvCache& cache) const {
    return model.latent_dim ? cache.keys : cache.values;
  }

  // attention [M][heads][head_dim] from the segments of each span.
  void merge_segments(const GptqDecoderLayer& layer) {
    const int dim = model.head_dim, group = model.heads / model.kv_heads;
    for (int64_t of = 0; of < span_count; of++) {
      const KvSpan& span = spans[of];
      const int64_t tokens = span.sequence->tokens;
      for (int64_t i = 0; i < group * tokens; i++)
        merge_row(layer, span, i,
                  attention + ((span.row + i % tokens) * model.heads + head_of(span, i)) * dim);
    }
  }

  // The query head of a row of a span.
  int64_t head_of(const KvSpan& span, int64_t row) const {
    return span.head * (model.heads / model.kv_heads) + row / span.sequence->tokens;
  }

  // What a row of a span attended to, from its segments; a sink is in none of them.
  void merge_row(const GptqDecoderLayer& layer, const KvSpan& span, int64_t row, float* to) const {
    const int dim = cached_value_dim(model);
    const int64_t segments = span.segments();
    const HeadOrder order =
        HeadOrder::of(cache_type(model, span.sequence->caches[0]), model.isa, model.head_dim, dim);
    float merged[MAX_HEAD_DIM];
    memset(merged, 0, sizeof(float) * dim);
    const auto at = [&](int64_t segment) { return (span.segment + segment) * max_rows + row; };
    const float sink = layer.sinks
                           ? load_number(layer.sinks, model.parameter_type, head_of(span, row))
                           : -INFINITY;
    float max = sink;
    for (int64_t segment = 0; segment < segments; segment++)
      max = std::max(max, shared.running_max[at(segment)]);
    float sum = layer.sinks ? expf(sink - max) : 0;
    for (int64_t segment = 0; segment < segments; segment++) {
      if (shared.running_max[at(segment)] == -INFINITY) continue;  // it attends to none of it
      const float correction = expf(shared.running_max[at(segment)] - max),
                  *acc = shared.acc + at(segment) * dim;
      sum += shared.row_sum[at(segment)] * correction;
      for (int d = 0; d < dim; d++) merged[d] += correction * acc[d];
    }
    for (int d = 0; d < dim; d++) merged[d] /= sum;
    order.apply<true>(merged, dim, to);
  }

  // normed = what the feed-forward part reads; x has the attention's answer.
  void begin_feed_forward(const GptqDecoderLayer& layer) {
    take_x(1);
    if (!model.parallel) add_delta(layer.attention_norm);
    norm_x(layer.feed_forward_norm);
    if (model.parallel) add_delta(layer.attention_norm);
  }

  void gate_and_up(const GptqDecoderLayer& layer, Chunks& chunks) {
    begin_feed_forward(layer);
    const Gated in = prepare_gated(layer.gate, layer.up, normed, m);
    do {
      keep(chunks, x, shared.x[0]);
      gate_tiles(layer.gate, layer.up, chunks.begin, chunks.end, in, m, shared.gated);
    } while (chunks.next());
  }

  // What gate and up read.
  struct Gated {
    Input gate, up;
  };

  Gated prepare_gated(const GptqProjection& gate, const GptqProjection& up, const float* of,
                      int64_t rows) const {
    const size_t gate_bytes = round_up(input_bytes(model, gate, rows), CACHE_LINE);
    const Input of_gate = prepare_input(model, gate, of, rows, input);
    return {of_gate,
            up.same_rows ? of_gate : prepare_input(model, up, of, rows, input + gate_bytes)};
  }

  // gated [rows][gate.out_features] = activation(in * gate) * (in * up), some tiles of columns; of
  // a part without gates activation(in * gate).
  void gate_tiles(const GptqProjection& gate, const GptqProjection& up, int64_t begin, int64_t end,
                  const Gated& in, int64_t rows, float* gated) const {
    float* up_tile = up.out_features ? tile + rows * COLUMNS : nullptr;
    const Gate by{Activation(model.activation), model.swiglu_alpha, model.swiglu_limit};
    for (int64_t at = begin; at < end; at++) {
      const int columns = project_tile(model, gate, at, rows, in.gate, tile);
      if (up_tile) project_tile(model, up, at, rows, in.up, up_tile);
      for (int64_t row = 0; row < rows; row++) {
        float* values = tile + row * COLUMNS;
        const float* factors = up_tile ? up_tile + row * COLUMNS : nullptr;
        DISPATCH(activate_multiply, model.isa, values, factors, by, COLUMNS, values);
        memcpy(gated + row * gate.out_features + at * COLUMNS, values, sizeof(float) * columns);
      }
    }
  }

  // delta = projection of `of`.
  void project_delta(const GptqProjection& p, const float* of, Chunks& chunks) const {
    const Input in = prepare_input(model, p, of, m, input);
    do project_tiles(p, chunks.begin, chunks.end, in, shared.delta);
    while (chunks.next());
  }

  // In float32, whatever multiplies the experts: a rounded score may choose others.
  Dense dense_of(const void* weight, int type) const {
    return {weight, model.hidden, type, std::min<int>(model.isa, AVX512)};
  }

  // Logits of some experts.
  void score_experts(const GptqDecoderLayer& layer, Chunks& chunks) {
    begin_feed_forward(layer);
    const GptqMixture& mixture = *layer.mixture;
    const Dense router = dense_of(mixture.router, mixture.router_type);
    do {
      keep(chunks, x, shared.x[0]);
      keep(chunks, normed, shared.normed);
      for (int64_t row = 0; row < m; row++)
        dense(router, chunks.begin, int(chunks.end - chunks.begin), normed + row * model.hidden,
              nullptr, shared.logits + row * mixture.experts + chunks.begin);
    } while (chunks.next());
  }

  // The experts of each row, by one thread.
  void route(const GptqMixture& mixture) const {
    Routes routes = shared.routes;
    for (int64_t row = 0; row < m; row++) {
      routes.choose(mixture, row, shared.logits + row * mixture.experts);
      shared.shared_weight[row] = 1;
      if (!mixture.shared_gate) continue;
      float score;
      dense(dense_of(mixture.shared_gate, model.parameter_type), 0, 1,
            shared.normed + row * model.hidden, nullptr, &score);
      shared.shared_weight[row] = 1.0f / (1.0f + expf(-score));
    }
    routes.sort(mixture, m, shared.shared_weight);
  }

  // Gate and up of all experts that have rows: tiles of one after those of the other.
  void gate_experts(const GptqMixture& mixture, Chunks& chunks) {
    Gated in{};
    int ready = -1;  // the expert that `in` is for
    do {
      int64_t before = 0;
      float* gated = shared.gated;
      for (int i = 0; i < experts_of(mixture); i++) {
        const GptqExpert& expert = mixture.expert[i];
        const int64_t rows = shared.routes.count(i), tiles = rows ? tiles_of(expert.gate) : 0;
        const int64_t begin = std::max(chunks.begin - before, int64_t(0)),
                      end = std::min(chunks.end - before, tiles);
        if (begin < end) {
          if (ready != i) in = prepare_gated(expert.gate, expert.up, rows_of(i), rows);
          ready = i;
          gate_tiles(expert.gate, expert.up, begin, end, in, rows, gated);
        }
        before += tiles;
        gated += rows * expert.gate.out_features;
      }
    } while (chunks.next());
  }

  // The rows that an expert reads.
  const float* rows_of(int expert) const {
    const int64_t rows = shared.routes.count(expert), first = shared.routes.first[expert];
    if (rows == m) return shared.normed;
    for (int64_t i = 0; i < rows; i++)
      memcpy(gathered + i * model.hidden,
             shared.normed + shared.routes.row[first + i] * int64_t(model.hidden),
             sizeof(float) * model.hidden);
    return gathered;
  }

  // delta = the sum of the experts' answers.
  void add_experts(const GptqMixture& mixture, Chunks& chunks) const {
    do {
      const int64_t first = chunks.begin * COLUMNS,
                    last = std::min<int64_t>(model.hidden, chunks.end * COLUMNS);
      for (int64_t row = 0; row < m; row++)
        memset(shared.delta + row * model.hidden + first, 0, sizeof(float) * (last - first));
      const float* gated = shared.gated;
      for (int i = 0; i < experts_of(mixture); i++) {
        const GptqExpert& expert = mixture.expert[i];
        const int64_t rows = shared.routes.count(i);
        if (rows) add_expert(expert.down, chunks.begin, chunks.end, gated, i);
        gated += rows * expert.gate.out_features;
      }
    } while (chunks.next());
  }

  // delta += an expert's answers for its rows, some tiles of columns.
  void add_expert(const GptqProjection& down, int64_t begin, int64_t end, const float* gated,
                  int expert) const {
    const Routes& routes = shared.routes;
    const int64_t rows = routes.count(expert), route = routes.first[expert];
    const Input in = prepare_input(model, down, gated, rows, input);
    for (int64_t at = begin; at < end; at++) {
      const int columns = project_tile(model, down, at, rows, in, tile);
      for (int64_t i = 0; i < rows; i++) {
        float* to = shared.delta + routes.row[route + i] * int64_t(model.hidden) + at * COLUMNS;
        for (int c = 0; c < columns; c++) to[c] += routes.weight[route + i] * tile[i * COLUMNS + c];
      }
    }
  }
};

void run_mixture(const GptqModel& model, const GptqDecoderLayer& layer, Worker* workers,
                 const SharedBuffers& shared, Together& all) {
  const GptqMixture& mixture = *layer.mixture;
  all.share(mixture.experts,
            [&](Chunks& chunks) { workers[chunks.thread].score_experts(layer, chunks); });
  all.share(1, [&](Chunks& chunks) { workers[chunks.thread].route(mixture); });
  int64_t tiles = 0;
  for (int i = 0; i < experts_of(mixture); i++)
    if (shared.routes.count(i)) tiles += tiles_of(mixture.expert[i].gate);
  all.share(tiles, [&](Chunks& chunks) { workers[chunks.thread].gate_experts(mixture, chunks); });
  all.share((model.hidden + COLUMNS - 1) / COLUMNS,
            [&](Chunks& chunks) { workers[chunks.thread].add_experts(mixture, chunks); });
}

// All decoder layers, by whoever takes part.
void run_layers(const GptqModel& model, Worker* workers, const SharedBuffers& shared,
                Together& all) {
  for (int i = 0; i < model.layers; i++) {
    const GptqDecoderLayer& layer = model.layer[i];
    all.share(tiles_of(first_projection(layer)) + tiles_of(layer.k) + tiles_of(layer.v),
              [&](Chunks& chunks) { workers[chunks.thread].project_heads(i, chunks); });
    if (reads_q_a(layer))
      all.share(tiles_of(layer.q),
                [&](Chunks& chunks) { workers[chunks.thread].project_queries(layer, chunks); });
    if (layer.latent)
      all.share(model.heads * latent_tiles(model),
                [&](Chunks& chunks) { workers[chunks.thread].bring_queries(layer, chunks); });
    all.share(all.threads, [&](Chunks& chunks) { workers[chunks.thread].attend(i, chunks); });
    if (layer.latent)
      all.share(model.heads,
                [&](Chunks& chunks) { workers[chunks.thread].bring_answers(layer, chunks); });
    all.share(tiles_of(layer.o),
              [&](Chunks& chunks) { workers[chunks.thread].project_attention(layer, chunks); });
    if (layer.mixture) {
      run_mixture(model, layer, workers, shared, all);
      continue;
    }
    all.share(tiles_of(layer.gate),
              [&](Chunks& chunks) { workers[chunks.thread].gate_and_up(layer, chunks); });
    all.share(tiles_of(layer.down), [&](Chunks& chunks) {
      workers[chunks.thread].project_delta(layer.down, shared.gated, chunks);
    });
  }
}

thread_local Scratch step_scratch;

}  // namespace

extern "C" {

int gptq_decode_step(const GptqModel* description, const void* x, const float* cos,
                     const float* sin, const GptqSequence* sequences, int64_t count, void* y,
                     int threads) {
  const GptqModel& model = *description;
  int64_t m = 0, max_tokens = 0;
  for (int64_t i = 0; i < count; i++) {
    m += sequences[i].tokens;
    max_tokens = std::max(max_tokens, sequences[i].tokens);
  }
  size_t input = 0, gated = 0, q_a = 0;
  GptqMixture largest{};
  const auto add_feed = [&](const GptqProjection& gate, const GptqProjection& up,
                            const GptqProjection& down) {
    const size_t both = input_bytes(model, gate, m) + CACHE_LINE + input_bytes(model, up, m);
    input = std::max({input, both, input_bytes(model, down, m)});
    return size_t(m) * gate.out_features;
  };
  for (int i = 0; i < model.layers; i++) {
    const GptqDecoderLayer& layer = model.layer[i];
    for (const GptqProjection* p :
         {&first_projection(layer), &layer.q, &layer.k, &layer.v, &layer.o})
      input = std::max(input, input_bytes(model, *p, m));
    if (reads_q_a(layer)) q_a = std::max(q_a, size_t(layer.latent->q_a.out_features));
    if (!layer.mixture) {
      gated = std::max(gated, add_feed(layer.gate, layer.up, layer.down));
      continue;
    }
    const GptqMixture& mixture = *layer.mixture;
    size_t of_experts = 0;
    for (int at = 0; at < mixture.experts; at++) {
      const GptqExpert& expert = mixture.expert[at];
      of_experts =
          std::max(of_experts, mixture.top_k * add_feed(expert.gate, expert.up, expert.down));
    }
    if (mixture.shared) {
      const GptqExpert& expert = mixture.expert[mixture.experts];
      of_experts += add_feed(expert.gate, expert.up, expert.down);
    }
    gated = std::max(gated, of_experts);
    largest.experts = std::max(largest.experts, mixture.experts);
    largest.top_k = std::max(largest.top_k, mixture.top_k);
  }
  threads = std::min(threads, MAX_THREADS);
  const size_t q_size = size_t(model.heads) * model.head_dim,
               kv_size = size_t(model.kv_heads) * model.head_dim;
  const size_t rows = model.heads / model.kv_heads * max_tokens;
  size_t segments = 0;
  for (int64_t i = 0; i < count; i++)
    segments += model.kv_heads * (segment_of(sequences[i].past + sequences[i].tokens - 1) + 1);
  const bool latent = model.latent_dim;
  SharedBuffers shared;
  Worker* workers;
  const auto lay_out = [&](void* memory) {
    Arena arena(memory);
    for (float*& x_kept : shared.x) x_kept = arena.take<float>(m * model.hidden);
    shared.delta = arena.take<float>(m * model.hidden);
    shared.q = arena.take<float>(m * q_size);
    shared.k = arena.take<float>(m * kv_size);
    shared.v = arena.take<float>(m * kv_size);
    shared.gated = arena.take<float>(gated);
    shared.running_max = arena.take<float>(segments * rows);
    shared.row_sum = arena.take<float>(segments * rows);
    shared.acc = arena.take<float>(segments * rows * cached_value_dim(model));
    shared.q_a = arena.take<float>(m * q_a);
    shared.queries =
        arena.take<float>(m * model.heads * (latent ? model.plain_dim + model.rotary_dim : 0));
    shared.attended = arena.take<float>(m * model.heads * model.value_dim);
    shared.normed = arena.take<float>(largest.experts ? m * model.hidden : 0);
    shared.logits = arena.take<float>(size_t(m) * largest.experts);
    shared.shared_weight = arena.take<float>(m);
    shared.routes.lay_out(arena, largest, m);
    workers = arena.take<Worker>(threads);
    for (int thread = 0; thread < threads; thread++) {
      ThreadBuffers buffers;
      buffers.x = arena.take<float>(m * model.hidden);
      buffers.normed = arena.take<float>(m * model.hidden);
      buffers.added = arena.take<float>(model.hidden);
      buffers.tile = arena.take<float>(2 * m * COLUMNS);
      buffers.attention = arena.take<float>(latent ? 0 : m * q_size);
      buffers.q_a = arena.take<float>(m * q_a);
      buffers.all_q = arena.take<float>(model.all_heads ? m * q_size : 0);
      buffers.all_k = arena.take<float>(model.all_heads ? m * kv_size : 0);
      buffers.q = arena.take<float>(rows * model.head_dim);
      buffers.q_bf16 = arena.take<uint16_t>(rows * model.head_dim);
      buffers.q_int16 = arena.take<int16_t>(rows * model.head_dim);
      buffers.q_scales = arena.take<float>(rows);
      buffers.row_begin = arena.take<int64_t>(rows);
      buffers.row_end = arena.take<int64_t>(rows);
      buffers.scores = arena.take<float>(rows * KV_BLOCK);
      buffers.input = arena.take<char>(input);
      buffers.gathered = arena.take<float>(largest.experts ? m * model.hidden : 0);
      buffers.spans = arena.take<KvSpan>(size_t(model.kv_heads) * count);
      if (memory)
        new (workers + thread)
            Worker{buffers, model, shared, cos, sin, sequences, count, m, int64_t(rows)};
    }
    return arena.used();
  };
  void* memory = step_scratch.get(lay_out(nullptr));
  if (!memory) return 1;
  lay_out(memory);
  for (int64_t i = 0; i < m * model.hidden; i++) shared.x[0][i] = load_number(x, model.type, i);
  together(threads, Meet::SPINNING,
           [&](Together& all) { run_layers(model, workers, shared, all); });
  Worker& last = workers[0];
  last.take_x(0);
  if (model.layers) last.add_delta(model.layer[model.layers - 1].output_norm);
  for (int64_t row = 0; row < m; row++) {
    norm_row(model, model.norm, last.x + row * model.hidden, model.hidden, last.normed);
    store_as(y, row * model.hidden, last.normed, model.hidden, model.type);
  }
  return 0;
}

}  // extern "C"
