// What lif's CUDA kernels share with those of other operators: a neuron's constants, vectors of V numbers.
#pragma once
#include <math.h>

#include "core/cuda.h"
#include "lif/lif.h"
#include "lif/neuron.h"

namespace spk {
namespace {

Neuron<float> constants(const LifNeuron& p) {
  const float threshold = float(p.threshold), above = nextafterf(threshold, INFINITY);
  // Nothing lies above infinity, and no potential is >= NaN.
  return {float(p.rest), !p.strict ? threshold : above > threshold ? above : NAN, threshold, float(p.reset_by)};
}

// V numbers of T from or to memory as floats, in accesses of at most 16 bytes.
template <int V, class T>
__device__ __forceinline__ void load(float (&d)[V], const T* __restrict__ p) {
  constexpr int W = sizeof(T) * V > 16 ? 16 / sizeof(T) : V;
#pragma unroll
  for (int j = 0; j < V; j += W) {
    const Vec<T, W> in = *reinterpret_cast<const Vec<T, W>*>(p + j);
#pragma unroll
    for (int k = 0; k < W; ++k) d[j + k] = load_float<T>(in.d[k]);
  }
}
template <int V, class T>
__device__ __forceinline__ void store(T* __restrict__ p, const float (&d)[V]) {
  constexpr int W = sizeof(T) * V > 16 ? 16 / sizeof(T) : V;
#pragma unroll
  for (int j = 0; j < V; j += W) {
    Vec<T, W> out;
#pragma unroll
    for (int k = 0; k < W; ++k) out.d[k] = store_float<T>(d[j + k]);
    *reinterpret_cast<Vec<T, W>*>(p + j) = out;
  }
}
template <int V>
__device__ __forceinline__ void fill(float (&d)[V], float value) {
#pragma unroll
  for (int k = 0; k < V; ++k) d[k] = value;
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

unsigned blocks(int64_t threads, int block) { return unsigned((threads + block - 1) / block); }

}  // namespace
}  // namespace spk
