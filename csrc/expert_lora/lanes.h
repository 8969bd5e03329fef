// What SHRINK and EXPAND in float32 lanes share: values of both types as vectors, and memory of a thread.

#pragma once

#include "../vector.h"
#include "products.h"

#include <vector>

namespace cram {

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

enum class Use { rows, tokens, sums };

// Memory of a thread for one use, at least so many floats.
template <Use>
float* kept(int64_t floats) {
  static thread_local std::vector<float> memory;
  if (static_cast<int64_t>(memory.size()) < floats) memory.resize(floats);
  return memory.data();
}

}  // namespace cram
