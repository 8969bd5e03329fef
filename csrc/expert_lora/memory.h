// Memory of a call for what its threads share, kept for the thread's next call.
//
// Fresh memory costs a page fault for each 4 KB, which is dearer than what is written there.

#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <vector>

namespace cram {

class Arena {
 public:
  // That of this thread, empty.
  static Arena& of_thread() {
    static thread_local Arena arena;
    arena.reset();
    return arena;
  }

  // Uninitialised, aligned to 64 bytes.
  char* take(int64_t bytes) {
    constexpr int64_t kLine = 64, kLeast = 1 << 16;
    bytes = (bytes + kLine - 1) / kLine * kLine;
    if (blocks_.empty() || used_ + bytes > blocks_.back().bytes) {
      const int64_t size = std::max(bytes, kLeast);
      blocks_.push_back({std::unique_ptr<char[]>(new char[size + kLine]), size});
      used_ = 0;
    }
    const uintptr_t begin = reinterpret_cast<uintptr_t>(blocks_.back().memory.get());
    char* const taken = reinterpret_cast<char*>((begin + kLine - 1) / kLine * kLine) + used_;
    used_ += bytes;
    total_ += bytes;
    return taken;
  }

 private:
  struct Block {
    std::unique_ptr<char[]> memory;
    int64_t bytes;
  };

  // What needed several blocks gets one of that size.
  void reset() {
    const int64_t wanted = total_;
    total_ = used_ = 0;
    if (blocks_.size() < 2) return;
    blocks_.clear();
    take(wanted);
    total_ = used_ = 0;
  }

  std::vector<Block> blocks_;
  int64_t used_ = 0, total_ = 0;
};

}  // namespace cram
