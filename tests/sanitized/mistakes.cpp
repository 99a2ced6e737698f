// What the sanitizers have to find, each where the engine could make it, and what they must not report.
#include <atomic>
#include <memory>

#define TOB_MISTAKE extern "C" __attribute__((visibility("default")))

TOB_MISTAKE int heap_overflow(int index) {
  const std::unique_ptr<int[]> memory(new int[8]());
  return memory[index];
}

TOB_MISTAKE int signed_overflow(int value) { return value * value; }

TOB_MISTAKE int data_race(int threads) {
  int count = 0;
#pragma omp parallel num_threads(threads)
  ++count;
  return count;
}

// Handed to the region by its start, from thread to thread by a counter, and back by its end.
TOB_MISTAKE int no_mistake(int threads) {
  int sum = 0;
  std::atomic<int> turn{0}, next{0};
#pragma omp parallel num_threads(threads)
  {
    const int mine = next.fetch_add(1, std::memory_order_relaxed);
    while (turn.load(std::memory_order_acquire) < mine) {
    }
    sum += mine;
    turn.store(mine + 1, std::memory_order_release);
  }
  return sum;
}
