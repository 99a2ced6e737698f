// Threads, scratch memory and the floating-point environment.
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <new>
#include <thread>
#include <vector>
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

// What a thread holds while it runs stages; here nothing.
struct NoSession {};

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

// Spins until counter >= target. It spins longer than a tile takes before it yields, because giving the core to another
// process costs far more time.
inline void wait_until(const std::atomic<int64_t> &counter, int64_t target) {
  constexpr int kSpins = 50000;
  for (int spins = 0; counter.load(std::memory_order_acquire) < target; ++spins)
    if (spins > kSpins) std::this_thread::yield();
}

inline std::unique_ptr<std::atomic<int64_t>[]> zero_counters(int64_t count) {
  std::unique_ptr<std::atomic<int64_t>[]> counters(new std::atomic<int64_t>[count]);
  for (int64_t i = 0; i < count; ++i) counters[i].store(0, std::memory_order_relaxed);
  return counters;
}

// Keeps sums in a fixed order across tasks that are started in order. Every task passes the same steps 0, 1, ... Task t
// may do step s when task t - 1 has finished it. The first unfinished task never waits, so there is no deadlock.
class OrderedSteps {
 public:
  explicit OrderedSteps(int64_t tasks) : done_(zero_counters(tasks)) {}
  void wait(int64_t previous_task, int64_t step) const { wait_until(done_[previous_task], step + 1); }
  void finish(int64_t task, int64_t step) { done_[task].store(step + 1, std::memory_order_release); }

 private:
  std::unique_ptr<std::atomic<int64_t>[]> done_;
};

#if defined(__clang__) && defined(__linux__)
extern "C" void GOMP_parallel(void (*run)(void *), void *data, unsigned num_threads, unsigned flags);
#endif

// Calls body() on up to `threads` threads at once, by the OpenMP runtime of the process. On Linux torch brings GCC's
// runtime, which lacks the functions that Clang's pragma calls. LLVM's runtime has GCC's function, too.
template <class Body> void run_parallel(int threads, Body body) {
#if defined(__clang__) && defined(__linux__)
  GOMP_parallel([](void *data) { (*static_cast<Body *>(data))(); }, &body, unsigned(std::max(threads, 1)), 0);
#else
#pragma omp parallel num_threads(threads) if (threads > 1)
  body();
#endif
}

// Calls run(i) for each i in [0, count), on up to `threads` threads at once. No call may throw.
template <class Run> void for_each_in_parallel(int64_t count, int64_t threads, Run run) {
  std::atomic<int64_t> next{0};
  run_parallel(int(std::min(threads, count)), [&] {
    for (int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) run(i);
  });
}

// One pass over a head, as calls of run(head, task, thread) for the tasks [0, tasks). There is at least one task.
struct Stage {
  int64_t tasks;
  std::function<void(int64_t head, int64_t task, int thread)> run;
};

// The order in which heads pass through the stages. If there are many heads for every thread, a thread takes a whole
// head through all stages, while the head is in its caches. Otherwise the schedule advances in steps. In each step
// every stage takes the next `heads` heads that the stage before it has finished. `heads` gives every thread a few
// tasks in a step, so threads that are done with a step work on the next one. The scratch memory of a head is slot head
// % slots. Where threads take whole heads, there are slots for those at work, and as many for threads that are ahead,
// of which one thread alone needs none. Results are the same in every schedule.
struct Schedule {
  Schedule(int64_t all_heads, int64_t stages, int64_t tasks_per_head, int64_t threads) {
    constexpr int64_t kTasksPerThread = 8;
    takes_whole_heads = all_heads >= kTasksPerThread * threads;
    heads = takes_whole_heads ? 1 : kTasksPerThread * threads / std::max<int64_t>(tasks_per_head, 1) + 1;
    slots = std::min(all_heads, takes_whole_heads ? 2 * threads - 1 : heads * stages);
  }
  bool takes_whole_heads;
  int64_t heads, slots;
};

// Runs every stage for every head on up to num_threads threads, with no barrier but the end: a task starts when all
// tasks of its head's stage before are done, and one of the first stage when the slot's last head is through. Tasks
// are started in one order in which each comes after all that it waits for. No task may throw. Every thread has a
// Session while it runs tasks.
template <class Session = NoSession>
void run_stages(int64_t heads, const Schedule &schedule, int64_t num_threads, std::vector<Stage> stages) {
  if (schedule.takes_whole_heads) {
    auto run = [passes = std::move(stages)](int64_t head, int64_t, int thread) {
      for (const Stage &stage : passes)
        for (int64_t task = 0; task < stage.tasks; ++task) stage.run(head, task, thread);
    };
    stages = {{1, std::move(run)}};
  }
  struct Batch {
    int64_t head, stage, begin, end;
  };
  const int64_t count = int64_t(stages.size()), steps = (heads + schedule.heads - 1) / schedule.heads + count - 1;
  std::vector<Batch> batches;
  for (int64_t step = 0; step < steps; ++step)
    for (int64_t stage = 0; stage < count; ++stage) {
      const int64_t first = std::max<int64_t>(step - stage, 0) * schedule.heads;
      const int64_t last = std::min(heads, (step - stage + 1) * schedule.heads);
      for (int64_t head = first; head < last; ++head) {
        const int64_t begin = batches.empty() ? 0 : batches.back().end;
        batches.push_back({head, stage, begin, begin + stages[stage].tasks});
      }
    }
  const int64_t total = batches.empty() ? 0 : batches.back().end, threads = std::min(num_threads, total);
  const auto finished = zero_counters(heads * count);
  std::atomic<int64_t> next{0};
  run_parallel(int(threads), [&] {
    const FlushDenormals flush;
    [[maybe_unused]] const Session session{};
    const int thread = omp_get_thread_num();
    auto batch = batches.begin();
    for (int64_t i = next.fetch_add(1); i < total; i = next.fetch_add(1)) {
      while (i >= batch->end) ++batch;
      const auto [head, stage, begin, end] = *batch;
      const int64_t previous = head - schedule.slots;  // the slot's last head
      if (stage > 0) wait_until(finished[head * count + stage - 1], stages[stage - 1].tasks);
      else if (previous >= 0) wait_until(finished[previous * count + count - 1], stages[count - 1].tasks);
      stages[stage].run(head, i - begin, thread);
      finished[head * count + stage].fetch_add(1, std::memory_order_release);
    }
  });
}

}  // namespace tob
