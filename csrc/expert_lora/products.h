// The two products of packed experts on a CPU, each as one tile function that a thread calls:
//
//     SHRINK    z[t, j] = x[t] . w[rows[j]]
//     EXPAND    y[t, c] (+)= sum over k of u[t, k] w[rows[k], c]
//
// Everything else of the expert layer is one of them with other operands. Sums run in float32, in an order that does
// not depend on the number of tokens. shrink.cpp and expand.cpp compute in float32 lanes on any machine. Where a
// machine has AVX-512 BF16, bf16_pairs.cpp multiplies pairs of bfloat16, and u is bfloat16 then.

#pragma once

#include <cstdint>
#include <cstring>

namespace cram {

// The bits of a bfloat16; its float32 has 16 zeros more.
using Half = uint16_t;

inline float widen(float value) { return value; }

inline float widen(Half value) {
  const uint32_t bits = uint32_t{value} << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof(wide));
  return wide;
}

inline void narrow(float value, float* to) { *to = value; }

// Rounds to nearest even; NaN stays NaN.
inline void narrow(float value, Half* to) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  *to = value != value ? Half{0x7fc0} : static_cast<Half>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Strides count elements.
struct Shrink {
  const void* x;
  int64_t x_stride, tokens;
  const void* w;
  int64_t w_stride;
  const int32_t* rows;
  int64_t count, depth;
  float* z;
  int64_t z_stride;
};

// Factors u [tokens, count] lie in panels of so many tokens, inside a panel k by k, so a tile reads them in a row.
constexpr int64_t kPanel = 6;

// Pairs of k stand together where pairs are multiplied.
inline int64_t panel_index(int64_t t, int64_t k, int64_t count, bool pairs) {
  const int64_t panel = t / kPanel, inside = t % kPanel;
  if (!pairs) return (panel * count + k) * kPanel + inside;
  return 2 * ((panel * ((count + 1) / 2) + k / 2) * kPanel + inside) + k % 2;
}

struct Expand {
  const void* u;  // float, or Half for pairs
  int64_t tokens;
  const void* w;
  int64_t w_stride;
  const int32_t* rows;
  int64_t count, columns;
  void* y;
  int64_t y_stride;
  bool add;
};

using ShrinkTile = void (*)(const Shrink&);
using ExpandTile = void (*)(const Expand&);

ShrinkTile wide_shrink(bool half_x, bool half_w);
ExpandTile wide_expand(bool half_w, bool half_y);

// Whether this machine multiplies pairs; x is bfloat16 there.
bool has_pairs();
ShrinkTile pairs_shrink(bool half_w);
ExpandTile pairs_expand(bool half_w, bool half_y);

}  // namespace cram
