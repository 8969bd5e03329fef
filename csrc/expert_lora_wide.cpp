// SHRINK and EXPAND in float32 lanes, for float32 and bfloat16 operands, on any machine.

#include "expert_lora.h"
#include "vector.h"

#include <algorithm>

namespace cram {
namespace {

template <int Lanes>
struct Integer {
  typedef Half Halves __attribute__((vector_size(Lanes * sizeof(Half))));
  typedef uint32_t Words __attribute__((vector_size(Lanes * sizeof(uint32_t))));
};

template <int Lanes>
using Halves = typename Integer<Lanes>::Halves;

template <int Lanes>
using Words = typename Integer<Lanes>::Words;

template <int Lanes>
CRAM_INLINE Vector<Lanes> read(const float* from) {
  return load<Lanes>(from);
}

template <int Lanes>
CRAM_INLINE Vector<Lanes> read(const Half* from) {
  Halves<Lanes> halves;
  std::memcpy(&halves, from, sizeof(halves));
  const Words<Lanes> bits = __builtin_convertvector(halves, Words<Lanes>) << 16;
  Vector<Lanes> wide;
  std::memcpy(&wide, &bits, sizeof(wide));
  return wide;
}

template <int Lanes>
CRAM_INLINE void write(float* to, const Vector<Lanes>& value) {
  store<Lanes>(to, value);
}

template <int Lanes>
CRAM_INLINE void write(Half* to, const Vector<Lanes>& value) {
  Words<Lanes> bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const Words<Lanes> rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Words<Lanes> number = value == value ? rounded : Words<Lanes>{} + 0x7fc0;
  const Halves<Lanes> halves = __builtin_convertvector(number, Halves<Lanes>);
  std::memcpy(to, &halves, sizeof(halves));
}

// Rows and tokens past the end of a tile repeat the last one and are not stored. The last tile of a group of rows asks
// for the next group's lines: each row starts where no prefetcher has been.
template <int Lanes, typename X, typename W, int Tokens, int Rows>
CRAM_INLINE void shrink_tile(const Shrink& s, int64_t t, int64_t j) {
  const X* x[Tokens];
  const W *w[Rows], *next[Rows];
  const bool ahead = t + Tokens >= s.tokens && j + Rows < s.count;
  for (int i = 0; i < Tokens; ++i) {
    x[i] = static_cast<const X*>(s.x) + std::min<int64_t>(t + i, s.tokens - 1) * s.x_stride;
  }
  for (int r = 0; r < Rows; ++r) {
    w[r] = static_cast<const W*>(s.w) + s.rows[std::min<int64_t>(j + r, s.count - 1)] * s.w_stride;
    next[r] = static_cast<const W*>(s.w) + s.rows[std::min<int64_t>(j + Rows + r, s.count - 1)] * s.w_stride;
  }
  const int64_t whole = s.depth - s.depth % Lanes;
  Vector<Lanes> total[Tokens][Rows]{};
  for (int64_t d = 0; d < whole; d += Lanes) {
    Vector<Lanes> row[Rows];
    for (int r = 0; r < Rows; ++r) row[r] = read<Lanes>(w[r] + d);
    for (int r = 0; ahead && r < Rows; ++r) __builtin_prefetch(next[r] + d);
    for (int i = 0; i < Tokens; ++i) {
      const Vector<Lanes> token = read<Lanes>(x[i] + d);
      for (int r = 0; r < Rows; ++r) total[i][r] += token * row[r];
    }
  }
  for (int i = 0; i < Tokens && t + i < s.tokens; ++i) {
    for (int r = 0; r < Rows && j + r < s.count; ++r) {
      float value = sum<Lanes>(total[i][r]);
      for (int64_t d = whole; d < s.depth; ++d) value += widen(x[i][d]) * widen(w[r][d]);
      s.z[(t + i) * s.z_stride + j + r] = value;
    }
  }
}

template <int Lanes, typename X, typename W>
CRAM_INLINE void shrink_rows(const Shrink& s) {
  constexpr int kRows = 4, kTokens = Lanes >= 16 ? 4 : 2;
  for (int64_t j = 0; j < s.count; j += kRows) {
    int64_t t = 0;
    for (; t + 1 < s.tokens; t += kTokens) shrink_tile<Lanes, X, W, kTokens, kRows>(s, t, j);
    if (t < s.tokens) shrink_tile<Lanes, X, W, 1, kRows>(s, t, j);
  }
}

// Row k at the tile's columns. The lines that the next columns need are asked for.
template <int Lanes, typename W, int Vectors>
CRAM_INLINE void read_row(const Expand& e, int64_t k, int64_t c, bool ahead, Vector<Lanes>* row) {
  const W* at = static_cast<const W*>(e.w) + e.rows[k] * e.w_stride + c;
  for (int v = 0; v < Vectors; ++v) {
    row[v] = read<Lanes>(at + v * Lanes);
    if (ahead) __builtin_prefetch(at + (Vectors + v) * Lanes);
  }
}

// `packed` holds the rows if they were written there before.
template <int Lanes, typename W, typename Y, int Tokens, int Vectors>
CRAM_INLINE void expand_tile(const Expand& e, int64_t t, int64_t c, const Vector<Lanes>* packed) {
  const float* u = static_cast<const float*>(e.u) + panel_index(t, 0, e.count, false);
  Vector<Lanes> total[Tokens][Vectors]{};
  for (int i = 0; i < Tokens; ++i) {
    const int64_t row = std::min<int64_t>(t + i, e.tokens - 1) * e.y_stride;
    for (int v = 0; v < Vectors; ++v) __builtin_prefetch(static_cast<const Y*>(e.y) + row + c + v * Lanes, 1);
  }
  for (int64_t k = 0; k < e.count; ++k) {
    Vector<Lanes> row[Vectors];
    if (packed) {
      for (int v = 0; v < Vectors; ++v) row[v] = packed[k * Vectors + v];
    } else {
      read_row<Lanes, W, Vectors>(e, k, c, t == 0, row);
    }
    for (int i = 0; i < Tokens; ++i) {
      for (int v = 0; v < Vectors; ++v) total[i][v] += u[k * kPanel + i] * row[v];
    }
  }
  for (int i = 0; i < Tokens && t + i < e.tokens; ++i) {
    Y* y = static_cast<Y*>(e.y) + (t + i) * e.y_stride + c;
    for (int v = 0; v < Vectors; ++v) {
      const Vector<Lanes> before = e.add ? read<Lanes>(y + v * Lanes) : Vector<Lanes>{};
      write<Lanes>(y + v * Lanes, before + total[i][v]);
    }
  }
}

// A column that fills no vector.
template <typename W, typename Y>
CRAM_INLINE void expand_column(const Expand& e, int64_t c) {
  const W* w = static_cast<const W*>(e.w) + c;
  for (int64_t t = 0; t < e.tokens; ++t) {
    const float* u = static_cast<const float*>(e.u) + panel_index(t, 0, e.count, false);
    Y* y = static_cast<Y*>(e.y) + t * e.y_stride + c;
    float total = 0;
    for (int64_t k = 0; k < e.count; ++k) total += u[k * kPanel] * widen(w[e.rows[k] * e.w_stride]);
    narrow((e.add ? widen(*y) : 0.0f) + total, y);
  }
}

template <int Lanes, typename W, typename Y, int Vectors>
CRAM_INLINE void expand_columns(const Expand& e, int64_t c) {
  // Rows whose distance is a power of two compete for the same lines of the cache: read them once.
  constexpr int64_t kPacked = 256;
  Vector<Lanes> memory[kPacked * Vectors];
  const Vector<Lanes>* packed = nullptr;
  if (e.tokens > kPanel && e.count <= kPacked) {
    for (int64_t k = 0; k < e.count; ++k) read_row<Lanes, W, Vectors>(e, k, c, true, memory + k * Vectors);
    packed = memory;
  }
  constexpr int kMost = Lanes >= 16 ? kPanel : kPanel / 2;
  for (int64_t t = 0; t < e.tokens;) {
    if (e.tokens - t > kPanel / 2 && t % kPanel == 0) {
      expand_tile<Lanes, W, Y, kMost, Vectors>(e, t, c, packed);
      t += kMost;
    } else {
      expand_tile<Lanes, W, Y, kPanel / 2, Vectors>(e, t, c, packed);
      t += kPanel / 2;
    }
  }
}

template <int Lanes, typename W, typename Y>
CRAM_INLINE void expand_rows(const Expand& e) {
  int64_t c = 0;
  if (e.tokens == 1) {
    for (; c + 8 * Lanes <= e.columns; c += 8 * Lanes) expand_tile<Lanes, W, Y, 1, 8>(e, 0, c, nullptr);
  }
  for (; Lanes >= 16 && c + 4 * Lanes <= e.columns; c += 4 * Lanes) expand_columns<Lanes, W, Y, 4>(e, c);
  for (; c + 2 * Lanes <= e.columns; c += 2 * Lanes) expand_columns<Lanes, W, Y, 2>(e, c);
  for (; c + Lanes <= e.columns; c += Lanes) expand_columns<Lanes, W, Y, 1>(e, c);
  for (; c < e.columns; ++c) expand_column<W, Y>(e, c);
}

#define CRAM_SHRINK(name, X, W)                                        \
  template <int Lanes>                                                 \
  CRAM_INLINE void name##_body(const Shrink& s) {                      \
    shrink_rows<Lanes, X, W>(s);                                       \
  }                                                                    \
  CRAM_FOR_EACH_TARGET(name, name##_body, (const Shrink& s), (s))

#define CRAM_EXPAND(name, W, Y)                                        \
  template <int Lanes>                                                 \
  CRAM_INLINE void name##_body(const Expand& e) {                      \
    expand_rows<Lanes, W, Y>(e);                                       \
  }                                                                    \
  CRAM_FOR_EACH_TARGET(name, name##_body, (const Expand& e), (e))

CRAM_SHRINK(shrink_float_float, float, float)
CRAM_SHRINK(shrink_float_half, float, Half)
CRAM_SHRINK(shrink_half_float, Half, float)
CRAM_SHRINK(shrink_half_half, Half, Half)
CRAM_EXPAND(expand_float_float, float, float)
CRAM_EXPAND(expand_float_half, float, Half)
CRAM_EXPAND(expand_half_float, Half, float)
CRAM_EXPAND(expand_half_half, Half, Half)

}  // namespace

ShrinkTile wide_shrink(bool half_x, bool half_w) {
  if (half_x) return half_w ? shrink_half_half_best() : shrink_half_float_best();
  return half_w ? shrink_float_half_best() : shrink_float_float_best();
}

ExpandTile wide_expand(bool half_w, bool half_y) {
  if (half_w) return half_y ? expand_half_half_best() : expand_half_float_best();
  return half_y ? expand_float_half_best() : expand_float_float_best();
}

}  // namespace cram
