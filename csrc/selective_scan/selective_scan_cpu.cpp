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
struct Inputs {
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

template <class A>
struct Forward {
  Block<A> block;
  Inputs<A> inputs;
};

template <class A>
int forward(const SelectiveScanFwd& q, int64_t begin, int64_t end) {
  const SelectiveScan& p = q.in;
  Forward<A>* w;
  if (!allocate<A>(w, p, 0)) return kOutOfMemory;
  Block<A>& k = w->block;
  k.in = &w->inputs;
  const int64_t blocks = scan_blocks(p), chunk = chunk_of(p);
  for (int64_t item = begin; item < end; ++item) {
    k.at(item / blocks / p.G, item / blocks % p.G, item % blocks);
    k.load_rates();
    k.load_states(k.h, p.h_init, k.channel());
    for (int64_t l = 0; l < p.L; l += chunk) {
      const int n = int(p.L - l < chunk ? p.L - l : chunk);
      k.template load_chunk<false>(l, n, k.ahead(p.u, l + n), k.ahead(p.delta, l + n));
      k.load_matrices(l, n);
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
  stream_fence();
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
  Columns<A> g, gated, g_du, g_dt, part_du, part_dt;  // g: of the gated y; g_dt: what comes through the decays
  Columns<A>* g_y;
  Columns<A> a[kStatesBack], h[kStatesBack];  // h[l + 1] is after step l
  A sums[kChunk];
  Inputs<A> inputs[kKept];
};

// R states through the n steps of a chunk and back, leaving each step's parts in g_B in a, in g_C in h[l + 1]. With OUT y
// is computed again. first: of those that part_du and part_dt add up.
template <bool OUT, bool BOUNDED, int R, class A>
SPK_NOINLINE void back(Backward<A>& w, int64_t s, int n, bool first, const Ahead* reads) {
  using V = typename Vector<A>::type;
  constexpr int P = 4 / R;  // steps whose decays are computed at once
  Block<A>& k = w.block;
  const Inputs<A>& in = *k.in;
  A rows[R][kChunk / kSum][kLanes];  // of g_A, from the last on
  const int last = (n - 1) / kSum;
  const A *Bs[R], *Cs[R];
  for (int r = 0; r < R; ++r) Bs[r] = k.Bs.row(s + r), Cs[r] = k.Cs.row(s + r);
  for (int i = 0; i < kLanes; i += Vector<A>::W) {
    V h[R];
    {
      V rate[R];
      for (int r = 0; r < R; ++r) {
        const int64_t at = (s + r) * kLanes + i;
        h[r] = load<V>(k.h + at), rate[r] = load<V>(k.rate + at);
        store(&w.h[r][0][i], h[r]);
      }
      for (int l = 0; l < n; l += P) {
        Pack<V, 4> a;
        V t[P];
        for (int j = 0; j < P; ++j) {
          t[j] = load<V>(&in.dt[l + j][i]);
          for (int r = 0; r < R; ++r) a.v[j * R + r] = t[j] * rate[r];
        }
        a = decays<BOUNDED>(a);
        for (int j = 0; j < P && l + j < n; ++j) {
          if (i == 0 && s == 0) reads[0].fetch(l + j), reads[1].fetch(l + j);
          const V x = t[j] * load<V>(&in.u[l + j][i]);
          V out{};
          for (int r = 0; r < R; ++r) {
            h[r] = scan_step(h[r], a.v[j * R + r], x * Bs[r][l + j]);
            store(&w.a[r][l + j][i], a.v[j * R + r]);
            store(&w.h[r][l + j + 1][i], h[r]);
            if (OUT) out = r ? out + h[r] * Cs[r][l + j] : h[r] * Cs[r][l + j];
          }
          if (OUT) store(&k.y[l + j][i], load<V>(&k.y[l + j][i]) + out);
        }
      }
    }
    V A_[R], g_h[R], g_A[R];
    for (int r = 0; r < R; ++r) {
      const int64_t at = (s + r) * kLanes + i;
      A_[r] = load<V>(w.A_ + at), g_h[r] = load<V>(w.carry + at), g_A[r] = V{};
    }
    for (int l = n - 1; l >= 0; --l) {
      const V g_y = load<V>(&(*w.g_y)[l][i]), t = load<V>(&in.dt[l][i]), x = t * load<V>(&in.u[l][i]);
      V du{}, dt{};
      for (int r = 0; r < R; ++r) {
        const V before = load<V>(&w.h[r][l][i]), g = g_h[r] + g_y * Cs[r][l];  // g: of h[l]
        g_h[r] = g * load<V>(&w.a[r][l][i]);
        const V g_exponent = g_h[r] * before;
        store(&w.h[r][l + 1][i], g_y * h[r]);
        store(&w.a[r][l][i], g * x);
        du = r ? du + g * Bs[r][l] : g * Bs[r][l];
        dt = r ? dt + g_exponent * A_[r] : g_exponent * A_[r];
        g_A[r] = g_A[r] + g_exponent * t;
        h[r] = before;
      }
      store(&w.part_du[l][i], first ? du : load<V>(&w.part_du[l][i]) + du);
      store(&w.part_dt[l][i], first ? dt : load<V>(&w.part_dt[l][i]) + dt);
      if (l % kSum == 0)
        for (int r = 0; r < R; ++r) store(&rows[r][last - l / kSum][i], g_A[r]), g_A[r] = V{};
    }
    for (int r = 0; r < R; ++r) store(w.carry + (s + r) * kLanes + i, g_h[r]);
  }
  for (int r = 0; r < R; ++r) add_rows(w.g_A + (s + r) * kLanes, rows[r], last + 1);
}

// The gradients of u, into du, and of delta, into dt, and what they and g_y give those of D and the bias. du and dt come in
// as the sums over states.
template <bool SOFTPLUS, class A>
SPK_NOINLINE void finish(Backward<A>& w, Columns<A>& du, Columns<A>& dt, int n) {
  using V = typename Vector<A>::type;
  const Inputs<A>& in = *w.block.in;
  A to_D[kChunk / kSum][kLanes], to_bias[kChunk / kSum][kLanes];
  for (int i = 0; i < kLanes; i += Vector<A>::W) {
    const V skip = load<V>(w.block.skip + i);
    V g_D{}, g_bias{};
    for (int l = 0; l < n; ++l) {
      const V u = load<V>(&in.u[l][i]), g_y = load<V>(&(*w.g_y)[l][i]), g_du = load<V>(&du[l][i]);
      V g_delta = load<V>(&dt[l][i]) + g_du * u;
      if (SOFTPLUS) g_delta = g_delta * load<V>(&in.slope[l][i]);
      store(&dt[l][i], g_delta);
      store(&du[l][i], g_du * load<V>(&in.dt[l][i]) + g_y * skip);
      g_D = g_D + g_y * u;
      g_bias = g_bias + g_delta;
      if (l % kSum == kSum - 1 || l + 1 == n) {
        store(&to_D[l / kSum][i], g_D), store(&to_bias[l / kSum][i], g_bias);
        g_D = g_bias = V{};
      }
    }
  }
  add_rows(w.g_D, to_D, (n + kSum - 1) / kSum);
  add_rows(w.g_bias, to_bias, (n + kSum - 1) / kSum);
}

// The sums of `from` over its 16 channels, to a row of the part's gradient: written by its first block, then added to.
template <class A>
void sum_channels(A* __restrict__ d, const A (*from)[kLanes], A* __restrict__ sums, bool first, int n) {
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
  const int64_t dropped = chunks > kKept ? chunks - kKept : 0;  // chunks whose inputs are not kept
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
      const auto enter = [&](int64_t chunk) { k.in = w->inputs + (chunk < dropped ? 0 : chunk - dropped); };
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        const int64_t l = chunk * length, next = l + length;
        const int n = int(p.L - l < length ? p.L - l : length);
        memcpy(w->starts + chunk * per_state, k.h, per_state * sizeof(A));
        enter(chunk);
        if (chunk + 1 == chunks) {
          k.template load_chunk<true>(l, n, k.ahead(q.g_y, l), {});
          break;
        }
        if (chunk < dropped)
          k.template load_chunk<false>(l, n, k.ahead(p.u, next), k.ahead(p.delta, next));
        else
          k.template load_chunk<true>(l, n, k.ahead(p.u, next), k.ahead(p.delta, next));
        k.load_matrices(l, n);
        walk_all<false>(k, n);
      }

      for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
        const int64_t l = chunk * length;
        const int n = int(p.L - l < length ? p.L - l : length);
        memcpy(k.h, w->starts + chunk * per_state, per_state * sizeof(A));
        enter(chunk);
        if (chunk < dropped) {
          const int64_t next = chunk ? l - length : p.L;
          k.template load_chunk<true>(l, n, k.ahead(p.u, next), k.ahead(p.delta, next));
        }
        k.load_matrices(l, n);
        if (q.g_y.data) k.load_columns(w->g, q.g_y, l, n);
        w->g_y = &w->g;
        if (p.z.data) {
          w->g_y = &w->gated;
          k.load_columns(k.z, p.z, l, n);
          silu_all(k.tmp[0], k.z[0], n * kLanes);
          each(w->gated, n, product, w->g, k.tmp);
          each(k.y, n, product, k.in->u, k.skip);
        }
        // What is loaded next: g_y again, or the next block.
        const Ahead reads[] = {chunk ? k.ahead(q.g_y, l - length) : k.ahead(p.u, p.L), chunk ? Ahead{} : k.ahead(p.delta, p.L)};
        if (p.S == 0) {
          memset(w->part_du, 0, sizeof(w->part_du));
          memset(w->part_dt, 0, sizeof(w->part_dt));
        }
        for (int64_t s = 0, count; s < p.S; s += count) {
          count = p.S - s < kStatesBack ? 1 : kStatesBack;
          const auto run = [&](auto f1, auto f2) { (count == 1 ? f1 : f2)(*w, s, n, s % kSum == 0, reads); };
          if (p.z.data)
            k.in->bounded ? run(back<true, true, 1, A>, back<true, true, kStatesBack, A>)
                          : run(back<true, false, 1, A>, back<true, false, kStatesBack, A>);
          else
            k.in->bounded ? run(back<false, true, 1, A>, back<false, true, kStatesBack, A>)
                          : run(back<false, false, 1, A>, back<false, false, kStatesBack, A>);
          for (int r = 0; r < count; ++r) {
            sum_channels(g_Bs + (s + r) * p.L + l, w->a[r], w->sums, block == first, n);
            sum_channels(g_Cs + (s + r) * p.L + l, w->h[r] + 1, w->sums, block == first, n);
          }
          if (p.S > kSum && ((s + count) % kSum == 0 || s + count == p.S)) {
            if (s < kSum) {
              memcpy(w->g_du, w->part_du, sizeof(A) * kLanes * n);
              memcpy(w->g_dt, w->part_dt, sizeof(A) * kLanes * n);
            } else {
              each(w->g_du, n, sum, w->g_du, w->part_du);
              each(w->g_dt, n, sum, w->g_dt, w->part_dt);
            }
          }
        }
        Columns<A>&du = p.S > kSum ? w->g_du : w->part_du, &dt = p.S > kSum ? w->g_dt : w->part_dt;
        p.softplus ? finish<true>(*w, du, dt, n) : finish<false>(*w, du, dt, n);
        k.store_columns(q.g_u, du, l, n);
        k.store_columns(q.g_delta, dt, l, n);
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
  stream_fence();
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
