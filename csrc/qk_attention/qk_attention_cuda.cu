// qk_attention on CUDA; no torch header here. Also runs on the CPU by csrc/testing/shim.h. Forward: the attention neurons'
// input I, then what they let pass. Backward: I and the gradient of a, the attention neurons' step back, then each operand's.
#include <math.h>

#include "core/cuda.h"
#include "core/surrogate.h"
#include "lif/neuron.h"
#include "qk_attention/qk_attention.h"

namespace spk {
namespace {

// Launch bounds name how many of these a multiprocessor holds where ptxas would aim higher and spill.
constexpr int kBlock = 128;
constexpr int kWarps = kBlock / 32;
constexpr int kShared = 48 << 10;  // bytes a block may take without opting in
constexpr int kSteps = 32;         // time steps of a segment at most: a bit each

// A neuron as the kernels take it.
struct QkLif {
  QkNeuron p;
  Neuron<float> c;

  __device__ float decay(int64_t h) const {
    return p.decay_h ? static_cast<const float*>(p.decay_h)[h * p.decay_step] : float(p.decay);
  }
  __device__ float gain(int64_t h) const { return p.gain_h ? static_cast<const float*>(p.gain_h)[h * p.gain_step] : float(p.gain); }
};

QkLif lif_of(const QkNeuron& p) {
  const float threshold = float(p.threshold), above = nextafterf(threshold, INFINITY);
  // Nothing lies above infinity, and no potential is >= NaN.
  return {p, {float(p.rest), !p.strict ? threshold : above > threshold ? above : NAN, threshold, float(p.reset_by)}};
}

__device__ float slope(const QkLif& f, float h) {
  const float u = h - f.c.threshold, a = float(f.p.a), b = float(f.p.b);
  switch (static_cast<Surrogate>(f.p.surrogate)) {
    case Surrogate::atan: return surrogate<Surrogate::atan, float>(u, a, b);
    case Surrogate::sigmoid: return surrogate<Surrogate::sigmoid, float>(u, a, b);
    case Surrogate::rectangle: return surrogate<Surrogate::rectangle, float>(u, a, b);
    case Surrogate::triangle: return surrogate<Surrogate::triangle, float>(u, a, b);
    case Surrogate::fast_sigmoid: return surrogate<Surrogate::fast_sigmoid, float>(u, a, b);
    case Surrogate::erf: return surrogate<Surrogate::erf, float>(u, a, b);
    default: return surrogate<Surrogate::leaky_relu, float>(u, a, b);
  }
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
    if constexpr (sizeof(out) == 16)  // an ordinary store may be taken apart
      __stwb(reinterpret_cast<uint4*>(p + j), bit_cast<uint4>(out));
    else
      *reinterpret_cast<Vec<T, W>*>(p + j) = out;
  }
}

// What V neighbouring elements of an operand hold from time step to time step: its numbers, or spikes of their neurons.
template <class T, int V>
struct Stream {
  const T* at;
  int64_t step;
  bool current;
  float v[V], decay, gain;

  __device__ __forceinline__ Stream(const QkIn& x, int64_t offset, const QkLif& f, int64_t h, bool current)
      : at(static_cast<const T*>(x.data) + offset), step(x.t), current(current), decay(0), gain(0) {
    if (!current) return;
    decay = f.decay(h);
    gain = f.gain(h);
#pragma unroll
    for (int k = 0; k < V; ++k) v[k] = f.c.rest;
  }
  // The numbers or spikes of step t (steps must follow one another where these are currents), and the potentials.
  __device__ __forceinline__ void next(const QkLif& f, int64_t t, float (&s)[V], float (&potential)[V]) {
    load(s, at + t * step);
    if (!current) return;
#pragma unroll
    for (int k = 0; k < V; ++k) {
      potential[k] = charge(v[k], s[k], decay, gain, f.c.rest);
      s[k] = potential[k] >= f.c.fire_at ? 1.f : 0.f;
      v[k] = reset(potential[k], f.p.hard, f.c);
    }
  }
};

__device__ __forceinline__ int64_t offset(const QkIn& x, int64_t b, int64_t h, int64_t r, int64_t l) {
  return b * x.b + h * x.h + r * x.r + l;
}

// out[t, b, h, j] = sum over the rows (COLUMNS: j is a column) or over row j of x, or of x * w. A block owns 32 V columns,
// each of its warps every fourth row of them; or four rows, one a warp. It walks the time steps in segments whose partial
// sums fit into shared memory, each thread's in its own slots.
template <class T, int V, bool COLUMNS>
__global__ void __launch_bounds__(kBlock, 5)
    qk_sum_kernel(const QkShape shape, const QkLif f, const QkIn x, const QkIn w, bool w_currents, float* out, int steps) {
  constexpr int S = COLUMNS ? V : 1;  // numbers a slot
  SPK_DYN_SHARED(float, held);        // [steps, S, threads]
  const int64_t J = COLUMNS ? shape.L : shape.R, parts = COLUMNS ? (J + 32 * V - 1) / (32 * V) : (J + kWarps - 1) / kWarps;
  const int64_t part = blockIdx.x % parts, bh = blockIdx.x / parts, h = bh % shape.H, b = bh / shape.H;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t r0 = COLUMNS ? warp : part * kWarps + warp, l0 = COLUMNS ? (part * 32 + lane) * V : int64_t(lane) * V;
  const int64_t r1 = COLUMNS ? shape.R : (r0 + 1 < shape.R ? r0 + 1 : shape.R),
                l1 = COLUMNS ? (l0 < shape.L ? l0 + 1 : l0) : shape.L;
  for (int64_t t0 = 0; t0 < shape.T; t0 += steps) {
    const int n = int(shape.T - t0 < steps ? shape.T - t0 : steps);
    for (int t = 0; t < n; ++t)
#pragma unroll
      for (int k = 0; k < S; ++k) held[(t * S + k) * kBlock + threadIdx.x] = 0.f;
    for (int64_t r = r0; r < r1; r += kWarps)
      for (int64_t l = l0; l < l1; l += 32 * V) {
        Stream<T, V> sx(x, offset(x, b, h, r, l), f, h, shape.currents);
        Stream<T, V> sw(w, w.data ? offset(w, b, h, r, l) : 0, f, h, w_currents);
        float p[V], q[V], potential[V];
        for (int64_t t = shape.currents ? 0 : t0; t < t0 + n; ++t) {
          sx.next(f, t, p, potential);
          if (w.data) {
            sw.next(f, t, q, potential);
#pragma unroll
            for (int k = 0; k < V; ++k) p[k] *= q[k];
          }
          if (t < t0) continue;
#pragma unroll
          for (int k = 0; k < V; ++k) held[((t - t0) * S + (COLUMNS ? k : 0)) * kBlock + threadIdx.x] += p[k];
        }
      }
    if (COLUMNS) {
      __syncthreads();
      if (warp == 0 && l0 < shape.L)
        for (int t = 0; t < n; ++t) {
          float sum[V];
#pragma unroll
          for (int k = 0; k < V; ++k) {
            sum[k] = 0.f;
            for (int i = 0; i < kWarps; ++i) sum[k] += held[(t * S + (COLUMNS ? k : 0)) * kBlock + i * 32 + lane];
          }
          store(out + ((t0 + t) * shape.B * shape.H + bh) * J + l0, sum);
        }
      __syncthreads();
    } else {
      for (int t = 0; t < n; ++t) {
        float sum = held[t * kBlock + threadIdx.x];
        for (int flip = 16; flip; flip /= 2) sum += __shfl_xor_sync(~0u, sum, flip);
        if (lane == 0 && r0 < shape.R) out[((t0 + t) * shape.B * shape.H + bh) * J + r0] = sum;
      }
    }
  }
}

// V elements of a block (b, h) that a thread owns: rows [R, L / V].
template <int V>
struct Own {
  int64_t b, h, bh, r, l;
  bool live;
  __device__ Own(const QkShape& s) {
    const int64_t count = s.R * (s.L / V), parts = (count + kBlock - 1) / kBlock;
    const int64_t i = blockIdx.x % parts * kBlock + threadIdx.x;
    bh = blockIdx.x / parts;
    b = bh / s.H;
    h = bh % s.H;
    r = i / (s.L / V);
    l = i % (s.L / V) * V;
    live = i < count;
  }
  // d: those of [B, H, J] that belong to these elements.
  __device__ __forceinline__ void neurons(float (&d)[V], const float* p, const QkShape& s) const {
    if (s.columns) {
      load(d, p + bh * s.L + l);
      return;
    }
    const float one = p[bh * s.R + r];
#pragma unroll
    for (int k = 0; k < V; ++k) d[k] = one;
  }
};

// A thread owns V elements and walks through time, potentials of attention neurons and of its own in registers.
template <class T, int V>
__global__ void __launch_bounds__(kBlock) qk_gate_kernel(const QkFwd p, const QkLif attn, const QkLif qkv) {
  const QkShape& s = p.shape;
  const Own<V> own(s);
  if (!own.live) return;
  const int64_t neurons = s.B * s.H * (s.columns ? s.L : s.R);
  const float decay = attn.decay(own.h), gain = attn.gain(own.h);
  Stream<T, V> y(p.y, offset(p.y, own.b, own.h, own.r, own.l), qkv, own.h, s.currents);
  T* const out = static_cast<T*>(p.out.data) + own.b * p.out.b + own.h * p.out.h + own.r * p.out.r + own.l;
  float v[V], in[V], sy[V], potential[V];
#pragma unroll
  for (int k = 0; k < V; ++k) v[k] = attn.c.rest;
  for (int64_t t = 0; t < s.T; ++t) {
    own.neurons(in, p.potentials + t * neurons, s);
    y.next(qkv, t, sy, potential);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const float h = charge(v[k], in[k], decay, gain, attn.c.rest);
      sy[k] = (h >= attn.c.fire_at ? 1.f : 0.f) * sy[k];
      v[k] = reset(h, attn.p.hard, attn.c);
    }
    store(out + t * p.out.t, sy);
  }
}

// The block's sum, of all threads: in thread 0.
__device__ double block_sum(double value) {
  SPK_SHARED(double, sums, [kBlock]);
  __syncthreads();
  sums[threadIdx.x] = value;
  __syncthreads();
  for (int width = kBlock / 2; width; width /= 2) {
    if (int(threadIdx.x) < width) sums[threadIdx.x] += sums[threadIdx.x + width];
    __syncthreads();
  }
  return sums[0];
}

// A thread owns an attention neuron: forward from I, whose place the potentials take, then back, from the gradient of a to
// that of I.
__global__ void __launch_bounds__(kBlock) qk_attn_bwd_kernel(const QkBwd p, const QkLif attn, int64_t parts) {
  const QkShape& s = p.shape;
  const int64_t J = s.columns ? s.L : s.R, blocks = (J + kBlock - 1) / kBlock, neurons = s.B * s.H * J;
  const int64_t j = blockIdx.x % blocks * kBlock + threadIdx.x, bh = blockIdx.x / blocks, h = bh % s.H;
  const float decay = attn.decay(h), gain = attn.gain(h);
  float* const in = p.potentials + bh * J + j;  // I, then h
  float* const g_a = p.g_attn + bh * J + j;
  float sum_decay = 0, sum_gain = 0;
  if (j < J) {
    float v = attn.c.rest;
    float* const potentials = in + s.T * neurons;
    for (int64_t t = 0; t < s.T; ++t) {
      potentials[t * neurons] = charge(v, in[t * neurons], decay, gain, attn.c.rest);
      v = reset(potentials[t * neurons], attn.p.hard, attn.c);
    }
    float g_v = 0;
    for (int64_t t = s.T - 1; t >= 0; --t) {
      const float ht = potentials[t * neurons];
      const float g = step_backward(ht, g_a[t * neurons], g_v, 0.f, slope(attn, ht), attn.p.hard, attn.p.detach, attn.c);
      g_a[t * neurons] = gain * g;
      g_v = decay * g;
      sum_gain += g * in[t * neurons];
      if (t > 0) sum_decay += g * (reset(potentials[(t - 1) * neurons], attn.p.hard, attn.c) - attn.c.rest);
    }
  }
  if (!p.sums) return;
  double* const sums = p.sums + bh * parts + blockIdx.x % blocks;
  const double decays = block_sum(sum_decay), gains = block_sum(sum_gain);
  if (threadIdx.x == 0) {
    sums[kAttnDecay * s.B * s.H * parts] = decays;
    sums[kAttnGain * s.B * s.H * parts] = gains;
  }
}

enum Operand { kY, kS, kW };

// The gradient of one operand: a * g_out, or that of I (times the other factor); that of a current goes on through its
// neurons. A thread owns V elements, walks the segments from the last: forward from the start, the segment's potentials in
// its own slots of shared memory, and back.
template <class T, int V>
__global__ void __launch_bounds__(kBlock, 3)
    qk_operand_bwd_kernel(const QkBwd p, const QkLif attn, const QkLif qkv, int operand, int steps, int64_t parts) {
  constexpr int W = V < 4 ? V : 4;
  SPK_DYN_SHARED(float, held);  // [steps, V / W, threads, W]
  const QkShape& s = p.shape;
  const Own<V> own(s);
  const int64_t neurons = s.B * s.H * (s.columns ? s.L : s.R);
  const QkIn x = operand == kY ? p.y : operand == kS ? p.s : p.w, other = operand == kY ? p.g_out : operand == kS ? p.w : p.s;
  const QkOut to = operand == kY ? p.g_y : operand == kS ? p.g_s : p.g_w;
  const bool other_currents = s.currents && operand != kY;
  double sum_decay = 0, sum_gain = 0;
  if (own.live) {
    const int64_t from = offset(x, own.b, own.h, own.r, own.l), beside = other.data ? offset(other, own.b, own.h, own.r, own.l) : 0;
    T* const out = static_cast<T*>(to.data) + own.b * to.b + own.h * to.h + own.r * to.r + own.l;
    const float* const factors = operand == kY ? p.potentials + s.T * neurons : p.g_attn;
    float g_v[V] = {}, over_decay[V] = {}, over_gain[V] = {};
    for (int64_t t0 = (s.T - 1) / steps * steps; t0 >= 0; t0 -= steps) {
      const int n = int(s.T - t0 < steps ? s.T - t0 : steps);
      float start[V] = {};
      unsigned spikes[V] = {};  // of the other factor
      if (s.currents) {
        Stream<T, V> own_stream(x, from, qkv, own.h, true), beside_stream(other, beside, qkv, own.h, other_currents);
        for (int64_t t = 0; t < t0 + n; ++t) {
          float sx[V], so[V], h[V], unused[V];
          if (t == t0)
#pragma unroll
            for (int k = 0; k < V; ++k) start[k] = own_stream.v[k];
          own_stream.next(qkv, t, sx, h);
          if (other.data && other_currents) beside_stream.next(qkv, t, so, unused);
          if (t < t0) continue;
#pragma unroll
          for (int k = 0; k < V; ++k) {
            held[((int(t - t0) * (V / W) + k / W) * kBlock + threadIdx.x) * W + k % W] = h[k];
            if (other.data && other_currents) spikes[k] |= (so[k] != 0 ? 1u : 0u) << (t - t0);
          }
        }
      }
      for (int t = n - 1; t >= 0; --t) {
        float f[V], o[V], g_x[V];
        own.neurons(f, factors + (t0 + t) * neurons, s);
        if (other.data && !other_currents) load(o, static_cast<const T*>(other.data) + beside + (t0 + t) * other.t);
#pragma unroll
        for (int k = 0; k < V; ++k) {
          if (operand == kY) f[k] = f[k] >= attn.c.fire_at ? 1.f : 0.f;
          if (other.data && other_currents) o[k] = float(spikes[k] >> t & 1);
          g_x[k] = other.data ? f[k] * o[k] : f[k];
        }
        if (s.currents) {
          const float decay = qkv.decay(own.h), gain = qkv.gain(own.h);
          float in[V];
          if (p.sums) load(in, static_cast<const T*>(x.data) + from + (t0 + t) * x.t);
#pragma unroll
          for (int k = 0; k < V; ++k) {
            const auto slot = [&](int i) { return held[((i * (V / W) + k / W) * kBlock + threadIdx.x) * W + k % W]; };
            const float h = slot(t);
            const float g = step_backward(h, g_x[k], g_v[k], 0.f, slope(qkv, h), qkv.p.hard, qkv.p.detach, qkv.c);
            g_x[k] = gain * g;
            g_v[k] = decay * g;
            if (p.sums) {
              over_gain[k] += g * in[k];
              over_decay[k] += g * ((t > 0 ? reset(slot(t - 1), qkv.p.hard, qkv.c) : start[k]) - qkv.c.rest);
            }
          }
        }
        store(out + (t0 + t) * to.t, g_x);
      }
    }
#pragma unroll
    for (int k = 0; k < V; ++k) {
      sum_decay += over_decay[k];
      sum_gain += over_gain[k];
    }
  }
  if (!p.sums || !s.currents) return;
  const int64_t blocks = (s.R * (s.L / V) + kBlock - 1) / kBlock;
  double* const sums = p.sums + own.bh * parts + operand * blocks + blockIdx.x % blocks;
  const double decays = block_sum(sum_decay), gains = block_sum(sum_gain);
  if (threadIdx.x == 0) {
    sums[kQkvDecay * s.B * s.H * parts] = decays;
    sums[kQkvGain * s.B * s.H * parts] = gains;
  }
}

// Packed spikes: as qk_sum_kernel, a thread a byte, its eight counts in registers; a block row of the grid a slice.
__global__ void __launch_bounds__(kBlock) qk_packed_sum_kernel(const QkFwd p) {
  SPK_SHARED(int, counts, [8 * kBlock]);
  const QkShape& s = p.shape;
  const int64_t J = s.columns ? s.L : s.R, each = s.columns ? 32 : kWarps, parts = (J + each - 1) / each;
  const int64_t part = blockIdx.x % parts, bh = blockIdx.x / parts % (s.B * s.H), slice = blockIdx.x / parts / (s.B * s.H);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t r0 = s.columns ? warp : part * kWarps + warp, l0 = s.columns ? part * 32 + lane : lane;
  const int64_t r1 = s.columns ? s.R : (r0 + 1 < s.R ? r0 + 1 : s.R), l1 = s.columns ? (l0 < s.L ? l0 + 1 : l0) : s.L;
  const auto byte = [&](const QkIn& x, int64_t r, int64_t l) {
    return unsigned(static_cast<const uint8_t*>(x.data)[slice * x.t + offset(x, bh / s.H, bh % s.H, r, l)]);
  };
  int count[8] = {};
  for (int64_t r = r0; r < r1; r += kWarps)
    for (int64_t l = l0; l < l1; l += 32) {
      const unsigned bits = byte(p.s, r, l) & (p.w.data ? byte(p.w, r, l) : 255u);
#pragma unroll
      for (int t = 0; t < 8; ++t) count[t] += int(bits >> t & 1);
    }
#pragma unroll
  for (int t = 0; t < 8; ++t) counts[t * kBlock + threadIdx.x] = count[t];
  __syncthreads();
  const int64_t j = s.columns ? l0 : r0;
  if ((s.columns ? warp : lane) != 0 || j >= J) return;
  for (int t = 0; t < 8 && slice * 8 + t < s.T; ++t) {
    int sum = 0;
    for (int i = 0; i < (s.columns ? kWarps : 32); ++i) sum += counts[t * kBlock + (s.columns ? i * 32 + lane : warp * 32 + i)];
    p.potentials[((slice * 8 + t) * s.B * s.H + bh) * J + j] = float(sum);
  }
}

__global__ void __launch_bounds__(kBlock) qk_packed_gate_kernel(const QkFwd p, const QkLif attn) {
  const QkShape& s = p.shape;
  const Own<1> own(s);
  if (!own.live) return;
  const int64_t neurons = s.B * s.H * (s.columns ? s.L : s.R);
  const float decay = attn.decay(own.h), gain = attn.gain(own.h);
  float v = attn.c.rest;
  for (int64_t slice = 0; slice * 8 < s.T; ++slice) {
    unsigned bits = 0;
    for (int t = 0; t < 8 && slice * 8 + t < s.T; ++t) {
      float in[1];
      own.neurons(in, p.potentials + (slice * 8 + t) * neurons, s);
      const float h = charge(v, in[0], decay, gain, attn.c.rest);
      bits |= (h >= attn.c.fire_at ? 1u : 0u) << t;
      v = reset(h, attn.p.hard, attn.c);
    }
    const int64_t from = slice * p.y.t + offset(p.y, own.b, own.h, own.r, own.l);
    const int64_t to = slice * p.out.t + own.b * p.out.b + own.h * p.out.h + own.r * p.out.r + own.l;
    static_cast<uint8_t*>(p.out.data)[to] = uint8_t(bits & static_cast<const uint8_t*>(p.y.data)[from]);
  }
}

// A block sums one result: each thread strides through its numbers, then a tree in shared memory.
__global__ void __launch_bounds__(kBlock) qk_reduce_kernel(const QkReduce p) {
  const int64_t heads = p.per_head ? 1 : p.H, row = heads * p.parts;
  double sum = 0;
  for (int64_t i = threadIdx.x; i < p.B * row; i += kBlock) sum += p.in[(i / row * p.H + blockIdx.x * heads) * p.parts + i % row];
  const double all = block_sum(sum);
  if (threadIdx.x == 0) static_cast<float*>(p.out)[blockIdx.x] = float(all);
}

template <class Pointer>
bool vector(const QkRows<Pointer>& x, int V) {
  return !x.data || (reinterpret_cast<uintptr_t>(x.data) % 16 == 0 && (x.t | x.b | x.h | x.r) % V == 0);
}

unsigned parts_of(const QkShape& s, int V) { return unsigned(s.B * s.H * ((s.R * (s.L / V) + kBlock - 1) / kBlock)); }

template <class T, int V>
void sum(const QkShape& s, const QkLif& f, const QkIn& x, const QkIn& w, bool w_currents, float* out, void* stream) {
  const int most = kShared / int(kBlock * sizeof(float) * (s.columns ? V : 1));
  const int steps = int(s.T < most ? s.T : most);
  const size_t shared = size_t(steps) * kBlock * (s.columns ? V : 1) * sizeof(float);
  const int64_t parts = s.columns ? (s.L + 32 * V - 1) / (32 * V) : (s.R + kWarps - 1) / kWarps;
  const dim3 grid(unsigned(s.B * s.H * parts));
  if (s.columns)
    SPK_LAUNCH((qk_sum_kernel<T, V, true>), grid, dim3(kBlock), shared, stream, s, f, x, w, w_currents, out, steps);
  else
    SPK_LAUNCH((qk_sum_kernel<T, V, false>), grid, dim3(kBlock), shared, stream, s, f, x, w, w_currents, out, steps);
  (void)stream;
}

template <class T, int V>
int forward(const QkFwd& p, void* stream) {
  const QkLif attn = lif_of(p.attn), qkv = lif_of(p.qkv);
  sum<T, V>(p.shape, qkv, p.s, p.w, p.shape.currents, p.potentials, stream);
  SPK_LAUNCH((qk_gate_kernel<T, V>), dim3(parts_of(p.shape, V)), dim3(kBlock), 0, stream, p, attn, qkv);
  return SPK_LAST_ERROR();
}

template <class T, int V>
int backward(const QkBwd& p, void* stream) {
  const QkShape& s = p.shape;
  const QkLif attn = lif_of(p.attn), qkv = lif_of(p.qkv);
  const int64_t J = s.columns ? s.L : s.R, parts = qk_parts_cuda(s);
  sum<T, V>(s, qkv, p.s, p.w, s.currents, p.potentials, stream);
  sum<T, V>(s, qkv, p.y, p.g_out, false, p.g_attn, stream);
  SPK_LAUNCH(qk_attn_bwd_kernel, dim3(unsigned(s.B * s.H * ((J + kBlock - 1) / kBlock))), dim3(kBlock), 0, stream, p, attn, parts);
  const int fit = kShared / int(kBlock * V * sizeof(float)), most = fit < kSteps ? fit : kSteps;
  const int steps = int(s.T < most ? s.T : most);
  const size_t shared = s.currents ? size_t(steps) * kBlock * V * sizeof(float) : 0;
  for (int operand = kY; operand <= (p.w.data ? kW : kS); ++operand)
    SPK_LAUNCH((qk_operand_bwd_kernel<T, V>), dim3(parts_of(s, V)), dim3(kBlock), shared, stream, p, attn, qkv, operand, steps,
               parts);
  return SPK_LAST_ERROR();
}

template <class T>
int forward(const QkFwd& p, void* stream) {
  constexpr int V = 16 / sizeof(T);
  const bool wide = p.shape.L % V == 0 && vector(p.y, V) && vector(p.s, V) && vector(p.w, V) && vector(p.out, V);
  return wide ? forward<T, V>(p, stream) : forward<T, 1>(p, stream);
}
template <class T>
int backward(const QkBwd& p, void* stream) {
  constexpr int V = 16 / sizeof(T);
  const bool wide = p.shape.L % V == 0 && vector(p.y, V) && vector(p.s, V) && vector(p.w, V) && vector(p.g_out, V) &&
                    vector(p.g_y, V) && vector(p.g_s, V) && vector(p.g_w, V);
  return wide ? backward<T, V>(p, stream) : backward<T, 1>(p, stream);
}

}  // namespace

int64_t qk_parts_cuda(const QkShape& s) { return 3 * ((s.R * s.L + kBlock - 1) / kBlock); }

int qk_fwd_cuda(const QkFwd& p, void* stream) {
  const QkShape& s = p.shape;
  if (p.packed) {
    const int64_t J = s.columns ? s.L : s.R, each = s.columns ? 32 : kWarps, parts = (J + each - 1) / each;
    SPK_LAUNCH(qk_packed_sum_kernel, dim3(unsigned((s.T + 7) / 8 * s.B * s.H * parts)), dim3(kBlock), 0, stream, p);
    SPK_LAUNCH(qk_packed_gate_kernel, dim3(parts_of(s, 1)), dim3(kBlock), 0, stream, p, lif_of(p.attn));
    return SPK_LAST_ERROR();
  }
  switch (s.dtype) {
    case DType::f32: return forward<float>(p, stream);
    case DType::bf16: return forward<__nv_bfloat16>(p, stream);
    default: return forward<__half>(p, stream);
  }
}

int qk_bwd_cuda(const QkBwd& p, void* stream) {
  switch (p.shape.dtype) {
    case DType::f32: return backward<float>(p, stream);
    case DType::bf16: return backward<__nv_bfloat16>(p, stream);
    default: return backward<__half>(p, stream);
  }
}

int qk_reduce_cuda(const QkReduce& p, void* stream) {
  SPK_LAUNCH(qk_reduce_kernel, dim3(unsigned(p.per_head ? p.H : 1)), dim3(kBlock), 0, stream, p);
  (void)stream;
  return SPK_LAST_ERROR();
}

}  // namespace spk
