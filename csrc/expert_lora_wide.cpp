// SHRINK and EXPAND in float32 lanes, for float32 and bfloat16 operands, on any machine.

#include "expert_lora.h"
#include "vector.h"

#include <algorithm>
#include <type_traits>
#include <vector>

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

// Two bfloat16 in a word become float32 by a shift and a mask, at a third of the price of widening them in order. So
// where both factors of a product are bfloat16, each 2 * Lanes values are taken as those in even places, then those in
// odd places. Part 0 or 1 of such a block; of float32, which is in the order wanted, one half after the other.
template <int Lanes, bool Split>
CRAM_INLINE Vector<Lanes> read_part(const float* from, int part) {
  return load<Lanes>(from + part * Lanes);
}

template <int Lanes, bool Split>
CRAM_INLINE Vector<Lanes> read_part(const Half* from, int part) {
  if (!Split) return read<Lanes>(from + part * Lanes);
  Words<Lanes> pairs;
  std::memcpy(&pairs, from, sizeof(pairs));
  const Words<Lanes> bits = part ? pairs & 0xffff0000u : pairs << 16;
  Vector<Lanes> wide;
  std::memcpy(&wide, &bits, sizeof(wide));
  return wide;
}

// One row in float32, in the order of its parts.
template <int Lanes, bool Split>
CRAM_INLINE void widen_row(const Half* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + 2 * Lanes <= count; i += 2 * Lanes) {
    for (int part = 0; part < 2; ++part) store<Lanes>(to + i + part * Lanes, read_part<Lanes, Split>(from + i, part));
  }
  for (; i < count; ++i) to[i] = widen(from[i]);
}

// A register file of 16 holds 4 x 3 sums, three rows and a token; one of 32 holds 4 x 4.
template <int Lanes>
constexpr int kShrinkRows = Lanes >= 16 ? 4 : 3;

// Rows of w that a tile reads, and those of the next one, whose lines it may ask for: each row starts where no
// prefetcher has been. Rows past the end repeat the last one and are not stored.
template <typename W, int Rows>
struct RowGroup {
  const W *row[Rows], *next[Rows];

  RowGroup(const Shrink& s, int64_t j) {
    for (int r = 0; r < Rows; ++r) {
      row[r] = static_cast<const W*>(s.w) + s.rows[std::min<int64_t>(j + r, s.count - 1)] * s.w_stride;
      next[r] = static_cast<const W*>(s.w) + s.rows[std::min<int64_t>(j + Rows + r, s.count - 1)] * s.w_stride;
    }
  }
};

// Tokens past the end repeat the last one and are not stored. `next` is null where nothing is asked for.
template <int Lanes, bool Split, typename X, typename W, typename Next, int Tokens, int Rows>
CRAM_INLINE void shrink_tile(const Shrink& s, int64_t t, int64_t j, const W* const* w, const Next* const* next) {
  const X* x[Tokens];
  for (int i = 0; i < Tokens; ++i) {
    x[i] = static_cast<const X*>(s.x) + std::min<int64_t>(t + i, s.tokens - 1) * s.x_stride;
  }
  const int64_t whole = s.depth - s.depth % (2 * Lanes);
  Vector<Lanes> total[Tokens][Rows]{};
  for (int64_t d = 0; d < whole; d += 2 * Lanes) {
    for (int r = 0; next && r < Rows; ++r) __builtin_prefetch(next[r] + d);
    for (int part = 0; part < 2; ++part) {
      Vector<Lanes> row[Rows];
      for (int r = 0; r < Rows; ++r) row[r] = read_part<Lanes, Split>(w[r] + d, part);
      for (int i = 0; i < Tokens; ++i) {
        const Vector<Lanes> token = read_part<Lanes, Split>(x[i] + d, part);
        for (int r = 0; r < Rows; ++r) total[i][r] += token * row[r];
      }
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

template <int Lanes, bool Split, typename X, typename W, typename Next, int Rows>
CRAM_INLINE void shrink_tokens(const Shrink& s, int64_t j, const W* const* w, const Next* const* next) {
  const Next* const* none = nullptr;
  int64_t t = 0;
  for (; t + 4 < s.tokens; t += 4) shrink_tile<Lanes, Split, X, W, Next, 4, Rows>(s, t, j, w, none);
  if (t + 2 < s.tokens) {
    shrink_tile<Lanes, Split, X, W, Next, 4, Rows>(s, t, j, w, next);
  } else if (t + 1 < s.tokens) {
    shrink_tile<Lanes, Split, X, W, Next, 2, Rows>(s, t, j, w, next);
  } else {
    shrink_tile<Lanes, Split, X, W, Next, 1, Rows>(s, t, j, w, next);
  }
}

// Where many tokens meet many rows, `Widened`, bfloat16 values are widened once.
template <int Lanes, bool Split, typename X, typename W, bool Widened>
CRAM_INLINE void shrink_groups(const Shrink& s) {
  constexpr int kRows = kShrinkRows<Lanes>;
  static thread_local std::vector<float> memory;
  if (Widened) memory.resize(kRows * s.depth);
  for (int64_t j = 0; j < s.count; j += kRows) {
    const RowGroup<W, kRows> group(s, j);
    const W* const* next = j + kRows < s.count ? group.next : nullptr;
    if constexpr (Widened && std::is_same_v<W, Half>) {
      const float* wide[kRows];
      for (int r = 0; r < kRows; ++r) {
        widen_row<Lanes, Split>(group.row[r], s.depth, memory.data() + r * s.depth);
        wide[r] = memory.data() + r * s.depth;
      }
      shrink_tokens<Lanes, Split, X, float, W, kRows>(s, j, wide, next);
    } else {
      shrink_tokens<Lanes, Split, X, W, W, kRows>(s, j, group.row, next);
    }
  }
}

// Columns of an EXPAND tile are so many vectors: a register file of 16 holds 6 x 2 sums, a row's part and a factor.
template <int Lanes>
constexpr int kExpandVectors = Lanes >= 16 ? 4 : 2;

// Rows of w are summed a chunk at a time, so that a packed chunk stays in the second-level cache.
constexpr int64_t kChunk = 256;

// Vectors of a row that are packed together. Rows whose distance is a power of two compete for the same lines of the
// first-level cache, so a short piece of each would be fetched again for every next piece.
template <int Lanes>
constexpr int kPackedVectors = Lanes >= 16 ? 4 : 16;

struct Chunk {
  int64_t begin, end;
};

// `packed` holds the chunk's rows if they were written there before. Sums go on top of y where `add`.
template <int Lanes, typename W, typename Y, int Tokens, int Vectors>
CRAM_INLINE void expand_tile(const Expand& e, int64_t t, int64_t c, Chunk chunk, bool add, const float* packed) {
  const float* u = static_cast<const float*>(e.u) + panel_index(t, 0, e.count, false);
  Vector<Lanes> total[Tokens][Vectors]{};
  for (int i = 0; i < Tokens; ++i) {
    const int64_t row = std::min<int64_t>(t + i, e.tokens - 1) * e.y_stride;
    for (int v = 0; v < Vectors; ++v) __builtin_prefetch(static_cast<const Y*>(e.y) + row + c + v * Lanes, 1);
  }
  for (int64_t k = chunk.begin; k < chunk.end; ++k) {
    Vector<Lanes> row[Vectors];
    for (int v = 0; v < Vectors; ++v) {
      if (packed) {
        row[v] = load<Lanes>(packed + ((k - chunk.begin) * Vectors + v) * Lanes);
      } else {
        const W* at = static_cast<const W*>(e.w) + e.rows[k] * e.w_stride + c + v * Lanes;
        row[v] = read<Lanes>(at);
        __builtin_prefetch(at + Vectors * Lanes);
      }
    }
    for (int i = 0; i < Tokens; ++i) {
      for (int v = 0; v < Vectors; ++v) total[i][v] += u[k * kPanel + i] * row[v];
    }
  }
  for (int i = 0; i < Tokens && t + i < e.tokens; ++i) {
    Y* y = static_cast<Y*>(e.y) + (t + i) * e.y_stride + c;
    for (int v = 0; v < Vectors; ++v) {
      const Vector<Lanes> before = add ? read<Lanes>(y + v * Lanes) : Vector<Lanes>{};
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
CRAM_INLINE void expand_tokens(const Expand& e, int64_t c, Chunk chunk, bool add, const float* packed) {
  for (int64_t t = 0; t < e.tokens; t += kPanel) {
    if (e.tokens - t > kPanel / 2) {
      expand_tile<Lanes, W, Y, kPanel, Vectors>(e, t, c, chunk, add, packed);
    } else {
      expand_tile<Lanes, W, Y, kPanel / 2, Vectors>(e, t, c, chunk, add, packed);
    }
  }
}

// `Groups` tiles side by side. More tokens than a tile has read the rows packed.
template <int Lanes, typename W, typename Y, int Vectors, int Groups>
CRAM_INLINE void expand_columns(const Expand& e, int64_t c, Chunk chunk, bool add) {
  constexpr int kWidth = Vectors * Lanes;
  if (e.tokens <= kPanel) {
    for (int g = 0; g < Groups; ++g) expand_tokens<Lanes, W, Y, Vectors>(e, c + g * kWidth, chunk, add, nullptr);
    return;
  }
  static thread_local float packed[kChunk * kPackedVectors<Lanes> * Lanes];
  const int64_t rows = chunk.end - chunk.begin;
  for (int64_t k = 0; k < rows; ++k) {
    const W* at = static_cast<const W*>(e.w) + e.rows[chunk.begin + k] * e.w_stride + c;
    for (int v = 0; v < Vectors * Groups; ++v) {
      store<Lanes>(packed + ((v / Vectors * rows + k) * Vectors + v % Vectors) * Lanes, read<Lanes>(at + v * Lanes));
      __builtin_prefetch(at + (Vectors * Groups + v) * Lanes);
    }
  }
  for (int g = 0; g < Groups; ++g) {
    expand_tokens<Lanes, W, Y, Vectors>(e, c + g * kWidth, chunk, add, packed + g * rows * kWidth);
  }
}

template <int Lanes, typename W, typename Y>
CRAM_INLINE void expand_chunk(const Expand& e, Chunk chunk, bool add) {
  constexpr int kVectors = kExpandVectors<Lanes>, kGroups = kPackedVectors<Lanes> / kVectors;
  int64_t c = 0;
  if (e.tokens == 1) {
    for (; c + 8 * Lanes <= e.columns; c += 8 * Lanes) {
      expand_tile<Lanes, W, Y, 1, 8>(e, 0, c, chunk, add, nullptr);
    }
  }
  for (; c + kPackedVectors<Lanes> * Lanes <= e.columns; c += kPackedVectors<Lanes> * Lanes) {
    expand_columns<Lanes, W, Y, kVectors, kGroups>(e, c, chunk, add);
  }
  for (; c + 2 * Lanes <= e.columns; c += 2 * Lanes) expand_columns<Lanes, W, Y, 2, 1>(e, c, chunk, add);
  for (; c + Lanes <= e.columns; c += Lanes) expand_columns<Lanes, W, Y, 1, 1>(e, c, chunk, add);
}

template <int Lanes, typename W, typename Y>
CRAM_INLINE void expand_chunks(const Expand& e) {
  for (int64_t k = 0; k == 0 || k < e.count; k += kChunk) {
    expand_chunk<Lanes, W, Y>(e, {k, std::min(e.count, k + kChunk)}, e.add || k);
  }
  for (int64_t c = e.columns - e.columns % Lanes; c < e.columns; ++c) expand_column<W, Y>(e, c);
}

#define CRAM_SHRINK(name, Split, X, W, Widened)                        \
  template <int Lanes>                                                 \
  CRAM_INLINE void name##_body(const Shrink& s) {                      \
    shrink_groups<Lanes, Split, X, W, Widened>(s);                     \
  }                                                                    \
  CRAM_FOR_EACH_TARGET(name, name##_body, (const Shrink& s), (s))

CRAM_SHRINK(shrink_float_float, false, float, float, false)
CRAM_SHRINK(shrink_float_half, false, float, Half, false)
CRAM_SHRINK(shrink_half_float, false, Half, float, false)
CRAM_SHRINK(shrink_half_half, true, Half, Half, false)
CRAM_SHRINK(shrink_many_float_half, false, float, Half, true)
CRAM_SHRINK(shrink_many_split_half, true, float, Half, true)

template <int Lanes>
CRAM_INLINE void widen_body(const Half* from, int64_t count, float* to) {
  widen_row<Lanes, false>(from, count, to);
}

template <int Lanes>
CRAM_INLINE void split_body(const Half* from, int64_t count, float* to) {
  widen_row<Lanes, true>(from, count, to);
}

CRAM_FOR_EACH_TARGET(widened, widen_body, (const Half* from, int64_t count, float* to), (from, count, to))
CRAM_FOR_EACH_TARGET(split, split_body, (const Half* from, int64_t count, float* to), (from, count, to))

// Where many tokens meet many rows each value is widened once, else wherever it is read.
bool is_many(const Shrink& s) { return s.tokens >= 8 && s.count >= 8; }

void shrink_wide_x(const Shrink& s, bool half_w) {
  static thread_local std::vector<float> memory;
  memory.resize(s.tokens * s.depth);
  const auto widen_tokens = half_w ? split_best() : widened_best();
  for (int64_t t = 0; t < s.tokens; ++t) {
    widen_tokens(static_cast<const Half*>(s.x) + t * s.x_stride, s.depth, memory.data() + t * s.depth);
  }
  Shrink wide = s;
  wide.x = memory.data();
  wide.x_stride = s.depth;
  (half_w ? shrink_many_split_half_best() : shrink_float_float_best())(wide);
}

void shrink_half_rows(const Shrink& s) {
  is_many(s) ? shrink_wide_x(s, true) : shrink_half_half_best()(s);
}

void shrink_half_x(const Shrink& s) {
  is_many(s) ? shrink_wide_x(s, false) : shrink_half_float_best()(s);
}

void shrink_half_w(const Shrink& s) {
  (is_many(s) ? shrink_many_float_half_best() : shrink_float_half_best())(s);
}

#define CRAM_EXPAND(name, W, Y)                                        \
  template <int Lanes>                                                 \
  CRAM_INLINE void name##_body(const Expand& e) {                      \
    expand_chunks<Lanes, W, Y>(e);                                     \
  }                                                                    \
  CRAM_FOR_EACH_TARGET(name, name##_body, (const Expand& e), (e))

CRAM_EXPAND(expand_float_float, float, float)
CRAM_EXPAND(expand_float_half, float, Half)
CRAM_EXPAND(expand_half_float, Half, float)
CRAM_EXPAND(expand_half_half, Half, Half)

// A bfloat16 y is rounded once, also where the rows are more than a chunk.
void expand_rounded(const Expand& e, ExpandTile narrow_tile, ExpandTile wide_tile) {
  if (e.count <= kChunk) return narrow_tile(e);
  static thread_local std::vector<float> memory;
  memory.resize(e.tokens * e.columns);
  Expand sums = e;
  sums.y = memory.data();
  sums.y_stride = e.columns;
  sums.add = false;
  wide_tile(sums);
  for (int64_t t = 0; t < e.tokens; ++t) {
    Half* y = static_cast<Half*>(e.y) + t * e.y_stride;
    const float* sum = memory.data() + t * e.columns;
    for (int64_t c = 0; c < e.columns; ++c) narrow((e.add ? widen(y[c]) : 0.0f) + sum[c], y + c);
  }
}

void expand_float_rounded(const Expand& e) { expand_rounded(e, expand_float_half_best(), expand_float_float_best()); }

void expand_half_rounded(const Expand& e) { expand_rounded(e, expand_half_half_best(), expand_half_float_best()); }

}  // namespace

ShrinkTile wide_shrink(bool half_x, bool half_w) {
  if (half_x) return half_w ? shrink_half_rows : shrink_half_x;
  return half_w ? shrink_half_w : shrink_float_float_best();
}

ExpandTile wide_expand(bool half_w, bool half_y) {
  if (half_w) return half_y ? expand_half_rounded : expand_half_float_best();
  return half_y ? expand_float_rounded : expand_float_float_best();
}

}  // namespace cram
