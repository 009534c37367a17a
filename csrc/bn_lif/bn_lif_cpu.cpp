// bn_lif on the CPU; compiled once per instruction set (core/dispatch.h). A tile of neurons is normalised a few time steps
// at a time into rows in L1, which lif's own loops then read. Maps are worked on channel by channel: the second pass over a
// channel, after its statistics or sums, finds it in L2.
#include "bn_lif/bn_lif.h"
#include "bn_lif/norm.h"
#include "bn_lif/units.h"
#include "core/simd.h"
#include "lif/rows.h"

namespace spk {
namespace SPK_ISA {
namespace {

constexpr int64_t kStreamBytes = 8 << 20;  // output sequences from this size on bypass the caches
constexpr int kStreamTile = 128;           // neurons between two bursts of streamed stores
constexpr int kUnroll = kLifUnroll;
constexpr int kTileRow = kBnTile + 16;  // keeps the rows out of each other's cache sets

// ---- rows -----------------------------------------------------------------------------------------------------------

template <class A>
SPK_NOINLINE void normalise_row(A* __restrict__ y, const A* __restrict__ x, const A* __restrict__ mean, const A* __restrict__ scale,
                                const A* __restrict__ bias, int n) {
  for (int i = 0; i < n; ++i) y[i] = normalise(x[i], mean[i], scale[i], bias[i]);
}
template <class A>
SPK_NOINLINE void normalise_back_row(A* g_x, const A* g, const A* x, const A* mean, const A* scale, const A* g_mean, const A* slope,
                                     int n) {
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) g_x[i] = normalise_backward(g[i], x[i], mean[i], scale[i], g_mean[i], slope[i]);
}
template <class A>
SPK_NOINLINE void scale_row(A* __restrict__ d, const A* __restrict__ s, const A* __restrict__ scale, int n) {
  for (int i = 0; i < n; ++i) d[i] = scale[i] * s[i];
}

// ---- constants of the neurons side by side, a row of each ------------------------------------------------------------

template <class A>
struct Constants {
  const A *mean, *scale, *bias, *decay, *gain;
  Constants at(int64_t i) const { return {mean + i, scale + i, bias + i, decay + i, gain + i}; }
};

template <class A>
A of_channel(const void* values, int64_t c, A number) {
  return values ? static_cast<const A*>(values)[c] : number;
}
template <class A>
A scale_of(const BnNorm& p, int64_t c) {
  return of_channel(p.weight, c, A(1)) * inverse_std(static_cast<const A*>(p.var)[c], p.eps);
}

template <class A>
Constants<A> write_constants(const Unit& unit, const BnNorm& norm, const LifNeuron& p, A* rows) {
  const int64_t row = unit.row();
  unit.stretches([&](int64_t at, int n, int64_t c) {
    const A values[] = {static_cast<const A*>(norm.mean)[c], scale_of<A>(norm, c), of_channel(norm.bias, c, A(0)),
                        of_channel(p.decay_c, c, A(p.decay)), of_channel(p.gain_c, c, A(p.gain))};
    for (int k = 0; k < 5; ++k) fill_row(rows + k * row + at, values[k], n);
  });
  return {rows, rows + row, rows + 2 * row, rows + 3 * row, rows + 4 * row};
}

double count_of(const BnShape& s) { return double(s.T) * double(s.N / s.C); }

// ---- statistics ------------------------------------------------------------------------------------------------------

// k of channel c: its first number, or the mean found before.
template <class T, class A>
A centre_of(const BnStats& p, int64_t c) {
  if (p.again) return static_cast<const A*>(p.mean)[c];
  A tmp;
  return *state_row(&tmp, static_cast<const T*>(p.x) + c * p.shape.inner, 1);
}

template <class T, class A>
void set_moments(const BnStats& p, int64_t c, const double* sums) {
  double mean, var;
  moments(double(centre_of<T, A>(p, c)), sums[0], sums[1], count_of(p.shape), &mean, &var);
  static_cast<A*>(p.mean)[c] = A(mean);
  static_cast<A*>(p.var)[c] = A(var);
}

// Sums over all the unit's numbers; k: room for a row of constants.
template <class T, class A>
void sum_moments(const BnStats& p, const Unit& unit, const Sums& sums, A* k) {
  alignas(64) A tmp[kTileRow];
  unit.stretches([&](int64_t at, int n, int64_t c) { fill_row(k + at, centre_of<T, A>(p, c), n); });
  for (int64_t i = 0; i < unit.tiles; ++i) {
    const Tile tile = unit[i];
    for (int64_t t = 0; t < p.shape.T; ++t)
      sums.moments_of(tile, state_row(tmp, static_cast<const T*>(p.x) + t * p.x_step + tile.first, tile.n), k);
  }
}

template <class T, class A>
int stats(const BnStats& p, int64_t begin, int64_t end) {
  for (int64_t u = begin; u < end; ++u) {
    const Unit unit(p.shape, u);
    const Sums sums(unit, 2);
    const Memory<A> k(unit.row());
    if (!sums.places.data || !k.data) return kOutOfMemory;
    sum_moments<T>(p, unit, sums, k.data);
    sums.finish([&](int64_t c, const double* total) {
      for (int kind = 0; kind < 2; ++kind) p.sums[(kind * p.parts + u) * p.shape.C + c] = total[kind];
    });
  }
  return kOk;
}

void add_parts(double* total, const double* sums, int kinds, int64_t parts, int64_t C, int64_t c) {
  for (int kind = 0; kind < kinds; ++kind) {
    total[kind] = 0;
    for (int64_t part = 0; part < parts; ++part) total[kind] += sums[(kind * parts + part) * C + c];
  }
}

template <class T, class A>
int stats_finish(const BnStats& p, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; ++c) {
    double total[2];
    add_parts(total, p.sums, 2, p.parts, p.shape.C, c);
    set_moments<T, A>(p, c, total);
  }
  return kOk;
}

// ---- forward and backward --------------------------------------------------------------------------------------------

// The currents of a few time steps, row by row.
template <class T, class A, class Params>
struct Currents {
  const Params& p;
  alignas(64) A x_tmp[kUnroll][kTileRow], y_tmp[kUnroll][kTileRow], r_tmp[kTileRow];
  const A *x[kUnroll], *y[kUnroll];

  explicit Currents(const Params& p) : p(p) {}
  void read(int64_t t, int steps, int64_t first, int n, const Constants<A>& k) {
    for (int r = 0; r < steps; ++r) {
      x[r] = state_row(x_tmp[r], static_cast<const T*>(p.x) + (t + r) * p.x_step + first, n);
      y[r] = y_tmp[r];
      normalise_row(y_tmp[r], x[r], k.mean, k.scale, k.bias, n);
      if (p.residual) add_row(y_tmp[r], state_row(r_tmp, static_cast<const T*>(p.residual) + (t + r) * p.r_step + first, n), n);
    }
  }
};

template <class A>
void start_row(A* v, const void* v_init, int64_t first, A rest, int n) {
  if (v_init)
    load_row(v, static_cast<const A*>(v_init) + first, n);
  else
    fill_row(v, rest, n);
}

template <class T, class A>
int forward(const BnLifFwd& p, int64_t begin, int64_t end) {
  const BnShape& s = p.shape;
  const bool stream = s.T * s.N * int64_t(sizeof(T)) >= kStreamBytes;
  const LifRows<A> loops = lif_rows(p.neuron, true, 0, A(0));
  const Neuron<A> c = constants<A>(p.neuron);
  Currents<T, A, BnLifFwd> currents(p);
  alignas(64) A v[kTileRow], h[kTileRow], s_tmp[kUnroll][kTileRow];
  const Memory<A> rows(5 * Unit(s, 0).row());
  if (!rows.data) return kOutOfMemory;
  Constants<A> table;
  for (int64_t u = begin; u < end; ++u) {
    const Unit unit(s, u);
    if (p.take_stats) {
      BnStats of{s, p.x_step, p.x, p.norm.mean, p.norm.var, nullptr, 0, false};
      if (p.x_step == 0) of.shape.T = 1;
      for (int pass = 0; pass < (sizeof(A) == 8 ? 2 : 1); ++pass) {
        of.again = pass > 0;
        const Sums sums(unit, 2);
        if (!sums.places.data) return kOutOfMemory;
        sum_moments<T>(of, unit, sums, rows.data);
        sums.finish([&](int64_t c, const double* total) { set_moments<T, A>(of, c, total); });
      }
    }
    if (unit.maps || u == begin) table = write_constants(unit, p.norm, p.neuron, rows.data);
    for (int64_t i = unit.tiles - 1; i >= 0; --i) {  // what statistics saw last may still be near
      const Tile tile = unit[i];
      const int most = stream ? kStreamTile : kBnTile;
      for (int j = 0; j < tile.n; j += most) {
        const int n = tile.n - j < most ? tile.n - j : most;
        const int64_t first = tile.first + j;
        const Constants<A> k = table.at(tile.at + j);
        start_row(v, p.v_init, first, c.rest, n);
        for (int64_t t = 0; t < s.T;) {
          const int steps = s.T - t >= kUnroll ? kUnroll : 1;
          currents.read(t, steps, first, n, k);
          T* const out = static_cast<T*>(p.s) + t * s.N + first;
          A *fired[kUnroll], *potential = h;
          for (int r = 0; r < steps; ++r) {
            fired[r] = target_row(s_tmp[r], out + r * s.N, stream);
            if (p.y) store_row(static_cast<T*>(p.y) + (t + r) * s.N + first, currents.y_tmp[r], n);
          }
          (steps == 1 ? loops.spikes_h : loops.spikes)(currents.y, v, v, fired, &potential, k.decay, k.gain, c, n, false);
          for (int r = 0; r < steps; ++r) commit_row(out + r * s.N, fired[r], stream, n);
          t += steps;
        }
      }
    }
  }
  if (stream) stream_fence();
  return kOk;
}

template <class A>
void set_results(const BnLifBwd& p, int64_t c, const double* sums) {
  static_cast<A*>(p.g_bias)[c] = A(sums[kBnG]);
  static_cast<A*>(p.g_weight)[c] = A(sums[kBnGX] * double(inverse_std(static_cast<const A*>(p.norm.var)[c], p.norm.eps)));
  if (p.g_decay) static_cast<A*>(p.g_decay)[c] = A(sums[kBnDecay]);
  if (p.g_gain) static_cast<A*>(p.g_gain)[c] = A(sums[kBnGain]);
}

// g_x of a unit from g and the sums.
template <class T, class A>
void back_to_x(const BnLifBwd& p, const Unit& unit, A* rows, bool written) {
  const BnShape& s = p.shape;
  const bool stream = s.T * s.N * int64_t(sizeof(T)) >= kStreamBytes;
  const int64_t row = unit.row();
  alignas(64) A x_tmp[kTileRow], g_tmp[kTileRow], out_tmp[kTileRow];
  if (!written) {
    const double count = count_of(s);
    unit.stretches([&](int64_t at, int n, int64_t c) {
      const A inverse = inverse_std(static_cast<const A*>(p.norm.var)[c], p.norm.eps);
      const A values[] = {static_cast<const A*>(p.norm.mean)[c], scale_of<A>(p.norm, c),
                          A(double(static_cast<const A*>(p.g_bias)[c]) / count),
                          A(double(static_cast<const A*>(p.g_weight)[c]) * double(inverse) / count)};
      for (int k = 0; k < 4; ++k) fill_row(rows + k * row + at, values[k], n);
    });
  }
  for (int64_t i = unit.tiles - 1; i >= 0; --i) {
    const Tile tile = unit[i];
    const A* const k = rows + tile.at;
    for (int64_t t = s.T - 1; t >= 0; --t) {
      const A* x = state_row(x_tmp, static_cast<const T*>(p.x) + t * p.x_step + tile.first, tile.n);
      const A* g = state_row(g_tmp, static_cast<const T*>(p.g) + t * s.N + tile.first, tile.n);
      T* const out = static_cast<T*>(p.g_x) + t * s.N + tile.first;
      A* const g_x = target_row(out_tmp, out, stream);
      normalise_back_row(g_x, g, x, k, k + row, k + 2 * row, k + 3 * row, tile.n);
      commit_row(out, g_x, stream, tile.n);
    }
  }
}

template <class T, class A>
int backward(const BnLifBwd& p, int64_t begin, int64_t end) {
  const BnShape& s = p.shape;
  const LifRows<A> loops = lif_rows(p.neuron, p.detach, p.surrogate, A(0));
  const LifBack<A>& back = loops.back;
  const Neuron<A> c = constants<A>(p.neuron);
  const bool learnt = p.g_decay || p.g_gain;  // these need a row of every step
  Currents<T, A, BnLifBwd> currents(p);
  alignas(64) A zero[kTileRow], v[kTileRow], g_v[kTileRow], tmp[kTileRow], g_h[kTileRow];
  alignas(64) A h[kUnroll][kTileRow], gs_tmp[kUnroll][kTileRow], g[kUnroll][kTileRow];
  const int64_t blocks = (s.T + kUnroll - 1) / kUnroll;
  const Memory<A> rows(5 * Unit(s, 0).row()), starts(blocks * kTileRow);
  if (!rows.data || !starts.data) return kOutOfMemory;
  fill_row(zero, A(0), kTileRow);
  Constants<A> table;

  for (int64_t u = begin; u < end; ++u) {
    const Unit unit(s, u);
    const Sums sums(unit, learnt ? kBnSums + 1 : 2);
    if (!sums.places.data) return kOutOfMemory;
    if (unit.maps || u == begin) table = write_constants(unit, p.norm, p.neuron, rows.data);
    for (int64_t i = 0; i < unit.tiles; ++i) {
      const Tile tile = unit[i];
      const int n = tile.n;
      const Constants<A> k = table.at(tile.at);
      const auto start = [&](int64_t b) { return starts.data + b * kTileRow; };
      start_row(start(0), p.v_init, tile.first, c.rest, n);
      for (int64_t b = 0; b + 1 < blocks; ++b) {
        currents.read(b * kUnroll, kUnroll, tile.first, n, k);
        loops.advance(currents.y, start(b), start(b + 1), nullptr, nullptr, k.decay, k.gain, c, n, false);
      }
      fill_row(g_v, A(0), n);
      for (int64_t b = blocks - 1; b >= 0; --b) {
        const int64_t t0 = b * kUnroll;
        const int steps = int(s.T - t0 < kUnroll ? s.T - t0 : kUnroll);
        currents.read(t0, steps, tile.first, n, k);
        const auto in = [&](const void* data, int r) { return static_cast<const T*>(data) + (t0 + r) * s.N + tile.first; };
        const A* g_s[kUnroll];
        A* to[kUnroll];
        for (int r = 0; r < steps; ++r) {
          g_s[r] = p.g_s ? state_row(gs_tmp[r], in(p.g_s, r), n) : zero;
          to[r] = g[r];
        }
        if (learnt || steps < kUnroll) {
          load_row(v, start(b), n);
          for (int r = 0; r < steps; ++r) {
            A* potential = h[r];
            loops.advance_h(currents.y + r, v, v, nullptr, &potential, k.decay, k.gain, c, n, false);
          }
          for (int r = steps - 1; r >= 0; --r) {
            back.step(h[r], g_s[r], zero, g_v, g_h, g[r], k.decay, k.gain, c, A(p.a), A(p.b), n);
            if (!learnt) continue;
            if (r > 0) reset_row(v, h[r - 1], p.neuron.hard, c, n);  // v[t-1]
            fill_row(tmp, c.rest, n);
            // Of the sum and the product only the product is wanted; the place behind the others takes the sum.
            sums.products_of(tile, kBnSums, kBnDecay, g_h, r > 0 ? static_cast<const A*>(v) : start(b), tmp);
            sums.products_of(tile, kBnSums, kBnGain, g_h, currents.y[r], zero);
          }
        } else {
          back.steps(currents.y, start(b), g_s, g_v, to, k.decay, k.gain, c, A(p.a), A(p.b), n, false);
        }
        for (int r = 0; r < steps; ++r) {
          if (p.g_y) add_row(g[r], state_row(tmp, in(p.g_y, r), n), n);
          sums.products_of(tile, kBnG, kBnGX, g[r], currents.x[r], k.mean);
          const int64_t at = (t0 + r) * s.N + tile.first;
          if (p.g) store_row(static_cast<T*>(p.g) + at, g[r], n);
          if (p.batch) continue;
          scale_row(tmp, g[r], k.scale, n);
          store_row(static_cast<T*>(p.g_x) + at, tmp, n);
        }
      }
      if (p.g_v_init) store_row(static_cast<A*>(p.g_v_init) + tile.first, g_v, n);
    }
    sums.finish([&](int64_t ch, const double* total) {
      if (unit.maps) return set_results<A>(p, ch, total);
      for (int kind = 0; kind < sums.kinds && kind < kBnSums; ++kind) p.sums[(kind * p.parts + u) * s.C + ch] = total[kind];
    });
    if (unit.maps && p.batch) back_to_x<T>(p, unit, rows.data, false);
  }
  if (s.T * s.N * int64_t(sizeof(T)) >= kStreamBytes) stream_fence();
  return kOk;
}

template <class A>
int backward_finish(const BnLifBwd& p, int64_t begin, int64_t end) {
  for (int64_t c = begin; c < end; ++c) {
    double total[kBnSums];
    add_parts(total, p.sums, p.g_decay || p.g_gain ? kBnSums : 2, p.parts, p.shape.C, c);
    set_results<A>(p, c, total);
  }
  return kOk;
}

template <class T, class A>
int backward_x(const BnLifBwd& p, int64_t begin, int64_t end) {
  const Memory<A> rows(4 * Unit(p.shape, 0).row());
  if (!rows.data) return kOutOfMemory;
  for (int64_t u = end - 1; u >= begin; --u) back_to_x<T>(p, Unit(p.shape, u), rows.data, u != end - 1);
  stream_fence();
  return kOk;
}

}  // namespace

#define SPK_EACH_TYPE(F)                                    \
  switch (p.shape.dtype) {                                  \
    case DType::f32: return F<float, float>(p, begin, end); \
    case DType::bf16: return F<bf16, float>(p, begin, end); \
    case DType::f16: return F<f16, float>(p, begin, end);   \
    default: return F<double, double>(p, begin, end);       \
  }
int bn_stats(const BnStats& p, int64_t begin, int64_t end) { SPK_EACH_TYPE(stats) }
int bn_stats_finish(const BnStats& p, int64_t begin, int64_t end) { SPK_EACH_TYPE(stats_finish) }
int bn_lif_fwd(const BnLifFwd& p, int64_t begin, int64_t end) { SPK_EACH_TYPE(forward) }
int bn_lif_bwd(const BnLifBwd& p, int64_t begin, int64_t end) { SPK_EACH_TYPE(backward) }
int bn_lif_bwd_x(const BnLifBwd& p, int64_t begin, int64_t end) { SPK_EACH_TYPE(backward_x) }
int bn_lif_bwd_finish(const BnLifBwd& p, int64_t begin, int64_t end) {
  return p.shape.dtype == DType::f64 ? backward_finish<double>(p, begin, end) : backward_finish<float>(p, begin, end);
}

}  // namespace SPK_ISA

#ifdef SPK_DISPATCH
#define SPK_CHOOSE(fn, type)             \
  type* fn##_cpu() {                     \
    static type* const f = SPK_PICK(fn); \
    return f;                            \
  }
SPK_CHOOSE(bn_stats, BnStatsFn)
SPK_CHOOSE(bn_stats_finish, BnStatsFn)
SPK_CHOOSE(bn_lif_fwd, BnLifFwdFn)
SPK_CHOOSE(bn_lif_bwd, BnLifBwdFn)
SPK_CHOOSE(bn_lif_bwd_finish, BnLifBwdFn)
SPK_CHOOSE(bn_lif_bwd_x, BnLifBwdFn)
#endif

}  // namespace spk
