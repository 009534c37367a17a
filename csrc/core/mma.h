// One product of small matrices by a warp's tensor cores, in half precision with sums in float.
#pragma once
#include <stdint.h>
#include <string.h>

#include "core/cuda.h"

namespace spk {

// d += a b, a: [16, 16], b: [16, 8]. With g = lane / 4 and k = lane % 4 * 2, a lane holds in a: (g, k), (g + 8, k), (g, k + 8),
// (g + 8, k + 8), each with the next column; in b: (k, g), (k + 8, g), each with the next row; in d: (g, k), (g, k + 1),
// (g + 8, k), (g + 8, k + 1). Products are exact; a sum of n of them errs by at most n 2^-23 of its terms' sizes.
#if defined(SPK_HOST)
template <class T>
inline void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  constexpr unsigned kAll = ~0u;
  const int lane = threadIdx.x % 32, g = lane / 4, column = lane % 4 * 2;
  const auto numbers = [](uint32_t pair, float (&out)[2]) {
    T in[2];
    memcpy(in, &pair, sizeof in);
    for (int i = 0; i < 2; ++i) out[i] = load_float(in[i]);
  };
  for (int from = 0; from < 4; ++from)
    for (int half = 0; half < 2; ++half) {
      float upper[2], lower[2], left[2], right[2];
      numbers(__shfl_sync(kAll, a[2 * half], g * 4 + from), upper);
      numbers(__shfl_sync(kAll, a[2 * half + 1], g * 4 + from), lower);
      numbers(__shfl_sync(kAll, b[half], column * 4 + from), left);
      numbers(__shfl_sync(kAll, b[half], (column + 1) * 4 + from), right);
      for (int i = 0; i < 2; ++i) {
        d[0] += upper[i] * left[i];
        d[1] += upper[i] * right[i];
        d[2] += lower[i] * left[i];
        d[3] += lower[i] * right[i];
      }
    }
}
#else
#define SPK_MMA(TYPE)                                                 \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE \
               ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "         \
               "{%0,%1,%2,%3};"                                       \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
template <class T>
__device__ __forceinline__ void mma_16816(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
__device__ __forceinline__ void mma_16816<__half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  SPK_MMA("f16");
}
template <>
__device__ __forceinline__ void mma_16816<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  SPK_MMA("bf16");
}
#undef SPK_MMA
#endif

}  // namespace spk
