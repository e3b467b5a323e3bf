// The only way this library gets memory: null where it is short, never an exception, as none may
// pass through a C interface or out of a parallel region.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>

#ifdef _WIN32
#include <malloc.h>
#endif

namespace gptq {

constexpr size_t CACHE_LINE = 64;

// Memory on whole cache lines, of a size that is a multiple of theirs.
inline void* allocate_lines(size_t size) {
#ifdef _WIN32
  return _aligned_malloc(size, CACHE_LINE);
#else
  return aligned_alloc(CACHE_LINE, size);
#endif
}

inline void free_lines(void* memory) {
#ifdef _WIN32
  _aligned_free(memory);
#else
  free(memory);
#endif
}

// The least multiple of `unit` that is no less than `count`.
template <typename T>
constexpr T round_up(T count, T unit) {
  return (count + unit - 1) / unit * unit;
}

// Memory that is kept from one call to the next, and grows.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { free_lines(memory_); }

  // At least `size` bytes with undefined contents, or null where memory is short.
  void* get(size_t size) {
    if (size <= size_ && memory_) return memory_;
    free_lines(memory_);
    size_ = 0;
    const bool too_much = size > SIZE_MAX - CACHE_LINE;
    memory_ = too_much ? nullptr : allocate_lines(round_up(size + !size, CACHE_LINE));
    if (memory_) size_ = size;
    return memory_;
  }

 private:
  void* memory_ = nullptr;
  size_t size_ = 0;
};

// Hands out parts of one piece of memory, each on cache lines of its own. Without memory it counts
// the bytes that are needed.
class Arena {
 public:
  explicit Arena(void* memory) : memory_(memory) {}

  // `count` of T, which are not constructed.
  template <typename T>
  T* take(size_t count) {
    static_assert(alignof(T) <= CACHE_LINE, "a part begins on a cache line");
    T* part = reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(memory_) + used_);
    // One line more: what another thread writes beside it is not fetched along with it.
    used_ += round_up(count * sizeof(T), CACHE_LINE) + CACHE_LINE;
    return part;
  }

  size_t used() const { return used_; }

 private:
  void* memory_;
  size_t used_ = 0;
};

}  // namespace gptq
