// How the work of a pass is cut into tasks, and the products of one of them.

#pragma once

#include "../tasks.h"
#include "crossovers.h"
#include "dropout.h"
#include "layer.h"
#include "operands.h"

#include <algorithm>
#include <vector>

namespace cram {

// Tokens that stay in the second-level cache while a thread walks over rows or columns.
constexpr int64_t kTokens = 24 * kPanel, kColumns = 512, kRows = 8, kShrinkTokens = 64;

// How T tokens and the rows of a SHRINK are shared out.
struct Blocks {
  int64_t tokens, token_step, rows, row_step;

  int64_t token_blocks() const { return divided(tokens, token_step); }
  int64_t row_blocks() const { return rows ? divided(rows, row_step) : 1; }
  int64_t count() const { return token_blocks() * row_blocks(); }
};

inline Blocks shrink_blocks(int64_t tokens, int64_t rows, bool whole, Unit unit) {
  if (unit == Unit::tiles) {
    const bool few = tokens <= kShrinkTokens;
    return {tokens, few && whole ? 2 * kTile : kShrinkTokens, rows,
            few && !whole ? 2 * kTile : std::max<int64_t>(rows, 1)};
  }
  const int64_t step = tokens <= kShrinkTokens ? tokens : kShrinkTokens / 2;
  return {tokens, step, rows, whole || tokens > 8 * step ? std::max<int64_t>(rows, 1) : kRows};
}

struct Range {
  int64_t begin, end;
};

inline Range block(int64_t index, int64_t step, int64_t size) {
  return {index * step, std::min(size, (index + 1) * step)};
}

inline float* scratch(int64_t floats) {
  thread_local std::vector<float> memory;
  if (static_cast<int64_t>(memory.size()) < floats) memory.resize(floats);
  return memory.data();
}

// SHRINK of one block of x by some of the listed rows of w into z [tokens, rows of the block].
inline void project(
    ShrinkTile tile, const Matrix& x, int64_t depth, const Matrix& w, const std::vector<int32_t>& listed, Range tokens,
    Range rows, const Keep* keep, float* z, float* memory) {
  Matrix from{x.at(tokens.begin, 0), x.stride, x.half};
  if (keep) {
    keep->copy(from.data, from.stride, from.half, tokens.begin, tokens.end - tokens.begin, 0, depth, memory);
    from = {reinterpret_cast<char*>(memory), depth, x.half};
  }
  const int64_t count = rows.end - rows.begin;
  tile({from.data, from.stride, tokens.end - tokens.begin, w.data, w.stride, listed.data() + rows.begin, count,
        depth, z, count});
}

// Strips of a block of x in the thread's memory, dropped where `keep` says so.
inline Strips block_strips(const Matrix& x, int64_t depth, Range tokens, const Keep* keep, float* memory) {
  Rows rows{x.at(tokens.begin, 0), x.stride, tokens.end - tokens.begin, true, nullptr};
  Strips made{nullptr, tiles_of(rows.count), steps_of(depth)};
  made.data = strip_memory(made.bytes());
  if (keep) {
    keep->copy(rows.data, rows.stride, true, tokens.begin, rows.count, 0, depth, memory);
    rows = {memory, depth, rows.count, true, nullptr};
  }
  for (int64_t strip = 0; strip < made.count; ++strip) copy_strip(rows, depth, strip, made);
  return made;
}

// Column tiles that are packed in one task.
constexpr int64_t kPackedTiles = 8;

// Tokens that are multiplied in one task by a weight of that depth: x of them stays in the second-level cache beside
// a few rows of the weight.
inline int64_t tile_tokens(int64_t tokens, int64_t depth) {
  constexpr int64_t kBytes = 1 << 20;
  const int64_t most = std::clamp<int64_t>(kBytes / (2 * std::max<int64_t>(depth, 1)) / kDepth, 1, 16) * kDepth;
  return std::min(tokens, divided(divided(tokens, divided(tokens, most)), kDepth) * kDepth);
}

// Token blocks of an EXPAND: long ones read w less often, but all threads must find some.
inline int64_t token_step(int64_t tokens, int64_t across, int64_t threads, Unit unit) {
  const int64_t wanted = std::max<int64_t>(1, 4 * threads / std::max<int64_t>(across, 1));
  if (unit == Unit::tiles) {
    return std::clamp(divided(divided(tokens, wanted), 2 * kTile) * 2 * kTile, 2 * kTile, 8 * kTile);
  }
  return std::clamp(divided(divided(tokens, wanted), kPanel) * kPanel, 4 * kPanel, kTokens);
}

// Column blocks of an EXPAND.
inline int64_t column_step(int64_t tokens, int64_t columns, int64_t threads) {
  if (tokens > kShrinkTokens) return kColumns;
  return std::max<int64_t>(128, divided(divided(columns, 4 * threads), 128) * 128);
}

// y [tokens of the block, columns of the block] += u w, dropped where `keep` says so; for tiles w is packed.
inline void expand(
    ExpandTile tile, ExpandTile unadded, const Factors& u, const Matrix& w, const int32_t* rows, const Panels& packed,
    Range tokens, Range columns, const Matrix& y, const Keep* keep) {
  const int64_t count = tokens.end - tokens.begin, width = columns.end - columns.begin;
  void* const to = y.at(tokens.begin, columns.begin);
  float* const sums = keep ? scratch(count * width) : nullptr;
  if (u.unit == Unit::tiles) {
    TileExpand call{u.strips, tokens.begin / kTile, count, packed, columns.begin, width, to, y.stride, y.half, true};
    if (keep) call.y = sums, call.y_stride = width, call.half_y = false, call.add = false;
    tile_expand(call);
  } else {
    Expand call{u.at(tokens.begin), count, w.at(0, columns.begin), w.stride, rows, u.count, width, to, y.stride, true};
    if (keep) call.y = sums, call.y_stride = width, call.add = false;
    (keep ? unadded : tile)(call);
  }
  if (keep) keep->add(sums, tokens.begin, count, columns.begin, width, to, y.stride, y.half);
}

// Threads worth waking for so many tokens and rows.
inline int64_t threads_for(const Layer& layer, int64_t tokens, int64_t rows) {
  return tokens * rows * (layer.d_in + layer.d_out) < kSerial ? 1 : torch::stable::get_num_threads();
}

}  // namespace cram
