// Arithmetic on vectors of floats: loads, sums, e**x, norms, gates, rotations.

#pragma once

#include "simd.h"

#include <algorithm>
#include <cmath>

namespace gptq {

template <int TYPE, class F>
INLINE void load(const void* from, int64_t at, F& to) {
  using V = Vectors<sizeof(F)>;
  if constexpr (TYPE == FLOAT32) {
    memcpy(&to, static_cast<const float*>(from) + at, sizeof to);
  } else {
    typename V::halves raw;
    memcpy(&raw, static_cast<const uint16_t*>(from) + at, sizeof raw);
    const typename V::uints wide = __builtin_convertvector(raw, typename V::uints) << 16;
    memcpy(&to, &wide, sizeof to);
  }
}

#ifdef X86
// 16 numbers of bfloat16, and as many zeros.
BF16_TARGET INLINE __m512i load_16_bf16(const uint16_t* from) {
  return _mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
#endif

// Write `count` floats as numbers of `type`, from element `at` on.
inline void store_as(void* to, int64_t at, const float* from, int count, int type) {
  if (type == FLOAT32) {
    memcpy(static_cast<float*>(to) + at, from, sizeof(float) * count);
    return;
  }
  for (int i = 0; i < count; i++) static_cast<uint16_t*>(to)[at + i] = to_bfloat16(from[i]);
}

constexpr int8_t MAX_INT8 = 127;
constexpr int16_t MAX_INT16 = 32767;

// Round `count` floats to codes from -limit to limit; returns what a code is multiplied by.
template <class CODE>
inline float quantize(const float* from, int count, CODE limit, CODE* to) {
  int32_t bits = 0;  // of the greatest without its sign: as whole numbers they are as great
  for (int i = 0; i < count; i++) bits = std::max(bits, int32_t(as_bits(from[i]) & 0x7fffffff));
  const float scale = as_float(uint32_t(bits)) / float(limit),
              inverse = scale > 0 ? 1.0f / scale : 0.0f;
  for (int i = 0; i < count; i++)  // what is added and taken off rounds to a whole number
    to[i] = CODE(int32_t((from[i] * inverse + 12582912.0f) - 12582912.0f));
  return scale;
}

// The sum of a vector's lanes.
template <class F>
INLINE float reduce_add(const F& of) {
  if constexpr (sizeof(F) == 16) {
    return (of[0] + of[2]) + (of[1] + of[3]);
  } else {
    typename Vectors<sizeof(F) / 2>::floats low, high;
    memcpy(&low, &of, sizeof low);
    memcpy(&high, reinterpret_cast<const char*>(&of) + sizeof low, sizeof high);
    low += high;
    return reduce_add(low);
  }
}

// e**x to a few units in the last place, after Cephes; x at most 88.
template <class F>
INLINE void exponential(F& x) {
  using ints = typename Vectors<sizeof(F)>::ints;
  const F lowest = F{} - 87.0f;
  x = x < lowest ? lowest : x;
  const F shifted = x * 1.44269504088896341f + 12582912.0f;  // rounds to an integer
  const F n = shifted - 12582912.0f;
  const F r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  F p = r * 1.9875691500e-4f + 1.3981999507e-3f;
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

// y = x / sqrt(mean(x**2) + eps) * weight, of RMS_ONE * (1 + weight); LAYER takes the mean off x
// first, and may add a bias.
enum class Norm { RMS = 0, RMS_ONE = 1, LAYER = 2 };

struct NormArgs {
  const void *weight, *bias;  // of `type`; no bias is null
  int type;
  Norm kind;
  int64_t count;
  float eps;
  float offset() const { return kind == Norm::RMS_ONE ? 1.0f : 0.0f; }
};

template <class V, int TYPE>
INLINE void norm_type(const NormArgs& norm, const float* x, float* y) {
  using floats = typename V::floats;
  float mean = 0;
  if (norm.kind == Norm::LAYER) {
    floats sum{};
    for (int64_t i = 0; i < norm.count; i += V::LANES) {
      floats value;
      load<FLOAT32>(x, i, value);
      sum += value;
    }
    mean = reduce_add(sum) / float(norm.count);
  }
  floats squares{};
  for (int64_t i = 0; i < norm.count; i += V::LANES) {
    floats value;
    load<FLOAT32>(x, i, value);
    value -= mean;
    squares += value * value;
  }
  const float factor = 1.0f / sqrtf(reduce_add(squares) / float(norm.count) + norm.eps);
  for (int64_t i = 0; i < norm.count; i += V::LANES) {
    floats value, scale;
    load<FLOAT32>(x, i, value);
    load<TYPE>(norm.weight, i, scale);
    value = (value - mean) * ((scale + norm.offset()) * factor);
    if (norm.bias) {
      floats bias;
      load<TYPE>(norm.bias, i, bias);
      value += bias;
    }
    memcpy(y + i, &value, sizeof value);
  }
}

// A weight of either type.
template <class V>
INLINE void norm_body(const NormArgs& norm, const float* x, float* y) {
  if (norm.type == FLOAT32) return norm_type<V, FLOAT32>(norm, x, y);
  norm_type<V, BFLOAT16>(norm, x, y);
}

// tanh(x) to 1e-7.
template <class F>
INLINE void hyperbolic_tangent(F& x) {
  F e = 2.0f * x;
  e = e > 88.0f ? F{} + 88.0f : e;
  exponential(e);
  x = 1.0f - 2.0f / (e + 1.0f);
}

// softcap * tanh(score / softcap).
template <class F>
INLINE void cap(F& score, float softcap) {
  score = score / softcap;
  hyperbolic_tangent(score);
  score = score * softcap;
}

// SWIGLU_OAI, gpt-oss': gate and up are clamped, and 1 is added to up.
enum class Activation { SILU = 0, GELU_TANH = 1, GELU = 2, SWIGLU_OAI = 3 };

struct Gate {
  Activation activation;
  float alpha, limit;  // of SWIGLU_OAI
};

// x * sigmoid(scaled).
template <class F>
INLINE void multiply_sigmoid(F& x, const F& scaled) {
  F e = -scaled;
  e = e > 88.0f ? F{} + 88.0f : e;
  exponential(e);
  x = x / (1.0f + e);
}

// x * P(normal < x), by erf after Abramowitz and Stegun 7.1.26: to 1e-7.
template <class F>
INLINE void multiply_normal(F& x) {
  const F z = (x < 0.0f ? -x : x) * 0.70710678118654752f, t = 1.0f / (1.0f + 0.3275911f * z);
  F e = -z * z;
  exponential(e);
  F p = t * 1.061405429f - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const F beyond = p * t * e;  // 1 - erf(z)
  x = 0.5f * x * (x < 0.0f ? beyond : 2.0f - beyond);
}

template <class F>
INLINE void activate(F& x, const Gate& gate) {
  if (gate.activation == Activation::SILU) {
    multiply_sigmoid(x, x);
  } else if (gate.activation == Activation::SWIGLU_OAI) {
    x = x > gate.limit ? F{} + gate.limit : x;
    multiply_sigmoid(x, F(gate.alpha * x));
  } else if (gate.activation == Activation::GELU_TANH) {  // (1 + tanh(y)) / 2 is sigmoid(2y)
    multiply_sigmoid(x, F(1.59576912160573f * (x + 0.044715f * x * x * x)));
  } else {
    multiply_normal(x);
  }
}

// x *= up, x what was activated.
template <class F>
INLINE void multiply_up(F& x, F& up, const Gate& gate) {
  if (gate.activation == Activation::SWIGLU_OAI) {
    up = up > gate.limit ? F{} + gate.limit : up;
    up = up < -gate.limit ? F{} - gate.limit : up;
    up += 1.0f;
  }
  x *= up;
}

// y = activation(gate) * up, or what is activated alone where `up` is null.
template <class V>
INLINE void activate_multiply_body(const float* gate, const float* up, const Gate& by, int count,
                                   float* y) {
  using floats = typename V::floats;
  for (int i = 0; i < count; i += V::LANES) {
    floats g;
    load<FLOAT32>(gate, i, g);
    activate(g, by);
    if (up) {
      floats u;
      load<FLOAT32>(up, i, u);
      multiply_up(g, u, by);
    }
    memcpy(y + i, &g, sizeof g);
  }
}

// Rotate the first `dim` numbers of a head: x, cos and sin [dim]. By halves, or by pairs of
// neighbours, for which the first half of the angles is read.
inline void rotate(float* x, const float* cos, const float* sin, int dim, bool neighbours) {
  if (neighbours) {
    for (int i = 0; i < dim / 2; i++) {
      const float low = x[2 * i], high = x[2 * i + 1];
      x[2 * i] = low * cos[i] - high * sin[i];
      x[2 * i + 1] = high * cos[i] + low * sin[i];
    }
    return;
  }
  for (int i = 0; i < dim / 2; i++) {
    const float low = x[i], high = x[i + dim / 2];
    x[i] = low * cos[i] - high * sin[i];
    x[i + dim / 2] = high * cos[i + dim / 2] + low * sin[i + dim / 2];
  }
}

}  // namespace gptq
