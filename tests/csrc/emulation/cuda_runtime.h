// A CUDA device in miniature, for running a .cu file's kernels on the CPU under test.
//
// Every thread of a block is a coroutine; blocks run one after another. A coroutine runs until it meets a barrier or a
// shuffle, where it waits for the block or its warp, so every legal interleaving that matters to barriers happens and a
// barrier that not all threads reach is an error. Shared memory and the threads' order are what a kernel sees; clocks,
// caches and divergence are not modelled. Warps run backwards in every second round, so that a missing barrier shows.

#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#define __global__ static
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(threads)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define CUDART_VERSION 13000

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int min(int x, int y) { return x < y ? x : y; }
inline int max(int x, int y) { return x > y ? x : y; }
using std::fmaf;
using cudaStream_t = void*;

namespace emulation {

enum class State { ready, block, warp, done };

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  State state = State::done;
  int shuffles = 0;
};

struct Device {
  dim3 thread{0, 0, 0}, block{0, 0, 0}, block_size{1}, grid_size{1};
  std::vector<Thread> threads;
  ucontext_t scheduler;
  std::function<void()> body;
  float exchange[2][1024];
};

inline Device device;

inline void wait(State state) {
  Thread& self = device.threads[device.thread.x];
  self.state = state;
  swapcontext(&self.context, &device.scheduler);
}

inline void enter() {
  device.body();
  Thread& self = device.threads[device.thread.x];
  self.state = State::done;
  swapcontext(&self.context, &device.scheduler);
}

// Lets the threads go on that wait for each other, if all that are concerned wait; returns whether any did.
inline bool release(State state, size_t first, size_t last) {
  for (size_t t = first; t < last; ++t) {
    if (device.threads[t].state != state) return false;
  }
  for (size_t t = first; t < last; ++t) device.threads[t].state = State::ready;
  return true;
}

inline void run_block(size_t count) {
  constexpr size_t kStack = 1 << 16;
  device.threads.resize(count);
  for (Thread& thread : device.threads) {
    if (!thread.stack) thread.stack.reset(new char[kStack]);
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.get();
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, enter, 0);
    thread.state = State::ready;
    thread.shuffles = 0;
  }
  for (size_t round = 0;; ++round) {
    size_t done = 0;
    bool moved = false;
    for (size_t i = 0; i < count; ++i) {
      const size_t t = round % 2 ? count - 1 - i : i;
      Thread& thread = device.threads[t];
      if (thread.state == State::ready) {
        device.thread.x = static_cast<unsigned>(t);
        swapcontext(&device.scheduler, &thread.context);
        moved = true;
      }
      done += thread.state == State::done;
    }
    if (done == count) return;
    for (size_t warp = 0; warp < count; warp += 32) moved |= release(State::warp, warp, warp + 32);
    moved |= release(State::block, 0, count);
    if (!moved) throw std::runtime_error("a barrier or shuffle was not reached by every thread");
  }
}

template <typename Body>
void launch(dim3 grid, dim3 block, Body body) {
  device.body = body;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        device.block = dim3(x, y, z);
        run_block(block.x);
      }
    }
  }
}

}  // namespace emulation

#define threadIdx emulation::device.thread
#define blockIdx emulation::device.block

inline void __syncthreads() { emulation::wait(emulation::State::block); }

inline float __shfl_xor_sync(unsigned, float value, int distance) {
  using emulation::device;
  const unsigned self = device.thread.x;
  float* exchange = device.exchange[device.threads[self].shuffles++ % 2];
  exchange[self] = value;
  emulation::wait(emulation::State::warp);
  return exchange[self ^ static_cast<unsigned>(distance)];
}
