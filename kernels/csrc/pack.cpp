// Pack a checkpoint's words into those that the products read, which gemv.h draws: 5, 6 and 7 bits
// become 8.
//
// The checkpoint's lie as gptq_loader_plugin/kernel/packing.py says: 32 codes of a column, a
// block, take `bits` words, as one stream of bits or plane by plane:
//
//   continuous, 3 bits   word 0 has codes 0 to 9 and two bits of code 10, word 1 its third one, ...
//   planar, 5 bits       words 0 to 3 have the low nibbles of 8 codes each, word 4 all high bits
//
// No matrix of codes is made. A code is a few fields of bits in the checkpoint's words and a few in
// ours; each pair that overlaps is a shift, a mask and a shift for 64 columns at a time. Rows in
// order are read as the file lies; rows out of order a tile at a time, from a copy that fits the
// cache.

#include "gemv.h"
#include "team.h"

#include <algorithm>

using namespace gptq;

namespace {

constexpr int CODES_PER_BLOCK = 32;  // which fill whole words at every width
constexpr int UNITS_AT_ONCE = 8;     // of a tile, written one after the other
constexpr int PREFETCH_ROWS = 16;    // of words, asked for before they are copied

// Bits of a code where they lie: `length` of them from bit `low` of the code on, at `bit` of a
// word.
struct BitField {
  int32_t word, bit, length, low;
};

struct BitFields {
  BitField field[3];
  int count;
};

// Where the checkpoint has the code of row `row` of a block.
BitFields stored_fields(int bits, bool planar, int row) {
  BitFields fields = {};
  if (!planar) {
    const int first = row * bits % 32, length = bits < 32 - first ? bits : 32 - first;
    fields.field[fields.count++] = {row * bits / 32, first, length, 0};
    if (length < bits)
      fields.field[fields.count++] = {row * bits / 32 + 1, 0, bits - length, length};
    return fields;
  }
  int word = 0, low = 0;
  for (int width = 8; width; width /= 2) {  // of a plane, the widest first
    if (!(bits & width)) continue;
    const int per_word = 32 / width;
    fields.field[fields.count++] = {word + row / per_word, row % per_word * width, width, low};
    word += width;
    low += width;
  }
  return fields;
}

// Where our unit has the code of its row `row`. At 3 bits: two words of low bits as at 2 bits, and
// one of high bits.
BitFields packed_fields(int bits, int row) {
  if (bits != 3) return {{{0, bits * row, bits, 0}}, 1};
  return {{{row / 16, 2 * (row % 16), 2, 0}, {2, third_bit(row), 1, 2}}, 2};
}

struct Job {
  int bits;         // of a code in the checkpoint
  int packed_bits;  // of a code in our words
  int unit_rows;
  bool same;  // a unit of rows in order is the checkpoint's own word
  const int32_t* rows;
  BitFields stored[CODES_PER_BLOCK];
  BitFields packed[CODES_PER_BLOCK];
};

// One unit of a tile, from words [..][stride].
template <class V, int WORDS>
INLINE void pack_unit(const Job& job, const uint32_t* words, int64_t stride, int64_t unit,
                      uint32_t* out) {
  using uints = typename V::uints;
  constexpr int C = COLUMNS / V::LANES;
  const int32_t* rows = job.rows + unit * job.unit_rows;
  uints sum[WORDS][C] = {};
  for (int i = 0; i < job.unit_rows; i++) {
    if (rows[i] < 0) continue;
    const uint32_t* block = words + int64_t(rows[i] / CODES_PER_BLOCK) * job.bits * stride;
    const BitFields &stored = job.stored[rows[i] % CODES_PER_BLOCK], &packed = job.packed[i];
    for (int s = 0; s < stored.count; s++) {
      for (int o = 0; o < packed.count; o++) {
        const BitField from = stored.field[s], to = packed.field[o];
        const int low = from.low > to.low ? from.low : to.low;
        const int end = from.low + from.length, other = to.low + to.length;
        const int length = (end < other ? end : other) - low;
        if (length <= 0) continue;
        const int right = from.bit + low - from.low, left = to.bit + low - to.low;
        const uint32_t mask = (1u << length) - 1;
        for (int c = 0; c < C; c++) {
          uints word;
          memcpy(&word, block + from.word * stride + c * V::LANES, sizeof word);
          sum[WORDS == 1 ? 0 : to.word][c] |= (word >> right & mask) << left;
        }
      }
    }
  }
  memcpy(out, sum, sizeof sum);
}

// Whether a unit's rows are a whole word's of the checkpoint, in its order.
INLINE bool in_order(const Job& job, int64_t unit) {
  const int32_t* rows = job.rows + unit * job.unit_rows;
  if (rows[0] < 0 || rows[0] % job.unit_rows) return false;
  for (int i = 1; i < job.unit_rows; i++)
    if (rows[i] != rows[0] + i) return false;
  return true;
}

template <class V>
INLINE void pack_units(const Job& job, const uint32_t* words, int64_t stride, int64_t first,
                       int64_t last, uint32_t* out) {
  for (int64_t unit = first; unit < last; unit++) {
    if (job.packed_bits == 3) {
      pack_unit<V, 3>(job, words, stride, unit, out);
      out += 3 * COLUMNS;
      continue;
    }
    if (job.same && in_order(job, unit))
      memcpy(out, words + job.rows[unit * job.unit_rows] / job.unit_rows * stride,
             COLUMNS * sizeof(uint32_t));
    else
      pack_unit<V, 1>(job, words, stride, unit, out);
    out += COLUMNS;
  }
}

void pack_plain(const Job& job, const uint32_t* words, int64_t stride, int64_t first, int64_t last,
                uint32_t* out) {
  pack_units<Narrow>(job, words, stride, first, last, out);
}

#ifdef X86
AVX2_TARGET void pack_avx2(const Job& job, const uint32_t* words, int64_t stride, int64_t first,
                           int64_t last, uint32_t* out) {
  pack_units<Middle>(job, words, stride, first, last, out);
}

AVX512_TARGET void pack_avx512(const Job& job, const uint32_t* words, int64_t stride, int64_t first,
                               int64_t last, uint32_t* out) {
  pack_units<Wide>(job, words, stride, first, last, out);
}
#endif

// Copy the columns of one tile, the last ones filled up.
void copy_tile(const uint32_t* words, int64_t rows, int64_t stride, int count, uint32_t* out) {
  for (int64_t row = 0; row < rows; row++, words += stride, out += COLUMNS) {
    for (int c = 0; c < count; c += LANES) __builtin_prefetch(words + PREFETCH_ROWS * stride + c);
    memcpy(out, words, count * sizeof(uint32_t));
    if (count < COLUMNS) memset(out + count, 0, (COLUMNS - count) * sizeof(uint32_t));
  }
}

thread_local Scratch scratch;

}  // namespace

extern "C" {

int gptq_pack(int bits, int planar, const uint32_t* qweight, const int32_t* rows,
              int64_t in_features, int64_t units, int64_t columns, uint32_t* words, int threads) {
  Job job = {};
  job.bits = bits;
  job.packed_bits = bits <= 4 ? bits : 8;
  job.unit_rows = job.packed_bits == 3 ? 32 : 32 / job.packed_bits;
  job.same = bits == job.packed_bits && bits != 3;
  job.rows = rows;
  for (int row = 0; row < CODES_PER_BLOCK; row++)
    job.stored[row] = stored_fields(bits, planar, row);
  for (int row = 0; row < job.unit_rows; row++)
    job.packed[row] = packed_fields(job.packed_bits, row);

  auto pack = pack_plain;
#ifdef X86
  const int isa = gptq_isa();
  if (isa >= AVX512)
    pack = pack_avx512;
  else if (isa >= AVX2)
    pack = pack_avx2;
#endif

  const int unit_words = job.packed_bits == 3 ? 3 : 1;
  const int64_t tiles = (columns + COLUMNS - 1) / COLUMNS, whole = columns / COLUMNS;
  const int64_t stored_rows = in_features * bits / 32;

  bool ordered = true;
  int32_t last = -1;
  for (int64_t i = 0; i < units * job.unit_rows && ordered; i++) {
    if (rows[i] < 0) continue;
    ordered = rows[i] > last;
    last = rows[i];
  }
  const int64_t first_copied = ordered ? whole : 0;
  std::atomic<int> failed{0};
  std::atomic<int64_t> next{0};
  const auto pack_ordered = [&](Chunks& chunks) {
    do
      for (int64_t at = chunks.begin; at < chunks.end; at++) {
        const int64_t unit = at * UNITS_AT_ONCE, end = std::min(unit + UNITS_AT_ONCE, units);
        for (int64_t tile = 0; tile < whole; tile++)
          pack(job, qweight + tile * COLUMNS, columns, unit, end,
               words + (tile * units + unit) * unit_words * COLUMNS);
      }
    while (chunks.next());
  };
  const auto pack_copied = [&](Chunks& chunks) {
    uint32_t* copy = static_cast<uint32_t*>(scratch.get(sizeof(uint32_t) * stored_rows * COLUMNS));
    if (!copy) failed = 1;
    do
      for (int64_t tile = first_copied + chunks.begin; copy && tile < first_copied + chunks.end;
           tile++) {
        const int count = tile < whole ? COLUMNS : int(columns - whole * COLUMNS);
        copy_tile(qweight + tile * COLUMNS, stored_rows, columns, count, copy);
        pack(job, copy, COLUMNS, 0, units, words + tile * units * unit_words * COLUMNS);
      }
    while (chunks.next());
  };
  together(threads, Meet::BARRIER, [&](Together& all) {
    if (ordered) all.share((units + UNITS_AT_ONCE - 1) / UNITS_AT_ONCE, pack_ordered);
    all.share_in_order(tiles - first_copied, next, pack_copied);
  });
  return failed;
}

}  // extern "C"
