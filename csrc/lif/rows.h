// lif's loops over rows of neurons, as other operators' CPU kernels call them: compiled once, in lif_cpu.cpp.
#pragma once
#include <math.h>

#include "lif/lif.h"
#include "lif/neuron.h"

namespace spk {
namespace SPK_ISA {

// Row loops are shared by all element types and variants of the walk around them; inlined, they compile for minutes.
#define SPK_NOINLINE __attribute__((noinline))

constexpr int kLifUnroll = 4;  // time steps that a row loop carries through registers

// Time steps of n neurons with currents x, one row a step: the potentials pass from `from` to `to` (which may be the same
// row), spikes to the rows s and potentials before the reset to h, where the loop writes them. With one decay and gain for
// all (C = 1) the first of their rows counts. down: from the rows' ends to their starts (see `direction` in lif_cpu.cpp).
template <class A>
using LifForth = void(const A* const* x, const A* from, A* to, A* const* s, A* const* h, const A* decay, const A* gain, Neuron<A> c,
                      int n, bool down);

template <class A>
struct LifBack {
  // kLifUnroll steps from the potentials `start`; g_v: gradient of the last v, on return that of `start`.
  void (*steps)(const A* const* x, const A* start, const A* const* g_s, A* g_v, A* const* g_x, const A* decay, const A* gain,
                Neuron<A> c, A a, A b, int n, bool down);
  // One step from its row of h; g is left holding the gradient of h.
  void (*step)(const A* h, const A* g_s, const A* g_h, A* g_v, A* g, A* g_x, const A* decay, const A* gain, Neuron<A> c, A a, A b,
               int n);
};

template <class A>
struct LifRows {
  LifForth<A>*spikes, *advance;      // kLifUnroll steps, with and without spikes
  LifForth<A>*spikes_h, *advance_h;  // one step; both write h
  LifBack<A> back;
};
LifRows<float> lif_rows(const LifNeuron& p, bool detach, int surrogate, float);
LifRows<double> lif_rows(const LifNeuron& p, bool detach, int surrogate, double);

namespace {

template <class A>
Neuron<A> constants(const LifNeuron& p) {
  const A threshold = A(p.threshold);
  const A above = sizeof(A) == 4 ? A(nextafterf(float(threshold), INFINITY)) : A(nextafter(double(threshold), INFINITY));
  // Nothing lies above infinity, and no potential is >= NaN.
  return {A(p.rest), !p.strict ? threshold : above > threshold ? above : A(NAN), threshold, A(p.reset_by)};
}

template <class A>
void fill_row(A* d, A value, int n) {
  for (int i = 0; i < n; ++i) d[i] = value;
}
template <class A>
void add_row(A* __restrict__ d, const A* __restrict__ s, int n) {
  for (int i = 0; i < n; ++i) d[i] += s[i];
}
template <class A>
void reset_row(A* __restrict__ v, const A* __restrict__ h, bool hard, const Neuron<A> c, int n) {
  if (hard)
    for (int i = 0; i < n; ++i) v[i] = reset(h[i], true, c);
  else
    for (int i = 0; i < n; ++i) v[i] = reset(h[i], false, c);
}

}  // namespace
}  // namespace SPK_ISA
}  // namespace spk
