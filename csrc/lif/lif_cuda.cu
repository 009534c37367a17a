// lif on CUDA; no torch header here (3.5 s to compile instead of 16). Also runs on the CPU by csrc/testing/shim.h.
#include "core/surrogate.h"
#include "lif/lif_cuda.h"

namespace spk {
namespace {

// The launch bounds name 6 and 8 blocks on a multiprocessor: without them ptxas aims higher and spills.
constexpr int kFwdBlock = 128;
constexpr int kBwdBlock = 64;
constexpr int kBwdShared = 48 << 10;  // bytes a block may take without opting in
constexpr int kReduceBlock = 256;

// A parameter for the V neurons from i on: a number, one tensor element, or one per channel.
template <int V>
__device__ __forceinline__ void load_parameter(float (&d)[V], const void* values, float number, const LifNeuron& p, int64_t i) {
  const float* q = static_cast<const float*>(values);
  fill(d, q && p.C == 1 ? q[0] : number);
  if (!q || p.C == 1) return;
#pragma unroll
  for (int k = 0; k < V; ++k) d[k] = q[(i + k) / p.inner % p.C];
}

// A thread owns V neighbouring neurons, walks t = 0 ... T-1 and keeps their potentials in registers.
template <class T, int V>
__global__ void __launch_bounds__(kFwdBlock, 6) lif_fwd_kernel(const LifFwd p, const Neuron<float> c) {
  const int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * V;
  if (i >= p.N) return;
  const T* __restrict__ x = static_cast<const T*>(p.x) + i;  // [T, N]
  T* __restrict__ s_out = static_cast<T*>(p.s) + i;          // [T, N] unless packed
  float v[V], decay[V], gain[V];
  unsigned bits[V] = {};
  load_parameter(decay, p.neuron.decay_c, float(p.neuron.decay), p.neuron, i);
  load_parameter(gain, p.neuron.gain_c, float(p.neuron.gain), p.neuron, i);
  if (p.v_init)
    load(v, static_cast<const float*>(p.v_init) + i);
  else
    fill(v, c.rest);
#pragma unroll 4
  for (int64_t t = 0; t < p.T; ++t) {
    float in[V], h[V], s[V];
    load(in, x + t * p.x_step);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      h[k] = charge(v[k], in[k], decay[k], gain[k], c.rest);
      s[k] = h[k] >= c.fire_at ? 1.f : 0.f;
      v[k] = reset(h[k], p.neuron.hard, c);
    }
    if (p.h) store(static_cast<float*>(p.h) + t * p.N + i, h);
    if (p.v) store(static_cast<float*>(p.v) + t * p.N + i, v);
    if (!p.packed) {
      store(s_out + t * p.N, s);
      continue;
    }
#pragma unroll
    for (int k = 0; k < V; ++k) bits[k] |= (h[k] >= c.fire_at ? 1u : 0u) << (t % 8);
    if (t % 8 == 7 || t + 1 == p.T) {
      Vec<uint8_t, V> out;
#pragma unroll
      for (int k = 0; k < V; ++k) {
        out.d[k] = uint8_t(bits[k]);
        bits[k] = 0;
      }
      *reinterpret_cast<Vec<uint8_t, V>*>(static_cast<uint8_t*>(p.s) + t / 8 * p.N + i) = out;
    }
  }
  store(static_cast<float*>(p.v_last) + i, v);
}

// A thread owns V neighbouring neurons. It walks the segments forward to leave checkpoints, then each segment forward,
// its h in the thread's own slots of shared memory, and back; gradients of v and the parameters' sums stay in registers.
template <class T, int V, Surrogate K>
__global__ void __launch_bounds__(kBwdBlock, 8) lif_bwd_kernel(const LifBwd p, const Neuron<float> c) {
  constexpr int W = V < 4 ? V : 4;
  SPK_DYN_SHARED(float, held);  // [steps, V / W, threads, W]
  const int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * V;
  if (i >= p.N) return;
  const bool hard = p.neuron.hard;
  const T* __restrict__ x = static_cast<const T*>(p.x) + i;      // [T, N]
  const T* __restrict__ g_s = static_cast<const T*>(p.g_s) + i;  // [T, N], not read where null
  T* __restrict__ g_x = static_cast<T*>(p.g_x) + i;              // [T, N]
  float start[V], v[V], decay[V], gain[V], g_v[V], sum_decay[V] = {}, sum_gain[V] = {};
  const auto slot = [&](int t, int j) { return held + ((t * (V / W) + j / W) * kBwdBlock + threadIdx.x) * W; };
  const auto advance = [&](int64_t t, float (&h)[V]) {
    float in[V];
    load(in, x + t * p.x_step);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      h[k] = charge(v[k], in[k], decay[k], gain[k], c.rest);
      v[k] = reset(h[k], hard, c);
    }
  };
  const auto keep = [&](int t, const float (&h)[V]) {
#pragma unroll
    for (int j = 0; j < V; j += W) {
      Vec<float, W> out;
#pragma unroll
      for (int k = 0; k < W; ++k) out.d[k] = h[j + k];
      *reinterpret_cast<Vec<float, W>*>(slot(t, j)) = out;
    }
  };
  const auto recall = [&](int t, float (&h)[V]) {
#pragma unroll
    for (int j = 0; j < V; j += W) {
      const Vec<float, W> in = *reinterpret_cast<const Vec<float, W>*>(slot(t, j));
#pragma unroll
      for (int k = 0; k < W; ++k) h[j + k] = in.d[k];
    }
  };
  const auto begin_segment = [&](int64_t k) {
    if (k > 0)
      load(start, p.checkpoints + (k - 1) * p.N + i);
    else if (p.v_init)
      load(start, static_cast<const float*>(p.v_init) + i);
    else
      fill(start, c.rest);
#pragma unroll
    for (int j = 0; j < V; ++j) v[j] = start[j];
  };

  load_parameter(decay, p.neuron.decay_c, float(p.neuron.decay), p.neuron, i);
  load_parameter(gain, p.neuron.gain_c, float(p.neuron.gain), p.neuron, i);
  const int64_t segments = (p.T + p.steps - 1) / p.steps;
  begin_segment(0);
  for (int64_t t = 0; t < (segments - 1) * p.steps; ++t) {
    float h[V];
    advance(t, h);
    if ((t + 1) % p.steps == 0) store(p.checkpoints + t / p.steps * p.N + i, v);
  }
  if (p.g_v_last)
    load(g_v, static_cast<const float*>(p.g_v_last) + i);
  else
    fill(g_v, 0.f);

  for (int64_t segment = segments - 1; segment >= 0; --segment) {
    const int64_t t0 = segment * p.steps;
    const int n = int(p.T - t0 < p.steps ? p.T - t0 : p.steps);
    begin_segment(segment);
    float h[V];
#pragma unroll 4
    for (int t = 0; t < n; ++t) {
      advance(t0 + t, h);
      keep(t, h);
    }
    for (int t = n - 1; t >= 0; --t) {
      const int64_t row = (t0 + t) * p.N;
      float gs[V], gh[V], g[V], out[V];
      recall(t, h);
      if (p.g_s)
        load(gs, g_s + row);
      else
        fill(gs, 0.f);
      if (p.g_h)
        load(gh, static_cast<const float*>(p.g_h) + row + i);
      else
        fill(gh, 0.f);
      if (p.g_v) {
        float gv[V];
        load(gv, static_cast<const float*>(p.g_v) + row + i);
#pragma unroll
        for (int k = 0; k < V; ++k) g_v[k] += gv[k];
      }
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const float sg = surrogate<K, float>(h[k] - c.threshold, float(p.a), float(p.b));
        g[k] = step_backward(h[k], gs[k], g_v[k], gh[k], sg, hard, p.detach, c);
        out[k] = gain[k] * g[k];
        g_v[k] = decay[k] * g[k];
      }
      store(g_x + row, out);
      if (p.g_gain) {
        float in[V];
        load(in, x + (t0 + t) * p.x_step);
#pragma unroll
        for (int k = 0; k < V; ++k) sum_gain[k] += g[k] * in[k];
      }
      if (p.g_decay) {
        if (t > 0) recall(t - 1, h);
#pragma unroll
        for (int k = 0; k < V; ++k) sum_decay[k] += g[k] * ((t > 0 ? reset(h[k], hard, c) : start[k]) - c.rest);
      }
    }
  }
  if (p.g_decay) store(static_cast<float*>(p.g_decay) + i, sum_decay);
  if (p.g_gain) store(static_cast<float*>(p.g_gain) + i, sum_gain);
  if (p.g_v_init) store(static_cast<float*>(p.g_v_init) + i, g_v);
}

// Block (c, part) sums one part of channel c's neurons: each thread strides through it, then a tree in shared memory.
__global__ void __launch_bounds__(kReduceBlock) lif_reduce_kernel(const LifReduce p) {
  SPK_SHARED(double, sums, [kReduceBlock]);
  const float* __restrict__ in = static_cast<const float*>(p.in);  // [N]
  const int64_t c = blockIdx.x, count = p.N / p.C, parts = gridDim.y;
  const int64_t begin = count * blockIdx.y / parts, end = count * (blockIdx.y + 1) / parts;
  double sum = 0;
  for (int64_t j = begin + threadIdx.x; j < end; j += kReduceBlock) sum += in[(j / p.inner * p.C + c) * p.inner + j % p.inner];
  sums[threadIdx.x] = sum;
  __syncthreads();
  for (int width = kReduceBlock / 2; width > 0; width /= 2) {
    if (int(threadIdx.x) < width) sums[threadIdx.x] += sums[threadIdx.x + width];
    __syncthreads();
  }
  if (threadIdx.x == 0) p.partial[c * parts + blockIdx.y] = sums[0];
}

// A thread owns a channel and adds its parts in their order.
__global__ void __launch_bounds__(kReduceBlock) lif_reduce_parts_kernel(const LifReduce p, int parts) {
  const int64_t c = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (c >= p.C) return;
  double sum = 0;
  for (int j = 0; j < parts; ++j) sum += p.partial[c * parts + j];
  static_cast<float*>(p.out)[c] = float(sum);
}

template <class T, int V>
int forward(const LifFwd& p, void* stream) {
  SPK_LAUNCH((lif_fwd_kernel<T, V>), dim3(blocks(p.N / V, kFwdBlock)), dim3(kFwdBlock), 0, stream, p, constants(p.neuron));
  (void)stream;
  return SPK_LAST_ERROR();
}

template <class T>
int forward(const LifFwd& p, void* stream) {
  constexpr int V = 16 / sizeof(T);
  const bool vector = p.N % V == 0 && p.x_step % V == 0 && aligned(p.x) && aligned(p.v_init) && aligned(p.s) && aligned(p.v_last) &&
                      aligned(p.h) && aligned(p.v);
  return vector ? forward<T, V>(p, stream) : forward<T, 1>(p, stream);
}

template <class T, int V, Surrogate K>
int backward(const LifBwd& p, void* stream) {
  const size_t shared = size_t(p.steps) * kBwdBlock * V * sizeof(float);
  SPK_LAUNCH((lif_bwd_kernel<T, V, K>), dim3(blocks(p.N / V, kBwdBlock)), dim3(kBwdBlock), shared, stream, p, constants(p.neuron));
  (void)stream;
  return SPK_LAST_ERROR();
}

template <class T, int V>
int backward(const LifBwd& p, void* stream) {
  switch (static_cast<Surrogate>(p.surrogate)) {
    case Surrogate::atan: return backward<T, V, Surrogate::atan>(p, stream);
    case Surrogate::sigmoid: return backward<T, V, Surrogate::sigmoid>(p, stream);
    case Surrogate::rectangle: return backward<T, V, Surrogate::rectangle>(p, stream);
    case Surrogate::triangle: return backward<T, V, Surrogate::triangle>(p, stream);
    case Surrogate::fast_sigmoid: return backward<T, V, Surrogate::fast_sigmoid>(p, stream);
    case Surrogate::erf: return backward<T, V, Surrogate::erf>(p, stream);
    default: return backward<T, V, Surrogate::leaky_relu>(p, stream);
  }
}

template <class T>
int backward(const LifBwd& p, void* stream) {
  constexpr int V = 16 / sizeof(T);
  const bool vector = p.N % V == 0 && p.x_step % V == 0 && aligned(p.x) && aligned(p.v_init) && aligned(p.g_s) &&
                      aligned(p.g_v_last) && aligned(p.g_h) && aligned(p.g_v) && aligned(p.g_x);
  return vector ? backward<T, V>(p, stream) : backward<T, 1>(p, stream);
}

}  // namespace

int lif_fwd_cuda(const LifFwd& p, void* stream) {
  switch (p.dtype) {
    case DType::f32: return forward<float>(p, stream);
    case DType::bf16: return forward<__nv_bfloat16>(p, stream);
    default: return forward<__half>(p, stream);
  }
}

int lif_bwd_cuda(const LifBwd& p, void* stream) {
  switch (p.dtype) {
    case DType::f32: return backward<float>(p, stream);
    case DType::bf16: return backward<__nv_bfloat16>(p, stream);
    default: return backward<__half>(p, stream);
  }
}

int lif_bwd_steps(DType dtype, int64_t T) {
  const int V = dtype == DType::f32 ? 4 : 8;
  const int64_t most = kBwdShared / (kBwdBlock * V * int64_t(sizeof(float)));
  const int64_t segments = (T + most - 1) / most;
  return int((T + segments - 1) / segments);  // equal segments: as little as possible is read twice
}

int64_t lif_reduce_parts(int64_t N, int64_t C) {
  const int64_t parts = N / C / 4096;
  return parts < 1 ? 1 : (parts > 512 ? 512 : parts);
}

int lif_reduce_cuda(const LifReduce& p, void* stream) {
  const int parts = int(lif_reduce_parts(p.N, p.C));
  SPK_LAUNCH(lif_reduce_kernel, dim3(unsigned(p.C), unsigned(parts)), dim3(kReduceBlock), 0, stream, p);
  SPK_LAUNCH(lif_reduce_parts_kernel, dim3(blocks(p.C, kReduceBlock)), dim3(kReduceBlock), 0, stream, p, parts);
  (void)stream;
  return SPK_LAST_ERROR();
}

}  // namespace spk
