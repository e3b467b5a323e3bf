// y[M, N] = x[M, K] @ W[N, K].T + bias for many rows of x and a packed W, where bfloat16 has no
// products of its own: in whole numbers of 16 bits, by vpmaddwd (AVX2) or vpdpwssd (AVX-VNNI).
//
// A segment of a row of x becomes a step times 16 bits, nearer to x than bfloat16 is; a weight is
// q - z, exact. Both lie as pairs of rows, as a word gives them (j, j + half), so that one
// instruction multiplies two rows of some columns and adds them up; a segment's sums are scaled
// once, in float32.
//
//   x       [chunk][segment][block][pairs of the segment][R rows]   a pair is 32 bits
//   panel   [pairs of a segment][N vectors of columns]              unpacked into the nearest cache
//   sums    [chunk's rows][64 columns]                              float32
//
// A chunk is up to CHUNK_ROWS rows, whose x stays in a core's cache while all columns go by: for
// each tile, for each panel of it, for each segment: unpack, then a block of x after the other.
// With codes of 8 bits a pair's sum is 2 * 32767 * 255 at most, and 128 of them fit 32 bits.
//
// Registers, of 16: sums of R rows by N vectors 12, weights 2, x 1, a product 1.

#include "gemm_int16.h"
#include "gemv.h"
#include "int16.h"
#include "team.h"

#include <algorithm>

using namespace gptq;

#ifdef X86

namespace {

constexpr int R = BLOCK_ROWS, N = BLOCK_VECTORS, L = Middle::LANES;
constexpr int64_t CHUNK_ROWS = 96;
constexpr int MAX_PAIRS = MAX_SEGMENT_ROWS / 2;

int64_t tiles_of(const GptqLinear& linear) { return (linear.out_features + COLUMNS - 1) / COLUMNS; }

int64_t blocks_of(int64_t rows) { return (rows + R - 1) / R; }

// Many rows of x in whole numbers.
struct WholeRows {
  uint32_t* words;        // [chunk][segment][block][pairs][R]
  float* steps;           // [chunk][segment][rows of a chunk]
  int64_t m, chunk_rows;  // rows of x, and of each chunk but the last: whole blocks
  int64_t pairs;          // of a row
  int segments;

  int64_t chunks() const { return (m + chunk_rows - 1) / chunk_rows; }
  int64_t rows_of(int64_t chunk) const { return std::min(chunk_rows, m - chunk * chunk_rows); }
  uint32_t* words_of(int64_t chunk) const { return words + chunk * chunk_rows * pairs; }
  float* steps_of(int64_t chunk) const { return steps + chunk * chunk_rows * segments; }
};

AVX2_TARGET INLINE void store(__m256i value, void* to) {
  _mm256_store_si256(static_cast<__m256i*>(to), value);
}

// One row of x into its place in its block; a row after the last of x is zeros.
AVX2_TARGET void quantize_row(const GptqLinear& linear, const void* x, int type, int64_t m,
                              const WholeRows& to) {
  const int half = linear.bits == 3 ? 8 : 16 / linear.bits;  // of the rows that pairs are of
  const int64_t chunk = m / to.chunk_rows, place = m % to.chunk_rows,
                blocks = blocks_of(to.rows_of(chunk));
  uint32_t* out = to.words_of(chunk);
  const int32_t* row = linear.rows;
  alignas(32) float values[MAX_SEGMENT_ROWS];
  alignas(32) int16_t whole[MAX_SEGMENT_ROWS];
  for (int segment = 0; segment < linear.segments; segment++) {
    const int count = linear.segment_units[segment] * unit_rows(linear.bits), pairs = count / 2;
    WholeSegment segment_of_row{};
    if (m < to.m) {
      gather(x, type, m * linear.in_features, row, count, 2 * L, values);
      segment_of_row = round_to_int16(values, count, whole);
    } else {
      std::fill_n(whole, count, int16_t(0));
    }
    to.steps_of(chunk)[segment * to.chunk_rows + place] = segment_of_row.step;
    uint32_t* at = out + place / R * pairs * R + place % R;
    for (int first = 0; first < count; first += 2 * half)
      for (int j = first; j < first + half; j++, at += R) *at = pair_of(whole[j], whole[j + half]);
    row += count;
    out += blocks * pairs * R;
  }
}

// A segment's pairs of q - z, of N vectors of columns.
template <int BITS>
AVX2_TARGET void unpack_segment(const uint32_t* words, int units, const uint8_t* zeros,
                                uint32_t* panel) {
  constexpr int per_word = BITS == 3 ? 3 : 1, pairs = BITS == 3 ? 16 : 16 / BITS,
                width = BITS == 3 ? 2 : BITS;
  const __m256i mask = _mm256_set1_epi32(0x10001 * ((1 << width) - 1)),
                third = _mm256_set1_epi32(0x10001 * 4);
  __m256i zero[N];
  for (int n = 0; n < N; n++) {
    const __m256i wide =
        _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(zeros + n * L)));
    zero[n] = _mm256_or_si256(wide, _mm256_slli_epi32(wide, 16));
  }
  for (int unit = 0; unit < units; unit++, words += per_word * COLUMNS) {
    _mm_prefetch(reinterpret_cast<const char*>(words + 16 * per_word * COLUMNS), _MM_HINT_T0);
#pragma GCC unroll 16
    for (int pair = 0; pair < pairs; pair++, panel += PANEL_COLUMNS)
      for (int n = 0; n < N; n++) {
        // At 3 bits: eight pairs of each of two words of low bits, and a word of third ones.
        const int word = BITS == 3 ? pair / 8 : 0, shift = width * (BITS == 3 ? pair % 8 : pair);
        __m256i codes = _mm256_and_si256(
            _mm256_srli_epi32(load_words(words + word * COLUMNS + n * L), shift), mask);
        if constexpr (BITS == 3) {
          const int bit = third_bit(pair / 8 * 16 + pair % 8);
          const __m256i high = load_words(words + 2 * COLUMNS + n * L),
                        moved = bit >= 2 ? _mm256_srli_epi32(high, bit - 2)
                                         : _mm256_slli_epi32(high, 2 - bit);
          codes = _mm256_or_si256(codes, _mm256_and_si256(moved, third));
        }
        store(_mm256_sub_epi16(codes, zero[n]), panel + n * L);
      }
  }
}

void unpack(const GptqLinear& linear, const uint32_t* words, int units, const uint8_t* zeros,
            uint32_t* panel) {
  switch (linear.bits) {
    case 2: return unpack_segment<2>(words, units, zeros, panel);
    case 3: return unpack_segment<3>(words, units, zeros, panel);
    case 4: return unpack_segment<4>(words, units, zeros, panel);
    default: return unpack_segment<8>(words, units, zeros, panel);
  }
}

// The scales of N vectors of columns.
AVX2_TARGET void widen_scales(const GptqLinear& linear, int64_t at, float* to) {
  for (int c = 0; c < PANEL_COLUMNS; c += L) {
    __m256 scales, zeros;
    load_tables(linear, at + c, scales, zeros);
    _mm256_store_ps(to + c, scales);
  }
}

// A thread's own memory.
struct TileBuffers {
  uint32_t* panel;  // [MAX_PAIRS][N vectors]
  float* scales;    // [N vectors]
  float* sums;      // [CHUNK_ROWS][COLUMNS]

  // Lay it out in `memory`, and count the bytes that takes.
  size_t lay_out(void* memory) {
    Arena arena(memory);
    panel = arena.take<uint32_t>(size_t(MAX_PAIRS) * PANEL_COLUMNS);
    scales = arena.take<float>(PANEL_COLUMNS);
    sums = arena.take<float>(size_t(CHUNK_ROWS) * COLUMNS);
    return arena.used();
  }
};

thread_local Scratch x_scratch, tile_scratch;

// The sums of one tile for a chunk of x.
void multiply_chunk(const GptqLinear& linear, int64_t tile, const WholeRows& x, int64_t chunk,
                    BlockFunction* multiply, const TileBuffers& buffers) {
  const int64_t unit_words = (linear.bits == 3 ? 3 : 1) * COLUMNS,
                blocks = blocks_of(x.rows_of(chunk));
  for (int column = 0; column < COLUMNS; column += PANEL_COLUMNS) {
    const uint32_t *words = linear.words + tile * linear.units * unit_words + column,
                   *from = x.words_of(chunk);
    for (int segment = 0; segment < linear.segments; segment++) {
      const int units = linear.segment_units[segment], pairs = units * unit_rows(linear.bits) / 2;
      const int64_t table =
          (tile * linear.groups + linear.segment_group[segment]) * COLUMNS + column;
      unpack(linear, words, units, linear.zeros + table, buffers.panel);
      widen_scales(linear, table, buffers.scales);
      const float* steps = x.steps_of(chunk) + segment * x.chunk_rows;
      for (int64_t block = 0; block < blocks; block++)
        multiply({from + block * pairs * R, buffers.panel, pairs, buffers.scales, steps + block * R,
                  buffers.sums + block * R * COLUMNS + column, segment == 0});
      words += units * unit_words;
      from += blocks * pairs * R;
    }
  }
}

}  // namespace

namespace gptq {

// gcc 12 has the sums in registers as long as the loops that clear and scale them carry no pragma.
AVX2_TARGET void multiply_block(const BlockProduct& p) {
  __m256i sum[R][N];
  for (int r = 0; r < R; r++)
    for (int n = 0; n < N; n++) sum[r][n] = _mm256_setzero_si256();
  const uint32_t *x = p.x, *w = p.panel;
  for (int pair = 0; pair < p.pairs; pair++, x += R, w += PANEL_COLUMNS) {
    const __m256i w0 = load_words(w), w1 = load_words(w + L);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      const __m256i a = _mm256_set1_epi32(int(x[r]));
      sum[r][0] = _mm256_add_epi32(sum[r][0], _mm256_madd_epi16(w0, a));
      sum[r][1] = _mm256_add_epi32(sum[r][1], _mm256_madd_epi16(w1, a));
    }
  }
  scale_block(p, sum);
}

int gemm_int16(const GptqLinear* const* linears, void* const* y, int count, const void* x,
               int64_t m, int type, int isa, int threads) {
  const GptqLinear& first = *linears[0];
  const int64_t chunks = (m + CHUNK_ROWS - 1) / CHUNK_ROWS;
  WholeRows whole{};
  whole.m = m;
  whole.chunk_rows = round_up<int64_t>((m + chunks - 1) / chunks, R);
  whole.pairs = int64_t(first.units) * unit_rows(first.bits) / 2;
  whole.segments = first.segments;
  const auto lay_out = [&](void* memory) {
    Arena arena(memory);
    const size_t rows = size_t(whole.chunks()) * whole.chunk_rows;
    whole.words = arena.take<uint32_t>(rows * whole.pairs);
    whole.steps = arena.take<float>(rows * whole.segments);
    return arena.used();
  };
  void* memory = x_scratch.get(lay_out(nullptr));
  if (!memory) return 1;
  lay_out(memory);
  parallel_for(threads, blocks_of(m) * R,
               [&](int64_t row) { quantize_row(first, x, type, row, whole); });
  int64_t tiles = 0;
  for (int i = 0; i < count; i++) tiles += tiles_of(*linears[i]);
  std::atomic<int> failed{0};
  BlockFunction* multiply = block_function(isa);
  parallel_for(threads, whole.chunks() * tiles, [&](int64_t piece) {
    const int64_t chunk = piece / tiles;
    int64_t tile = piece % tiles;
    int i = 0;
    for (; tile >= tiles_of(*linears[i]); i++) tile -= tiles_of(*linears[i]);
    TileBuffers buffers;
    void* own = tile_scratch.get(buffers.lay_out(nullptr));
    if (!own) {
      failed = 1;
      return;
    }
    buffers.lay_out(own);
    multiply_chunk(*linears[i], tile, whole, chunk, multiply, buffers);
    for (int64_t row = 0; row < whole.rows_of(chunk); row++)
      store_tile(*linears[i], tile, chunk * whole.chunk_rows + row, buffers.sums + row * COLUMNS,
                 y[i], type);
  });
  return failed;
}

}  // namespace gptq

#endif
