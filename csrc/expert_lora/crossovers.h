// Which products are computed here and which by torch, by processor: the rows of crossovers_table.h.
//
// Nothing is timed when the library runs, so results do not change from run to run.

#pragma once

#include <cstdint>

namespace cram {

// What multiplies: float32 lanes, pairs of bfloat16, or tiles of them.
enum class Unit : int64_t { lanes, pairs, tiles };

// Numbers of tokens for which the base product and its gradient are computed here.
struct Crossover {
  int64_t from, base, gradient;

  bool has_base(int64_t tokens) const { return tokens >= from && tokens <= base; }
  bool has_gradient(int64_t tokens) const { return tokens && tokens <= gradient; }
};

// The row in force for values of a type.
Crossover crossover(bool half);

// What multiplies values of a type here.
Unit unit_for(bool half);

}  // namespace cram
