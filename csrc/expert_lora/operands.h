// What the products of the packed expert layer read and write: matrices, factors, and both as tiles take them.

#pragma once

#include "../tensors.h"
#include "crossovers.h"
#include "memory.h"
#include "products.h"
#include "tiles.h"

#include <cstring>
#include <vector>

namespace cram {

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

}  // namespace cram
