// Small kernels on which the tools of this folder are tested; each TOY_... plants one defect.
#include "core/cuda.h"

using spk::load_float;
using spk::store_float;
using spk::Vec;

struct Scale {
  const float* x;
  float* y;
  int64_t n;
  float factor;
};

// A thread owns V neighbouring elements and moves them by one access.
template <class T, int V>
__global__ void scale_kernel(const T* __restrict__ x, T* __restrict__ y, int64_t n, float factor) {
  const int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * V;
#if !defined(TOY_NO_MASK)
  if (i >= n) return;
#endif
  const Vec<T, V> in = *reinterpret_cast<const Vec<T, V>*>(x + i);
  Vec<T, V> out;
#pragma unroll
  for (int k = 0; k < V; ++k) out.d[k] = store_float<T>(load_float<T>(in.d[k]) * factor);
  *reinterpret_cast<Vec<T, V>*>(y + i) = out;
#if defined(TOY_WRITE_INPUT)
  const_cast<T*>(x)[i] = out.d[0];
#endif
}

// The same with its arguments in a struct, one element a thread, `stride` apart within the warp.
__global__ void scale_struct_kernel(const Scale p, int stride) {
  const int64_t j = int64_t(blockIdx.x) * blockDim.x + threadIdx.x, columns = (p.n + stride - 1) / stride;
  const int64_t i = j % columns * stride + j / columns;
  if (j >= columns * stride || i >= p.n) return;
  p.y[i] = p.x[i] * p.factor;
}

// A block owns a row: warp sums by shuffle, then over shared memory; the rows' sum by an atomic.
__global__ void row_sum_kernel(const float* __restrict__ x, float* __restrict__ rows, float* __restrict__ total,
                               unsigned* __restrict__ bits, int columns) {
  SPK_SHARED(float, part, [32]);
  float sum = 0.f;
  for (int c0 = 0; c0 < columns; c0 += blockDim.x) {
    const int c = c0 + threadIdx.x;
    const float v = c < columns ? x[int64_t(blockIdx.x) * columns + c] : 0.f;
    const unsigned word = __ballot_sync(~0u, v > 0.f);
    if (threadIdx.x % 32 == 0 && c < columns) bits[int64_t(blockIdx.x) * ((columns + 31) / 32) + c / 32] = word;
    sum += v;
  }
#if defined(TOY_SHUFFLE_MASK)
  for (int o = 16; o; o /= 2) sum += __shfl_xor_sync(0xffffu, sum, o);
#else
  for (int o = 16; o; o /= 2) sum += __shfl_xor_sync(~0u, sum, o);
#endif
#if defined(TOY_UNINITIALISED)
  if (threadIdx.x == 0) part[0] = sum;
#else
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = sum;
#endif
#if !defined(TOY_NO_BARRIER)
  __syncthreads();
#endif
  if (threadIdx.x != 0) return;
  sum = 0.f;
  for (unsigned w = 0; w < blockDim.x / 32; ++w) sum += part[w];
  rows[blockIdx.x] = sum;
#if defined(TOY_BLOCK_RACE)
  total[0] += sum;
#else
  atomicAdd(total, sum);
#endif
}

// A block owns a row and reverses it through dynamic shared memory.
__global__ void reverse_kernel(const float* __restrict__ x, float* __restrict__ y, int columns) {
  SPK_DYN_SHARED(float, row);
  const int64_t base = int64_t(blockIdx.x) * columns;
  if (int(threadIdx.x) < columns) row[threadIdx.x] = x[base + threadIdx.x];
#if defined(TOY_DIVERGENT)
  if (int(threadIdx.x) < columns)
#endif
    __syncthreads();
  if (int(threadIdx.x) < columns) y[base + threadIdx.x] = row[columns - 1 - threadIdx.x];
}

template <class T, int V>
static int scale(const void* x, void* y, int64_t n, float factor) {
  const unsigned blocks = unsigned((n + 64 * V - 1) / (64 * V));
  SPK_LAUNCH((scale_kernel<T, V>), dim3(blocks), dim3(64), 0, nullptr, static_cast<const T*>(x), static_cast<T*>(y), n, factor);
  return SPK_LAST_ERROR();
}

extern "C" {
int toy_scale(int dtype, const void* x, void* y, int64_t n, float factor) {
  if (dtype == 0) return scale<float, 4>(x, y, n, factor);
  return dtype == 1 ? scale<__half, 8>(x, y, n, factor) : scale<__nv_bfloat16, 8>(x, y, n, factor);
}
int toy_scale_struct(const float* x, float* y, int64_t n, float factor, int stride) {
  const Scale p{x, y, n, factor};
  SPK_LAUNCH(scale_struct_kernel, dim3(unsigned((n + 63 + stride) / 64)), dim3(64), 0, nullptr, p, stride);
  return SPK_LAST_ERROR();
}
int toy_row_sum(const float* x, float* rows, float* total, unsigned* bits, int R, int columns) {
  SPK_LAUNCH(row_sum_kernel, dim3(unsigned(R)), dim3(64), 0, nullptr, x, rows, total, bits, columns);
  return SPK_LAST_ERROR();
}
int toy_reverse(const float* x, float* y, int R, int columns) {
  SPK_LAUNCH(reverse_kernel, dim3(unsigned(R)), dim3(64), columns * sizeof(float), nullptr, x, y, columns);
  return SPK_LAST_ERROR();
}
}
