// The body of avx_vnni.cpp, for each way to encode a product; see there. It is included within a
// namespace, with VNNI256 the target's attribute, DPBUSD and DPWSSD the intrinsics.

// Which codes of a unit's words meet the four bytes `at` of x.
template <int BITS>
VNNI256 INLINE __m256i take_codes(const uint32_t* word, int at) {
  if constexpr (BITS == 3) {
    const __m256i high = load_words(word + 2 * COLUMNS),
                  third =
                      at >= 2 ? _mm256_srli_epi32(high, at - 2) : _mm256_slli_epi32(high, 2 - at),
                  low = _mm256_srli_epi32(load_words(word + at / 4 * COLUMNS), at % 4 * 2);
    return _mm256_or_si256(_mm256_and_si256(low, _mm256_set1_epi8(3)),
                           _mm256_and_si256(third, _mm256_set1_epi32(0x04040404)));
  }
  return _mm256_and_si256(_mm256_srli_epi32(load_words(word), BITS * at),
                          _mm256_set1_epi8(char((1 << BITS) - 1)));
}

// M rows of x by one tile, C vectors of columns at once: y [M][COLUMNS].
template <int BITS, int BYTES, int M, int C>
VNNI256 void multiply_columns(const GptqLinear& linear, int64_t tile, int64_t m,
                              const PermutedActivations& from, float* y) {
  constexpr int per_word = BITS == 3 ? 3 : 1, fours = BITS == 3 ? 8 : 8 / BITS;
  for (int first = 0; first < COLUMNS / L; first += C) {
    const uint32_t* word = linear.words + tile * linear.units * per_word * COLUMNS + first * L;
    const uint32_t* x = from.words + m * from.stride;
    const uint32_t* next = next_tile(linear, tile, per_word, first * L);
    __m256 total[M][C];
#pragma GCC unroll 4
    for (int i = 0; i < M; i++)
#pragma GCC unroll 4
      for (int c = 0; c < C; c++) total[i][c] = _mm256_setzero_ps();
    for (int segment = 0; segment < linear.segments; segment++) {
      __m256i sum[M][C][BYTES];
#pragma GCC unroll 4
      for (int i = 0; i < M; i++)
#pragma GCC unroll 4
        for (int c = 0; c < C; c++)
#pragma GCC unroll 4
          for (int b = 0; b < BYTES; b++) sum[i][c][b] = _mm256_setzero_si256();
      for (int unit = 0; unit < linear.segment_units[segment]; unit++) {
#pragma GCC unroll 4
        for (int i = 0; i < per_word; i++)
#pragma GCC unroll 4
          for (int c = 0; c < C; c += 2) {  // two vectors a line
            _mm_prefetch(
                reinterpret_cast<const char*>(word + (16 * per_word + i) * COLUMNS + c * L),
                _MM_HINT_T0);
            _mm_prefetch(reinterpret_cast<const char*>(next + (i * C + c) * L), _MM_HINT_T1);
          }
        next += per_word * C * L;
#pragma GCC unroll 8
        for (int four = 0; four < fours; four++) {
          __m256i codes[C];
#pragma GCC unroll 4
          for (int c = 0; c < C; c++) codes[c] = take_codes<BITS>(word + c * L, four);
#pragma GCC unroll 4
          for (int i = 0; i < M; i++)
#pragma GCC unroll 4
            for (int b = 0; b < BYTES; b++) {
              const __m256i a = _mm256_set1_epi32(int(x[i * from.stride + BYTES * four + b]));
#pragma GCC unroll 4
              for (int c = 0; c < C; c++) sum[i][c][b] = DPBUSD(sum[i][c][b], codes[c], a);
            }
        }
        word += per_word * COLUMNS;
        x += BYTES * fours;
      }
      const int64_t at =
          (tile * linear.groups + linear.segment_group[segment]) * COLUMNS + first * L;
#pragma GCC unroll 4
      for (int c = 0; c < C; c++) {
        __m256 scales, zeros;
        load_tables(linear, at + c * L, scales, zeros);
#pragma GCC unroll 4
        for (int i = 0; i < M; i++) {
          const int64_t which = (m + i) * linear.segments + segment;
          __m256 exact = _mm256_cvtepi32_ps(sum[i][c][0]);
          if constexpr (BYTES == 2)
            exact = _mm256_fmadd_ps(_mm256_cvtepi32_ps(sum[i][c][1]),
                                    _mm256_set1_ps(1 / SECOND_BYTE), exact);
          total[i][c] = add_segment(from, which, exact, scales, zeros, total[i][c]);
        }
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < M; i++)
#pragma GCC unroll 4
      for (int c = 0; c < C; c++) _mm256_storeu_ps(y + i * COLUMNS + (first + c) * L, total[i][c]);
  }
}

struct Code {
  template <int BITS, int BYTES, int M>
  static void multiply(const GptqLinear& linear, int64_t tile, int64_t m,
                       const PermutedActivations& x, float* y) {
    constexpr int C = M > 2 ? 1 : M == 1 && BITS != 3 ? 4 : 2;  // sums, codes and words fit 16
    multiply_columns<BITS, BYTES, M, C>(linear, tile, m, x, y);
  }
};

// gemm_int16.cpp's multiply_block.
VNNI256 void multiply_block(const BlockProduct& p) {
  __m256i sum[BLOCK_ROWS][BLOCK_VECTORS];
#pragma GCC unroll 8
  for (int r = 0; r < BLOCK_ROWS; r++)
#pragma GCC unroll 2
    for (int n = 0; n < BLOCK_VECTORS; n++) sum[r][n] = _mm256_setzero_si256();
  const uint32_t *x = p.x, *w = p.panel;
  for (int pair = 0; pair < p.pairs; pair++, x += BLOCK_ROWS, w += PANEL_COLUMNS) {
    const __m256i w0 = load_words(w), w1 = load_words(w + L);
#pragma GCC unroll 8
    for (int r = 0; r < BLOCK_ROWS; r++) {
      const __m256i a = _mm256_set1_epi32(int(x[r]));
      sum[r][0] = DPWSSD(sum[r][0], w0, a);
      sum[r][1] = DPWSSD(sum[r][1], w1, a);
    }
  }
  // Held where they are until here: gcc 12 copied each for each product.
#pragma GCC unroll 8
  for (int r = 0; r < BLOCK_ROWS; r++)
#pragma GCC unroll 2
    for (int n = 0; n < BLOCK_VECTORS; n++) __asm__("" : "+x"(sum[r][n]));
  scale_block(p, sum);
}
