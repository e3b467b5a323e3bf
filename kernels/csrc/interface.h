// The C interface of the library: what gptq_loader_kernels/cpu/library.py calls, and mirrors field by field.
//
// Plain C, loaded with ctypes: no Python and no torch header, so one build serves all of their versions. When
// it is loaded, sizes of structures and kinds of arguments are compared (interface.cpp).

#pragma once

#include <cstdint>

extern "C" {

// What a layer is; gemv.cpp says how it lies in memory.
struct GptqLayer {
  int32_t bits;           // 2, 3, 4 or 8
  int32_t in_features;    // K
  int32_t out_features;   // N
  int32_t units;          // of a column
  int32_t segments;       // of a column
  int32_t groups;         // G
  int32_t float_scales;   // scales are float32, else float16
  const int32_t* rows;           // [units * unit rows]
  const int32_t* segment_units;  // [segments] units of each
  const int32_t* segment_group;  // [segments]
  const uint32_t* words;         // [tiles][units][unit words][64]
  const void* scales;            // [tiles][groups][64]
  const uint8_t* zeros;          // [tiles][groups][64]
  const float* bias;             // [out_features], or null
};

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
  int64_t window;  // positions a token sees, or 0 for all
};

// What a sequence keeps of one block.
struct GptqCache {
  void* keys;  // [kv_heads][capacity][head_dim]
  void* values;
  int64_t capacity;
};

// New tokens of one sequence.
struct GptqSequence {
  int64_t past;    // positions that its caches hold
  int64_t tokens;  // that follow them
  const GptqCache* caches;  // [blocks]
};

// A Llama-like model.
struct GptqModel {
  int32_t blocks, hidden, heads, kv_heads, head_dim, inner;
  int32_t type;  // of weights, keys and values
  int32_t isa;
  float eps, scale;
  const float* norm;  // [hidden]
  const GptqBlock* block;
};

// The size of a structure by its name, or 0 where there is none; and a function's result and arguments as
// letters (interface.cpp), or null.
int64_t gptq_sizeof(const char* name);
const char* gptq_signature(const char* name);

// What this processor runs: the best instruction set; whether it has a matrix unit for bfloat16.
int gptq_isa();
int gptq_amx();

// pack.cpp
int gptq_pack(int bits, int planar, const uint32_t* qweight, const int32_t* rows, int64_t in_features, int64_t units,
              int64_t columns, uint32_t* words, int threads);

// gemv.cpp
int gptq_matmul(const GptqLayer* layer, const void* x, void* y, int64_t m, int type, int isa, int threads);
void gptq_unpack(const GptqLayer* layer, int64_t first, int64_t tiles, void* w, int type, int isa, int threads);

// gemm.cpp
int gptq_gemm(const GptqLayer* const* layers, void* const* y, int count, const void* x, int64_t m, int amx, int threads);

// decode_step.cpp, prefill.cpp
int gptq_step(const GptqModel* model, const void* x, const float* cos, const float* sin, const GptqSequence* sequences,
              int64_t count, void* y, int threads);
int gptq_prompt(const GptqModel* model, const void* x, const float* cos, const float* sin, const GptqSequence* sequence,
                void* y, int amx, int threads);

// lm_head.cpp
int gptq_rows(const void* weight, const void* x, void* y, int64_t m, int64_t k, int64_t n, int type, int isa, int threads);
void gptq_narrow(const void* weight, int64_t n, int64_t k, uint32_t* words, float* scales, float* errors, float* lengths,
                 int type, int isa, int threads);
int gptq_likeliest(const GptqLayer* narrow, const float* errors, float longest, const void* weight, const void* x,
                   int64_t m, const int64_t* wanted, const uint8_t* aside, void* y, int type, int isa, int threads);

// bandwidth.cpp
double gptq_read_bandwidth(int64_t size, int rounds, int threads);

}  // extern "C"
