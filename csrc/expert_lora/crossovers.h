// Which products are computed here and which by torch, by processor: the rows of crossovers_table.h.
//
// Nothing is timed when the library runs, so results do not change from run to run.

#pragma once

#include <cstdint>

namespace cram {

// What multiplies: float32 lanes, pairs of bfloat16, or tiles of them.
enum class Unit : int64_t { lanes, pairs, tiles };

struct Most {
  int64_t base, gradient;  // tokens up to which the product is computed here
};

// The row in force for values of a type.
Most most_tokens(bool half);

// What multiplies values of a type here.
Unit unit_for(bool half);

}  // namespace cram
