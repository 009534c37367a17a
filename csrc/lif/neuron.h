// One step of the neuron and its derivative: the formulas of spikecore/ops/lif.py, for every backend. Compiled without
// contraction everywhere (-ffp-contract=off, -fmad=false), so that spikes are the same on all of them and backward's
// recomputation meets forward's spikes.
#pragma once
#include "core/params.h"

namespace spk {

// Constants in the state type A. `fire_at` is the smallest potential that fires: v_threshold, or with strict=True the
// next number above it, so that one comparison serves both.
template <class A>
struct Neuron {
  A rest, fire_at, threshold, reset_by;
};

namespace {  // internal linkage: each per-ISA object keeps its own copy

template <class A>
SPK_HD A charge(A v, A x, A decay, A gain, A rest) {
  // At rest 0 the same numbers come out of a chain of two operations instead of four.
  return (rest == 0 ? decay * v : rest + decay * (v - rest)) + gain * x;
}

template <class A>
SPK_HD A reset(A h, bool hard, const Neuron<A>& c) {
  const bool s = h >= c.fire_at;
  return hard ? (s ? c.rest : h) : h - (s ? c.reset_by : A(0));
}

// g_h from the gradients of the spike, of v (after the reset) and of h itself (OF_H: else it is none); sg is the
// surrogate's derivative at h.
template <bool OF_H = true, class A>
SPK_HD A step_backward(A h, A g_s, A g_v, A g_h, A sg, bool hard, bool detach, const Neuron<A>& c) {
  const bool s = h >= c.fire_at;
  A g = g_s * sg + (hard && s ? A(0) : g_v);
  if (OF_H) g = g + g_h;
  // Where sg is 0 nothing passes, also at infinite h, where the product would be NaN.
  if (!detach) g = g + g_v * (sg == 0 ? A(0) : (hard ? c.rest - h : -c.reset_by) * sg);
  return g;
}

}  // namespace
}  // namespace spk
