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

char* panel_memory(int64_t bytes) { return aligned(kept<Use::sums>(bytes / 4 + 16)); }

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

template <class Value>
CRAM_TILES void pack_columns_of(
    const Rows& w, int64_t column, int64_t columns, int64_t begin, int64_t end, const Panels& to) {
  for (int64_t pair = begin / 2; pair < (end + 1) / 2; ++pair) {
    for (int64_t step = 0; step < to.steps; ++step) {
      const bool both = to.width(pair) == 2;
      pack_pair<Value>(
          w, column + pair * kDepth, columns - pair * kDepth, step, both,
          to.pair(pair) + step * (both ? 2 : 1) * kTileBytes, false);
    }
  }
}

// Sixteen rows of a left operand, and their last columns where those do not fill a step.
struct Strip {
  const char* data;
  int64_t row_bytes, step_bytes, whole;
  const char* tail;
};

// Rows in memory as they are, or copied where they do not lie so; the memory has room for all steps.
template <class Value>
CRAM_TILES Strip strip_of(const Rows& x, int64_t first, int64_t depth, char* memory) {
  const int64_t steps = steps_of(depth), whole = depth / kDepth, count = std::min(kTile, x.count - first);
  bool copied = sizeof(Value) != sizeof(Half) || count < kTile;
  for (int64_t r = 1; !copied && x.listed && r < count; ++r) copied = x.listed[first + r] != x.listed[first] + r;
  const char* at = reinterpret_cast<const char*>(row_of<Value>(x, first));
  const Strip strip{
      copied ? memory : at, copied ? 64 : x.stride * static_cast<int64_t>(sizeof(Half)), copied ? kTileBytes : 64, whole,
      steps > whole ? memory + whole * kTileBytes : nullptr};
  for (int64_t step = copied ? 0 : whole; step < steps; ++step) {
    char* tile = memory + step * kTileBytes;
    for (int64_t r = 0; r < kTile; ++r) {
      const Value* row = r < count ? row_of<Value>(x, first + r) : nullptr;
      write_line(tile + 64 * r, row ? read_values(row + step * kDepth, depth - step * kDepth) : Line{});
    }
  }
  return strip;
}

Strip make_strip(const Rows& x, int64_t first, int64_t depth, char* memory) {
  return x.half ? strip_of<Half>(x, first, depth, memory) : strip_of<float>(x, first, depth, memory);
}

// One step of depth. Registers: sums from 0, left operands 4 and 5, right operands 6 and 7.
template <int M, int N>
CRAM_TILE_INLINE void multiply_step(const char* const* left, const int64_t* row_bytes, const char* right) {
  TileUnit::load<6>(right, 64);
  if constexpr (N == 2) TileUnit::load<7>(right + kTileBytes, 64);
  TileUnit::load<4>(left[0], row_bytes[0]);
  TileUnit::multiply<0, 4, 6>();
  if constexpr (N == 2) TileUnit::multiply<1, 4, 7>();
  if constexpr (M >= 2) {
    TileUnit::load<5>(left[1], row_bytes[1]);
    TileUnit::multiply<N, 5, 6>();
    if constexpr (N == 2) TileUnit::multiply<3, 5, 7>();
  }
  if constexpr (M == 4) {
    TileUnit::load<4>(left[2], row_bytes[2]);
    TileUnit::multiply<2, 4, 6>();
    TileUnit::load<5>(left[3], row_bytes[3]);
    TileUnit::multiply<3, 5, 6>();
  }
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
  if constexpr (M == 4) {
    TileUnit::store<2>(to + 2 * kTile * kTile, 64);
    TileUnit::store<3>(to + 3 * kTile * kTile, 64);
  }
}

// Lines that a strip's rows will be read from so many steps later; behind their end those of the strips after it.
constexpr int64_t kAhead = 8;

template <int M, int N, bool Ahead>
CRAM_TILES void product(const Strip* strip, const char* right, float* sums) {
  const char* left[M];
  int64_t row_bytes[M];
  for (int m = 0; m < M; ++m) {
    left[m] = strip[m].data;
    row_bytes[m] = strip[m].row_bytes;
  }
  zero_sums<M * N>();
  const int64_t whole = strip[0].whole;
  for (int64_t step = 0; step < whole; ++step) {
    if constexpr (Ahead) {
      const bool wraps = step + kAhead >= whole;
      for (int m = 0; m < M; ++m) {
        const char* at = left[m] + (wraps ? kTile * M * row_bytes[m] + (kAhead - whole) * 64 : kAhead * 64);
        for (int64_t r = 0; r < kTile; ++r) __builtin_prefetch(at + r * row_bytes[m]);
      }
    }
    multiply_step<M, N>(left, row_bytes, right);
    right += N * kTileBytes;
    for (int m = 0; m < M; ++m) left[m] += strip[m].step_bytes;
  }
  if (strip[0].tail) {
    for (int m = 0; m < M; ++m) {
      left[m] = strip[m].tail;
      row_bytes[m] = 64;
    }
    multiply_step<M, N>(left, row_bytes, right);
  }
  store_sums<M, N>(sums);
}

// Sums [16 M, 16 N] of M strips and one pair of panels.
template <bool Ahead>
void product_of(int64_t m, int64_t n, const Strip* strip, const char* right, float* sums) {
  if (m == 4) return product<4, 1, Ahead>(strip, right, sums);
  if (m == 2) return n == 2 ? product<2, 2, Ahead>(strip, right, sums) : product<2, 1, Ahead>(strip, right, sums);
  return n == 2 ? product<1, 2, Ahead>(strip, right, sums) : product<1, 1, Ahead>(strip, right, sums);
}

// Memory of a thread for the strips of up to four tiles of rows.
char* strip_memory(int64_t depth) { return aligned(kept<Use::rows>(4 * steps_of(depth) * kTileBytes / 4 + 16)); }

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

void tile_shrink(const Rows& x, int64_t depth, const Panels& w, int64_t count, float* z, int64_t z_stride) {
  const Configured configured;
  const int64_t room = steps_of(depth) * kTileBytes;
  char* const memory = strip_memory(depth);
  Sums sums;
  for (int64_t t = 0; t < x.count; t += 2 * kTile) {
    const int64_t m = x.count - t > kTile ? 2 : 1;
    Strip strip[2];
    for (int64_t i = 0; i < m; ++i) strip[i] = make_strip(x, t + i * kTile, depth, memory + i * room);
    for (int64_t pair = 0; 2 * pair < w.tiles; ++pair) {
      const int64_t n = w.width(pair), width = std::min(n * kTile, count - pair * kDepth);
      product_of<false>(m, n, strip, w.pair(pair), sums.value);
      for (int64_t i = 0; i < std::min(m * kTile, x.count - t); ++i) {
        std::memcpy(z + (t + i) * z_stride + pair * kDepth, sums.value + i * n * kTile, width * sizeof(float));
      }
    }
  }
}

void tile_shrink_few(const Panels& x, int64_t tokens, const Rows& w, int64_t depth, float* z, int64_t z_stride) {
  const Configured configured;
  const int64_t room = steps_of(depth) * kTileBytes;
  char* const memory = strip_memory(depth);
  Sums sums;
  for (int64_t j = 0; j < w.count;) {
    const int64_t left = tiles_of(w.count - j), m = x.tiles == 1 && left >= 4 ? 4 : left >= 2 ? 2 : 1;
    Strip strip[4];
    for (int64_t i = 0; i < m; ++i) strip[i] = make_strip(w, j + i * kTile, depth, memory + i * room);
    for (int64_t pair = 0; 2 * pair < x.tiles; ++pair) {
      const int64_t n = x.width(pair);
      if (pair == 0) {
        product_of<true>(m, n, strip, x.pair(pair), sums.value);
      } else {
        product_of<false>(m, n, strip, x.pair(pair), sums.value);
      }
      write_transposed(
          sums.value, m, n, tokens - pair * kDepth, w.count - j, z + pair * kDepth * z_stride + j, z_stride);
    }
    j += m * kTile;
  }
}

void tile_expand(const TileExpand& e) {
  const Configured configured;
  const int64_t bytes = e.half_y ? 2 : 4;
  Sums sums;
  for (int64_t c = 0; c < e.columns; c += kDepth) {
    const int64_t pair = (e.column + c) / kDepth, n = e.w.width(pair);
    for (int64_t t = 0; t < e.u.count; t += 2 * kTile) {
      const int64_t m = e.u.count - t > kTile ? 2 : 1, rows = std::min(m * kTile, e.u.count - t);
      const int64_t row_bytes = e.u.stride * static_cast<int64_t>(sizeof(Half));
      const char* u = static_cast<const char*>(e.u.data) + t * row_bytes;
      const Strip strip[2] = {
          {u, row_bytes, 64, e.w.steps, nullptr}, {u + kTile * row_bytes, row_bytes, 64, e.w.steps, nullptr}};
      char* y = static_cast<char*>(e.y) + (t * e.y_stride + c) * bytes;
      for (int64_t i = 0; i < rows; ++i) __builtin_prefetch(y + i * e.y_stride * bytes, 1);
      product_of<false>(m, n, strip, e.w.pair(pair), sums.value);
      write_any(sums.value, rows, n, e.columns - c, e.add, y, e.y_stride, e.half_y);
    }
  }
}

namespace {

// One chunk of depth for up to four strips, on top of the sums of the chunks before.
template <int M>
CRAM_TILES void multiply_chunk(const char* const* left, int64_t row_bytes, int64_t step_bytes, const char* right,
                               int64_t steps, bool first, float* sums) {
  if (first) {
    zero_sums<2 * M>();
  } else {
    TileUnit::load<0>(sums, 128);
    TileUnit::load<1>(sums + kTile, 128);
    if constexpr (M == 2) {
      TileUnit::load<2>(sums + 2 * kTile * kTile, 128);
      TileUnit::load<3>(sums + 2 * kTile * kTile + kTile, 128);
    }
  }
  const char* at[M];
  const int64_t strides[2] = {row_bytes, row_bytes};
  for (int m = 0; m < M; ++m) at[m] = left[m];
  for (int64_t step = 0; step < steps; ++step) {
    multiply_step<M, 2>(at, strides, right + step * 2 * kTileBytes);
    for (int m = 0; m < M; ++m) at[m] += step_bytes;
  }
  store_sums<M, 2>(sums);
}

}  // namespace

void tile_expand_long(const LongExpand& e) {
  const Configured configured;
  constexpr int64_t kChunk = 8;  // steps of depth that are packed at a time
  const int64_t steps = steps_of(e.depth), strips = tiles_of(e.u.count), bytes = e.half_y ? 2 : 4;
  alignas(64) char packed[2 * kChunk * kTileBytes];
  // The left operand whole, a tile after the other; then the sums.
  char* const left = aligned(kept<Use::tokens>((strips * steps + 2 * strips) * kTileBytes / 4 + 16));
  float* const sums = reinterpret_cast<float*>(left + strips * steps * kTileBytes);
  for (int64_t s = 0; s < strips; ++s) {
    char* const to = left + s * steps * kTileBytes;
    for (int64_t step = 0; step < steps; ++step) {
      for (int64_t r = 0; r < kTile; ++r) {
        const int64_t row = s * kTile + r;
        const int64_t count = std::min(kDepth, e.depth - step * kDepth);
        Half* line = reinterpret_cast<Half*>(to + step * kTileBytes + 64 * r);
        std::memset(line, 0, 64);
        if (row < e.u.count) std::memcpy(line, row_of<Half>(e.u, row) + step * kDepth, count * sizeof(Half));
      }
    }
  }
  if (!steps) std::memset(sums, 0, 2 * strips * kTileBytes);
  const Rows w{e.w, e.w_stride, e.depth, e.half_w, e.rows};
  for (int64_t c = 0; c < e.columns; c += kDepth) {
    for (int64_t first = 0; first < steps; first += kChunk) {
      const int64_t count = std::min(kChunk, steps - first);
      for (int64_t step = 0; step < count; ++step) {
        char* const to = packed + step * 2 * kTileBytes;
        if (e.half_w) {
          pack_pair<Half>(w, c, e.columns - c, first + step, true, to, true);
        } else {
          pack_pair<float>(w, c, e.columns - c, first + step, true, to, true);
        }
      }
      for (int64_t s = 0; s < strips; s += 2) {
        const char* at[2] = {left + (s * steps + first) * kTileBytes, left + ((s + 1) * steps + first) * kTileBytes};
        float* const to = sums + s * 2 * kTile * kTile;
        if (strips - s > 1) {
          multiply_chunk<2>(at, 64, kTileBytes, packed, count, first == 0, to);
        } else {
          multiply_chunk<1>(at, 64, kTileBytes, packed, count, first == 0, to);
        }
      }
    }
    write_any(sums, e.u.count, 2, e.columns - c, e.add, static_cast<char*>(e.y) + c * bytes, e.y_stride, e.half_y);
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
void tile_shrink(const Rows&, int64_t, const Panels&, int64_t, float*, int64_t) {}
void tile_shrink_few(const Panels&, int64_t, const Rows&, int64_t, float*, int64_t) {}
void tile_expand(const TileExpand&) {}
void tile_expand_long(const LongExpand&) {}
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
