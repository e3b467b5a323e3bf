// Threads that share work: OpenMP's, or a team of the library's own.
//
// The own team is there for where no OpenMP is (Windows, macOS), or where its threads would wait
// beside another runtime's; on Linux gptq_own_threads() chooses it. Both give the same numbers to
// the bit, since what is computed never depends on who computes it.
//
// A program shares its work piece by piece:
//
//   together(threads, Meet::SPINNING, [&](Together& all) {
//     all.share(tiles, [&](Chunks& chunks) {         // called by each thread that has a chunk
//       ... what a thread needs before its first chunk ...
//       do
//         for (int64_t tile = chunks.begin; tile < chunks.end; tile++) ...
//       while (chunks.next());
//     });                                            // all chunks are done
//   });
//
// By OpenMP each thread runs the program, has one chunk of each piece of work, and waits at a
// barrier. By an own team the caller alone runs the program, and whoever is awake takes chunks
// (team.cpp): what stands between pieces must therefore be the same for all, and write nothing that
// is shared.

#pragma once

#include "simd.h"

#include <atomic>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace gptq {

constexpr int MAX_THREADS = 256;

// Let the other thread of this core go on, while this one waits.
INLINE void relax() {
#if defined(X86)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Let another thread run in this one's place.
void give_way();

// Threads that wait for each other by spinning, and give way where one of them was put aside.
class SpinBarrier {
 public:
  // How many they are, before the first one waits.
  void start(int threads) { threads_ = threads; }
  void wait() {
    const int round = round_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; spins++) {
      if (spins > 10000)
        give_way();
      else
        relax();
    }
  }

 private:
  std::atomic<int> arrived_{0}, round_{0};
  int threads_ = 1;
};

class Team;

// The chunks of one piece of work that fall to one thread.
class Chunks {
 public:
  int64_t begin, end;  // of the chunk that is to be done now
  int thread, threads;

  // Go on to this thread's next chunk, or false where nothing is left.
  bool next();

 private:
  friend class Team;
  friend class Together;
  Chunks(int64_t from, int64_t to, int of, int all)
      : begin(from), end(to), thread(of), threads(all) {}
  Team* team_ = nullptr;
  uint32_t job_ = 0;                        // of the team
  std::atomic<int64_t>* single_ = nullptr;  // the next one, where OpenMP's threads take items
  int64_t count_ = 0;                       // of items, where they do
  int64_t taken_ = 1;                       // chunks
};

// A piece of work: `count` items, which `run` does some chunks of.
struct Work {
  void (*run)(const void* body, Chunks& chunks);
  const void* body;
  int64_t count;
  bool in_order;  // whoever is free takes the next item; else each thread begins with its own share
};

// Whether work is shared by an own team.
bool has_own_threads();

// The own team of this thread, which stays for its next call, or null where it is to work alone.
Team* find_team(int threads);
int size_of(const Team& team);
void share(Team& team, const Work& work);

// One call's threads.
class Together {
 public:
  const int threads;

  // Have `body` called with Chunks of [0, count), and return when all are done.
  template <class B>
  void share(int64_t count, const B& body) {
    share_work(count, body, nullptr);
  }

  // The same, item by item, for those that take long: `next` is 0, and is shared by the threads.
  template <class B>
  void share_in_order(int64_t count, std::atomic<int64_t>& next, const B& body) {
    share_work(count, body, &next);
  }

  explicit Together(Team* team) : threads(team ? size_of(*team) : 1), team_(team) {}
#ifdef _OPENMP
  // One of OpenMP's threads; without a barrier of ours they meet at OpenMP's.
  Together(SpinBarrier* barrier, int thread, int of)
      : threads(of), barrier_(barrier), thread_(thread) {}
#endif

 private:
  template <class B>
  void share_work(int64_t count, const B& body, std::atomic<int64_t>* next) {
    if (team_) {
      const auto run = [](const void* of, Chunks& chunks) { (*static_cast<const B*>(of))(chunks); };
      if (count > 0) gptq::share(*team_, {run, &body, count, next != nullptr});
      return;
    }
    Chunks chunks(count * thread_ / threads, count * (thread_ + 1) / threads, thread_, threads);
    if (next && threads > 1) {
      chunks.single_ = next;
      chunks.count_ = count;
      if (chunks.next()) body(chunks);
    } else if (chunks.begin < chunks.end) {
      body(chunks);
    }
#ifdef _OPENMP
    if (barrier_)
      barrier_->wait();
    else if (threads > 1) {
#pragma omp barrier
    }
#endif
  }

  Team* team_ = nullptr;
#ifdef _OPENMP
  SpinBarrier* barrier_ = nullptr;
#endif
  int thread_ = 0;
};

// How OpenMP's threads meet after a piece of work: by spinning, where pieces are short.
enum class Meet { SPINNING, BARRIER };

// Run a program that shares its work among `threads`.
template <class P>
void together(int threads, Meet meet, const P& program) {
  if (threads > MAX_THREADS) threads = MAX_THREADS;
  if (threads <= 1 || has_own_threads()) {
    Together all(threads > 1 ? find_team(threads) : nullptr);
    program(all);
    return;
  }
#ifdef _OPENMP
  SpinBarrier barrier;
#pragma omp parallel num_threads(threads)
  {
    const int team = omp_get_num_threads();
#pragma omp single
    barrier.start(team);
    Together all(meet == Meet::SPINNING ? &barrier : nullptr, omp_get_thread_num(), team);
    program(all);
  }
#else
  (void)meet;
#endif
}

// Call `body` with each of [0, count).
template <class B>
void parallel_for(int threads, int64_t count, const B& body) {
#ifdef _OPENMP
  if (threads > 1 && !has_own_threads()) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < count; i++) body(i);
    return;
  }
#endif
  together(threads, Meet::BARRIER, [&](Together& all) {
    all.share(count, [&](Chunks& chunks) {
      do
        for (int64_t i = chunks.begin; i < chunks.end; i++) body(i);
      while (chunks.next());
    });
  });
}

}  // namespace gptq
