"""csrc/tasks.h by itself: a task that throws ends the region instead of leaving its threads to wait."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
# In place of torch's parallel_for: one thread a task, and the first exception thrown on, as OpenMP's is.
PARALLEL_FOR = """
#pragma once
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>
namespace torch::stable {
template <class F>
void parallel_for(int64_t begin, int64_t end, int64_t, const F& f) {
  std::vector<std::thread> threads;
  std::exception_ptr thrown;
  std::mutex mutex;
  for (int64_t i = begin; i < end; ++i) {
    threads.emplace_back([&, i] {
      try {
        f(i, i + 1);
      } catch (...) {
        const std::lock_guard lock(mutex);
        if (!thrown) thrown = std::current_exception();
      }
    });
  }
  for (auto& thread : threads) thread.join();
  if (thrown) std::rethrow_exception(thrown);
}
}
"""
# Without arguments: all tasks run, phase after phase. With a phase: a task of it throws.
PROGRAM = """
#include "tasks.h"
#include <new>
#include <string>
int main(int count, char** arguments) {
  const std::array<int64_t, 3> counts{5, 7, 3};
  const size_t bad = count > 1 ? std::stoul(arguments[1]) : 3;
  for (int64_t threads : {1, 2, 4}) {
    for (int repeat = 0; repeat < 50; ++repeat) {
      std::array<std::atomic<int64_t>, 3> ran{};
      bool thrown = false, early = false;
      try {
        cram::in_phases(threads, counts, [&](size_t phase, int64_t index) {
          if (phase == bad && index == 2) throw std::bad_alloc();
          if (phase > 0 && ran[phase - 1] != counts[phase - 1]) early = true;
          ++ran[phase];
        });
      } catch (const std::bad_alloc&) {
        thrown = true;
      }
      if (early || thrown != (bad < 3)) return 1;
      for (size_t phase = 0; phase < 3; ++phase) {
        if (phase < bad && ran[phase] != counts[phase]) return 2;
        if (phase > bad && ran[phase]) return 3;
      }
    }
  }
  return 0;
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    folder = tmp_path_factory.mktemp("tasks")
    stub = folder / "torch" / "csrc" / "stable" / "ops.h"
    stub.parent.mkdir(parents=True)
    stub.write_text(PARALLEL_FOR)
    (folder / "main.cpp").write_text(PROGRAM)
    found = folder / "tasks"
    flags = ["-std=c++20", "-O1", "-pthread", f"-I{folder}", f"-I{CSRC}"]
    subprocess.run([COMPILER, *flags, str(folder / "main.cpp"), "-o", str(found)], check=True)
    return found


@pytest.mark.parametrize("phase", [None, 0, 1, 2])
def test_a_task_that_throws_ends_the_region(program: Path, phase: int | None) -> None:
    arguments = [] if phase is None else [str(phase)]
    # No limit on speed: a thread that is left to wait would wait for ever.
    assert subprocess.run([str(program), *arguments], timeout=60).returncode == 0
