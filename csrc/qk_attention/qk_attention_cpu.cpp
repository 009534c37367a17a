// qk_attention on the CPU; compiled once per instruction set (core/dispatch.h). A part of a block (up to kQkTile columns,
// or kQkRows rows) goes through all time steps with its attention neurons in L1; inner loops run along a row.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "core/simd.h"
#include "core/surrogate.h"
#include "lif/neuron.h"
#include "qk_attention/qk_attention.h"

namespace spk {
namespace SPK_ISA {
namespace {

#define SPK_NOINLINE __attribute__((noinline))

constexpr int kRow = kQkTile + 16;         // length of a row of working space, off the multiples of 4 KB
constexpr int kGroup = 4;                  // rows that a sum over rows takes at once
constexpr int kBlock = 16;                 // rows whose sum is complete before it joins the total: errors grow less
constexpr int kLanes = 32;                 // partial sums along a row: their number, not the vector width, fixes the order
constexpr int kAhead = 8;                  // rows between a row in work and the one that is fetched
constexpr int64_t kStreamBytes = 8 << 20;  // outputs from this size on bypass the caches

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

// ---- rows ------------------------------------------------------------------------------------------------------------

// One time step: potentials v go on, h (where wanted) are those before the reset. s may be x.
template <bool HARD, bool AT_ZERO, bool H, class A>
SPK_NOINLINE void step(const A* x, A* v, A* s, A* h, A decay, A gain, const Neuron<A> c, int n) {
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) {
    const A hi = charge(v[i], x[i], decay, gain, AT_ZERO ? A(0) : c.rest);
    if (H) h[i] = hi;
    s[i] = hi >= c.fire_at ? A(1) : A(0);
    v[i] = reset(hi, HARD, c);
  }
}
template <class A>
void fire(const Lif<A>& f, const A* x, A* v, A* s, A* h, int n) {
  const auto run = !f.hard         ? (h ? step<false, true, true, A> : step<false, true, false, A>)
                   : f.c.rest == 0 ? (h ? step<true, true, true, A> : step<true, true, false, A>)
                                   : (h ? step<true, false, true, A> : step<true, false, false, A>);
  run(x, v, s, h, f.decay, f.gain, f.c, n);
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

// g_v comes in as the gradient of v[t] and goes out as that of v[t-1]; g is left holding that of h[t]. g_x may be g_s.
template <bool HARD, bool DETACH, class A>
SPK_NOINLINE void step_back(const A* h, const A* sg, const A* g_s, A* g_v, A* g, A* g_x, A decay, A gain, const Neuron<A> c,
                            int n) {
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) {
    const A gi = step_backward(h[i], g_s[i], g_v[i], A(0), sg[i], HARD, DETACH, c);
    g[i] = gi;
    g_x[i] = gain * gi;
    g_v[i] = decay * gi;
  }
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

// Rows are short, and the end of each costs the processor its own look ahead.
template <class T>
void prefetch(const T* x, int n) {
  for (int i = 0; i < n; i += int(64 / sizeof(T))) __builtin_prefetch(x + i);
}

template <class A>
void fill_row(A* d, A value, int n) {
  for (int i = 0; i < n; ++i) d[i] = value;
}
template <class A>
SPK_NOINLINE void add_row(A* __restrict__ d, const A* __restrict__ s, int n) {
  for (int i = 0; i < n; ++i) d[i] += s[i];
}

// d = f * x: one factor for each column, or one for the row.
template <bool COLUMNS, class A>
SPK_NOINLINE void scale_row(A* d, const A* f, const A* x, int n) {
  const A one = f[0];
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) d[i] = (COLUMNS ? f[i] : one) * x[i];
}

// d += the sum of kGroup rows, or of kGroup products of two.
template <bool PRODUCT, class A>
SPK_NOINLINE void add_group(A* __restrict__ d, const A* const* x, const A* const* y, int n) {
  const A *x0 = x[0], *x1 = x[1], *x2 = x[2], *x3 = x[3];
  if (!PRODUCT) {
    for (int i = 0; i < n; ++i) d[i] += (x0[i] + x1[i]) + (x2[i] + x3[i]);
    return;
  }
  const A *y0 = y[0], *y1 = y[1], *y2 = y[2], *y3 = y[3];
  for (int i = 0; i < n; ++i) d[i] += (x0[i] * y0[i] + x1[i] * y1[i]) + (x2[i] * y2[i] + x3[i] * y3[i]);
}

// lanes[i % kLanes] += x[i], or x[i] * y[i]; vectors by hand, because compilers keep the lanes in memory.
template <bool PRODUCT, class A>
SPK_NOINLINE void add_lanes(A* lanes, const A* x, const A* y, int n) {
  typedef A Vector __attribute__((vector_size(64)));
  constexpr int W = 64 / sizeof(A), V = kLanes / W;
  Vector sum[V];
  memcpy(sum, lanes, sizeof sum);
  int i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int k = 0; k < V; ++k) {
      Vector a, b;
      memcpy(&a, x + i + k * W, 64);
      if (PRODUCT) memcpy(&b, y + i + k * W, 64);
      sum[k] += PRODUCT ? a * b : a;
    }
  memcpy(lanes, sum, sizeof sum);
  for (int k = 0; i < n; ++i, ++k) lanes[k] += PRODUCT ? x[i] * y[i] : x[i];
}
template <class A>
A sum_of_lanes(A* lanes) {
  for (int width = kLanes / 2; width; width /= 2)
    for (int k = 0; k < width; ++k) lanes[k] += lanes[k + width];
  return lanes[0];
}

// ---- a part of a block -----------------------------------------------------------------------------------------------

// Working space: sequences of T rows. One allocation for each call of a kernel.
template <class A>
struct Space {
  A* base = nullptr;
  int64_t T, used = 0;

  Space(int64_t T, int sequences) : T(T) {
    base = static_cast<A*>(aligned_alloc(64, sizeof(A) * size_t(T) * kRow * size_t(sequences)));
  }
  ~Space() { free(base); }
  A* sequence() { return base + (used++) * T * kRow; }
};
static_assert(kRow * sizeof(float) % 64 == 0);

// Where a part lies: of block (b, h), rows [r0, r1) and columns [l0, l1).
struct Part {
  int64_t b, h, r0, r1, l0, l1;
  Part(const QkShape& s, int64_t index) {
    const int64_t parts = qk_parts(s), part = index % parts;
    h = index / parts % s.H;
    b = index / parts / s.H;
    const auto least = [](int64_t x, int64_t y) { return x < y ? x : y; };
    r0 = s.columns ? 0 : part * kQkRows;
    r1 = s.columns ? s.R : least(s.R, r0 + kQkRows);
    l0 = s.columns ? part * kQkTile : 0;
    l1 = s.columns ? least(s.L, l0 + kQkTile) : s.L;
  }
};

template <class Pointer>
int64_t offset(const QkRows<Pointer>& x, const Part& at, int64_t t, int64_t r) {
  return t * x.t + at.b * x.b + at.h * x.h + r * x.r;
}

// Collects neighbouring rows of an output that goes past the caches, so that whole cache lines leave at once, and rows that
// are converted. Others are computed in place.
template <class T, class A>
struct Sink {
  static constexpr int kSize = 16 * kQkTile, kLine = 64 / sizeof(T);
  alignas(64) A buffer[kSize];
  T* start = nullptr;
  int held = 0;
  bool stream;

  explicit Sink(bool stream) : stream(stream) {}
  A* row(T* out, int n) {
    if (target_row(buffer, out, stream) != buffer) return target_row(buffer, out, stream);
    if (held && (out != start + held || held + n > kSize)) flush(out != start + held);
    if (held == 0) start = out;
    held += n;
    return buffer + held - n;
  }
  void flush(bool all = true) {
    const int n = all ? held : held / kLine * kLine;
    if (n) commit_row(start, buffer, stream, n);
    for (int i = n; i < held; ++i) buffer[i - n] = buffer[i];
    start += n;
    held -= n;
  }
};

template <class T, class A>
struct Walk {
  const QkShape& shape;
  Sink<T, A> sink;
  alignas(64) A v[kRow], tmp[kRow], sg[kRow], g[kRow], g_v[kRow], sum_decay[kRow], sum_gain[kRow];

  Walk(const QkShape& shape, bool stream) : shape(shape), sink(stream && !shape.currents) {}

  const T* at(const QkIn& x, const Part& part, int64_t t, int64_t r, int64_t l) const {
    return static_cast<const T*>(x.data) + offset(x, part, t, r) + l;
  }
  T* at(const QkOut& x, const Part& part, int64_t t, int64_t r, int64_t l) const {
    return static_cast<T*>(x.data) + offset(x, part, t, r) + l;
  }

  // Calls f(t0, t1): all time steps of a row at once where its neurons carry a potential from one to the next, else one
  // after the other, so that memory is walked in its order.
  template <class F>
  void over_time(F f) const {
    const int64_t step = shape.currents ? shape.T : 1;
    for (int64_t t = 0; t < shape.T; t += step) f(t, t + step);
  }
  // Calls f(r, l, n) for each row of a part, in tiles.
  template <class F>
  static void over_rows(const Part& part, F f) {
    for (int64_t r = part.r0; r < part.r1; ++r)
      for (int64_t l = part.l0; l < part.l1; l += kQkTile) f(r, l, int(part.l1 - l < kQkTile ? part.l1 - l : kQkTile));
  }

  // rows[t * step] for t in [t0, t1): what operand x holds from (r, l) on, n columns: its numbers, or the spikes they cause
  // (then with the potentials in h, where that is wanted). In place, or in `space`.
  void read(const QkIn& x, const Lif<A>& neuron, const Part& part, int64_t t0, int64_t t1, int64_t r, int64_t l, int n, A* space,
            const A** rows, int step = 1, A* h = nullptr) {
    if (shape.currents) fill_row(v, neuron.c.rest, n);
    for (int64_t t = t0; t < t1; ++t) {
      A* const here = space + t * kRow;
      rows[t * step] = state_row(here, at(x, part, t, r, l), n);
      if (!shape.currents) {
        prefetch(at(x, part, t, r, l) + kAhead * x.r, n);
        continue;
      }
      fire(neuron, rows[t * step], v, here, h ? h + t * kRow : nullptr, n);
      rows[t * step] = here;
    }
  }

  // The attention neurons' input, into `sum`.
  template <bool COLUMNS, bool PRODUCT>
  void sum(const QkIn& s, const QkIn& w, const Lif<A>& neuron, const Part& part, A* sum, A* block, A* lanes, A* const* space,
           const A** rows) {
    const A **x = rows, **y = rows + kGroup * shape.T;
    if (!COLUMNS) {
      over_time([&](int64_t t0, int64_t t1) {
        over_rows(part, [&](int64_t r, int64_t l, int n) {
          if (l == 0) fill_row(lanes, A(0), int((t1 - t0) * kLanes));
          read(s, neuron, part, t0, t1, r, l, n, space[0], x);
          if (PRODUCT) read(w, neuron, part, t0, t1, r, l, n, space[1], y);
          for (int64_t t = t0; t < t1; ++t) {
            A* const here = lanes + (t - t0) * kLanes;
            add_lanes<PRODUCT>(here, x[t], y[t], n);
            if (l + n == shape.L) sum[t * kRow + (r - part.r0)] = sum_of_lanes(here);
          }
        });
      });
      return;
    }
    const int n = int(part.l1 - part.l0);
    alignas(64) static const A zero[kRow] = {};
    over_time([&](int64_t t0, int64_t t1) {
      for (int64_t t = t0; t < t1; ++t) fill_row(sum + t * kRow, A(0), n);
      for (int64_t r0 = 0; r0 < shape.R; r0 += kBlock) {
        const int64_t end = r0 + kBlock < shape.R ? r0 + kBlock : shape.R;
        for (int64_t t = t0; t < t1; ++t) fill_row(block + t * kRow, A(0), n);
        for (int64_t r = r0; r < end; r += kGroup) {
          for (int i = 0; i < kGroup; ++i) {
            if (r + i < end) {
              read(s, neuron, part, t0, t1, r + i, part.l0, n, space[i], x + i, kGroup);
              if (PRODUCT) read(w, neuron, part, t0, t1, r + i, part.l0, n, space[kGroup + i], y + i, kGroup);
            } else {
              for (int64_t t = t0; t < t1; ++t) x[t * kGroup + i] = y[t * kGroup + i] = zero;
            }
          }
          for (int64_t t = t0; t < t1; ++t) add_group<PRODUCT>(block + t * kRow, x + t * kGroup, y + t * kGroup, n);
        }
        for (int64_t t = t0; t < t1; ++t) add_row(sum + t * kRow, block + t * kRow, n);
      }
    });
  }

  // The attention neurons: from their input to spikes in `a`, potentials in h (or null).
  void attend(const Lif<A>& neuron, const A* in, A* a, A* h, int n) {
    fill_row(v, neuron.c.rest, n);
    for (int64_t t = 0; t < shape.T; ++t) fire(neuron, in + t * kRow, v, a + t * kRow, h ? h + t * kRow : nullptr, n);
  }

  // From the gradients of spikes (g_s) to those of inputs: write(t, run) is called for t = T-1 ... 0 and has to call
  // run(row). Sums for decay and gain are added to the two numbers at `sums` where it is not null; input(t) is then the
  // input's row.
  template <class Input, class Write>
  void back(const Lif<A>& neuron, const A* h, const A* g_s, double* sums, int n, Input input, Write write) {
    const auto run = neuron.hard ? (neuron.detach ? step_back<true, true, A> : step_back<true, false, A>)
                                 : (neuron.detach ? step_back<false, true, A> : step_back<false, false, A>);
    fill_row(g_v, A(0), n);
    if (sums) {
      fill_row(sum_decay, A(0), n);
      fill_row(sum_gain, A(0), n);
    }
    for (int64_t t = shape.T - 1; t >= 0; --t) {
      const A* const ht = h + t * kRow;
      slopes(neuron, ht, sg, n);
      write(t, [&](A* g_x) { run(ht, sg, g_s + t * kRow, g_v, g, g_x, neuron.decay, neuron.gain, neuron.c, n); });
      if (!sums) continue;
      add_gain(sum_gain, g, input(t), n);
      if (t > 0) add_decay(sum_decay, g, ht - kRow, neuron.hard, neuron.c, n);  // v[-1] is at rest
    }
    if (sums) {
      sums[0] += total(sum_decay, n);
      sums[1] += total(sum_gain, n);
    }
  }
};

bool streams(const QkShape& s, int64_t size) { return s.T * s.B * s.H * s.R * s.L * size >= kStreamBytes; }

constexpr int kSpaces = 2 * kGroup;

// What a kernel's call works with, of both directions.
template <class T, class A>
struct Scratch {
  Space<A> memory;
  Walk<T, A> walk;
  const A** rows;  // [2 * kGroup * T]
  A *in, *block, *lanes, *space[kSpaces];

  Scratch(const QkShape& shape, int more)
      : memory(shape.T, kSpaces + 3 + more),
        walk(shape, streams(shape, sizeof(T))),
        rows(static_cast<const A**>(malloc(sizeof(A*) * 2 * kGroup * size_t(shape.T)))),
        in(memory.sequence()),
        block(memory.sequence()),
        lanes(memory.sequence()) {
    for (A*& s : space) s = memory.sequence();
  }
  ~Scratch() { free(rows); }
  bool failed() const { return !memory.base || !rows; }

  template <bool COLUMNS>
  void sum(const QkIn& s, const QkIn& w, const Lif<A>& neuron, const Part& part) {
    if (w.data)
      walk.template sum<COLUMNS, true>(s, w, neuron, part, in, block, lanes, space, rows);
    else
      walk.template sum<COLUMNS, false>(s, w, neuron, part, in, block, lanes, space, rows);
  }
};

template <class T, class A, bool COLUMNS>
int forward(const QkFwd& p, int64_t begin, int64_t end) {
  Scratch<T, A> scratch(p.shape, 0);
  if (scratch.failed()) return kOutOfMemory;
  Walk<T, A>& walk = scratch.walk;
  A* const a = scratch.in;
  const A** const rows = scratch.rows;
  for (int64_t index = begin; index < end; ++index) {
    const Part part(p.shape, index);
    const Lif<A> attn(p.attn, part.h), qkv(p.qkv, part.h);
    scratch.template sum<COLUMNS>(p.s, p.w, qkv, part);
    walk.attend(attn, a, a, nullptr, int(COLUMNS ? part.l1 - part.l0 : part.r1 - part.r0));
    walk.over_time([&](int64_t t0, int64_t t1) {
      walk.over_rows(part, [&](int64_t r, int64_t l, int n) {
        walk.read(p.y, qkv, part, t0, t1, r, l, n, scratch.space[0], rows);
        for (int64_t t = t0; t < t1; ++t)
          scale_row<COLUMNS>(walk.sink.row(walk.at(p.out, part, t, r, l), n), a + t * kRow + (COLUMNS ? 0 : r - part.r0), rows[t],
                             n);
      });
    });
    walk.sink.flush();
  }
  stream_fence();
  return kOk;
}

template <class T, class A, bool COLUMNS>
int backward(const QkBwd& p, int64_t begin, int64_t end) {
  const QkShape& shape = p.shape;
  Scratch<T, A> scratch(shape, 3);
  if (scratch.failed()) return kOutOfMemory;
  A *const a = scratch.memory.sequence(), *const h = scratch.memory.sequence(), *const g_a = scratch.memory.sequence();
  A *const block = scratch.block, *const lanes = scratch.lanes, *const *const space = scratch.space;
  const A **const x = scratch.rows, **const y = scratch.rows + shape.T;
  Walk<T, A>& walk = scratch.walk;
  const bool currents = shape.currents;
  for (int64_t index = begin; index < end; ++index) {
    const Part part(shape, index);
    const Lif<A> attn(p.attn, part.h), qkv(p.qkv, part.h);
    double sums[4] = {};
    double* const qkv_sums = p.sums && currents ? sums + kQkvDecay : nullptr;
    scratch.template sum<COLUMNS>(p.s, p.w, qkv, part);
    const int neurons = int(COLUMNS ? part.l1 - part.l0 : part.r1 - part.r0);
    walk.attend(attn, scratch.in, a, h, neurons);
    for (int64_t t = 0; t < shape.T; ++t) fill_row(g_a + t * kRow, A(0), neurons);

    // Gradient of one operand: factor * other, or the factor alone. That of a current goes on through its neurons, whose
    // potentials are given.
    const auto spread = [&](const QkIn& from, const QkOut& to, const A* factor, const A* const* other, const A* potentials, A* g_s,
                            int64_t t0, int64_t t1, int64_t r, int64_t l, int n) {
      for (int64_t t = t0; t < t1; ++t) {
        const A* const f = factor + t * kRow + (COLUMNS ? 0 : r - part.r0);
        A* const row = currents ? g_s + t * kRow : walk.sink.row(walk.at(to, part, t, r, l), n);
        if (other)
          scale_row<COLUMNS>(row, f, other[t], n);
        else if (COLUMNS)
          load_row(row, f, n);
        else
          fill_row(row, f[0], n);
      }
      if (!currents) return;
      walk.back(
          qkv, potentials, g_s, qkv_sums, n, [&](int64_t t) { return state_row(walk.tmp, walk.at(from, part, t, r, l), n); },
          [&](int64_t t, auto run) {
            T* const out = walk.at(to, part, t, r, l);
            A* const row = target_row(walk.tmp, out, false);
            run(row);
            commit_row(out, row, false, n);
          });
    };

    walk.over_time([&](int64_t t0, int64_t t1) {
      walk.over_rows(part, [&](int64_t r, int64_t l, int n) {
        if (COLUMNS && (r - part.r0) % kBlock == 0)
          for (int64_t t = t0; t < t1; ++t) fill_row(block + t * kRow, A(0), n);
        if (!COLUMNS && l == 0) fill_row(lanes, A(0), int((t1 - t0) * kLanes));
        walk.read(p.y, qkv, part, t0, t1, r, l, n, space[0], y, 1, currents ? space[1] : nullptr);
        for (int64_t t = t0; t < t1; ++t) {
          x[t] = state_row(space[2] + t * kRow, walk.at(p.g_out, part, t, r, l), n);
          prefetch(walk.at(p.g_out, part, t, r, l) + kAhead * p.g_out.r, n);
          if (COLUMNS) {
            add_gain(block + t * kRow, x[t], y[t], n);
            if ((r - part.r0) % kBlock == kBlock - 1 || r + 1 == part.r1) add_row(g_a + t * kRow, block + t * kRow, n);
          } else {
            A* const here = lanes + (t - t0) * kLanes;
            add_lanes<true>(here, x[t], y[t], n);
            if (l + n == shape.L) g_a[t * kRow + (r - part.r0)] = sum_of_lanes(here);
          }
        }
        spread(p.y, p.g_y, a, x, space[1], space[3], t0, t1, r, l, n);
      });
    });
    walk.sink.flush();

    walk.back(
        attn, h, g_a, p.sums ? sums + kAttnDecay : nullptr, neurons, [&](int64_t t) { return scratch.in + t * kRow; },
        [&](int64_t t, auto run) { run(g_a + t * kRow); });

    const bool two = p.w.data != nullptr;
    walk.over_time([&](int64_t t0, int64_t t1) {
      walk.over_rows(part, [&](int64_t r, int64_t l, int n) {
        if (currents || two) walk.read(p.s, qkv, part, t0, t1, r, l, n, space[0], x, 1, currents ? space[1] : nullptr);
        if (two) walk.read(p.w, qkv, part, t0, t1, r, l, n, space[2], y, 1, currents ? space[3] : nullptr);
        spread(p.s, p.g_s, g_a, two ? y : nullptr, space[1], space[4], t0, t1, r, l, n);
        if (two && currents) spread(p.w, p.g_w, g_a, x, space[3], space[4], t0, t1, r, l, n);
      });
      if (!two || currents) return;
      walk.over_rows(part, [&](int64_t r, int64_t l, int n) {  // one output after the other
        walk.read(p.s, qkv, part, t0, t1, r, l, n, space[0], x);
        spread(p.w, p.g_w, g_a, x, nullptr, nullptr, t0, t1, r, l, n);
      });
    });
    walk.sink.flush();
    const int64_t all = shape.B * shape.H * qk_parts(shape);
    for (int i = 0; p.sums && i < 4; ++i) p.sums[i * all + index] = sums[i];
  }
  stream_fence();
  return kOk;
}

// ---- packed spikes ---------------------------------------------------------------------------------------------------

// counts[t][i] += bit t of x[i] (and y[i]).
template <bool PRODUCT>
SPK_NOINLINE void count_columns(uint8_t (*counts)[kQkTile], const uint8_t* x, const uint8_t* y, int n) {
  for (int t = 0; t < 8; ++t) {
    uint8_t* __restrict__ c = counts[t];
    for (int i = 0; i < n; ++i) c[i] = uint8_t(c[i] + (((PRODUCT ? x[i] & y[i] : x[i]) >> t) & 1));
  }
}
// counts[t] += how many of the n bytes have bit t.
template <bool PRODUCT>
SPK_NOINLINE void count_row(int64_t* counts, const uint8_t* x, const uint8_t* y, int64_t n) {
  for (int64_t i = 0; i < n; i += 8) {
    uint64_t a = 0, b = 0;
    const size_t m = size_t(n - i < 8 ? n - i : 8);
    memcpy(&a, x + i, m);
    if (PRODUCT) {
      memcpy(&b, y + i, m);
      a &= b;
    }
    for (int t = 0; t < 8; ++t) counts[t] += __builtin_popcountll(a >> t & 0x0101010101010101u);
  }
}

int packed(const QkFwd& p, int64_t begin, int64_t end) {
  const QkShape& shape = p.shape;
  const int64_t slices = (shape.T + 7) / 8;
  Space<float> memory(slices * 8, 1);
  if (!memory.base) return kOutOfMemory;
  float* const a = memory.sequence();
  Walk<uint8_t, float> walk(shape, false);
  for (int64_t index = begin; index < end; ++index) {
    const Part part(shape, index);
    const int n = int(shape.columns ? part.l1 - part.l0 : part.r1 - part.r0);
    for (int64_t j = 0; j < slices; ++j) {
      float* const sum = a + j * 8 * kRow;
      const auto row = [&](const QkIn& x, int64_t r) {
        return static_cast<const uint8_t*>(x.data) + (x.data ? offset(x, part, j, r) + part.l0 : 0);
      };
      if (shape.columns) {
        for (int t = 0; t < 8; ++t) fill_row(sum + t * kRow, 0.f, n);
        uint8_t counts[8][kQkTile];
        for (int64_t r0 = 0; r0 < shape.R; r0 += 255) {
          memset(counts, 0, sizeof counts);
          for (int64_t r = r0; r < shape.R && r < r0 + 255; ++r)
            (p.w.data ? count_columns<true> : count_columns<false>)(counts, row(p.s, r), row(p.w, r), n);
          for (int t = 0; t < 8; ++t)
            for (int i = 0; i < n; ++i) sum[t * kRow + i] += float(counts[t][i]);
        }
      } else {
        for (int64_t r = part.r0; r < part.r1; ++r) {
          int64_t counts[8] = {};
          (p.w.data ? count_row<true> : count_row<false>)(counts, row(p.s, r), row(p.w, r), shape.L);
          for (int t = 0; t < 8; ++t) sum[t * kRow + (r - part.r0)] = float(counts[t]);
        }
      }
    }
    walk.attend(Lif<float>(p.attn, part.h), a, a, nullptr, n);
    for (int64_t j = 0; j < slices; ++j) {
      uint8_t bits[kQkTile] = {};
      for (int t = 0; t < 8 && j * 8 + t < shape.T; ++t)
        for (int i = 0; i < n; ++i) bits[i] = uint8_t(bits[i] | (a[(j * 8 + t) * kRow + i] != 0 ? 1 << t : 0));
      for (int64_t r = part.r0; r < part.r1; ++r) {
        const uint8_t* __restrict__ y = walk.at(p.y, part, j, r, part.l0);
        uint8_t* __restrict__ out = walk.at(p.out, part, j, r, part.l0);
        const uint8_t one = bits[shape.columns ? 0 : r - part.r0];
        const int64_t m = part.l1 - part.l0;
        if (shape.columns)
          for (int64_t i = 0; i < m; ++i) out[i] = y[i] & bits[i];
        else
          for (int64_t i = 0; i < m; ++i) out[i] = y[i] & one;
      }
    }
  }
  return kOk;
}

template <class T, class A>
int forward_of(const QkFwd& p, int64_t begin, int64_t end) {
  return p.shape.columns ? forward<T, A, true>(p, begin, end) : forward<T, A, false>(p, begin, end);
}
template <class T, class A>
int backward_of(const QkBwd& p, int64_t begin, int64_t end) {
  return p.shape.columns ? backward<T, A, true>(p, begin, end) : backward<T, A, false>(p, begin, end);
}

}  // namespace

int qk_fwd(const QkFwd& p, int64_t begin, int64_t end) {
  if (p.packed) return packed(p, begin, end);
  switch (p.shape.dtype) {
    case DType::f32: return forward_of<float, float>(p, begin, end);
    case DType::bf16: return forward_of<bf16, float>(p, begin, end);
    case DType::f16: return forward_of<f16, float>(p, begin, end);
    default: return forward_of<double, double>(p, begin, end);
  }
}

int qk_bwd(const QkBwd& p, int64_t begin, int64_t end) {
  switch (p.shape.dtype) {
    case DType::f32: return backward_of<float, float>(p, begin, end);
    case DType::bf16: return backward_of<bf16, float>(p, begin, end);
    case DType::f16: return backward_of<f16, float>(p, begin, end);
    default: return backward_of<double, double>(p, begin, end);
  }
}

}  // namespace SPK_ISA

#ifdef SPK_DISPATCH
QkFwdFn* qk_fwd_cpu() {
  static QkFwdFn* const f = SPK_PICK(qk_fwd);
  return f;
}
QkBwdFn* qk_bwd_cpu() {
  static QkBwdFn* const f = SPK_PICK(qk_bwd);
  return f;
}
#endif

}  // namespace spk
