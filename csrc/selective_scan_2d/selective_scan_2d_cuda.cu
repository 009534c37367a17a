// selective_scan_2d on CUDA; no torch header here. Also runs on the CPU by csrc/testing/shim.h.
// A warp owns a channel and walks its map in every direction, a chunk of 128 places at a time, 4 for each lane: a scan
// within the lane, one over the lanes by shuffles, and the state carried from chunk to chunk. Lane s % 32 keeps state s.
#include <math.h>

#include "core/cuda.h"
#include "selective_scan/scan.h"
#include "selective_scan_2d/selective_scan_2d.h"

namespace spk {
namespace {

constexpr int kItems = 4;             // places of a lane in a chunk
constexpr int kChunk = 32 * kItems;   // places of a warp
constexpr int kFwdWarps = 4;          // channels of a block, one a warp
constexpr int kBwdWarps = kGpuGroup;  // channels whose parts in g_B and g_C a block adds up
constexpr unsigned kAll = ~0u;

SPK_HD int64_t blocks_of(int64_t C, int64_t warps) { return (C + warps - 1) / warps; }

// One direction of a walk over [H, W].
struct Walk {
  int32_t code, H, W, L;
  bool vector;  // rows whose four neighbours may be read at once

  __device__ int32_t place(int32_t l) const { return walk_place(code, l, H, W); }
};

// A lane's places of a chunk; those past the end of the walk are marked by -1.
struct Places {
  int32_t at[kItems];
  int32_t first;  // of four neighbours in ascending order, or -1

  __device__ Places(const Walk& w, int32_t l) {
    if (w.code == 0 || w.code == 2) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) at[i] = l + i < w.L ? w.place(l + i) : -1;
    } else {  // w.place of each, but with one division for all
      const bool back = w.code == 3 || w.code == 5;
      const int32_t from = back ? w.L - 1 - l : l;
      int32_t column = from / w.H, h = from - column * w.H;
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        at[i] = l + i < w.L ? h * w.W + (w.code >= 4 ? w.W - 1 - column : column) : -1;
        h += back ? -1 : 1;
        if (h < 0 || h == w.H) {
          column += back ? -1 : 1;
          h = back ? w.H - 1 : 0;
        }
      }
    }
    first = w.vector && l + kItems <= w.L ? min(at[0], at[kItems - 1]) : -1;
  }
};

template <class T>
__device__ __forceinline__ void load(float (&d)[kItems], const T* __restrict__ p, const Places& q) {
  if (q.first >= 0) {
    const Vec<T, kItems> in = *reinterpret_cast<const Vec<T, kItems>*>(p + q.first);
    const bool back = q.at[0] > q.first;
#pragma unroll
    for (int i = 0; i < kItems; ++i) d[i] = load_float<T>(back ? in.d[kItems - 1 - i] : in.d[i]);
    return;
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i) d[i] = q.at[i] >= 0 ? load_float<T>(p[q.at[i]]) : 0.f;
}

template <class T>
__device__ __forceinline__ void store(T* __restrict__ p, const float (&d)[kItems], const Places& q) {
  if (q.first >= 0) {
    const bool back = q.at[0] > q.first;
    Vec<T, kItems> out;
#pragma unroll
    for (int i = 0; i < kItems; ++i) out.d[i] = store_float<T>(back ? d[kItems - 1 - i] : d[i]);
    *reinterpret_cast<Vec<T, kItems>*>(p + q.first) = out;
    return;
  }
#pragma unroll
  for (int i = 0; i < kItems; ++i)
    if (q.at[i] >= 0) p[q.at[i]] = store_float<T>(d[i]);
}

// to[place] = d, or += d unless it is the first direction.
__device__ __forceinline__ void add(float* __restrict__ to, float (&d)[kItems], const Places& q, bool first) {
  float before[kItems] = {};
  if (!first) load(before, to, q);
#pragma unroll
  for (int i = 0; i < kItems; ++i) d[i] = before[i] + d[i];
  store(to, d, q);
}

// Step sizes; 0 past the end of the walk, which leaves the state as it is. delta: in and out.
__device__ __forceinline__ void step_sizes(float (&dt)[kItems], float bias, bool positive, const Places& q) {
#pragma unroll
  for (int i = 0; i < kItems; ++i) {
    const float z = dt[i] + bias;
    dt[i] = q.at[i] < 0 ? 0.f : positive ? softplus(z) : z;
  }
}

// Numbers of up to 64 states, two for each lane.
struct PerState {
  float low, high;

  __device__ float get(int s) const { return __shfl_sync(kAll, s < 32 ? low : high, s % 32); }
  __device__ void set(int s, float value) {
    if (int(threadIdx.x) == s % 32) (s < 32 ? low : high) = value;
  }
  __device__ void add(int s, float value) {
    if (int(threadIdx.x) == s % 32) (s < 32 ? low : high) += value;
  }
};

// The stretch of a lane: h after it is a * (h before it) + x. Joined over the lanes before (or after) this one.
struct Stretch {
  float a, x;
};
__device__ __forceinline__ Stretch join(const Stretch& first, const Stretch& then) {
  return {join_decay(first.a, then.a), scan_step(first.x, then.a, then.x)};
}
// What a stretch begins with, from `start` at lane 0. `start` goes into what lane 0 passes on, so the decays need no last
// step of the scan. The second: from `start` at lane 31, backwards.
__device__ __forceinline__ float lanes_before(Stretch own, float start) {
  if (threadIdx.x == 0) own.x = scan_step(start, own.a, own.x);
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const Stretch other{d < 16 ? __shfl_up_sync(kAll, own.a, d) : 0.f, __shfl_up_sync(kAll, own.x, d)};
    if (int(threadIdx.x) >= d) own = join(other, own);
  }
  const float before = __shfl_up_sync(kAll, own.x, 1);
  return threadIdx.x == 0 ? start : before;
}
__device__ __forceinline__ float lanes_after(Stretch own, float start) {
  if (threadIdx.x == 31) own.x = scan_step(start, own.a, own.x);
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const Stretch other{d < 16 ? __shfl_down_sync(kAll, own.a, d) : 0.f, __shfl_down_sync(kAll, own.x, d)};
    if (int(threadIdx.x) + d < 32) own = join(other, own);
  }
  const float after = __shfl_down_sync(kAll, own.x, 1);
  return threadIdx.x == 31 ? start : after;
}
__device__ __forceinline__ float sum_lanes(float v) {
  for (int d = 16; d > 0; d /= 2) v += __shfl_xor_sync(kAll, v, d);
  return v;
}

// The states h after each of the lane's places from the state before the chunk; returns the one before the first place.
__device__ __forceinline__ float states(float (&h)[kItems], const float (&a)[kItems], const float (&x)[kItems], float start) {
  Stretch own{a[0], x[0]};
#pragma unroll
  for (int i = 1; i < kItems; ++i) own = join(own, {a[i], x[i]});
  const float first = lanes_before(own, start);
  float state = first;
#pragma unroll
  for (int i = 0; i < kItems; ++i) h[i] = state = scan_step(state, a[i], x[i]);
  return first;
}

template <class T>
__device__ __forceinline__ const T* row(const void* base, int64_t index, int64_t L) {
  return static_cast<const T*>(base) + index * L;
}

__device__ __forceinline__ float parameter(const void* base, int64_t index) {
  return base ? static_cast<const float*>(base)[index] : 0.f;
}

// What was added up in float, in the dtype of the result, where that is another.
template <class T>
__device__ __forceinline__ void convert(T* out, const float* sum, int64_t at, int32_t L) {
  if (static_cast<const void*>(out) == sum) return;
  for (int32_t l = threadIdx.x; l < L; l += 32) out[at + l] = store_float<T>(sum[at + l]);
}

template <class T>
__global__ void __launch_bounds__(32 * kFwdWarps, 8) selective_scan_2d_fwd_kernel(const SelectiveScan2dFwd q, bool vector) {
  const SelectiveScan2d& p = q.scan;
  const int64_t blocks = blocks_of(p.C, kFwdWarps), b = blockIdx.x / blocks, c = blockIdx.x % blocks * kFwdWarps + threadIdx.y;
  if (c >= p.C) return;
  const int32_t L = int32_t(p.H * p.W);
  const T* x = row<T>(p.x, b * p.C + c, L);  // [L]
  float* sum = q.sum + (b * p.C + c) * L;    // [L]
  for (int k = 0; k < p.K; ++k) {
    const int code = p.directions[k];
    const Walk walk{code, int32_t(p.H), int32_t(p.W), L, vector && (code == 0 || code == 2)};
    const int64_t kc = k * p.C + c, bk = b * p.K + k;
    const T* delta = row<T>(p.delta, bk * p.C + c, L);           // [L]
    const T* into = row<T>(p.into, bk * p.S, L);                 // [S, L]
    const T* out_of = row<T>(p.out_of, bk * p.S, L);             // [S, L]
    const float* A = static_cast<const float*>(p.A) + kc * p.S;  // [S]
    const float D = parameter(p.D, kc), bias = parameter(p.bias, kc);
    PerState carried{0.f, 0.f};
    for (int32_t l0 = 0; l0 < L; l0 += kChunk) {
      const Places places(walk, l0 + int32_t(threadIdx.x) * kItems);
      float dt[kItems], u[kItems], y[kItems];
      load(dt, delta, places);
      load(u, x, places);
      step_sizes(dt, bias, p.softplus, places);
#pragma unroll
      for (int i = 0; i < kItems; ++i) y[i] = D * u[i];
      for (int s = 0; s < p.S; ++s) {
        const float A_s = A[s];
        float a[kItems], in[kItems], out[kItems], h[kItems];
        load(in, into + int64_t(s) * L, places);
        load(out, out_of + int64_t(s) * L, places);
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
          a[i] = decay(dt[i], A_s);
          in[i] = dt[i] * u[i] * in[i];
        }
        states(h, a, in, carried.get(s));
#pragma unroll
        for (int i = 0; i < kItems; ++i) y[i] = mul_add(h[i], out[i], y[i]);
        carried.set(s, __shfl_sync(kAll, h[kItems - 1], 31));
      }
      add(sum, y, places, k == 0);
    }
    __syncwarp();  // the next direction adds to places of other lanes
  }
  convert(static_cast<T*>(q.y), q.sum, (b * p.C + c) * L, L);
}

template <class T>
__global__ void __launch_bounds__(32 * kBwdWarps) selective_scan_2d_bwd_kernel(const SelectiveScan2dBwd q, bool vector) {
  SPK_SHARED(float, parts, [2][2][kBwdWarps][kChunk]);  // each channel's in g_B and g_C, one of two for every second state
  const SelectiveScan2d& p = q.scan;
  const int lane = threadIdx.x;
  const int64_t group = blockIdx.x, groups = blocks_of(p.C, kBwdWarps);  // [B, groups]
  const int64_t b = group / groups, own = group % groups * kBwdWarps + threadIdx.y;
  const bool live = own < p.C;  // others help adding up
  const int64_t c = live ? own : p.C - 1;
  const int32_t L = int32_t(p.H * p.W), chunks = (L + kChunk - 1) / kChunk;
  const T* x = row<T>(p.x, b * p.C + c, L);                 // [L]
  const T* g_y = row<T>(q.g_y, b * p.C + c, L);             // [L]
  float* sum = q.sum + (b * p.C + c) * L;                   // [L]
  float* starts = q.starts + (b * p.C + c) * chunks * p.S;  // [chunks, S]
  int turn = 0;
  for (int k = 0; k < p.K; ++k) {
    const int code = p.directions[k];
    const Walk walk{code, int32_t(p.H), int32_t(p.W), L, vector && (code == 0 || code == 2)};
    const int64_t kc = k * p.C + c, bk = b * p.K + k, bkc = bk * p.C + c;
    const T* delta = row<T>(p.delta, bkc, L);                    // [L]
    const T* into = row<T>(p.into, bk * p.S, L);                 // [S, L]
    const T* out_of = row<T>(p.out_of, bk * p.S, L);             // [S, L]
    const float* A = static_cast<const float*>(p.A) + kc * p.S;  // [S]
    const float D = parameter(p.D, kc), bias = parameter(p.bias, kc);
    PerState carried{0.f, 0.f};
    for (int32_t chunk = 0; chunk < chunks; ++chunk) {
      const Places places(walk, (chunk * 32 + lane) * kItems);
      if (live && lane < p.S) starts[int64_t(chunk) * p.S + lane] = carried.low;
      if (live && lane + 32 < p.S) starts[int64_t(chunk) * p.S + lane + 32] = carried.high;
      if (chunk + 1 == chunks) break;
      float dt[kItems], u[kItems];
      load(dt, delta, places);
      load(u, x, places);
      step_sizes(dt, bias, p.softplus, places);
      for (int s = 0; s < p.S; ++s) {
        const float A_s = A[s];
        float in[kItems], h[kItems], a[kItems];
        load(in, into + int64_t(s) * L, places);
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
          a[i] = decay(dt[i], A_s);
          in[i] = dt[i] * u[i] * in[i];
        }
        states(h, a, in, carried.get(s));
        carried.set(s, __shfl_sync(kAll, h[kItems - 1], 31));
      }
    }
    __syncwarp();  // starts are read by other lanes
    PerState g_carried{0.f, 0.f}, g_A{0.f, 0.f};
    float g_bias = 0, g_D = 0;
    for (int32_t chunk = chunks - 1; chunk >= 0; --chunk) {
      const Places places(walk, (chunk * 32 + lane) * kItems);
      float z[kItems], dt[kItems], u[kItems], g[kItems], g_decays[kItems] = {}, g_steps[kItems] = {};
      load(z, delta, places);
      load(u, x, places);
      load(g, g_y, places);
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        dt[i] = z[i];
        g_D += g[i] * u[i];
      }
      step_sizes(dt, bias, p.softplus, places);
      for (int s = 0; s < p.S; ++s) {
        const float A_s = A[s];
        float in[kItems], out[kItems], a[kItems], steps[kItems], h[kItems];
        load(in, into + int64_t(s) * L, places);
        load(out, out_of + int64_t(s) * L, places);
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
          a[i] = decay(dt[i], A_s);
          steps[i] = dt[i] * u[i] * in[i];
        }
        // Lanes of a channel that is none read what another wrote; their parts are thrown away below.
        const float before = states(h, a, steps, live ? starts[int64_t(chunk) * p.S + s] : 0.f);
        // Back: what reaches the state before a place is a * (C g + what comes from the next place).
        Stretch stretch{a[kItems - 1], a[kItems - 1] * (out[kItems - 1] * g[kItems - 1])};
#pragma unroll
        for (int i = kItems - 2; i >= 0; --i) stretch = join(stretch, {a[i], a[i] * (out[i] * g[i])});
        float coming = lanes_after(stretch, g_carried.get(s)), g_A_s = 0;
        Vec<float, kItems> part_B, part_C;
#pragma unroll
        for (int i = kItems - 1; i >= 0; --i) {
          const float g_h = coming + out[i] * g[i], through = a[i] * g_h * (i ? h[i ? i - 1 : 0] : before);
          coming = a[i] * g_h;
          g_decays[i] = mul_add(A_s, through, g_decays[i]);
          g_steps[i] = mul_add(g_h, in[i], g_steps[i]);
          g_A_s = mul_add(dt[i], through, g_A_s);
          part_B.d[i] = live ? g_h * (dt[i] * u[i]) : 0.f;
          part_C.d[i] = live ? g[i] * h[i] : 0.f;
        }
        g_carried.set(s, __shfl_sync(kAll, coming, 0));
        g_A.add(s, sum_lanes(g_A_s));
        *reinterpret_cast<Vec<float, kItems>*>(&parts[turn][0][threadIdx.y][lane * kItems]) = part_B;
        *reinterpret_cast<Vec<float, kItems>*>(&parts[turn][1][threadIdx.y][lane * kItems]) = part_C;
        __syncthreads();
        for (int i = int(threadIdx.y) * 32 + lane; i < 2 * kChunk; i += 32 * kBwdWarps) {
          const int32_t l = chunk * kChunk + i % kChunk;
          float total = 0;
          for (int w = 0; w < kBwdWarps; ++w) total += parts[turn][i / kChunk][w][i % kChunk];
          if (l < L)
            static_cast<float*>(i < kChunk ? q.g_into : q.g_out)[((group * p.K + k) * p.S + s) * L + walk.place(l)] = total;
        }
        turn = 1 - turn;
      }
      if (!live) continue;
      float g_x[kItems];
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        g_x[i] = g_steps[i] * dt[i] + D * g[i];
        const float g_dt = g_decays[i] + g_steps[i] * u[i];
        z[i] = p.softplus ? g_dt * softplus_slope(z[i] + bias) : g_dt;
        if (places.at[i] >= 0) g_bias += z[i];
      }
      store(static_cast<T*>(q.g_delta) + bkc * L, z, places);
      add(sum, g_x, places, k == 0);
    }
    g_bias = sum_lanes(g_bias);
    g_D = sum_lanes(g_D);
    if (live) {
      float* to = static_cast<float*>(q.g_A) + bkc * p.S;
      if (lane < p.S) to[lane] = g_A.low;
      if (lane + 32 < p.S) to[lane + 32] = g_A.high;
      if (lane == 0 && q.g_bias) static_cast<float*>(q.g_bias)[bkc] = g_bias;
      if (lane == 0 && q.g_D) static_cast<float*>(q.g_D)[bkc] = g_D;
    }
    __syncwarp();  // the next direction adds to places, and writes starts, of other lanes
  }
  if (live) convert(static_cast<T*>(q.g_x), q.sum, (b * p.C + c) * L, L);
}

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

bool vector(const SelectiveScan2d& p, const void* y, const float* sum) {
  return p.H * p.W % kItems == 0 && aligned(p.x) && aligned(p.delta) && aligned(p.into) && aligned(p.out_of) && aligned(y) &&
         aligned(sum);
}

template <class T>
int forward(const SelectiveScan2dFwd& q, void* stream) {
  const dim3 grid(unsigned(blocks_of(q.scan.C, kFwdWarps) * q.scan.B));
  SPK_LAUNCH(selective_scan_2d_fwd_kernel<T>, grid, dim3(32, kFwdWarps), 0, stream, q, vector(q.scan, q.y, q.sum));
  (void)stream;
  return SPK_LAST_ERROR();
}

template <class T>
int backward(const SelectiveScan2dBwd& q, void* stream) {
  const dim3 grid(unsigned(blocks_of(q.scan.C, kBwdWarps) * q.scan.B));
  const bool wide = vector(q.scan, q.g_y, q.sum) && aligned(q.g_delta);
  SPK_LAUNCH(selective_scan_2d_bwd_kernel<T>, grid, dim3(32, kBwdWarps), 0, stream, q, wide);
  (void)stream;
  return SPK_LAST_ERROR();
}

}  // namespace

int64_t selective_scan_2d_chunks(int64_t L) { return (L + kChunk - 1) / kChunk; }

int selective_scan_2d_fwd_cuda(const SelectiveScan2dFwd& p, void* stream) {
  switch (p.scan.dtype) {
    case DType::f32: return forward<float>(p, stream);
    case DType::bf16: return forward<__nv_bfloat16>(p, stream);
    default: return forward<__half>(p, stream);
  }
}

int selective_scan_2d_bwd_cuda(const SelectiveScan2dBwd& p, void* stream) {
  switch (p.scan.dtype) {
    case DType::f32: return backward<float>(p, stream);
    case DType::bf16: return backward<__nv_bfloat16>(p, stream);
    default: return backward<__half>(p, stream);
  }
}

}  // namespace spk
