// Reading rows of float32, bfloat16 or float16 four elements at a time, in float32.

#pragma once

#include "modules.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace cram {
namespace {

// A row-major matrix [count, depth].
struct Rows {
  const void* data;
  Type type;
  bool wide;  // every row starts on a boundary of four elements
};

inline Rows rows_of(const Operand& operand, int32_t depth) {
  const int64_t bytes = operand.type == Type::float32 ? 16 : 8;
  const bool wide = depth % 4 == 0 && reinterpret_cast<uintptr_t>(operand.data) % bytes == 0;
  return {operand.data, operand.type, wide};
}

// Readers give the elements index .. index + 3 in float32, of which the first `count` exist; the others are 0.
// A kernel is compiled for each of them, so that the loads of an unrolled loop are issued before the first is awaited.
template <typename T, typename Four>
struct Wide {
  const T* data;
  __device__ float4 operator()(int64_t index, int count) const {
    // Rows are whole fours: either all four elements exist or none.
    const Four raw = count > 0 ? *reinterpret_cast<const Four*>(data + index) : Four{};
    return widen(raw);
  }
  static __device__ float4 widen(const float4& raw) { return raw; }
  static __device__ float4 widen(const uint2& raw) {
    const float2 low = pair(raw.x, T{}), high = pair(raw.y, T{});
    return make_float4(low.x, low.y, high.x, high.y);
  }
  static __device__ float2 pair(const unsigned& raw, __nv_bfloat16) {
    return __bfloat1622float2(*reinterpret_cast<const __nv_bfloat162*>(&raw));
  }
  static __device__ float2 pair(const unsigned& raw, __half) {
    return __half22float2(*reinterpret_cast<const __half2*>(&raw));
  }
};

struct Narrow {
  Rows rows;
  __device__ float element(int64_t index) const {
    switch (rows.type) {
      case Type::float32: return static_cast<const float*>(rows.data)[index];
      case Type::bfloat16: return __bfloat162float(static_cast<const __nv_bfloat16*>(rows.data)[index]);
      default: return __half2float(static_cast<const __half*>(rows.data)[index]);
    }
  }
  __device__ float4 operator()(int64_t index, int count) const {
    return make_float4(
        count > 0 ? element(index) : 0,
        count > 1 ? element(index + 1) : 0,
        count > 2 ? element(index + 2) : 0,
        count > 3 ? element(index + 3) : 0);
  }
};

// Calls `work` with the reader of these rows; the choice is the same for a whole block.
template <typename Work>
__device__ inline void with_reader(const Rows& rows, const Work& work) {
  if (!rows.wide) {
    work(Narrow{rows});
  } else if (rows.type == Type::float32) {
    work(Wide<float, float4>{static_cast<const float*>(rows.data)});
  } else if (rows.type == Type::bfloat16) {
    work(Wide<__nv_bfloat16, uint2>{static_cast<const __nv_bfloat16*>(rows.data)});
  } else {
    work(Wide<__half, uint2>{static_cast<const __half*>(rows.data)});
  }
}

__device__ inline float dot(float total, const float4& x, const float4& y) {
  return fmaf(x.w, y.w, fmaf(x.z, y.z, fmaf(x.y, y.y, fmaf(x.x, y.x, total))));
}

__device__ inline void add(float4& total, float weight, const float4& x) {
  total.x = fmaf(weight, x.x, total.x);
  total.y = fmaf(weight, x.y, total.y);
  total.z = fmaf(weight, x.z, total.z);
  total.w = fmaf(weight, x.w, total.w);
}

// Stores the first `count` of four neighbours; gradients of all modules lie packed, so they may start anywhere.
__device__ inline void put(float* to, const float4& value, int count) {
  if (count >= 4 && reinterpret_cast<uintptr_t>(to) % sizeof(float4) == 0) {
    *reinterpret_cast<float4*>(to) = value;
    return;
  }
  if (count > 0) to[0] = value.x;
  if (count > 1) to[1] = value.y;
  if (count > 2) to[2] = value.z;
  if (count > 3) to[3] = value.w;
}

}  // namespace
}  // namespace cram
