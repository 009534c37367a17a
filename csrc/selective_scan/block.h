// What both directions of selective_scan on the CPU work with: a block of 16 channels and a chunk of its steps, read, laid
// out as [steps, 16] and written.
#pragma once
#include <stdlib.h>
#include <string.h>

#include "core/simd.h"
#include "selective_scan/lanes.h"
#include "selective_scan/selective_scan.h"

namespace spk {
namespace SPK_ISA {
namespace {

#define SPK_NOINLINE __attribute__((noinline))

constexpr int kChunk = 64;  // steps of a chunk at most
// Short where states make many passes over a chunk, which should stay in the innermost cache; else long, as rows lie.
int chunk_of(const SelectiveScan& p) { return p.S < 4 ? kChunk : 32; }
constexpr int kLanes = kScanLanes;
constexpr int kStates = 4, kStatesBack = 2;  // states carried through a chunk at once
constexpr int kKept = 3200 / kChunk;         // chunks whose inputs backward keeps on its way through: they fit the second cache

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
bool is_half(DType t) { return t == DType::bf16 || t == DType::f16; }

// 16 far apart rows whose next lines are fetched while others are worked on: no hardware foresees them all. To the second
// cache: into the first they would wait in line with what is read there.
struct Ahead {
  uintptr_t first = 0;       // 0: none
  int64_t step = 0;          // bytes between rows
  void fetch(int k) const {  // the k-th line, the rows taking turns
    if (first) __builtin_prefetch(reinterpret_cast<const void*>(first + k % kLanes * step + k / kLanes * 64), 0, 2);
  }
};

// ---- numbers of a chunk, [steps, 16]

template <class A>
using Columns = A[kChunk + 16][kLanes];  // 16 more, for short chunks of several not to meet in the same cache sets

// d = f of the vectors of n steps, each argument being Columns, or [16] where it is the same at every step.
template <class V, class A>
V pick(const Columns<A>& x, int l, int i) {
  return load<V>(&x[l][i]);
}
template <class V, class A>
V pick(const A (&x)[kLanes], int, int i) {
  return load<V>(x + i);
}
template <class A, class F, class... X>
void each(Columns<A>& d, int n, F f, const X&... x) {
  using V = typename Vector<A>::type;
  for (int l = 0; l < n; ++l)
    for (int i = 0; i < kLanes; i += Vector<A>::W) store(&d[l][i], f(pick<V>(x, l, i)...));
}
constexpr auto product = [](auto a, auto b) { return a * b; };
constexpr auto sum = [](auto a, auto b) { return a + b; };

// The functions of scan.h, for the vectoriser.
template <class A>
SPK_NOINLINE void silu_all(A* __restrict__ d, const A* __restrict__ x, int n) {
  for (int i = 0; i < n; ++i) d[i] = silu(x[i]);
}
template <class A>
SPK_NOINLINE void silu_slope_all(A* __restrict__ d, const A* __restrict__ x, int n) {
  for (int i = 0; i < n; ++i) d[i] = silu_slope(x[i]);
}

constexpr int kSum = 8;  // terms that are added up in a row, over states; their sums then, and over steps, in double

// ---- a block: up to 16 channels [c, c + m) of batch b and group g

template <class A>
struct Matrix {  // S rows of a chunk
  const A* data;
  int64_t step;
  const A* row(int64_t s) const { return data + s * step; }
};

// What the steps of a chunk follow from. slope: of dt over delta.
template <class A>
struct alignas(64) Inputs {
  Columns<A> u, dt, slope;
  bool bounded;  // the decays
};

template <class A>
struct Block {
  const SelectiveScan* p;
  int64_t b, g, c;
  int m;
  A *rate, *h, *B_tmp, *C_tmp;  // [S, 16]: decay_rate of A, and the states; [S, kChunk]
  Matrix<A> Bs, Cs;
  alignas(64) A bias[kLanes], skip[kLanes], rows[kLanes][kChunk];
  Columns<A> y, z, tmp;
  Inputs<A>* in;
  A largest_rate;

  void at(int64_t b_, int64_t g_, int64_t block) {
    const int64_t channels = p->C / p->G, first = block * kLanes;
    b = b_, g = g_, c = g * channels + first;
    m = int(channels - first < kLanes ? channels - first : kLanes);
    load_parameter(bias, p->bias);
    load_parameter(skip, p->D);
  }
  void load_parameter(A* d, const void* from) const {  // [C]
    for (int i = 0; i < kLanes; ++i) d[i] = from && i < m ? static_cast<const A*>(from)[c + i] : A(0);
  }
  // Numbers of each state, [C, S] in memory from channel `first` on, to and from [S, 16]; null: zero.
  void load_states(A* d, const void* from, int64_t first) const {
    const A* states = static_cast<const A*>(from) + first * p->S;
    for (int64_t s = 0; s < p->S; ++s)
      for (int i = 0; i < kLanes; ++i) d[s * kLanes + i] = from && i < m ? states[i * p->S + s] : A(0);
  }
  template <class X>
  void store_states(X* to, const X* s) const {
    X* states = to + channel() * p->S;
    for (int i = 0; i < m; ++i)
      for (int64_t k = 0; k < p->S; ++k) states[i * p->S + k] = s[k * kLanes + i];
  }
  int64_t channel() const { return b * p->C + c; }  // of [B, C, ...]

  // Whether rows can be read and written where they lie: whole tiles of 16 steps in the type of the kernel.
  bool in_place(int n) const { return n % 16 == 0 && m == kLanes && !is_half(p->dtype); }

  // The rows of the block's channels from step l on, or with l = L of the next block's.
  Ahead ahead(const ScanRows& rows, int64_t l) const {
    if (!rows.data || m < kLanes) return {};
    const int64_t size = is_half(p->dtype) ? 2 : sizeof(A), at = l < p->L ? c * rows.row + l : (c + kLanes) * rows.row;
    return {reinterpret_cast<uintptr_t>(rows.data) + uintptr_t((b * rows.batch + at) * size), rows.row * size};
  }

  SPK_NOINLINE void load_columns(Columns<A>& d, const ScanRows& from, int64_t l, int n) {
    const int64_t at = b * from.batch + c * from.row + l;
    if (in_place(n)) {
      const A* const first = static_cast<const A*>(from.data) + at;
      const int64_t step = from.row;
      for (int j = 0; j < n; j += 16) transpose16<A>([&](int k) { return d[j + k]; }, [&](int i) { return first + i * step + j; });
      return;
    }
    for (int i = 0; i < kLanes; ++i)
      if (i < m)
        load_any(rows[i], from.data, p->dtype, at + i * from.row, n);
      else
        memset(rows[i], 0, sizeof(rows[i]));
    for (int j = 0; j < n; j += 16) transpose16<A>([&](int k) { return d[j + k]; }, [&](int i) { return rows[i] + j; });
  }
  SPK_NOINLINE void store_columns(void* to, const Columns<A>& s, int64_t l, int n) {
    const int64_t at = channel() * p->L + l, step = p->L;
    if (in_place(n)) {
      A* const first = static_cast<A*>(to) + at;
      return put_rows(first, s, n, step, p->B * p->C * step * int64_t(sizeof(A)));
    }
    for (int j = 0; j < n; j += 16) transpose16<A>([&](int i) { return rows[i] + j; }, [&](int k) { return s[j + k]; });
    for (int i = 0; i < m; ++i) store_any(to, rows[i], p->dtype, at + i * step, n);
  }
  Matrix<A> load_matrix(A* room, const ScanMatrix& from, int64_t l, int n) const {
    const int64_t at = b * from.batch + g * from.group + l;
    if (!is_half(p->dtype)) return {static_cast<const A*>(from.data) + at, from.row};
    for (int64_t s = 0; s < p->S; ++s) load_any(room + s * kChunk, from.data, p->dtype, at + s * from.row, n);
    return {room, kChunk};
  }

  void load_rates() {
    load_states(rate, p->A, c);
    largest_rate = 0;
    for (int64_t i = 0; i < p->S * kLanes; ++i) {
      rate[i] = decay_rate(rate[i]);
      largest_rate = abs_(rate[i]) > largest_rate ? abs_(rate[i]) : largest_rate;
    }
  }
  // dt from delta, in place, its slope, and whether decays are bounded (NaN makes NaN either way).
  template <bool SOFTPLUS, bool SLOPE>
  SPK_NOINLINE void steps(int n, Ahead u, Ahead delta) {
    const auto ahead = [&](int l) { u.fetch(l), delta.fetch(l); };
    in->bounded = step_sizes<SOFTPLUS, SLOPE>(in->dt[0], in->slope[0], bias, n, ahead) * largest_rate < kBound;
  }

  // What the n steps from l on follow from, while rows of u and delta to come are fetched.
  template <bool SLOPE>
  void load_chunk(int64_t l, int n, Ahead next_u, Ahead next_delta) {
    load_columns(in->u, p->u, l, n);
    load_columns(in->dt, p->delta, l, n);
    if (p->softplus)
      steps<true, SLOPE>(n, next_u, next_delta);
    else
      steps<false, SLOPE>(n, next_u, next_delta);
  }
  void load_matrices(int64_t l, int n) {
    Bs = load_matrix(B_tmp, p->Bs, l, n);
    Cs = load_matrix(C_tmp, p->Cs, l, n);
  }
};

template <Out OUT, bool BOUNDED, int R, class A>
SPK_NOINLINE void walk_chunk(Block<A>& k, int64_t s, int n) {
  const A *Bs[R], *Cs[R];
  for (int r = 0; r < R; ++r) Bs[r] = k.Bs.row(s + r), Cs[r] = k.Cs.row(s + r);
  A *const h = k.h + s * kLanes, *const rates = k.rate + s * kLanes;
  const auto step = [](int l) { return l; };
  walk<OUT, BOUNDED, R>(h, rates, k.in->dt[0], k.in->u[0], k.y[0], k.skip, Bs, Cs, n, step, step);
}
template <bool OUT, bool BOUNDED, class A>
void walk_all(Block<A>& k, int n) {
  constexpr Out first = OUT ? Out::first : Out::none, then = OUT ? Out::add : Out::none;
  int64_t s = 0;
  for (; s + kStates <= k.p->S; s += kStates)
    s ? walk_chunk<then, BOUNDED, kStates>(k, s, n) : walk_chunk<first, BOUNDED, kStates>(k, s, n);
  for (; s < k.p->S; ++s) s ? walk_chunk<then, BOUNDED, 1>(k, s, n) : walk_chunk<first, BOUNDED, 1>(k, s, n);
  if (OUT && s == 0) each(k.y, n, product, k.in->u, k.skip);
}
// The states through a chunk, with OUT to y.
template <bool OUT, class A>
void walk_all(Block<A>& k, int n) {
  k.in->bounded ? walk_all<OUT, true>(k, n) : walk_all<OUT, false>(k, n);
}

size_t padded(size_t bytes) { return (bytes + 63) / 64 * 64; }

// A W with its Block in it, all zero, and room for `more` numbers behind it, which begins where Block's own ends.
template <class A, class W>
A* allocate(W*& w, const SelectiveScan& p, size_t more) {
  const size_t own = size_t(p.S) * 2 * (kLanes + kChunk), bytes = padded(sizeof(W)) + padded((own + more) * sizeof(A));
  char* const memory = static_cast<char*>(aligned_alloc(64, bytes));
  w = reinterpret_cast<W*>(memory);
  if (!memory) return nullptr;
  memset(memory, 0, bytes);
  Block<A>& k = w->block;
  k.p = &p;
  k.rate = reinterpret_cast<A*>(memory + padded(sizeof(W)));
  k.h = k.rate + p.S * kLanes;
  k.B_tmp = k.h + p.S * kLanes;
  k.C_tmp = k.B_tmp + p.S * kChunk;
  return k.C_tmp + p.S * kChunk;
}

}  // namespace
}  // namespace SPK_ISA
}  // namespace spk
