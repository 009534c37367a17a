// selective_scan on the CPU; compiled once per instruction set (core/dispatch.h). 16 channels of a group go through the
// sequence side by side, a chunk at a time: their rows are transposed to [L, 16], one state after the other then walks
// the chunk in registers.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/lanes.h"
#include "core/simd.h"
#include "selective_scan/scan.h"
#include "selective_scan/selective_scan.h"

namespace spk {
namespace {

using SPK_ISA::floats;
using SPK_ISA::ints;
#if defined(__SSE2__) || defined(__aarch64__)
template <>
struct Bits<floats> {
  using type = ints;
};
#endif
template <>
SPK_HD floats at_least(floats x, floats low) {
  return SPK_ISA::max_(x, low);
}
template <>
SPK_HD floats at_most(floats x, floats high) {
  return SPK_ISA::min_(x, high);
}

}  // namespace

namespace SPK_ISA {
namespace {

#define SPK_NOINLINE __attribute__((noinline))

constexpr int kChunk = 64;  // steps of a chunk
constexpr int kLanes = kScanLanes;
constexpr int kStates = 4;  // states that forward carries through a chunk at once

// ---- rows, as float or double whatever lies in memory

template <class A>
void load_any(A* d, const void* p, DType dtype, int64_t at, int n) {
  switch (dtype) {
    case DType::bf16: return load_row(reinterpret_cast<float*>(d), static_cast<const bf16*>(p) + at, n);
    case DType::f16: return load_row(reinterpret_cast<float*>(d), static_cast<const f16*>(p) + at, n);
    default: return load_row(d, static_cast<const A*>(p) + at, n);
  }
}
template <class A>
void store_any(void* p, const A* s, DType dtype, int64_t at, int n) {
  switch (dtype) {
    case DType::bf16: return store_row(static_cast<bf16*>(p) + at, reinterpret_cast<const float*>(s), n);
    case DType::f16: return store_row(static_cast<f16*>(p) + at, reinterpret_cast<const float*>(s), n);
    default: return store_row(static_cast<A*>(p) + at, s, n);
  }
}

template <class A>
SPK_NOINLINE void step_row(A* __restrict__ dt, const A* __restrict__ delta, A bias, bool soft, int n) {
  if (soft)
    for (int l = 0; l < n; ++l) dt[l] = softplus(delta[l] + bias);
  else
    for (int l = 0; l < n; ++l) dt[l] = delta[l] + bias;
}
template <class A>
SPK_NOINLINE void silu_row(A* __restrict__ d, const A* __restrict__ z, int n) {
  for (int l = 0; l < n; ++l) d[l] = silu(z[l]);
}
template <class A>
SPK_NOINLINE void silu_slope_row(A* __restrict__ d, const A* __restrict__ z, int n) {
  for (int l = 0; l < n; ++l) d[l] = silu_slope(z[l]);
}
template <class A>
SPK_NOINLINE void softplus_slope_row(A* __restrict__ d, const A* __restrict__ delta, A bias, int n) {
  for (int l = 0; l < n; ++l) d[l] *= softplus_slope(delta[l] + bias);
}
template <class A>
SPK_NOINLINE void multiply_row(A* d, const A* a, const A* b, int n) {
#pragma GCC ivdep
  for (int l = 0; l < n; ++l) d[l] = a[l] * b[l];
}
template <class A>
SPK_NOINLINE void add_multiple(A* __restrict__ d, A factor, const A* __restrict__ a, int n) {
  for (int l = 0; l < n; ++l) d[l] += factor * a[l];
}
template <class A>
double sum_row(const A* s, int n) {
  constexpr int kSums = 16;  // their number, not the vector width, fixes the order
  A sum[kSums] = {};
  int l = 0;
  for (; l + kSums <= n; l += kSums)
    for (int k = 0; k < kSums; ++k) sum[k] += s[l + k];
  for (int k = 0; l < n; ++l, ++k) sum[k] += s[l];
  double total = 0;
  for (int k = 0; k < kSums; ++k) total += sum[k];
  return total;
}

template <class A>
using Rows = A[kLanes][kChunk];
template <class A>
using Columns = A[kChunk][kLanes];

template <class A>
void to_columns(Columns<A>& d, const Rows<A>& s, int n) {
  for (int l = 0; l < n; l += 16) transpose16(d[l], kLanes, &s[0][l], kChunk);
}
template <class A>
void to_rows(Rows<A>& d, const Columns<A>& s, int n) {
  for (int l = 0; l < n; l += 16) transpose16(&d[0][l], kChunk, s[l], kLanes);
}

// ---- a block: up to 16 channels [c, c + m) of batch b and group g

template <class A>
struct Block {
  const SelectiveScan* p;
  int64_t b, g, c;
  int m;
  A *rate, *h;  // [S, 16]: decay_rate of A, and the states
  A *Bs, *Cs;   // [S, kChunk]
  Rows<A> u, delta, dt, y, z, tmp;
  Columns<A> dt_columns, du_columns, y_columns;

  void at(int64_t b_, int64_t g_, int64_t block) {
    const int64_t channels = p->C / p->G, first = block * kLanes;
    b = b_, g = g_, c = g * channels + first;
    m = int(channels - first < kLanes ? channels - first : kLanes);
    const A* per_channel = static_cast<const A*>(p->A) + c * p->S;
    for (int64_t s = 0; s < p->S; ++s)
      for (int i = 0; i < kLanes; ++i) rate[s * kLanes + i] = i < m ? decay_rate(per_channel[i * p->S + s]) : A(0);
  }
  // Numbers of each state, [B, C, S] in memory, to and from [S, 16]; null: zero.
  void load_states(A* d, const void* from) const {
    const A* states = static_cast<const A*>(from) + (b * p->C + c) * p->S;
    for (int64_t s = 0; s < p->S; ++s)
      for (int i = 0; i < kLanes; ++i) d[s * kLanes + i] = from && i < m ? states[i * p->S + s] : A(0);
  }
  template <class X>
  void store_states(X* to, const X* s) const {
    X* states = to + (b * p->C + c) * p->S;
    for (int i = 0; i < m; ++i)
      for (int64_t k = 0; k < p->S; ++k) states[i * p->S + k] = s[k * kLanes + i];
  }

  void load_rows(Rows<A>& d, const ScanRows& rows, int64_t l, int n) const {
    for (int i = 0; i < m; ++i) load_any(d[i], rows.data, p->dtype, b * rows.batch + (c + i) * rows.row + l, n);
    for (int i = m; i < kLanes; ++i) memset(d[i], 0, n * sizeof(A));  // channels that are not there add nothing to sums
  }
  void store_rows(void* to, const Rows<A>& s, int64_t l, int n) const {
    for (int i = 0; i < m; ++i) store_any(to, s[i], p->dtype, (b * p->C + c + i) * p->L + l, n);
  }
  void load_matrix(A* d, const ScanMatrix& matrix, int64_t l, int n) const {
    for (int64_t s = 0; s < p->S; ++s)
      load_any(d + s * kChunk, matrix.data, p->dtype, b * matrix.batch + g * matrix.group + s * matrix.row + l, n);
  }
  A bias(int i) const { return p->bias ? static_cast<const A*>(p->bias)[c + i] : A(0); }
  A skip(int i) const { return p->D ? static_cast<const A*>(p->D)[c + i] : A(0); }

  // What the states of the n steps from l on follow from.
  void load_chunk(int64_t l, int n) {
    load_rows(u, p->u, l, n);
    load_rows(delta, p->delta, l, n);
    for (int i = 0; i < m; ++i) step_row(dt[i], delta[i], bias(i), p->softplus, n);
    for (int i = 0; i < kLanes; ++i) multiply_row(tmp[i], dt[i], u[i], n);
    to_columns(dt_columns, dt, n);
    to_columns(du_columns, tmp, n);
    load_matrix(Bs, p->Bs, l, n);
  }
  // y before the gate, from its columns.
  void finish_y(int n) {
    to_rows(y, y_columns, n);
    if (p->D)
      for (int i = 0; i < m; ++i) add_multiple(y[i], skip(i), u[i], n);
  }
};

// R states through n steps of 16 channels, in registers; with OUT they add their part of y.
template <bool OUT, int R, class A>
SPK_NOINLINE void walk(const Columns<A>& dt, const Columns<A>& du, const A* Bs, const A* Cs, const A* rate, A* h, Columns<A>& y,
                       int n) {
  using V = typename Vector<A>::type;
  for (int i = 0; i < kLanes; i += Vector<A>::W) {
    V state[R], rates[R];
    for (int r = 0; r < R; ++r) {
      state[r] = load<V>(h + r * kLanes + i);
      rates[r] = load<V>(rate + r * kLanes + i);
    }
    for (int l = 0; l < n; ++l) {
      const V t = load<V>(&dt[l][i]), x = load<V>(&du[l][i]);
      V sum{};
      if (OUT) sum = load<V>(&y[l][i]);
      for (int r = 0; r < R; ++r) {
        state[r] = scan_step(state[r], decay(t, rates[r]), x * Bs[r * kChunk + l]);
        if (OUT) sum = sum + state[r] * Cs[r * kChunk + l];
      }
      if (OUT) store(&y[l][i], sum);
    }
    for (int r = 0; r < R; ++r) store(h + r * kLanes + i, state[r]);
  }
}
template <bool OUT, class A>
void walk_all(Block<A>& k, int n) {
  int64_t s = 0;
  const auto run = [&](auto f) {
    f(k.dt_columns, k.du_columns, k.Bs + s * kChunk, k.Cs + s * kChunk, k.rate + s * kLanes, k.h + s * kLanes, k.y_columns, n);
  };
  for (; s + kStates <= k.p->S; s += kStates) run(walk<OUT, kStates, A>);
  for (; s < k.p->S; ++s) run(walk<OUT, 1, A>);
}

int length(int64_t left) { return left < kChunk ? int(left) : kChunk; }
size_t padded(size_t bytes) { return (bytes + 63) / 64 * 64; }

// A W with its Block in it, all zero, and `numbers` of A for each state behind it.
template <class W, class A>
W* allocate(const SelectiveScan& p, size_t numbers) {
  const size_t own = size_t(p.S) * (2 * kLanes + 2 * kChunk), bytes = padded(sizeof(W)) + padded((own + numbers) * sizeof(A));
  char* const memory = static_cast<char*>(aligned_alloc(64, bytes));
  if (!memory) return nullptr;
  memset(memory, 0, bytes);
  W* const w = reinterpret_cast<W*>(memory);
  w->block.p = &p;
  w->block.rate = reinterpret_cast<A*>(memory + padded(sizeof(W)));
  w->block.h = w->block.rate + p.S * kLanes;
  w->block.Bs = w->block.h + p.S * kLanes;
  w->block.Cs = w->block.Bs + p.S * kChunk;
  return w;
}

template <class A>
struct Forward {
  Block<A> block;
};

template <class A>
int forward(const SelectiveScanFwd& q, int64_t begin, int64_t end) {
  const SelectiveScan& p = q.in;
  Forward<A>* const w = allocate<Forward<A>, A>(p, 0);
  if (!w) return kOutOfMemory;
  Block<A>& k = w->block;
  const int64_t blocks = scan_blocks(p);
  for (int64_t item = begin; item < end; ++item) {
    k.at(item / blocks / p.G, item / blocks % p.G, item % blocks);
    k.load_states(k.h, p.h_init);
    for (int64_t l = 0; l < p.L; l += kChunk) {
      const int n = length(p.L - l);
      k.load_chunk(l, n);
      k.load_matrix(k.Cs, p.Cs, l, n);
      memset(k.y_columns, 0, sizeof(k.y_columns));
      walk_all<true>(k, n);
      k.finish_y(n);
      if (p.z.data) {
        k.load_rows(k.z, p.z, l, n);
        for (int i = 0; i < k.m; ++i) {
          silu_row(k.tmp[i], k.z[i], n);
          multiply_row(k.y[i], k.y[i], k.tmp[i], n);
        }
      }
      k.store_rows(q.y, k.y, l, n);
    }
    k.store_states(static_cast<A*>(q.h_last), k.h);
  }
  free(w);
  return kOk;
}

// ---- backward

template <class A>
struct Backward {
  Block<A> block;
  A *rate, *carry, *starts;  // [S, 16]: A itself, the gradient that reaches the states from later on; [chunks, S, 16]
  double* g_A;               // [S, 16]
  double g_D[kLanes], g_bias[kLanes];
  Rows<A> g, g_y, g_du, g_dt;  // g: of the gated y; g_dt: what comes through the decays
  Columns<A> g_y_columns, g_du_columns, g_dt_columns, a, to_B, to_C;
  A h[kChunk + 1][kLanes];
  A sums[kChunk];
};

// One state through the n steps of a chunk and back; A and its derivatives as in scan.h. With OUT y is computed again.
template <bool OUT, class A>
SPK_NOINLINE void back(Backward<A>& w, int64_t s, int n) {
  using V = typename Vector<A>::type;
  Block<A>& k = w.block;
  const A *Bs = k.Bs + s * kChunk, *Cs = k.Cs + s * kChunk;
  for (int i = 0; i < kLanes; i += Vector<A>::W) {
    const int64_t at = s * kLanes + i;
    const V rate = load<V>(k.rate + at), A_ = load<V>(w.rate + at);
    V h = load<V>(k.h + at), g_h = load<V>(w.carry + at), g_A{};
    store(&w.h[0][i], h);
    for (int l = 0; l < n; ++l) {
      const V a = decay(load<V>(&k.dt_columns[l][i]), rate);
      h = scan_step(h, a, load<V>(&k.du_columns[l][i]) * Bs[l]);
      store(&w.a[l][i], a);
      store(&w.h[l + 1][i], h);
      if (OUT) store(&k.y_columns[l][i], load<V>(&k.y_columns[l][i]) + h * Cs[l]);
    }
    for (int l = n - 1; l >= 0; --l) {
      const V g_y = load<V>(&w.g_y_columns[l][i]);
      const V g = g_h + g_y * Cs[l];  // of h[l]
      store(&w.to_C[l][i], g_y * load<V>(&w.h[l + 1][i]));
      store(&w.to_B[l][i], g * load<V>(&k.du_columns[l][i]));
      store(&w.g_du_columns[l][i], load<V>(&w.g_du_columns[l][i]) + g * Bs[l]);
      g_h = g * load<V>(&w.a[l][i]);
      const V g_exponent = g_h * load<V>(&w.h[l][i]);
      store(&w.g_dt_columns[l][i], load<V>(&w.g_dt_columns[l][i]) + g_exponent * A_);
      g_A = g_A + g_exponent * load<V>(&k.dt_columns[l][i]);
    }
    store(w.carry + at, g_h);
    A sum[Vector<A>::W];
    store(sum, g_A);
    for (int j = 0; j < Vector<A>::W; ++j) w.g_A[at + j] += sum[j];
  }
}

// The sums of `from` over its 16 channels, to a row of the part's gradient: written by its first block, then added to.
template <class A>
void sum_channels(A* d, const Columns<A>& from, A* sums, bool first, int n) {
  for (int l = 0; l < n; l += 16) sum16(sums + l, from[l]);
  if (first)
    memcpy(d, sums, n * sizeof(A));
  else
    add_multiple(d, A(1), sums, n);
}

template <class A>
int backward(const SelectiveScanBwd& q, int64_t begin, int64_t end) {
  const SelectiveScan& p = q.in;
  const int64_t blocks = scan_blocks(p), chunks = (p.L + kChunk - 1) / kChunk, per_state = p.S * kLanes;
  Backward<A>* const w = allocate<Backward<A>, A>(p, per_state * (2 + chunks + sizeof(double) / sizeof(A)));
  if (!w) return kOutOfMemory;
  Block<A>& k = w->block;
  w->rate = k.Cs + p.S * kChunk;
  w->g_A = reinterpret_cast<double*>(w->rate + per_state);
  w->carry = reinterpret_cast<A*>(w->g_A + per_state);
  w->starts = w->carry + per_state;

  for (int64_t item = begin; item < end; ++item) {
    const int64_t part = item % q.parts, group = item / q.parts;
    const int64_t first = part * blocks / q.parts, last = (part + 1) * blocks / q.parts;
    A* const g_Bs = static_cast<A*>(q.g_Bs) + item * p.S * p.L;
    A* const g_Cs = static_cast<A*>(q.g_Cs) + item * p.S * p.L;
    for (int64_t block = first; block < last; ++block) {
      k.at(group / p.G, group % p.G, block);
      for (int64_t s = 0; s < p.S; ++s)
        for (int i = 0; i < kLanes; ++i) w->rate[s * kLanes + i] = i < k.m ? static_cast<const A*>(p.A)[(k.c + i) * p.S + s] : A(0);
      k.load_states(k.h, p.h_init);
      k.load_states(w->carry, q.g_h_last);
      memset(w->g_A, 0, per_state * sizeof(double));
      memset(w->g_D, 0, sizeof(w->g_D));
      memset(w->g_bias, 0, sizeof(w->g_bias));
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        memcpy(w->starts + chunk * per_state, k.h, per_state * sizeof(A));
        if (chunk + 1 == chunks) break;
        k.load_chunk(chunk * kChunk, kChunk);
        walk_all<false>(k, kChunk);
      }

      for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
        const int64_t l = chunk * kChunk;
        const int n = length(p.L - l);
        memcpy(k.h, w->starts + chunk * per_state, per_state * sizeof(A));
        k.load_chunk(l, n);
        k.load_matrix(k.Cs, p.Cs, l, n);
        if (q.g_y.data) k.load_rows(w->g, q.g_y, l, n);
        if (p.z.data) {
          k.load_rows(k.z, p.z, l, n);
          for (int i = 0; i < k.m; ++i) silu_row(k.tmp[i], k.z[i], n);
          for (int i = 0; i < kLanes; ++i) multiply_row(w->g_y[i], w->g[i], k.tmp[i], n);
        } else {
          memcpy(w->g_y, w->g, sizeof(w->g));
        }
        to_columns(w->g_y_columns, w->g_y, n);
        memset(k.y_columns, 0, sizeof(k.y_columns));
        memset(w->g_du_columns, 0, sizeof(w->g_du_columns));
        memset(w->g_dt_columns, 0, sizeof(w->g_dt_columns));
        for (int64_t s = 0; s < p.S; ++s) {
          if (p.z.data)
            back<true>(*w, s, n);
          else
            back<false>(*w, s, n);
          sum_channels(g_Bs + s * p.L + l, w->to_B, w->sums, block == first, n);
          sum_channels(g_Cs + s * p.L + l, w->to_C, w->sums, block == first, n);
        }
        to_rows(w->g_du, w->g_du_columns, n);
        to_rows(w->g_dt, w->g_dt_columns, n);
        if (p.z.data) k.finish_y(n);
        for (int i = 0; i < k.m; ++i) {
          if (p.z.data) {
            silu_slope_row(k.tmp[i], k.z[i], n);
            multiply_row(k.tmp[i], k.tmp[i], k.y[i], n);
            multiply_row(k.y[i], k.tmp[i], w->g[i], n);  // g_z
          }
          multiply_row(k.tmp[i], w->g_du[i], k.u[i], n);
          add_multiple(w->g_dt[i], A(1), k.tmp[i], n);
          if (p.softplus) softplus_slope_row(w->g_dt[i], k.delta[i], k.bias(i), n);
          w->g_bias[i] += sum_row(w->g_dt[i], n);
          multiply_row(k.tmp[i], w->g_y[i], k.u[i], n);
          w->g_D[i] += sum_row(k.tmp[i], n);
          multiply_row(w->g_du[i], w->g_du[i], k.dt[i], n);
          if (p.D) add_multiple(w->g_du[i], k.skip(i), w->g_y[i], n);
        }
        k.store_rows(q.g_u, w->g_du, l, n);
        k.store_rows(q.g_delta, w->g_dt, l, n);
        if (p.z.data) k.store_rows(q.g_z, k.y, l, n);
      }
      k.store_states(q.g_A, w->g_A);
      if (q.g_h_init) k.store_states(static_cast<A*>(q.g_h_init), w->carry);
      for (int i = 0; i < k.m; ++i) {
        if (q.g_D) q.g_D[k.b * p.C + k.c + i] = w->g_D[i];
        if (q.g_bias) q.g_bias[k.b * p.C + k.c + i] = w->g_bias[i];
      }
    }
  }
  free(w);
  return kOk;
}

// ---- sums over parts

// Elements [begin, end) of out, a stretch of one `o` at a time.
template <class A>
int reduce(const SelectiveScanReduce& p, int64_t begin, int64_t end) {
  constexpr int kBlock = 256;
  A sum[kBlock];
  for (int64_t at = begin; at < end;) {
    const int64_t i = at % p.inner, left = p.inner - i < end - at ? p.inner - i : end - at;
    const int n = left < kBlock ? int(left) : kBlock;
    const A* in = static_cast<const A*>(p.in) + at / p.inner * p.parts * p.inner + i;
    load_row(sum, in, n);
    for (int64_t j = 1; j < p.parts; ++j) add_multiple(sum, A(1), in + j * p.inner, n);
    if (p.from == DType::f64 && p.to == DType::f32) {
      for (int j = 0; j < n; ++j) static_cast<float*>(p.out)[at + j] = float(sum[j]);
    } else {
      store_any(p.out, sum, p.to, at, n);
    }
    at += n;
  }
  return kOk;
}

}  // namespace

int selective_scan_fwd(const SelectiveScanFwd& p, int64_t begin, int64_t end) {
  return p.in.dtype == DType::f64 ? forward<double>(p, begin, end) : forward<float>(p, begin, end);
}
int selective_scan_bwd(const SelectiveScanBwd& p, int64_t begin, int64_t end) {
  return p.in.dtype == DType::f64 ? backward<double>(p, begin, end) : backward<float>(p, begin, end);
}
int selective_scan_reduce(const SelectiveScanReduce& p, int64_t begin, int64_t end) {
  return p.from == DType::f64 ? reduce<double>(p, begin, end) : reduce<float>(p, begin, end);
}

}  // namespace SPK_ISA

#ifdef SPK_DISPATCH
SelectiveScanFwdFn* selective_scan_fwd_cpu() {
  static SelectiveScanFwdFn* const f = SPK_PICK(selective_scan_fwd);
  return f;
}
SelectiveScanBwdFn* selective_scan_bwd_cpu() {
  static SelectiveScanBwdFn* const f = SPK_PICK(selective_scan_bwd);
  return f;
}
SelectiveScanReduceFn* selective_scan_reduce_cpu() {
  static SelectiveScanReduceFn* const f = SPK_PICK(selective_scan_reduce);
  return f;
}
#endif

}  // namespace spk
