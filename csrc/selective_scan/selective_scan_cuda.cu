// selective_scan on CUDA; no torch header here. Also runs on the CPU by csrc/testing/shim.h.
#include <math.h>

#include "core/cuda.h"
#include "selective_scan/scan.h"
#include "selective_scan/selective_scan.h"

namespace spk {
namespace {

constexpr int kFwdWarps = 4, kBwdWarps = 8;  // channels of a block
constexpr int kReduceBlock = 256;
constexpr unsigned kAll = ~0u;

// I neighbouring steps of a row from l on, as one access of 16 bytes where VECTOR (then I divides L); 0 beyond L.
template <class T>
constexpr int kItems = 16 / sizeof(T);
template <bool VECTOR, class T, int I>
__device__ __forceinline__ void load(float (&d)[I], const T* __restrict__ row, int64_t l, int64_t L) {
  if (VECTOR) {
    Vec<T, I> in = {};
    if (l < L) in = *reinterpret_cast<const Vec<T, I>*>(row + l);
#pragma unroll
    for (int i = 0; i < I; ++i) d[i] = load_float<T>(in.d[i]);
  } else {
#pragma unroll
    for (int i = 0; i < I; ++i) d[i] = l + i < L ? load_float<T>(row[l + i]) : 0.f;
  }
}
template <bool VECTOR, class T, int I>
__device__ __forceinline__ void store(T* __restrict__ row, const float (&d)[I], int64_t l, int64_t L) {
  if (VECTOR) {
    Vec<T, I> out;
#pragma unroll
    for (int i = 0; i < I; ++i) out.d[i] = store_float<T>(d[i]);
    if (l < L) *reinterpret_cast<Vec<T, I>*>(row + l) = out;
  } else {
#pragma unroll
    for (int i = 0; i < I; ++i)
      if (l + i < L) row[l + i] = store_float<T>(d[i]);
  }
}

// One channel of one sample, and the rows it reads.
template <class T>
struct Channel {
  int64_t b, c, at;  // at: of [B, C]
  const T *u, *delta, *z, *Bs, *Cs;
  const float* A;  // [S]
  float bias, skip;

  __device__ Channel(const SelectiveScan& p, int64_t b_, int64_t c_) : b(b_), c(c_), at(b_ * p.C + c_) {
    const auto row = [&](const ScanRows& r) { return static_cast<const T*>(r.data) + b * r.batch + c * r.row; };
    const int64_t g = c / (p.C / p.G);
    u = row(p.u);
    delta = row(p.delta);
    z = row(p.z);
    Bs = static_cast<const T*>(p.Bs.data) + b * p.Bs.batch + g * p.Bs.group;
    Cs = static_cast<const T*>(p.Cs.data) + b * p.Cs.batch + g * p.Cs.group;
    A = static_cast<const float*>(p.A) + c * p.S;
    bias = p.bias ? static_cast<const float*>(p.bias)[c] : 0.f;
    skip = p.D ? static_cast<const float*>(p.D)[c] : 0.f;
  }
};

// dt and dt u of a lane's steps; beyond L both are 0, which leaves the state as it is.
template <bool VECTOR, class T, int I>
__device__ __forceinline__ void load_steps(float (&dt)[I], float (&du)[I], float (&u)[I], float (&delta)[I], const Channel<T>& k,
                                           const SelectiveScan& p, int64_t l) {
  load<VECTOR>(u, k.u, l, p.L);
  load<VECTOR>(delta, k.delta, l, p.L);
#pragma unroll
  for (int i = 0; i < I; ++i) {
    delta[i] += k.bias;
    dt[i] = l + i >= p.L ? 0.f : p.softplus ? softplus(delta[i]) : delta[i];
    du[i] = dt[i] * u[i];
  }
}

// The state before a lane's first step, from that before lane 0's: a scan of (decay, x) over the lanes of the warp.
template <int I>
__device__ __forceinline__ float scan_lanes(const float (&a)[I], const float (&x)[I], float h) {
  const int lane = threadIdx.x % 32;
  float A = a[0], X = x[0];
#pragma unroll
  for (int i = 1; i < I; ++i) {
    X = scan_step(X, a[i], x[i]);
    A = join_decay(A, a[i]);
  }
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const float earlier_A = __shfl_up_sync(kAll, A, d), earlier_X = __shfl_up_sync(kAll, X, d);
    if (lane >= d) {
      X = scan_step(earlier_X, A, X);
      A = join_decay(earlier_A, A);
    }
  }
  A = __shfl_up_sync(kAll, A, 1);
  X = __shfl_up_sync(kAll, X, 1);
  return lane > 0 ? scan_step(h, A, X) : h;
}
// The same from the end: the gradient that comes back to a lane's last step, from that to lane 31's. What comes back
// from a step is a (g + c), where g comes back to it and c = g_y C is its own.
template <int I>
__device__ __forceinline__ float scan_lanes_back(const float (&a)[I], const float (&c)[I], float g) {
  const int lane = threadIdx.x % 32;
  float A = a[I - 1], X = a[I - 1] * c[I - 1];
#pragma unroll
  for (int i = I - 2; i >= 0; --i) {
    X = a[i] * (X + c[i]);
    A = join_decay(A, a[i]);
  }
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const float later_A = __shfl_down_sync(kAll, A, d), later_X = __shfl_down_sync(kAll, X, d);
    if (lane + d < 32) {
      X = scan_step(later_X, A, X);
      A = join_decay(later_A, A);
    }
  }
  A = __shfl_down_sync(kAll, A, 1);
  X = __shfl_down_sync(kAll, X, 1);
  return lane < 31 ? scan_step(g, A, X) : g;
}

template <class A>
__device__ __forceinline__ A warp_sum(A x) {
#pragma unroll
  for (int d = 16; d > 0; d /= 2) x += __shfl_xor_sync(kAll, x, d);
  return x;
}

// A warp owns a channel and walks its sequence 32 x I steps at a time, a lane I neighbouring steps of these; state after
// state is scanned over the lanes. The states between two stretches lie in shared memory.
template <class T, bool VECTOR>
__global__ void __launch_bounds__(32 * kFwdWarps) selective_scan_fwd_kernel(const SelectiveScanFwd q) {
  constexpr int I = kItems<T>;
  SPK_DYN_SHARED(float, states);  // [warps, S]
  const SelectiveScan& p = q.in;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t blocks = (p.C + kFwdWarps - 1) / kFwdWarps, c = blockIdx.x % blocks * kFwdWarps + warp;
  if (c >= p.C) return;
  const Channel<T> k(p, blockIdx.x / blocks, c);
  float* const carried = states + warp * p.S;
  const float* const h_init = static_cast<const float*>(p.h_init);
  for (int64_t s = lane; s < p.S; s += 32) carried[s] = h_init ? h_init[k.at * p.S + s] : 0.f;
  for (int64_t l = lane * I; l - lane * I < p.L; l += 32 * I) {
    float dt[I], du[I], u[I], delta[I], y[I];
    load_steps<VECTOR>(dt, du, u, delta, k, p, l);
#pragma unroll
    for (int i = 0; i < I; ++i) y[i] = k.skip * u[i];
    for (int64_t s = 0; s < p.S; ++s) {
      float a[I], x[I], out[I];
      load<VECTOR>(x, k.Bs + s * p.Bs.row, l, p.L);
      load<VECTOR>(out, k.Cs + s * p.Cs.row, l, p.L);
      const float A = k.A[s];
#pragma unroll
      for (int i = 0; i < I; ++i) {
        a[i] = decay(dt[i], A);
        x[i] = du[i] * x[i];
      }
      __syncwarp();
      float h = scan_lanes(a, x, carried[s]);
#pragma unroll
      for (int i = 0; i < I; ++i) {
        h = scan_step(h, a[i], x[i]);
        y[i] += h * out[i];
      }
      __syncwarp();
      if (lane == 31) carried[s] = h;
    }
    if (p.z.data) {
      float z[I];
      load<VECTOR>(z, k.z, l, p.L);
#pragma unroll
      for (int i = 0; i < I; ++i) y[i] *= silu(z[i]);
    }
    store<VECTOR>(static_cast<T*>(q.y) + k.at * p.L, y, l, p.L);
  }
  __syncwarp();
  for (int64_t s = lane; s < p.S; s += 32) static_cast<float*>(q.h_last)[k.at * p.S + s] = carried[s];
}

// A block owns a part of a group's channels and takes them up a warp each, as many at a time as it has warps. A warp
// walks forward to leave the states at the starts of stretches, then the stretches back: a state at a time it scans
// them forward again and the gradient backward. The gradients of B and C of the block's channels are summed in shared
// memory, in the order of the warps, and over the block's turns in the part's place in memory.
template <class T, bool VECTOR>
__global__ void __launch_bounds__(32 * kBwdWarps, 1) selective_scan_bwd_kernel(const SelectiveScanBwd q) {
  constexpr int I = kItems<T>, kSteps = 32 * I;
  const SelectiveScan& p = q.in;
  SPK_SHARED(float, tiles, [2][kBwdWarps][kSteps]);  // of g_Bs and g_Cs
  SPK_DYN_SHARED(double, shared);                    // [warps, S] double, twice [warps, S] float
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  double* const sum_A = shared + warp * p.S;
  float* const carried = reinterpret_cast<float*>(shared + kBwdWarps * p.S) + warp * p.S;
  float* const coming = carried + kBwdWarps * p.S;
  const int64_t item = blockIdx.x, group = item / q.parts, part = item % q.parts;
  const int64_t channels = p.C / p.G, blocks = scan_blocks(p), stretches = (p.L + kSteps - 1) / kSteps;
  const int64_t first = part * blocks / q.parts * kScanLanes, end = (part + 1) * blocks / q.parts * kScanLanes;
  const int64_t last = end < channels ? end : channels;
  float* const starts = q.starts + (item * kBwdWarps + warp) * stretches * p.S;
  float* const g_Bs = static_cast<float*>(q.g_Bs) + item * p.S * p.L;
  float* const g_Cs = static_cast<float*>(q.g_Cs) + item * p.S * p.L;

  for (int64_t turn = first; turn < last; turn += kBwdWarps) {
    const bool live = turn + warp < last;
    // A warp without a channel works on the last one, and its results are dropped.
    const Channel<T> k(p, group / p.G, group % p.G * channels + (live ? turn + warp : last - 1));
    const auto of_state = [&](const void* t, int64_t s) { return t ? static_cast<const float*>(t)[k.at * p.S + s] : 0.f; };
    for (int64_t s = lane; s < p.S; s += 32) {
      carried[s] = of_state(p.h_init, s);
      coming[s] = of_state(q.g_h_last, s);
      sum_A[s] = 0;
    }
    __syncwarp();
    for (int64_t stretch = 0; stretch < stretches; ++stretch) {
      for (int64_t s = lane; s < p.S; s += 32) starts[stretch * p.S + s] = carried[s];
      if (stretch + 1 == stretches) break;
      const int64_t l = stretch * kSteps + lane * I;
      float dt[I], du[I], u[I], delta[I];
      load_steps<VECTOR>(dt, du, u, delta, k, p, l);
      for (int64_t s = 0; s < p.S; ++s) {
        float a[I], x[I];
        load<VECTOR>(x, k.Bs + s * p.Bs.row, l, p.L);
        const float A = k.A[s];
#pragma unroll
        for (int i = 0; i < I; ++i) {
          a[i] = decay(dt[i], A);
          x[i] = du[i] * x[i];
        }
        __syncwarp();
        float h = scan_lanes(a, x, carried[s]);
#pragma unroll
        for (int i = 0; i < I; ++i) h = scan_step(h, a[i], x[i]);
        __syncwarp();
        if (lane == 31) carried[s] = h;
      }
      __syncwarp();
    }
    __syncwarp();

    double sum_D = 0, sum_bias = 0;
    for (int64_t stretch = stretches - 1; stretch >= 0; --stretch) {
      const int64_t l0 = stretch * kSteps, l = l0 + lane * I;
      float dt[I], du[I], u[I], delta[I], g[I], g_y[I], y[I], z[I], g_du[I] = {}, g_dt[I] = {};
      load_steps<VECTOR>(dt, du, u, delta, k, p, l);
      if (q.g_y.data) {
        load<VECTOR>(g, static_cast<const T*>(q.g_y.data) + k.b * q.g_y.batch + k.c * q.g_y.row, l, p.L);
      } else {
#pragma unroll
        for (int i = 0; i < I; ++i) g[i] = 0;
      }
      if (p.z.data) load<VECTOR>(z, k.z, l, p.L);
#pragma unroll
      for (int i = 0; i < I; ++i) {
        if (!live) g[i] = 0;
        g_y[i] = p.z.data ? g[i] * silu(z[i]) : g[i];
        y[i] = k.skip * u[i];
      }
      for (int64_t s = 0; s < p.S; ++s) {
        float a[I], x[I], in[I], out[I], h[I + 1], c[I];
        load<VECTOR>(in, k.Bs + s * p.Bs.row, l, p.L);
        load<VECTOR>(out, k.Cs + s * p.Cs.row, l, p.L);
        const float A = k.A[s];
#pragma unroll
        for (int i = 0; i < I; ++i) {
          a[i] = decay(dt[i], A);
          x[i] = du[i] * in[i];
          c[i] = g_y[i] * out[i];
        }
        h[0] = scan_lanes(a, x, starts[stretch * p.S + s]);
#pragma unroll
        for (int i = 0; i < I; ++i) {
          h[i + 1] = scan_step(h[i], a[i], x[i]);
          y[i] += h[i + 1] * out[i];
        }
        float g_h = scan_lanes_back(a, c, live ? coming[s] : 0.f), g_A = 0;
#pragma unroll
        for (int i = I - 1; i >= 0; --i) {
          const float g_i = g_h + c[i];  // of h[i + 1]
          tiles[0][warp][lane * I + i] = g_i * du[i];
          tiles[1][warp][lane * I + i] = g_y[i] * h[i + 1];
          g_du[i] += g_i * in[i];
          g_h = g_i * a[i];
          const float g_exponent = g_h * h[i];
          g_dt[i] += g_exponent * A;
          g_A += g_exponent * dt[i];
        }
        const double total = warp_sum(double(g_A));
        __syncthreads();
        if (lane == 0) {
          coming[s] = g_h;
          sum_A[s] += total;
        }
        for (int j = threadIdx.x; j < 2 * kSteps; j += 32 * kBwdWarps) {
          const int which = j / kSteps, step = j % kSteps;
          float sum = 0;
#pragma unroll
          for (int w = 0; w < kBwdWarps; ++w) sum += tiles[which][w][step];
          float* const to = (which ? g_Cs : g_Bs) + s * p.L + l0 + step;
          if (l0 + step < p.L) *to = turn == first ? sum : *to + sum;
        }
        __syncthreads();
      }
#pragma unroll
      for (int i = 0; i < I; ++i) {
        g_dt[i] += g_du[i] * u[i];
        if (p.softplus) g_dt[i] *= softplus_slope(delta[i]);
        if (l + i < p.L) sum_bias += g_dt[i];
        sum_D += g_y[i] * u[i];
        g_du[i] = g_du[i] * dt[i] + g_y[i] * k.skip;
        if (p.z.data) y[i] = y[i] * silu_slope(z[i]) * g[i];
      }
      if (live) {
        store<VECTOR>(static_cast<T*>(q.g_u) + k.at * p.L, g_du, l, p.L);
        store<VECTOR>(static_cast<T*>(q.g_delta) + k.at * p.L, g_dt, l, p.L);
        if (p.z.data) store<VECTOR>(static_cast<T*>(q.g_z) + k.at * p.L, y, l, p.L);
      }
    }
    sum_D = warp_sum(sum_D);
    sum_bias = warp_sum(sum_bias);
    __syncwarp();
    if (live && lane == 0 && q.g_D) q.g_D[k.at] = sum_D;
    if (live && lane == 0 && q.g_bias) q.g_bias[k.at] = sum_bias;
    for (int64_t s = lane; s < p.S && live; s += 32) {
      q.g_A[k.at * p.S + s] = sum_A[s];
      if (q.g_h_init) static_cast<float*>(q.g_h_init)[k.at * p.S + s] = coming[s];
    }
    __syncwarp();
  }
}

// A thread owns an element and adds its parts in their order.
template <class From, class To>
__global__ void __launch_bounds__(kReduceBlock) selective_scan_reduce_kernel(const SelectiveScanReduce p) {
  const int64_t at = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= p.outer * p.inner) return;
  const From* in = static_cast<const From*>(p.in) + at / p.inner * p.parts * p.inner + at % p.inner;
  From sum = 0;
  for (int64_t j = 0; j < p.parts; ++j) sum += in[j * p.inner];
  static_cast<To*>(p.out)[at] = store_float<To>(float(sum));
}

bool fits(const void* p, int64_t a, int64_t b, int64_t c, int64_t items) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && a % items == 0 && b % items == 0 && c % items == 0;
}
// Whether every row begins at a multiple of 16 bytes and ends at one.
bool vectors(const SelectiveScan& p, const ScanRows& g_y) {
  const int64_t items = p.dtype == DType::f32 ? 4 : 8;
  const auto rows = [&](const ScanRows& r) { return fits(r.data, r.batch, r.row, 0, items); };
  const auto matrix = [&](const ScanMatrix& m) { return fits(m.data, m.batch, m.group, m.row, items); };
  return p.L % items == 0 && rows(p.u) && rows(p.delta) && rows(p.z) && rows(g_y) && matrix(p.Bs) && matrix(p.Cs);
}

template <class T, bool VECTOR>
int forward(const SelectiveScanFwd& p, void* stream) {
  const int64_t blocks = p.in.B * ((p.in.C + kFwdWarps - 1) / kFwdWarps);
  SPK_LAUNCH((selective_scan_fwd_kernel<T, VECTOR>), dim3(unsigned(blocks)), dim3(32 * kFwdWarps),
             size_t(kFwdWarps * p.in.S) * sizeof(float), stream, p);
  (void)stream;
  return SPK_LAST_ERROR();
}
template <class T>
int forward(const SelectiveScanFwd& p, void* stream) {
  return vectors(p.in, {nullptr, 0, 0}) ? forward<T, true>(p, stream) : forward<T, false>(p, stream);
}

template <class T, bool VECTOR>
int backward(const SelectiveScanBwd& p, void* stream) {
  const size_t shared = size_t(kBwdWarps * p.in.S) * (sizeof(double) + 2 * sizeof(float));
  SPK_LAUNCH((selective_scan_bwd_kernel<T, VECTOR>), dim3(unsigned(p.in.B * p.in.G * p.parts)), dim3(32 * kBwdWarps), shared,
             stream, p);
  (void)stream;
  return SPK_LAST_ERROR();
}
template <class T>
int backward(const SelectiveScanBwd& p, void* stream) {
  return vectors(p.in, p.g_y) ? backward<T, true>(p, stream) : backward<T, false>(p, stream);
}

template <class From, class To>
int reduce(const SelectiveScanReduce& p, void* stream) {
  const int64_t blocks = (p.outer * p.inner + kReduceBlock - 1) / kReduceBlock;
  SPK_LAUNCH((selective_scan_reduce_kernel<From, To>), dim3(unsigned(blocks)), dim3(kReduceBlock), 0, stream, p);
  (void)stream;
  return SPK_LAST_ERROR();
}

}  // namespace

int selective_scan_fwd_cuda(const SelectiveScanFwd& p, void* stream) {
  switch (p.in.dtype) {
    case DType::f32: return forward<float>(p, stream);
    case DType::bf16: return forward<__nv_bfloat16>(p, stream);
    default: return forward<__half>(p, stream);
  }
}

int selective_scan_bwd_cuda(const SelectiveScanBwd& p, void* stream) {
  switch (p.in.dtype) {
    case DType::f32: return backward<float>(p, stream);
    case DType::bf16: return backward<__nv_bfloat16>(p, stream);
    default: return backward<__half>(p, stream);
  }
}

int64_t selective_scan_starts(const SelectiveScanBwd& p) {
  const int64_t steps = 32 * (p.in.dtype == DType::f32 ? 4 : 8);
  return p.in.B * p.in.G * p.parts * kBwdWarps * ((p.in.L + steps - 1) / steps) * p.in.S;
}

int selective_scan_reduce_cuda(const SelectiveScanReduce& p, void* stream) {
  if (p.from == DType::f64) return reduce<double, float>(p, stream);
  switch (p.to) {
    case DType::f32: return reduce<float, float>(p, stream);
    case DType::bf16: return reduce<float, __nv_bfloat16>(p, stream);
    default: return reduce<float, __half>(p, stream);
  }
}

}  // namespace spk
