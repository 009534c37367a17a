// The scan's functions on packs of vectors, for the CPU kernels of both scans; scan.h's, by formulas with fewer instructions.
// Where r is small, exp(r) is (K + r) / (K - r) with K = r / tanh(r / 2), even in r: two terms less than a polynomial's
// six, and vectors are divided beside other work.
#pragma once
#include "core/lanes.h"
#include "selective_scan/scan.h"

namespace spk {
namespace SPK_ISA {

// Vector<A>::W < 4 only for double, and for float where there are no vectors.
template <class A>
constexpr int kPack = Vector<A>::W < 4 ? 16 : 4 * Vector<A>::W;  // numbers in a pack: whole rows of 16
template <class A>
using Packed = Pack<typename Vector<A>::type, kPack<A> / Vector<A>::W>;

template <int N>
SPK_HD Pack<floats, N> at_least(Pack<floats, N> x, float low) {
  for (int i = 0; i < N; ++i) x.v[i] = max_(x.v[i], floats{} + low);
  return x;
}
template <int N>
SPK_HD Pack<floats, N> at_most(Pack<floats, N> x, float high) {
  for (int i = 0; i < N; ++i) x.v[i] = min_(x.v[i], floats{} + high);
  return x;
}
// p 2^n, n being the integer in the low bits of m.
template <int N>
SPK_HD Pack<floats, N> times_power(Pack<floats, N> p, const Pack<floats, N>& m) {
  for (int i = 0; i < N; ++i) p.v[i] = bit_cast<floats>(bit_cast<ints>(p.v[i]) + (bit_cast<ints>(m.v[i]) << 23));
  return p;
}
SPK_HD floats largest(floats x, floats y) { return max_(x, y); }  // y where one is NaN
SPK_HD double largest(double x, double y) { return x > y ? x : y; }
SPK_HD floats magnitude(floats x) { return bit_cast<floats>(bit_cast<ints>(x) & 0x7fffffff); }
SPK_HD double magnitude(double x) { return x < 0 ? -x : x; }

// Decays exp(dt A) are 2^x with x = dt decay_rate(A); about 1 ulp, correctly rounded near x = 0. BOUNDED: |x| < kBound is
// known; else it saturates as scan.h's decay does.
constexpr float kBound = 126;
SPK_HD float decay_rate(float A) { return A * 1.44269504f; }
SPK_HD double decay_rate(double A) { return A; }

template <bool BOUNDED, int N>
SPK_HD Pack<floats, N> decays(Pack<floats, N> x) {
  using V = Pack<floats, N>;
  if (!BOUNDED) x = at_most(at_least(x, -127.f), 127.99999f);
  const V m = x + 12582912.f, n = m - 12582912.f, r = x - n, z = r * r;
  const V K = (z * -9.204540401697e-4f + 1.155239567161e-1f) * z + 2.885390043259f;  // over ln 2, and r in units of it
  return times_power((r + r) / (K - r) + 1.f, m);
}
template <bool BOUNDED, int N>
SPK_HD Pack<double, N> decays(Pack<double, N> x) {
  for (int i = 0; i < N; ++i) x.v[i] = decay(double(x.v[i]), 1.);
  return x;
}

// softplus(x), and its slope with SLOPE.
template <bool SLOPE, int N>
SPK_HD Pack<floats, N> softplus(const Pack<floats, N>& x, Pack<floats, N>& slope) {
  using V = Pack<floats, N>;
  V y;
  for (int i = 0; i < N; ++i) y.v[i] = bit_cast<floats>(bit_cast<ints>(x.v[i]) | INT32_MIN);
  y = at_least(y, -87.f);
  const V m = y * 1.44269504f + 12582912.f, n = m - 12582912.f;
  const V r = (y - n * 0.693359375f) - n * -2.12194440e-4f, z = r * r;
  const V K = (z * -2.763921627775e-3f + 1.666658371687e-1f) * z + 2.f;
  const V below = K - r, above = times_power(K + r, m);    // exp(-|x|) = above / below
  const V s = above / (below + below + above), t = s * s;  // log(1 + e) = 2 atanh(e / (2 + e))
  V p = t * 2.8011985677e-1f + 2.8001805513e-1f;
  p = p * t + 4.0021527224e-1f;
  p = p * t + 6.6666416286e-1f;
  p = p * (t * s) + (s + s);
  if (SLOPE) {
    for (int i = 0; i < N; ++i) slope.v[i] = x.v[i] > 0 ? below.v[i] : above.v[i];
    slope = slope / (below + above);
  }
  return at_least(x, 0.f) + p;
}
template <bool SLOPE, int N>
SPK_HD Pack<double, N> softplus(Pack<double, N> x, Pack<double, N>& slope) {
  for (int i = 0; i < N; ++i) {
    if (SLOPE) slope.v[i] = spk::softplus_slope(x.v[i]);
    x.v[i] = spk::softplus(x.v[i]);
  }
  return x;
}

// dt of n rows [n][16] from delta, in place, and its slope where SLOPE asks for that and SOFTPLUS gives it one; returns the
// largest magnitude. It takes whole packs, three rows past n at most. ahead(l) comes before row l.
template <bool SOFTPLUS, bool SLOPE, class A, class F>
inline __attribute__((always_inline)) A step_sizes(A* dt, A* slope, const A* bias, int n, F ahead) {
  using V = typename Vector<A>::type;
  constexpr int W = Vector<A>::W;
  A most[W] = {}, over_all = 0;
  V seen = load<V>(most);
  for (int i = 0; i < n * 16; i += kPack<A>) {
    for (int l = i / 16; l < (i + kPack<A>) / 16; ++l) ahead(l);
    Packed<A> x = Packed<A>::load(dt + i), to;
    for (int j = 0; j * W < kPack<A>; ++j) x.v[j] = x.v[j] + load<V>(bias + j * W % 16);
    if (SOFTPLUS) x = softplus<SLOPE>(x, to);
    x.store(dt + i);
    if (SLOPE && SOFTPLUS) to.store(slope + i);
    for (int j = 0; j * W < kPack<A>; ++j) seen = largest(SOFTPLUS ? x.v[j] : magnitude(x.v[j]), seen);
  }
  store(most, seen);
  for (const A x : most) over_all = largest(x, over_all);
  return over_all;
}

// Adds n rows to total, one after the other: long sums round less in two stages, over a few terms, then in double.
template <class A>
__attribute__((noinline)) void add_rows(double* __restrict__ total, const A (*rows)[16], int n) {
  for (int r = 0; r < n; ++r)
    for (int i = 0; i < 16; ++i) total[i] += rows[r][i];
}

// n numbers, a multiple of 16, to each of 16 rows that are `step` apart, of a result of so many bytes: one that is too large
// to stay in a cache goes past them, for an ordinary write would first read its line.
template <class A>
inline void put_rows(A* to, const A (*from)[16], int64_t n, int64_t step, int64_t bytes) {
  constexpr int64_t kStreamBytes = 8 << 20;
  const bool lines = reinterpret_cast<uintptr_t>(to) % 64 == 0 && step * sizeof(A) % 64 == 0;
  const auto row = [&](int64_t l) { return [=](int i) { return to + i * step + l; }; };
  const auto column = [&](int64_t l) { return [=](int k) { return from[l + k]; }; };
  if (lines && bytes >= kStreamBytes)
    for (int64_t l = 0; l < n; l += 16) transpose16<A, true>(row(l), column(l));
  else
    for (int64_t l = 0; l < n; l += 16) transpose16<A>(row(l), column(l));
}

// What a walk does with its part of y: drop it; add it to what is there; put it there, with skip u.
enum class Out { none, add, first };

// R states (h, rates: [R][16]; Bs[r], Cs[r]: a number for each place) of 16 channels (dt, u, y: [places][16]) through the n
// steps of a walk whose step l is at place(l), four decays at a time; y's row is to(l).
// dt may be read, at a place(l) that is one, up to three steps past n.
template <Out OUT, bool BOUNDED, int R, class A, class F, class G>
inline __attribute__((always_inline)) void walk(A* h, const A* rates, const A* dt, const A* u, A* y, const A* skip,
                                                const A* const* Bs, const A* const* Cs, int n, F place, G to) {
  using V = typename Vector<A>::type;
  constexpr int P = 4 / R;  // steps
  for (int i = 0; i < 16; i += Vector<A>::W) {
    V state[R], rate[R], D{};
    for (int r = 0; r < R; ++r) state[r] = load<V>(h + r * 16 + i), rate[r] = load<V>(rates + r * 16 + i);
    if (OUT == Out::first) D = load<V>(skip + i);
    for (int l = 0; l < n; l += P) {
      Pack<V, 4> a;
      V t[P];
      for (int j = 0; j < P; ++j) {
        t[j] = load<V>(dt + place(l + j) * 16 + i);
        for (int r = 0; r < R; ++r) a.v[j * R + r] = t[j] * rate[r];
      }
      a = decays<BOUNDED>(a);
      for (int j = 0; j < P && (P == 1 || l + j < n); ++j) {
        const int64_t p = place(l + j);
        const V in = load<V>(u + p * 16 + i), x = t[j] * in;
        V out[R];
        for (int r = 0; r < R; ++r) {
          state[r] = scan_step(state[r], a.v[j * R + r], x * Bs[r][p]);
          if (OUT != Out::none) out[r] = state[r] * Cs[r][p];
        }
        if (OUT != Out::none) {
          for (int m = R / 2; m > 0; m /= 2)  // the fewer sums one after the other, the fewer roundings
            for (int r = 0; r < m; ++r) out[r] = out[r] + out[r + m];
          A* const sum = y + to(l + j) * 16 + i;
          store(sum, (OUT == Out::first ? in * D : load<V>(sum)) + out[0]);
        }
      }
    }
    for (int r = 0; r < R; ++r) store(h + r * 16 + i, state[r]);
  }
}

}  // namespace SPK_ISA
}  // namespace spk
