#include "tiles.h"

#include "lanes.h"

#include <algorithm>

#if defined(CRAM_TILE_UNIT)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define CRAM_TILES __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")))
#else
#define CRAM_TILES
#endif

namespace cram {
namespace {

char* aligned(float* memory) {
  return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory) + 63) & ~uintptr_t{63});
}

}  // namespace

char* strip_memory(int64_t bytes) { return aligned(kept<Use::sums>(bytes / 4 + 16)); }

}  // namespace cram

#if defined(CRAM_TILE_UNIT) || defined(CRAM_TILE_MODEL)

namespace cram {
namespace {

#define CRAM_TILE_INLINE CRAM_TILES inline __attribute__((always_inline))

using Line = Words<16>;

CRAM_TILE_INLINE Line read_line(const void* from) {
  Line line;
  std::memcpy(&line, from, sizeof(line));
  return line;
}

CRAM_TILE_INLINE void write_line(void* to, const Line& line) { std::memcpy(to, &line, sizeof(line)); }

// Two vectors of floats as 32 bfloat16 in order.
CRAM_TILE_INLINE Line rounded(const Vector<16>& low, const Vector<16>& high) {
#if defined(CRAM_TILE_UNIT)
  return (Line)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
#else
  Line line;
  write<16>(reinterpret_cast<Half*>(&line), low);
  write<16>(reinterpret_cast<Half*>(&line) + 16, high);
  return line;
#endif
}

// Up to 32 values of a row as bfloat16, zeros behind them.
CRAM_TILE_INLINE Line read_values(const Half* from, int64_t count) {
  if (count >= kDepth) return read_line(from);
  Half values[kDepth] = {};
  std::memcpy(values, from, count * sizeof(Half));
  return read_line(values);
}

CRAM_TILE_INLINE Line read_values(const float* from, int64_t count) {
  if (count >= kDepth) return rounded(load<16>(from), load<16>(from + 16));
  float values[kDepth] = {};
  std::memcpy(values, from, count * sizeof(float));
  return rounded(load<16>(values), load<16>(values + 16));
}

template <class Value>
const Value* row_of(const Rows& rows, int64_t index) {
  return static_cast<const Value*>(rows.data) + (rows.listed ? rows.listed[index] : index) * rows.stride;
}

// One stage of a transposition: blocks of Step columns change places between rows at that distance.
template <int Step>
CRAM_TILE_INLINE void exchange(Line* row) {
  for (int i = 0; i < kTile; ++i) {
    if (i & Step) continue;
    const Line a = row[i], b = row[i + Step];
    if constexpr (Step == 1) {
      row[i] = __builtin_shufflevector(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
      row[i + Step] = __builtin_shufflevector(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
    } else if constexpr (Step == 2) {
      row[i] = __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
      row[i + Step] = __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    } else if constexpr (Step == 4) {
      row[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
      row[i + Step] = __builtin_shufflevector(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    } else {
      row[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
      row[i + Step] = __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    }
  }
}

CRAM_TILE_INLINE void transpose(Line* row) {
  exchange<1>(row);
  exchange<2>(row);
  exchange<4>(row);
  exchange<8>(row);
}

template <class Value>
CRAM_TILES void pack_rows_of(const Rows& w, int64_t depth, int64_t index, const Panels& to) {
  const int64_t first = index * kTile, count = std::min(kTile, w.count - first);
  const Value* row[kTile];
  for (int64_t r = 0; r < count; ++r) row[r] = row_of<Value>(w, first + r);
  for (int64_t step = 0; step < to.steps; ++step) {
    Line line[kTile];
    for (int64_t r = 0; r < kTile; ++r) {
      line[r] = r < count ? read_values(row[r] + step * kDepth, depth - step * kDepth) : Line{};
    }
    transpose(line);
    char* tile = to.tile(index, step);
    for (int64_t r = 0; r < kTile; ++r) write_line(tile + 64 * r, line[r]);
  }
}

// Columns of two rows, neighbours in depth, side by side.
CRAM_TILE_INLINE void interleave(const Line& even, const Line& odd, char* low, char* high) {
  Halves<16> values[4];
  std::memcpy(values, &even, sizeof(even));
  std::memcpy(values + 2, &odd, sizeof(odd));
  write_line(low, __builtin_convertvector(values[0], Line) | (__builtin_convertvector(values[2], Line) << 16));
  write_line(high, __builtin_convertvector(values[1], Line) | (__builtin_convertvector(values[3], Line) << 16));
}

constexpr int64_t kRowsAhead = 32;

// The depth [step * 32, ...) of one pair of tiles.
template <class Value>
CRAM_TILES void pack_pair(
    const Rows& w, int64_t column, int64_t left, int64_t step, bool both, char* to, bool ahead) {
  const int64_t tile = both ? kTileBytes : 0;
  char unused[64];
  for (int64_t k = 0; k < kDepth; k += 2) {
    Line line[2];
    for (int64_t i = 0; i < 2; ++i) {
      const int64_t index = step * kDepth + k + i;
      if (index >= w.count) {
        line[i] = Line{};
        continue;
      }
      const Value* from = row_of<Value>(w, index) + column;
      line[i] = read_values(from, left);
      if (ahead) __builtin_prefetch(from + kDepth);
    }
    interleave(line[0], line[1], to + 32 * k, both ? to + tile + 32 * k : unused);
  }
}

// Two rows of several pairs at a time, and the lines of the rows that come next asked for.
template <class Value>
CRAM_TILES void pack_columns_of(
    const Rows& w, int64_t column, int64_t columns, int64_t begin, int64_t end, const Panels& to) {
  const int64_t from_pair = begin / 2, to_pair = (end + 1) / 2;
  char unused[64];
  for (int64_t k = 0; k < to.steps * kDepth; k += 2) {
    const Value* row[2];
    const char* next[2];
    for (int64_t i = 0; i < 2; ++i) {
      row[i] = k + i < w.count ? row_of<Value>(w, k + i) + column : nullptr;
      next[i] = reinterpret_cast<const char*>(row_of<Value>(w, std::min(k + i + kRowsAhead, w.count - 1)) + column);
    }
    for (int64_t pair = from_pair; pair < to_pair; ++pair) {
      const int64_t at = pair * kDepth, left = columns - at;
      const bool both = to.width(pair) == 2;
      char* tile = to.pair(pair) + k / kDepth * (both ? 2 : 1) * kTileBytes + k % kDepth * 32;
      const Line even = row[0] ? read_values(row[0] + at, left) : Line{};
      const Line odd = row[1] ? read_values(row[1] + at, left) : Line{};
      for (int64_t i = 0; i < 2; ++i) __builtin_prefetch(next[i] + at * sizeof(Value));
      interleave(even, odd, tile, both ? tile + kTileBytes : unused);
    }
  }
}

// Four rows at a time, so that a prefetcher finds streams and stores fill a quarter of a tile.
template <class Value>
CRAM_TILES void copy_rows_of(const Rows& x, int64_t depth, int64_t index, char* to) {
  constexpr int64_t kAtOnce = 4;
  const int64_t first = index * kTile, count = std::min(kTile, x.count - first), whole = depth / kDepth;
  for (int64_t r = 0; r < kTile; r += kAtOnce) {
    const Value* row[kAtOnce];
    for (int64_t i = 0; i < kAtOnce; ++i) row[i] = r + i < count ? row_of<Value>(x, first + r + i) : nullptr;
    const bool all = r + kAtOnce <= count;
    for (int64_t step = 0; step < steps_of(depth); ++step) {
      char* line = to + step * kTileBytes + 64 * r;
      for (int64_t i = 0; i < kAtOnce; ++i) {
        const Value* from = row[i] + step * kDepth;
        if (all && step < whole) {
          write_line(line + 64 * i, read_values(from, kDepth));
        } else {
          write_line(line + 64 * i, row[i] ? read_values(from, depth - step * kDepth) : Line{});
        }
      }
    }
  }
}

// Rows are read in runs of all the columns, as panels; a prefetcher does not follow 32 bytes of each row.
template <class Value>
CRAM_TILES void copy_columns_of(
    const Rows& w, int64_t column, int64_t columns, int64_t begin, int64_t end, const Strips& to) {
  Panels panels{nullptr, end - begin, to.steps};
  panels.data = strip_memory(panels.bytes());
  pack_columns_of<Value>(w, column + begin * kTile, columns - begin * kTile, 0, panels.tiles, panels);
  for (int64_t strip = begin; strip < end; ++strip) {
    for (int64_t step = 0; step < to.steps; ++step) {
      Line line[kTile];
      for (int64_t r = 0; r < kTile; ++r) line[r] = read_line(panels.tile(strip - begin, step) + 64 * r);
      transpose(line);
      for (int64_t r = 0; r < kTile; ++r) write_line(to.at(strip) + step * kTileBytes + 64 * r, line[r]);
    }
  }
}

// One step of depth. Registers: sums from 0, left operands 4 and 5, right operands 6 and 7. All are loaded before the
// first is multiplied: a load behind a multiplication waits for it, at a quarter of the speed.
template <int M, int N>
CRAM_TILE_INLINE void multiply_step(const char* const* left, const int64_t* row_bytes, const char* right) {
  TileUnit::load<6>(right, 64);
  if constexpr (N == 2) TileUnit::load<7>(right + kTileBytes, 64);
  TileUnit::load<4>(left[0], row_bytes[0]);
  if constexpr (M == 2) TileUnit::load<5>(left[1], row_bytes[1]);
  TileUnit::multiply<0, 4, 6>();
  if constexpr (N == 2) TileUnit::multiply<1, 4, 7>();
  if constexpr (M == 2) TileUnit::multiply<N, 5, 6>();
  if constexpr (M == 2 && N == 2) TileUnit::multiply<3, 5, 7>();
}

template <int Count>
CRAM_TILE_INLINE void zero_sums() {
  TileUnit::zero<0>();
  if constexpr (Count > 1) TileUnit::zero<1>();
  if constexpr (Count > 2) TileUnit::zero<2>();
  if constexpr (Count > 3) TileUnit::zero<3>();
}

// Sums as a matrix of 16 M x 16 N.
template <int M, int N>
CRAM_TILE_INLINE void store_sums(float* to) {
  TileUnit::store<0>(to, 64 * N);
  if constexpr (N == 2) TileUnit::store<1>(to + kTile, 64 * N);
  if constexpr (M >= 2) {
    TileUnit::store<N>(to + kTile * kTile * N, 64 * N);
    if constexpr (N == 2) TileUnit::store<3>(to + kTile * kTile * N + kTile, 64 * N);
  }
}

// A stretch of depth: strips of the left operand, `apart` bytes from one another, and a pair of panels.
struct Stretch {
  const char* left;
  int64_t apart, row_bytes, step_bytes;
  const char* right;
  int64_t steps;
};

inline Stretch stretch(const Strips& left, int64_t strip, const char* right) {
  return {left.at(strip), left.steps * kTileBytes, 64, kTileBytes, right, left.steps};
}

// Rows whose lines are asked for meanwhile, one line of each per step.
struct Ahead {
  const char* data;
  int64_t row_bytes, rows;
};

// Sums [16 M, 16 N] over some stretches.
template <int M, int N>
CRAM_TILES void product(const Stretch* stretches, int64_t count, const Ahead& ahead, float* sums) {
  zero_sums<M * N>();
  for (int64_t s = 0; s < count; ++s) {
    const Stretch& each = stretches[s];
    const char *left[2] = {each.left, each.left + each.apart}, *right = each.right;
    const int64_t row_bytes[2] = {each.row_bytes, each.row_bytes};
    for (int64_t step = 0; step < each.steps; ++step) {
      if (s == 0) {
        for (int64_t r = 0; r < ahead.rows; ++r) __builtin_prefetch(ahead.data + r * ahead.row_bytes + 64 * step, 0, 2);
      }
      multiply_step<M, N>(left, row_bytes, right);
      left[0] += each.step_bytes;
      left[1] += each.step_bytes;
      right += N * kTileBytes;
    }
  }
  store_sums<M, N>(sums);
}

void product_of(int64_t m, int64_t n, const Stretch* stretches, int64_t count, const Ahead& ahead, float* sums) {
  if (m == 2) return (n == 2 ? product<2, 2> : product<2, 1>)(stretches, count, ahead, sums);
  (n == 2 ? product<1, 2> : product<1, 1>)(stretches, count, ahead, sums);
}

// Two strips of a left operand in memory of this thread.
Strips two_strips(int64_t depth) {
  Strips made{nullptr, 2, steps_of(depth)};
  made.data = aligned(kept<Use::rows>(made.bytes() / 4 + 16));
  return made;
}

// Share of the rows behind two strips that is asked for during one of `pairs` products.
Ahead ahead_of(const Rows& w, int64_t next, int64_t pair, int64_t pairs) {
  const int64_t share = (2 * kTile + pairs - 1) / pairs, begin = next + pair * share;
  const int64_t rows = std::clamp<int64_t>(std::min(w.count, next + 2 * kTile) - begin, 0, share);
  if (!w.half || w.listed || !rows) return {nullptr, 0, 0};
  const int64_t row_bytes = w.stride * static_cast<int64_t>(sizeof(Half));
  return {static_cast<const char*>(w.data) + begin * row_bytes, row_bytes, rows};
}

struct alignas(64) Sums {
  float value[4 * kTile * kTile];
};

// The unit is set up for as long as one of these lives.
struct Configured {
  Configured() { TileUnit::configure(); }
  ~Configured() { TileUnit::release(); }
};

// y (+)= 32 sums.
template <class Y>
CRAM_TILE_INLINE void write_sums(const float* sums, int64_t count, bool add, Y* y) {
  if (count >= kDepth) {
    Vector<16> low = load<16>(sums), high = load<16>(sums + 16);
    if (add) {
      low += read<16>(y);
      high += read<16>(y + 16);
    }
    if constexpr (sizeof(Y) == sizeof(Half)) {
      write_line(y, rounded(low, high));
    } else {
      store<16>(y, low);
      store<16>(y + 16, high);
    }
    return;
  }
  for (int64_t c = 0; c < count; ++c) narrow((add ? widen(y[c]) : 0.0f) + sums[c], y + c);
}

template <class Y>
CRAM_TILES void write_block(
    const float* sums, int64_t rows, int64_t width, int64_t columns, bool add, void* y_in, int64_t y_stride) {
  Y* y = static_cast<Y*>(y_in);
  for (int64_t t = 0; t < rows; ++t) {
    const float* row = sums + t * kTile * width;
    if (width == 2) {
      write_sums(row, columns, add, y + t * y_stride);
    } else {
      float padded[kDepth];
      std::memcpy(padded, row, kTile * sizeof(float));
      write_sums(padded, std::min(columns, kTile), add, y + t * y_stride);
    }
  }
}

void write_any(
    const float* sums, int64_t rows, int64_t width, int64_t columns, bool add, void* y, int64_t y_stride, bool half) {
  if (half) {
    write_block<Half>(sums, rows, width, columns, add, y, y_stride);
  } else {
    write_block<float>(sums, rows, width, columns, add, y, y_stride);
  }
}

// z [tokens, count] = the transpose of sums [16 m, 16 n].
CRAM_TILES void write_transposed(
    const float* sums, int64_t m, int64_t n, int64_t tokens, int64_t count, float* z, int64_t z_stride) {
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < n; ++j) {
      Line line[kTile];
      for (int64_t r = 0; r < kTile; ++r) line[r] = read_line(sums + ((i * kTile + r) * n + j) * kTile);
      transpose(line);
      const int64_t width = std::min(kTile, count - i * kTile);
      for (int64_t t = 0; t < std::min(kTile, tokens - j * kTile); ++t) {
        std::memcpy(z + (j * kTile + t) * z_stride + i * kTile, &line[t], width * sizeof(float));
      }
    }
  }
}

void copy_rows(const Rows& x, int64_t depth, int64_t index, char* to) {
  (x.half ? copy_rows_of<Half> : copy_rows_of<float>)(x, depth, index, to);
}

// y [tokens, columns], bfloat16, = the transpose of sums [16 m, 16 n], plus a bias.
CRAM_TILES void write_rounded(
    const float* sums, int64_t m, int64_t n, int64_t tokens, int64_t columns, const Half* bias, Half* y,
    int64_t y_stride) {
  Vector<16> added[2] = {};
  for (int64_t c = 0; bias && c < std::min(columns, m * kTile); ++c) added[c / kTile][c % kTile] = widen(bias[c]);
  for (int64_t j = 0; j < n; ++j) {
    Line line[2 * kTile];
    for (int64_t i = 0; i < 2; ++i) {
      for (int64_t r = 0; r < kTile; ++r) {
        line[i * kTile + r] = i < m ? read_line(sums + ((i * kTile + r) * n + j) * kTile) : Line{};
      }
      if (i < m) transpose(line + i * kTile);
    }
    for (int64_t t = 0; t < std::min(kTile, tokens - j * kTile); ++t) {
      const Line row = rounded((Vector<16>)line[t] + added[0], (Vector<16>)line[kTile + t] + added[1]);
      Half* to = y + (j * kTile + t) * y_stride;
      if (columns >= kDepth) {
        write_line(to, row);
      } else {
        std::memcpy(to, &row, std::min(columns, m * kTile) * sizeof(Half));
      }
    }
  }
}

}  // namespace

void pack_rows(const Rows& w, int64_t depth, int64_t index, const Panels& to) {
  w.half ? pack_rows_of<Half>(w, depth, index, to) : pack_rows_of<float>(w, depth, index, to);
}

void pack_columns(const Rows& w, int64_t column, int64_t columns, int64_t begin, int64_t end, const Panels& to) {
  if (w.half) {
    pack_columns_of<Half>(w, column, columns, begin, end, to);
  } else {
    pack_columns_of<float>(w, column, columns, begin, end, to);
  }
}

void copy_strip(const Rows& x, int64_t depth, int64_t index, const Strips& to) {
  copy_rows(x, depth, index, to.at(index));
}

void copy_columns(const Rows& w, int64_t column, int64_t columns, int64_t begin, int64_t end, const Strips& to) {
  (w.half ? copy_columns_of<Half> : copy_columns_of<float>)(w, column, columns, begin, end, to);
}

void tile_shrink(
    const Strips& x, int64_t first, int64_t tokens, const Panels& w, int64_t count, float* z, int64_t z_stride) {
  const Configured configured;
  Sums sums;
  for (int64_t t = 0; t < tokens; t += 2 * kTile) {
    const int64_t m = tokens - t > kTile ? 2 : 1;
    for (int64_t pair = 0; 2 * pair < w.tiles; ++pair) {
      const int64_t n = w.width(pair), width = std::min(n * kTile, count - pair * kDepth);
      const Stretch depth = stretch(x, first + t / kTile, w.pair(pair));
      product_of(m, n, &depth, 1, {}, sums.value);
      for (int64_t i = 0; i < std::min(m * kTile, tokens - t); ++i) {
        std::memcpy(z + (t + i) * z_stride + pair * kDepth, sums.value + i * n * kTile, width * sizeof(float));
      }
    }
  }
}

void tile_shrink_few(
    const Panels& x, int64_t first, int64_t tokens, const Rows& w, int64_t depth, float* z, int64_t z_stride) {
  const Configured configured;
  const Strips strips = two_strips(depth);
  const int64_t pairs = (tokens + kDepth - 1) / kDepth;
  Sums sums;
  for (int64_t j = 0; j < w.count; j += 2 * kTile) {
    const int64_t m = w.count - j > kTile ? 2 : 1;
    for (int64_t i = 0; i < m; ++i) copy_rows(w, depth, j / kTile + i, strips.at(i));
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const int64_t n = x.width(first + pair);
      const Stretch whole = stretch(strips, 0, x.pair(first + pair));
      product_of(m, n, &whole, 1, ahead_of(w, j + 2 * kTile, pair, pairs), sums.value);
      write_transposed(
          sums.value, m, n, tokens - pair * kDepth, w.count - j, z + pair * kDepth * z_stride + j, z_stride);
    }
  }
}

void tile_layer(const TileLayer& e) {
  const Configured configured;
  const Strips strips = two_strips(e.depth);
  const int64_t pairs = (e.tokens + kDepth - 1) / kDepth;
  Sums sums;
  for (int64_t j = 0; j < e.base.count; j += 2 * kTile) {
    const int64_t m = e.base.count - j > kTile ? 2 : 1;
    for (int64_t i = 0; i < m; ++i) copy_rows(e.base, e.depth, j / kTile + i, strips.at(i));
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const int64_t n = e.x.width(e.first + pair);
      const Stretch stretches[2] = {
          stretch(strips, 0, e.x.pair(e.first + pair)),
          stretch(e.up, e.strip + j / kTile, e.u.pair(e.first + pair))};
      product_of(
          m, n, stretches, e.up.steps ? 2 : 1, ahead_of(e.base, j + 2 * kTile, pair, pairs), sums.value);
      write_rounded(
          sums.value, m, n, e.tokens - pair * kDepth, e.base.count - j, e.bias ? e.bias + j : nullptr,
          e.y + pair * kDepth * e.y_stride + j, e.y_stride);
    }
  }
}

void tile_gradient(const TileGradient& e) {
  const Configured configured;
  const int64_t bytes = e.half_y ? 2 : 4, begin = e.packed.data ? e.column : 0;
  Panels base = e.packed;
  if (!base.data) {
    base = {nullptr, tiles_of(e.columns), e.x.steps};
    base.data = aligned(kept<Use::rows>(base.bytes() / 4 + 16));
    pack_columns(e.base, 0, e.columns, 0, base.tiles, base);
  }
  const int64_t blocks = (e.tokens + 2 * kTile - 1) / (2 * kTile);
  Sums sums;
  for (int64_t c = 0; c < e.columns; c += kDepth) {
    const int64_t pair = (begin + c) / kDepth, n = base.width(pair);
    const char* down = e.u.steps ? e.down.pair((e.column + c) / kDepth) : nullptr;
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t t = block * 2 * kTile, m = e.tokens - t > kTile ? 2 : 1, strip = e.first + t / kTile;
      const Stretch stretches[2] = {stretch(e.x, strip, base.pair(pair)), stretch(e.u, strip, down)};
      const Rows next{base.pair(pair + 1), base.steps * kDepth, kDepth, e.packed.data != nullptr, nullptr};
      product_of(m, n, stretches, e.u.steps ? 2 : 1, ahead_of(next, 0, block, blocks), sums.value);
      write_any(
          sums.value, std::min(m * kTile, e.tokens - t), n, e.columns - c, false,
          static_cast<char*>(e.y) + (t * e.y_stride + c) * bytes, e.y_stride, e.half_y);
    }
  }
}

void tile_expand(const TileExpand& e) {
  const Configured configured;
  const int64_t bytes = e.half_y ? 2 : 4;
  Sums sums;
  for (int64_t c = 0; c < e.columns; c += kDepth) {
    const int64_t pair = (e.column + c) / kDepth, n = e.w.width(pair);
    for (int64_t t = 0; t < e.tokens; t += 2 * kTile) {
      const int64_t m = e.tokens - t > kTile ? 2 : 1, rows = std::min(m * kTile, e.tokens - t);
      char* y = static_cast<char*>(e.y) + (t * e.y_stride + c) * bytes;
      for (int64_t i = 0; i < rows; ++i) __builtin_prefetch(y + i * e.y_stride * bytes + 128, 1);
      const Stretch depth = stretch(e.u, e.first + t / kTile, e.w.pair(pair));
      product_of(m, n, &depth, 1, {}, sums.value);
      write_any(sums.value, rows, n, e.columns - c, e.add, y, e.y_stride, e.half_y);
    }
  }
}

namespace {

// One chunk of depth for one or two strips, on top of the sums [16 M, 32] of the chunks before.
template <int M>
CRAM_TILES void multiply_chunk(const Stretch& chunk, bool first, float* sums) {
  constexpr int64_t kRow = 64 * 2;
  if (first) {
    zero_sums<2 * M>();
  } else {
    TileUnit::load<0>(sums, kRow);
    TileUnit::load<1>(sums + kTile, kRow);
    if constexpr (M == 2) {
      TileUnit::load<2>(sums + 2 * kTile * kTile, kRow);
      TileUnit::load<3>(sums + 2 * kTile * kTile + kTile, kRow);
    }
  }
  const int64_t row_bytes[2] = {chunk.row_bytes, chunk.row_bytes};
  for (int64_t step = 0; step < chunk.steps; ++step) {
    const char* const left[2] = {
        chunk.left + step * chunk.step_bytes, chunk.left + chunk.apart + step * chunk.step_bytes};
    multiply_step<M, 2>(left, row_bytes, chunk.right + step * 2 * kTileBytes);
  }
  store_sums<M, 2>(sums);
}

}  // namespace

void tile_gram(const TileGram& e) {
  const Configured configured;
  constexpr int64_t kChunk = 8;  // steps of depth that are packed at a time
  const int64_t steps = e.u.steps, strips = tiles_of(e.count), bytes = e.half_y ? 2 : 4;
  alignas(64) char packed[2 * kChunk * kTileBytes];
  float* const sums = reinterpret_cast<float*>(aligned(kept<Use::tokens>(2 * strips * kTileBytes / 4 + 16)));
  if (!steps) std::memset(sums, 0, 2 * strips * kTileBytes);
  for (int64_t c = 0; c < e.columns; c += kDepth) {
    for (int64_t first = 0; first < steps; first += kChunk) {
      const int64_t count = std::min(kChunk, steps - first);
      for (int64_t step = 0; step < count; ++step) {
        (e.w.half ? pack_pair<Half> : pack_pair<float>)(
            e.w, c, e.columns - c, first + step, true, packed + step * 2 * kTileBytes, true);
      }
      for (int64_t s = 0; s < strips; s += 2) {
        const Stretch chunk{
            e.u.at(s) + first * kTileBytes, steps * kTileBytes, 64, kTileBytes, packed, count};
        (strips - s > 1 ? multiply_chunk<2> : multiply_chunk<1>)(chunk, first == 0, sums + s * 2 * kTile * kTile);
      }
    }
    write_any(sums, e.count, 2, e.columns - c, false, static_cast<char*>(e.y) + c * bytes, e.y_stride, e.half_y);
  }
}

CRAM_TILES void transpose_strip(const Strips& from, int64_t index, const Panels& to) {
  for (int64_t step = 0; step < from.steps; ++step) {
    Line line[kTile];
    for (int64_t r = 0; r < kTile; ++r) line[r] = read_line(from.at(index) + step * kTileBytes + 64 * r);
    transpose(line);
    for (int64_t r = 0; r < kTile; ++r) write_line(to.tile(index, step) + 64 * r, line[r]);
  }
}

CRAM_TILES void gate_halves(const float* values, const float* gates, int64_t count, Half* to) {
  int64_t k = 0;
  for (; k + kDepth <= count; k += kDepth) {
    Vector<16> part[2];
    for (int i = 0; i < 2; ++i) {
      const Vector<16> gate = load<16>(gates + k + 16 * i);
      part[i] = gate == 0 ? Vector<16>{} : load<16>(values + k + 16 * i) * gate;
    }
    write_line(to + k, rounded(part[0], part[1]));
  }
  for (; k < count; ++k) narrow(gates[k] == 0 ? 0 : values[k] * gates[k], to + k);
}

CRAM_TILES void round_halves(const float* values, int64_t count, Half* to) {
  int64_t k = 0;
  for (; k + kDepth <= count; k += kDepth) write_line(to + k, rounded(load<16>(values + k), load<16>(values + k + 16)));
  for (; k < count; ++k) narrow(values[k], to + k);
}

}  // namespace cram

#else

namespace cram {

void pack_rows(const Rows&, int64_t, int64_t, const Panels&) {}
void pack_columns(const Rows&, int64_t, int64_t, int64_t, int64_t, const Panels&) {}
void copy_strip(const Rows&, int64_t, int64_t, const Strips&) {}
void copy_columns(const Rows&, int64_t, int64_t, int64_t, int64_t, const Strips&) {}
void tile_shrink(const Strips&, int64_t, int64_t, const Panels&, int64_t, float*, int64_t) {}
void tile_shrink_few(const Panels&, int64_t, int64_t, const Rows&, int64_t, float*, int64_t) {}
void tile_layer(const TileLayer&) {}
void tile_gradient(const TileGradient&) {}
void tile_expand(const TileExpand&) {}
void tile_gram(const TileGram&) {}
void transpose_strip(const Strips&, int64_t, const Panels&) {}
void gate_halves(const float*, const float*, int64_t, Half*) {}
void round_halves(const float*, int64_t, Half*) {}

}  // namespace cram

#endif

namespace cram {
namespace {

#if defined(CRAM_TILE_MODEL)

const char* ask() { return nullptr; }

#elif defined(CRAM_TILE_UNIT)

const char* ask() {
  unsigned a, b, c, d;
  constexpr unsigned kTiles = 1u << 24, kHalfTiles = 1u << 22, kSaves = 1u << 27;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & kSaves)) return "the processor has no AMX";
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kTiles) || !(d & kHalfTiles)) return "the processor has no AMX";
  if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512bw")) {
    return "the processor has AMX, but no AVX-512 BF16";
  }
  // The kernel of the system saves the registers only for a process that has asked for them.
  constexpr long kAskFor = 0x1023, kRegisters = 18;
  if (syscall(SYS_arch_prctl, kAskFor, kRegisters)) return "the system refuses the registers of AMX to this process";
  return nullptr;
}

#else

const char* ask() { return "the compiler of this library knows no AMX"; }

#endif

}  // namespace

const char* why_no_tiles() {
  static const char* const reason = ask();
  return reason;
}

}  // namespace cram
