// Pack codes into the words that the products read; the head of gptq_cpu.cpp says how they lie.

#include "gptq_cpu.h"

using namespace gptq;

namespace {

int unit_rows(int bits) { return bits == 3 ? 32 : 32 / bits; }
int unit_words(int bits) { return bits == 3 ? 3 : 1; }

}  // namespace

extern "C" {

// Pack codes [K][N] into words; `rows` [units * unit rows] names the code of each row, or -1.
void gptq_pack(int bits, const uint8_t* codes, const int32_t* rows, int64_t units, int64_t columns,
               uint32_t* words, int threads) {
  const int per_unit = unit_rows(bits), per_word = unit_words(bits);
  const int64_t tiles = (columns + COLUMNS - 1) / COLUMNS;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t tile = 0; tile < tiles; tile++) {
    const int64_t first = tile * COLUMNS;
    const int count = columns - first < COLUMNS ? int(columns - first) : COLUMNS;
    for (int64_t unit = 0; unit < units; unit++) {
      uint32_t* out = words + (tile * units + unit) * per_word * COLUMNS;
      memset(out, 0, sizeof(uint32_t) * per_word * COLUMNS);
      for (int row = 0; row < per_unit; row++) {
        const int32_t from = rows[unit * per_unit + row];
        if (from < 0) continue;
        const uint8_t* code = codes + from * columns + first;
        if (bits == 3) {
          // Two words of low bits as at 2 bits, and one of high bits: rows j and j + 8 of the
          // first half at bits j and j + 16, of the second half at 8 + j and 24 + j.
          const int half = row / 16, low = 2 * (row % 16);
          const int high = 8 * half + row % 8 + (row % 16 >= 8 ? 16 : 0);
          for (int c = 0; c < count; c++) {
            out[half * COLUMNS + c] |= uint32_t(code[c] & 3) << low;
            out[2 * COLUMNS + c] |= uint32_t(code[c] >> 2) << high;
          }
        } else {
          for (int c = 0; c < count; c++) out[c] |= uint32_t(code[c]) << (bits * row);
        }
      }
    }
  }
}

}  // extern "C"
