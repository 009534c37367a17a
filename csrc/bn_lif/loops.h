// Row loops of bn_lif: time steps of a row of neurons, from x through batch norm, residual and neuron, and back.
#pragma once
#include "bn_lif/norm.h"
#include "core/surrogate.h"
#include "lif/rows.h"

namespace spk {
namespace SPK_ISA {
namespace {

constexpr int kUnroll = kLifUnroll;

// Constants of the neurons side by side, a row of each.
template <class A>
struct Constants {
  const A *mean, *scale, *bias, *decay, *gain;
  Constants at(int64_t i) const { return {mean + i, scale + i, bias + i, decay + i, gain + i}; }
};

// Rows of kUnroll time steps, or of fewer.
template <class A>
struct Rows {
  const A *x[kUnroll], *residual[kUnroll];
  A *s[kUnroll], *y[kUnroll], *h;  // h: of a single step
};

// R time steps: the potentials pass through registers from `from` to `to` (which may be the same row). S, Y, H: what is
// wanted. down: see `direction`.
template <bool HARD, bool AT_ZERO, bool RESIDUAL, bool S, bool Y, bool H, int R, class A>
SPK_NOINLINE void steps(const Rows<A>& rows, const A* from, A* to, const Constants<A>& constants, const Neuron<A> c, int n,
                        bool down) {
  const Constants<A> k = constants;
  const A *xr[R], *rr[R];
  A *sr[R], *yr[R], *const hr = rows.h;
  for (int r = 0; r < R; ++r) xr[r] = rows.x[r], rr[r] = rows.residual[r], sr[r] = rows.s[r], yr[r] = rows.y[r];
  const int64_t away = down ? -kFetch : kFetch;
  by_lines<A>(
      n, down,
      [&](int64_t first, int lane, auto) {
        const int64_t i = first + lane;
        A v = from[i], y[R];
        const A mean = k.mean[i], scale = k.scale[i], bias = k.bias[i], decay = k.decay[i], gain = k.gain[i];
        for (int r = 0; r < R; ++r) y[r] = normalise(xr[r][i], mean, scale, bias);
        if (RESIDUAL)
          for (int r = 0; r < R; ++r) y[r] = y[r] + rr[r][i];
        for (int r = 0; r < R; ++r) {
          const A h = charge(v, y[r], decay, gain, AT_ZERO ? A(0) : c.rest);
          if (Y) yr[r][i] = y[r];
          if (H) hr[i] = h;
          if (S) sr[r][i] = h >= c.fire_at ? A(1) : A(0);
          v = reset(h, HARD, c);
        }
        to[i] = v;
      },
      [&](int64_t i) {
        for (int r = 0; r < R; ++r) __builtin_prefetch(reinterpret_cast<const char*>(xr[r] + i) + away);
      });
}

template <class A>
using Steps = void(const Rows<A>& rows, const A* from, A* to, const Constants<A>& constants, Neuron<A> c, int n, bool down);

template <bool S, bool Y, bool H, int R, class A>
Steps<A>* steps_of(const LifNeuron& p, bool residual) {
  if (!p.hard) return residual ? steps<false, true, true, S, Y, H, R, A> : steps<false, true, false, S, Y, H, R, A>;  // rests at 0
  if (p.rest != 0) return residual ? steps<true, false, true, S, Y, H, R, A> : steps<true, false, false, S, Y, H, R, A>;
  return residual ? steps<true, true, true, S, Y, H, R, A> : steps<true, true, false, S, Y, H, R, A>;
}

// What backward reads and leaves beside its Rows.
template <class A>
struct BackRows {
  const A *start, *g_s[kUnroll], *g_y[kUnroll];
  A *g_v, *g[kUnroll];
  double *sum, *product;  // of g and of g * (x - mean), of each neuron
};

// Back through kUnroll time steps at once, potentials recomputed from those of `start`. g_v comes in as the gradient of
// the last v and goes out as that of `start`. MORE: residual and g_y are there (a row of zeros for one of them if not).
template <bool HARD, bool AT_ZERO, bool DETACH, bool MORE, Surrogate K, class A>
SPK_NOINLINE void steps_back(const Rows<A>& rows, const BackRows<A>& back, const Constants<A>& constants, const Neuron<A> neuron,
                             A a, A b, int n, bool down) {
  const Neuron<A> c = {AT_ZERO ? A(0) : neuron.rest, neuron.fire_at, neuron.threshold, neuron.reset_by};
  const Constants<A> k = constants;
  const BackRows<A> to = back;
  const A *xr[kUnroll], *rr[kUnroll];
  for (int r = 0; r < kUnroll; ++r) xr[r] = rows.x[r], rr[r] = rows.residual[r];
  const int64_t away = down ? -kFetch : kFetch;
  by_lines<A>(
      n, down,
      [&](int64_t first, int lane, auto) {
        const int64_t i = first + lane;
        A v = to.start[i], g = to.g_v[i], x[kUnroll], y[kUnroll], h[kUnroll], sg[kUnroll], gi[kUnroll];
        const A mean = k.mean[i], scale = k.scale[i], bias = k.bias[i], decay = k.decay[i], gain = k.gain[i];
        for (int r = 0; r < kUnroll; ++r) {
          x[r] = xr[r][i];
          gi[r] = to.g_s[r][i];
        }
        for (int r = 0; r < kUnroll; ++r) {
          y[r] = normalise(x[r], mean, scale, bias);
          if (MORE) y[r] = y[r] + rr[r][i];
        }
        for (int r = 0; r < kUnroll; ++r) {
          h[r] = charge(v, y[r], decay, gain, c.rest);
          v = reset(h[r], HARD, c);
          sg[r] = surrogate<K, A>(h[r] - c.threshold, a, b);
        }
        for (int r = kUnroll - 1; r >= 0; --r) {
          const A gh = step_backward<false>(h[r], gi[r], g, A(0), sg[r], HARD, DETACH, c);
          gi[r] = gain * gh;
          if (MORE) gi[r] = gi[r] + to.g_y[r][i];
          g = decay * gh;
        }
        double sum = 0, product = 0;
        for (int r = 0; r < kUnroll; ++r) {
          sum += double(gi[r]);
          product += double(gi[r] * (x[r] - mean));
          to.g[r][i] = gi[r];
        }
        to.sum[i] += sum;
        to.product[i] += product;
        to.g_v[i] = g;
      },
      [&](int64_t i) {
        for (int r = 0; r < kUnroll; ++r) {
          __builtin_prefetch(reinterpret_cast<const char*>(xr[r] + i) + away);
          __builtin_prefetch(reinterpret_cast<const char*>(to.g_s[r] + i) + away);
        }
      });
}

template <class A>
using StepsBack = void(const Rows<A>& rows, const BackRows<A>& back, const Constants<A>& constants, Neuron<A> c, A a, A b, int n,
                       bool down);

template <bool HARD, bool AT_ZERO, bool DETACH, bool MORE, class A>
StepsBack<A>* steps_back_of(int kind) {
#define SPK_BACK(K) steps_back<HARD, AT_ZERO, DETACH, MORE, Surrogate::K, A>
  switch (static_cast<Surrogate>(kind)) {
    case Surrogate::atan: return SPK_BACK(atan);
    case Surrogate::sigmoid: return SPK_BACK(sigmoid);
    case Surrogate::rectangle: return SPK_BACK(rectangle);
    case Surrogate::triangle: return SPK_BACK(triangle);
    case Surrogate::fast_sigmoid: return SPK_BACK(fast_sigmoid);
    case Surrogate::erf: return SPK_BACK(erf);
    default: return SPK_BACK(leaky_relu);
  }
#undef SPK_BACK
}
template <bool HARD, bool AT_ZERO, class A>
StepsBack<A>* steps_back_of(bool detach, bool more, int kind) {
  if (detach) return more ? steps_back_of<HARD, AT_ZERO, true, true, A>(kind) : steps_back_of<HARD, AT_ZERO, true, false, A>(kind);
  return more ? steps_back_of<HARD, AT_ZERO, false, true, A>(kind) : steps_back_of<HARD, AT_ZERO, false, false, A>(kind);
}
template <class A>
StepsBack<A>* steps_back_of(const LifNeuron& p, bool detach, bool more, int kind) {
  if (!p.hard) return steps_back_of<false, true, A>(detach, more, kind);
  return p.rest == 0 ? steps_back_of<true, true, A>(detach, more, kind) : steps_back_of<true, false, A>(detach, more, kind);
}

// g_x from g (which may be the same row), where the statistics are those of x.
template <class A>
SPK_NOINLINE void normalise_back_row(A* g_x, const A* g, const A* x, const A* mean, const A* scale, const A* g_mean, const A* slope,
                                     int n) {
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) g_x[i] = normalise_backward(g[i], x[i], mean[i], scale[i], g_mean[i], slope[i]);
}
template <class A>
SPK_NOINLINE void scale_row(A* d, const A* s, const A* scale, int n) {
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) d[i] = scale[i] * s[i];
}
// sum += g, product += g * (x - centre), each number in a place of its own.
template <class A>
SPK_NOINLINE void add_products(double* __restrict__ sum, double* __restrict__ product, const A* __restrict__ g,
                               const A* __restrict__ x, const A* __restrict__ centre, int n) {
  for (int i = 0; i < n; ++i) {
    sum[i] += double(g[i]);
    product[i] += double(g[i] * (x[i] - centre[i]));
  }
}

}  // namespace
}  // namespace SPK_ISA
}  // namespace spk
