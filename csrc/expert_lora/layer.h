// What the passes of the packed expert layer share: operands, gating, and how work is cut into tasks.
//
// Letters as in cram_kernels/README.md.

#pragma once

#include "crossovers.h"
#include "dropout.h"
#include "memory.h"
#include "products.h"
#include "tiles.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <vector>

namespace cram {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Below this many multiply-adds one thread is faster than waking others.
constexpr int64_t kSerial = 1 << 16;
// Tokens that stay in the second-level cache while a thread walks over rows or columns.
constexpr int64_t kTokens = 24 * kPanel, kColumns = 512, kRows = 8, kShrinkTokens = 64;

inline bool is_half(const Tensor& tensor, const char* name) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(
      type == ScalarType::Float || type == ScalarType::BFloat16, name, " must be float32 or bfloat16");
  return type == ScalarType::BFloat16;
}

inline int64_t divided(int64_t size, int64_t step) { return (size + step - 1) / step; }

// A row-major matrix of float32 or bfloat16.
struct Matrix {
  char* data;
  int64_t stride;
  bool half;

  int64_t bytes() const { return half ? 2 : 4; }
  char* at(int64_t row, int64_t column) const { return data + (row * stride + column) * bytes(); }

  // Columns rows[j] - first of one row, for as many rows as are at least `first`.
  void set(int64_t row, const int32_t* columns, int64_t first, int64_t count, const float* values) const {
    Half* narrowed = reinterpret_cast<Half*>(at(row, 0)) - first;
    float* wide = reinterpret_cast<float*>(at(row, 0)) - first;
    for (int64_t j = 0; j < count; ++j) {
      if (columns[j] < first) continue;
      if (half) {
        narrow(values[j], narrowed + columns[j]);
      } else {
        wide[columns[j]] = values[j];
      }
    }
  }

  // Columns [column, column + count) of one row.
  void write(int64_t row, int64_t column, int64_t count, const float* values) const {
    if (half && has_tiles()) {
      round_halves(values, count, reinterpret_cast<Half*>(at(row, column)));
    } else if (half) {
      Half* to = reinterpret_cast<Half*>(at(row, column));
      for (int64_t c = 0; c < count; ++c) narrow(values[c], to + c);
    } else {
      std::memcpy(at(row, column), values, count * sizeof(float));
    }
  }

  // One row in float32.
  void copy(int64_t row, int64_t count, float* to) const {
    const Half* narrowed = reinterpret_cast<const Half*>(at(row, 0));
    if (half) {
      for (int64_t c = 0; c < count; ++c) to[c] = widen(narrowed[c]);
    } else {
      std::memcpy(to, at(row, 0), count * sizeof(float));
    }
  }
};

inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline int64_t tokens_of(const Tensor& x) {
  int64_t tokens = 1;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) tokens *= x.size(d);
  return tokens;
}

// Uninitialised. `new_empty` would go through the dispatcher, at a microsecond each.
inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType type) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= std::max<int64_t>(sizes[d], 1)) strides[d] = stride;
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), static_cast<int32_t>(type),
      aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

inline Tensor empty(int64_t rows, int64_t columns, ScalarType type) { return empty({rows, columns}, type); }

// [..., columns] for x [..., D].
inline Tensor empty_rows_of(const Tensor& x, int64_t columns) {
  std::vector<int64_t> sizes(x.dim());
  for (int64_t d = 0; d < x.dim(); ++d) sizes[d] = x.size(d);
  sizes.back() = columns;
  return empty(sizes, x.scalar_type());
}

// Kernels write only what is theirs to write; the constness of a tensor's data ends here.
inline Matrix matrix(const Tensor& tensor, const char* name) {
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous");
  const int64_t stride = tensor.dim() ? tensor.size(tensor.dim() - 1) : 1;
  return {static_cast<char*>(tensor.data_ptr()), stride, is_half(tensor, name)};
}

// Factors of an EXPAND: in its panels, or for tiles in strips.
struct Factors {
  int64_t count;
  Unit unit;
  Strips strips;
  char* memory;

  Factors(Arena& arena, int64_t tokens, int64_t count, Unit unit)
      : count(count), unit(unit), strips{nullptr, tiles_of(tokens), steps_of(count)} {
    const bool pairs = unit == Unit::pairs;
    const int64_t panels = panel_index(divided(tokens, kPanel) * kPanel, 0, count, pairs) * (pairs ? 2 : 4);
    const int64_t bytes = unit == Unit::tiles ? strips.bytes() : panels;
    memory = strips.data = arena.take(bytes);
    std::memset(memory, 0, bytes);
  }

  // A token's factors [begin, end): values times gates, exactly 0 where the gate is.
  void set(int64_t token, int64_t begin, int64_t end, const float* values, const float* gates) {
    const bool pairs = unit == Unit::pairs;
    for (int64_t k = begin; unit == Unit::tiles && k < end;) {
      const int64_t next = std::min(end, (k / kDepth + 1) * kDepth);
      gate_halves(values + k - begin, gates + k - begin, next - k, in_strip(token, k));
      k = next;
    }
    if (unit == Unit::tiles) return;
    float* wide = reinterpret_cast<float*>(memory) + (pairs ? 0 : panel_index(token, 0, count, false));
    Half* half = reinterpret_cast<Half*>(memory) + (pairs ? panel_index(token, 0, count, true) : 0);
    for (int64_t k = begin; k < end; ++k) {
      const float gate = gates[k - begin], value = gate == 0 ? 0 : values[k - begin] * gate;
      if (pairs) {
        narrow(value, half + k / 2 * (2 * kPanel) + k % 2);
      } else {
        wide[k * kPanel] = value;
      }
    }
  }

  void set(int64_t token, int64_t k, float value) {
    if (unit == Unit::tiles) return narrow(value, in_strip(token, k));
    const float one = 1;
    set(token, k, k + 1, &value, &one);
  }

  const void* at(int64_t token) const {
    const int64_t index = panel_index(token, 0, count, unit == Unit::pairs);
    return memory + index * (unit == Unit::pairs ? 2 : 4);
  }

 private:
  Half* in_strip(int64_t token, int64_t k) const {
    char* tile = strips.at(token / kTile) + k / kDepth * kTileBytes;
    return reinterpret_cast<Half*>(tile) + token % kTile * kDepth + k % kDepth;
  }
};

inline const Tensor& checked(const Tensor& tensor, int64_t dimensions, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == dimensions, name, " must have ", dimensions, " dimensions, got ", tensor.dim());
  return tensor;
}

// What every pass is given, contiguous. A row of Bt belongs to a row of A; with a shared A, to that of its place in its
// expert.
struct Layer {
  Tensor a, bt, gates, owner;
  int64_t d_in, d_out, rows, a_rows;
  double scale;

  Layer(const Tensor& a_in, const Tensor& bt_in, const Tensor& owner, const Tensor& gates_in, double scale)
      : a(dense(checked(a_in, 2, "a"))), bt(dense(checked(bt_in, 2, "bt"))),
        gates(dense(checked(gates_in, 2, "gates"))), owner(owner), d_in(a.size(1)), d_out(bt.size(1)), rows(bt.size(0)), a_rows(a.size(0)), scale(scale) {
    STD_TORCH_CHECK(
        owner.scalar_type() == ScalarType::Long && owner.is_contiguous() && owner.numel() == rows &&
            (a_rows == rows || (a_rows && rows == a_rows * gates.size(1))),
        "a, bt and owner must have as many rows, or a those of each of the E experts, and gates must be [S, E]");
    const int64_t* of_row = static_cast<const int64_t*>(owner.const_data_ptr());
    uint64_t last = 0;
    for (int64_t r = 0; r < rows; ++r) last = std::max(last, static_cast<uint64_t>(of_row[r]));
    STD_TORCH_CHECK(
        !rows || last < static_cast<uint64_t>(gates.size(1)),
        "owner must name columns of gates [S, ", gates.size(1), "], got ", static_cast<int64_t>(last));
  }

  // Raises where a linear or what it reads or writes does not have this layer's widths, or another type.
  void check_base(const Tensor& x, int64_t width, const Tensor& weight, const std::optional<Tensor>& bias) const {
    STD_TORCH_CHECK(
        x.dim() && x.size(x.dim() - 1) == width && weight.dim() == 2 && weight.size(0) == d_out &&
            weight.size(1) == d_in && (!bias || (bias->dim() == 1 && bias->size(0) == d_out)),
        "x, weight and bias must fit a [R, ", d_in, "] and bt [R, ", d_out, "]");
    STD_TORCH_CHECK(
        weight.scalar_type() == x.scalar_type() && (!bias || bias->scalar_type() == x.scalar_type()),
        "x, weight and bias must have one dtype");
  }

  // Raises where gates cannot be those of so many tokens.
  void check_gates(int64_t tokens) const {
    const int64_t segments = gates.size(0);
    STD_TORCH_CHECK(
        gates.scalar_type() == ScalarType::Float && (!tokens || (segments > 0 && tokens % segments == 0)),
        "gates must be float32 [S, E] with S dividing T = ", tokens, ", got S = ", segments);
  }

  bool shared() const { return a_rows != rows; }
};

// Which packed rows take part, and the factor of each of them in each segment.
struct Gating {
  std::vector<int32_t> rows;   // rows with a gate other than 0 somewhere, then the others that are wanted
  std::vector<int32_t> down;   // their rows of A
  int64_t live;                // how many of the former
  std::vector<float> factors;  // [S, rows]
  int64_t segments, tokens;    // tokens of a segment

  bool plain;                  // rows are all in order, none left out

  const float* of(int64_t token) const { return factors.data() + token / tokens * static_cast<int64_t>(rows.size()); }
};

// Rows that an EXPAND sums at once. A group of the packed rows is left out whole or not at all; so rows keep their places in
// it, and a token's sums do not depend on which experts other tokens use.
inline int64_t summed_rows(Unit unit) { return unit == Unit::tiles ? kDepth : unit == Unit::pairs ? 2 : 1; }

// Rows before `first` take part only if they are live and `before`; rows from `first` on always where `dead`. In a live group
// of so many rows a live one with factor 0 stands for each dead one, which may hold NaN.
inline Gating gating(const Layer& layer, int64_t tokens, int64_t first, bool before, bool dead, int64_t group) {
  layer.check_gates(tokens);
  const Tensor &gates = layer.gates, &owner = layer.owner;
  const int64_t count = layer.rows, segments = gates.size(0), experts = gates.size(1);
  const int64_t* of_row = static_cast<const int64_t*>(owner.const_data_ptr());
  const float* gate = static_cast<const float*>(gates.const_data_ptr());
  std::vector<char> used(experts);
  for (int64_t s = 0; s < segments; ++s) {
    for (int64_t e = 0; e < experts; ++e) used[e] |= gate[s * experts + e] != 0;
  }
  Gating found{};
  std::vector<char> stands_in;
  const auto take = [&](int64_t row, bool instead) {
    found.rows.push_back(static_cast<int32_t>(row));
    stands_in.push_back(instead);
  };
  found.rows.reserve(count);
  stands_in.reserve(count);
  for (int64_t begin = before ? 0 : first; begin < count; begin += group) {
    const int64_t end = std::min(count, begin + group);
    int64_t live = begin;
    while (live < end && !used[of_row[live]]) ++live;
    for (int64_t r = begin; live < end && r < end; ++r) {
      const bool dead_row = !used[of_row[r]];
      take(dead_row ? live : r, dead_row);
    }
  }
  found.live = static_cast<int64_t>(found.rows.size());
  for (int64_t r = first; dead && r < count; ++r) {
    if (!used[of_row[r]]) take(r, false);
  }
  found.plain = true;
  for (int32_t r : found.rows) {
    found.plain &= r == found.rows[0] + static_cast<int32_t>(found.down.size());
    found.down.push_back(static_cast<int32_t>(r % layer.a_rows));
  }
  found.segments = segments;
  found.tokens = tokens / segments;
  found.factors.resize(segments * found.rows.size());
  float* factor = found.factors.data();
  for (int64_t s = 0; s < segments; ++s) {
    for (size_t k = 0; k < found.rows.size(); ++k) {
      *factor++ = stands_in[k] ? 0 : gate[s * experts + of_row[found.rows[k]]] * static_cast<float>(layer.scale);
    }
  }
  return found;
}

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

inline Rows rows_of(const Matrix& w, const std::vector<int32_t>& listed, int64_t count) {
  return {w.data, w.stride, count, w.half, listed.data()};
}

inline Rows rows_of(const Matrix& x, int64_t count) { return {x.data, x.stride, count, x.half, nullptr}; }

inline Panels panels(Arena& arena, int64_t columns, int64_t depth) {
  Panels made{nullptr, tiles_of(columns), steps_of(depth)};
  made.data = arena.take(made.bytes());
  return made;
}

inline Strips strips(Arena& arena, int64_t rows, int64_t depth) {
  Strips made{nullptr, tiles_of(rows), steps_of(depth)};
  made.data = arena.take(made.bytes());
  return made;
}

// Column tiles that are packed in one task.
constexpr int64_t kPackedTiles = 8;

// Tokens that are multiplied in one task by a weight of that depth: x of them stays in the second-level cache beside a few
// rows of the weight.
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
