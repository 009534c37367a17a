// The scan's functions, one step and its derivative: the formulas of spikecore/ops/selective_scan.py, for every backend.
// V is float, double, or a vector of floats that has the operators + - * < ?: (a specialised Bits gives its integers).
#pragma once
#include "core/surrogate.h"

namespace spk {
namespace {  // internal linkage: each per-ISA object keeps its own copy

template <class V>
SPK_HD V at_least(V x, V low) {  // NaN stays NaN, in both
  return x < low ? low : x;
}
template <class V>
SPK_HD V at_most(V x, V high) {
  return high < x ? high : x;
}

// a b + c. CUDA source (compiled by nvcc or for the shim) rounds it once: one instruction instead of two.
template <class V>
SPK_HD V mul_add(V a, V b, V c) {
  return a * b + c;
}
#if defined(__CUDACC__) || defined(SPK_HOST)
SPK_HD float mul_add(float a, float b, float c) { return fmaf(a, b, c); }
#endif

// exp(x) for float, about 1 ulp, correctly rounded near x = 0 (most decays are close to 1, and their errors add up over the
// sequence). It saturates just below the largest float instead of at infinity, so that a state of 0 stays 0; where exp(x)
// is below 2^-126 it gives some subnormal.
SPK_HD float saturating_exp(float x) {
  x = at_most(at_least(x, -88.029686f), 88.72283f);                         // -127 ln 2 rounded up, 128 ln 2 rounded down
  const float m = mul_add(x, 1.44269504f, 12582912.f), n = m - 12582912.f;  // the nearest integer, also in the low bits of m
  const float r = mul_add(n, 2.12194440e-4f, mul_add(n, -0.693359375f, x));
  float p = mul_add(r, 1.381460204e-3f, 8.368715202e-3f);
  p = mul_add(p, r, 4.166838788e-2f);
  p = mul_add(p, r, 1.666652065e-1f);
  p = mul_add(p, r, 4.999999345e-1f);
  p = mul_add(p, r, 1.f);
  p = mul_add(p, r, 1.f);
  return bit_cast<float>(bit_cast<int32_t>(p) + (bit_cast<int32_t>(m) << 23));
}

// exp(dt A), never infinite.
SPK_HD float decay(float dt, float A) { return saturating_exp(dt * A); }
SPK_HD double decay(double dt, double A) { return at_most(::exp(dt * A), 1.7976931348623157e308); }

// h[l] from h[l-1]; x is dt B u. Its derivative in backward: with g the gradient of h[l],
//   g_x = g,  g_a = g * h[l-1],  g of h[l-1] += a * g,  and a = exp(dt A):  g_dt += A (g_a a),  g_A += dt (g_a a).
template <class V>
SPK_HD V scan_step(V h, V a, V x) {
  return mul_add(a, h, x);
}
// The decay of two neighbouring steps or stretches (their x: scan_step of the earlier x by the later a). It saturates too:
// inf * 0 would make a NaN that no step by step scan has.
SPK_HD float join_decay(float a1, float a2) { return at_most(a1 * a2, 3.402823466e38f); }

// log(1 + exp(x)), for x > 20 x itself, as torch.nn.functional.softplus.
SPK_HD float softplus(float x) {
  const float e = saturating_exp(-abs_(x));
  const float s = e / (2 + e), t = s * s;  // log(1 + e) = 2 atanh(s)
  float p = mul_add(2.8011985677e-1f, t, 2.8001805513e-1f);
  p = mul_add(p, t, 4.0021527224e-1f);
  p = mul_add(p, t, 6.6666416286e-1f);
  p = mul_add(p, t * s, 2 * s);
  return (x > 0 ? x : 0) + p;
}
SPK_HD double softplus(double x) { return x > 20 ? x : ::log1p(::exp(x)); }
SPK_HD float softplus_slope(float x) { return 1 / (1 + saturating_exp(-x)); }
SPK_HD double softplus_slope(double x) { return x > 20 ? 1 : 1 / (1 + ::exp(-x)); }

template <class A>
SPK_HD A sigmoid(A x) {
  return 1 / (1 + exp_(-x));
}
template <class A>
SPK_HD A silu(A x) {
  return x / (1 + exp_(-x));
}
template <class A>
SPK_HD A silu_slope(A x) {
  const A s = sigmoid(x);
  return s * (1 + x * (1 - s));
}

}  // namespace
}  // namespace spk
