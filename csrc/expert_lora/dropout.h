// The dropout mask of cram_kernels/expert_lora/dropout.py, bit by bit, applied to blocks of a matrix.

#pragma once

#include <cstdint>
#include <optional>
#include <vector>

namespace cram {

struct Keep {
  int16_t least;  // of the 16-bit lanes that keep their element
  uint32_t row_word;
  std::vector<uint32_t> pairs;  // hash of each pair of columns

  // to [tokens, columns] = the block of `from` at (token, column), 0 where dropped; `from` points at the block.
  void copy(
      const void* from, int64_t stride, bool half, int64_t token, int64_t tokens, int64_t column, int64_t columns,
      void* to) const;

  // The block of `to` at (token, column) += sums [tokens, columns] where kept; `to` points at the block.
  void add(
      const float* sums, int64_t token, int64_t tokens, int64_t column, int64_t columns, void* to, int64_t stride,
      bool half) const;
};

// Nothing if `dropped` is 0. Words are those of `seed_words`; the first column of a block must be even.
std::optional<Keep> make_keep(int64_t dropped, int64_t row_word, int64_t pair_word, int64_t columns);

}  // namespace cram
