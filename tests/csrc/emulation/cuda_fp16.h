#pragma once

#include <cuda_runtime.h>
#include <torch/headeronly/util/Half.h>

using __half = torch::headeronly::Half;
struct __half2 {
  __half x, y;
};
inline float __half2float(__half value) { return static_cast<float>(value); }
inline float2 __half22float2(__half2 value) { return {__half2float(value.x), __half2float(value.y)}; }
