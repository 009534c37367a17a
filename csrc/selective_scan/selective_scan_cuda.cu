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
using Four = Vec<float, 4>;

// I neighbouring steps, of which `left` are left of the row; as one access of 16 bytes where VECTOR (then I divides L). 0
// beyond the row.
template <class T>
constexpr int kItems = 16 / sizeof(T);
template <bool VECTOR, class T, int I>
__device__ __forceinline__ void load(float (&d)[I], const T* __restrict__ at, int left) {
  if (VECTOR) {
    Vec<T, I> in = {};
    if (left > 0) in = *reinterpret_cast<const Vec<T, I>*>(at);
#pragma unroll
    for (int i = 0; i < I; ++i) d[i] = load_float<T>(in.d[i]);
  } else {
#pragma unroll
    for (int i = 0; i < I; ++i) d[i] = i < left ? load_float<T>(at[i]) : 0.f;
  }
}
template <bool VECTOR, class T, int I>
__device__ __forceinline__ void store(T* __restrict__ at, const float (&d)[I], int left) {
  if (VECTOR) {
    Vec<T, I> out;
#pragma unroll
    for (int i = 0; i < I; ++i) out.d[i] = store_float<T>(d[i]);
    if (left > 0) *reinterpret_cast<Vec<T, I>*>(at) = out;
  } else {
#pragma unroll
    for (int i = 0; i < I; ++i)
      if (i < left) at[i] = store_float<T>(d[i]);
  }
}
// How many of the I steps from l on are within the row.
template <int I>
__device__ __forceinline__ int steps_left(int64_t l, int64_t L) {
  return L - l >= I ? I : L > l ? int(L - l) : 0;
}

// One channel of one sample, and where its rows begin. Offsets, for a pointer out of shared memory would be a generic one.
struct Channel {
  int64_t b, c, at;  // at: of [B, C]
  int64_t u, delta, z, Bs, Cs;
  float bias, skip;

  __device__ void set(const SelectiveScan& p, int64_t b_, int64_t c_) {
    const int64_t g = c_ / (p.C / p.G);
    b = b_;
    c = c_;
    at = b * p.C + c;
    u = row(p.u);
    delta = row(p.delta);
    z = row(p.z);
    Bs = b * p.Bs.batch + g * p.Bs.group;
    Cs = b * p.Cs.batch + g * p.Cs.group;
    bias = p.bias ? static_cast<const float*>(p.bias)[c] : 0.f;
    skip = p.D ? static_cast<const float*>(p.D)[c] : 0.f;
  }
  __device__ int64_t row(const ScanRows& r) const { return b * r.batch + c * r.row; }
};
template <class T, class Data>
__device__ __forceinline__ T* at(Data* data, int64_t offset) {
  return static_cast<T*>(data) + offset;
}

// dt, dt u and u of a lane's steps; beyond the row dt is 0, which leaves the state as it is.
template <bool VECTOR, class T, int I>
__device__ __forceinline__ void load_steps(float (&dt)[I], float (&du)[I], float (&u)[I], const Channel& k, const SelectiveScan& p,
                                           int64_t l, int left) {
  load<VECTOR>(u, at<const T>(p.u.data, k.u + l), left);
  load<VECTOR>(dt, at<const T>(p.delta.data, k.delta + l), left);
#pragma unroll
  for (int i = 0; i < I; ++i) dt[i] += k.bias;
  if (p.softplus) {
#pragma unroll
    for (int i = 0; i < I; ++i) dt[i] = softplus(dt[i]);
  }
#pragma unroll
  for (int i = 0; i < I; ++i) {
    if (i >= left) dt[i] = 0;
    du[i] = dt[i] * u[i];
  }
}

// What steps make of a state h: A h + X.
template <int I>
__device__ __forceinline__ void join_steps(float& A, float& X, const float (&a)[I], const float (&x)[I]) {
  A = a[0];
  X = x[0];
#pragma unroll
  for (int i = 1; i < I; ++i) {
    X = scan_step(X, a[i], x[i]);
    A = join_decay(A, a[i]);
  }
}
// The same of all lanes' steps; only lane 0's result is right.
__device__ __forceinline__ void join_lanes(float& A, float& X) {
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const float later_A = __shfl_down_sync(kAll, A, d), later_X = __shfl_down_sync(kAll, X, d);
    X = scan_step(X, later_A, later_X);
    A = join_decay(A, later_A);
  }
}

// The state before a lane's first step, from h, that before lane 0's: a scan of (decay, x) over the lanes of the warp.
// h goes into what lane 0 passes on, so the decays need no last step of the scan.
template <int I>
__device__ __forceinline__ float scan_lanes(const float (&a)[I], const float (&x)[I], float h) {
  const int lane = threadIdx.x % 32;
  float A, X;
  join_steps(A, X, a, x);
  if (lane == 0) X = scan_step(h, A, X);
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const float earlier_X = __shfl_up_sync(kAll, X, d), earlier_A = d < 16 ? __shfl_up_sync(kAll, A, d) : 1.f;
    X = scan_step(lane >= d ? earlier_X : 0.f, A, X);  // by a neutral element: selects cost less than skipped moves
    if (d < 16) A = join_decay(lane >= d ? earlier_A : 1.f, A);
  }
  X = __shfl_up_sync(kAll, X, 1);
  return lane > 0 ? X : h;
}
// That and the same from the end: g becomes the gradient that comes back to a lane's last step, from that to lane 31's.
// What comes back from a step is a (g + c), where g comes back to it and c = g_y C is its own. The two scans wait for
// each other's shuffles.
template <int I>
__device__ __forceinline__ void scan_lanes_both(float& h, float& g, const float (&a)[I], const float (&x)[I], const float (&c)[I]) {
  const int lane = threadIdx.x % 32;
  float A, X, back_A, back_X = a[I - 1] * c[I - 1];
  join_steps(A, X, a, x);
#pragma unroll
  for (int i = I - 2; i >= 0; --i) back_X = a[i] * (back_X + c[i]);
  back_A = A;
  if (lane == 0) X = scan_step(h, A, X);
  if (lane == 31) back_X = scan_step(g, A, back_X);
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const float earlier_X = __shfl_up_sync(kAll, X, d), later_X = __shfl_down_sync(kAll, back_X, d);
    const float earlier_A = d < 16 ? __shfl_up_sync(kAll, A, d) : 0.f, later_A = d < 16 ? __shfl_down_sync(kAll, back_A, d) : 0.f;
    if (lane >= d) {
      X = scan_step(earlier_X, A, X);
      if (d < 16) A = join_decay(earlier_A, A);
    }
    if (lane + d < 32) {
      back_X = scan_step(later_X, back_A, back_X);
      if (d < 16) back_A = join_decay(later_A, back_A);
    }
  }
  X = __shfl_up_sync(kAll, X, 1);
  back_X = __shfl_down_sync(kAll, back_X, 1);
  if (lane > 0) h = X;
  if (lane < 31) g = back_X;
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
__global__ void __launch_bounds__(32 * kFwdWarps, sizeof(T) == 4 ? 5 : 4) selective_scan_fwd_kernel(const SelectiveScanFwd q) {
  constexpr int I = kItems<T>;
  SPK_DYN_SHARED(float, states);  // [warps, S]
  const SelectiveScan& p = q.in;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, S = int(p.S);
  const int64_t blocks = (p.C + kFwdWarps - 1) / kFwdWarps, c = blockIdx.x % blocks * kFwdWarps + warp;
  if (c >= p.C) return;
  Channel k;
  k.set(p, blockIdx.x / blocks, c);
  float* const carried = states + warp * p.S;
  const float* const h_init = static_cast<const float*>(p.h_init);
  for (int s = lane; s < S; s += 32) carried[s] = h_init ? h_init[k.at * p.S + s] : 0.f;
  for (int64_t l = lane * I; l - lane * I < p.L; l += 32 * I) {
    const int left = steps_left<I>(l, p.L);
    float dt[I], du[I], u[I], y[I];
    load_steps<VECTOR, T>(dt, du, u, k, p, l, left);
#pragma unroll
    for (int i = 0; i < I; ++i) y[i] = k.skip * u[i];
    const T *in_row = at<const T>(p.Bs.data, k.Bs + l), *out_row = at<const T>(p.Cs.data, k.Cs + l);
    const float* const A_row = at<const float>(p.A, c * S);
    for (int s = 0; s < S; ++s, in_row += p.Bs.row, out_row += p.Cs.row) {
      float a[I], x[I], out[I];
      load<VECTOR>(x, in_row, left);
      load<VECTOR>(out, out_row, left);
      const float A = A_row[s];
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
        y[i] = mul_add(h, out[i], y[i]);
      }
      __syncwarp();
      if (lane == 31) carried[s] = h;
    }
    if (p.z.data) {
      float z[I];
      load<VECTOR>(z, at<const T>(p.z.data, k.z + l), left);
#pragma unroll
      for (int i = 0; i < I; ++i) y[i] *= silu(z[i]);
    }
    store<VECTOR>(at<T>(q.y, k.at * p.L + l), y, left);
  }
  __syncwarp();
  for (int s = lane; s < S; s += 32) static_cast<float*>(q.h_last)[k.at * p.S + s] = carried[s];
}

// A block owns a part of a group's channels and takes them up a warp each, as many at a time as it has warps. A warp
// walks forward to leave the states at the starts of stretches, then the stretches back: a state at a time it scans
// them forward again and the gradient backward. The gradients of B and C of the block's channels are summed in shared
// memory, in the order of the warps, and over the block's turns in the part's place in memory. Steps in 32 bits leave
// registers for a second block, which works while this one waits at a barrier.
template <class T, bool VECTOR>
__global__ void __launch_bounds__(32 * kBwdWarps, sizeof(T) == 4 ? 2 : 1) selective_scan_bwd_kernel(const SelectiveScanBwd q) {
  constexpr int I = kItems<T>, kSteps = 32 * I, kSums = 2 * kSteps / (32 * kBwdWarps);
  const SelectiveScan& p = q.in;
  SPK_SHARED(Four, tiles, [2][2][kBwdWarps][kSteps / 4]);  // of g_Bs and g_Cs, one of two for every second state
  SPK_SHARED(Channel, of_warp, [kBwdWarps]);               // not in registers, of which there are too few
  SPK_DYN_SHARED(double, shared);                          // [warps, S] double, [warps, S] float
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, S = int(p.S);
  double* const sum_A = shared + warp * S;
  float* const coming = reinterpret_cast<float*>(shared + kBwdWarps * S) + warp * S;
  const int64_t item = blockIdx.x, blocks = scan_blocks(p);
  const int group = item / q.parts, part = item % q.parts, G = int(p.G);
  const int channels = p.C / p.G, stretches = (p.L + kSteps - 1) / kSteps;
  const int first = part * blocks / q.parts * kScanLanes, end = (part + 1) * blocks / q.parts * kScanLanes;
  const int last = end < channels ? end : channels;
  float* const starts = q.starts + (item * kBwdWarps + warp) * stretches * p.S;
  const int64_t partial = item * p.S * p.L;  // of g_Bs and g_Cs
  const Channel& k = of_warp[warp];
  int tile = 0;

  for (int turn = first; turn < last; turn += kBwdWarps) {
    const bool live = turn + warp < last;
    // A warp without a channel works on the last one, and its results are dropped.
    if (lane == 0) of_warp[warp].set(p, group / G, group % G * channels + (live ? turn + warp : last - 1));
    __syncwarp();
    const auto of_state = [&](const void* t, int s) { return t ? static_cast<const float*>(t)[k.at * S + s] : 0.f; };
#pragma unroll 1
    for (int s = lane; s < S; s += 32) {
      if (p.L > 0) starts[s] = of_state(p.h_init, s);
      coming[s] = live ? of_state(q.g_h_last, s) : 0.f;
      sum_A[s] = 0;
    }
    __syncwarp();
    const float* const A_row = at<const float>(p.A, k.c * S);
    for (int stretch = 0; stretch + 1 < stretches; ++stretch) {
      const int64_t l = int64_t(stretch) * kSteps + lane * I;
      float dt[I], du[I], u[I];
      load_steps<VECTOR, T>(dt, du, u, k, p, l, I);
      const T* in_row = at<const T>(p.Bs.data, k.Bs + l);
      float* start = starts + int64_t(stretch) * S;
      for (int s = 0; s < S; ++s, ++start, in_row += p.Bs.row) {
        float a[I], x[I], joined_A, joined_x;
        load<VECTOR>(x, in_row, I);
        const float A = A_row[s];
#pragma unroll
        for (int i = 0; i < I; ++i) {
          a[i] = decay(dt[i], A);
          x[i] = du[i] * x[i];
        }
        join_steps(joined_A, joined_x, a, x);
        join_lanes(joined_A, joined_x);
        if (lane == 0) start[S] = scan_step(*start, joined_A, joined_x);
      }
    }
    __syncwarp();

    double sum_D = 0, sum_bias = 0;
    for (int stretch = stretches - 1; stretch >= 0; --stretch) {
      const int64_t l0 = int64_t(stretch) * kSteps, l = l0 + lane * I;
      const int left = steps_left<I>(l, p.L);
      float dt[I], du[I], g_y[I], y[I] = {}, g_du[I] = {}, g_dt[I] = {};
      const auto load_gradient = [&](float (&g)[I]) {
        load<VECTOR>(g, at<const T>(q.g_y.data, k.row(q.g_y) + l), q.g_y.data && live ? left : 0);
      };
      {
        float u[I], z[I];
        load_steps<VECTOR, T>(dt, du, u, k, p, l, left);
        load_gradient(g_y);
        if (p.z.data) {
          load<VECTOR>(z, at<const T>(p.z.data, k.z + l), left);
#pragma unroll
          for (int i = 0; i < I; ++i) g_y[i] *= silu(z[i]);
        }
      }
      const T *in_row = at<const T>(p.Bs.data, k.Bs + l), *out_row = at<const T>(p.Cs.data, k.Cs + l);
      const float* start = starts + int64_t(stretch) * S;
      int64_t sums_at = partial + l0;
      for (int s = 0; s < S; ++s, ++start, in_row += p.Bs.row, out_row += p.Cs.row, sums_at += p.L, tile = 1 - tile) {
        float* sums[kSums];
        float before[kSums];  // the turns before, asked for ahead of use
#pragma unroll
        for (int j = 0; j < kSums; ++j) {
          const int j_th = j * 32 * kBwdWarps + threadIdx.x;
          sums[j] = static_cast<float*>(j_th < kSteps ? q.g_Bs : q.g_Cs) + sums_at + j_th % kSteps;
          before[j] = turn > first && l0 + j_th % kSteps < p.L ? *sums[j] : 0.f;
        }
        float a[I], x[I], in[I], out[I], c[I];
        load<VECTOR>(in, in_row, left);
        load<VECTOR>(out, out_row, left);
        const float A = A_row[s];
#pragma unroll
        for (int i = 0; i < I; ++i) {
          a[i] = decay(dt[i], A);
          x[i] = du[i] * in[i];
          c[i] = g_y[i] * out[i];
        }
        float h[I + 1], g_h = coming[s], g_A = 0;
        h[0] = *start;
        scan_lanes_both(h[0], g_h, a, x, c);
        float g_B[I], g_C[I];
#pragma unroll
        for (int i = 0; i < I; ++i) {
          h[i + 1] = scan_step(h[i], a[i], x[i]);
          y[i] = mul_add(h[i + 1], out[i], y[i]);
          g_C[i] = g_y[i] * h[i + 1];
        }
#pragma unroll
        for (int i = I - 1; i >= 0; --i) {
          const float g_i = g_h + c[i];  // of h[i + 1]
          g_B[i] = g_i * du[i];
          g_du[i] = mul_add(g_i, in[i], g_du[i]);
          g_h = g_i * a[i];
          const float g_exponent = g_h * h[i];
          g_dt[i] = mul_add(g_exponent, A, g_dt[i]);
          g_A = mul_add(g_exponent, dt[i], g_A);
        }
#pragma unroll
        for (int i = 0; i < I; i += 4) {
          tiles[tile][0][warp][(lane * I + i) / 4] = {g_B[i], g_B[i + 1], g_B[i + 2], g_B[i + 3]};
          tiles[tile][1][warp][(lane * I + i) / 4] = {g_C[i], g_C[i + 1], g_C[i + 2], g_C[i + 3]};
        }
        g_A = warp_sum(g_A);
        __syncthreads();
        if (lane == 0) {
          coming[s] = g_h;
          sum_A[s] += g_A;
        }
#pragma unroll
        for (int j = 0; j < kSums; ++j) {
          const int j_th = j * 32 * kBwdWarps + threadIdx.x;
          const float* const rows = tiles[tile][j_th / kSteps][0]->d + j_th % kSteps;
          float sum = rows[0];
#pragma unroll
          for (int w = 1; w < kBwdWarps; ++w) sum += rows[w * kSteps];
          if (l0 + j_th % kSteps < p.L) *sums[j] = before[j] + sum;
        }
      }
      __syncwarp();
      float u[I], delta[I], stretch_D = 0, stretch_bias = 0;  // read again: kept, they would cost registers
      load<VECTOR>(u, at<const T>(p.u.data, k.u + l), left);
      load<VECTOR>(delta, at<const T>(p.delta.data, k.delta + l), left);
#pragma unroll
      for (int i = 0; i < I; ++i) {
        g_dt[i] = mul_add(g_du[i], u[i], g_dt[i]);
        if (p.softplus) g_dt[i] *= softplus_slope(delta[i] + k.bias);
        if (i < left) stretch_bias += g_dt[i];
        stretch_D = mul_add(g_y[i], u[i], stretch_D);
        g_du[i] = mul_add(g_du[i], dt[i], g_y[i] * k.skip);
      }
      sum_D += stretch_D;
      sum_bias += stretch_bias;
      if (live) {
        store<VECTOR>(at<T>(q.g_u, k.at * p.L + l), g_du, left);
        store<VECTOR>(at<T>(q.g_delta, k.at * p.L + l), g_dt, left);
        if (p.z.data) {
          float z[I], g[I];
          load<VECTOR>(z, at<const T>(p.z.data, k.z + l), left);
          load_gradient(g);
#pragma unroll
          for (int i = 0; i < I; ++i) y[i] = mul_add(k.skip, u[i], y[i]) * silu_slope(z[i]) * g[i];
          store<VECTOR>(at<T>(q.g_z, k.at * p.L + l), y, left);
        }
      }
    }
    sum_D = warp_sum(sum_D);
    sum_bias = warp_sum(sum_bias);
    __syncwarp();
    if (live && lane == 0 && q.g_D) q.g_D[k.at] = sum_D;
    if (live && lane == 0 && q.g_bias) q.g_bias[k.at] = sum_bias;
#pragma unroll 1
    for (int s = lane; s < S && live; s += 32) {
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
  const size_t shared = size_t(kBwdWarps * p.in.S) * (sizeof(double) + sizeof(float));
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
