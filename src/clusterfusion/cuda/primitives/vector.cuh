// Element types, and vectors of them that move in accesses of up to 16 bytes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace clusterfusion {

constexpr int kMaxAccessBytes = 16;  // the widest load or store of one thread

// kWidth elements; aligned so that the compiler moves them in the widest accesses, several when they exceed 16 bytes.
template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth < kMaxAccessBytes ? sizeof(T) * kWidth : kMaxAccessBytes) Vector {
  T element[kWidth];
};

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

// Nearest value of type T, ties to even.
template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

}  // namespace clusterfusion
