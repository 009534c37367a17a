// qk_attention on the CPU; compiled once per instruction set (core/dispatch.h). A part of a block (up to kQkTile columns,
// or kQkRows rows) goes through all time steps tile by tile; a tile is a few rows of some columns, in L1.
#include <stdlib.h>

#include "qk_attention/packed.h"
#include "qk_attention/rows.h"

namespace spk {
namespace SPK_ISA {
namespace {

constexpr int kTileSize = 4096;            // elements of a tile, over all its time steps
constexpr int64_t kStreamBytes = 8 << 20;  // outputs from this size on bypass the caches

template <class T, class A>
constexpr bool kSame = false;
template <class A>
constexpr bool kSame<A, A> = true;

// [T, rows, n], the columns side by side.
template <class A>
struct Tile {
  const A* data;
  int64_t t, r;

  const A* at(int64_t time) const { return data + time * t; }
};

// Where a tile lies: time steps [t0, t1), rows from r on, columns from l on.
struct Place {
  int64_t t0, t1, r, l;
  int rows, n;
  const Place* next;
};

// A kernel's call: T, and A to compute in.
template <class T, class A>
struct Walk {
  const QkShape& shape;
  const bool stream;
  const int64_t times, step;  // of a tile in working space: time steps, and elements from one to the next
  int64_t used = 0;
  A* base;
  // [T, kQkRow]: the attention neurons' input (then spikes), potentials, gradients, slopes; and partial sums along rows.
  A *in, *a, *h, *g_a, *attn_sg, *lanes;
  A *v, *g, *g_v, *sum_decay, *sum_gain;              // [step], and at least a kQkRow
  A *tmp[2], *s[2], *potentials[2], *sg, *g_s, *out;  // tiles

  static int64_t most(int64_t x, int64_t y) { return x > y ? x : y; }
  static int64_t least(int64_t x, int64_t y) { return x < y ? x : y; }

  explicit Walk(const QkShape& shape)
      : shape(shape),
        stream(shape.T * shape.B * shape.H * shape.R * shape.L * int64_t(sizeof(T)) >= kStreamBytes),
        times(shape.currents ? shape.T : 1),
        step(16 + most(kQkTile, kTileSize / times / 16 * 16)) {
    const int64_t size = 5 * shape.T * kQkRow + times * 16 * kQkRows + 5 * step + 9 * times * step;
    base = static_cast<A*>(aligned_alloc(64, size_t(size * int64_t(sizeof(A)) + 63) / 64 * 64));
    A** const rows[] = {&in, &a, &h, &g_a, &attn_sg};
    A** const steps[] = {&v, &g, &g_v, &sum_decay, &sum_gain};
    A** const tiles[] = {tmp, tmp + 1, s, s + 1, potentials, potentials + 1, &sg, &g_s, &out};
    for (A** x : rows) *x = take(shape.T * kQkRow);
    for (A** x : steps) *x = take(step);
    lanes = take(times * 16 * kQkRows);
    for (A** x : tiles) *x = take(times * step);
  }
  ~Walk() { free(base); }
  A* take(int64_t size) { return base + (used += size) - size; }

  // Calls f(place) for each tile of a part. All time steps are in one tile where neurons carry a potential from one to the
  // next, else one after the other, so that memory is walked in its order.
  template <class F>
  void over_tiles(const QkPart& part, F f) const {
    const int64_t width = least(part.l1 - part.l0, kQkTile);
    int64_t rows = least((step - 16) / width, kQkRows);
    rows -= rows > 16 ? rows % 16 : rows > 4 ? rows % 4 : 0;  // of some length: whole cache lines
    const auto sized = [&](Place& p) {
      p.t1 = p.t0 + times;
      p.rows = int(least(rows, part.r1 - p.r));
      p.n = int(least(width, part.l1 - p.l));
    };
    Place p{0, 0, part.r0, part.l0, 0, 0, nullptr};
    sized(p);
    for (bool more = true; more;) {
      Place next = p;
      if ((next.l += width) >= part.l1) next.l = part.l0, next.r += rows;
      if (next.r >= part.r1) next.r = part.r0, next.t0 += times;
      more = next.t0 < shape.T;
      sized(next);
      p.next = more ? &next : nullptr;
      f(p);
      p = next;
    }
  }

  void fetch(const QkIn& x, const QkPart& part, const Place& p) const {
    const T* const from = part.at<const T>(x, p.t0, p.r, p.l);
    const bool one = x.r == p.n;
    const int n = one ? p.rows * p.n : p.n;
    for (int64_t t = 0; t < times; ++t)
      for (int r = 0; r < (one ? 1 : p.rows); ++r)
        for (int i = 0; i < n; i += int(64 / sizeof(T))) __builtin_prefetch(from + t * x.t + r * x.r + i);
  }
  // What an operand holds, in place or in `space`.
  Tile<A> read(const QkIn& x, const QkPart& part, const Place& p, A* space) const {
    const T* const from = part.at<const T>(x, p.t0, p.r, p.l);
    if (p.next && !shape.currents) fetch(x, part, *p.next);
    if constexpr (kSame<T, A>) {
      return {from, x.t, x.r};
    } else {
      for (int64_t t = 0; t < times; ++t)
        for (int r = 0; r < p.rows; ++r) load_row(space + t * step + r * p.n, from + t * x.t + r * x.r, p.n);
      return {space, step, p.n};
    }
  }
  // The spikes that an operand holds, or those that its currents cause (then with their potentials in h, or null).
  Tile<A> spikes(const QkIn& x, const Lif<A>& neuron, const QkPart& part, const Place& p, A* space, A* h) const {
    if (!shape.currents) return read(x, part, p, space);
    const Tile<A> in = read(x, part, p, tmp[0]);
    const bool one = in.r == p.n;
    for (int r = 0; r < (one ? 1 : p.rows); ++r) {
      const int64_t first = r * p.n;
      fire(neuron, in.data + r * in.r, in.t, v, space + first, h ? h + first : nullptr, step, shape.T, one ? p.rows * p.n : p.n);
    }
    return {space, step, p.n};
  }

  // d += or, for neurons of rows, what is known of d after a part of their columns: the sum of x (or x * y).
  template <bool COLUMNS, bool PRODUCT>
  void add(A* d, const Tile<A>& x, const Tile<A>& y, const QkPart& part, const Place& p) {
    for (int64_t t = p.t0; t < p.t1; ++t) {
      const A *const xt = x.at(t - p.t0), *const yt = PRODUCT ? y.at(t - p.t0) : nullptr;
      if constexpr (COLUMNS) {
        add_columns<PRODUCT>(d + t * kQkRow, xt, x.r, yt, y.r, p.rows, p.n);
      } else {
        A* const here = lanes + (t - p.t0) * 16 * kQkRows;
        if (p.l == part.l0) fill_row(here, A(0), (p.rows + 15) / 16 * 256);
        add_lanes<PRODUCT>(here, xt, x.r, yt, y.r, p.rows, p.n);
        for (int r = 0; p.l + p.n == part.l1 && r < p.rows; r += 16) sum16(d + t * kQkRow + (p.r - part.r0) + r, here + r * 16);
      }
    }
  }
  template <bool COLUMNS>
  void clear(A* d, const QkPart& part) const {
    for (int64_t t = 0; t < shape.T; ++t) fill_row(d + t * kQkRow, A(0), COLUMNS ? part.neurons() : 0);
  }
  // As scale_rows wants its factors.
  template <bool COLUMNS>
  void repeat(A* d, const QkPart& part) const {
    for (int64_t t = 0; COLUMNS && t < shape.T; ++t)
      for (int i = 0, n = part.neurons(); i < 16; ++i) d[t * kQkRow + n + i] = d[t * kQkRow + i % n];
  }

  // The attention neurons' input, into `in`.
  template <bool COLUMNS>
  void sum(const QkIn& x, const QkIn& w, const Lif<A>& neuron, const QkPart& part) {
    clear<COLUMNS>(in, part);
    over_tiles(part, [&](const Place& p) {
      const Tile<A> sx = spikes(x, neuron, part, p, s[0], nullptr);
      if (w.data)
        add<COLUMNS, true>(in, sx, spikes(w, neuron, part, p, s[1], nullptr), part, p);
      else
        add<COLUMNS, false>(in, sx, sx, part, p);
    });
  }

  // Rows of an output: those of `row` in turn.
  void write(const QkOut& to, const QkPart& part, int64_t t, const Place& p, const A* row) const {
    T* d = part.at<T>(to, t, p.r, p.l);
    const bool one = to.r == p.n;
    const int n = one ? p.rows * p.n : p.n;
    for (int r = 0; r < (one ? 1 : p.rows); ++r, d += to.r, row += n) stream ? commit_row(d, row, true, n) : store_row(d, row, n);
  }

  template <bool COLUMNS, bool STREAM>
  static void scale(A* d, int64_t d_r, const A* f, const A* x, int64_t x_r, const Place& p) {
    x ? scale_rows<COLUMNS, true, STREAM>(d, d_r, f, x, x_r, p.rows, p.n)
      : scale_rows<COLUMNS, false, STREAM>(d, d_r, f, x, x_r, p.rows, p.n);
  }
  template <bool COLUMNS>
  const A* factors(const A* f, const QkPart& part, const Place& p, int64_t t) const {
    return f + t * kQkRow + (COLUMNS ? 0 : p.r - part.r0);
  }

  // An output: f * x, or f alone.
  template <bool COLUMNS>
  void scaled(const QkOut& to, const A* f, const Tile<A>* x, const QkPart& part, const Place& p) const {
    constexpr int64_t kLine = 64 / sizeof(A);
    for (int64_t t = p.t0; t < p.t1; ++t) {
      const A *const ft = factors<COLUMNS>(f, part, p, t), *const xt = x ? x->at(t - p.t0) : nullptr;
      if constexpr (kSame<T, A>) {
        T* const d = part.at<T>(to, t, p.r, p.l);
        const bool lines = reinterpret_cast<uintptr_t>(d) % 64 == 0 && to.r % kLine == 0 && p.n % kLine == 0;
        if (stream && (lines || (to.r == p.n && (!x || x->r == p.n))))
          scale<COLUMNS, true>(d, to.r, ft, xt, x ? x->r : 0, p);
        else
          scale<COLUMNS, false>(d, to.r, ft, xt, x ? x->r : 0, p);
      } else {
        scale<COLUMNS, false>(out, p.n, ft, xt, x ? x->r : 0, p);
        write(to, part, t, p, out);
      }
    }
  }

  // From gradients of n neurons' spikes (g_s) to those of their inputs, in place; rows of a time step `t` apart. Sums for
  // decay and gain are added to the two numbers at `sums`, where it is not null; gains(t) then adds g * input.
  template <class Gains>
  void back(const Lif<A>& neuron, const A* h, A* sg, A* g_s, int64_t t, int n, double* sums, Gains gains) {
    fill_row(g_v, A(0), n);
    if (sums) {
      fill_row(sum_decay, A(0), n);
      fill_row(sum_gain, A(0), n);
    }
    for (int64_t i = 0; i < shape.T; ++i) slopes(neuron, h + i * t, sg + i * t, n);
    for (int64_t i = shape.T; i > 0;) {
      if (!sums && i >= kSteps) {
        i -= kSteps;
        back_steps<kSteps>(neuron, h + i * t, sg + i * t, g_s + i * t, t, g_v, g, n);
        continue;
      }
      --i;
      back_steps<1>(neuron, h + i * t, sg + i * t, g_s + i * t, t, g_v, g, n);
      if (!sums) continue;
      gains(i);
      if (i > 0) add_decay(sum_decay, g, h + (i - 1) * t, neuron.hard, neuron.c, n);  // v[-1] is at rest
    }
    if (sums) {
      sums[0] += total(sum_decay, n);
      sums[1] += total(sum_gain, n);
    }
  }

  // Whether currents' gradients need no potentials of before.
  bool at_once(const Lif<A>& neuron, const double* sums) const {
    return shape.T == kSteps && neuron.c.rest == 0 && !sums && sizeof(A) == 4;
  }
  // Gradient of an operand, whose spikes have the gradient f * x, or f alone. That of a current goes on through its
  // neurons, whose potentials h are given.
  template <bool COLUMNS>
  void spread(const QkIn& from, const QkOut& to, const A* f, const Tile<A>* x, const A* h, const Lif<A>& neuron, double* sums,
              const QkPart& part, const Place& p) {
    if (!shape.currents) return scaled<COLUMNS>(to, f, x, part, p);
    for (int64_t t = 0; t < shape.T; ++t)
      scale<COLUMNS, false>(g_s + t * step, p.n, factors<COLUMNS>(f, part, p, t), x ? x->at(t) : nullptr, x ? x->r : 0, p);
    const Tile<A> in = sums ? read(from, part, p, tmp[1]) : Tile<A>{};
    back(neuron, h, sg, g_s, step, p.rows * p.n, sums, [&](int64_t t) {
      for (int r = 0; r < p.rows; ++r) add_gain(sum_gain + r * p.n, g + r * p.n, in.at(t) + r * in.r, p.n);
    });
    for (int64_t t = 0; t < shape.T; ++t) write(to, part, t, p, g_s + t * step);
  }
  // The same in one go from the currents, where that can be; spikes * x into `products`, unless null.
  template <bool COLUMNS>
  void spread_at_once(const QkIn& from, const QkOut& to, const A* f, const Tile<A>* x, A* products, const Lif<A>& neuron,
                      const QkPart& part, const Place& p) {
    const Tile<A> in = read(from, part, p, tmp[1]);
    const bool one = in.r == p.n && (!x || x->r == p.n);
    A* const all = out;  // f for every element, [T, rows, n]
    for (int64_t t = 0; t < shape.T; ++t)
      scale<COLUMNS, false>(all + t * step, p.n, factors<COLUMNS>(f, part, p, t), nullptr, 0, p);
    for (int r = 0; r < (one ? 1 : p.rows); ++r) {
      const int64_t first = r * p.n;
      there_and_back(neuron, in.data + r * in.r, in.t, all + first, x ? x->data + r * x->r : nullptr, x ? x->t : 0, g_s + first,
                     products ? products + first : nullptr, step, one ? p.rows * p.n : p.n);
    }
    for (int64_t t = 0; t < shape.T; ++t) write(to, part, t, p, g_s + t * step);
  }
};

template <bool COLUMNS, class T, class A>
int forward(const QkFwd& p, int64_t begin, int64_t end) {
  Walk<T, A> walk(p.shape);
  if (!walk.base) return kOutOfMemory;
  for (int64_t index = begin; index < end; ++index) {
    const QkPart part(p.shape, p.out, index);
    const Lif<A> attn(p.attn, part.h), qkv(p.qkv, part.h);
    walk.template sum<COLUMNS>(p.s, p.w, qkv, part);
    fire(attn, walk.in, kQkRow, walk.v, walk.a, static_cast<A*>(nullptr), kQkRow, p.shape.T, part.neurons());
    walk.template repeat<COLUMNS>(walk.a, part);
    walk.over_tiles(part, [&](const Place& at) {
      const Tile<A> y = walk.spikes(p.y, qkv, part, at, walk.s[0], nullptr);
      walk.template scaled<COLUMNS>(p.out, walk.a, &y, part, at);
    });
  }
  if (walk.stream) stream_fence();
  return kOk;
}

template <bool COLUMNS, class T, class A>
int backward(const QkBwd& p, int64_t begin, int64_t end) {
  const QkShape& shape = p.shape;
  Walk<T, A> walk(shape);
  if (!walk.base) return kOutOfMemory;
  const int64_t all = shape.B * shape.H * qk_parts(shape);
  for (int64_t index = begin; index < end; ++index) {
    const QkPart part(shape, p.g_y, index);
    const Lif<A> attn(p.attn, part.h), qkv(p.qkv, part.h);
    const int neurons = part.neurons();
    double sums[4] = {};
    double *const attn_sums = p.sums ? sums + kAttnDecay : nullptr, *const qkv_sums =
                                                                        p.sums && shape.currents ? sums + kQkvDecay : nullptr;
    const bool at_once = shape.currents && walk.at_once(qkv, qkv_sums), stored = shape.currents && !at_once;
    A *const h = stored ? walk.potentials[0] : nullptr, *const h_w = stored ? walk.potentials[1] : nullptr;

    walk.template sum<COLUMNS>(p.s, p.w, qkv, part);
    fire(attn, walk.in, kQkRow, walk.v, walk.a, walk.h, kQkRow, shape.T, neurons);
    walk.template repeat<COLUMNS>(walk.a, part);
    walk.template clear<COLUMNS>(walk.g_a, part);
    walk.over_tiles(part, [&](const Place& at) {
      const Tile<A> g_out = walk.read(p.g_out, part, at, walk.s[1]);
      if (at_once) {
        const Tile<A> products{walk.s[0], walk.step, at.n};
        walk.template spread_at_once<COLUMNS>(p.y, p.g_y, walk.a, &g_out, walk.s[0], qkv, part, at);
        return walk.template add<COLUMNS, false>(walk.g_a, products, products, part, at);
      }
      const Tile<A> y = walk.spikes(p.y, qkv, part, at, walk.s[0], h);
      walk.template spread<COLUMNS>(p.y, p.g_y, walk.a, &g_out, h, qkv, qkv_sums, part, at);
      walk.template add<COLUMNS, true>(walk.g_a, g_out, y, part, at);
    });

    walk.back(attn, walk.h, walk.attn_sg, walk.g_a, kQkRow, neurons, attn_sums,
              [&](int64_t t) { add_gain(walk.sum_gain, walk.g, walk.in + t * kQkRow, neurons); });
    walk.template repeat<COLUMNS>(walk.g_a, part);
    walk.over_tiles(part, [&](const Place& at) {
      Tile<A> s{}, w{};
      const bool two = p.w.data != nullptr;
      if (at_once && !two) return walk.template spread_at_once<COLUMNS>(p.s, p.g_s, walk.g_a, nullptr, nullptr, qkv, part, at);
      if (two || stored) s = walk.spikes(p.s, qkv, part, at, walk.s[0], h);
      if (two) w = walk.spikes(p.w, qkv, part, at, walk.s[1], h_w);
      if (at_once) {
        walk.template spread_at_once<COLUMNS>(p.s, p.g_s, walk.g_a, &w, nullptr, qkv, part, at);
        return walk.template spread_at_once<COLUMNS>(p.w, p.g_w, walk.g_a, &s, nullptr, qkv, part, at);
      }
      walk.template spread<COLUMNS>(p.s, p.g_s, walk.g_a, two ? &w : nullptr, h, qkv, qkv_sums, part, at);
      if (two) walk.template spread<COLUMNS>(p.w, p.g_w, walk.g_a, &s, h_w, qkv, qkv_sums, part, at);
    });
    for (int i = 0; p.sums && i < 4; ++i) p.sums[i * all + part.index] = sums[i];
  }
  if (walk.stream) stream_fence();
  return kOk;
}

template <class T, class A>
int forward_of(const QkFwd& p, int64_t begin, int64_t end) {
  return p.shape.columns ? forward<true, T, A>(p, begin, end) : forward<false, T, A>(p, begin, end);
}
template <class T, class A>
int backward_of(const QkBwd& p, int64_t begin, int64_t end) {
  return p.shape.columns ? backward<true, T, A>(p, begin, end) : backward<false, T, A>(p, begin, end);
}

}  // namespace

int qk_fwd(const QkFwd& p, int64_t begin, int64_t end) {
  if (p.packed) return packed_forward(p, begin, end);
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
