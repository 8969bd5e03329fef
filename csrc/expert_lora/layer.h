// One packed expert layer as its passes are given it, and which of its rows take part.
//
// Letters as in cram_kernels/README.md.

#pragma once

#include "../tensors.h"
#include "crossovers.h"
#include "tile_unit.h"

#include <algorithm>
#include <optional>
#include <vector>

namespace cram {

// What every pass is given, contiguous. A row of Bt belongs to a row of A; with a shared A, to that of its place in its
// expert.
struct Layer {
  Tensor a, bt, gates, owner;
  int64_t d_in, d_out, rows, a_rows;
  double scale;

  Layer(const Tensor& a_in, const Tensor& bt_in, const Tensor& owner, const Tensor& gates_in, double scale)
      : a(dense(checked(a_in, 2, "a"))), bt(dense(checked(bt_in, 2, "bt"))),
        gates(dense(checked(gates_in, 2, "gates"))), owner(owner), d_in(a.size(1)), d_out(bt.size(1)),
        rows(bt.size(0)), a_rows(a.size(0)), scale(scale) {
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

// Rows that an EXPAND sums at once. A group of the packed rows is left out whole or not at all; so rows keep their
// places in it, and a token's sums do not depend on which experts other tokens use.
inline int64_t summed_rows(Unit unit) { return unit == Unit::tiles ? kDepth : unit == Unit::pairs ? 2 : 1; }

// Rows before `first` take part only if they are live and `before`; rows from `first` on always where `dead`. In a
// live group of so many rows a live one with factor 0 stands for each dead one, which may hold NaN.
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

}  // namespace cram
