// Two phases of tasks in one parallel region; the second starts when the first is done.
//
// Threads claim tasks one by one. A thread waits only for tasks that another one has claimed and is running, so
// nothing hangs when the region runs on fewer threads than asked for, or on one after another.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>
#include <thread>

namespace cram {

inline void pause_thread() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

template <class First, class Second>
void two_phases(
    int64_t threads, int64_t first_count, const First& first, int64_t second_count, const Second& second) {
  // Spinning is cheaper than sleeping for a task's length, but must not starve the thread that is waited for.
  constexpr int kSpins = 1 << 12;
  std::atomic<int64_t> first_next{0}, first_done{0}, second_next{0};
  auto work = [&](int64_t, int64_t) {
    for (int64_t index; (index = first_next.fetch_add(1, std::memory_order_relaxed)) < first_count;) {
      first(index);
      first_done.fetch_add(1, std::memory_order_release);
    }
    for (int spins = 0; first_done.load(std::memory_order_acquire) < first_count; ++spins) {
      if (spins < kSpins) {
        pause_thread();
      } else {
        std::this_thread::yield();
      }
    }
    for (int64_t index; (index = second_next.fetch_add(1, std::memory_order_relaxed)) < second_count;) second(index);
  };
  if (threads > 1) {
    torch::stable::parallel_for(0, threads, 1, work);
  } else {
    work(0, 1);
  }
}

}  // namespace cram
