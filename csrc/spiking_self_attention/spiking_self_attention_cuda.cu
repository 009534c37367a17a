// spiking_self_attention on CUDA; no torch header here. Also runs on the CPU by csrc/testing/shim.h.
// Every kernel works on tiles of 64 by 64 numbers, 4 by 4 a thread; sums run in the order of their index, in float.
#include <math.h>

#include "core/cuda.h"
#include "core/surrogate.h"
#include "lif/neuron.h"
#include "spiking_self_attention/spiking_self_attention.h"

namespace spk {
namespace {

constexpr int kTile = 64, kSide = 16, kBlock = kSide * kSide, kOwn = kTile / kSide;
constexpr int kDepth = 16;  // of a sum that is in shared memory at once

// An operand of a head: floats of some type, or bits.
struct Operand {
  SequenceIn x;
  DType dtype;
  bool packed;
};

struct Place {
  int64_t batch, head, index;
};
__device__ __forceinline__ Place place_of(int64_t index, const AttentionShape& s) { return {index / s.H, index % s.H, index}; }

template <class T>
__device__ __forceinline__ void load_own(float (&d)[kOwn], const T* p, int64_t column, int64_t left) {
  if (column == 1 && left >= kOwn && reinterpret_cast<uintptr_t>(p) % (kOwn * sizeof(T)) == 0) {
    const Vec<T, kOwn> in = *reinterpret_cast<const Vec<T, kOwn>*>(p);
#pragma unroll
    for (int j = 0; j < kOwn; ++j) d[j] = load_float<T>(in.d[j]);
    return;
  }
#pragma unroll
  for (int j = 0; j < kOwn; ++j) d[j] = j < left ? load_float<T>(p[j * column]) : 0.f;
}
template <class T>
__device__ __forceinline__ void store_own(T* p, const float (&s)[kOwn], int64_t column, int64_t left) {
  if (column == 1 && left >= kOwn && reinterpret_cast<uintptr_t>(p) % (kOwn * sizeof(T)) == 0) {
    Vec<T, kOwn> out;
#pragma unroll
    for (int j = 0; j < kOwn; ++j) out.d[j] = store_float<T>(s[j]);
    *reinterpret_cast<Vec<T, kOwn>*>(p) = out;
    return;
  }
#pragma unroll
  for (int j = 0; j < kOwn; ++j)
    if (j < left) p[j * column] = store_float<T>(s[j]);
}

// Four numbers of row r from column n on; zero past the last.
__device__ __forceinline__ void load(float (&d)[kOwn], const Operand& o, const AttentionShape& s, const Place& at, int64_t t,
                                     int64_t r, int64_t n) {
  const SequenceIn& x = o.x;
  const int64_t i = (o.packed ? t / 8 : t) * x.step + at.batch * x.batch + at.head * x.head + r * x.row + n * x.column;
  const int64_t left = r < s.D ? s.N - n : 0;
  if (left <= 0) {
#pragma unroll
    for (int j = 0; j < kOwn; ++j) d[j] = 0.f;
  } else if (o.packed) {
    load_own(d, static_cast<const uint8_t*>(x.data) + i, x.column, left);
#pragma unroll
    for (int j = 0; j < kOwn; ++j) d[j] = float(int(d[j]) >> (t % 8) & 1);
  } else if (o.dtype == DType::f32) {
    load_own(d, static_cast<const float*>(x.data) + i, x.column, left);
  } else if (o.dtype == DType::bf16) {
    load_own(d, static_cast<const __nv_bfloat16*>(x.data) + i, x.column, left);
  } else {
    load_own(d, static_cast<const __half*>(x.data) + i, x.column, left);
  }
}
__device__ __forceinline__ void store(const SequenceOut& x, DType dtype, const AttentionShape& s, const Place& at, int64_t t,
                                      int64_t r, int64_t n, const float (&d)[kOwn]) {
  const int64_t i = t * x.step + at.batch * x.batch + at.head * x.head + r * x.row + n * x.column, left = s.N - n;
  if (r >= s.D || left <= 0) return;
  if (dtype == DType::f32)
    store_own(static_cast<float*>(x.data) + i, d, x.column, left);
  else if (dtype == DType::bf16)
    store_own(static_cast<__nv_bfloat16*>(x.data) + i, d, x.column, left);
  else
    store_own(static_cast<__half*>(x.data) + i, d, x.column, left);
}

using Panel = float[kDepth][kTile];
using Own = float[kOwn][kOwn];

__device__ __forceinline__ void multiply(Own& sum, const Panel& a, const Panel& b) {
  const int row = int(threadIdx.x) / kSide * kOwn, column = int(threadIdx.x) % kSide * kOwn;
#pragma unroll 4
  for (int k = 0; k < kDepth; ++k) {
    const Vec<float, kOwn> x = *reinterpret_cast<const Vec<float, kOwn>*>(&a[k][row]);
    const Vec<float, kOwn> y = *reinterpret_cast<const Vec<float, kOwn>*>(&b[k][column]);
#pragma unroll
    for (int i = 0; i < kOwn; ++i)
#pragma unroll
      for (int j = 0; j < kOwn; ++j) sum[i][j] += x.d[i] * y.d[j];
  }
}

// sum[r, n] = over c of m[r, c] x[c, n] of the tile at (r0, n0); m: [D, D] at `matrix`, element (r, c) at r row + c column.
__device__ __forceinline__ void matrix_times(Own& sum, const float* matrix, int64_t row, int64_t column, const Operand& o,
                                             const AttentionShape& s, const Place& at, int64_t t, int64_t r0, int64_t n0, Panel& a,
                                             Panel& b) {
#pragma unroll
  for (int i = 0; i < kOwn; ++i)
#pragma unroll
    for (int j = 0; j < kOwn; ++j) sum[i][j] = 0.f;
  const int thread = int(threadIdx.x);
  for (int64_t c0 = 0; c0 < s.D; c0 += kDepth) {
    __syncthreads();
    for (int i = thread; i < kDepth * kTile; i += kBlock) {
      const int64_t r = r0 + i % kTile, c = c0 + i / kTile;
      a[i / kTile][i % kTile] = r < s.D && c < s.D ? matrix[r * row + c * column] : 0.f;
    }
    const int c = thread / kSide, n = thread % kSide * kOwn;  // kDepth rows of kSide threads
    float in[kOwn];
    load(in, o, s, at, t, c0 + c, n0 + n);
#pragma unroll
    for (int j = 0; j < kOwn; ++j) b[c][n + j] = in[j];
    __syncthreads();
    multiply(sum, a, b);
  }
}

// Block (head, t, tile): out[r, c] = sum over n of x[r, n] y[c, n] for [T, D, D] of a head at `out`.
__global__ void __launch_bounds__(kBlock) ssa_dots_kernel(const Operand x, const Operand y, const AttentionShape s, float* out) {
  SPK_SHARED(float, a, [kDepth][kTile]);
  SPK_SHARED(float, b, [kDepth][kTile]);
  const Place at = place_of(blockIdx.x, s);
  const int64_t t = blockIdx.y, tiles = (s.D + kTile - 1) / kTile;
  const int64_t r0 = blockIdx.z / tiles * kTile, c0 = blockIdx.z % tiles * kTile;
  Own sum = {};
  const int thread = int(threadIdx.x), row = thread / (kDepth / kOwn), n = thread % (kDepth / kOwn) * kOwn;
  for (int64_t n0 = 0; n0 < s.N; n0 += kDepth) {
    __syncthreads();
    float in[kOwn];
    load(in, x, s, at, t, r0 + row, n0 + n);
#pragma unroll
    for (int j = 0; j < kOwn; ++j) a[n + j][row] = in[j];
    load(in, y, s, at, t, c0 + row, n0 + n);
#pragma unroll
    for (int j = 0; j < kOwn; ++j) b[n + j][row] = in[j];
    __syncthreads();
    Own part = {};  // sums of sums: a long chain of additions would lose digits
    multiply(part, a, b);
#pragma unroll
    for (int i = 0; i < kOwn; ++i)
#pragma unroll
      for (int j = 0; j < kOwn; ++j) sum[i][j] += part[i][j];
  }
  float* const base = out + (at.index * s.T + t) * s.D * s.D;
#pragma unroll
  for (int i = 0; i < kOwn; ++i)
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      const int64_t r = r0 + thread / kSide * kOwn + i, c = c0 + thread % kSide * kOwn + j;
      if (r < s.D && c < s.D) base[r * s.D + c] = sum[i][j];
    }
}

struct Cell {
  Neuron<float> c;
  float decay, gain;
};
__device__ __forceinline__ Cell cell_of(const LifNeuron& p, const Neuron<float>& c, int64_t head) {
  const float* decay = static_cast<const float*>(p.decay_c);
  const float* gain = static_cast<const float*>(p.gain_c);
  const int64_t i = p.C == 1 ? 0 : head;
  return {c, decay ? decay[i] : float(p.decay), gain ? gain[i] : float(p.gain)};
}

// Block (head, columns, rows): the tile's neurons go through time with their potentials in registers.
__global__ void __launch_bounds__(kBlock)
    ssa_fwd_kernel(const SpikingSelfAttentionFwd p, const Operand q, const Neuron<float> c, bool bits_out) {
  SPK_SHARED(float, a, [kDepth][kTile]);
  SPK_SHARED(float, b, [kDepth][kTile]);
  const AttentionShape& s = p.shape;
  const Place at = place_of(blockIdx.x, s);
  const int64_t n0 = int64_t(blockIdx.y) * kTile, r0 = int64_t(blockIdx.z) * kTile;
  const int64_t row = r0 + threadIdx.x / kSide * kOwn, n = n0 + threadIdx.x % kSide * kOwn;
  const Cell cell = cell_of(p.attn.lif, c, at.head);
  float v[kOwn][kOwn];
  unsigned bits[kOwn][kOwn] = {};
#pragma unroll
  for (int i = 0; i < kOwn; ++i)
#pragma unroll
    for (int j = 0; j < kOwn; ++j) v[i][j] = c.rest;
  for (int64_t t = 0; t < s.T; ++t) {
    Own y;
    matrix_times(y, static_cast<const float*>(p.scratch) + (at.index * s.T + t) * s.D * s.D, 1, s.D, q, s, at, t, r0, n0, a, b);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      float out[kOwn];
#pragma unroll
      for (int j = 0; j < kOwn; ++j) {
        const float h = charge(v[i][j], float(s.scale) * y[i][j], cell.decay, cell.gain, c.rest);
        out[j] = h >= c.fire_at ? 1.f : 0.f;
        bits[i][j] |= (h >= c.fire_at ? 1u : 0u) << (t % 8);
        v[i][j] = reset(h, p.attn.lif.hard, c);
      }
      if (!bits_out) {
        store(p.out, s.dtype, s, at, t, row + i, n, out);
      } else if (t % 8 == 7 || t + 1 == s.T) {
        const SequenceOut& x = p.out;
        uint8_t* d = static_cast<uint8_t*>(x.data) + t / 8 * x.step + at.batch * x.batch + at.head * x.head + (row + i) * x.row +
                     n * x.column;
#pragma unroll
        for (int j = 0; j < kOwn; ++j) {
          if (row + i < s.D && n + j < s.N) d[j * x.column] = uint8_t(bits[i][j]);
          bits[i][j] = 0;
        }
      }
    }
  }
}

// As forward, leaving h in g_y: [B, H, T, D, N]; then back through time, which puts the gradient of y there. Sums of the
// parameters' gradients of a block go to partial: [2, B * H, blocks of a head].
__global__ void __launch_bounds__(kBlock, 1)  // else registers spill on sm_80
    ssa_bwd_neuron_kernel(const SpikingSelfAttentionBwd p, const Operand q, const Neuron<float> c, const float* kv, float* g_y,
                          double* partial) {
  SPK_SHARED(float, a, [kDepth][kTile]);
  SPK_SHARED(float, b, [kDepth][kTile]);
  SPK_SHARED(double, sums, [kBlock]);
  const AttentionShape& s = p.shape;
  const Place at = place_of(blockIdx.x, s);
  const int64_t n0 = int64_t(blockIdx.y) * kTile, r0 = int64_t(blockIdx.z) * kTile;
  const int64_t row = r0 + threadIdx.x / kSide * kOwn, n = n0 + threadIdx.x % kSide * kOwn;
  const Cell cell = cell_of(p.attn.lif, c, at.head);
  const bool hard = p.attn.lif.hard;
  const float scale = float(s.scale);
  const Operand g_out = {p.g_out, s.dtype, false};
  float* const own = g_y + at.index * s.T * s.D * s.N;
  const float* const matrix = kv + at.index * s.T * s.D * s.D;
  float v[kOwn][kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; ++i)
#pragma unroll
    for (int j = 0; j < kOwn; ++j) v[i][j] = c.rest;
  for (int64_t t = 0; t < s.T; ++t) {
    Own y;
    matrix_times(y, matrix + t * s.D * s.D, 1, s.D, q, s, at, t, r0, n0, a, b);
#pragma unroll
    for (int i = 0; i < kOwn; ++i)
#pragma unroll
      for (int j = 0; j < kOwn; ++j) {
        const float h = charge(v[i][j], scale * y[i][j], cell.decay, cell.gain, c.rest);
        v[i][j] = reset(h, hard, c);
        if (row + i < s.D && n + j < s.N) own[(t * s.D + row + i) * s.N + n + j] = h;
      }
  }
  double sum_decay = 0, sum_gain = 0;
#pragma unroll
  for (int i = 0; i < kOwn; ++i)
#pragma unroll
    for (int j = 0; j < kOwn; ++j) v[i][j] = 0.f;  // now the gradient of v
  for (int64_t t = s.T - 1; t >= 0; --t) {
    Own y;
    if (p.g_gain) matrix_times(y, matrix + t * s.D * s.D, 1, s.D, q, s, at, t, r0, n0, a, b);
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      float g_s[kOwn];
      load(g_s, g_out, s, at, t, row + i, n);
#pragma unroll
      for (int j = 0; j < kOwn; ++j) {
        if (row + i >= s.D || n + j >= s.N) continue;
        float* const place = own + (t * s.D + row + i) * s.N + n + j;
        const float h = *place, u = h - c.threshold, x = float(p.attn.a), z = float(p.attn.b);
        float sg;
        switch (static_cast<Surrogate>(p.attn.surrogate)) {
          case Surrogate::atan: sg = surrogate<Surrogate::atan>(u, x, z); break;
          case Surrogate::sigmoid: sg = surrogate<Surrogate::sigmoid>(u, x, z); break;
          case Surrogate::rectangle: sg = surrogate<Surrogate::rectangle>(u, x, z); break;
          case Surrogate::triangle: sg = surrogate<Surrogate::triangle>(u, x, z); break;
          case Surrogate::fast_sigmoid: sg = surrogate<Surrogate::fast_sigmoid>(u, x, z); break;
          case Surrogate::erf: sg = surrogate<Surrogate::erf>(u, x, z); break;
          default: sg = surrogate<Surrogate::leaky_relu>(u, x, z);
        }
        const float g = step_backward(h, g_s[j], v[i][j], 0.f, sg, hard, p.attn.detach, c);
        v[i][j] = cell.decay * g;
        *place = scale * (cell.gain * g);
        if (p.g_gain) sum_gain += double(g) * double(scale * y[i][j]);
        if (p.g_decay && t > 0) sum_decay += double(g) * double(reset(place[-s.D * s.N], hard, c) - c.rest);
      }
    }
  }
  for (int which = 0; which < 2; ++which) {
    if (which ? !p.g_gain : !p.g_decay) continue;
    sums[threadIdx.x] = which ? sum_gain : sum_decay;
    __syncthreads();
    for (int width = kBlock / 2; width > 0; width /= 2) {
      if (int(threadIdx.x) < width) sums[threadIdx.x] += sums[threadIdx.x + width];
      __syncthreads();
    }
    if (threadIdx.x == 0)
      partial[((which * int64_t(gridDim.x) + at.index) * gridDim.y + blockIdx.y) * gridDim.z + blockIdx.z] = sums[0];
    __syncthreads();
  }
}

// A thread adds up the blocks of a head.
__global__ void ssa_bwd_sum_kernel(const double* partial, float* g_decay, float* g_gain, int64_t heads, int64_t count) {
  const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= heads) return;
  for (int which = 0; which < 2; ++which) {
    float* const out = which ? g_gain : g_decay;
    if (!out) continue;
    double sum = 0;
    for (int64_t j = 0; j < count; ++j) sum += partial[(which * heads + i) * count + j];
    out[i] = float(sum);
  }
}

// Block (head, columns, t and rows): out = m x, m: [D, D] of step t of the head, its element (r, c) at r row + c column.
__global__ void __launch_bounds__(kBlock)
    ssa_bwd_product_kernel(const AttentionShape s, const float* m, int64_t row, int64_t column, const Operand x,
                           const SequenceOut out, DType dtype) {
  SPK_SHARED(float, a, [kDepth][kTile]);
  SPK_SHARED(float, b, [kDepth][kTile]);
  const Place at = place_of(blockIdx.x, s);
  const int64_t tiles = (s.D + kTile - 1) / kTile, t = blockIdx.z / tiles;
  const int64_t n0 = int64_t(blockIdx.y) * kTile, r0 = blockIdx.z % tiles * kTile;
  Own y;
  matrix_times(y, m + (at.index * s.T + t) * s.D * s.D, row, column, x, s, at, t, r0, n0, a, b);
#pragma unroll
  for (int i = 0; i < kOwn; ++i)
    store(out, dtype, s, at, t, r0 + threadIdx.x / kSide * kOwn + i, n0 + threadIdx.x % kSide * kOwn, y[i]);
}

Neuron<float> constants(const LifNeuron& p) {
  const float threshold = float(p.threshold), above = nextafterf(threshold, INFINITY);
  // Nothing lies above infinity, and no potential is >= NaN.
  return {float(p.rest), !p.strict ? threshold : above > threshold ? above : NAN, threshold, float(p.reset_by)};
}

unsigned tiles_of(int64_t n) { return unsigned((n + kTile - 1) / kTile); }

// From currents the operands have become the bits of their neurons (spiking_self_attention.cpp).
Operand operand(const SequenceIn& x, const AttentionShape& s) { return {x, s.dtype, s.packed || s.currents}; }

}  // namespace

// kv
int64_t spiking_self_attention_fwd_scratch(const AttentionShape& s) { return s.T * s.B * s.H * s.D * s.D; }

// kv and its gradient, the gradient of y, sums of blocks; the doubles first.
static int64_t partials(const AttentionShape& s) { return 2 * s.B * s.H * tiles_of(s.N) * tiles_of(s.D); }
int64_t spiking_self_attention_bwd_scratch(const AttentionShape& s) {
  return 2 * partials(s) + s.T * s.B * s.H * s.D * (2 * s.D + s.N);
}

int spiking_self_attention_fwd_cuda(const SpikingSelfAttentionFwd& p, void* stream) {
  const AttentionShape& s = p.shape;
  const unsigned heads = unsigned(s.B * s.H), rows = tiles_of(s.D);
  SPK_LAUNCH(ssa_dots_kernel, dim3(heads, unsigned(s.T), rows * rows), dim3(kBlock), 0, stream, operand(p.k, s), operand(p.v, s), s,
             static_cast<float*>(p.scratch));
  SPK_LAUNCH(ssa_fwd_kernel, dim3(heads, tiles_of(s.N), rows), dim3(kBlock), 0, stream, p, operand(p.q, s), constants(p.attn.lif),
             s.packed);
  (void)stream;
  return SPK_LAST_ERROR();
}

int spiking_self_attention_bwd_cuda(const SpikingSelfAttentionBwd& p, void* stream) {
  const AttentionShape& s = p.shape;
  const unsigned heads = unsigned(s.B * s.H), rows = tiles_of(s.D), columns = tiles_of(s.N);
  double* const partial = static_cast<double*>(p.scratch);
  float* const kv = static_cast<float*>(p.scratch) + 2 * partials(s);
  float* const g_kv = kv + s.T * s.B * s.H * s.D * s.D;
  float* const g_y = g_kv + s.T * s.B * s.H * s.D * s.D;
  const Operand q = operand(p.q, s), k = operand(p.k, s), v = operand(p.v, s);
  const Operand g = {{g_y, s.D * s.N, s.H * s.T * s.D * s.N, s.T * s.D * s.N, s.N, 1}, DType::f32, false};
  const DType out = s.currents ? DType::f32 : s.dtype;
  const dim3 matrices(heads, unsigned(s.T), rows * rows), products(heads, columns, unsigned(s.T) * rows);
  SPK_LAUNCH(ssa_dots_kernel, matrices, dim3(kBlock), 0, stream, k, v, s, kv);
  SPK_LAUNCH(ssa_bwd_neuron_kernel, dim3(heads, columns, rows), dim3(kBlock), 0, stream, p, q, constants(p.attn.lif), kv, g_y,
             partial);
  SPK_LAUNCH(ssa_dots_kernel, matrices, dim3(kBlock), 0, stream, q, g, s, g_kv);
  SPK_LAUNCH(ssa_bwd_product_kernel, products, dim3(kBlock), 0, stream, s, kv, s.D, 1, g, p.g_q, out);
  SPK_LAUNCH(ssa_bwd_product_kernel, products, dim3(kBlock), 0, stream, s, g_kv, s.D, 1, v, p.g_k, out);
  SPK_LAUNCH(ssa_bwd_product_kernel, products, dim3(kBlock), 0, stream, s, g_kv, 1, s.D, k, p.g_v, out);
  if (p.g_decay || p.g_gain)
    SPK_LAUNCH(ssa_bwd_sum_kernel, dim3((heads + kBlock - 1) / kBlock), dim3(kBlock), 0, stream, partial,
               static_cast<float*>(p.g_decay), static_cast<float*>(p.g_gain), int64_t(heads), int64_t(columns) * rows);
  (void)stream;
  return SPK_LAST_ERROR();
}

}  // namespace spk
