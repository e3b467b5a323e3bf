// A Llama-like model as the library is told of it; gptq_loader_kernels/cpu/library.py mirrors it field by field.

#pragma once

#include "gptq_vectors.h"

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

struct GptqModel {
  int32_t blocks, hidden, heads, kv_heads, head_dim, inner;
  int32_t type;  // of weights, keys and values
  int32_t isa;
  float eps, scale;
  const float* norm;  // [hidden]
  const GptqBlock* block;
};

}  // extern "C"

namespace gptq {

// Rotate a head by halves: x [head_dim], cos and sin [head_dim].
inline void rotate(float* x, const float* cos, const float* sin, int dim) {
  for (int i = 0; i < dim / 2; i++) {
    const float low = x[i], high = x[i + dim / 2];
    x[i] = low * cos[i] - high * sin[i];
    x[i + dim / 2] = high * cos[i + dim / 2] + low * sin[i + dim / 2];
  }
}

inline void keep(void* cache, int64_t at, const float* from, int count, int type) {
  if (type == FLOAT32) {
    memcpy(static_cast<float*>(cache) + at, from, sizeof(float) * count);
    return;
  }
  for (int i = 0; i < count; i++) static_cast<uint16_t*>(cache)[at + i] = to_bfloat16(from[i]);
}

}  // namespace gptq
