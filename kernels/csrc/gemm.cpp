// Many rows of bfloat16 by packed layers: y = x @ W.T + bias for a prompt.
//
// The weight of some columns is unpacked into a panel that stays in the cache of its core and is
// multiplied by all rows of x, by the processor's matrix unit (AMX) or by vdpbf16ps. An unpacked weight
// is (q - z) * s in float32, rounded once to bfloat16: what torch would multiply by. Sums are float32.
//
// Depth, the K of the product, is counted in pairs of rows as a word gives them: rows (j, j + half) of a
// unit. A block is 16 pairs: x [16 rows][16 pairs], a weight [16 pairs][16 columns], a kilobyte each, and
// what one instruction of the matrix unit takes. Depth is gone through in runs of up to 16 blocks. x lies
// in blocks [run][m / 16][depth of the run], gathered in the order of the weight's rows: what is read
// together lies together, or it would fall on the same few sets of a cache. A panel lies in blocks
// [2 vectors of columns][depth of the run]; its sums in blocks [m / 16][2].

#include "bf16_blocks.h"

#include <algorithm>

#ifdef _OPENMP
#include <omp.h>
#endif

#ifdef MATRIX_UNIT
#include <sys/syscall.h>
#include <unistd.h>
#endif

using namespace gptq;

extern "C" {

// Whether the processor has a matrix unit that takes bfloat16, and the system lets this process use it.
int gptq_amx() {
#ifdef MATRIX_UNIT
  static const bool usable = [] {
    constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM: threads made later have it too
    unsigned a = 7, b = 0, c = 0, d = 0;
    __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    const bool there = (d >> 22 & 1) && (d >> 24 & 1);  // AMX-BF16, AMX-TILE
    return there && syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
  }();
  return usable;
#else
  return 0;
#endif
}

}  // extern "C"

#ifdef X86

namespace {

constexpr int64_t DEPTH = 16;  // most blocks of depth of a panel, 32 kilobytes of it
// Threads share the rows of x and not the columns where each gets this many, or some and columns are few
// (two threads of a Xeon): what one gathered no other has to fetch, but all unpack the whole weight.
constexpr int64_t ROWS_EACH = 256, SOME_ROWS = 128, FEW_COLUMNS = 1024;
constexpr int64_t GROUP = 8;   // most panels whose sums are kept: x is read once for them

// One layer of a call.
struct Part {
  const GptqLayer* layer;
  uint16_t* y;
  int32_t* unit_segment;  // of the first unit of each block of depth
  int32_t* unit_before;   // units of that segment before it
};

INLINE int units_a_block(int bits) { return bits == 3 ? 1 : bits; }

int64_t depth_of(const GptqLayer& layer) {
  const int units = units_a_block(layer.bits);
  return (layer.units + units - 1) / units;
}

int64_t panels_of(const Part& part) { return (part.layer->out_features + 2 * LANES - 1) / (2 * LANES); }

void find_segments(Part& part) {
  const GptqLayer& layer = *part.layer;
  const int step = units_a_block(layer.bits);
  int segment = 0, before = 0;
  for (int64_t unit = 0; unit < layer.units; unit++) {
    while (before == layer.segment_units[segment]) segment++, before = 0;
    if (unit % step == 0) {
      part.unit_segment[unit / step] = segment;
      part.unit_before[unit / step] = before;
    }
    before++;
  }
}

// The runs that depth is gone through in.
struct Runs {
  int64_t depth, count;
  explicit Runs(const GptqLayer& layer) : depth(depth_of(layer)), count((depth + DEPTH - 1) / DEPTH) {}
  int64_t from(int64_t run) const { return depth * run / count; }
  int64_t size(int64_t run) const { return from(run + 1) - from(run); }
};

// Gather up to 16 rows of x [rows][K] into their blocks, row `m16` of `blocks`, by way of `turned` [K + 3][16], which has a
// feature of every row in one place: the processor's own gather is many times slower.
BF16_TARGET void gather(const GptqLayer& layer, const uint16_t* x, int rows, uint16_t* turned, uint32_t* gathered, int64_t m16,
                        int64_t blocks) {
  const int64_t features = layer.in_features;
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
      if (i < count) _mm512_store_si512(turned + (k + 2 * i) * LANES, _mm512_permutexvar_epi16(apart, v[i]));
  }
  const int64_t nothing = (features + 1) / 2 * 2;
  memset(turned + nothing * LANES, 0, 2 * LANES);
  const __m256i* feature = reinterpret_cast<const __m256i*>(turned);
  const int half = layer.bits == 3 ? 8 : 16 / layer.bits;
  const Runs runs(layer);
  const int64_t last = int64_t(layer.units) * unit_rows(layer.bits);
  for (int i = 0; i < 16; i++) order[2 * i] = uint16_t(i), order[2 * i + 1] = uint16_t(16 + i);
  const __m512i interleave = _mm512_load_si512(order);
  int64_t run = 0;
  for (int64_t block = 0; block < runs.depth; block++) {
    while (block == runs.from(run + 1)) run++;
    uint32_t* to = gathered + (runs.from(run) * blocks + m16 * runs.size(run) + block - runs.from(run)) * BLOCK;
    __m512i v[PAIRS];
#pragma GCC unroll 16
    for (int pair = 0; pair < PAIRS; pair++) {
      const int64_t low = block * 2 * PAIRS + pair / half * 2 * half + pair % half, high = low + half;
      // What fills up is nothing: it stands after the features.
      const int32_t l = low < last && layer.rows[low] >= 0 ? layer.rows[low] : int32_t(nothing);
      const int32_t h = high < last && layer.rows[high] >= 0 ? layer.rows[high] : int32_t(nothing);
      const __m256i below = _mm256_load_si256(feature + l), above = _mm256_load_si256(feature + h);
      v[pair] = _mm512_permutexvar_epi16(interleave, _mm512_inserti64x4(_mm512_castsi256_si512(below), above, 1));
    }
    transpose(v);
#pragma GCC unroll 16
    for (int m = 0; m < 16; m++) _mm512_store_si512(to + m * PAIRS, v[m]);
  }
}

// How blocks of depth are put in order whose rows are neighbours in x: 32 features at most from `from` on,
// as they are where groups are rows in sequence. It is one shuffle for a row of x, and no transposition.
struct Near {
  struct Block {
    alignas(64) uint16_t order[2 * PAIRS];
    int64_t from;
    __mmask32 there, known;  // features of x that can be read; places that are not filled up
  };
  Block* blocks;    // [depth]
  bool all = true;  // else order leads further, and `gather` must go

  Near(const GptqLayer& layer, Block* memory) : blocks(memory) {
    const int half = layer.bits == 3 ? 8 : 16 / layer.bits;
    const int64_t last = int64_t(layer.units) * unit_rows(layer.bits), depth = depth_of(layer);
    for (int64_t b = 0; b < depth && all; b++) {
      Block block{};
      int32_t row[2 * PAIRS], most = -1, least = layer.in_features;
      for (int i = 0; i < 2 * PAIRS; i++) {
        const int pair = i / 2;
        const int64_t at = b * 2 * PAIRS + pair / half * 2 * half + pair % half + i % 2 * half;
        row[i] = at < last ? layer.rows[at] : -1;
        if (row[i] >= 0) least = std::min(least, row[i]), most = std::max(most, row[i]);
      }
      all = most - least < 2 * PAIRS;
      block.from = most < 0 ? 0 : least;
      for (int i = 0; i < 2 * PAIRS; i++)
        if (row[i] >= 0) block.order[i] = uint16_t(row[i] - least), block.known |= 1u << i;
      const int64_t left = layer.in_features - block.from;
      block.there = left >= 2 * PAIRS ? 0xffffffff : (1u << left) - 1;
      blocks[b] = block;
    }
  }
};

// `gather`, where the order is a near one.
BF16_TARGET void gather_near(const GptqLayer& layer, const Near& near, const uint16_t* x, int rows, uint32_t* gathered, int64_t m16,
                             int64_t blocks) {
  const Runs runs(layer);
  int64_t run = 0;
  for (int64_t b = 0; b < runs.depth; b++) {
    while (b == runs.from(run + 1)) run++;
    uint32_t* to = gathered + (runs.from(run) * blocks + m16 * runs.size(run) + b - runs.from(run)) * BLOCK;
    const Near::Block& block = near.blocks[b];
    const __m512i order = _mm512_load_si512(block.order);
    const uint16_t* from = x + block.from;
#pragma GCC unroll 16
    for (int m = 0; m < LANES; m++) {
      __m512i v{};
      if (m < rows) {
        _mm_prefetch(reinterpret_cast<const char*>(from + m * int64_t(layer.in_features) + 256), _MM_HINT_T0);
        v = _mm512_maskz_loadu_epi16(block.there, from + m * int64_t(layer.in_features));
      }
      _mm512_store_si512(to + m * PAIRS, _mm512_maskz_permutexvar_epi16(block.known, order, v));
    }
  }
}

// Gather a thread's share of the blocks of some rows of x.
void gather_share(const GptqLayer& layer, const Near& near, const uint16_t* x, int64_t rows, int share, int shares,
                  uint32_t* gathered, char* memory) {
  const int64_t blocks = (rows + LANES - 1) / LANES;
  for (int64_t block = blocks * share / shares; block < blocks * (share + 1) / shares; block++) {
    const uint16_t* from = x + block * LANES * layer.in_features;
    const int count = int(std::min<int64_t>(LANES, rows - block * LANES));
    if (near.all) gather_near(layer, near, from, count, gathered, block, blocks);
    else gather(layer, from, count, reinterpret_cast<uint16_t*>(memory), gathered, block, blocks);
  }
}

// Unpack blocks of depth [from, to) of 16 columns into a panel.
template <int BITS>
BF16_TARGET void unpack(const Part& part, int64_t vector, int64_t from, int64_t to, uint32_t* panel) {
  const GptqLayer& layer = *part.layer;
  constexpr int per_word = BITS == 3 ? 3 : 1, pairs = BITS == 3 ? 16 : 16 / BITS, step = BITS == 3 ? 1 : BITS;
  const int64_t tile = vector / (COLUMNS / LANES), column = vector % (COLUMNS / LANES) * LANES;
  const int64_t last = std::min<int64_t>(layer.units, to * step);
  const uint32_t* word = layer.words + (tile * layer.units + from * step) * per_word * COLUMNS + column;
  int segment = part.unit_segment[from], left = layer.segment_units[segment] - part.unit_before[from];
  const __m512i mask = _mm512_set1_epi32(BITS == 3 ? 3 : (1 << BITS) - 1), third = _mm512_set1_epi32(4);
  const __m512i base = _mm512_set1_epi32(0x4b000000);  // 2**23: the code in its last bits is added to it
  alignas(64) uint16_t order[32];
  for (int i = 0; i < 16; i++) order[2 * i] = uint16_t(i), order[2 * i + 1] = uint16_t(16 + i);
  const __m512i interleave = _mm512_load_si512(order);
  __m512 scales{}, zeros{};
  bool fresh = true;
  for (int64_t unit = from * step; unit < last; unit++, left--) {
    while (left == 0) left = layer.segment_units[++segment], fresh = true;
    if (fresh) {
      const int64_t at = (tile * layer.groups + layer.segment_group[segment]) * COLUMNS + column;
      load_tables(layer, at, scales, zeros);
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
        const int part_of = pair / 8, j = pair % 8, bit = 8 * part_of + j;
        low = _mm512_ternarylogic_epi32(_mm512_srli_epi32(v[part_of], 2 * j), mask, base, 0xEA);
        high = _mm512_ternarylogic_epi32(_mm512_srli_epi32(v[part_of], 2 * j + 16), mask, base, 0xEA);
        low = _mm512_ternarylogic_epi32(_mm512_rorv_epi32(v[2], _mm512_set1_epi32((bit + 30) % 32)), third, low, 0xEA);
        high = _mm512_ternarylogic_epi32(_mm512_rorv_epi32(v[2], _mm512_set1_epi32((bit + 46) % 32)), third, high, 0xEA);
      } else {
        low = _mm512_ternarylogic_epi32(_mm512_srli_epi32(v[0], BITS * pair), mask, base, 0xEA);
        high = _mm512_ternarylogic_epi32(_mm512_srli_epi32(v[0], BITS * pair + 16), mask, base, 0xEA);
      }
      const __m512 l = _mm512_mul_ps(_mm512_sub_ps(_mm512_castsi512_ps(low), zeros), scales);
      const __m512 h = _mm512_mul_ps(_mm512_sub_ps(_mm512_castsi512_ps(high), zeros), scales);
      const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(h, l);
      _mm512_store_si512(panel, _mm512_permutexvar_epi16(interleave, both));
      panel += LANES;
    }
    word += per_word * COLUMNS;
  }
  for (int64_t pair = last * pairs; pair < to * PAIRS; pair++, panel += LANES) _mm512_store_si512(panel, _mm512_setzero_si512());
}

void unpack_bits(const Part& part, int64_t vector, int64_t from, int64_t to, uint32_t* panel) {
  switch (part.layer->bits) {
    case 2: return unpack<2>(part, vector, from, to, panel);
    case 3: return unpack<3>(part, vector, from, to, panel);
    case 4: return unpack<4>(part, vector, from, to, panel);
    default: return unpack<8>(part, vector, from, to, panel);
  }
}

thread_local Scratch call_scratch, x_scratch, own_scratch;

// Memory for so many rows of x, gathered.
uint32_t* room_for_x(const GptqLayer& layer, int64_t rows) {
  const int64_t blocks = (rows + LANES - 1) / LANES;
  return static_cast<uint32_t*>(x_scratch.get(size_t(blocks) * depth_of(layer) * BLOCK * 4));
}

// The rows that fall to the threads before one: whole pairs of blocks, which the matrix unit takes at once.
int64_t rows_before(int64_t rows, int thread, int threads) {
  const int64_t pair = 2 * LANES, pairs = (rows + pair - 1) / pair;
  return std::min(rows, pairs * thread / threads * pair);
}

// Two vectors of columns, over one run of depth: what is unpacked at a time.
struct Panel {
  const Part* part;
  int64_t vector, at, depth;
  int64_t which, together;  // of its group, of how many
  int64_t next_at;          // the run that its group, or the next one, goes on with

  int64_t blocks() const { return 2 * depth; }
  void unpack_some(int64_t from, int64_t to, uint32_t* out) const {
    for (int64_t block = from; block < to; block++)
      unpack_bits(*part, vector + block / depth, at + block % depth, at + block % depth + 1, out + block * BLOCK);
  }
};

// The panels that fall to one thread, one after the other: groups of up to GROUP panels of columns, in each
// the runs of depth, in each the columns.
class Panels {
 public:
  Panels(const Part* parts, int count, int thread, int threads) : part_(parts), end_(parts + count), runs_(*parts[0].layer) {
    int64_t all = 0;
    for (const Part* part = part_; part < end_; part++) all += panels_of(*part);
    begin_ = all * thread / threads;
    left_ = all * (thread + 1) / threads - begin_;
    for (; part_ < end_ && begin_ >= panels_of(*part_); part_++) begin_ -= panels_of(*part_);
  }

  bool next(Panel& panel) {
    if (left_ == 0) return false;
    const int64_t together = std::min({GROUP, left_, panels_of(*part_) - begin_});
    panel = {part_, 2 * (begin_ + which_), runs_.from(run_), runs_.size(run_), which_, together, runs_.from((run_ + 1) % runs_.count)};
    if (++which_ < together) return true;
    which_ = 0;
    if (++run_ < runs_.count) return true;
    run_ = 0;
    left_ -= together;
    begin_ += together;
    if (begin_ == panels_of(*part_)) part_++, begin_ = 0;
    return true;
  }

 private:
  const Part *part_, *end_;
  Runs runs_;
  int64_t begin_, left_;         // of the group: its first panel of the part; panels from it on
  int64_t run_ = 0, which_ = 0;  // of the next panel
};

// Write the sums of a group that its last panel has finished: add the bias, round.
BF16_TARGET void finish(const Panel& panel, const float* sums, int64_t row, int64_t rows) {
  const GptqLayer& layer = *panel.part->layer;
  const int64_t blocks = (rows + LANES - 1) / LANES, first = panel.vector * LANES - panel.which * 2 * LANES;
  for (int64_t m = 0; m < rows; m++) {
    const float* from = sums + m / LANES * 2 * BLOCK + m % LANES * LANES;
    uint16_t* to = panel.part->y + (row + m) * layer.out_features;
    for (int64_t c = 0; c < 2 * (panel.which + 1); c++) {
      const int64_t column = first + c * LANES, left = layer.out_features - column;
      if (left <= 0) break;
      const __mmask16 mask = left >= LANES ? 0xffff : __mmask16((1u << left) - 1);
      __m512 value = _mm512_load_ps(from + (c / 2 * blocks * 2 + c % 2) * BLOCK);
      if (layer.bias) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, layer.bias + column));
      _mm256_mask_storeu_epi16(to + column, mask, (__m256i)_mm512_cvtneps_pbh(value));
    }
  }
}

// Multiply some rows of x, gathered, by the columns that fall to one thread. While the matrix unit is
// busy with one panel, the next one is unpacked, a part after each pair of blocks.
void multiply_share(Panels panels, const uint32_t* x, int64_t row, int64_t rows, bool amx, char* memory) {
  const int64_t blocks = (rows + LANES - 1) / LANES, pairs = (blocks + 1) / 2;
  const int rows_of_last = int(rows - (blocks - 1) * LANES);
  Panel panel{}, following{};
  if (!panels.next(panel)) return;
  const Runs runs(*panel.part->layer);
  uint32_t* now = reinterpret_cast<uint32_t*>(memory);
  uint32_t* next = now + 2 * DEPTH * BLOCK;
  float* sums = reinterpret_cast<float*>(next + 2 * DEPTH * BLOCK);
#ifdef MATRIX_UNIT
  if (amx) {
    if (blocks > 2) begin_tiles(LANES, LANES);  // a last short block is multiplied whole
    else if (blocks == 2) begin_tiles(LANES, rows_of_last);
    else begin_tiles(rows_of_last, LANES);
  }
#endif
  panel.unpack_some(0, panel.blocks(), now);
  for (bool more = true; more; panel = following) {
    more = panels.next(following);
    float* to = sums + panel.which * blocks * 2 * BLOCK;
    // x of the next run is fetched meanwhile, an equal part beside each pair of blocks of each panel.
    const char* next_x = reinterpret_cast<const char*>(x + panel.next_at * blocks * BLOCK);
    const int64_t lines = runs.count > 1 ? DEPTH * blocks * LANES / (panel.together * pairs * panel.depth) : 0;
    for (int64_t pair = 0; pair < pairs; pair++) {
      const int64_t block = 2 * pair;
      const int together = int(std::min<int64_t>(2, blocks - block));
      multiply_run({x + (panel.at * blocks + block * panel.depth) * BLOCK, panel.depth * BLOCK, now, panel.depth * BLOCK, to + block * 2 * BLOCK,
                    2 * BLOCK, panel.depth, panel.at == 0,
                    next_x + (panel.which * pairs + pair) * lines * panel.depth * 64, int(lines)},
                   together, block + together == blocks ? rows_of_last : LANES, amx);
      if (more) following.unpack_some(following.blocks() * pair / pairs, following.blocks() * (pair + 1) / pairs, next);
    }
    if (panel.at + panel.depth == runs.depth && panel.which == panel.together - 1) finish(panel, sums, row, rows);
    std::swap(now, next);
  }
#ifdef MATRIX_UNIT
  if (amx) end_tiles();
#endif
}

}  // namespace

#endif

extern "C" {

// y[i] [m][N of i] = x [m][K] @ W[i].T + bias for `count` layers that read x alike, all bfloat16; by the
// matrix unit where `amx` says so. The processor must have AVX512-BF16. Returns 0, or 1 where memory is short.
int gptq_gemm(const GptqLayer* const* layers, void* const* y, int count, const void* x, int64_t m, int amx, int threads) {
#ifdef X86
  const GptqLayer& first = *layers[0];
  Part* parts;
  Near::Block* near_blocks;
  const auto lay_out = [&](void* memory) {
    Arena arena(memory);
    parts = arena.take<Part>(count);
    near_blocks = arena.take<Near::Block>(depth_of(first));
    for (int i = 0; i < count; i++) {
      int32_t* segments = arena.take<int32_t>(depth_of(*layers[i]));
      int32_t* before = arena.take<int32_t>(depth_of(*layers[i]));
      if (memory) parts[i] = {layers[i], static_cast<uint16_t*>(y[i]), segments, before};
    }
    return arena.used();
  };
  void* call_memory = call_scratch.get(lay_out(nullptr));
  if (!call_memory) return 1;
  lay_out(call_memory);
  for (int i = 0; i < count; i++) find_segments(parts[i]);
  const Near near(first, near_blocks);
  int64_t columns = 0;
  for (int i = 0; i < count; i++) columns += layers[i]->out_features;
  const bool by_rows = threads > 1 && m >= threads * (columns <= FEW_COLUMNS ? SOME_ROWS : ROWS_EACH);
  const int64_t most = std::min(m, by_rows ? ROWS_EACH : MOST_ROWS);  // at a time: they stay in a core's cache
  uint32_t* together = by_rows ? nullptr : room_for_x(first, most);
  if (!by_rows && !together) return 1;
  int failed = 0;
#pragma omp parallel num_threads(threads)
  {
#ifdef _OPENMP
    const int thread = omp_get_thread_num(), team = omp_get_num_threads();
#else
    const int thread = 0, team = 1;
#endif
    const int64_t begin = by_rows ? rows_before(m, thread, team) : 0, end = by_rows ? rows_before(m, thread + 1, team) : m;
    const int share = by_rows ? 0 : thread, shares = by_rows ? 1 : team;
    const Panels panels(parts, count, share, shares);
    uint32_t* gathered = by_rows ? room_for_x(first, most) : together;
    const int64_t blocks = (most + LANES - 1) / LANES;
    const size_t turned = size_t(first.in_features + 3) * LANES * 2;
    char* memory = static_cast<char*>(own_scratch.get(std::max(turned, size_t(2) * BLOCK * 4 * (2 * DEPTH + GROUP * blocks))));
    const bool ready = gathered && memory;
    if (!ready) {
#pragma omp atomic write
      failed = 1;
    }
    for (int64_t row = begin; row < end; row += most) {
      const int64_t rows = std::min(most, end - row);
      const uint16_t* from = static_cast<const uint16_t*>(x) + row * first.in_features;
      if (ready) gather_share(first, near, from, rows, share, shares, gathered, memory);
      if (!by_rows) {
#pragma omp barrier
      }
      if (ready) multiply_share(panels, gathered, row, rows, amx, memory);
      if (!by_rows) {
#pragma omp barrier
      }
    }
  }
  return failed;
#else
  (void)layers, (void)y, (void)count, (void)x, (void)m, (void)amx, (void)threads;
  return 1;
#endif
}

}  // extern "C"
