// SHRINK and EXPAND on bfloat16 x with AVX-512 BF16: one instruction multiplies 32 values and adds neighbours.
//
// SHRINK finds neighbours along the depth in memory. EXPAND interleaves the columns of two rows of w; a lane order
// that the unpacking leaves behind is undone when y is written. float32 masters are rounded to bfloat16 on load.

#include "../vector.h"
#include "products.h"

#include <algorithm>

#if defined(__x86_64__)

#include <immintrin.h>

#define CRAM_PAIRS __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")))

namespace cram {
namespace {

constexpr int kPair = 32;  // values in a register

CRAM_PAIRS inline __m512i halves(const Half* from) { return _mm512_loadu_si512(from); }

CRAM_PAIRS inline __m512i halves(const float* from) {
  return (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(from + 16), _mm512_loadu_ps(from));
}

CRAM_PAIRS inline __m512i halves(const Half* from, int64_t count) {
  return _mm512_maskz_loadu_epi16((1u << count) - 1, from);
}

CRAM_PAIRS inline __m512i halves(const float* from, int64_t count) {
  const __mmask32 mask = (1u << count) - 1;
  return (__m512i)_mm512_cvtne2ps_pbh(
      _mm512_maskz_loadu_ps(mask >> 16, from + 16), _mm512_maskz_loadu_ps(mask & 0xffff, from));
}

CRAM_PAIRS inline __m512 dot(__m512 total, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(total, (__m512bh)a, (__m512bh)b);
}

// The sums of four registers, in order.
CRAM_PAIRS inline __m128 sums(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 four = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(four), _mm512_extractf32x8_ps(four, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// The last tile of a group of rows asks for the next group's lines: each row starts where no prefetcher has been.
template <typename W, int Tokens>
CRAM_PAIRS inline void shrink_tile(const Shrink& s, int64_t t, int64_t j) {
  constexpr int Rows = 4;
  const Half* x[Tokens];
  const W *w[Rows], *next[Rows];
  const bool ahead = t + Tokens >= s.tokens && j + Rows < s.count;
  for (int i = 0; i < Tokens; ++i) {
    x[i] = static_cast<const Half*>(s.x) + std::min<int64_t>(t + i, s.tokens - 1) * s.x_stride;
  }
  for (int r = 0; r < Rows; ++r) {
    w[r] = static_cast<const W*>(s.w) + s.rows[std::min<int64_t>(j + r, s.count - 1)] * s.w_stride;
    next[r] = static_cast<const W*>(s.w) + s.rows[std::min<int64_t>(j + Rows + r, s.count - 1)] * s.w_stride;
  }
  __m512 total[Tokens][Rows];
  for (int i = 0; i < Tokens; ++i) {
    for (int r = 0; r < Rows; ++r) total[i][r] = _mm512_setzero_ps();
  }
  int64_t d = 0;
  for (; d + kPair <= s.depth; d += kPair) {
    __m512i row[Rows];
    for (int r = 0; r < Rows; ++r) row[r] = halves(w[r] + d);
    for (int r = 0; ahead && r < Rows; ++r) {
      for (size_t line = 0; line < kPair * sizeof(W); line += 64) __builtin_prefetch(next[r] + d + line / sizeof(W));
    }
    for (int i = 0; i < Tokens; ++i) {
      const __m512i token = halves(x[i] + d);
      for (int r = 0; r < Rows; ++r) total[i][r] = dot(total[i][r], token, row[r]);
    }
  }
  if (d < s.depth) {
    __m512i row[Rows];
    for (int r = 0; r < Rows; ++r) row[r] = halves(w[r] + d, s.depth - d);
    for (int i = 0; i < Tokens; ++i) {
      const __m512i token = halves(x[i] + d, s.depth - d);
      for (int r = 0; r < Rows; ++r) total[i][r] = dot(total[i][r], token, row[r]);
    }
  }
  for (int i = 0; i < Tokens && t + i < s.tokens; ++i) {
    float* z = s.z + (t + i) * s.z_stride + j;
    const __mmask8 rows = (1u << std::min<int64_t>(Rows, s.count - j)) - 1;
    _mm_mask_storeu_ps(z, rows, sums(total[i][0], total[i][1], total[i][2], total[i][3]));
  }
}

template <typename W>
CRAM_PAIRS void shrink_rows(const Shrink& s) {
  for (int64_t j = 0; j < s.count; j += 4) {
    int64_t t = 0;
    for (; t + 2 < s.tokens; t += 4) shrink_tile<W, 4>(s, t, j);
    if (t + 1 < s.tokens) {
      shrink_tile<W, 2>(s, t, j);
    } else if (t < s.tokens) {
      shrink_tile<W, 1>(s, t, j);
    }
  }
}

// The accumulators hold columns in the order that unpacking two rows gives: of every eight columns the first four in
// `low`, the others in `high`.
struct Columns {
  __m512 low, high;
};

CRAM_PAIRS inline void add(float* y, const Columns& sums, bool add, __mmask32 mask) {
  const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
  const __mmask16 masks[2] = {static_cast<__mmask16>(mask), static_cast<__mmask16>(mask >> 16)};
  const __m512 values[2] = {
      _mm512_permutex2var_ps(sums.low, first, sums.high), _mm512_permutex2var_ps(sums.low, second, sums.high)};
  for (int i = 0; i < 2; ++i) {
    const __m512 before = add ? _mm512_maskz_loadu_ps(masks[i], y + 16 * i) : _mm512_setzero_ps();
    _mm512_mask_storeu_ps(y + 16 * i, masks[i], _mm512_add_ps(before, values[i]));
  }
}

CRAM_PAIRS inline void add(Half* y, const Columns& sums, bool add, __mmask32 mask) {
  const __m512i zero = _mm512_setzero_si512();
  const __m512i before = add ? _mm512_maskz_loadu_epi16(mask, y) : zero;
  const __m512 low = _mm512_add_ps(sums.low, (__m512)_mm512_unpacklo_epi16(zero, before));
  const __m512 high = _mm512_add_ps(sums.high, (__m512)_mm512_unpackhi_epi16(zero, before));
  const __m512i order = _mm512_set_epi16(
      31, 30, 29, 28, 15, 14, 13, 12, 27, 26, 25, 24, 11, 10, 9, 8, 23, 22, 21, 20, 7, 6, 5, 4, 19, 18, 17, 16, 3, 2,
      1, 0);
  const __m512i rounded = (__m512i)_mm512_cvtne2ps_pbh(high, low);
  _mm512_mask_storeu_epi16(y, mask, _mm512_permutexvar_epi16(order, rounded));
}

CRAM_PAIRS inline __m512i pair_of(const Half* u) {
  int32_t bits;
  std::memcpy(&bits, u, sizeof(bits));
  return _mm512_set1_epi32(bits);
}

// Two rows of w, interleaved: what multiplies a pair of factors.
struct Interleaved {
  __m512i low, high;
};

// Rows k and k + 1 at 32 columns; the last one of a ragged width is read under a mask.
template <typename W, bool Ragged>
CRAM_PAIRS inline Interleaved interleave(const Expand& e, int64_t k, int64_t c, bool ahead) {
  const W* even = static_cast<const W*>(e.w) + e.rows[k] * e.w_stride + c;
  // After an odd number of rows the last one stands for the missing one, whose factors are 0.
  const W* odd = static_cast<const W*>(e.w) + e.rows[std::min(k + 1, e.count - 1)] * e.w_stride + c;
  if (ahead) {
    __builtin_prefetch(even + kPair);
    __builtin_prefetch(odd + kPair);
  }
  const __m512i a = Ragged ? halves(even, e.columns - c) : halves(even);
  const __m512i b = Ragged ? halves(odd, e.columns - c) : halves(odd);
  return {_mm512_unpacklo_epi16(a, b), _mm512_unpackhi_epi16(a, b)};
}

// Vectors counts 32 columns each. `packed` holds the interleaved rows if they were written there before.
template <typename W, typename Y, int Tokens, int Vectors, bool Ragged>
CRAM_PAIRS inline void expand_tile(const Expand& e, int64_t t, int64_t c, const Interleaved* packed) {
  const Half* u = static_cast<const Half*>(e.u) + panel_index(t, 0, e.count, true);
  Columns total[Tokens][Vectors];
  for (int i = 0; i < Tokens; ++i) {
    for (int v = 0; v < Vectors; ++v) total[i][v] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
  }
  for (int i = 0; i < Tokens; ++i) {
    const int64_t row = std::min<int64_t>(t + i, e.tokens - 1) * e.y_stride;
    for (int v = 0; v < Vectors; ++v) __builtin_prefetch(static_cast<const Y*>(e.y) + row + c + v * kPair, 1);
  }
  for (int64_t k = 0; k < e.count; k += 2) {
    Interleaved rows[Vectors];
    for (int v = 0; v < Vectors; ++v) {
      rows[v] = packed ? packed[k / 2 * Vectors + v] : interleave<W, Ragged>(e, k, c + v * kPair, t == 0);
    }
    for (int i = 0; i < Tokens; ++i) {
      const __m512i factors = pair_of(u + k * kPanel + 2 * i);
      for (int v = 0; v < Vectors; ++v) {
        total[i][v].low = dot(total[i][v].low, factors, rows[v].low);
        total[i][v].high = dot(total[i][v].high, factors, rows[v].high);
      }
    }
  }
  const __mmask32 mask = Ragged ? (1u << (e.columns - c)) - 1 : ~0u;
  for (int i = 0; i < Tokens && t + i < e.tokens; ++i) {
    Y* y = static_cast<Y*>(e.y) + (t + i) * e.y_stride + c;
    for (int v = 0; v < Vectors; ++v) add(y + v * kPair, total[i][v], e.add, mask);
  }
}

template <typename W, typename Y, int Vectors, bool Ragged>
CRAM_PAIRS inline void expand_columns(const Expand& e, int64_t c) {
  // Rows whose distance is a power of two compete for the same lines of the cache: read them once.
  constexpr int64_t kPacked = 256;
  Interleaved memory[kPacked / 2 * Vectors];
  const Interleaved* packed = nullptr;
  if (e.tokens > kPanel && e.count <= kPacked) {
    for (int64_t k = 0; k < e.count; k += 2) {
      for (int v = 0; v < Vectors; ++v) {
        memory[k / 2 * Vectors + v] = interleave<W, Ragged>(e, k, c + v * kPair, true);
      }
    }
    packed = memory;
  }
  for (int64_t t = 0; t < e.tokens; t += kPanel) {
    if (e.tokens - t > kPanel / 2) {
      expand_tile<W, Y, kPanel, Vectors, Ragged>(e, t, c, packed);
    } else {
      expand_tile<W, Y, kPanel / 2, Vectors, Ragged>(e, t, c, packed);
    }
  }
}

template <typename W, typename Y>
CRAM_PAIRS void expand_rows(const Expand& e) {
  int64_t c = 0;
  if (e.tokens == 1) {
    for (; c + 4 * kPair <= e.columns; c += 4 * kPair) expand_tile<W, Y, 1, 4, false>(e, 0, c, nullptr);
  }
  for (; c + 2 * kPair <= e.columns; c += 2 * kPair) expand_columns<W, Y, 2, false>(e, c);
  for (; c + kPair <= e.columns; c += kPair) expand_columns<W, Y, 1, false>(e, c);
  if (c < e.columns) expand_columns<W, Y, 1, true>(e, c);
}

}  // namespace

bool has_pairs() { return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw"); }

ShrinkTile pairs_shrink(bool half_w) { return half_w ? &shrink_rows<Half> : &shrink_rows<float>; }

ExpandTile pairs_expand(bool half_w, bool half_y) {
  if (half_w) return half_y ? &expand_rows<Half, Half> : &expand_rows<Half, float>;
  return half_y ? &expand_rows<float, Half> : &expand_rows<float, float>;
}

}  // namespace cram

#else

namespace cram {

bool has_pairs() { return false; }

ShrinkTile pairs_shrink(bool half_w) { return wide_shrink(true, half_w); }

ExpandTile pairs_expand(bool half_w, bool half_y) { return wide_expand(half_w, half_y); }

}  // namespace cram

#endif
