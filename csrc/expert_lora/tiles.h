// SHRINK and EXPAND on bfloat16 by the tile unit.
//
// The unit multiplies a left operand, rows in memory as they are, by a right operand whose neighbours in depth stand
// together. Panels hold the right operand. SHRINK packs what is smaller: x of a few tokens, the rows of w otherwise. The
// bits of a sum do not depend on which side is left, because products commute and the depth is walked in order.

#pragma once

#include "tile_unit.h"

namespace cram {

// Why this process has no tile unit, or null if it has. Asks the system for the unit's registers once.
const char* why_no_tiles();

inline bool has_tiles() { return !why_no_tiles(); }

constexpr int64_t tiles_of(int64_t count) { return (count + kTile - 1) / kTile; }
constexpr int64_t steps_of(int64_t depth) { return (depth + kDepth - 1) / kDepth; }

// Rows of a matrix: all from the first on, or the listed ones. Strides count elements.
struct Rows {
  const void* data;
  int64_t stride, count;
  bool half;
  const int32_t* listed;
};

// A right operand: `tiles` of 16 columns, two side by side, `steps` of 32 in depth. The memory is 64-byte aligned.
struct Panels {
  char* data;
  int64_t tiles, steps;

  int64_t bytes() const { return tiles * steps * kTileBytes; }
  int64_t width(int64_t pair) const { return tiles - 2 * pair < 2 ? 1 : 2; }
  char* pair(int64_t index) const { return data + 2 * index * steps * kTileBytes; }
  char* tile(int64_t index, int64_t step) const {
    return pair(index / 2) + (step * width(index / 2) + index % 2) * kTileBytes;
  }
};

// Aligned memory of this thread for panels that only it uses.
char* panel_memory(int64_t bytes);

// The columns of tile `index` are 16 rows of w, its depth their columns.
void pack_rows(const Rows& w, int64_t depth, int64_t index, const Panels& to);

// The columns of tiles [begin, end) are columns of w from `column` on, up to `columns` of them in all; the depth are
// its rows.
void pack_columns(const Rows& w, int64_t column, int64_t columns, int64_t begin, int64_t end, const Panels& to);

// z [x.count, count] = x w^T for packed rows w, of which there are `count`.
void tile_shrink(const Rows& x, int64_t depth, const Panels& w, int64_t count, float* z, int64_t z_stride);

// z [tokens, w.count] = x w^T for packed tokens x.
void tile_shrink_few(const Panels& x, int64_t tokens, const Rows& w, int64_t depth, float* z, int64_t z_stride);

// y [u.count, columns] (+)= u w for packed columns w from `column` on, a multiple of 32. u is bfloat16, in whole tiles: its
// memory has as many columns as w has depth and goes on to a multiple of 16 rows. y is bfloat16 or float32.
struct TileExpand {
  Rows u;
  Panels w;
  int64_t column, columns;
  void* y;
  int64_t y_stride;
  bool half_y, add;
};
void tile_expand(const TileExpand& e);

// y [u.count, columns] (+)= u w, u bfloat16, for the listed rows of w, read where they lie; `depth` of them.
struct LongExpand {
  Rows u;
  int64_t depth;
  const void* w;
  int64_t w_stride;
  bool half_w;
  const int32_t* rows;  // null: from the first on
  int64_t columns;
  void* y;
  int64_t y_stride;
  bool half_y, add;
};
void tile_expand_long(const LongExpand& e);

// to [count] = values times gates, 0 where the gate is, rounded.
void gate_halves(const float* values, const float* gates, int64_t count, Half* to);
void round_halves(const float* values, int64_t count, Half* to);

}  // namespace cram
