// Derivatives of the surrogates (formulas and sources: spikecore/surrogate.py), for host and device.
#pragma once
#include <math.h>
#include <string.h>

#include "core/params.h"

namespace spk {

// The numbers are those of `kind` in spikecore/surrogate.py; a test compares the two.
enum class Surrogate : int32_t { atan, sigmoid, rectangle, triangle, fast_sigmoid, erf, leaky_relu };
constexpr int kSurrogates = 7;

namespace {  // internal linkage: each per-ISA object keeps its own copy

template <class To, class From>
SPK_HD To bit_cast(From x) {
  To y;
  memcpy(&y, &x, sizeof(To));
  return y;
}

// exp for float, the same bits on every backend and vectorisable: Cody-Waite reduction by multiples of ln 2 and Cephes'
// polynomial; about 1 ulp. Below -87.3 it gives 0 (no subnormals), above 88.7 infinity.
SPK_HD float exp_(float x) {
  const float n = (x * 1.44269504f + 12582912.f) - 12582912.f;  // to nearest integer, by the float's own rounding
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * (r * r) + r) + 1.f;
  const int32_t e = bit_cast<int32_t>(x * 1.44269504f + 12582912.f) - 0x4b400000;
  // Two factors, so that 2^128 never has to be represented.
  const float y = p * bit_cast<float>(((e >> 1) + 127) << 23) * bit_cast<float>((e - (e >> 1) + 127) << 23);
  return x > 88.7228f ? INFINITY : (x < -87.3365f ? 0.f : (x != x ? x : y));
}
SPK_HD double exp_(double x) { return ::exp(x); }

template <class A>
SPK_HD A abs_(A x) {
  return x < 0 ? -x : x;
}

// ds/du at u = h - v_threshold; a and b are the surrogate's parameters.
template <Surrogate K, class A>
SPK_HD A surrogate(A u, A a, A b) {
  if (K == Surrogate::atan) {
    const A t = (A(1.5707963267948966) * a) * u;
    return (a / 2) / (1 + t * t);
  }
  if (K == Surrogate::sigmoid) {
    const A s = 1 / (1 + exp_(-(a * u)));
    return a * s * (1 - s);
  }
  if (K == Surrogate::rectangle) return abs_(u) < a / 2 ? 1 / a : A(0);
  if (K == Surrogate::triangle) {
    const A y = 1 - abs_(u) / a;
    return (y < 0 ? A(0) : y) / a;
  }
  if (K == Surrogate::fast_sigmoid) {
    const A t = 1 + a * abs_(u);
    return 1 / (t * t);
  }
  if (K == Surrogate::erf) {
    const A t = a * u;
    return a * A(0.5641895835477563) * exp_(-(t * t));
  }
  return u >= 0 ? a : b;  // leaky_relu
}

}  // namespace
}  // namespace spk
