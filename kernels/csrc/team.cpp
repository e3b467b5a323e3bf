// The library's own threads, without OpenMP.
//
// A team belongs to the thread that calls the library, and stays for its next call. Its caller
// publishes a job, a number of chunks, and takes chunks like everyone else; others that wait for
// work spin a little and are then parked. The caller returns when all chunks are done: it waits for
// those who are at work on a chunk, and never for a thread that is parked or that the system put
// aside before it took one. A slow core takes fewer chunks than a fast one.
//
//   queues   one of each member:  number of the job (32 bits) | end (16) | next chunk (16)
//
// A chunk is taken by exchanging its queue's word for one whose `next` is one more, from one's own
// queue first, then from the others'. Since the number of the job is in the word, nobody takes a
// chunk of a job that is over: what a job is made of may be read by who has a chunk of it, and by
// nobody else. So a thread that comes late touches nothing of a call but the team, which is freed
// by the last one who has it.

#include "team.h"

#include "interface.h"
#include "scratch.h"

#include <algorithm>
#include <new>

#ifdef _WIN32
#define WIN32_LEAN_AND_MEAN
#define NOMINMAX
#include <windows.h>
#else
#include <pthread.h>
#include <sched.h>
#endif

namespace gptq {

namespace {

#ifdef _WIN32
class Lot {  // where threads are parked
 public:
  void lock() { AcquireSRWLockExclusive(&lock_); }
  void unlock() { ReleaseSRWLockExclusive(&lock_); }
  void wait() { SleepConditionVariableSRW(&changed_, &lock_, INFINITE, 0); }
  void wake() { WakeAllConditionVariable(&changed_); }

 private:
  SRWLOCK lock_ = SRWLOCK_INIT;
  CONDITION_VARIABLE changed_ = CONDITION_VARIABLE_INIT;
};

template <void run(void*)>
bool start_thread(void* with) {
  const auto body = [](void* of) -> DWORD {
    run(of);
    return 0;
  };
  const HANDLE thread = CreateThread(nullptr, 0, body, with, 0, nullptr);
  if (!thread) return false;
  CloseHandle(thread);
  return true;
}
#else
class Lot {
 public:
  ~Lot() {
    pthread_cond_destroy(&changed_);
    pthread_mutex_destroy(&lock_);
  }
  void lock() { pthread_mutex_lock(&lock_); }
  void unlock() { pthread_mutex_unlock(&lock_); }
  void wait() { pthread_cond_wait(&changed_, &lock_); }
  void wake() { pthread_cond_broadcast(&changed_); }

 private:
  pthread_mutex_t lock_ = PTHREAD_MUTEX_INITIALIZER;
  pthread_cond_t changed_ = PTHREAD_COND_INITIALIZER;
};

template <void run(void*)>
bool start_thread(void* with) {
  const auto body = [](void* of) -> void* {
    run(of);
    return nullptr;
  };
  pthread_t thread;
  if (pthread_create(&thread, nullptr, body, with) != 0) return false;
  pthread_detach(thread);
  return true;
}
#endif

// A child that was forked has none of its parent's threads, and maybe a lock that one of them held.
std::atomic<int> forks{0};

void count_forks() {
#ifndef _WIN32
  static const int registered =
      pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1, std::memory_order_relaxed); });
  (void)registered;
#endif
}

constexpr int CHUNKS_EACH = 8;           // of a share: what one thread does too late is no longer
constexpr int64_t MOST_CHUNKS = 0xffff;  // of a queue
// A pause is 40 to 140 cycles: a hundred microseconds at most until a thread is parked, which is
// longer than what a caller does between two pieces of a step.
constexpr int SPINS = 2000, CALLER_SPINS = 10000;

struct alignas(CACHE_LINE) Queue {
  std::atomic<uint64_t> word{0};
};

constexpr uint64_t word_of(uint32_t job, int64_t next, int64_t end) {
  return uint64_t(job) << 32 | uint64_t(end) << 16 | uint64_t(next);
}

}  // namespace

void give_way() {
#ifdef _WIN32
  SwitchToThread();
#else
  sched_yield();
#endif
}

class Team {
 public:
  explicit Team(int threads) : threads_(threads), fork_(forks.load(std::memory_order_relaxed)) {}

  int threads() const { return threads_; }
  bool usable(int threads) const {
    return threads_ == threads && fork_ == forks.load(std::memory_order_relaxed);
  }

  void start() {
    for (int thread = 1; thread < threads_; thread++) {
      users_.fetch_add(1, std::memory_order_relaxed);
      if (start_thread<begin>(this)) continue;
      users_.fetch_sub(1, std::memory_order_relaxed);
      return;  // those that there are take all chunks
    }
  }

  // The caller goes: who waits for work ends.
  void close() {
    closing_.store(true, std::memory_order_relaxed);
    job_.fetch_add(1, std::memory_order_seq_cst);
    if (fork_ == forks.load(std::memory_order_relaxed)) {
      wake();
      release();
    }
  }

  void share(const Work& work) {
    const int64_t queues = work.in_order ? 1 : threads_,
                  each = work.in_order ? MOST_CHUNKS : CHUNKS_EACH;
    work_ = work;
    chunks_ = std::min(work.count, queues * each);
    done_.store(0, std::memory_order_relaxed);
    const uint32_t job = job_.load(std::memory_order_relaxed) + 1;
    for (int i = 0; i < threads_; i++) {
      const bool used = i < queues;
      first_[i] = used ? chunks_ * i / queues : 0;
      const int64_t end = used ? chunks_ * (i + 1) / queues - first_[i] : 0;
      queues_[i].word.store(word_of(job, 0, end), std::memory_order_release);
    }
    job_.store(job, std::memory_order_seq_cst);
    wake();
    work_on(0);
    for (int spins = 0; done_.load(std::memory_order_acquire) != chunks_; spins++) {
      if (spins > CALLER_SPINS)
        give_way();
      else
        relax();
    }
  }

  // Take a chunk of any job, or of the one that `chunks` is of; begin at one's own queue.
  bool take(Chunks& chunks, bool any) {
    for (int i = 0; i < threads_; i++) {
      const int from = (chunks.thread + i) % threads_;
      std::atomic<uint64_t>& word = queues_[from].word;
      uint64_t seen = word.load(std::memory_order_relaxed);
      for (;;) {
        const int64_t next = seen & 0xffff, end = seen >> 16 & 0xffff;
        const uint32_t job = uint32_t(seen >> 32);
        if (next >= end || (!any && job != chunks.job_)) break;
        if (!word.compare_exchange_weak(seen, seen + 1, std::memory_order_acq_rel,
                                        std::memory_order_relaxed))
          continue;
        const int64_t chunk = first_[from] + next;
        chunks.job_ = job;
        chunks.begin = work_.count * chunk / chunks_;
        chunks.end = work_.count * (chunk + 1) / chunks_;
        return true;
      }
    }
    return false;
  }

 private:
  static void begin(void* team) { static_cast<Team*>(team)->serve(); }

  // Do chunks until none is left; what a body does after its last one counts as part of it.
  bool work_on(int thread) {
    bool any = false;
    Chunks chunks(0, 0, thread, threads_);
    chunks.team_ = this;
    while (take(chunks, true)) {
      any = true;
      chunks.taken_ = 1;
      work_.run(work_.body, chunks);
      done_.fetch_add(chunks.taken_, std::memory_order_acq_rel);
    }
    return any;
  }

  void serve() {
    const int thread = next_number_.fetch_add(1, std::memory_order_relaxed) + 1;
    uint32_t seen = 0;
    while (!closing_.load(std::memory_order_relaxed)) {
      work_on(thread);
      for (int spins = 0; spins < SPINS && job_.load(std::memory_order_acquire) == seen; spins++)
        relax();
      if (job_.load(std::memory_order_acquire) == seen) {
        lot_.lock();
        parked_.fetch_add(1, std::memory_order_seq_cst);
        while (job_.load(std::memory_order_seq_cst) == seen) lot_.wait();
        parked_.fetch_sub(1, std::memory_order_relaxed);
        lot_.unlock();
      }
      seen = job_.load(std::memory_order_acquire);
    }
    release();
  }

  void wake() {
    if (parked_.load(std::memory_order_seq_cst) == 0) return;
    lot_.lock();
    lot_.wake();
    lot_.unlock();
  }

  void release() {
    if (users_.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
    this->~Team();
    free_lines(this);
  }

  Queue queues_[MAX_THREADS];
  alignas(CACHE_LINE) std::atomic<int64_t> done_{0};
  alignas(CACHE_LINE) std::atomic<uint32_t> job_{0};
  alignas(CACHE_LINE) std::atomic<int> parked_{0};
  std::atomic<int> users_{1}, next_number_{0};
  std::atomic<bool> closing_{false};
  const int threads_, fork_;
  // Of the job, for who has a chunk of it.
  Work work_{};
  int64_t chunks_ = 0;
  int64_t first_[MAX_THREADS] = {};  // chunk of each queue
  Lot lot_;
};

namespace {

struct Holder {
  Team* team = nullptr;
  ~Holder() {
    if (team) team->close();
  }
};

thread_local Holder holder;

std::atomic<bool> own_threads{
#ifdef _OPENMP
    false
#else
    true
#endif
};

}  // namespace

bool has_own_threads() { return own_threads.load(std::memory_order_relaxed); }

int size_of(const Team& team) { return team.threads(); }

void share(Team& team, const Work& work) { team.share(work); }

Team* find_team(int threads) {
  if (holder.team && holder.team->usable(threads)) return holder.team;
  if (holder.team) holder.team->close();
  holder.team = nullptr;
  void* memory = allocate_lines(round_up(sizeof(Team), CACHE_LINE));
  if (!memory) return nullptr;
  count_forks();
  holder.team = new (memory) Team(threads);
  holder.team->start();
  return holder.team;
}

bool Chunks::next() {
  if (single_) {
    begin = single_->fetch_add(1, std::memory_order_relaxed);
    end = begin + 1;
    return begin < count_;
  }
  if (!team_ || !team_->take(*this, false)) return false;
  taken_++;
  return true;
}

}  // namespace gptq

extern "C" {

int gptq_own_threads(int own) {
#ifdef _OPENMP
  if (own >= 0) gptq::own_threads.store(own != 0, std::memory_order_relaxed);
#else
  (void)own;
#endif
  return gptq::has_own_threads();
}

}  // extern "C"
