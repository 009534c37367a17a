// What the checks of CPU kernels without torch share: random numbers, half precision by its definition, arrays that
// sanitizers see the end of.
#pragma once
#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "core/isa.h"
#include "core/params.h"

namespace {

using namespace spk;

int failures = 0;
std::string context;

void fail(const char* what, int64_t i, double got, double want) {
  if (++failures <= 20) printf("%s: %s[%" PRId64 "] is %.17g, must be %.17g\n", context.c_str(), what, i, got, want);
}

bool same(double a, double b) { return a == b || (isnan(a) && isnan(b)); }

// ---- numbers -------------------------------------------------------------------------------------------------------

uint64_t random_state = 1;
uint64_t random_bits() {  // splitmix64
  uint64_t z = (random_state += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}
int64_t below(int64_t n) { return static_cast<int64_t>(random_bits() % static_cast<uint64_t>(n)); }
bool coin() { return random_bits() & 1; }
double uniform(double lo, double hi) { return lo + (hi - lo) * static_cast<double>(random_bits() >> 11) * 0x1p-53; }

struct Format {  // of a half-precision type
  int mantissa, bias;
};
constexpr Format kF16{10, 15}, kBf16{7, 127};

double decoded(uint16_t bits, Format f) {
  const int exponent = (bits & 0x7fff) >> f.mantissa, fraction = bits & ((1 << f.mantissa) - 1);
  const int top = 2 * f.bias + 1;
  double v;
  if (exponent == top)
    v = fraction ? NAN : INFINITY;
  else if (exponent == 0)
    v = ldexp(fraction, 1 - f.bias - f.mantissa);
  else
    v = ldexp(fraction + (1 << f.mantissa), exponent - f.bias - f.mantissa);
  return bits & 0x8000 ? -v : v;
}

double decode(uint16_t bits, Format f) {
  static const auto table = [](Format format) {
    std::vector<double> t;
    for (int i = 0; i < 1 << 16; ++i) t.push_back(decoded(uint16_t(i), format));
    return t;
  };
  static const std::vector<double> f16 = table(kF16), bf16 = table(kBf16);
  return (f.bias == kF16.bias ? f16 : bf16)[bits];
}

// The number of the format nearest to x, ties to even.
double rounded(double x, Format f) {
  if (!isfinite(x) || x == 0) return x;
  const int exponent = std::max(ilogb(x), 1 - f.bias);
  const double y = ldexp(nearbyint(ldexp(x, f.mantissa - exponent)), exponent - f.mantissa);
  return fabs(y) >= ldexp(1, f.bias + 1) ? copysign(INFINITY, x) : y;
}

Format format_of(DType d) { return d == DType::f16 ? kF16 : kBf16; }
bool is_half(DType d) { return d == DType::f16 || d == DType::bf16; }
size_t size_of(DType d) { return d == DType::f64 ? 8 : d == DType::f32 ? 4 : 2; }
const char* name_of(DType d) {
  const char* const names[] = {"f32", "bf16", "f16", "f64"};
  return names[static_cast<int>(d)];
}

struct Free {
  void operator()(unsigned char* p) const { ::operator delete[](p, std::align_val_t(64)); }
};

// n elements of a type, filled with NaN: aligned as torch does it, in an allocation of exactly their size, so that
// sanitizers see every step past it.
struct Array {
  DType dtype;
  int64_t n;
  std::unique_ptr<unsigned char[], Free> bytes;

  Array(DType dtype, int64_t n)
      : dtype(dtype), n(n), bytes(static_cast<unsigned char*>(::operator new[](size(), std::align_val_t(64)))) {
    memset(bytes.get(), 0xff, size());
  }
  size_t size() const { return size_t(n) * size_of(dtype); }
  void* data() { return n ? bytes.get() : nullptr; }
  double operator[](int64_t i) const {
    const unsigned char* p = bytes.get() + size_t(i) * size_of(dtype);
    if (dtype == DType::f64) return read<double>(p);
    if (dtype == DType::f32) return double(read<float>(p));
    return decode(read<uint16_t>(p), format_of(dtype));
  }
  void put(int64_t i, double v) {
    unsigned char* p = bytes.get() + size_t(i) * size_of(dtype);
    if (dtype == DType::f64) {
      memcpy(p, &v, 8);
    } else if (dtype == DType::f32) {
      const float f = float(v);
      memcpy(p, &f, 4);
    } else {  // by search: slow, but needs no encoder
      const uint16_t b = encode(rounded(v, format_of(dtype)), format_of(dtype));
      memcpy(p, &b, 2);
    }
  }
  void fill(double lo, double hi, bool grid) {
    const int64_t period = std::min<int64_t>(n, 100003);  // long ones repeat
    for (int64_t i = 0; i < period; ++i) put(i, grid ? nearbyint(uniform(4 * lo, 4 * hi)) / 4 : uniform(lo, hi));
    for (size_t done = size_t(period) * size_of(dtype); done < size();) {
      const size_t more = std::min(done, size() - done);
      memcpy(bytes.get() + done, bytes.get(), more);
      done += more;
    }
  }

 private:
  template <class T>
  static T read(const unsigned char* p) {
    T v;
    memcpy(&v, p, sizeof(T));
    return v;
  }
  static uint16_t encode(double v, Format f) {
    if (isnan(v)) return 0x7fff;
    uint16_t lo = 0, hi = uint16_t((2 * f.bias + 1) << f.mantissa);  // 0 and infinity
    while (lo < hi) {
      const uint16_t mid = uint16_t((lo + hi) / 2);
      if (decode(mid, f) < fabs(v))
        lo = uint16_t(mid + 1);
      else
        hi = mid;
    }
    return uint16_t(lo | (signbit(v) ? 0x8000 : 0));
  }
};

// ---- comparing

using Numbers = std::vector<double>;

// |got - want| within `ulps` roundings of the state and one of the output, measured by the largest of the array.
[[maybe_unused]] void close(const char* what, const Array& got, const Numbers& want, DType state, double ulps) {
  double largest = 1;
  for (double w : want) largest = std::max(largest, fabs(w));
  const double eps = state == DType::f64 ? 0x1p-52 : 0x1p-23;
  const double half = is_half(got.dtype) ? ldexp(1, -format_of(got.dtype).mantissa - 1) : 0;
  for (int64_t i = 0; i < got.n; ++i)
    if (!same(got[i], want[size_t(i)]) &&
        !(fabs(got[i] - want[size_t(i)]) <= ulps * eps * largest + half * fabs(want[size_t(i)]) + (half ? 0x1p-24 : 0)))
      fail(what, i, got[i], want[size_t(i)]);
}

// Chunks in two calls, the way threads share them.
template <class F, class P>
void run(F* f, const P& p, int64_t count) {
  const int64_t middle = count / 2;
  if (middle && f(p, 0, middle) != kOk) fail("return code", 0, 1, 0);
  if (f(p, middle, count) != kOk) fail("return code", 1, 1, 0);
}

}  // namespace
