// selective_scan on the CPU; compiled once per instruction set (core/dispatch.h). 16 channels of a group go through the
// sequence side by side, a chunk at a time: their rows are transposed to [L, 16], one state after the other then walks
// the chunk in registers.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/simd.h"
#include "selective_scan/lanes.h"
#include "selective_scan/selective_scan.h"

namespace spk {
namespace SPK_ISA {
namespace {

#define SPK_NOINLINE __attribute__((noinline))

constexpr int kChunk = 128;  // steps of a chunk at most
// Short where states make many passes over a chunk, which should stay in the innermost cache; else long, as rows lie.
int chunk_of(const SelectiveScan& p) { return p.S < 4 ? kChunk : 32; }
constexpr int kAhead = 32;  // steps to prefetch
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
bool is_half(DType t) { return t == DType::bf16 || t == DType::f16; }

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

// Long sums round less in two stages: over kSum states, then over these; over kSum steps, then in double.
constexpr int kSum = 8;
// Adds n rows to total, one after the other.
template <class A>
SPK_NOINLINE void add_rows(double* __restrict__ total, const A (*rows)[kLanes], int n) {
  for (int r = 0; r < n; ++r)
    for (int i = 0; i < kLanes; ++i) total[i] += rows[r][i];
}
// Adds the sums over n steps of x y to total.
template <class A>
void add_sums(double* total, const Columns<A>& x, const Columns<A>& y, int n) {
  using V = typename Vector<A>::type;
  A rows[kChunk / kSum][kLanes];
  for (int i = 0; i < kLanes; i += Vector<A>::W) {
    V sums{};
    for (int l = 0; l < n; ++l) {
      sums = sums + load<V>(&x[l][i]) * load<V>(&y[l][i]);
      if (l % kSum == kSum - 1 || l + 1 == n) store(&rows[l / kSum][i], sums), sums = V{};
    }
  }
  add_rows(total, rows, (n + kSum - 1) / kSum);
}

// ---- a block: up to 16 channels [c, c + m) of batch b and group g

template <class A>
struct Matrix {  // S rows of a chunk
  const A* data;
  int64_t step;
  const A* row(int64_t s) const { return data + s * step; }
};

template <class A>
struct Block {
  const SelectiveScan* p;
  int64_t b, g, c;
  int m;
  A *rate, *h, *B_tmp, *C_tmp;  // [S, 16]: decay_rate of A, and the states; [S, kChunk]
  Matrix<A> Bs, Cs;
  alignas(64) A bias[kLanes], skip[kLanes], rows[kLanes][kChunk];
  Columns<A> u, delta, dt, du, y, z, slope, tmp;  // slope: of dt over delta
  A largest_rate;
  bool bounded;  // the decays of this chunk

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

  SPK_NOINLINE void load_columns(Columns<A>& d, const ScanRows& from, int64_t l, int n) {
    const int64_t at = b * from.batch + c * from.row + l;
    if (in_place(n)) {
      const A* const first = static_cast<const A*>(from.data) + at;
      const int64_t step = from.row;
      for (int j = 0; j < n; j += 16) {
        for (int i = 0; i < kLanes; ++i)  // 16 far apart rows: no hardware foresees them all
          __builtin_prefetch(first + i * step + (j + kAhead));
        transpose16<A>([&](int k) { return d[j + k]; }, [&](int i) { return first + i * step + j; });
      }
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
      for (int j = 0; j < n; j += 16) {
        for (int i = 0; i < kLanes; ++i) __builtin_prefetch(first + i * step + (j + kAhead), 1);
        transpose16<A>([&](int i) { return first + i * step + j; }, [&](int k) { return s[j + k]; });
      }
      return;
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
  // dt, whether decays are bounded (NaN makes NaN either way), and what backward needs beside.
  template <bool SOFTPLUS, bool BACK>
  SPK_NOINLINE void steps(int n) {
    using P = Packed<A>;
    constexpr int W = Vector<A>::W;
    A most[W] = {}, over_all = 0;
    auto seen = load<typename Vector<A>::type>(most);
    for (int i = 0; i < n * kLanes; i += kPack<A>) {
      P x = P::load(delta[0] + i), to;
      for (int j = 0; j * W < kPack<A>; ++j) x.v[j] = x.v[j] + load<typename Vector<A>::type>(bias + j * W % kLanes);
      if (SOFTPLUS) x = softplus<BACK>(x, to);
      x.store(dt[0] + i);
      if (BACK) (x * P::load(u[0] + i)).store(du[0] + i);
      if (BACK && SOFTPLUS) to.store(slope[0] + i);
      for (int j = 0; j * W < kPack<A>; ++j) seen = largest(SOFTPLUS ? x.v[j] : magnitude(x.v[j]), seen);
    }
    store(most, seen);
    for (const A x : most) over_all = x > over_all ? x : over_all;
    bounded = over_all * largest_rate < kBound;
  }

  // What the n steps from l on follow from.
  template <bool BACK>
  void load_chunk(int64_t l, int n) {
    load_columns(u, p->u, l, n);
    load_columns(delta, p->delta, l, n);
    if (p->softplus)
      steps<true, BACK>(n);
    else
      steps<false, BACK>(n);
    Bs = load_matrix(B_tmp, p->Bs, l, n);
    Cs = load_matrix(C_tmp, p->Cs, l, n);
  }
};

template <bool OUT, bool BOUNDED, int R, class A>
SPK_NOINLINE void walk_chunk(Block<A>& k, int64_t s, int n) {
  const A *Bs[R], *Cs[R];
  for (int r = 0; r < R; ++r) Bs[r] = k.Bs.row(s + r), Cs[r] = k.Cs.row(s + r);
  A *const h = k.h + s * kLanes, *const rates = k.rate + s * kLanes;
  const auto step = [](int l) { return l; };
  walk<OUT, BOUNDED, R>(h, rates, k.dt[0], k.u[0], k.y[0], Bs, Cs, n, step, step);
}
template <bool OUT, bool BOUNDED, class A>
void walk_all(Block<A>& k, int n) {
  int64_t s = 0;
  for (; s + kStates <= k.p->S; s += kStates) walk_chunk<OUT, BOUNDED, kStates>(k, s, n);
  for (; s < k.p->S; ++s) walk_chunk<OUT, BOUNDED, 1>(k, s, n);
}
template <bool OUT, class A>
void walk_all(Block<A>& k, int n) {
  k.bounded ? walk_all<OUT, true>(k, n) : walk_all<OUT, false>(k, n);
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

template <class A>
struct Forward {
  Block<A> block;
};

template <class A>
int forward(const SelectiveScanFwd& q, int64_t begin, int64_t end) {
  const SelectiveScan& p = q.in;
  Forward<A>* w;
  if (!allocate<A>(w, p, 0)) return kOutOfMemory;
  Block<A>& k = w->block;
  const int64_t blocks = scan_blocks(p), chunk = chunk_of(p);
  for (int64_t item = begin; item < end; ++item) {
    k.at(item / blocks / p.G, item / blocks % p.G, item % blocks);
    k.load_rates();
    k.load_states(k.h, p.h_init, k.channel());
    for (int64_t l = 0; l < p.L; l += chunk) {
      const int n = int(p.L - l < chunk ? p.L - l : chunk);
      k.template load_chunk<false>(l, n);
      each(k.y, n, product, k.u, k.skip);
      walk_all<true>(k, n);
      if (p.z.data) {
        k.load_columns(k.z, p.z, l, n);
        silu_all(k.tmp[0], k.z[0], n * kLanes);
        each(k.y, n, product, k.y, k.tmp);
      }
      k.store_columns(q.y, k.y, l, n);
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
  A *A_, *carry, *starts;  // [S, 16]: A, and the gradient that reaches the states from later on; [chunks, S, 16]
  double* g_A;             // [S, 16]
  double g_D[kLanes], g_bias[kLanes];
  Columns<A> g, g_y, g_du, g_dt, part_du, part_dt, one, a, to_B, to_C;  // g: of the gated y; g_dt: what comes through the decays
  A h[kChunk + 1][kLanes];
  A sums[kChunk];
};

// One state through the n steps of a chunk and back. With OUT y is computed again.
template <bool OUT, bool BOUNDED, class A>
SPK_NOINLINE void back(Backward<A>& w, int64_t s, int n) {
  using V = typename Vector<A>::type;
  constexpr int P = 4;  // steps whose decays are computed at once
  Block<A>& k = w.block;
  A rows[kChunk / kSum][kLanes];  // of g_A, from the last on
  const int last = (n - 1) / kSum;
  const A *Bs = k.Bs.row(s), *Cs = k.Cs.row(s);
  for (int i = 0; i < kLanes; i += Vector<A>::W) {
    const int64_t at = s * kLanes + i;
    const V rate = load<V>(k.rate + at), A_ = load<V>(w.A_ + at);
    V h = load<V>(k.h + at), g_h = load<V>(w.carry + at), g_A{};
    store(&w.h[0][i], h);
    for (int l = 0; l < n; l += P) {
      Pack<V, P> a;
      for (int j = 0; j < P; ++j) a.v[j] = load<V>(&k.dt[l + j][i]) * rate;
      a = decays<BOUNDED>(a);
      for (int j = 0; j < P && l + j < n; ++j) {
        h = scan_step(h, a.v[j], load<V>(&k.du[l + j][i]) * Bs[l + j]);
        store(&w.a[l + j][i], a.v[j]);
        store(&w.h[l + j + 1][i], h);
        if (OUT) store(&k.y[l + j][i], load<V>(&k.y[l + j][i]) + h * Cs[l + j]);
      }
    }
    for (int l = n - 1; l >= 0; --l) {
      const V g_y = load<V>(&w.g_y[l][i]), before = load<V>(&w.h[l][i]);
      const V g = g_h + g_y * Cs[l];  // of h[l]
      store(&w.to_C[l][i], g_y * h);
      store(&w.to_B[l][i], g * load<V>(&k.du[l][i]));
      store(&w.part_du[l][i], load<V>(&w.part_du[l][i]) + g * Bs[l]);
      g_h = g * load<V>(&w.a[l][i]);
      const V g_exponent = g_h * before;
      store(&w.part_dt[l][i], load<V>(&w.part_dt[l][i]) + g_exponent * A_);
      g_A = g_A + g_exponent * load<V>(&k.dt[l][i]);
      if (l % kSum == 0) store(&rows[last - l / kSum][i], g_A), g_A = V{};
      h = before;
    }
    store(w.carry + at, g_h);
  }
  add_rows(w.g_A + s * kLanes, rows, last + 1);
}

// The sums of `from` over its 16 channels, to a row of the part's gradient: written by its first block, then added to.
template <class A>
void sum_channels(A* __restrict__ d, const Columns<A>& from, A* __restrict__ sums, bool first, int n) {
  for (int l = 0; l < n; l += 16) sum16(sums + l, from[l]);
  for (int l = 0; l < n; ++l) d[l] = first ? sums[l] : d[l] + sums[l];
}

template <class A>
int backward(const SelectiveScanBwd& q, int64_t begin, int64_t end) {
  const SelectiveScan& p = q.in;
  const int64_t blocks = scan_blocks(p), length = chunk_of(p), chunks = (p.L + length - 1) / length, per_state = p.S * kLanes;
  Backward<A>* w;
  A* const room = allocate<A>(w, p, per_state * (2 + chunks + sizeof(double) / sizeof(A)));
  if (!room) return kOutOfMemory;
  Block<A>& k = w->block;
  w->g_A = reinterpret_cast<double*>(room);
  w->A_ = reinterpret_cast<A*>(w->g_A + per_state);
  w->carry = w->A_ + per_state;
  w->starts = w->carry + per_state;
  for (auto& row : w->one)
    for (A& x : row) x = 1;

  for (int64_t item = begin; item < end; ++item) {
    const int64_t part = item % q.parts, group = item / q.parts;
    const int64_t first = part * blocks / q.parts, last = (part + 1) * blocks / q.parts;
    A* const g_Bs = static_cast<A*>(q.g_Bs) + item * p.S * p.L;
    A* const g_Cs = static_cast<A*>(q.g_Cs) + item * p.S * p.L;
    for (int64_t block = first; block < last; ++block) {
      k.at(group / p.G, group % p.G, block);
      k.load_states(w->A_, p.A, k.c);
      k.load_rates();
      k.load_states(k.h, p.h_init, k.channel());
      k.load_states(w->carry, q.g_h_last, k.channel());
      memset(w->g_A, 0, per_state * sizeof(double));
      memset(w->g_D, 0, sizeof(w->g_D));
      memset(w->g_bias, 0, sizeof(w->g_bias));
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        memcpy(w->starts + chunk * per_state, k.h, per_state * sizeof(A));
        if (chunk + 1 == chunks) break;
        k.template load_chunk<false>(chunk * length, int(length));
        walk_all<false>(k, int(length));
      }

      for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
        const int64_t l = chunk * length;
        const int n = int(p.L - l < length ? p.L - l : length);
        memcpy(k.h, w->starts + chunk * per_state, per_state * sizeof(A));
        k.template load_chunk<true>(l, n);
        if (q.g_y.data) k.load_columns(w->g, q.g_y, l, n);
        if (p.z.data) {
          k.load_columns(k.z, p.z, l, n);
          silu_all(k.tmp[0], k.z[0], n * kLanes);
          each(w->g_y, n, product, w->g, k.tmp);
          each(k.y, n, product, k.u, k.skip);
        } else {
          memcpy(w->g_y, w->g, sizeof(w->g));
        }
        memset(w->g_du, 0, sizeof(w->g_du));
        memset(w->g_dt, 0, sizeof(w->g_dt));
        for (int64_t s = 0; s < p.S; ++s) {
          if (s % kSum == 0) {
            memset(w->part_du, 0, sizeof(w->part_du));
            memset(w->part_dt, 0, sizeof(w->part_dt));
          }
          if (p.z.data)
            k.bounded ? back<true, true>(*w, s, n) : back<true, false>(*w, s, n);
          else
            k.bounded ? back<false, true>(*w, s, n) : back<false, false>(*w, s, n);
          sum_channels(g_Bs + s * p.L + l, w->to_B, w->sums, block == first, n);
          sum_channels(g_Cs + s * p.L + l, w->to_C, w->sums, block == first, n);
          if (s % kSum == kSum - 1 || s + 1 == p.S) {
            each(w->g_du, n, sum, w->g_du, w->part_du);
            each(w->g_dt, n, sum, w->g_dt, w->part_dt);
          }
        }
        each(w->g_dt, n, [](auto g_dt, auto g_du, auto u) { return g_dt + g_du * u; }, w->g_dt, w->g_du, k.u);
        if (p.softplus) each(w->g_dt, n, product, w->g_dt, k.slope);
        const auto to_u = [](auto g_du, auto dt, auto g_y, auto skip) { return g_du * dt + g_y * skip; };
        each(w->g_du, n, to_u, w->g_du, k.dt, w->g_y, k.skip);
        add_sums(w->g_D, w->g_y, k.u, n);
        add_sums(w->g_bias, w->g_dt, w->one, n);
        k.store_columns(q.g_u, w->g_du, l, n);
        k.store_columns(q.g_delta, w->g_dt, l, n);
        if (p.z.data) {
          silu_slope_all(k.tmp[0], k.z[0], n * kLanes);
          each(k.y, n, [](auto y, auto slope, auto g) { return y * slope * g; }, k.y, k.tmp, w->g);
          k.store_columns(q.g_z, k.y, l, n);
        }
      }
      k.store_states(q.g_A, w->g_A);
      if (q.g_h_init) k.store_states(static_cast<A*>(q.g_h_init), w->carry);
      for (int i = 0; i < k.m; ++i) {
        if (q.g_D) q.g_D[k.channel() + i] = w->g_D[i];
        if (q.g_bias) q.g_bias[k.channel() + i] = w->g_bias[i];
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
    for (int64_t j = 1; j < p.parts; ++j)
      for (int x = 0; x < n; ++x) sum[x] += in[j * p.inner + x];
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
