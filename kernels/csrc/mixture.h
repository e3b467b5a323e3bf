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
  float* rank;      // [M][experts] what they are chosen by
  int64_t* first;   // [experts + 2], the shared one is after the others
  int32_t* row;     // [first of the end]
  float* weight;    // [first of the end] what the expert's answer for the row counts

  void lay_out(Arena& arena, const GptqMixture& mixture, int64_t m) {
    chosen = arena.take<int32_t>(size_t(m) * mixture.top_k);
    share = arena.take<float>(size_t(m) * mixture.top_k);
    rank = arena.take<float>(size_t(m) * mixture.experts);
    first = arena.take<int64_t>(size_t(mixture.experts) + 2);
    row = arena.take<int32_t>(size_t(m) * (mixture.top_k + 1));
    weight = arena.take<float>(size_t(m) * (mixture.top_k + 1));
  }

  // Choose a row's experts by its logits [experts] without their bias, which are overwritten.
  void choose(const GptqMixture& mixture, int64_t of, float* logits) {
    const int experts = mixture.experts, top_k = mixture.top_k;
    int32_t* to = chosen + of * top_k;
    float *counts = share + of * top_k, sum = 0;
    for (int i = 0; mixture.router_bias && i < experts; i++)
      logits[i] += load_number(mixture.router_bias, mixture.router_type, i);
    float *scores = logits, *ranks = rank + of * experts;
    score(mixture, scores);
    for (int i = 0; i < experts; i++)
      ranks[i] = mixture.correction ? scores[i] + mixture.correction[i] : scores[i];
    if (mixture.kept_groups < mixture.groups) keep_groups(mixture, ranks);
    for (int k = 0; k < top_k; k++) {
      int best = 0;
      for (int i = 1; i < experts; i++)
        if (ranks[i] > ranks[best]) best = i;
      ranks[best] = -INFINITY;
      to[k] = best;
      sum += counts[k] = scores[best];
    }
    const float scaling = mixture.normalized ? mixture.scaling / (sum + 1e-20f) : mixture.scaling;
    for (int k = 0; k < top_k; k++) counts[k] *= scaling;
  }

  // Turn logits [experts] into scores.
  static void score(const GptqMixture& mixture, float* logits) {
    const int experts = mixture.experts;
    if (mixture.sigmoid) {
      for (int i = 0; i < experts; i++) logits[i] = 1.0f / (1.0f + expf(-logits[i]));
      return;
    }
    const float max = *std::max_element(logits, logits + experts);
    float sum = 0;
    for (int i = 0; i < experts; i++) sum += logits[i] = expf(logits[i] - max);
    for (int i = 0; i < experts; i++) logits[i] /= sum;
  }

  // Rank the experts of all groups but the best ones last: those whose best one, or two, rank the
  // highest together, of at most 64.
  static void keep_groups(const GptqMixture& mixture, float* ranks) {
    const int size = mixture.experts / mixture.groups;
    uint64_t kept = 0;
    for (int k = 0; k < mixture.kept_groups; k++) {
      int best = -1;
      float greatest = 0;
      for (int group = 0; group < mixture.groups; group++) {
        float first = -INFINITY, second = -INFINITY;
        for (int i = group * size; i < (group + 1) * size; i++) {
          second = std::max(second, std::min(first, ranks[i]));
          first = std::max(first, ranks[i]);
        }
        const float together = mixture.ranks_groups == 1 ? first : first + second;
        if (kept >> group & 1 || (best >= 0 && together <= greatest)) continue;
        best = group, greatest = together;
      }
      kept |= uint64_t(1) << best;
    }
    for (int i = 0; i < mixture.experts; i++)
      if (!(kept >> (i / size) & 1)) ranks[i] = -INFINITY;
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
    if (!mixture.shared) return;
    for (int64_t i = 0; i < m; i++) {
      row[first[experts] + i] = int32_t(i);
      weight[first[experts] + i] = shared[i];
    }
    first[experts + 1] += m;
  }

  int64_t count(int expert) const { return first[expert + 1] - first[expert]; }
};

}  // namespace gptq
