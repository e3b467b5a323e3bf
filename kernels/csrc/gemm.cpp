// y[M, N] = x[M, K] @ W[N, K].T + bias for many rows of bfloat16 and a packed W, as a prompt has.
//
// The weight of 32 columns, 16 blocks deep at most, is unpacked into a panel that stays in the
// cache of its core and is multiplied by all rows of x, by AMX or by vdpbf16ps (bf16_blocks.h). An
// unpacked weight is (q - z) * s in float32, rounded once to bfloat16: what torch would multiply
// by. Sums are float32.
//
// K is counted in pairs of rows as a word gives them: rows (j, j + half) of a unit; 16 pairs are a
// block. It is gone through in runs of up to DEPTH_BLOCKS blocks. What is read together lies
// together, or it would fall on the same few sets of a cache:
//
//   x       [run][M / 16][block of the run][16 rows][16 pairs]        permuted to the weight's rows
//   panel   [2 vectors of columns][block of the run][16 pairs][16]    32 KB, twice: while one is
//   sums    [panel of the group][M / 16][2 vectors][16 rows][16]      multiplied, one is unpacked
//
//   for each group of panels: for each run of K: for each panel: for each two rows of blocks of x

#include "bf16_blocks.h"
#include "gemm_int16.h"
#include "gemv.h"
#include "team.h"

#include <algorithm>

using namespace gptq;

#ifdef X86

namespace {

constexpr int64_t DEPTH_BLOCKS = 16;  // most blocks of depth of a panel, 32 kilobytes of it
// Threads share the rows of x and not the columns where each gets this many, or some and columns
// are few (two threads of a Xeon): what one gathered no other has to fetch, but all unpack the
// whole weight.
constexpr int64_t ROWS_EACH = 256, SOME_ROWS = 128, FEW_COLUMNS = 1024;
constexpr int64_t PANELS_PER_GROUP = 8;  // most panels whose sums are kept: x is read once for them

// One linear of a call.
struct GemmLinear {
  const GptqLinear* linear;
  uint16_t* y;
  int32_t* unit_segment;  // of the first unit of each block of depth
  int32_t* unit_before;   // units of that segment before it
};

INLINE int units_per_block(int bits) { return bits == 3 ? 1 : bits; }

int64_t depth_of(const GptqLinear& linear) {
  const int units = units_per_block(linear.bits);
  return (linear.units + units - 1) / units;
}

int64_t panels_of(const GemmLinear& gemm) {
  return (gemm.linear->out_features + 2 * LANES - 1) / (2 * LANES);
}

void find_segments(GemmLinear& gemm) {
  const GptqLinear& linear = *gemm.linear;
  const int step = units_per_block(linear.bits);
  int segment = 0, before = 0;
  for (int64_t unit = 0; unit < linear.units; unit++) {
    while (before == linear.segment_units[segment]) segment++, before = 0;
    if (unit % step == 0) {
      gemm.unit_segment[unit / step] = segment;
      gemm.unit_before[unit / step] = before;
    }
    before++;
  }
}

// The runs that depth is gone through in.
struct DepthRuns {
  int64_t depth, count;
  explicit DepthRuns(const GptqLinear& linear)
      : depth(depth_of(linear)), count((depth + DEPTH_BLOCKS - 1) / DEPTH_BLOCKS) {}
  int64_t from(int64_t run) const { return depth * run / count; }
  int64_t size(int64_t run) const { return from(run + 1) - from(run); }
};

// Permute up to 16 rows of x [rows][K] into their blocks, row `m16` of `blocks`, by way of
// `transposed` [K + 3][16], which has a feature of every row in one place: the processor's own
// gather is many times slower.
BF16_TARGET void permute_block(const GptqLinear& linear, const uint16_t* x, int rows,
                               uint16_t* transposed, uint32_t* permuted, int64_t m16,
                               int64_t blocks) {
  const int64_t features = linear.in_features;
  alignas(64) uint16_t order[32];
  for (int i = 0; i < 16; i++) order[i] = uint16_t(2 * i), order[16 + i] = uint16_t(2 * i + 1);
  const __m512i apart = _mm512_load_si512(order);
  for (int64_t k = 0; k < features; k += 32) {
    const int64_t left = features - k;
    const __mmask32 mask = left >= 32 ? 0xffffffff : __mmask32((1u << left) - 1);
    __m512i v[16];
#pragma GCC unroll 16
    for (int m = 0; m < 16; m++) {
      const uint16_t* row = m < rows ? x + m * features + k : x + k;
      _mm_prefetch(reinterpret_cast<const char*>(row + 256), _MM_HINT_T0);
      v[m] = _mm512_maskz_loadu_epi16(m < rows ? mask : 0, row);
    }
    transpose(v);
    const int count = left >= 32 ? 16 : int(left + 1) / 2;
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++)
      if (i < count)
        _mm512_store_si512(transposed + (k + 2 * i) * LANES, _mm512_permutexvar_epi16(apart, v[i]));
  }
  const int64_t zero_row = (features + 1) / 2 * 2;
  memset(transposed + zero_row * LANES, 0, 2 * LANES);
  const __m256i* feature = reinterpret_cast<const __m256i*>(transposed);
  const int half = linear.bits == 3 ? 8 : 16 / linear.bits;
  const DepthRuns runs(linear);
  const int64_t last = int64_t(linear.units) * unit_rows(linear.bits);
  for (int i = 0; i < 16; i++) order[2 * i] = uint16_t(i), order[2 * i + 1] = uint16_t(16 + i);
  const __m512i interleave = _mm512_load_si512(order);
  int64_t run = 0;
  for (int64_t block = 0; block < runs.depth; block++) {
    while (block == runs.from(run + 1)) run++;
    uint32_t* to =
        permuted +
        (runs.from(run) * blocks + m16 * runs.size(run) + block - runs.from(run)) * AMX_BLOCK;
    __m512i v[PAIRS];
#pragma GCC unroll 16
    for (int pair = 0; pair < PAIRS; pair++) {
      const int64_t low = block * 2 * PAIRS + pair / half * 2 * half + pair % half,
                    high = low + half;
      // Rows that fill up a unit are zeros, which stand after the features.
      const int32_t l = low < last && linear.rows[low] >= 0 ? linear.rows[low] : int32_t(zero_row);
      const int32_t h =
          high < last && linear.rows[high] >= 0 ? linear.rows[high] : int32_t(zero_row);
      const __m256i below = _mm256_load_si256(feature + l), above = _mm256_load_si256(feature + h);
      v[pair] = _mm512_permutexvar_epi16(
          interleave, _mm512_inserti64x4(_mm512_castsi256_si512(below), above, 1));
    }
    transpose(v);
#pragma GCC unroll 16
    for (int m = 0; m < 16; m++) _mm512_store_si512(to + m * PAIRS, v[m]);
  }
}

// How blocks of depth are permuted whose rows are neighbours in x: 32 features at most from `from`
// on, as they are where groups are rows in sequence. It is one shuffle for a row of x, and no
// transposition.
struct LocalOrder {
  struct Block {
    alignas(64) uint16_t order[2 * PAIRS];
    int64_t from;
    __mmask32 readable, filled;  // features of x that there are; places that have one
  };
  Block* blocks;    // [depth]
  bool all = true;  // else some rows lie further apart, and `permute_block` is needed

  LocalOrder(const GptqLinear& linear, Block* memory) : blocks(memory) {
    const int half = linear.bits == 3 ? 8 : 16 / linear.bits;
    const int64_t last = int64_t(linear.units) * unit_rows(linear.bits), depth = depth_of(linear);
    for (int64_t b = 0; b < depth && all; b++) {
      Block block{};
      int32_t row[2 * PAIRS], max_row = -1, min_row = linear.in_features;
      for (int i = 0; i < 2 * PAIRS; i++) {
        const int pair = i / 2;
        const int64_t at = b * 2 * PAIRS + pair / half * 2 * half + pair % half + i % 2 * half;
        row[i] = at < last ? linear.rows[at] : -1;
        if (row[i] >= 0) min_row = std::min(min_row, row[i]), max_row = std::max(max_row, row[i]);
      }
      all = max_row - min_row < 2 * PAIRS;
      block.from = max_row < 0 ? 0 : min_row;
      for (int i = 0; i < 2 * PAIRS; i++)
        if (row[i] >= 0) block.order[i] = uint16_t(row[i] - min_row), block.filled |= 1u << i;
      const int64_t left = linear.in_features - block.from;
      block.readable = left >= 2 * PAIRS ? 0xffffffff : (1u << left) - 1;
      blocks[b] = block;
    }
  }
};

// `permute_block`, where all rows are neighbours.
BF16_TARGET void gather_local(const GptqLinear& linear, const LocalOrder& order_in_x,
                              const uint16_t* x, int rows, uint32_t* permuted, int64_t m16,
                              int64_t blocks) {
  const DepthRuns runs(linear);
  int64_t run = 0;
  for (int64_t b = 0; b < runs.depth; b++) {
    while (b == runs.from(run + 1)) run++;
    uint32_t* to =
        permuted +
        (runs.from(run) * blocks + m16 * runs.size(run) + b - runs.from(run)) * AMX_BLOCK;
    const LocalOrder::Block& block = order_in_x.blocks[b];
    const __m512i order = _mm512_load_si512(block.order);
    const uint16_t* from = x + block.from;
#pragma GCC unroll 16
    for (int m = 0; m < LANES; m++) {
      __m512i v{};
      if (m < rows) {
        _mm_prefetch(reinterpret_cast<const char*>(from + m * int64_t(linear.in_features) + 256),
                     _MM_HINT_T0);
        v = _mm512_maskz_loadu_epi16(block.readable, from + m * int64_t(linear.in_features));
      }
      _mm512_store_si512(to + m * PAIRS, _mm512_maskz_permutexvar_epi16(block.filled, order, v));
    }
  }
}

// Permute a thread's share of the blocks of some rows of x.
void permute_share(const GptqLinear& linear, const LocalOrder& order_in_x, const uint16_t* x,
                   int64_t rows, int share, int shares, uint32_t* permuted, char* memory) {
  const int64_t blocks = (rows + LANES - 1) / LANES;
  for (int64_t block = blocks * share / shares; block < blocks * (share + 1) / shares; block++) {
    const uint16_t* from = x + block * LANES * linear.in_features;
    const int count = int(std::min<int64_t>(LANES, rows - block * LANES));
    if (order_in_x.all)
      gather_local(linear, order_in_x, from, count, permuted, block, blocks);
    else
      permute_block(linear, from, count, reinterpret_cast<uint16_t*>(memory), permuted, block,
                    blocks);
  }
}

// Unpack blocks of depth [from, to) of 16 columns into a panel.
template <int BITS>
BF16_TARGET void unpack(const GemmLinear& gemm, int64_t vector, int64_t from, int64_t to,
                        uint32_t* panel) {
  const GptqLinear& linear = *gemm.linear;
  constexpr int per_word = BITS == 3 ? 3 : 1, pairs = BITS == 3 ? 16 : 16 / BITS,
                step = BITS == 3 ? 1 : BITS;
  const int64_t tile = vector / (COLUMNS / LANES), column = vector % (COLUMNS / LANES) * LANES;
  const int64_t last = std::min<int64_t>(linear.units, to * step);
  const uint32_t* word =
      linear.words + (tile * linear.units + from * step) * per_word * COLUMNS + column;
  int segment = gemm.unit_segment[from],
      left = linear.segment_units[segment] - gemm.unit_before[from];
  const __m512i mask = _mm512_set1_epi32(BITS == 3 ? 3 : (1 << BITS) - 1),
                third = _mm512_set1_epi32(4);
  const __m512i base =
      _mm512_set1_epi32(0x4b000000);  // 2**23: the code in its last bits is added to it
  alignas(64) uint16_t order[32];
  for (int i = 0; i < 16; i++) order[2 * i] = uint16_t(i), order[2 * i + 1] = uint16_t(16 + i);
  const __m512i interleave = _mm512_load_si512(order);
  __m512 scales{}, zeros{};
  bool fresh = true;
  for (int64_t unit = from * step; unit < last; unit++, left--) {
    while (left == 0) left = linear.segment_units[++segment], fresh = true;
    if (fresh) {
      const int64_t at = (tile * linear.groups + linear.segment_group[segment]) * COLUMNS + column;
      load_tables(linear, at, scales, zeros);
      zeros = _mm512_add_ps(zeros, _mm512_set1_ps(0x1p23f));
      fresh = false;
    }
    _mm_prefetch(reinterpret_cast<const char*>(word + 16 * per_word * COLUMNS), _MM_HINT_T0);
    __m512i v[per_word];
    for (int i = 0; i < per_word; i++) v[i] = _mm512_loadu_si512(word + i * COLUMNS);
#pragma GCC unroll 16
    for (int pair = 0; pair < pairs; pair++) {
      __m512i low, high;
      if constexpr (BITS == 3) {
        const int half_of_unit = pair / 8, j = pair % 8, bit = third_bit(16 * half_of_unit + j);
        low =
            _mm512_ternarylogic_epi32(_mm512_srli_epi32(v[half_of_unit], 2 * j), mask, base, 0xEA);
        high = _mm512_ternarylogic_epi32(_mm512_srli_epi32(v[half_of_unit], 2 * j + 16), mask, base,
                                         0xEA);
        low = _mm512_ternarylogic_epi32(_mm512_rorv_epi32(v[2], _mm512_set1_epi32((bit + 30) % 32)),
                                        third, low, 0xEA);
        high = _mm512_ternarylogic_epi32(
            _mm512_rorv_epi32(v[2], _mm512_set1_epi32((bit + 46) % 32)), third, high, 0xEA);
      } else {
        low = _mm512_ternarylogic_epi32(_mm512_srli_epi32(v[0], BITS * pair), mask, base, 0xEA);
        high =
            _mm512_ternarylogic_epi32(_mm512_srli_epi32(v[0], BITS * pair + 16), mask, base, 0xEA);
      }
      const __m512 l = _mm512_mul_ps(_mm512_sub_ps(_mm512_castsi512_ps(low), zeros), scales);
      const __m512 h = _mm512_mul_ps(_mm512_sub_ps(_mm512_castsi512_ps(high), zeros), scales);
      const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(h, l);
      _mm512_store_si512(panel, _mm512_permutexvar_epi16(interleave, both));
      panel += LANES;
    }
    word += per_word * COLUMNS;
  }
  for (int64_t pair = last * pairs; pair < to * PAIRS; pair++, panel += LANES)
    _mm512_store_si512(panel, _mm512_setzero_si512());
}

void unpack_bits(const GemmLinear& gemm, int64_t vector, int64_t from, int64_t to,
                 uint32_t* panel) {
  switch (gemm.linear->bits) {
    case 2: return unpack<2>(gemm, vector, from, to, panel);
    case 3: return unpack<3>(gemm, vector, from, to, panel);
    case 4: return unpack<4>(gemm, vector, from, to, panel);
    default: return unpack<8>(gemm, vector, from, to, panel);
  }
}

thread_local Scratch call_scratch, x_scratch, own_scratch;

// Memory for so many rows of x, permuted.
uint32_t* memory_for_x(const GptqLinear& linear, int64_t rows) {
  const int64_t blocks = (rows + LANES - 1) / LANES;
  return static_cast<uint32_t*>(x_scratch.get(size_t(blocks) * depth_of(linear) * AMX_BLOCK * 4));
}

// The rows that fall to the threads before one: whole pairs of blocks, which the matrix unit takes
// at once.
int64_t rows_before(int64_t rows, int thread, int threads) {
  const int64_t pair = 2 * LANES, pairs = (rows + pair - 1) / pair;
  return std::min(rows, pairs * thread / threads * pair);
}

// Two vectors of columns, over one run of depth: what is unpacked at a time.
struct Panel {
  const GemmLinear* gemm;
  int64_t vector, at, depth;
  int64_t index, group_size;  // its place in its group of panels
  int64_t next_at;            // the run that its group, or the next one, goes on with

  int64_t blocks() const { return 2 * depth; }
  void unpack_some(int64_t from, int64_t to, uint32_t* out) const {
    for (int64_t block = from; block < to; block++)
      unpack_bits(*gemm, vector + block / depth, at + block % depth, at + block % depth + 1,
                  out + block * AMX_BLOCK);
  }
};

// The panels that fall to one thread, one after the other: groups of panels of columns, in each
// the runs of depth, in each the columns.
class Panels {
 public:
  Panels(const GemmLinear* gemms, int count, int thread, int threads)
      : gemm_(gemms), end_(gemms + count), runs_(*gemms[0].linear) {
    int64_t all = 0;
    for (const GemmLinear* gemm = gemm_; gemm < end_; gemm++) all += panels_of(*gemm);
    begin_ = all * thread / threads;
    left_ = all * (thread + 1) / threads - begin_;
    for (; gemm_ < end_ && begin_ >= panels_of(*gemm_); gemm_++) begin_ -= panels_of(*gemm_);
  }

  bool next(Panel& panel) {
    if (left_ == 0) return false;
    const int64_t group_size = std::min({PANELS_PER_GROUP, left_, panels_of(*gemm_) - begin_});
    panel = {gemm_,
             2 * (begin_ + index_),
             runs_.from(run_),
             runs_.size(run_),
             index_,
             group_size,
             runs_.from((run_ + 1) % runs_.count)};
    if (++index_ < group_size) return true;
    index_ = 0;
    if (++run_ < runs_.count) return true;
    run_ = 0;
    left_ -= group_size;
    begin_ += group_size;
    if (begin_ == panels_of(*gemm_)) gemm_++, begin_ = 0;
    return true;
  }

 private:
  const GemmLinear *gemm_, *end_;
  DepthRuns runs_;
  int64_t begin_, left_;         // of the group: its first panel of the linear; panels from it on
  int64_t run_ = 0, index_ = 0;  // of the next panel
};

// Write the sums of a group that its last panel has finished: add the bias, round.
BF16_TARGET void finish(const Panel& panel, const float* sums, int64_t row, int64_t rows) {
  const GptqLinear& linear = *panel.gemm->linear;
  const int64_t blocks = (rows + LANES - 1) / LANES,
                first = panel.vector * LANES - panel.index * 2 * LANES;
  for (int64_t m = 0; m < rows; m++) {
    const float* from = sums + m / LANES * 2 * AMX_BLOCK + m % LANES * LANES;
    uint16_t* to = panel.gemm->y + (row + m) * linear.out_features;
    for (int64_t c = 0; c < 2 * (panel.index + 1); c++) {
      const int64_t column = first + c * LANES, left = linear.out_features - column;
      if (left <= 0) break;
      const __mmask16 mask = left >= LANES ? 0xffff : __mmask16((1u << left) - 1);
      __m512 value = _mm512_load_ps(from + (c / 2 * blocks * 2 + c % 2) * AMX_BLOCK);
      if (linear.bias)
        value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, linear.bias + column));
      _mm256_mask_storeu_epi16(to + column, mask, (__m256i)_mm512_cvtneps_pbh(value));
    }
  }
}

// Multiply some rows of x, permuted, by the columns that fall to one thread. While the matrix unit
// is busy with one panel, the next one is unpacked, a part after each pair of blocks.
void multiply_share(Panels panels, const uint32_t* x, int64_t row, int64_t rows, bool amx,
                    char* memory) {
  const int64_t blocks = (rows + LANES - 1) / LANES, pairs = (blocks + 1) / 2;
  const int rows_of_last = int(rows - (blocks - 1) * LANES);
  Panel panel{}, following{};
  if (!panels.next(panel)) return;
  const DepthRuns runs(*panel.gemm->linear);
  uint32_t* now = reinterpret_cast<uint32_t*>(memory);
  uint32_t* next = now + 2 * DEPTH_BLOCKS * AMX_BLOCK;
  float* sums = reinterpret_cast<float*>(next + 2 * DEPTH_BLOCKS * AMX_BLOCK);
#ifdef MATRIX_UNIT
  if (amx) {
    if (blocks > 2)
      configure_tiles(LANES, LANES);  // a last short block is multiplied whole
    else if (blocks == 2)
      configure_tiles(LANES, rows_of_last);
    else
      configure_tiles(rows_of_last, LANES);
  }
#endif
  panel.unpack_some(0, panel.blocks(), now);
  for (bool more = true; more; panel = following) {
    more = panels.next(following);
    float* to = sums + panel.index * blocks * 2 * AMX_BLOCK;
    // x of the next run is fetched meanwhile, an equal part beside each pair of blocks of each
    // panel.
    const char* next_x = reinterpret_cast<const char*>(x + panel.next_at * blocks * AMX_BLOCK);
    const int64_t lines =
        runs.count > 1 ? DEPTH_BLOCKS * blocks * LANES / (panel.group_size * pairs * panel.depth)
                       : 0;
    for (int64_t pair = 0; pair < pairs; pair++) {
      const int64_t block = 2 * pair;
      const int count = int(std::min<int64_t>(2, blocks - block));
      multiply_blocks(
          {x + (panel.at * blocks + block * panel.depth) * AMX_BLOCK, panel.depth * AMX_BLOCK, now,
           panel.depth * AMX_BLOCK, to + block * 2 * AMX_BLOCK, 2 * AMX_BLOCK, panel.depth,
           panel.at == 0, next_x + (panel.index * pairs + pair) * lines * panel.depth * 64,
           int(lines)},
          count, block + count == blocks ? rows_of_last : LANES, amx);
      if (more)
        following.unpack_some(following.blocks() * pair / pairs,
                              following.blocks() * (pair + 1) / pairs, next);
    }
    if (panel.at + panel.depth == runs.depth && panel.index == panel.group_size - 1)
      finish(panel, sums, row, rows);
    std::swap(now, next);
  }
#ifdef MATRIX_UNIT
  if (amx) release_tiles();
#endif
}

}  // namespace

#endif

extern "C" {

int gptq_gemm_from(int type, int isa, int activations, int amx) {
#ifdef X86
  // Where panels pay, and not below 13 rows (docs/decisions/native-cpu.md).
  if (isa >= AVX512_BF16 && type == BFLOAT16 && activations != int(Activations::INT8))
    return amx ? 13 : 32;
  if (isa >= AVX2 && isa <= AVX512 && activations == int(Activations::INT16)) return 13;
#endif
  (void)type, (void)isa, (void)activations, (void)amx;
  return 0;
}

int gptq_gemm(const GptqLinear* const* linears, void* const* y, int count, const void* x, int64_t m,
              int type, int isa, int amx, int threads) {
#ifdef X86
  if (isa < AVX512_BF16) return gemm_int16(linears, y, count, x, m, type, isa, threads);
  const GptqLinear& first = *linears[0];
  GemmLinear* gemms;
  LocalOrder::Block* order_blocks;
  const auto lay_out = [&](void* memory) {
    Arena arena(memory);
    gemms = arena.take<GemmLinear>(count);
    order_blocks = arena.take<LocalOrder::Block>(depth_of(first));
    for (int i = 0; i < count; i++) {
      int32_t* segments = arena.take<int32_t>(depth_of(*linears[i]));
      int32_t* before = arena.take<int32_t>(depth_of(*linears[i]));
      if (memory) gemms[i] = {linears[i], static_cast<uint16_t*>(y[i]), segments, before};
    }
    return arena.used();
  };
  void* call_memory = call_scratch.get(lay_out(nullptr));
  if (!call_memory) return 1;
  lay_out(call_memory);
  for (int i = 0; i < count; i++) find_segments(gemms[i]);
  const LocalOrder order_in_x(first, order_blocks);
  int64_t columns = 0;
  for (int i = 0; i < count; i++) columns += linears[i]->out_features;
  const bool by_rows =
      threads > 1 && m >= threads * (columns <= FEW_COLUMNS ? SOME_ROWS : ROWS_EACH);
  const int64_t max_rows =
      std::min(m, by_rows ? ROWS_EACH : PREFILL_ROWS);  // at a time: they stay in a core's cache
  uint32_t* shared_x = by_rows ? nullptr : memory_for_x(first, max_rows);
  if (!by_rows && !shared_x) return 1;
  std::atomic<int> failed{0};
  const int64_t blocks = (max_rows + LANES - 1) / LANES;
  const size_t own_bytes =
      std::max<size_t>(size_t(first.in_features + 3) * LANES * 2,
                       size_t(2) * AMX_BLOCK * 4 * (2 * DEPTH_BLOCKS + PANELS_PER_GROUP * blocks));
  const auto own_memory = [&] {
    char* memory = static_cast<char*>(own_scratch.get(own_bytes));
    if (!memory) failed = 1;
    return memory;
  };
  const auto row_of_x = [&](int64_t row) {
    return static_cast<const uint16_t*>(x) + row * first.in_features;
  };
  // Some rows of x by the whole weight.
  const auto multiply_rows = [&](int64_t begin, int64_t end) {
    uint32_t* permuted = memory_for_x(first, max_rows);
    char* memory = own_memory();
    if (!permuted) failed = 1;
    if (!permuted || !memory) return;
    const Panels panels(gemms, count, 0, 1);
    for (int64_t row = begin; row < end; row += max_rows) {
      const int64_t rows = std::min(max_rows, end - row);
      permute_share(first, order_in_x, row_of_x(row), rows, 0, 1, permuted, memory);
      multiply_share(panels, permuted, row, rows, amx, memory);
    }
  };
  together(threads, Meet::BARRIER, [&](Together& all) {
    const int shares = all.threads;
    if (by_rows) {
      all.share(shares, [&](Chunks& chunks) {
        do
          for (int share = int(chunks.begin); share < chunks.end; share++)
            multiply_rows(rows_before(m, share, shares), rows_before(m, share + 1, shares));
        while (chunks.next());
      });
      return;
    }
    for (int64_t row = 0; row < m; row += max_rows) {
      const int64_t rows = std::min(max_rows, m - row);
      all.share(shares, [&](Chunks& chunks) {
        char* memory = own_memory();
        do
          for (int share = int(chunks.begin); memory && share < chunks.end; share++)
            permute_share(first, order_in_x, row_of_x(row), rows, share, shares, shared_x, memory);
        while (chunks.next());
      });
      all.share(shares, [&](Chunks& chunks) {
        char* memory = own_memory();
        do
          for (int share = int(chunks.begin); memory && share < chunks.end; share++)
            multiply_share(Panels(gemms, count, share, shares), shared_x, row, rows, amx, memory);
        while (chunks.next());
      });
    }
  });
  return failed;
#else
  (void)linears, (void)y, (void)count, (void)x, (void)m, (void)type, (void)isa, (void)amx,
      (void)threads;
  return 1;
#endif
}

}  // extern "C"
