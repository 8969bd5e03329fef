// The tile unit of a processor with AMX: eight registers of 16 rows of 64 bytes.
//
// A register holds 16 x 16 float32 sums, 16 x 32 bfloat16 values of a left operand, or 32 x 16 bfloat16 values of a
// right operand, of which two neighbours in depth stand together. `multiply` adds left times right to the sums.
//
// With CRAM_TILE_MODEL the registers are arrays and the instruction is a loop, so that tests run what surrounds it on
// any machine. The model adds products in the order of the depth, which the manual allows; its bits are not the
// unit's.

#pragma once

#include "products.h"

#include <cstdint>
#include <cstring>

#if !defined(CRAM_TILE_MODEL) && defined(__x86_64__) && defined(__linux__) && \
    ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11))
#define CRAM_TILE_UNIT 1
#endif

namespace cram {

// Sums of a register are kTile x kTile; an operand is kTile x kDepth.
constexpr int64_t kTile = 16, kDepth = 32, kTileBytes = 1024;

#if defined(CRAM_TILE_UNIT)

struct TileUnit {
  static void configure() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } const shape;
    __asm__ volatile("ldtilecfg %0" : : "m"(shape));
  }
  static void release() { __asm__ volatile("tilerelease"); }
  template <int R>
  static inline __attribute__((always_inline)) void zero() {
    __asm__ volatile("tilezero %%tmm%c0" : : "i"(R));
  }
  template <int R>
  static inline __attribute__((always_inline)) void load(const void* from, int64_t row_bytes) {
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(row_bytes), "i"(R) : "memory");
  }
  template <int R>
  static inline __attribute__((always_inline)) void store(float* to, int64_t row_bytes) {
    __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(row_bytes), "i"(R) : "memory");
  }
  template <int Sums, int Left, int Right>
  static inline __attribute__((always_inline)) void multiply() {
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sums), "i"(Left), "i"(Right));
  }
};

#elif defined(CRAM_TILE_MODEL)

struct TileUnit {
  static char* memory(int r) {
    alignas(64) static thread_local char registers[8][kTileBytes];
    return registers[r];
  }
  static void configure() {}
  static void release() {}
  template <int R>
  static void zero() {
    std::memset(memory(R), 0, kTileBytes);
  }
  template <int R>
  static void load(const void* from, int64_t row_bytes) {
    for (int64_t i = 0; i < kTile; ++i) {
      std::memcpy(memory(R) + 64 * i, static_cast<const char*>(from) + i * row_bytes, 64);
    }
  }
  template <int R>
  static void store(float* to, int64_t row_bytes) {
    for (int64_t i = 0; i < kTile; ++i) {
      std::memcpy(reinterpret_cast<char*>(to) + i * row_bytes, memory(R) + 64 * i, 64);
    }
  }
  template <int Sums, int Left, int Right>
  static void multiply() {
    float* sums = reinterpret_cast<float*>(memory(Sums));
    const Half *left = reinterpret_cast<Half*>(memory(Left)), *right = reinterpret_cast<Half*>(memory(Right));
    for (int64_t i = 0; i < kTile; ++i) {
      for (int64_t j = 0; j < kTile; ++j) {
        for (int64_t k = 0; k < kDepth; ++k) {
          sums[i * kTile + j] += widen(left[i * kDepth + k]) * widen(right[k / 2 * kDepth + 2 * j + k % 2]);
        }
      }
    }
  }
};

#endif

}  // namespace cram
