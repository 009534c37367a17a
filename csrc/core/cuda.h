// What a .cu file includes first: CUDA itself, or the host shim of csrc/testing that runs the same source on the CPU.
#pragma once
#if defined(SPK_HOST)
#include "testing/shim.h"
#else
#include <cuda_runtime.h>
#define SPK_LAUNCH(K, GRID, BLOCK, SMEM, STREAM, ...) K<<<GRID, BLOCK, SMEM, static_cast<cudaStream_t>(STREAM)>>>(__VA_ARGS__)
#define SPK_SHARED(T, NAME, DIMS) __shared__ T NAME DIMS
#define SPK_DYN_SHARED(T, NAME)                               \
  extern __shared__ __align__(16) unsigned char NAME##_raw[]; \
  T* NAME = reinterpret_cast<T*>(NAME##_raw)
#define SPK_LAST_ERROR() static_cast<int>(cudaGetLastError())
#endif
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "core/params.h"

namespace spk {

template <class T>
__device__ __forceinline__ float load_float(T v) {
  return float(v);
}
template <>
__device__ __forceinline__ float load_float<__half>(__half v) {
  return __half2float(v);
}
template <>
__device__ __forceinline__ float load_float<__nv_bfloat16>(__nv_bfloat16 v) {
  return __bfloat162float(v);
}
template <class T>
__device__ __forceinline__ T store_float(float v) {
  return T(v);
}
template <>
__device__ __forceinline__ __half store_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 store_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

// V neighbouring elements, moved by one access.
template <class T, int V>
struct alignas(sizeof(T) * V) Vec {
  T d[V];
};

}  // namespace spk
