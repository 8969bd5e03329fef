// Phases of tasks in one parallel region; a phase starts when the one before is done.
//
// Threads claim tasks one by one. A thread waits only for tasks that another one has claimed and is running, so
// nothing hangs when the region runs on fewer threads than asked for, or on one after another. Where a task throws,
// nobody waits for it: every thread leaves, and the region throws on.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <thread>

namespace cram {

// Below this many multiply-adds, about ten microseconds, one thread is faster than waking others.
constexpr int64_t kSerial = 1 << 18;

inline void pause_thread() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// task(phase, index) for each index below counts[phase].
template <size_t Phases, class Task>
void in_phases(int64_t threads, const std::array<int64_t, Phases>& counts, const Task& task) {
  // Spinning is cheaper than sleeping for a task's length, but must not starve the thread that is waited for.
  constexpr int kSpins = 1 << 12;
  struct Progress {
    std::atomic<int64_t> next{0}, done{0};
  };
  std::array<Progress, Phases> progress;
  std::atomic<bool> failed{false};
  auto work = [&](int64_t, int64_t) {
    for (size_t phase = 0; phase < Phases; ++phase) {
      auto& [next, done] = progress[phase];
      for (int64_t index; (index = next.fetch_add(1, std::memory_order_relaxed)) < counts[phase];) {
        try {
          task(phase, index);
        } catch (...) {
          failed.store(true, std::memory_order_relaxed);
          throw;
        }
        done.fetch_add(1, std::memory_order_release);
      }
      if (phase + 1 == Phases) return;
      for (int spins = 0; done.load(std::memory_order_acquire) < counts[phase]; ++spins) {
        if (failed.load(std::memory_order_relaxed)) return;
        if (spins < kSpins) {
          pause_thread();
        } else {
          std::this_thread::yield();
        }
      }
    }
  };
  if (threads > 1) {
    torch::stable::parallel_for(0, threads, 1, work);
  } else {
    work(0, 1);
  }
}

}  // namespace cram
