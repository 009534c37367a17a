// A neuron as the schemas carry it: where its decay and gain are numbers, and all else, in one list.
#pragma once
#include <cmath>

#include "core/surrogate.h"
#include "torch/checks.h"

namespace spk {

struct NeuronNumbers {
  double decay, gain, threshold, rest, reset_by;
  bool hard, strict, detach;
  int32_t surrogate;
  double a, b;
};

// The order is that of `encode` in spikecore/ops/lif.py; v_reset is NaN for soft reset.
inline NeuronNumbers neuron_numbers(const char* op, const char* arg, const std::vector<double>& n) {
  SPK_CHECK(n.size() == 10, op, ": ", arg, " must be 10 numbers, got ", n.size());
  SPK_CHECK(n[7] >= 0 && n[7] < kSurrogates, op, ": surrogate must be 0 to ", kSurrogates - 1, ", got ", n[7]);
  const bool hard = !std::isnan(n[3]);
  return {n[0], n[1], n[2], hard ? n[3] : 0, n[4], hard, n[5] != 0, n[6] != 0, int32_t(n[7]), n[8], n[9]};
}

}  // namespace spk
