// What qk_attention's CPU kernels do with rows: sums, scaling, and the neuron's steps.
#pragma once
#include <math.h>
#include <string.h>

#include "core/lanes.h"
#include "core/surrogate.h"
#include "lif/neuron.h"
#include "qk_attention/qk_attention.h"

namespace spk {
namespace SPK_ISA {
namespace {

#define SPK_NOINLINE __attribute__((noinline))
#define SPK_INLINE __attribute__((always_inline)) inline
#define SPK_INLINE_LAMBDA __attribute__((always_inline))

constexpr int kSums = 32;   // partial sums along a row: their number, not the vector width, fixes the order
constexpr int kBlock = 16;  // rows whose sum is complete before it joins the total: errors grow less
constexpr int kSteps = 4;   // time steps that the neurons' loops do at once

constexpr int kQkRow = kQkTile + 16;  // length of a row of neurons in working space: off the multiples of 4 KB

// A part: of block (b, h), rows [r0, r1) and columns [l0, l1).
struct QkPart {
  int64_t b, h, r0, r1, l0, l1, index;  // index: in [B, H, parts]

  // Neighbours in memory come after each other: the heads of some tokens, where these are channels.
  QkPart(const QkShape& s, const QkOut& like, int64_t i) {
    const int64_t parts = qk_parts(s);
    const bool heads_first = !s.columns && like.h < like.r;
    const int64_t part = heads_first ? i / s.H % parts : i % parts;
    h = heads_first ? i % s.H : i / parts % s.H;
    b = i / parts / s.H;
    index = (b * s.H + h) * parts + part;
    const auto least = [](int64_t x, int64_t y) { return x < y ? x : y; };
    r0 = s.columns ? 0 : part * kQkRows;
    r1 = s.columns ? s.R : least(s.R, r0 + kQkRows);
    l0 = s.columns ? part * kQkTile : 0;
    l1 = s.columns ? least(s.L, l0 + kQkTile) : s.L;
    columns = s.columns;
  }
  int neurons() const { return int(columns ? l1 - l0 : r1 - r0); }
  template <class To, class Pointer>
  To* at(const QkRows<Pointer>& x, int64_t t, int64_t r, int64_t l) const {
    return static_cast<To*>(x.data) + t * x.t + b * x.b + h * x.h + r * x.r + l;
  }

 private:
  bool columns;
};

// ---- vectors ---------------------------------------------------------------------------------------------------------

template <class A>
using Vec = typename Vector<A>::type;

// A vector of numbers in memory: all of them, or the first `count`, the others being 0.
struct Whole {
  template <class A>
  SPK_INLINE Vec<A> load(const A* p) const {
    return spk::SPK_ISA::load<Vec<A>>(p);
  }
  template <class A>
  SPK_INLINE void store(A* p, Vec<A> v) const {
    spk::SPK_ISA::store(p, v);
  }
};
struct Some {
  int count;
  template <class A>
  SPK_INLINE Vec<A> load(const A* p) const {
#if defined(__AVX512F__)
    if constexpr (sizeof(A) == 4) return _mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p);
#endif
    Vec<A> v{};
    memcpy(&v, p, sizeof(A) * size_t(count));
    return v;
  }
  template <class A>
  SPK_INLINE void store(A* p, Vec<A> v) const {
#if defined(__AVX512F__)
    if constexpr (sizeof(A) == 4) return _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), v);
#endif
    memcpy(p, &v, sizeof(A) * size_t(count));
  }
};

// f(i, where) for the vectors that n columns fill.
template <class A, class F>
SPK_INLINE void each_vector(int n, F f) {
  constexpr int W = Vector<A>::W;
  int i = 0;
  for (; i + W <= n; i += W) f(i, Whole{});
  if (i < n) f(i, Some{n - i});
}

template <class A>
constexpr A kCount[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

template <class A>
SPK_INLINE void stream_vector(A* p, Vec<A> v) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) return _mm512_stream_ps(p, v);
#elif defined(__AVX2__)
  if constexpr (sizeof(A) == 4) return _mm256_stream_ps(p, v);
#endif
  store(p, v);
}

// ---- sums and products -----------------------------------------------------------------------------------------------

template <class A>
void fill_row(A* d, A value, int n) {
  for (int i = 0; i < n; ++i) d[i] = value;
}

// Vectors of a row whose sums fit the registers; no result depends on it.
#if defined(__AVX512F__)
constexpr int kStrip = 16;
#else
constexpr int kStrip = 8;
#endif

// d += the sum over rows of x (or x * y): K vectors of columns that overlap where they fill no whole ones.
template <bool PRODUCT, int K, class Where, class A>
SPK_NOINLINE void add_strip(A* d, const A* x, int64_t x_r, const A* y, int64_t y_r, int rows, int n, Where where) {
  constexpr int W = Vector<A>::W;
  const auto at = [n](int k) SPK_INLINE_LAMBDA { return k + 1 < K || n < W ? k * W : n - W; };
  Vec<A> all[K];
#pragma GCC unroll 16
  for (int k = 0; k < K; ++k) all[k] = where.load(d + at(k));
  for (int r = 0; r < rows;) {
    const int end = r + kBlock < rows ? r + kBlock : rows;
    Vec<A> sum[K] = {};
    for (; r < end; ++r, x += x_r, y += PRODUCT ? y_r : 0)
#pragma GCC unroll 16
      for (int k = 0; k < K; ++k) {
        const Vec<A> a = where.load(x + at(k));
        sum[k] = sum[k] + (PRODUCT ? Vec<A>(a * where.load(y + at(k))) : a);
      }
#pragma GCC unroll 16
    for (int k = 0; k < K; ++k) all[k] = all[k] + sum[k];
  }
#pragma GCC unroll 16
  for (int k = 0; k < K; ++k) where.store(d + at(k), all[k]);
}
template <bool PRODUCT, int K, class A>
void add_strips(int vectors, A* d, const A* x, int64_t x_r, const A* y, int64_t y_r, int rows, int n) {
  if constexpr (K > 1)
    if (vectors < K) return add_strips<PRODUCT, K - 1>(vectors, d, x, x_r, y, y_r, rows, n);
  add_strip<PRODUCT, K>(d, x, x_r, y, y_r, rows, n, Whole{});
}
template <bool PRODUCT, class A>
void add_columns(A* d, const A* x, int64_t x_r, const A* y, int64_t y_r, int rows, int n) {
  constexpr int W = Vector<A>::W;
  if (n < W) return add_strip<PRODUCT, 1>(d, x, x_r, y, y_r, rows, n, Some{n});
  int vectors = (n + W - 1) / W;
  for (int strips = (vectors + kStrip - 1) / kStrip, i = 0; strips > 0; --strips) {
    const int k = (vectors + strips - 1) / strips, m = n - i < k * W ? n - i : k * W;  // strips as even as can be
    add_strips<PRODUCT, kStrip>(k, d + i, x + i, x_r, PRODUCT ? y + i : y, y_r, rows, m);
    vectors -= k, i += m;
  }
}

// lanes[r][16] += partial sums along row r of x (or x * y).
template <bool PRODUCT, class A>
SPK_NOINLINE void add_lanes(A* lanes, const A* x, int64_t x_r, const A* y, int64_t y_r, int rows, int n) {
  constexpr int W = Vector<A>::W, K = kSums / W;
  for (int r = 0; r < rows; ++r, lanes += 16, x += x_r, y += PRODUCT ? y_r : 0) {
    const auto at = [&](auto where, int i) SPK_INLINE_LAMBDA {
      const Vec<A> a = where.load(x + i);
      if constexpr (PRODUCT) return Vec<A>(a * where.load(y + i));
      return a;
    };
    Vec<A> sum[K] = {};
    int i = 0;
    for (; i + kSums <= n; i += kSums)
      for (int k = 0; k < K; ++k) sum[k] = sum[k] + at(Whole{}, i + k * W);
    for (int k = 0; k < K; ++k, i += W) {
      if (i + W <= n)
        sum[k] = sum[k] + at(Whole{}, i);
      else if (i < n)
        sum[k] = sum[k] + at(Some{n - i}, i);
    }
    for (int k = 0; k < K / 2; ++k) store(lanes + k * W, load<Vec<A>>(lanes + k * W) + (sum[k] + sum[k + K / 2]));
  }
}

// d = f * x (GATE) or f, `rows` rows without a gap between them. COLUMNS: a factor for each column, the first few again
// after them, so that a vector can begin at any; else one for each row.
template <bool COLUMNS, bool GATE, bool STREAM, class A>
SPK_INLINE void scale_run(A* d, const A* f, const A* x, int rows, int n) {
  using V = Vec<A>;
  constexpr int W = Vector<A>::W;
  const auto put = [&](int i, V factor) SPK_INLINE_LAMBDA {
    if constexpr (GATE) factor = factor * load<V>(x + i);
    STREAM ? stream_vector(d + i, factor) : store(d + i, factor);
  };
  const auto put_one = [&](int i, A factor) SPK_INLINE_LAMBDA { d[i] = GATE ? factor * x[i] : factor; };
  const int total = rows * n;
  int i = 0;
  const int head = STREAM ? int(-(reinterpret_cast<uintptr_t>(d) / sizeof(A)) % (64 / sizeof(A))) : 0;
  if constexpr (COLUMNS) {
    int at = 0;
    const auto ones = [&](int end) SPK_INLINE_LAMBDA {
      for (; i < end; ++i) {
        put_one(i, f[at]);
        at = at + 1 == n ? 0 : at + 1;
      }
    };
    ones(head < total ? head : total);
    for (const int step = W % n; i + W <= total; i += W) {
      put(i, load<V>(f + at));
      at += step;
      at -= at >= n ? n : 0;
    }
    ones(total);
  } else {
    for (int r = 0; r < rows; ++r) {
      const int end = (r + 1) * n;
      for (const int to = head < end ? head : end; i < to; ++i) put_one(i, f[r]);
      const V factor = f[r] - V{};
      for (; i + W <= end; i += W) put(i, factor);
      if (i >= end) continue;
      if (W > 1 && r + 1 < rows && n >= W) {  // the end of a row and the start of the next
        put(i, load<V>(kCount<A>) < A(end - i) - V{} ? factor : f[r + 1] - V{});
        i += W;
      } else {
        for (; i < end; ++i) put_one(i, f[r]);
      }
    }
  }
}

// The same for rows at any distance.
template <bool COLUMNS, bool GATE, bool STREAM, class A>
SPK_NOINLINE void scale_rows(A* d, int64_t d_r, const A* f, const A* x, int64_t x_r, int rows, int n) {
  if (d_r == n && (!GATE || x_r == n)) return scale_run<COLUMNS, GATE, STREAM>(d, f, x, rows, n);
  for (int r = 0; r < rows; ++r, d += d_r, x += GATE ? x_r : 0) scale_run<COLUMNS, GATE, STREAM>(d, COLUMNS ? f : f + r, x, 1, n);
}

// ---- the neuron ------------------------------------------------------------------------------------------------------

// A neuron's constants for one head.
template <class A>
struct Lif {
  Neuron<A> c;
  A decay, gain, a, b;
  bool hard, detach;
  int32_t surrogate;

  Lif(const QkNeuron& p, int64_t h)
      : decay(p.decay_h ? static_cast<const A*>(p.decay_h)[h * p.decay_step] : A(p.decay)),
        gain(p.gain_h ? static_cast<const A*>(p.gain_h)[h * p.gain_step] : A(p.gain)),
        a(A(p.a)),
        b(A(p.b)),
        hard(p.hard),
        detach(p.detach),
        surrogate(p.surrogate) {
    const A threshold = A(p.threshold);
    const A above = sizeof(A) == 4 ? A(nextafterf(float(threshold), INFINITY)) : A(nextafter(double(threshold), INFINITY));
    // Nothing lies above infinity, and no potential is >= NaN.
    c = {A(p.rest), !p.strict ? threshold : above > threshold ? above : A(NAN), threshold, A(p.reset_by)};
  }
};

// R time steps: potentials v go on, h (where wanted) are those before the reset. s may be x.
template <bool HARD, bool AT_ZERO, bool H, int R, class A>
SPK_NOINLINE void steps(const A* x, int64_t x_t, A* v, A* s, A* h, int64_t t, A decay, A gain, const Neuron<A> c, int n) {
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) {
    A vi = v[i], hi[R];
    for (int r = 0; r < R; ++r) {
      hi[r] = charge(vi, x[r * x_t + i], decay, gain, AT_ZERO ? A(0) : c.rest);
      vi = reset(hi[r], HARD, c);
    }
    for (int r = 0; r < R; ++r) {
      if (H) h[r * t + i] = hi[r];
      s[r * t + i] = hi[r] >= c.fire_at ? A(1) : A(0);
    }
    v[i] = vi;
  }
}
template <int R, class A>
void fire_steps(const Lif<A>& f, const A* x, int64_t x_t, A* v, A* s, A* h, int64_t t, int n) {
  const auto run = !f.hard         ? (h ? steps<false, true, true, R, A> : steps<false, true, false, R, A>)
                   : f.c.rest == 0 ? (h ? steps<true, true, true, R, A> : steps<true, true, false, R, A>)
                                   : (h ? steps<true, false, true, R, A> : steps<true, false, false, R, A>);
  run(x, x_t, v, s, h, t, f.decay, f.gain, f.c, n);
}
// From rest through T time steps of n inputs, x_t apart, to spikes and potentials before the reset (or null), t apart.
template <class A>
void fire(const Lif<A>& f, const A* x, int64_t x_t, A* v, A* s, A* h, int64_t t, int64_t T, int n) {
  fill_row(v, f.c.rest, n);
  int64_t i = 0;
  for (; i + kSteps <= T; i += kSteps) fire_steps<kSteps>(f, x + i * x_t, x_t, v, s + i * t, h ? h + i * t : nullptr, t, n);
  for (; i < T; ++i) fire_steps<1>(f, x + i * x_t, x_t, v, s + i * t, h ? h + i * t : nullptr, t, n);
}

template <Surrogate K, class A>
SPK_NOINLINE void slope(const A* __restrict__ h, A* __restrict__ sg, A threshold, A a, A b, int n) {
  for (int i = 0; i < n; ++i) sg[i] = surrogate<K, A>(h[i] - threshold, a, b);
}
template <class A>
void slopes(const Lif<A>& f, const A* h, A* sg, int n) {
  const auto run = [&](auto fn) { fn(h, sg, f.c.threshold, f.a, f.b, n); };
  switch (static_cast<Surrogate>(f.surrogate)) {
    case Surrogate::atan: return run(slope<Surrogate::atan, A>);
    case Surrogate::sigmoid: return run(slope<Surrogate::sigmoid, A>);
    case Surrogate::rectangle: return run(slope<Surrogate::rectangle, A>);
    case Surrogate::triangle: return run(slope<Surrogate::triangle, A>);
    case Surrogate::fast_sigmoid: return run(slope<Surrogate::fast_sigmoid, A>);
    case Surrogate::erf: return run(slope<Surrogate::erf, A>);
    default: return run(slope<Surrogate::leaky_relu, A>);
  }
}

// R time steps back, from the gradients of spikes to those of inputs, in place (g_s). g_v comes in as the gradient of the
// last potential and goes out as that of the one before the first; g is left holding that of the first h.
template <bool HARD, bool DETACH, int R, class A>
SPK_NOINLINE void steps_back(const A* h, const A* sg, A* g_s, int64_t t, A* g_v, A* g, A decay, A gain, const Neuron<A> c, int n) {
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) {
    A gv = g_v[i], gh = 0;
    for (int r = R - 1; r >= 0; --r) {
      gh = step_backward<false>(h[r * t + i], g_s[r * t + i], gv, A(0), sg[r * t + i], HARD, DETACH, c);
      g_s[r * t + i] = gain * gh;
      gv = decay * gh;
    }
    if (R == 1) g[i] = gh;
    g_v[i] = gv;
  }
}
template <int R, class A>
void back_steps(const Lif<A>& f, const A* h, const A* sg, A* g_s, int64_t t, A* g_v, A* g, int n) {
  const auto run = f.hard ? (f.detach ? steps_back<true, true, R, A> : steps_back<true, false, R, A>)
                          : (f.detach ? steps_back<false, true, R, A> : steps_back<false, false, R, A>);
  run(h, sg, g_s, t, g_v, g, f.decay, f.gain, f.c, n);
}

// The commonest case in one go: kSteps time steps from rest 0, forward and back. f and all outputs have rows t apart.
// Spikes have the gradient f (GATE: f * y); PRODUCTS: spikes * y go to `products`.
template <Surrogate K, bool HARD, bool DETACH, bool GATE, bool PRODUCTS, class A>
SPK_NOINLINE void there_and_back(const A* x, int64_t x_t, const A* f, const A* y, int64_t y_t, A* g_x, A* products, int64_t t,
                                 A decay, A gain, const Neuron<A> c, A a, A b, int n) {
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) {
    A v = 0, g = 0, h[kSteps], g_s[kSteps];
    for (int r = 0; r < kSteps; ++r) {
      h[r] = charge(v, x[r * x_t + i], decay, gain, A(0));
      v = reset(h[r], HARD, c);
    }
    for (int r = 0; r < kSteps; ++r) {
      const A yi = GATE ? y[r * y_t + i] : A(0);
      g_s[r] = GATE ? f[r * t + i] * yi : f[r * t + i];
      if (PRODUCTS) products[r * t + i] = (h[r] >= c.fire_at ? A(1) : A(0)) * yi;
    }
    for (int r = kSteps - 1; r >= 0; --r) {
      const A sg = surrogate<K, A>(h[r] - c.threshold, a, b);
      const A gh = step_backward<false>(h[r], g_s[r], g, A(0), sg, HARD, DETACH, c);
      g_x[r * t + i] = gain * gh;
      g = decay * gh;
    }
  }
}
template <Surrogate K, bool GATE, bool PRODUCTS, class A>
auto there_and_back_of(bool hard, bool detach) {
  return hard ? (detach ? there_and_back<K, true, true, GATE, PRODUCTS, A> : there_and_back<K, true, false, GATE, PRODUCTS, A>)
              : (detach ? there_and_back<K, false, true, GATE, PRODUCTS, A> : there_and_back<K, false, false, GATE, PRODUCTS, A>);
}
template <class A>
void there_and_back(const Lif<A>& neuron, const A* x, int64_t x_t, const A* f, const A* y, int64_t y_t, A* g_x, A* products,
                    int64_t t, int n) {
  const auto run = [&](auto plain, auto gated, auto both) {
    (products ? both
     : y      ? gated
              : plain)(x, x_t, f, y, y_t, g_x, products, t, neuron.decay, neuron.gain, neuron.c, neuron.a, neuron.b, n);
  };
#define SPK_CASE(K)                                                                          \
  case Surrogate::K:                                                                         \
    return run(there_and_back_of<Surrogate::K, false, false, A>(neuron.hard, neuron.detach), \
               there_and_back_of<Surrogate::K, true, false, A>(neuron.hard, neuron.detach),  \
               there_and_back_of<Surrogate::K, true, true, A>(neuron.hard, neuron.detach))
  switch (static_cast<Surrogate>(neuron.surrogate)) {
    SPK_CASE(atan);
    SPK_CASE(sigmoid);
    SPK_CASE(rectangle);
    SPK_CASE(triangle);
    SPK_CASE(fast_sigmoid);
    SPK_CASE(erf);
    SPK_CASE(leaky_relu);
  }
#undef SPK_CASE
}

template <class A>
SPK_NOINLINE void add_gain(A* __restrict__ d, const A* __restrict__ g, const A* __restrict__ x, int n) {
  for (int i = 0; i < n; ++i) d[i] += g[i] * x[i];
}
template <class A>
SPK_NOINLINE void add_decay(A* __restrict__ d, const A* __restrict__ g, const A* __restrict__ h, bool hard, const Neuron<A> c,
                            int n) {
  for (int i = 0; i < n; ++i) d[i] += g[i] * (reset(h[i], hard, c) - c.rest);
}
template <class A>
SPK_NOINLINE double total(const A* d, int n) {
  double lanes[8] = {}, sum = 0;
  for (int i = 0; i < n; ++i) lanes[i % 8] += d[i];
  for (double lane : lanes) sum += lane;
  return sum;
}

}  // namespace
}  // namespace SPK_ISA
}  // namespace spk
