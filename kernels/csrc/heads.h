// What a decoding step and a prompt do to heads, keys and values.

#pragma once

#include "vector_math.h"

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
