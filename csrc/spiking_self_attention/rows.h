// Rows of neurons, and rows of tiles to and from memory.
#pragma once
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "core/simd.h"
#include "core/surrogate.h"
#include "lif/neuron.h"
#include "spiking_self_attention/products.h"
#include "spiking_self_attention/spiking_self_attention.h"

namespace spk {
namespace SPK_ISA {
namespace {

// The neuron of one head.
template <class A>
struct Cell {
  Neuron<A> c;
  A decay, gain, a, b;
  bool hard, detach;
  int32_t surrogate;

  Cell(const AttentionNeuron& p, int64_t head)
      : decay(pick(p.lif.decay_c, p.lif.decay, p.lif.C, head)),
        gain(pick(p.lif.gain_c, p.lif.gain, p.lif.C, head)),
        a(A(p.a)),
        b(A(p.b)),
        hard(p.lif.hard),
        detach(p.detach),
        surrogate(p.surrogate) {
    const A threshold = A(p.lif.threshold);
    const A above = sizeof(A) == 4 ? A(nextafterf(float(threshold), INFINITY)) : A(nextafter(double(threshold), INFINITY));
    // Nothing lies above infinity, and no potential is >= NaN.
    c = {A(p.lif.rest), !p.lif.strict ? threshold : above > threshold ? above : A(NAN), threshold, A(p.lif.reset_by)};
  }
  static A pick(const void* per_head, double number, int64_t C, int64_t head) {
    return per_head ? static_cast<const A*>(per_head)[C == 1 ? 0 : head] : A(number);
  }
};

// A row goes by kPad numbers: of a tile to the padding; of other memory, what is left of a row goes by way of the stack.

// One step of a row on the currents factor * x; x, v and h are of tiles; s may be x. KEEP: also the potentials h.
template <bool HARD, bool AT_ZERO, bool KEEP, class A>
SPK_NOINLINE void step_row(const A* x, A factor, A* v, A* h, A* s, A decay, A gain, const Neuron<A> c, int64_t n) {
  const auto block = [&](int64_t i, A* to) __attribute__((always_inline)) {
#pragma GCC ivdep
    for (int j = 0; j < kPad; ++j) {
      const A hi = charge(v[i + j], factor * x[i + j], decay, gain, AT_ZERO ? A(0) : c.rest);
      if (KEEP) h[i + j] = hi;
      to[j] = hi >= c.fire_at ? A(1) : A(0);
      v[i + j] = reset(hi, HARD, c);
    }
  };
  int64_t i = 0;
  for (; i + kPad <= n; i += kPad) block(i, s + i);
  if (i == n) return;
  alignas(64) A last[kPad];
  block(i, last);
  memcpy(s + i, last, size_t(n - i) * sizeof(A));
}

template <Surrogate K, class A>
SPK_NOINLINE void surrogate_row(A* __restrict__ sg, const A* __restrict__ h, A threshold, A a, A b, int64_t n) {
  for (int64_t i = 0, end = padded(n); i < end; ++i) sg[i] = surrogate<K, A>(h[i] - threshold, a, b);
}

// g_v comes in as the gradient of v[t] and goes out as that of v[t-1]; g_x = factor * that of the current; g_x may be g_s.
template <bool HARD, bool DETACH, class A>
SPK_NOINLINE void back_row(const A* h, const A* sg, const A* g_s, A* g_v, A* g, A* g_x, A factor, A decay, A gain,
                           const Neuron<A> c, int64_t n) {
  const auto block = [&](int64_t i, const A* from, A* to) __attribute__((always_inline)) {
#pragma GCC ivdep
    for (int j = 0; j < kPad; ++j) {
      const A gi = step_backward<false>(h[i + j], from[j], g_v[i + j], A(0), sg[i + j], HARD, DETACH, c);
      g[i + j] = gi;
      to[j] = factor * (gain * gi);
      g_v[i + j] = decay * gi;
    }
  };
  int64_t i = 0;
  for (; i + kPad <= n; i += kPad) block(i, g_s + i, g_x + i);
  if (i == n) return;
  alignas(64) A last[kPad] = {};
  memcpy(last, g_s + i, size_t(n - i) * sizeof(A));
  block(i, last, last);
  memcpy(g_x + i, last, size_t(n - i) * sizeof(A));
}

// A sum over a head, in double: the lanes of a row, these as a tree, row after row.
struct Sum {
  static constexpr int kLanes = 16;
  double total = 0;

  template <class A>
  void add(const A* g, const A* x, A factor, A minus, int64_t n) {
    double lanes[kLanes] = {};
    for (int64_t i = 0; i < n; i += kLanes) {
      const int m = int(n - i < kLanes ? n - i : kLanes);
      for (int j = 0; j < m; ++j) lanes[j] += double(g[i + j]) * double(factor * x[i + j] - minus);
    }
    for (int width = kLanes / 2; width > 0; width /= 2)
      for (int j = 0; j < width; ++j) lanes[j] += lanes[j + width];
    total += lanes[0];
  }
  template <class A>
  void store(void* out, int64_t head) const {
    if (out) static_cast<A*>(out)[head] = A(total);
  }
};

template <class A>
void reset_row(A* v, const A* h, bool hard, const Neuron<A> c, int64_t n) {
  for (int64_t i = 0, end = padded(n); i < end; ++i) v[i] = reset(h[i], hard, c);
}

inline float number(float x) { return x; }
inline double number(double x) { return x; }
inline float number(bf16 x) { return to_float(x); }
inline float number(f16 x) { return to_float(x); }
inline void put(float* d, float x) { *d = x; }
inline void put(double* d, double x) { *d = x; }
inline void put(bf16* d, float x) { *d = to_bf16(x); }
inline void put(f16* d, float x) { *d = to_f16(x); }

template <class T, class A>
SPK_NOINLINE void load_rows(A* d, int64_t ld, const T* s, int64_t row, int64_t column, int64_t D, int64_t n) {
  for (int64_t r = 0; r < D; ++r, d += ld, s += row)
    if (column == 1)
      load_row(d, s, int(n));
    else
      for (int64_t i = 0; i < n; ++i) d[i] = number(s[i * column]);
}
template <class T, class A>
SPK_NOINLINE void store_rows(T* d, int64_t row, int64_t column, const A* s, int64_t ld, int64_t D, int64_t n) {
  for (int64_t r = 0; r < D; ++r, d += row, s += ld)
    if (column == 1)
      store_row(d, s, int(n));
    else
      for (int64_t i = 0; i < n; ++i) put(d + i * column, s[i]);
}
template <class A>
SPK_NOINLINE void load_bits(A* d, int64_t ld, const uint8_t* s, int bit, int64_t row, int64_t column, int64_t D, int64_t n) {
  for (int64_t r = 0; r < D; ++r, d += ld, s += row)
    for (int64_t i = 0; i < n; ++i) d[i] = A(s[i * column] >> bit & 1);
}
template <class A>
SPK_NOINLINE void store_bits(uint8_t* d, int bit, int64_t row, int64_t column, const A* s, int64_t ld, int64_t D, int64_t n) {
  for (int64_t r = 0; r < D; ++r, d += row, s += ld)
    for (int64_t i = 0; i < n; ++i) d[i * column] = uint8_t((bit ? d[i * column] : 0) | (s[i] != 0 ? 1 << bit : 0));
}

}  // namespace
}  // namespace SPK_ISA
}  // namespace spk
