// How fast memory is read: what a kernel that only waited for its weights would reach.

#include "interface.h"
#include "scratch.h"
#include "team.h"

#include <chrono>

using namespace gptq;

namespace {

typedef uint64_t lanes __attribute__((vector_size(64)));

constexpr int64_t STEP = 512;  // bytes of a turn of the loop, in eight sums of their own
constexpr int64_t PREFETCH_AHEAD =
    4096;  // bytes: one thread reads a large cache half as fast again with it

uint64_t sum(const char* from, int64_t size) {
  lanes sums[8] = {};
  for (int64_t at = 0; at < size; at += STEP)
    for (int i = 0; i < 8; i++) {
      __builtin_prefetch(from + at + 64 * i + PREFETCH_AHEAD);
      sums[i] += *reinterpret_cast<const lanes*>(from + at + 64 * i);
    }
  uint64_t total = 0;
  for (const lanes& part : sums)
    for (int i = 0; i < 8; i++) total += part[i];
  return total;
}

}  // namespace

extern "C" {

double gptq_read_bandwidth(int64_t size, int rounds, int threads) {
  const int64_t part = size / threads / STEP * STEP;
  if (part <= 0) return 0;
  Scratch scratch;  // given back at the end
  char* memory = static_cast<char*>(scratch.get(size_t(part) * threads));
  if (!memory) return 0;
  std::atomic<uint64_t> total{0};
  double best = 0;
  for (int round = -1; round < rounds; round++) {  // the first one maps the memory
    const auto began = std::chrono::steady_clock::now();
    parallel_for(threads, threads, [&](int64_t thread) {
      char* mine = memory + part * thread;
      if (round >= 0)
        total.fetch_add(sum(mine, part), std::memory_order_relaxed);
      else
        for (int64_t at = 0; at < part; at += 8) *reinterpret_cast<uint64_t*>(mine + at) = 1;
    });
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - began;
    const double rate = part * threads / took.count();
    if (round >= 0 && rate > best) best = rate;
  }
  return total == static_cast<uint64_t>(part / 8 * threads) * rounds ? best : 0;  // it was read
}

}  // extern "C"
