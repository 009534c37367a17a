// What every kernel of every backend shares: element types and the host/device marker. No torch, no std.
#pragma once
#include <stdint.h>

#if defined(__CUDACC__)
#define SPK_HD __host__ __device__ __forceinline__
#else
#define SPK_HD inline __attribute__((always_inline))
#endif

namespace spk {

enum class DType : int32_t { f32, bf16, f16, f64 };

// Error codes of kernels and launchers; launch.h turns them into exceptions. Positive: a cudaError_t.
constexpr int kOk = 0;
constexpr int kOutOfMemory = -1;

}  // namespace spk
