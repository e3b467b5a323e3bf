// What vnni.cpp and maddubs.cpp share: how a segment of x becomes whole numbers, and the code for a
// linear's bits and a number of rows.

#pragma once

#include "gemv.h"

#include <algorithm>

namespace gptq {

constexpr float SECOND_BYTE = 254;          // what a second byte counts: half a step is 127 of it
constexpr float TINY = 0x1p-100f;           // numbers below are divided by it first, exactly
constexpr int MAX_SEGMENT_ROWS = 256 + 32;  // rows of a segment, filled up to whole units

// Where each of 16 bytes of x, in the order of the rows, comes from: a word's codes are multiplied by
// fours (j, j + n, j + 2n, j + 3n).
inline void order_bytes(int bits, int8_t* from) {
  const int together = bits == 3 ? 16 : unit_rows(bits), quarter = together / 4;
  for (int i = 0; i < 16; i++)
    from[i] = int8_t(i / together * together + i % together % 4 * quarter + i % together / 4);
}

// Whether rows follow each other in x, as they do without act-order.
INLINE bool are_neighbours(const int32_t* rows, int count) {
  int32_t off = 0;
  for (int i = 0; i < count; i++) off |= rows[i] ^ (rows[0] + i);
  return off == 0 && rows[0] >= 0;
}

// A segment's features of x, in the order of `rows`, filled up with zeros to a multiple of `lanes`.
INLINE void gather(const void* x, int type, int64_t row_of_x, const int32_t* rows, int count,
                   int lanes, float* values) {
  const bool neighbours = count > 0 && are_neighbours(rows, count);
  if (neighbours && type == FLOAT32) {
    memcpy(values, static_cast<const float*>(x) + row_of_x + rows[0], sizeof(float) * count);
  } else if (neighbours) {
    const uint16_t* from = static_cast<const uint16_t*>(x) + row_of_x + rows[0];
    for (int i = 0; i < count; i++) values[i] = from_bfloat16(from[i]);
  } else if (type == FLOAT32) {
    const float* from = static_cast<const float*>(x) + row_of_x;
    for (int i = 0; i < count; i++) values[i] = rows[i] < 0 ? 0.0f : from[rows[i]];
  } else {
    const uint16_t* from = static_cast<const uint16_t*>(x) + row_of_x;
    for (int i = 0; i < count; i++) values[i] = rows[i] < 0 ? 0.0f : from_bfloat16(from[rows[i]]);
  }
  for (int i = count; i % lanes; i++) values[i] = 0;
}

// What a pass over some columns of a tile, from the first of them on, has fetched into the second
// cache meanwhile: its share of the next tile, one line after the other. A processor's own
// prefetching ends with a page, and a few rows ahead is too short for memory: one row of x then
// waited for memory and multiplied in turn, and not at once.
INLINE const uint32_t* next_tile(const GptqLinear& linear, int64_t tile, int per_word, int column) {
  const int64_t lines = int64_t(linear.units) * per_word;
  return linear.words + (tile + 1) * lines * COLUMNS + column * lines;
}

// CODE's quantize and multiply, for the bytes of x, the bits and the rows.
template <class CODE>
void quantize_by(const GptqLinear& linear, const void* x, int type, int64_t m,
                 const PermutedActivations& to) {
  if (to.kind == Activations::INT16) return CODE::template quantize<2>(linear, x, type, m, to);
  CODE::template quantize<1>(linear, x, type, m, to);
}

template <class CODE, int BITS, int BYTES>
void multiply_rows(const GptqLinear& linear, int64_t tile, int64_t m, int count,
                   const PermutedActivations& x, float* y) {
  if (count == 4) return CODE::template multiply<BITS, BYTES, 4>(linear, tile, m, x, y);
  if (count == 3) return CODE::template multiply<BITS, BYTES, 3>(linear, tile, m, x, y);
  if (count == 2) return CODE::template multiply<BITS, BYTES, 2>(linear, tile, m, x, y);
  CODE::template multiply<BITS, BYTES, 1>(linear, tile, m, x, y);
}

template <class CODE, int BYTES>
void multiply_bits(const GptqLinear& linear, int64_t tile, int64_t m, int count,
                   const PermutedActivations& x, float* y) {
  switch (linear.bits) {
    case 2: return multiply_rows<CODE, 2, BYTES>(linear, tile, m, count, x, y);
    case 3: return multiply_rows<CODE, 3, BYTES>(linear, tile, m, count, x, y);
    case 4: return multiply_rows<CODE, 4, BYTES>(linear, tile, m, count, x, y);
    default: return multiply_rows<CODE, 8, BYTES>(linear, tile, m, count, x, y);
  }
}

template <class CODE>
void multiply_by(const GptqLinear& linear, int64_t tile, int64_t m, int count,
                 const PermutedActivations& x, float* y) {
  if (x.kind == Activations::INT16) return multiply_bits<CODE, 2>(linear, tile, m, count, x, y);
  multiply_bits<CODE, 1>(linear, tile, m, count, x, y);
}

}  // namespace gptq
