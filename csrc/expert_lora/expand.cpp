// EXPAND in float32 lanes, for float32 and bfloat16 operands, on any machine.

#include "lanes.h"

#include <algorithm>

namespace cram {
namespace {

// Columns of an EXPAND tile are so many vectors: a register file of 16 holds 6 x 2 sums, a row's part and a factor.
template <int Lanes>
constexpr int kExpandVectors = Lanes >= 16 ? 4 : 2;

// Rows of w are summed a chunk at a time, so that a packed chunk stays in the second-level cache.
constexpr int64_t kChunk = 256;

// Vectors of a row that are packed together. Rows whose distance is a power of two compete for the same lines of the
// first-level cache, so a short piece of each would be fetched again for every next piece.
template <int Lanes>
constexpr int kPackedVectors = Lanes >= 16 ? 4 : 16;

// One for all instruction sets and types of a thread.
float* packed_memory() {
  alignas(64) static thread_local float memory[kChunk * 16 * 8];
  return memory;
}

// Chunks from the second on go on with the sums that the one before left in y. So a sum does not depend on where chunks
// begin, and rows that only other tokens use do not change it.
struct Chunk {
  int64_t begin, end;
};

// `packed` holds the chunk's rows if they were written there before.
template <int Lanes, typename W, typename Y, int Tokens, int Vectors>
CRAM_INLINE void expand_tile(const Expand& e, int64_t t, int64_t c, Chunk chunk, const float* packed) {
  const float* u = static_cast<const float*>(e.u) + panel_index(t, 0, e.count, false);
  Vector<Lanes> total[Tokens][Vectors];
  clear<Lanes>(total);
  for (int i = 0; i < Tokens; ++i) {
    const Y* y = static_cast<const Y*>(e.y) + std::min<int64_t>(t + i, e.tokens - 1) * e.y_stride + c;
    for (int v = 0; v < Vectors; ++v) {
      if (chunk.begin) {
        total[i][v] = read<Lanes>(y + v * Lanes);
      } else {
        __builtin_prefetch(y + v * Lanes, 1);
      }
    }
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
CRAM_INLINE void expand_tokens(const Expand& e, int64_t c, Chunk chunk, const float* packed) {
  for (int64_t t = 0; t < e.tokens; t += kPanel) {
    if (e.tokens - t > kPanel / 2) {
      expand_tile<Lanes, W, Y, kPanel, Vectors>(e, t, c, chunk, packed);
    } else {
      expand_tile<Lanes, W, Y, kPanel / 2, Vectors>(e, t, c, chunk, packed);
    }
  }
}

// `Groups` tiles side by side. More tokens than a tile has read the rows packed.
template <int Lanes, typename W, typename Y, int Vectors, int Groups>
CRAM_INLINE void expand_columns(const Expand& e, int64_t c, Chunk chunk) {
  constexpr int kWidth = Vectors * Lanes;
  if (e.tokens <= kPanel) {
    for (int g = 0; g < Groups; ++g) expand_tokens<Lanes, W, Y, Vectors>(e, c + g * kWidth, chunk, nullptr);
    return;
  }
  float* const packed = packed_memory();
  const int64_t rows = chunk.end - chunk.begin;
  for (int64_t k = 0; k < rows; ++k) {
    const W* at = static_cast<const W*>(e.w) + e.rows[chunk.begin + k] * e.w_stride + c;
    for (int v = 0; v < Vectors * Groups; ++v) {
      store<Lanes>(packed + ((v / Vectors * rows + k) * Vectors + v % Vectors) * Lanes, read<Lanes>(at + v * Lanes));
      __builtin_prefetch(at + (Vectors * Groups + v) * Lanes);
    }
  }
  for (int g = 0; g < Groups; ++g) {
    expand_tokens<Lanes, W, Y, Vectors>(e, c + g * kWidth, chunk, packed + g * rows * kWidth);
  }
}

// `Rows` rows from k on, added to the sums of the only token for columns [c, c + width). A row starts where no
// prefetcher has been.
template <int Lanes, typename W, int Rows>
CRAM_INLINE void add_rows(const Expand& e, int64_t k, int64_t last, int64_t c, int64_t width, float* sums) {
  const float* u = static_cast<const float*>(e.u);
  const W *row[Rows], *next[Rows];
  for (int r = 0; r < Rows; ++r) {
    row[r] = static_cast<const W*>(e.w) + e.rows[k + r] * e.w_stride + c;
    next[r] = static_cast<const W*>(e.w) + e.rows[std::min(k + Rows + r, last)] * e.w_stride + c;
  }
  for (int64_t i = 0; i < width; i += Lanes) {
    Vector<Lanes> total = load<Lanes>(sums + i);
    for (int r = 0; r < Rows; ++r) {
      __builtin_prefetch(next[r] + i);
      total += u[(k + r) * kPanel] * read<Lanes>(row[r] + i);
    }
    store<Lanes>(sums + i, total);
  }
}

// All vectors of the only token. Eight rows are read side by side in runs as long as the sums allow that stay in the
// first-level cache.
template <int Lanes, typename W, typename Y>
CRAM_INLINE void expand_lonely(const Expand& e, Chunk chunk) {
  constexpr int64_t kRun = 1024;
  constexpr int kRows = 8;
  alignas(kLine) float sums[kRun];
  Y* const y = static_cast<Y*>(e.y);
  const int64_t whole = e.columns - e.columns % Lanes;
  for (int64_t c = 0; c < whole; c += kRun) {
    const int64_t width = std::min(kRun, whole - c);
    for (int64_t i = 0; i < width; i += Lanes) {
      store<Lanes>(sums + i, chunk.begin ? read<Lanes>(y + c + i) : Vector<Lanes>{});
    }
    int64_t k = chunk.begin;
    for (; k + kRows <= chunk.end; k += kRows) add_rows<Lanes, W, kRows>(e, k, chunk.end - 1, c, width, sums);
    for (; k < chunk.end; ++k) add_rows<Lanes, W, 1>(e, k, chunk.end - 1, c, width, sums);
    for (int64_t i = 0; i < width; i += Lanes) {
      const Vector<Lanes> before = e.add ? read<Lanes>(y + c + i) : Vector<Lanes>{};
      write<Lanes>(y + c + i, before + load<Lanes>(sums + i));
    }
  }
}

template <int Lanes, typename W, typename Y>
CRAM_INLINE void expand_chunk(const Expand& e, Chunk chunk) {
  constexpr int kVectors = kExpandVectors<Lanes>, kGroups = kPackedVectors<Lanes> / kVectors;
  if (e.tokens == 1) return expand_lonely<Lanes, W, Y>(e, chunk);
  int64_t c = 0;
  for (; c + kPackedVectors<Lanes> * Lanes <= e.columns; c += kPackedVectors<Lanes> * Lanes) {
    expand_columns<Lanes, W, Y, kVectors, kGroups>(e, c, chunk);
  }
  for (; c + 2 * Lanes <= e.columns; c += 2 * Lanes) expand_columns<Lanes, W, Y, 2, 1>(e, c, chunk);
  for (; c + Lanes <= e.columns; c += Lanes) expand_columns<Lanes, W, Y, 1, 1>(e, c, chunk);
}

template <int Lanes, typename W, typename Y>
CRAM_INLINE void expand_chunks(const Expand& e) {
  for (int64_t k = 0; k == 0 || k < e.count; k += kChunk) {
    expand_chunk<Lanes, W, Y>(e, {k, std::min(e.count, k + kChunk)});
  }
  for (int64_t c = e.columns - e.columns % Lanes; c < e.columns; ++c) expand_column<W, Y>(e, c);
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

// More rows than a chunk are summed in memory of their own where y holds something already, or would round the sums
// between chunks.
template <typename Y>
void expand_long(const Expand& e, ExpandTile tile, ExpandTile wide_tile) {
  if (e.count <= kChunk) return tile(e);
  float* const memory = kept<Use::sums>(e.tokens * e.columns);
  Expand sums = e;
  sums.y = memory;
  sums.y_stride = e.columns;
  sums.add = false;
  wide_tile(sums);
  for (int64_t t = 0; t < e.tokens; ++t) {
    Y* y = static_cast<Y*>(e.y) + t * e.y_stride;
    const float* sum = memory + t * e.columns;
    for (int64_t c = 0; c < e.columns; ++c) narrow((e.add ? widen(y[c]) : 0.0f) + sum[c], y + c);
  }
}

void expand_float(const Expand& e) { expand_long<float>(e, expand_float_float_best(), expand_float_float_best()); }

void expand_half(const Expand& e) { expand_long<float>(e, expand_half_float_best(), expand_half_float_best()); }

void expand_float_rounded(const Expand& e) {
  expand_long<Half>(e, expand_float_half_best(), expand_float_float_best());
}

void expand_half_rounded(const Expand& e) { expand_long<Half>(e, expand_half_half_best(), expand_half_float_best()); }

}  // namespace

ExpandTile wide_expand(bool half_w, bool half_y) {
  if (half_w) return half_y ? expand_half_rounded : expand_half;
  return half_y ? expand_float_rounded : expand_float;
}

}  // namespace cram
