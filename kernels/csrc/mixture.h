// Which rows of x each expert of a mixture reads. Rows are sorted by expert, those of one in their
// own order, so that an expert's weight is read once for all of its rows:
//
//   expert   0           1     2 (none)   3               shared
//   row      0  2  5     1                0  1  3         0  1  2  3  4  5
//   first    0           3     4          4               7                    13

#pragma once

#include "interface.h"
#include "scratch.h"
#include "simd.h"

#include <algorithm>
#include <cmath>

namespace gptq {

struct Routes {
  int32_t* chosen;  // [M][top_k] experts of a row
  float* share;     // [M][top_k] what their answers count
  int64_t* first;   // [experts + 2], the shared one is after the others
  int32_t* row;     // [first of the end]
  float* weight;    // [first of the end] what the expert's answer for the row counts

  void lay_out(Arena& arena, const GptqMixture& mixture, int64_t m) {
    chosen = arena.take<int32_t>(size_t(m) * mixture.top_k);
    share = arena.take<float>(size_t(m) * mixture.top_k);
    first = arena.take<int64_t>(size_t(mixture.experts) + 2);
    row = arena.take<int32_t>(size_t(m) * (mixture.top_k + 1));
    weight = arena.take<float>(size_t(m) * (mixture.top_k + 1));
  }

  // Choose a row's experts by its logits [experts] without their bias, which are overwritten; the
  // bias is of `type`.
  void choose(const GptqMixture& mixture, int type, int64_t of, float* logits) {
    const int experts = mixture.experts, top_k = mixture.top_k;
    for (int i = 0; mixture.router_bias && i < experts; i++)
      logits[i] += load_number(mixture.router_bias, type, i);
    float max = logits[0], sum = 0, of_chosen = 0;
    for (int i = 1; i < experts; i++) max = std::max(max, logits[i]);
    for (int i = 0; i < experts; i++) sum += logits[i] = expf(logits[i] - max);
    for (int k = 0; k < top_k; k++) {
      int best = 0;
      while (logits[best] < 0) best++;  // those that were chosen
      for (int i = best + 1; i < experts; i++)
        if (logits[i] > logits[best]) best = i;
      chosen[of * top_k + k] = best;
      share[of * top_k + k] = logits[best] / sum;
      of_chosen += logits[best] / sum;
      logits[best] = -1;
    }
    for (int k = 0; mixture.normalized && k < top_k; k++) share[of * top_k + k] /= of_chosen;
  }

  // Sort the rows that were chosen for; `shared` [M] is what the shared expert's answers count.
  void sort(const GptqMixture& mixture, int64_t m, const float* shared) {
    const int experts = mixture.experts, top_k = mixture.top_k;
    std::fill(first, first + experts + 2, 0);
    for (int64_t i = 0; i < m * top_k; i++) first[chosen[i] + 2]++;  // one more, for the places
    for (int i = 2; i < experts + 2; i++) first[i] += first[i - 1];
    for (int64_t i = 0; i < m * top_k; i++) {
      const int64_t at = first[chosen[i] + 1]++;
      row[at] = int32_t(i / top_k);
      weight[at] = share[i];
    }
    first[experts + 1] = first[experts];
    if (!mixture.shared_gate) return;
    for (int64_t i = 0; i < m; i++) {
      row[first[experts] + i] = int32_t(i);
      weight[first[experts] + i] = shared[i];
    }
    first[experts + 1] += m;
  }

  int64_t count(int expert) const { return first[expert + 1] - first[expert]; }
};

}  // namespace gptq
