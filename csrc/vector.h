// Vectors of floats for CPU kernels: the widest registers of the machine, chosen when the library runs.
//
// Kernels are always-inlined templates over the number of lanes. CRAM_FOR_EACH_TARGET compiles such a template once
// for each instruction set and `best` picks among them, so that one library serves every x86-64, and aarch64 and
// others get the baseline. Results may differ between instruction sets by rounding, never between runs.

#pragma once

#include <cstdint>
#include <cstring>

#define CRAM_INLINE inline __attribute__((always_inline))

// Before a loop with a constant bound: sums that are kept across it stay in registers only if it is unrolled.
#define CRAM_UNROLL _Pragma("GCC unroll 16")

namespace cram {

template <int Lanes>
struct Lane {
  typedef float Vector __attribute__((vector_size(Lanes * sizeof(float))));
};

template <int Lanes>
using Vector = typename Lane<Lanes>::Vector;

template <int Lanes>
CRAM_INLINE Vector<Lanes> load(const float* from) {
  Vector<Lanes> value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

// The first `count` lanes; the others are 0.
template <int Lanes>
CRAM_INLINE Vector<Lanes> load_part(const float* from, int64_t count) {
  Vector<Lanes> value{};
  for (int64_t lane = 0; lane < count; ++lane) value[lane] = from[lane];
  return value;
}

template <int Lanes>
CRAM_INLINE void store(float* to, const Vector<Lanes>& value) {
  std::memcpy(to, &value, sizeof(value));
}

// The lower half of the lanes plus the upper one.
template <int Lanes>
CRAM_INLINE Vector<Lanes / 2> folded(const Vector<Lanes>& value) {
  Vector<Lanes / 2> low, high;
  std::memcpy(&low, &value, sizeof(low));
  std::memcpy(&high, reinterpret_cast<const char*>(&value) + sizeof(low), sizeof(high));
  return low + high;
}

// Halves are added until one lane is left.
template <int Lanes>
CRAM_INLINE float sum(const Vector<Lanes>& value) {
  if constexpr (Lanes == 2) {
    return value[0] + value[1];
  } else {
    return sum<Lanes / 2>(folded<Lanes>(value));
  }
}

// `sum` of each of four vectors at once, in the same order of additions.
template <int Lanes>
CRAM_INLINE Vector<4> sums(
    const Vector<Lanes>& a, const Vector<Lanes>& b, const Vector<Lanes>& c, const Vector<Lanes>& d) {
  if constexpr (Lanes > 4) {
    return sums<Lanes / 2>(folded<Lanes>(a), folded<Lanes>(b), folded<Lanes>(c), folded<Lanes>(d));
  } else {
    const Vector<4> ab = Vector<4>{a[0], a[1], b[0], b[1]} + Vector<4>{a[2], a[3], b[2], b[3]};
    const Vector<4> cd = Vector<4>{c[0], c[1], d[0], d[1]} + Vector<4>{c[2], c[3], d[2], d[3]};
    return Vector<4>{ab[0], ab[2], cd[0], cd[2]} + Vector<4>{ab[1], ab[3], cd[1], cd[3]};
  }
}

// Zeros, one vector at a time: clearing all of a short product's sums at once takes as long as the product.
template <int Lanes, int Rows, int Columns>
CRAM_INLINE void clear(Vector<Lanes> (&sums)[Rows][Columns]) {
  CRAM_UNROLL
  for (int r = 0; r < Rows; ++r) {
    CRAM_UNROLL
    for (int c = 0; c < Columns; ++c) sums[r][c] = Vector<Lanes>{};
  }
}

// Bytes of a cache line.
constexpr int kLine = 64;

// Reads one value of each cache line, in order. A product walks several rows at a time, which hardware prefetchers
// follow badly while rows are short; software prefetches do not set them going.
CRAM_INLINE void stream(const float* from, int64_t count) {
  for (int64_t i = 0; i < count; i += kLine / sizeof(float)) (void)*static_cast<const volatile float*>(from + i);
}

// out [nx, ny] = x [nx, depth] y [ny, depth]^T. Rows past the end of a tile repeat the last one and are not stored.
template <int Lanes>
CRAM_INLINE void products(
    const float* x, int64_t nx, const float* y, int64_t ny, int64_t depth, float* out) {
  constexpr int kRows = 4, kColumns = Lanes >= 16 ? 4 : 2;
  const int64_t whole = depth - depth % Lanes;
  for (int64_t k = 0; k < ny; k += kColumns) {
    const float* columns[kColumns];
    for (int c = 0; c < kColumns; ++c) columns[c] = y + (k + c < ny ? k + c : ny - 1) * depth;
    for (int64_t i = 0; i < nx; i += kRows) {
      const float* rows[kRows];
      for (int r = 0; r < kRows; ++r) rows[r] = x + (i + r < nx ? i + r : nx - 1) * depth;
      Vector<Lanes> total[kRows][kColumns];
      clear<Lanes>(total);
      for (int64_t d = 0; d < whole; d += Lanes) {
        Vector<Lanes> column[kColumns];
        for (int c = 0; c < kColumns; ++c) column[c] = load<Lanes>(columns[c] + d);
        for (int r = 0; r < kRows; ++r) {
          const Vector<Lanes> row = load<Lanes>(rows[r] + d);
          for (int c = 0; c < kColumns; ++c) total[r][c] += row * column[c];
        }
      }
      for (int r = 0; r < kRows && i + r < nx; ++r) {
        for (int c = 0; c < kColumns && k + c < ny; ++c) {
          float value = sum<Lanes>(total[r][c]);
          for (int64_t d = whole; d < depth; ++d) value += rows[r][d] * columns[c][d];
          out[(i + r) * ny + k + c] = value;
        }
      }
    }
  }
}

// Weight of input row j in output row i: data[i * row + j * column].
struct Weights {
  const float* data;
  int64_t row, column;
};

template <int Lanes, int Rows, int Columns>
CRAM_INLINE void combine_tile(
    Weights weights, int64_t i, int64_t nout, const float* y, int64_t nin, int64_t depth, int64_t d, float* out) {
  const float* weight[Rows];
  for (int r = 0; r < Rows; ++r) weight[r] = weights.data + (i + r < nout ? i + r : nout - 1) * weights.row;
  Vector<Lanes> total[Rows][Columns];
  clear<Lanes>(total);
  for (int64_t j = 0; j < nin; ++j) {
    Vector<Lanes> column[Columns];
    for (int c = 0; c < Columns; ++c) column[c] = load<Lanes>(y + j * depth + d + c * Lanes);
    for (int r = 0; r < Rows; ++r) {
      for (int c = 0; c < Columns; ++c) total[r][c] += weight[r][j * weights.column] * column[c];
    }
  }
  for (int r = 0; r < Rows && i + r < nout; ++r) {
    for (int c = 0; c < Columns; ++c) store<Lanes>(out + (i + r) * depth + d + c * Lanes, total[r][c]);
  }
}

// out [nout, depth] = weights [nout, nin] y [nin, depth].
template <int Lanes>
CRAM_INLINE void combine(Weights weights, int64_t nout, const float* y, int64_t nin, int64_t depth, float* out) {
  constexpr int kRows = 4, kColumns = Lanes >= 16 ? 4 : 2;
  int64_t d = 0;
  for (; d + kColumns * Lanes <= depth; d += kColumns * Lanes) {
    for (int64_t i = 0; i < nout; i += kRows) {
      combine_tile<Lanes, kRows, kColumns>(weights, i, nout, y, nin, depth, d, out);
    }
  }
  for (; d + Lanes <= depth; d += Lanes) {
    for (int64_t i = 0; i < nout; i += kRows) {
      combine_tile<Lanes, kRows, 1>(weights, i, nout, y, nin, depth, d, out);
    }
  }
  for (; d < depth; ++d) {
    for (int64_t i = 0; i < nout; ++i) {
      float total = 0;
      for (int64_t j = 0; j < nin; ++j) total += weights.data[i * weights.row + j * weights.column] * y[j * depth + d];
      out[i * depth + d] = total;
    }
  }
}

}  // namespace cram

// Defines name_baseline, name_avx2, name_avx512 with the given signature, each of which calls body<lanes> with the
// parenthesised arguments, and name_best, which returns the widest that this machine runs.
#if defined(__x86_64__)
#define CRAM_FOR_EACH_TARGET(name, body, signature, arguments)                                             \
  static void name##_baseline signature { body<4> arguments; }                                             \
  __attribute__((target("avx2,fma,f16c"))) static void name##_avx2 signature { body<8> arguments; }        \
  __attribute__((target("avx512f,avx2,fma,f16c"))) static void name##_avx512 signature { body<16> arguments; } \
  static auto name##_best() {                                                                              \
    if (__builtin_cpu_supports("avx512f")) return &name##_avx512;                                          \
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &name##_avx2;              \
    return &name##_baseline;                                                                               \
  }
#else
#define CRAM_FOR_EACH_TARGET(name, body, signature, arguments)              \
  static void name##_baseline signature { body<4> arguments; }              \
  static auto name##_best() { return &name##_baseline; }
#endif
