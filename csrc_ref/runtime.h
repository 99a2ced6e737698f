// Threads, scratch memory and the floating-point environment.
#pragma once

#include <omp.h>

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <thread>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace tob {

// Denormals are flushed to zero while this lives: they cost a hundred cycles each and carry no weight in a softmax.
// New threads inherit the flag, so it is set only where no thread is started: inside of a parallel region.
class FlushDenormals {
 public:
#if defined(__SSE2__)
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
  FlushDenormals() {}
#endif
  FlushDenormals(const FlushDenormals &) = delete;
  FlushDenormals &operator=(const FlushDenormals &) = delete;
};

// Uninitialised, cache-line aligned memory; throws std::bad_alloc.
template <class Real> class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<Real *>(::operator new(sizeof(Real) * size_t(count > 0 ? count : 1), kAlignment))) {}
  ~Scratch() { ::operator delete(data_, kAlignment); }
  Scratch(const Scratch &) = delete;
  Scratch &operator=(const Scratch &) = delete;
  Real *get() const { return data_; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  Real *data_;
};

// Calls task(index, thread) for every index in [0, count), started in that order by up to num_threads threads.
// No task may throw.
template <class Task> void parallel_for(int64_t count, int64_t num_threads, Task task) {
  if (count <= 0) return;
  std::atomic<int64_t> next{0};
#pragma omp parallel num_threads(int(num_threads < count ? num_threads : count)) if (count > 1 && num_threads > 1)
  {
    const FlushDenormals flush;
    for (int64_t i = next.fetch_add(1, std::memory_order_relaxed); i < count;
         i = next.fetch_add(1, std::memory_order_relaxed))
      task(i, omp_get_thread_num());
  }
}

// How many heads to work on at a time, so that packed copies take memory for those alone: enough tasks to keep every
// thread busy until the last few. Results do not depend on it.
inline int64_t heads_at_a_time(int64_t heads, int64_t tasks_per_head, int64_t num_threads) {
  constexpr int64_t kTasksPerThread = 24;
  if (num_threads == 1 || tasks_per_head == 0) return heads < 1 ? heads : 1;
  const int64_t wanted = (kTasksPerThread * num_threads + tasks_per_head - 1) / tasks_per_head;
  return wanted < heads ? wanted : heads;
}

// Keeps sums in a fixed order across tasks that parallel_for started in order. Every task passes the same steps, 0, 1,
// ...; task t may do step s once task t - 1 is past it. The first unfinished task never waits, so there is no deadlock.
class OrderedSteps {
 public:
  explicit OrderedSteps(int64_t tasks) : done_(new std::atomic<int64_t>[tasks]) {
    for (int64_t t = 0; t < tasks; ++t) done_[t].store(0, std::memory_order_relaxed);
  }
  // Long enough to outlast a tile: giving the core away to another process costs a thousand times more.
  void wait(int64_t previous_task, int64_t step) const {
    constexpr int kSpins = 50000;
    for (int spins = 0; done_[previous_task].load(std::memory_order_acquire) <= step; ++spins)
      if (spins > kSpins) std::this_thread::yield();
  }
  void finish(int64_t task, int64_t step) { done_[task].store(step + 1, std::memory_order_release); }

 private:
  std::unique_ptr<std::atomic<int64_t>[]> done_;
};

}  // namespace tob
