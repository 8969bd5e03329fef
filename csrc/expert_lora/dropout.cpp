// The dropout mask of expert_lora/dropout.py in C++; see the header.

#include "dropout.h"

#include "../vector.h"
#include "products.h"

#include <algorithm>

namespace cram {
namespace {

// "lowbias32", as dropout.py finishes its words.
CRAM_INLINE uint32_t finish(uint32_t h) {
  h = (h ^ (h >> 16)) * 0x7feb352du;
  h = (h ^ (h >> 15)) * 0x846ca68bu;
  return h ^ (h >> 16);
}

constexpr int64_t kChunk = 256;  // columns hashed at a time, even

// The 16-bit lanes of a row's columns: the low half of a pair's word belongs to its even column.
CRAM_INLINE void lanes(const Keep& keep, uint32_t row, int64_t column, int64_t count, int16_t* to) {
  const uint32_t* pairs = keep.pairs.data() + column / 2;
  for (int64_t p = 0; p < (count + 1) / 2; ++p) {
    const uint32_t word = finish(row + pairs[p]);
    to[2 * p] = static_cast<int16_t>(word & 0xffff);
    to[2 * p + 1] = static_cast<int16_t>(word >> 16);
  }
}

template <typename T>
CRAM_INLINE void copy_kept(const T* from, const int16_t* lane, int16_t least, int64_t count, T* to) {
  for (int64_t c = 0; c < count; ++c) to[c] = lane[c] >= least ? from[c] : T{};
}

template <typename T>
CRAM_INLINE void add_kept(const float* sums, const int16_t* lane, int16_t least, int64_t count, T* to) {
  for (int64_t c = 0; c < count; ++c) narrow(widen(to[c]) + (lane[c] >= least ? sums[c] : 0.0f), to + c);
}

struct Copy {
  const Keep& keep;
  const void* from;
  int64_t stride;
  bool half;
  int64_t token, tokens, column, columns;
  void* to;
};

template <int Lanes>
CRAM_INLINE void copy_rows(const Copy& c) {
  int16_t lane[kChunk];
  for (int64_t t = 0; t < c.tokens; ++t) {
    const uint32_t row = finish(static_cast<uint32_t>(c.token + t) + c.keep.row_word);
    for (int64_t at = 0; at < c.columns; at += kChunk) {
      const int64_t count = std::min(kChunk, c.columns - at);
      lanes(c.keep, row, c.column + at, count, lane);
      const int64_t source = t * c.stride + at, target = t * c.columns + at;
      if (c.half) {
        const Half* from = static_cast<const Half*>(c.from) + source;
        copy_kept(from, lane, c.keep.least, count, static_cast<Half*>(c.to) + target);
      } else {
        const float* from = static_cast<const float*>(c.from) + source;
        copy_kept(from, lane, c.keep.least, count, static_cast<float*>(c.to) + target);
      }
    }
  }
}

struct Add {
  const Keep& keep;
  const float* sums;
  int64_t token, tokens, column, columns;
  void* to;
  int64_t stride;
  bool half;
};

template <int Lanes>
CRAM_INLINE void add_rows(const Add& a) {
  int16_t lane[kChunk];
  for (int64_t t = 0; t < a.tokens; ++t) {
    const uint32_t row = finish(static_cast<uint32_t>(a.token + t) + a.keep.row_word);
    for (int64_t at = 0; at < a.columns; at += kChunk) {
      const int64_t count = std::min(kChunk, a.columns - at);
      lanes(a.keep, row, a.column + at, count, lane);
      const float* sums = a.sums + t * a.columns + at;
      if (a.half) {
        add_kept(sums, lane, a.keep.least, count, static_cast<Half*>(a.to) + t * a.stride + at);
      } else {
        add_kept(sums, lane, a.keep.least, count, static_cast<float*>(a.to) + t * a.stride + at);
      }
    }
  }
}

CRAM_FOR_EACH_TARGET(copies, copy_rows, (const Copy& c), (c))
CRAM_FOR_EACH_TARGET(adds, add_rows, (const Add& a), (a))

}  // namespace

std::optional<Keep> make_keep(int64_t dropped, int64_t row_word, int64_t pair_word, int64_t columns) {
  if (!dropped) return std::nullopt;
  Keep keep{static_cast<int16_t>(dropped - 0x8000), static_cast<uint32_t>(row_word), {}};
  keep.pairs.resize((columns + 1) / 2);
  for (size_t p = 0; p < keep.pairs.size(); ++p) {
    keep.pairs[p] = finish(static_cast<uint32_t>(p) + static_cast<uint32_t>(pair_word));
  }
  return keep;
}

void Keep::copy(
    const void* from, int64_t stride, bool half, int64_t token, int64_t tokens, int64_t column, int64_t columns,
    void* to) const {
  copies_best()({*this, from, stride, half, token, tokens, column, columns, to});
}

void Keep::add(
    const float* sums, int64_t token, int64_t tokens, int64_t column, int64_t columns, void* to, int64_t stride,
    bool half) const {
  adds_best()({*this, sums, token, tokens, column, columns, to, stride, half});
}

}  // namespace cram
