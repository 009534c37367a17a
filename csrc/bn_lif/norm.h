// Batch norm of one number and its derivative: the formulas of spikecore/ops/bn_lif.py, for CPU and CUDA; contracted nowhere
// (see lif/neuron.h).
#pragma once
#include <math.h>

#include "core/params.h"

namespace spk {
namespace {  // internal linkage: each per-ISA object keeps its own copy

// 1 / standard deviation from the variance in the state type A.
template <class A>
SPK_HD A inverse_std(A var, double eps) {
  return A(1.0 / sqrt(double(var) + eps));
}

template <class A>
SPK_HD A normalise(A x, A mean, A scale, A bias) {
  return (x - mean) * scale + bias;
}

// Gradient of x where the statistics are those of x: g_mean is the mean of g, slope = inverse_std^2 * mean of g * (x - mean).
template <class A>
SPK_HD A normalise_backward(A g, A x, A mean, A scale, A g_mean, A slope) {
  return scale * ((g - g_mean) - (x - mean) * slope);
}

// Mean and biased variance from sums of d = x - k and of d * d over n numbers.
SPK_HD void moments(double k, double sum, double squares, double n, double* mean, double* var) {
  const double shift = sum / n, v = (squares - sum * shift) / n;
  *mean = k + shift;
  *var = v < 0 ? 0 : v;
}

}  // namespace
}  // namespace spk
