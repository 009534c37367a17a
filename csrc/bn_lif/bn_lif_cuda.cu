// bn_lif on CUDA; no torch header here. Also runs on the CPU by csrc/testing/shim.h.
#include "bn_lif/bn_lif.h"
#include "bn_lif/norm.h"
#include "core/surrogate.h"
#include "lif/lif_cuda.h"

namespace spk {
namespace {

// The launch bounds name the blocks on a multiprocessor: without them ptxas aims higher and spills.
constexpr int kBlock = 128;
constexpr int kBwdV = 4;              // neurons of a thread in backward, of every type: with 8 its registers spill
constexpr int kBwdShared = 40 << 10;  // bytes: with the sums below the 48 KB that need no opting in
constexpr unsigned kAll = ~0u;
// A block sums at least so many vectors a thread before its threads meet; a grid of so many blocks fills any GPU.
constexpr int64_t kVectors = 4, kManyBlocks = 4096, kMostParts = 1024;

// Blocks (x, part) of the kernels that sum. Maps: x is a channel, and the block's threads lie `width` to a row of its
// `inner` neighbours. Else x is a group of width * V places of a period. Either way rows (t, o) follow each other by
// threads / width, and neurons o * period + first + i lie side by side.
struct Grid {
  int64_t outer, period, places;  // places: sums that come out
  int width;
  bool maps;

  Grid(const BnShape& s, int V) : outer(s.N / (s.C * s.inner)), period(s.C * s.inner), maps(bn_maps(s, true)) {
    places = bn_places(s, true);
    const int64_t vectors = (maps ? s.inner : period) / V, most = maps ? kBlock : 32;
    for (width = 1; width < vectors && width < most;) width *= 2;
  }
  dim3 blocks(const BnShape& s, int V, int64_t parts) const {
    return dim3(unsigned(maps ? s.C : (period + width * V - 1) / (width * V)), unsigned(parts));
  }
};

// The thread's place in such a block.
template <int V>
struct Place {
  int64_t first, end, i, row, rows_end;  // i: of its first vector in [first, end); rows of its part
  int step, rows_step;

  __device__ Place(const Grid& g, const BnShape& s, int64_t rows) {
    first = g.maps ? blockIdx.x * s.inner : int64_t(blockIdx.x) * g.width * V;
    end = g.maps ? first + s.inner : (first + g.width * V < g.period ? first + g.width * V : g.period);
    i = first + int64_t(threadIdx.x) % g.width * V;
    step = g.width * V;
    rows_step = kBlock / g.width;
    row = rows * blockIdx.y / gridDim.y + threadIdx.x / g.width;
    rows_end = rows * (blockIdx.y + 1) / gridDim.y;
  }
};

// sums[part, place] from what the block's threads hold: of a whole block (maps), or of each column of threads.
template <int V>
__device__ void store_sums(double* __restrict__ sums, double (&held)[V], const Grid& g, double* shared) {
  const int tid = threadIdx.x, width = g.maps ? 1 : g.width;
#pragma unroll
  for (int k = 0; k < V; ++k) {
    double sum = held[k];
    if (g.maps) {
#pragma unroll
      for (int j = 1; j < V; ++j) sum += held[j];
    }
    if (g.maps && k > 0) break;
    __syncthreads();
    shared[tid] = sum;
    __syncthreads();
    for (int n = kBlock / 2; n >= width; n /= 2) {
      if (tid < n) shared[tid] += shared[tid + n];
      __syncthreads();
    }
    const int64_t place = g.maps ? blockIdx.x : (int64_t(blockIdx.x) * g.width + tid) * V + k;
    if (tid < width && place < g.places) sums[blockIdx.y * g.places + place] = shared[tid];
  }
}

// The channels of V neighbouring neurons.
template <int V>
__device__ __forceinline__ void channels(int (&c)[V], const BnShape& s, int64_t i) {
  int64_t at = i % s.inner, channel = i / s.inner % s.C;
#pragma unroll
  for (int k = 0; k < V; ++k) {
    c[k] = int(channel);
    if (++at == s.inner) {
      at = 0;
      channel = channel + 1 == s.C ? 0 : channel + 1;
    }
  }
}
template <int V>
__device__ __forceinline__ void gather(float (&d)[V], const float* __restrict__ values, const int (&c)[V]) {
#pragma unroll
  for (int k = 0; k < V; ++k) d[k] = values[c[k]];
}

// ---- per channel -----------------------------------------------------------------------------------------------------

enum Constant { kMean, kScale, kBias, kDecay, kGain, kGMean, kSlope };

__device__ float of_channel(const void* values, int64_t c, double number) {
  return values ? static_cast<const float*>(values)[c] : float(number);
}

// A thread owns a channel and writes out what it is for the neurons.
__global__ void __launch_bounds__(kBlock, 8) bn_constants_kernel(const BnNorm norm, const LifNeuron neuron, float* constants) {
  const int64_t C = neuron.C, c = int64_t(blockIdx.x) * kBlock + threadIdx.x;
  if (c >= C) return;
  constants[kMean * C + c] = static_cast<const float*>(norm.mean)[c];
  constants[kScale * C + c] = of_channel(norm.weight, c, 1) * inverse_std(static_cast<const float*>(norm.var)[c], norm.eps);
  constants[kBias * C + c] = of_channel(norm.bias, c, 0);
  constants[kDecay * C + c] = of_channel(neuron.decay_c, c, neuron.decay);
  constants[kGain * C + c] = of_channel(neuron.gain_c, c, neuron.gain);
}

// The sum of channel c over its parts and places by a warp, in an order that their number fixes; every lane gets it.
__device__ double channel_sum(const double* __restrict__ sums, const Grid& g, const BnShape& s, int64_t parts, int64_t c) {
  double sum = 0;
  const int64_t each = g.places / s.C;
  for (int64_t part = threadIdx.x % 32; part < parts; part += 32)
    for (int64_t i = 0; i < each; ++i) sum += sums[part * g.places + c * each + i];
  for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(kAll, sum, d);
  return sum;
}

template <class T>
__global__ void __launch_bounds__(kBlock, 8) bn_stats_finish_kernel(const BnStats p, const Grid g) {
  const int64_t c = (int64_t(blockIdx.x) * kBlock + threadIdx.x) / 32;
  if (c >= p.shape.C) return;
  const double k = load_float<T>(static_cast<const T*>(p.x)[c * p.shape.inner]);
  double mean, var;
  moments(k, channel_sum(p.sums, g, p.shape, p.parts, c), channel_sum(p.sums + p.parts * g.places, g, p.shape, p.parts, c),
          double(p.shape.T) * double(p.shape.N / p.shape.C), &mean, &var);
  if (threadIdx.x % 32) return;
  static_cast<float*>(p.mean)[c] = float(mean);
  static_cast<float*>(p.var)[c] = float(var);
}

__global__ void __launch_bounds__(kBlock, 8) bn_lif_bwd_finish_kernel(const BnLifBwd p, const Grid g) {
  const int64_t C = p.shape.C, c = (int64_t(blockIdx.x) * kBlock + threadIdx.x) / 32;
  if (c >= C) return;
  const auto sum = [&](int kind) { return channel_sum(p.sums + kind * p.parts * g.places, g, p.shape, p.parts, c); };
  const float inverse = inverse_std(static_cast<const float*>(p.norm.var)[c], p.norm.eps);
  const float g_bias = float(sum(kBnG)), g_weight = float(sum(kBnGX) * double(inverse));
  const float g_decay = p.g_decay ? float(sum(kBnDecay)) : 0.f, g_gain = p.g_gain ? float(sum(kBnGain)) : 0.f;
  if (threadIdx.x % 32) return;
  const double count = double(p.shape.T) * double(p.shape.N / C);
  static_cast<float*>(p.g_bias)[c] = g_bias;
  static_cast<float*>(p.g_weight)[c] = g_weight;
  p.constants[kGMean * C + c] = float(double(g_bias) / count);
  p.constants[kSlope * C + c] = float(double(g_weight) * double(inverse) / count);
  if (p.g_decay) static_cast<float*>(p.g_decay)[c] = g_decay;
  if (p.g_gain) static_cast<float*>(p.g_gain)[c] = g_gain;
}

// ---- per neuron ------------------------------------------------------------------------------------------------------

// A block sums one part of a channel, or of some places: d = x - k and its square, in double, k the channel's first number.
template <class T, int V>
__global__ void __launch_bounds__(kBlock, 4) bn_stats_kernel(const BnStats p, const Grid g) {
  SPK_SHARED(double, shared, [kBlock]);
  const Place<V> at(g, p.shape, p.shape.T * g.outer);
  const T* __restrict__ x = static_cast<const T*>(p.x);
  double sum[V] = {}, squares[V] = {};
  if (at.i < at.end) {
    int c[V];
    double k[V];
    channels(c, p.shape, at.i);
#pragma unroll
    for (int j = 0; j < V; ++j) k[j] = load_float<T>(x[c[j] * p.shape.inner]);
    int64_t t = at.row / g.outer, o = at.row % g.outer;
    for (int64_t row = at.row; row < at.rows_end; row += at.rows_step, o += at.rows_step) {
      for (; o >= g.outer; o -= g.outer) ++t;
      const T* __restrict__ from = x + t * p.x_step + o * g.period;
      for (int64_t i = at.i; i < at.end; i += at.step) {
        float in[V];
        load(in, from + i);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const double d = double(in[j]) - k[j];
          sum[j] += d;
          squares[j] += d * d;
        }
      }
    }
  }
  store_sums(p.sums, sum, g, shared);
  store_sums(p.sums + p.parts * g.places, squares, g, shared);
}

// A thread owns V neighbouring neurons, walks t = 0 ... T-1 and keeps their potentials and constants in registers.
template <class T, int V>
__global__ void __launch_bounds__(kBlock, 4) bn_lif_fwd_kernel(const BnLifFwd p, const Neuron<float> n) {
  const int64_t i = (int64_t(blockIdx.x) * kBlock + threadIdx.x) * V, N = p.shape.N, C = p.shape.C;
  if (i >= N) return;
  const T* __restrict__ x = static_cast<const T*>(p.x) + i;        // [T, N]
  const T* __restrict__ r_in = static_cast<const T*>(p.residual);  // [T, N], or null
  T* __restrict__ s_out = static_cast<T*>(p.s) + i;                // [T, N]
  int c[V];
  float v[V], mean[V], scale[V], bias[V], decay[V], gain[V];
  channels(c, p.shape, i);
  gather(mean, p.constants + kMean * C, c);
  gather(scale, p.constants + kScale * C, c);
  gather(bias, p.constants + kBias * C, c);
  gather(decay, p.constants + kDecay * C, c);
  gather(gain, p.constants + kGain * C, c);
  if (p.v_init)
    load(v, static_cast<const float*>(p.v_init) + i);
  else
    fill(v, n.rest);
#pragma unroll 2
  for (int64_t t = 0; t < p.shape.T; ++t) {
    float y[V], r[V], s[V];
    load(y, x + t * p.x_step);
    if (r_in)
      load(r, r_in + t * p.r_step + i);
    else
      fill(r, 0.f);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      y[k] = normalise(y[k], mean[k], scale[k], bias[k]);
      if (r_in) y[k] += r[k];
      const float h = charge(v[k], y[k], decay[k], gain[k], n.rest);
      s[k] = h >= n.fire_at ? 1.f : 0.f;
      v[k] = reset(h, p.neuron.hard, n);
    }
    store(s_out + t * N, s);
    if (p.y) store(static_cast<T*>(p.y) + t * N + i, y);
  }
}

// sg[k] at h[k]; one branch for all.
template <int V>
__device__ __forceinline__ void surrogates(float (&sg)[V], const float (&h)[V], int32_t kind, float threshold, float a, float b) {
#define SPK_KIND(K) \
  case Surrogate::K: _Pragma("unroll") for (int k = 0; k < V; ++k) sg[k] = surrogate<Surrogate::K>(h[k] - threshold, a, b); break;
  switch (static_cast<Surrogate>(kind)) {
    SPK_KIND(atan)
    SPK_KIND(sigmoid)
    SPK_KIND(rectangle)
    SPK_KIND(triangle)
    SPK_KIND(fast_sigmoid)
    SPK_KIND(erf)
    SPK_KIND(leaky_relu)
  }
#undef SPK_KIND
}

// A thread owns V neighbouring neurons of each row of its part, one after the other: through the segments of time to leave
// checkpoints, then each segment forward, x and h in the thread's own slots of shared memory, and back. Sums of its channel,
// or of its places, stay in registers over all rows.
template <class T, int V>
__global__ void __launch_bounds__(kBlock, 3) bn_lif_bwd_kernel(const BnLifBwd p, const Grid g, const Neuron<float> n) {
  SPK_DYN_SHARED(float, held);  // [steps, 2, threads, V]
  SPK_SHARED(double, shared, [kBlock]);
  const int64_t N = p.shape.N, C = p.shape.C;
  const bool hard = p.neuron.hard;
  const Place<V> at(g, p.shape, g.outer);
  double sum_g[V] = {}, sum_gx[V] = {}, sum_decay[V] = {}, sum_gain[V] = {};
  int c[V];
  float mean[V], scale[V], bias[V], decay[V], gain[V];
  channels(c, p.shape, at.i < at.end ? at.i : at.first);
  gather(mean, p.constants + kMean * C, c);
  gather(scale, p.constants + kScale * C, c);
  gather(bias, p.constants + kBias * C, c);
  gather(decay, p.constants + kDecay * C, c);
  gather(gain, p.constants + kGain * C, c);
  const auto slot = [&](int t, int which) { return held + ((t * 2 + which) * kBlock + threadIdx.x) * V; };

  for (int64_t row = at.row; row < at.rows_end; row += at.rows_step) {
    for (int64_t place = at.i; place < at.end; place += at.step) {
      const int64_t i = row * g.period + place;
      const T* __restrict__ x = static_cast<const T*>(p.x) + i;  // [T, N]
      float start[V], v[V], g_v[V];
      const auto current = [&](int64_t t, const float (&in)[V], float (&y)[V]) {
        if (p.residual) load(y, static_cast<const T*>(p.residual) + t * p.r_step + i);
#pragma unroll
        for (int k = 0; k < V; ++k) {
          const float z = normalise(in[k], mean[k], scale[k], bias[k]);
          y[k] = p.residual ? z + y[k] : z;
        }
      };
      const auto advance = [&](int64_t t, float (&in)[V], float (&h)[V]) {
        float y[V];
        load(in, x + t * p.x_step);
        current(t, in, y);
#pragma unroll
        for (int k = 0; k < V; ++k) {
          h[k] = charge(v[k], y[k], decay[k], gain[k], n.rest);
          v[k] = reset(h[k], hard, n);
        }
      };
      const auto begin_segment = [&](int64_t k) {
        if (k > 0)
          load(start, p.checkpoints + (k - 1) * N + i);
        else if (p.v_init)
          load(start, static_cast<const float*>(p.v_init) + i);
        else
          fill(start, n.rest);
#pragma unroll
        for (int j = 0; j < V; ++j) v[j] = start[j];
      };

      const int64_t segments = (p.shape.T + p.steps - 1) / p.steps;
      float in[V], h[V];
      begin_segment(0);
      for (int64_t t = 0; t < (segments - 1) * p.steps; ++t) {
        advance(t, in, h);
        if ((t + 1) % p.steps == 0) store(p.checkpoints + t / p.steps * N + i, v);
      }
      fill(g_v, 0.f);
      for (int64_t segment = segments - 1; segment >= 0; --segment) {
        const int64_t t0 = segment * p.steps;
        const int count = int(p.shape.T - t0 < p.steps ? p.shape.T - t0 : p.steps);
        begin_segment(segment);
#pragma unroll 2
        for (int t = 0; t < count; ++t) {
          advance(t0 + t, in, h);
          store(slot(t, 0), in);
          store(slot(t, 1), h);
        }
        for (int t = count - 1; t >= 0; --t) {
          const int64_t out_at = (t0 + t) * N + i;
          float gs[V], gy[V], sg[V], gh[V], out[V];
          load(in, slot(t, 0));
          load(h, slot(t, 1));
          if (p.g_s)
            load(gs, static_cast<const T*>(p.g_s) + out_at);
          else
            fill(gs, 0.f);
          if (p.g_y)
            load(gy, static_cast<const T*>(p.g_y) + out_at);
          else
            fill(gy, 0.f);
          surrogates(sg, h, p.surrogate, n.threshold, float(p.a), float(p.b));
#pragma unroll
          for (int k = 0; k < V; ++k) {
            gh[k] = step_backward<false>(h[k], gs[k], g_v[k], 0.f, sg[k], hard, p.detach, n);
            out[k] = gain[k] * gh[k];
            if (p.g_y) out[k] += gy[k];
            g_v[k] = decay[k] * gh[k];
            sum_g[k] += double(out[k]);
            sum_gx[k] += double(out[k] * (in[k] - mean[k]));
          }
          if (p.g) store(static_cast<T*>(p.g) + out_at, out);
          if (p.g_gain) {
            float y[V];
            current(t0 + t, in, y);
#pragma unroll
            for (int k = 0; k < V; ++k) sum_gain[k] += double(gh[k] * y[k]);
          }
          if (p.g_decay) {
            if (t > 0) load(h, slot(t - 1, 1));
#pragma unroll
            for (int k = 0; k < V; ++k) sum_decay[k] += double(gh[k] * ((t > 0 ? reset(h[k], hard, n) : start[k]) - n.rest));
          }
          if (p.batch) continue;
#pragma unroll
          for (int k = 0; k < V; ++k) out[k] = scale[k] * out[k];
          store(static_cast<T*>(p.g_x) + out_at, out);
        }
      }
      if (p.g_v_init) store(static_cast<float*>(p.g_v_init) + i, g_v);
    }
  }
  const int64_t each = p.parts * g.places;
  store_sums(p.sums + kBnG * each, sum_g, g, shared);
  store_sums(p.sums + kBnGX * each, sum_gx, g, shared);
  if (p.g_decay) store_sums(p.sums + kBnDecay * each, sum_decay, g, shared);
  if (p.g_gain) store_sums(p.sums + kBnGain * each, sum_gain, g, shared);
}

// A thread owns V neighbouring neurons: g_x from g, x and the means of its channel.
template <class T, int V>
__global__ void __launch_bounds__(kBlock, 8) bn_lif_bwd_x_kernel(const BnLifBwd p) {
  const int64_t i = (int64_t(blockIdx.x) * kBlock + threadIdx.x) * V, N = p.shape.N, C = p.shape.C;
  if (i >= N) return;
  int c[V];
  float mean[V], scale[V], g_mean[V], slope[V];
  channels(c, p.shape, i);
  gather(mean, p.constants + kMean * C, c);
  gather(scale, p.constants + kScale * C, c);
  gather(g_mean, p.constants + kGMean * C, c);
  gather(slope, p.constants + kSlope * C, c);
#pragma unroll 2
  for (int64_t t = 0; t < p.shape.T; ++t) {
    float g[V], x[V];
    load(g, static_cast<const T*>(p.g) + t * N + i);  // may be g_x itself
    load(x, static_cast<const T*>(p.x) + t * p.x_step + i);
#pragma unroll
    for (int k = 0; k < V; ++k) g[k] = normalise_backward(g[k], x[k], mean[k], scale[k], g_mean[k], slope[k]);
    store(static_cast<T*>(p.g_x) + t * N + i, g);
  }
}

// ---- launches --------------------------------------------------------------------------------------------------------

// Vectors of V must not cross rows of a block, nor rows of memory.
bool vectors(const BnShape& s, int V, int64_t x_step, int64_t r_step) {
  return (bn_maps(s, true) ? s.inner : s.C * s.inner) % V == 0 && x_step % V == 0 && r_step % V == 0;
}

template <class T, int V>
int stats(const BnStats& p, void* stream) {
  const Grid g(p.shape, V);
  SPK_LAUNCH((bn_stats_kernel<T, V>), g.blocks(p.shape, V, p.parts), dim3(kBlock), 0, stream, p, g);
  SPK_LAUNCH((bn_stats_finish_kernel<T>), dim3(blocks(32 * p.shape.C, kBlock)), dim3(kBlock), 0, stream, p, g);
  (void)stream;
  return SPK_LAST_ERROR();
}
template <class T>
int stats(const BnStats& p, void* stream) {
  constexpr int V = 16 / sizeof(T);
  return vectors(p.shape, V, p.x_step, 0) && aligned(p.x) ? stats<T, V>(p, stream) : stats<T, 1>(p, stream);
}

void write_constants(const BnNorm& norm, const LifNeuron& neuron, float* constants, void* stream) {
  SPK_LAUNCH(bn_constants_kernel, dim3(blocks(neuron.C, kBlock)), dim3(kBlock), 0, stream, norm, neuron, constants);
  (void)stream;
}

template <class T, int V>
int forward(const BnLifFwd& p, void* stream) {
  SPK_LAUNCH((bn_lif_fwd_kernel<T, V>), dim3(blocks(p.shape.N / V, kBlock)), dim3(kBlock), 0, stream, p, constants(p.neuron));
  (void)stream;
  return SPK_LAST_ERROR();
}
template <class T>
int forward(const BnLifFwd& p, void* stream) {
  constexpr int V = 16 / sizeof(T);
  const bool vector = p.shape.N % V == 0 && p.x_step % V == 0 && p.r_step % V == 0 && aligned(p.x) && aligned(p.residual) &&
                      aligned(p.v_init) && aligned(p.s) && aligned(p.y);
  return vector ? forward<T, V>(p, stream) : forward<T, 1>(p, stream);
}

template <class T, int V>
int backward(const BnLifBwd& p, void* stream) {
  const Grid g(p.shape, V);
  const size_t shared = size_t(p.steps) * 2 * kBlock * V * sizeof(float);
  SPK_LAUNCH((bn_lif_bwd_kernel<T, V>), g.blocks(p.shape, V, p.parts), dim3(kBlock), shared, stream, p, g, constants(p.neuron));
  SPK_LAUNCH(bn_lif_bwd_finish_kernel, dim3(blocks(32 * p.shape.C, kBlock)), dim3(kBlock), 0, stream, p, g);
  if (p.batch) SPK_LAUNCH((bn_lif_bwd_x_kernel<T, V>), dim3(blocks(p.shape.N / V, kBlock)), dim3(kBlock), 0, stream, p);
  (void)stream;
  return SPK_LAST_ERROR();
}
template <class T>
int backward(const BnLifBwd& p, void* stream) {
  const bool vector = vectors(p.shape, kBwdV, p.x_step, p.r_step) && aligned(p.x) && aligned(p.residual) && aligned(p.v_init) &&
                      aligned(p.g_s) && aligned(p.g_y) && aligned(p.g) && aligned(p.g_x) && aligned(p.g_v_init);
  return vector ? backward<T, kBwdV>(p, stream) : backward<T, 1>(p, stream);
}

}  // namespace

int bn_stats_cuda(const BnStats& p, void* stream) {
  switch (p.shape.dtype) {
    case DType::f32: return stats<float>(p, stream);
    case DType::bf16: return stats<__nv_bfloat16>(p, stream);
    default: return stats<__half>(p, stream);
  }
}

int bn_lif_fwd_cuda(const BnLifFwd& p, void* stream) {
  write_constants(p.norm, p.neuron, p.constants, stream);
  switch (p.shape.dtype) {
    case DType::f32: return forward<float>(p, stream);
    case DType::bf16: return forward<__nv_bfloat16>(p, stream);
    default: return forward<__half>(p, stream);
  }
}

int bn_lif_bwd_cuda(const BnLifBwd& p, void* stream) {
  write_constants(p.norm, p.neuron, p.constants, stream);
  switch (p.shape.dtype) {
    case DType::f32: return backward<float>(p, stream);
    case DType::bf16: return backward<__nv_bfloat16>(p, stream);
    default: return backward<__half>(p, stream);
  }
}

// Every part of every channel has its place in `sums`.
int64_t bn_parts_cuda(const BnShape& s) {
  constexpr int V = kBwdV;  // other widths make other grids, which these parts fill as well
  const Grid g(s, V);
  const int64_t in_row = g.maps ? (s.inner + g.width * V - 1) / (g.width * V) : 1;  // vectors of a thread
  const int64_t rows = (kVectors + in_row - 1) / in_row * (kBlock / g.width), x = g.blocks(s, V, 1).x;
  const int64_t fit = s.T * g.outer / rows, many = kManyBlocks / x, parts = fit < many ? fit : many;
  return parts < 1 ? 1 : parts > kMostParts ? kMostParts : parts;
}

int bn_lif_bwd_steps(int64_t T) {
  const int64_t most = kBwdShared / (2 * kBlock * kBwdV * int64_t(sizeof(float)));
  const int64_t segments = (T + most - 1) / most;
  return int((T + segments - 1) / segments);  // equal segments: as little as possible is read twice
}

}  // namespace spk
