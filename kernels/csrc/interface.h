// The C interface of the library, which gptq_loader_kernels/cpu/library.py mirrors field by field.
//
// Plain C, loaded with ctypes: no Python and no torch header, so one build serves all of their
// versions. At load Python compares sizes of structures and types of arguments (interface.cpp).
//
// `type` is Type, `isa` Isa and `activations` Activations of simd.h; this processor must run what
// they name. `norm_kind` is Norm and `activation` Activation of vector_math.h. A function that returns int returns 0, or 1 where memory is short, unless it says
// otherwise. Nothing here throws, and nothing is checked: Python does that.

#pragma once

#include <cstdint>

#if defined(_WIN32) && !defined(__clang__)
#error \
    "gcc does not align vectors on the stack of Windows (https://gcc.gnu.org/PR54412): take clang"
#endif
#ifdef _WIN32
#pragma clang attribute push(__attribute__((dllexport)), apply_to = function)
#endif

extern "C" {

// A packed linear: w[n, k] = s[g, n] * (q[k, n] - z[g, n]). gemv.h draws how it lies in memory.
struct GptqLinear {
  int32_t bits;                  // 2, 3, 4 or 8
  int32_t in_features;           // K
  int32_t out_features;          // N
  int32_t units;                 // of a column
  int32_t segments;              // of a column
  int32_t groups;                // G
  int32_t float_scales;          // scales are float32, else float16
  const int32_t* rows;           // [units * unit rows]
  const int32_t* segment_units;  // [segments] units of each
  const int32_t* segment_group;  // [segments]
  const uint32_t* words;         // [tiles][units][unit words][64]
  const void* scales;            // [tiles][groups][64]
  const uint8_t* zeros;          // [tiles][groups][64]
  const float* bias;             // [out_features], or null
};

// y = x @ W.T + bias: a packed linear, or rows [out_features][in_features] of the model's dtype.
struct GptqProjection {
  const GptqLinear* packed;  // or null
  const void* weight;        // where it is not packed
  const void* bias;          // of what is not packed, or null
  int32_t in_features;
  int32_t out_features;
  int32_t same_rows;  // as the projection before it: what was permuted for that one serves
};

// A norm of the model's kind; without a weight there is none, and x stays as it is.
struct GptqNorm {
  const void* weight;
  const void* bias;  // or null
};

struct GptqExpert {
  GptqProjection gate, up, down;
};

// A feed-forward part of experts: a token takes the `top_k` that its router likes best.
struct GptqMixture {
  const GptqExpert* expert;  // [experts], and the one that every token takes, where there is one
  const void* router;        // [experts][hidden] of router_type
  const void* router_bias;   // [experts] of router_type, or null
  const float* correction;   // [experts], added to scores to choose by, or null
  const void* shared_gate;   // [hidden] of parameter_type, of the one for every token, or null
  int32_t experts, top_k;
  int32_t router_type;
  int32_t shared;               // whether there is one for every token
  int32_t sigmoid;              // whether scores are sigmoids, else a softmax
  int32_t normalized;           // whether what the chosen ones count adds up to 1
  int32_t groups, kept_groups;  // of experts: those of the best groups can be chosen; 1 for all
  float scaling;                // of what the chosen ones count
  int32_t ranks_groups;         // how many of a group's best scores rank it: 1 or 2
};

// Latent attention: all heads' keys and values are products of one latent of a position, which the
// cache keeps with `rotary_dim` numbers of a key that are rotated, and are the same for all heads.
// A head's query is brought to where the latents are, and its answer back: neither keys nor values
// are ever made. Of the layer, q reads what q_a and its norm make, or h where q_a has no columns; k
// is the latent and what is rotated; v has no columns.
struct GptqLatent {
  GptqProjection q_a;
  GptqNorm q_norm;        // [columns of q_a]
  GptqNorm kv_norm;       // [latent_dim]
  const void* to_keys;    // [heads][latent_dim][head's numbers that are not rotated] of `type`
  const void* to_values;  // [heads][value_dim][latent_dim] of `type`
};

// x += attention(input_norm(x)); x += feed_forward(feed_forward_norm(x)), what is added normed first
// where there is a norm for it. Where the two are `parallel`, both read the same x. Where k has no
// columns, those of q are a head of queries, one of keys and one of values in turn.
struct GptqDecoderLayer {
  GptqProjection q, k, v, o, gate, up,
      down;                    // without gates: `gate` is activated, `up` has no columns
  GptqNorm input_norm;         // [hidden]
  GptqNorm attention_norm;     // [hidden], of what attention adds
  GptqNorm feed_forward_norm;  // [hidden]
  GptqNorm output_norm;        // [hidden], of what the feed-forward part adds
  GptqNorm q_norm, k_norm;     // [head_dim], of each head, or of all heads [heads][head_dim]
  int64_t window;              // positions that a token attends to, or 0 for all
  int32_t angles;              // the table that its heads are rotated by, or -1 for none
  const GptqMixture* mixture;  // in place of gate, up and down, or null
  const void* sinks;  // [heads] of parameter_type: a score of each that joins its softmax, or null
  const GptqLatent* latent;  // of every layer, or null
};

// Keys and values of one sequence in one decoder layer: of the model's dtype, or in 8 bits, where
// each head of a position has a scale.
struct GptqKvCache {
  void* keys;           // [kv_heads][capacity][head_dim]
  void* values;         // [kv_heads][capacity][head_dim]; of latent attention null
  float* key_scales;    // [kv_heads][capacity], or null
  float* value_scales;  // [kv_heads][capacity], or null
  int64_t capacity;
};

// New tokens of one sequence.
struct GptqSequence {
  int64_t past;               // positions that its caches hold
  int64_t tokens;             // that follow them
  const GptqKvCache* caches;  // [layers]
};

// A decoder made of these parts.
struct GptqModel {
  int32_t layers, hidden, heads, kv_heads, head_dim;
  int32_t type;  // of weights, keys and values
  int32_t isa, activations;
  float eps, scale;
  GptqNorm norm;  // [hidden]
  const GptqDecoderLayer* layer;
  int32_t parameter_type;  // of norms and sinks, and of biases of what is not packed
  int32_t norm_kind, activation;
  int32_t rotary_dim;  // how much of a head is rotated
  int32_t neighbours;  // 1: it is rotated by pairs of neighbours; 2: and these parted; 0: by halves
  int32_t all_heads;   // whether q_norm and k_norm are of all heads
  int32_t parallel;
  float residual;  // what is added to x is multiplied by it
  float softcap;   // scores are softcap * tanh(score / softcap), or 0 for as they are
  float swiglu_alpha, swiglu_limit;  // of the activation SWIGLU_OAI
  // Of latent attention, where head_dim is latent_dim + rotary_dim and kv_heads is 1; else 0.
  int32_t latent_dim, value_dim;
  int32_t plain_dim;  // numbers of a head's query that are not rotated; rotary_dim follow
  float latent_eps;   // of its norms
};

// interface.cpp. The size of a structure by its name, or 0 where there is none; a function's result
// and arguments as letters, or null.
int64_t gptq_sizeof(const char* name);
const char* gptq_signature(const char* name);

// cpu_features.cpp. The best Isa of this processor; the Activations that few rows of x are
// multiplied as the fastest by an Isa, as good as x; whether AMX multiplies bfloat16 here.
int gptq_isa();
int gptq_activations(int isa);
int gptq_amx();

// team.cpp. Have threads of the library's own share the work (1), or OpenMP's (0), where there are
// both; returns which do.
int gptq_own_threads(int own);

// pack.cpp. Pack a qweight [K * bits / 32][N] into words [tiles][units][unit words][64]; `rows`
// [units * unit rows] names the feature of each row, or -1.
int gptq_pack(int bits, int planar, const uint32_t* qweight, const int32_t* rows,
              int64_t in_features, int64_t units, int64_t columns, uint32_t* words, int threads);

// gemv.cpp. y [M][N] = x [M][K] @ W.T + bias, x and y of `type`, for few rows of x.
int gptq_gemv(const GptqLinear* linear, const void* x, void* y, int64_t m, int type, int isa,
              int activations, int threads);

// gemv.cpp. The transposed weight of some tiles, w [K][tiles * 64] of `type`, rounded once.
void gptq_unpack(const GptqLinear* linear, int64_t first, int64_t tiles, void* w, int type, int isa,
                 int threads);

// gemm.cpp. The rows of x of `type` from which gptq_gemm takes less time than gptq_gemv with the
// same activations, or 0 where it cannot multiply them.
int gptq_gemm_from(int type, int isa, int activations, int amx);

// gemm.cpp. y[i] [M][N of i] = x [M][K] @ W[i].T + bias for `count` linears that read x alike, x and
// y of `type`, for many rows of x: bfloat16 by AMX where `amx` says so, else by AVX512-BF16; where
// there is neither, whole numbers by AVX2.
int gptq_gemm(const GptqLinear* const* linears, void* const* y, int count, const void* x, int64_t m,
              int type, int isa, int amx, int threads);

// decode_step.cpp. Run the decoder layers and the last norm on the new tokens of `count` sequences,
// one after the other: x and y [tokens][hidden] of the model's dtype; cos and sin
// [tables][tokens][rotary_dim]. Keys and values are added to the sequences' caches.
int gptq_decode_step(const GptqModel* model, const void* x, const float* cos, const float* sin,
                     const GptqSequence* sequences, int64_t count, void* y, int threads);

// prefill.cpp. The same for many tokens of one sequence, where every linear is packed, in bfloat16,
// on a processor with AVX512-BF16.
int gptq_prefill(const GptqModel* model, const void* x, const float* cos, const float* sin,
                 const GptqSequence* sequence, void* y, int amx, int threads);

// lm_head.cpp. y [M][N] = x [M][K] @ weight [N][K].T, all of `type`.
int gptq_head(const void* weight, const void* x, void* y, int64_t m, int64_t k, int64_t n, int type,
              int isa, int threads);

// lm_head.cpp. Round a weight [N][K] of `type` to 8 bits with zeros of 128, K a multiple of 4, a
// scale for each 64 rows: words [tiles][K / 4][64], scales [tiles][groups][64]; errors [N], what a
// unit of x may be off by in each column, and norms [N], the length of each row.
void gptq_quantize_head(const void* weight, int64_t n, int64_t k, uint32_t* words, float* scales,
                        float* errors, float* norms, int type, int isa, int threads);

// lm_head.cpp. gptq_head where a row's `counts[row]` greatest logits matter, and what ties with the
// last of them: each of these is in y as gptq_head has it, and elsewhere y may be minus infinity.
// `quantized` and `errors` are from gptq_quantize_head, `max_norm` its greatest norm. Columns that
// `excluded` [M][N] marks, where it is not null, do not count. Returns 2 where this cannot tell: x
// is not finite, or more are asked for than there are tiles.
int gptq_top_logits(const GptqLinear* quantized, const float* errors, float max_norm,
                    const void* weight, const void* x, int64_t m, const int64_t* counts,
                    const uint8_t* excluded, void* y, int type, int isa, int activations,
                    int threads);

// bandwidth.cpp. Read `size` bytes `rounds` times, each thread a part of its own: the bytes a
// second of the fastest round, or 0 where memory is short. A size that fits a cache measures the
// cache.
double gptq_read_bandwidth(int64_t size, int rounds, int threads);

}  // extern "C"

#ifdef _WIN32
#pragma clang attribute pop
#endif
