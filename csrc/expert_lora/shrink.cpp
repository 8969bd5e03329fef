// SHRINK in float32 lanes, for float32 and bfloat16 operands, on any machine.

#include "lanes.h"

#include <algorithm>
#include <type_traits>

namespace cram {
namespace {

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

// One token waits for memory, which serves eight rows side by side faster than four.
constexpr int kLonelyRows = 8;

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
  Vector<Lanes> total[Tokens][Rows];
  clear<Lanes>(total);
  for (int64_t d = 0; d < whole; d += 2 * Lanes) {
    for (int r = 0; next && r < Rows; ++r) {
      for (int ahead = 0; ahead < 2 * Lanes; ahead += kLine / sizeof(Next)) __builtin_prefetch(next[r] + d + ahead);
    }
    for (int part = 0; part < 2; ++part) {
      Vector<Lanes> row[Rows];
      for (int r = 0; r < Rows; ++r) row[r] = read_part<Lanes, Split>(w[r] + d, part);
      for (int i = 0; i < Tokens; ++i) {
        const Vector<Lanes> token = read_part<Lanes, Split>(x[i] + d, part);
        for (int r = 0; r < Rows; ++r) total[i][r] += token * row[r];
      }
    }
  }
  const int64_t rows = std::min<int64_t>(Rows, s.count - j);
  CRAM_UNROLL
  for (int i = 0; i < Tokens; ++i) {
    if (t + i == s.tokens) break;
    float* z = s.z + (t + i) * s.z_stride + j;
    float values[(Rows + 3) / 4 * 4];
    CRAM_UNROLL
    for (int r = 0; r < Rows; r += 4) {
      const Vector<Lanes>(&of)[Rows] = total[i];
      const int b = std::min(r + 1, Rows - 1), c = std::min(r + 2, Rows - 1), d = std::min(r + 3, Rows - 1);
      store<4>(values + r, sums<Lanes>(of[r], of[b], of[c], of[d]));
    }
    for (int r = 0; r < rows; ++r) z[r] = values[r];
  }
  for (int i = 0; whole < s.depth && i < Tokens && t + i < s.tokens; ++i) {
    for (int r = 0; r < rows; ++r) {
      float* z = s.z + (t + i) * s.z_stride + j + r;
      for (int64_t d = whole; d < s.depth; ++d) *z += widen(x[i][d]) * widen(w[r][d]);
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

// Whole groups of rows for the only token; returns the rows done.
template <int Lanes, bool Split, typename X, typename W>
CRAM_INLINE int64_t shrink_lonely(const Shrink& s) {
  int64_t j = 0;
  for (; j + kLonelyRows <= s.count; j += kLonelyRows) {
    const RowGroup<W, kLonelyRows> group(s, j);
    const W* const* next = j + kLonelyRows < s.count ? group.next : nullptr;
    shrink_tile<Lanes, Split, X, W, W, 1, kLonelyRows>(s, 0, j, group.row, next);
  }
  return j;
}

// Where many tokens meet many rows, `Widened`, bfloat16 values are widened once.
template <int Lanes, bool Split, typename X, typename W, bool Widened>
CRAM_INLINE void shrink_groups(const Shrink& s) {
  constexpr int kRows = kShrinkRows<Lanes>;
  float* const memory = Widened ? kept<Use::rows>(kRows * s.depth) : nullptr;
  int64_t j = 0;
  if constexpr (!Widened) {
    if (s.tokens == 1) j = shrink_lonely<Lanes, Split, X, W>(s);
  }
  for (; j < s.count; j += kRows) {
    const RowGroup<W, kRows> group(s, j);
    const W* const* next = j + kRows < s.count ? group.next : nullptr;
    if constexpr (Widened && std::is_same_v<W, Half>) {
      const float* wide[kRows];
      for (int r = 0; r < kRows; ++r) {
        widen_row<Lanes, Split>(group.row[r], s.depth, memory + r * s.depth);
        wide[r] = memory + r * s.depth;
      }
      shrink_tokens<Lanes, Split, X, float, W, kRows>(s, j, wide, next);
    } else {
      shrink_tokens<Lanes, Split, X, W, W, kRows>(s, j, group.row, next);
    }
  }
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
  float* const memory = kept<Use::tokens>(s.tokens * s.depth);
  const auto widen_tokens = half_w ? split_best() : widened_best();
  for (int64_t t = 0; t < s.tokens; ++t) {
    widen_tokens(static_cast<const Half*>(s.x) + t * s.x_stride, s.depth, memory + t * s.depth);
  }
  Shrink wide = s;
  wide.x = memory;
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

}  // namespace

ShrinkTile wide_shrink(bool half_x, bool half_w) {
  if (half_x) return half_w ? shrink_half_rows : shrink_half_x;
  return half_w ? shrink_half_w : shrink_float_float_best();
}

}  // namespace cram
